"""`fit_images`: a detector for a user's own images, by a head that is trained on a frozen backbone."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import PIL
import torch
from PIL import Image
from torch import Tensor, nn

from featnorm import archive
from featnorm._utils.checks import check_share, check_type
from featnorm._utils.errors import UserCodeError
from featnorm._utils.layout import fast_layout
from featnorm._utils.weights import single_precision
from featnorm.calibration import Calibration
from featnorm.detectors import Detector, KLUniform
from featnorm.detectors.base import check_detector
from featnorm.features import Features
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.image_scorer import ImageScorer, backbone_of
from featnorm.inputs import (
    CachedFeatures,
    DataError,
    FeatureCache,
    ImageSource,
    SlicedSource,
    Source,
    extract_images,
    image_loader,
)
from featnorm.inputs.decoding import DECODING
from featnorm.models import LoadedModel, ProjectionHead
from featnorm.models.loading import users_forward, users_transform
from featnorm.scorer import Scorer
from featnorm.tap import FeatureTap
from featnorm.training import Recipe, train

Targets = Literal["auto", "labels", "clusters"]

#: One image in five is held out, to calibrate on.
HELD_OUT = 5
#: Fewer images leave too few to calibrate on.
LEAST_IMAGES = 100
DEFAULT_CACHE = "~/.cache/featnorm/features"
# As the paper trains heads on frozen backbones (D.4).
RECIPE = Recipe(epochs=10, batch_size=256, optimizer="sgd", lr=0.03)
CLUSTER_SIZE = 10
TEMPERATURE = 0.2
# A recipe counts epochs, and what a head needs is steps: with few images there are few in an epoch.
_LEAST_STEPS = 200
_MOST_CLUSTERS = 1000
_ROWS = 8192
# Features whose deviation is below this share of the mean one carry nothing but noise.
_LEAST_DEVIATION = 0.01


@dataclass(frozen=True)
class Fitted:
    """What `fit_images` returns.

    Attributes
    ----------
    scorer : ImageScorer
    corrupt : list of tuple of str
        Name and reason of each image that could not be read.
    trained, held_out : int
        Images that the head and the detector learned from, and that the calibration did.
    computed : int
        Images that the backbone was asked for; the features of the others were known.
    accuracy : float or None
        Of the head on the held-out images; None without labels.
    changed : int
        Images whose content changed while they were read; the later content counts.
    damaged : int
        Batches of features that were found damaged on disk and dropped; those needed were computed again.
    several : int
        Images that are the first of several frames or pages of their file.
    """

    scorer: ImageScorer
    corrupt: list[tuple[str, str]]
    trained: int
    held_out: int
    computed: int
    accuracy: float | None
    changed: int
    damaged: int
    several: int


def fit_images(
    source: ImageSource,
    loaded: LoadedModel,
    *,
    detector: Detector | None = None,
    targets: Targets = "auto",
    tpr: float = 0.95,
    cache: str | Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    fabric: Any = None,
    ray: Any = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Fitted:
    """Learn what belongs to a set of images: train a head on a frozen backbone, fit a detector, calibrate it.

    Of copies of an image one is taken. One image in five, chosen by its content, is held out for the calibration.
    The head (paper C.1) is trained on the others' features by the recipe of D.4, with class labels or, where there
    are none, with k-means clusters of the features for labels: any discriminative labels do whose classes hang
    together (paper sec. 4).

    Parameters
    ----------
    source : the images.
    loaded : the backbone, with its transform; its classifier is left out.
    detector
        `KLUniform` without it: no more to compute than `NAN`, no hyperparameter either, and far better here, where
        the backbone was never trained on these images and foreign ones may well have larger features.
    targets : "labels" or "clusters"; "auto" takes labels where every image has one and there are two at least.
    tpr : the share of images like these to accept, between 0 and 1.
    cache : the folder of a `FeatureCache`; ``~/.cache/featnorm/features`` without it.
    batch_size, workers : of `featnorm.inputs.image_loader`.
    fabric : a `lightning_fabric.Fabric` for device and precision; the CPU without it.
    ray
        A `featnorm.cluster.Cluster`, whose actors ask the backbone and fit the detector; without it this
        process does.
    seed : of the head's initial weights, its training, and the clusters.
    progress : show progress bars; None for where there is a terminal.

    Raises
    ------
    DataError
        There are fewer than 100 images that can be read, or labels are asked for and an image has none.
    ValueError
        The detector cannot work here, there are too few images for `tpr`, or what the cache refuses.
    """
    check_type(source, Source, "the images", "a source, as featnorm.inputs.open_source makes it")
    check_type(loaded, LoadedModel, "the backbone", "a LoadedModel, as featnorm.models.create_model makes it")
    detector = KLUniform() if detector is None else detector
    check_detector(detector, "fit_images")
    check_share(tpr, "tpr")
    if targets not in get_args(Targets):
        raise ValueError(f"there are no targets {targets!r}: use {', '.join(get_args(Targets))}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed must be between 0 and 2**32 - 1, got {seed}")
    every = torch.arange(len(source))
    # Before the work: it raises where labels are asked for and not there.
    if _labels(source, every, every >= 0, targets)[0] is None and "labels" in detector.learns:
        raise DataError(
            f"{detector!r} learns from labels, and {source.title} has none: put the images of each class in a "
            "folder of its own, or choose another detector"
        )
    device = torch.device("cpu") if fabric is None else fabric.device
    backbone, cut = backbone_of(loaded)
    backbone = fast_layout(backbone.to(device).eval())
    notes = [*loaded.notes, "its classifier left out" if cut else _as_it_is(backbone)]
    reading: dict[str, Any] = {"batch_size": batch_size, "workers": workers}
    asking = {"cache": cache, "fabric": fabric, "ray": ray, "progress": progress}
    known = backbone_features(source, loaded, backbone, **asking, **reading)
    several = known.several
    known = _distinct(known)
    if len(known.rows) < LEAST_IMAGES:
        raise DataError(
            f"{source.title} has {len(known.rows)} readable images, copies not counted: at least {LEAST_IMAGES} "
            f"are needed, of which one in {HELD_OUT} is held out to calibrate on"
        )
    apart = held_out(known.digests)
    Calibration(torch.zeros(int(apart.sum())), tpr)  # refuses too few of them, before the work
    learning = known.values[~apart]
    labels, names = _labels(source, known.rows, ~apart, targets)
    wanted = cluster(learning, seed) if labels is None else labels[~apart]
    head = fit_head(learning, wanted, seed=seed, progress=progress).to(device)
    lessons = (
        (learning[rows], None if labels is None else wanted[rows])
        for rows in torch.arange(len(learning)).split(_ROWS)
    )
    if ray is None:
        statistics = ActivationStatistics()
        with detector.refit():
            for values, classes in lessons:
                learn(head, detector, statistics, values.to(device), classes)
    else:
        statistics = ray.fit(lessons, head, detector)
    scorer = Scorer(nn.Sequential(backbone, head), detector)
    chosen = SlicedSource(source, known.rows[apart].tolist(), source.title)
    images = image_loader(chosen, loaded.transform, **reading)
    scorer.tap.trace(next(iter(images)).images)
    # As the images to come will be scored.
    with nullcontext() if fabric is None else fabric.autocast():
        parts = [head_features(head, part.to(device)) for part in known.values[apart].split(_ROWS)]
        if detector.needs_model:
            scorer.calibrate(((batch.images,) for batch in images), tpr, progress=progress)
        else:
            scores = torch.cat([scorer.detector.score(part) for part in parts])
            scorer.calibration = Calibration(scores, tpr).to(device)
    accuracy = None
    if labels is not None:
        guesses = torch.cat([part.tensor("logits").argmax(1).cpu() for part in parts])
        accuracy = float((guesses == labels[apart]).double().mean())
    kind = "clusters of the features" if labels is None else "classes"
    facts = {
        "images": f"{source.title}: {len(learning)} to learn from, {len(chosen)} held out to calibrate on",
        "head": f"trained on {int(wanted.max()) + 1} {kind}",
        "backbone": f"{loaded.name}, {learning.shape[1]} wide" + "".join(f"; {note}" for note in notes),
        "precision": _precision(fabric),
    }
    made = ImageScorer(loaded.name, scorer, loaded.transform, names, statistics, facts)
    counts = len(learning), len(chosen), known.computed
    return Fitted(made, known.corrupt, *counts, accuracy, known.changed, known.damaged, several)


def learn(
    head: ProjectionHead,
    detector: Detector,
    statistics: ActivationStatistics,
    values: Tensor,
    labels: Tensor | None,
) -> None:
    """Teach a detector and statistics a part of the images.

    Parameters
    ----------
    head : behind the backbone, on the device of the features.
    detector : learns where it can.
    statistics : of the head's hidden layer, on the CPU.
    values : features of the backbone (n, D).
    labels : classes (n,); None for none.
    """
    features = head_features(head, values)
    statistics.add(features.tensor("activation").cpu(), features.tensor("logits").argmax(1).cpu())
    if detector.needs_fit:
        detector.partial_fit(features if labels is None else features.replace(labels=labels.to(values.device)))


def _as_it_is(backbone: nn.Module) -> str:
    """Say of a model of the user's own that what it returns is taken for features, and when that may be wrong."""
    note = "what it returns taken for features"
    *_, (name, last) = backbone.named_modules()
    if isinstance(last, nn.Linear):
        note += f", from the linear layer {name!r}: if that is its classifier, return the model without it"
    return note


