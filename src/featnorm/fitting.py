"""`fit_images`: a detector for a user's own images, with a head trained on a frozen backbone."""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal, get_args

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
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.splitting import HELD_OUT, held_out
from featnorm.tap import FeatureTap
from featnorm.training import Recipe, train

Targets = Literal["auto", "labels", "clusters"]

#: With fewer images, too few are held out for calibration.
MIN_IMAGES = 100
DEFAULT_CACHE = "~/.cache/featnorm/features"
# How the paper trains heads on frozen backbones (D.4).
RECIPE = Recipe(epochs=10, batch_size=256, optimizer="sgd", lr=0.03)
CLUSTER_SIZE = 10
TEMPERATURE = 0.2
# A recipe counts epochs, but a head needs a number of steps, and with few images an epoch has few.
_MIN_STEPS = 200
_MAX_CLUSTERS = 1000
_ROWS = 8192
# Features whose standard deviation is below this share of the average one are noise.
_MIN_DEVIATION = 0.01


@dataclass(frozen=True)
class Fitted:
    """Result of `fit_images`.

    Attributes
    ----------
    scorer : ImageScorer
        The fitted and calibrated scorer.
    corrupt : list of tuple of str
        Name and reason of each image that could not be read.
    trained : int
        Number of images that the head and the detector were fitted to.
    held_out : int
        Number of images that the threshold was calibrated on.
    computed : int
        Number of images whose features were computed; those of the others were in the cache.
    accuracy : float or None
        Accuracy of the head on the held-out images; None without labels.
    changed : int
        Number of images whose content changed while they were read. The later content was used.
    damaged : int
        Number of batches of features that were damaged on disk and dropped. Those needed were computed again.
    several : int
        Number of images that are the first of several frames or pages of their file.
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
    seed: int = 0,
    runtime: Runtime | None = None,
) -> Fitted:
    """Train a head on a frozen backbone, fit a detector to in-distribution images, and calibrate it.

    Duplicate images are used once. One image in five, chosen by its content, is held out for calibration. The head
    (paper C.1) is trained on the features of the others by the recipe of D.4. Its targets are the class labels or,
    without labels, k-means clusters of the features: any discriminative labels will do as long as each class is
    coherent (paper sec. 4).

    Parameters
    ----------
    source : in-distribution images.
    loaded : backbone with its transform. Its classifier is removed.
    detector
        Detector to fit. Default: `KLUniform`, which costs no more than `NAN`, has no hyperparameter either, and is
        far better here: the backbone was never trained on these images, and OOD images may have larger features.
    targets
        "labels", "clusters", or "auto" for labels if every image has one and there are at least two classes.
    tpr : share of in-distribution images to accept, between 0 and 1.
    cache : folder of the `FeatureCache`. Default: ``~/.cache/featnorm/features``.
    seed : seed of the head's initial weights, its training, and the clusters.
    runtime : where and how the backbone runs. Default: `Runtime()`, on the CPU.

    Raises
    ------
    DataError
        Fewer than 100 images can be read, labels are required and an image has none, or the cache raises one.
    ValueError
        The detector cannot work here, or there are too few images for `tpr`.
    """
    check_type(source, Source, "the images", "a source made by featnorm.inputs.open_source")
    check_type(loaded, LoadedModel, "the backbone", "a LoadedModel made by featnorm.models.create_model")
    detector = KLUniform() if detector is None else detector
    check_detector(detector, "fit_images")
    check_share(tpr, "tpr")
    if targets not in get_args(Targets):
        raise ValueError(f"targets must be one of {', '.join(get_args(Targets))}, got {targets!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed must be between 0 and 2**32 - 1, got {seed}")
    every = torch.arange(len(source))
    # Before the work: it raises if labels are required and missing.
    if _labels(source, every, every >= 0, targets)[0] is None and "labels" in detector.learns:
        raise DataError(
            f"{detector!r} needs labels to fit, and {source.title} has none, or clusters are the targets: put the "
            "images of each class in a subfolder of its own and use labels, or choose another detector"
        )
    runtime = runtime or Runtime()
    device = runtime.torch_device
    backbone, cut = backbone_of(loaded)
    backbone = fast_layout(backbone.to(device).eval())
    notes = [*loaded.notes, "its classifier removed" if cut else _headless_note(backbone)]
    cached = backbone_features(source, loaded, backbone, cache=cache, runtime=runtime)
    several = cached.several
    cached = _without_duplicates(cached)
    if (count := len(cached.rows)) < MIN_IMAGES:
        raise DataError(
            f"found {count} readable image{'' if count == 1 else 's'} in {source.title} (duplicates excluded); at "
            f"least {MIN_IMAGES} are needed, because 1 in {HELD_OUT} is held out for calibration"
        )
    is_held_out = held_out(cached.digests)
    Calibration(torch.zeros(int(is_held_out.sum())), tpr)  # raises if they are too few, before the work
    train_values = cached.values[~is_held_out]
    labels, names = _labels(source, cached.rows, ~is_held_out, targets)
    train_targets = cluster(train_values, seed) if labels is None else labels[~is_held_out]
    head = fit_head(train_values, train_targets, seed=seed, progress=runtime.progress).to(device)
    parts = (
        (train_values[rows], None if labels is None else train_targets[rows])
        for rows in torch.arange(len(train_values)).split(_ROWS)
    )
    scorer = Scorer(nn.Sequential(backbone, head), detector)
    statistics = ActivationStatistics()
    if runtime.cluster is None:
        scorer.fit_features(training_features(head, statistics, parts))
    else:
        runtime.cluster.fit(parts, head, detector, statistics)
    chosen = SlicedSource(source, cached.rows[is_held_out].tolist(), source.title)
    images = image_loader(chosen, loaded.transform, batch_size=runtime.batch_size, workers=runtime.workers)
    scorer.tap.trace(next(iter(images)).images)
    # In the precision in which new images will be scored.
    with runtime.autocast():
        batches = [features_behind(head, part.to(device)) for part in cached.values[is_held_out].split(_ROWS)]
        if detector.needs_model:
            scorer.calibrate(((batch.images,) for batch in images), tpr, progress=runtime.progress)
        else:
            scorer.calibrate_features(batches, tpr)
    accuracy = None
    if labels is not None:
        predicted = torch.cat([features.tensor("logits").argmax(1).cpu() for features in batches])
        accuracy = float((predicted == labels[is_held_out]).double().mean())
    kind = "clusters of the features" if labels is None else "classes"
    facts = {
        "images": f"{source.title}: {len(train_values)} to fit on, {len(chosen)} held out for calibration",
        "head": f"trained on {int(train_targets.max()) + 1} {kind}",
        "backbone": f"{loaded.name}, {train_values.shape[1]} features" + "".join(f"; {note}" for note in notes),
        "precision": runtime.precision,
    }
    made = ImageScorer(loaded.name, scorer, loaded.transform, names, statistics, facts)
    counts = len(train_values), len(chosen), cached.computed
    return Fitted(made, cached.corrupt, *counts, accuracy, cached.changed, cached.damaged, several)


def training_features(
    head: ProjectionHead, statistics: ActivationStatistics, parts: Iterable[tuple[Tensor, Tensor | None]]
) -> Iterator[Features]:
    """Yield the features that a detector is fitted to, and update the activation statistics with them.

    Parameters
    ----------
    head : network behind the backbone.
    statistics : statistics of the head's hidden layer, on the CPU.
    parts : features of the backbone (n, D) and classes (n,), or None where there are none.
    """
    for values, labels in parts:
        values = values.to(head.hidden.weight.device)
        features = features_behind(head, values)
        statistics.update(features.tensor("activation").cpu(), features.tensor("logits").argmax(1).cpu())
        yield features if labels is None else features.replace(labels=labels.to(values.device))


def _headless_note(backbone: nn.Module) -> str:
    """Return a note that the output of a user's own model is used as features, and when that may be wrong."""
    note = "its output used as features"
    *_, (name, last) = backbone.named_modules()
    if isinstance(last, nn.Linear):
        note += f", from the linear layer {name!r}: if that is its classifier, return the model without it"
    return note