def _distinct(known: CachedFeatures) -> CachedFeatures:
    """Leave out copies: they are no further draws of what images like these look like."""
    first = sorted({digest: i for i, digest in reversed(list(enumerate(known.digests)))}.values())
    digests = [known.digests[i] for i in first]
    return replace(known, stored_rows=known.stored_rows[first], rows=known.rows[first], digests=digests)


def held_out(digests: Sequence[bytes]) -> Tensor:
    """Return which images to calibrate on, (n,) bool: every fifth content, in the order of the digests."""
    chosen = set(sorted(set(digests))[::HELD_OUT])
    return torch.tensor([digest in chosen for digest in digests])


def fit_head(
    values: Tensor, targets: Tensor, *, recipe: Recipe = RECIPE, seed: int = 0, progress: bool | None = None
) -> ProjectionHead:
    """Return a projection head that was trained on features alone (paper D.4).

    Parameters
    ----------
    values : features (n, D); whatever their scale, as they are standardised by unit for the training.
    targets : classes (n,), from 0.
    recipe : of the training; with few inputs it takes more epochs, for as many steps.
    seed : of the initial weights and the order.
    progress : show a progress bar; None for where there is a terminal.
    """
    mean, deviation = values.mean(0), values.std(0)
    # A unit that hardly moves would be blown up to noise.
    deviation = deviation.clamp(min=_LEAST_DEVIATION * float(deviation.mean().clamp(min=1e-12)))
    batch = min(recipe.batch_size, len(values))
    epochs = max(recipe.epochs, math.ceil(_LEAST_STEPS / (len(values) // batch)))
    with torch.random.fork_rng(devices=[]), single_precision():
        torch.manual_seed(seed)
        head = ProjectionHead(values.shape[1], int(targets.max()) + 1, temperature=TEMPERATURE)
    recipe = replace(recipe, batch_size=batch, epochs=epochs)
    # Standardised by the batch: the features of a large data set are mapped from a file, and stay there.
    model = nn.Sequential(_Standardised(mean, deviation), head)
    train(model, values, targets, recipe, seed=seed, progress=progress)
    # The first layer takes the standardisation in, so that the head reads features as they are.
    with torch.no_grad():
        head.hidden.weight.div_(deviation)
        head.hidden.bias.sub_(head.hidden.weight @ mean)
    return head


class _Standardised(nn.Module):
    """Features (n, D) less a mean (D,), over a deviation (D,)."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.deviation


@torch.no_grad()
def head_features(head: ProjectionHead, values: Tensor) -> Features:
    """Return what a network of a backbone and this head says of inputs whose features (n, D) are known."""
    return FeatureTap(head)(values).replace(pooled=values, call=None)


@torch.no_grad()
def headless_features(classifier: nn.Module, values: Tensor) -> Features:
    """Return what a network says, as it came, of inputs whose pooled features (n, D) are known.

    Parameters
    ----------
    classifier : its last layer, linear.
    values : the pooled features, rectified maps: they are the last hidden layer too.
    """
    weight, bias = (parameter.detach() for parameter in classifier.parameters())
    return Features(activation=values, pooled=values, logits=classifier(values), classifier=(weight, bias))


def cluster(values: Tensor, seed: int = 0, *, size: int = CLUSTER_SIZE) -> Tensor:
    """Return labels (n,) for features (n, D) without any: their k-means cluster, by cosine.

    Parameters
    ----------
    values : features (n, D).
    seed : of the first centres.
    size
        Inputs a cluster, on average; more where there would be over a thousand clusters, for the time they take.
        The default told classes best that the head was not trained on (docs/results/own-images.md).
    """
    from sklearn.cluster import KMeans

    directions = nn.functional.normalize(values).numpy()
    k = min(max(2, len(values) // size), _MOST_CLUSTERS)
    assigned = KMeans(k, n_init=1, max_iter=25, random_state=seed).fit_predict(directions)
    return torch.from_numpy(np.unique(assigned, return_inverse=True)[1])


def _labels(
    source: ImageSource, rows: Tensor, learned: Tensor, targets: Targets
) -> tuple[Tensor | None, list[str] | None]:
    """Return labels (n,) from 0 of the classes that are learned from, -1 for the others, and their names."""
    if targets == "clusters":
        return None, None
    given = [source.label(row) for row in rows.tolist()]
    without = next((i for i, label in enumerate(given) if label is None), None)
    used = [label for label, learns in zip(given, learned.tolist(), strict=True) if learns]
    classes = sorted({label for label in used if label is not None})
    if without is not None or len(classes) < 2:
        if targets == "auto":
            return None, None
        what = "a single class" if without is None else f"no class for {source.name(int(rows[without]))}"
        raise DataError(f"{source.title} has {what}: labels need two classes at least; use clusters")
    numbers = {label: i for i, label in enumerate(classes)}
    names = source.class_names
    called = [str(label) if names is None or label >= len(names) else names[label] for label in classes]
    return torch.tensor([-1 if label is None else numbers.get(label, -1) for label in given]), called


def backbone_features(
    source: ImageSource,
    loaded: LoadedModel,
    backbone: nn.Module,
    *,
    cache: str | Path | None = None,
    batch_size: int = 64,
    workers: int | None = None,
    fabric: Any = None,
    ray: Any = None,
    progress: bool | None = None,
) -> CachedFeatures:
    """Return what a backbone says of images, from its `FeatureCache`.

    Parameters
    ----------
    source : the images.
    loaded : whose transform it is, and whose name errors give.
    backbone : on its device, in eval mode.
    cache, batch_size, workers, fabric, ray, progress : see `fit_images`.

    Raises
    ------
    DataError
        As `FeatureCache.features`; or the transform gives something else every time.
    """
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def ask(images: Tensor) -> Tensor:
        images = fast_layout(images.to(device))
        with users_forward(loaded.name, backbone), nullcontext() if fabric is None else fabric.autocast():
            return backbone(images)

    key = {
        "weights": archive.fingerprint(backbone)["sha256"],
        "made of noise": _noise_digest(loaded, ask),
        "precision": _precision(fabric),
        "pillow": PIL.__version__,
        "decoding": DECODING,
    }
    if ray is None:
        extract = partial(
            extract_images, transform=loaded.transform, backbone=ask, batch_size=batch_size, workers=workers
        )
    else:
        extract = ray.extract(loaded, backbone, batch_size=batch_size, precision=_precision(fabric))
    return FeatureCache(cache or DEFAULT_CACHE, json.dumps(key)).features(source, extract, progress=progress)


def _precision(fabric: Any) -> str:
    return "32-true" if fabric is None else str(fabric.strategy.precision.precision)


def _noise_digest(loaded: LoadedModel, backbone: Callable[[Tensor], Tensor]) -> str:
    """Return what tells a transform and a backbone's code from others: what they make of two pictures."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    pictures = [Image.fromarray(noise), Image.fromarray(noise[:47, :61])]
    with users_transform(loaded.name, "a picture of noise"):
        first, again = ([loaded.transform(picture) for picture in pictures] for _ in range(2))
    if any(not torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise DataError(f"the transform of {loaded.name} is random: use the one of evaluation")
    digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in first))
    try:
        features = backbone(first[0][None])
    except UserCodeError as error:
        raise error.on("a picture of noise") from error.__cause__
    if isinstance(features, Tensor):
        # Coarsely, as the last bits may differ from run to run.
        values = features.float().cpu()
        digest.update(f"{tuple(values.shape)} {float(values.abs().mean()):.2g} {float(values.std()):.2g}".encode())
    return digest.hexdigest()