def _without_duplicates(cached: CachedFeatures) -> CachedFeatures:
    """Keep one of each set of identical images: duplicates are not further draws from the distribution."""
    first = sorted({digest: i for i, digest in reversed(list(enumerate(cached.digests)))}.values())
    digests = [cached.digests[i] for i in first]
    return replace(cached, stored_rows=cached.stored_rows[first], rows=cached.rows[first], digests=digests)


def fit_head(values: Tensor, targets: Tensor, *, seed: int = 0, progress: bool | None = None) -> ProjectionHead:
    """Train a projection head on features (paper D.4), by `RECIPE`; with few inputs for more epochs.

    Parameters
    ----------
    values : features (n, D) of any scale; they are standardized per unit for the training.
    targets : classes (n,), from 0.
    seed : seed of the initial weights and of the order of the inputs.
    progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.
    """
    mean, deviation = values.mean(0), values.std(0)
    # A nearly constant unit would be scaled up to noise.
    deviation = deviation.clamp(min=_MIN_DEVIATION * float(deviation.mean().clamp(min=1e-12)))
    batch = min(RECIPE.batch_size, len(values))
    epochs = max(RECIPE.epochs, math.ceil(_MIN_STEPS / (len(values) // batch)))
    with torch.random.fork_rng(devices=[]), single_precision():
        torch.manual_seed(seed)
        head = ProjectionHead(values.shape[1], int(targets.max()) + 1, temperature=TEMPERATURE)
    recipe = replace(RECIPE, batch_size=batch, epochs=epochs)
    # Standardized batch by batch: the features of a large data set are mapped from a file and stay there.
    model = nn.Sequential(_Standardize(mean, deviation), head)
    train(model, values, targets, recipe, seed=seed, progress=progress)
    # The standardization is folded into the first layer, so that the head takes raw features.
    with torch.no_grad():
        head.hidden.weight.div_(deviation)
        head.hidden.bias.sub_(head.hidden.weight @ mean)
    return head


class _Standardize(nn.Module):
    """Subtracts a mean (D,) from features (n, D) and divides by a standard deviation (D,)."""

    def __init__(self, mean: Tensor, deviation: Tensor) -> None:
        super().__init__()
        self.mean, self.deviation = mean, deviation

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.deviation


@torch.no_grad()
def features_behind(head: nn.Module, values: Tensor) -> Features:
    """Return the features of inputs whose pooled features are known.

    Parameters
    ----------
    head
        Everything the network computes from its pooled features: a `ProjectionHead`, or its last layer alone, a
        `torch.nn.Linear`.
    values
        Pooled features (n, D). In front of a linear layer they are averages of rectified maps, and are taken for
        the last hidden layer too.
    """
    if isinstance(head, nn.Linear):
        classifier = head.weight.detach(), None if head.bias is None else head.bias.detach()
        return Features(activation=values, pooled=values, logits=head(values), classifier=classifier)
    return FeatureTap(head)(values).replace(pooled=values, call=None)


def cluster(values: Tensor, seed: int = 0, *, size: int = CLUSTER_SIZE) -> Tensor:
    """Return labels (n,) for unlabeled features (n, D): their k-means cluster by cosine similarity.

    Parameters
    ----------
    values : features (n, D).
    seed : seed of the initial centers.
    size
        Average number of inputs per cluster; more if there would be over 1000 clusters, which would take long. The
        default detected classes that the head was not trained on best (docs/results/own-images.md).
    """
    from sklearn.cluster import KMeans

    directions = nn.functional.normalize(values).numpy()
    k = min(max(2, len(values) // size), _MAX_CLUSTERS)
    assigned = KMeans(k, n_init=1, max_iter=25, random_state=seed).fit_predict(directions)
    return torch.from_numpy(np.unique(assigned, return_inverse=True)[1])


def _labels(
    source: ImageSource, rows: Tensor, is_train: Tensor, targets: Targets
) -> tuple[Tensor | None, list[str] | None]:
    """Return labels (n,), from 0 for the classes of training images and -1 for others, and the class names."""
    if targets == "clusters":
        return None, None
    given = [source.label(row) for row in rows.tolist()]
    without = next((i for i, label in enumerate(given) if label is None), None)
    used = [label for label, train in zip(given, is_train.tolist(), strict=True) if train]
    classes = sorted({label for label in used if label is not None})
    if without is not None or len(classes) < 2:
        if targets == "auto":
            return None, None
        what = "a single class" if without is None else f"no label for {source.name(int(rows[without]))}"
        raise DataError(
            f"{source.title} has {what}: every image needs a label, and there must be at least two classes; or "
            "use clusters as targets"
        )
    indices = {label: i for i, label in enumerate(classes)}
    names = source.class_names
    class_names = [str(label) if names is None or label >= len(names) else names[label] for label in classes]
    return torch.tensor([-1 if label is None else indices.get(label, -1) for label in given]), class_names


def backbone_features(
    source: ImageSource,
    loaded: LoadedModel,
    backbone: nn.Module,
    *,
    cache: str | Path | None = None,
    runtime: Runtime | None = None,
) -> CachedFeatures:
    """Return the features of images, from the backbone's `FeatureCache` or computed and stored there.

    Parameters
    ----------
    source : images.
    loaded : model whose transform is applied, and whose name stands in errors.
    backbone : module from transformed images (n, 3, H, W) to features (n, D), on its device and in eval mode.
    cache, runtime : see `fit_images`.

    Raises
    ------
    DataError
        See `FeatureCache.features`; or the transform is random.
    """
    runtime = runtime or Runtime()
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))

    @torch.no_grad()
    def extract_batch(images: Tensor) -> Tensor:
        images = fast_layout(images.to(device))
        with users_forward(loaded.name, backbone), runtime.autocast():
            return backbone(images)

    key = {
        "weights": archive.fingerprint(backbone)["sha256"],
        "output for noise": _noise_digest(loaded, extract_batch),
        "precision": runtime.precision,
        "pillow": PIL.__version__,
        "decoding": DECODING,
    }
    if runtime.cluster is None:
        extract = partial(
            extract_images,
            transform=loaded.transform,
            backbone=extract_batch,
            batch_size=runtime.batch_size,
            workers=runtime.workers,
        )
    else:
        extract = runtime.cluster.extract(loaded, backbone, runtime=runtime)
    features = FeatureCache(cache or DEFAULT_CACHE, json.dumps(key)).features
    return features(source, extract, progress=runtime.progress)


def _noise_digest(loaded: LoadedModel, backbone: Callable[[Tensor], Tensor]) -> str:
    """Return a digest of a transform and a backbone's code: of their outputs for two fixed images."""
    noise = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    images = [Image.fromarray(noise), Image.fromarray(noise[:47, :61])]
    with users_transform(loaded.name, "an image of noise"):
        first, again = ([loaded.transform(image) for image in images] for _ in range(2))
    if any(not torch.equal(a, b) for a, b in zip(first, again, strict=True)):
        raise DataError(f"the transform of {loaded.name} is random: use its evaluation transform")
    digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in first))
    try:
        features = backbone(first[0][None])
    except UserCodeError as error:
        raise error.on("an image of noise") from error.__cause__
    if isinstance(features, Tensor):
        # Rounded, because the last bits may differ from run to run.
        values = features.float().cpu()
        digest.update(f"{tuple(values.shape)} {float(values.abs().mean()):.2g} {float(values.std()):.2g}".encode())
    return digest.hexdigest()
