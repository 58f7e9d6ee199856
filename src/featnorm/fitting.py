"""`fit`: a scorer for a user's own data, with a model of their own or a head trained on a frozen backbone."""

import functools
import hashlib
import json
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import PIL
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import featnorm
from featnorm import archive
from featnorm._utils.checks import check_share, check_type, min_scores
from featnorm._utils.errors import UserCodeError
from featnorm._utils.layout import fast_layout
from featnorm._utils.weights import single_precision
from featnorm.detectors import KNN, Detector, Jackknife, KLUniform, parse_detector
from featnorm.detectors.base import check_detector
from featnorm.engine import Engine, is_wanted, network_engine, pass_size, required_or_none
from featnorm.features import Features
from featnorm.hidden.examples import MAX_BYTES, MAX_EXAMPLES, Examples
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.inputs import (
    CachedFeatures,
    DataError,
    Extracted,
    FeatureCache,
    ItemError,
    SlicedSource,
    Source,
    extract_features,
    group_items,
    source_loader,
    source_of,
)
from featnorm.inputs.arrays import row_features
from featnorm.inputs.decoding import DECODING
from featnorm.inputs.kinds import FRAMES, IMAGES, ROWS, Inputs, OfAnySize, run, to_device
from featnorm.inputs.loading import SourceLoader, named
from featnorm.inputs.rows import Rows, fit_rows, listed
from featnorm.inputs.source import class_indices
from featnorm.models import LoadedModel, ProjectionHead, create_model
from featnorm.models.heads import with_head
from featnorm.models.loading import ROWS as ROWS_SPEC
from featnorm.models.loading import backbone_of, default_model, rows_model, users_forward, users_transform
from featnorm.parts import PartCalibration
from featnorm.runtime import Runtime
from featnorm.scorer import HeadKind, Scorer, count_units
from featnorm.splitting import (
    MIN_CONSTANTS,
    first_of_groups,
    for_constants,
    held_out,
    join_groups,
    left_out,
    near_duplicates,
)
from featnorm.tap import FeatureTap
from featnorm.tap.find import Per, Pooling
from featnorm.training import Recipe, train

Head = Literal["auto", "keep", "train", "none"]
Targets = Literal["auto", "labels", "clusters"]

#: With fewer items, none are held out and no head is trained: items are left out of the fit in turn.
MIN_HELD_OUT = 100
DEFAULT_CACHE = "~/.cache/featnorm/features"
# How the paper trains heads on frozen backbones (D.4).
RECIPE = Recipe(epochs=10, batch_size=256, optimizer="sgd", lr=0.03)
CLUSTER_SIZE = 10
TEMPERATURE = 0.2
# A recipe counts epochs, but a head needs a number of steps, and with few items an epoch has few.
_MIN_STEPS = 200
_MAX_CLUSTERS = 1000
_ROWS = 8192
# Images on which a model is traced.
_TRACED = 8
# What a tap captures by default.
_FOUND: Mapping[str, Any] = {
    "layer": None, "output": None, "channel_axis": None, "pooling": "mean", "per": "input"
}  # fmt: skip
# Features whose standard deviation is below this share of the average one are noise.
_MIN_DEVIATION = 0.01
# Numbers in the bank of the default detector: 52,428 rows of 1280 features. A sample costs accuracy: with half
# of Tiny ImageNet's 48 images per class, the AUROC of KNN(k=10) for other classes falls from 66.0 to 63.4.
_MAX_BANK = 1 << 26


@dataclass(frozen=True)
class FitReport:
    """What `fit_source` read and did.

    Attributes
    ----------
    head : str
        How the scorer's model was made: "keep", "train" or "none"; see `fit`.
    why : str
        Why ``head="auto"`` chose it; empty if the caller chose.
    notes : list of str
        What the user should know about model and classes.
    corrupt : list of tuple of str
        Name and reason of each item that could not be read.
    trained : int
        Number of items that the head and the detector were fitted to.
    held_out : int
        Number of items that the threshold was calibrated on; of a `Jackknife`, those left out in turn.
    computed : int
        Number of items whose features were computed; the others are copies, or were in the cache.
    copies : int
        Number of items that are exact copies of others.
    accuracy : float or None
        Accuracy of the classifier on the held-out items; None without labels, or if the classes differ.
    changed : int
        Number of items whose content changed while they were read. The later content was used.
    damaged : int
        Number of batches of features that were damaged on disk and dropped. Those needed were computed again.
    several : int
        Number of images that are the first of several frames or pages of their file.
    """

    head: HeadKind
    why: str
    notes: list[str]
    corrupt: list[tuple[str, str]]
    trained: int
    held_out: int
    computed: int
    copies: int
    accuracy: float | None
    changed: int
    damaged: int
    several: int


def fit(
    data: Any,
    model: str | None = None,
    *,
    labels: Any = None,
    weights: str | Path | None = None,
    detector: Detector | str | None = None,
    head: Head = "auto",
    layer: str | None = None,
    output: str | int | None = None,
    channel_axis: int | None = None,
    pooling: Pooling = "mean",
    per: Per = "input",
    targets: Targets = "auto",
    label_column: str | None = None,
    text_column: str | None = None,
    fps: float = 1.0,
    tpr: float = 0.95,
    thresholds_by: str | None = None,
    group_by: str | None = None,
    cache: str | Path | None = None,
    data_root: str | Path | None = None,
    seed: int = 0,
    thumbnails: bool = True,
    runtime: Runtime | None = None,
) -> Scorer:
    """Make a calibrated scorer from in-distribution images, texts or rows.

    The features of the items are computed once and cached on disk. Duplicate items are used once. One item in
    five, chosen by its content, is held out for calibration, and the detector is fitted to the others. For a
    detector such as a sum, one in four of the held-out items sets its constants, and the others calibrate.
    Near-duplicates, such as the frames of a clip, are found by their features and kept on one side; the rows of a
    table, which are records, are neither searched for duplicates nor for near-duplicates. A detector that needs no
    fit is calibrated on all items if no head is trained.

    Of videos, whole clips are held out, and calibrate as units: the stated rate is that of the frames of a new
    clip, and of new clips, see `featnorm.parts.PartCalibration`. At least 20 clips and 100 frames are needed;
    with fewer than 100 clips, no head is trained by default.

    From 20 to 99 items, none are held out. A detector that needs a fit is wrapped in a `Jackknife`, which leaves
    some items out of the fit in turn (19 at ``tpr=0.95``). No head is trained. The stated rate holds as for more
    items.

    Parameters
    ----------
    data
        Images, videos, texts or rows as `featnorm.inputs.open_source` opens them; a list of str, which are texts;
        an array, tensor or sequence (n, D) of numbers, such as the outputs of an encoder; a `pandas.DataFrame`;
        or a source. See `featnorm.inputs.source_of`.
    labels
        One label per item, integers or strings, or a file with them, see `featnorm.inputs.arrays.LabeledSource`.
        Default: those of ``data``.
    model, weights
        Specification of the model, and its weights file; see `featnorm.models.create_model`. Default:
        EfficientNet-Lite0 for images, MiniLM for texts; none for rows, which are features already: vectors as they
        are, and tables as a `featnorm.inputs.rows.Table` encodes them.
    detector
        Detector or its expression. Default: ``KLUniform() + KNN(k=10)``, which no rule that chooses a detector
        from ID data beat (docs/results/selection.md). ``KLUniform()`` for verdicts per position or box, for a
        classifier without pooled features, for fewer than 100 items, or if less than half of them would be left to
        fit to (218 at ``tpr=0.99``). Without a classifier, ``KNN(k=10)``, or ``KNN(k=1)`` for fewer than 100
        items. For a table, KNN has ``normalize=False``. A bank of the default is at most 268 MB: of more items, a
        sample (``size``, see `KNN`).
    head
        "keep" keeps the model's own classifier. "train" removes it and trains a `ProjectionHead` on the frozen
        features (paper C.1, D.4). "none" removes it and uses the features alone. "auto" keeps the classifier of a
        model or weights of your own, and trains a head on a library's pretrained backbone, or if your model
        returns features; with fewer than 100 items, and for rows without a model, it uses the features alone.
    layer, output, channel_axis, pooling
        What is captured of a model whose classifier is kept, see `FeatureTap`.
    per
        What gets a verdict: each "input", each "position" of the maps that the model returns, or each "box" that
        it finds; see `Scorer`. The classifier of the model is kept. Labels are not used.
    targets
        Targets of a trained head: "labels", "clusters" of the features, or "auto" for labels if every item has
        one and there are at least two classes. Any discriminative labels will do as long as each class is coherent
        (paper sec. 4).
    label_column, text_column : columns of a table, see `featnorm.inputs.open_source`.
    fps : number of frames per second of videos to read; 0 for all of them.
    tpr : share of in-distribution items to accept, between 0 and 1.
    thresholds_by : groups of items with a threshold each, see `Scorer`.
    group_by
        Groups of items that belong together, such as the frames of a clip: "folder", a column or a regular
        expression, see `featnorm.inputs.group_items`. The items of a group are all fitted to or all held out, so
        that the stated rate holds for items of new groups. Default: near-duplicates alone are kept together.
    cache : folder of the `FeatureCache`. Default: ``~/.cache/featnorm/features``.
    data_root : folder in which named data sets are looked up first, and to which they are downloaded.
    seed : seed of the head's initial weights, its training, the clusters, and the choice of examples.
    thumbnails
        Whether the scorer, and a file that it is saved to, hold thumbnails of at most 64 x 64 pixels of up to 512
        of the images, or the first 200 characters of as many texts or rows, to show similar ones beside an item
        that is scored.
    runtime : where and how the model runs. Default: `Runtime()`, on the CPU.

    Returns
    -------
    Scorer
        The scorer. Its ``facts`` say how it was made.

    Warns
    -----
    UserWarning
        Items cannot be read, or the classes of model and data differ.

    Raises
    ------
    DataError
        Fewer than 20 items can be read (at ``tpr=0.95``; 10 at 0.9, 100 at 0.99), or fewer than 100 and a head is
        to be trained; labels are required and an item has none, or the cache raises one.
    ModelError
        There is no such model, or it does not work.
    ValueError
        The detector cannot work here, or there are too few groups of items for `tpr`.

    Examples
    --------
    >>> scorer = fit(torch.randn(200, 16))  # or fit("photos/"), fit("tickets.csv"), fit("photos/", "mymodel:make")
    >>> len(scorer.predict(torch.randn(3, 16)))
    3
    """
    reads = targets != "clusters" or label_column is not None
    columns: dict[str, Any] = {"label_column": label_column, "text_column": text_column, "fps": fps}
    data = source_of(data, labels, root=data_root, read_labels=reads, **columns)
    options: dict[str, Any] = {"targets": targets, "tpr": tpr, "cache": cache, "seed": seed, "runtime": runtime}
    options |= {"thresholds_by": thresholds_by, "group_by": group_by, "thumbnails": thumbnails}
    options |= {"layer": layer, "output": output, "channel_axis": channel_axis, "pooling": pooling, "per": per}
    parsed = parse_detector(detector) if isinstance(detector, str) else detector
    groups = {"group_by": group_by, "thresholds_by": thresholds_by}
    loaded = model_for(data, model, weights=weights, label_column=label_column, **groups)
    scorer, report = fit_source(data, loaded, detector=parsed, head=head, **options)
    if report.corrupt:
        name, reason = report.corrupt[0]
        warnings.warn(
            f"{len(report.corrupt)} {data.kind.name} of {data.title} cannot be read; the first is {name}: "
            f"{reason}",
            stacklevel=2,
        )
    for note in report.notes:
        warnings.warn(note, stacklevel=2)
    return scorer


def model_for(
    source: Source[Any],
    model: str | None = None,
    *,
    weights: str | Path | None = None,
    label_column: str | None = None,
    group_by: str | None = None,
    thresholds_by: str | None = None,
) -> LoadedModel:
    """Return the model of a specification, or the default one for the items of a source.

    Parameters
    ----------
    source : the items.
    model, weights : see `fit`.
    label_column, group_by, thresholds_by : see `fit`; columns of these names are not used as features.
    """
    if model is None and source.kind is ROWS:
        by = {group_by, None if thresholds_by == "class" else thresholds_by}.intersection(source.columns)
        return rows_model(fit_rows(source, {name for name in (label_column, *by) if name is not None}))
    return create_model(model or default_model(source.kind), weights=weights)


def fit_source(
    source: Source[Any],
    loaded: LoadedModel,
    *,
    detector: Detector | None = None,
    head: Head = "auto",
    layer: str | None = None,
    output: str | int | None = None,
    channel_axis: int | None = None,
    pooling: Pooling = "mean",
    per: Per = "input",
    targets: Targets = "auto",
    tpr: float = 0.95,
    thresholds_by: str | None = None,
    group_by: str | None = None,
    cache: str | Path | None = None,
    seed: int = 0,
    thumbnails: bool = True,
    runtime: Runtime | None = None,
) -> tuple[Scorer, FitReport]:
    """Make a calibrated scorer as `fit` does, from a source and a model, and report what was read and done.

    Parameters
    ----------
    source : in-distribution images, texts or rows.
    loaded : model with its transform; it may be moved to the runtime's device.
    detector, head, layer, output, channel_axis, pooling, per, targets, tpr, thresholds_by, group_by, cache, seed
        See `fit`.
    thumbnails, runtime : see `fit`.

    Raises
    ------
    DataError, ValueError
        See `fit`.
    """
    check_type(source, Source, "the data", "a source made by featnorm.inputs.open_source")
    check_type(loaded, LoadedModel, "the model", "a LoadedModel made by featnorm.models.create_model")
    source.require(loaded.kind, loaded.name or "the model", loaded.transform)
    items, noun = source.kind.name, source.kind.noun
    embeds = getattr(loaded.transform, "embeds", True)
    check_share(tpr, "tpr")
    for name, value, choices in (("targets", targets, get_args(Targets)), ("head", head, get_args(Head))):
        if value not in choices:
            raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"the seed must be between 0 and 2**32 - 1, got {seed}")
    if detector is not None:
        check_detector(detector, "fit")
    units = source.units()
    # A video that cannot be opened is one item, without a time.
    opened = {unit for i, unit in enumerate(units or ()) if source.time(i) is not None}
    clips = None if units is None else len(opened or set(units))
    if clips is not None:
        if per != "input":
            raise DataError(
                f"{source.title} holds videos, and verdicts per {per} are for images: omit per={per!r}"
            )
        if thresholds_by is not None:
            raise ValueError(
                "thresholds by group are for inputs that are independent, and frames of a clip are not"
            )
        if clips <= (needed := min_scores(tpr)):
            raise DataError(
                f"{source.title} has {clips} clip{'s' * (clips > 1)}; at least {needed + 1} are needed for "
                f"tpr={tpr}, however many frames they have: {needed} to calibrate on, and others to fit to; add "
                "clips, or lower tpr"
            )
    if per != "input":
        if thresholds_by is not None:
            raise ValueError(f"thresholds by group are for verdicts per input: omit thresholds_by, or per={per!r}")
        if runtime is not None and runtime.cluster is not None:
            raise ValueError(f"a fit per {per} runs on one machine: omit --ray")
        if runtime is not None and runtime.engine == "onnx":
            raise ValueError(f"onnxruntime runs networks per input: omit engine='onnx', or per={per!r}")
        targets = "clusters"
    if per == "box":
        if loaded.kind is not IMAGES:
            raise ValueError(f"boxes are found in images, and {loaded.name} takes {loaded.kind.name}")
        loaded = replace(loaded, transform=OfAnySize(loaded.transform))
    every = torch.arange(len(source))
    # Before the work: it raises if labels are required and missing.
    labeled = _labels(source, every, every >= 0, targets)[0] is not None
    split_groups = None if group_by is None else group_items(source, group_by)
    groups = None if thresholds_by in (None, "class") else group_items(source, thresholds_by)
    runtime = runtime or Runtime()
    captured: dict[str, Any] = {
        "layer": layer, "output": output, "channel_axis": channel_axis, "pooling": pooling, "per": per
    }  # fmt: skip
    computed = 0
    # How many distinct items can be read is only known afterwards: if too few can, once more.
    # However many frames a clip has, it shows what one input shows.
    few_clips = clips is not None and clips < MIN_HELD_OUT
    for few in (len(source) < MIN_HELD_OUT, True):
        plan = _plan(source, loaded, head, captured, runtime, few, few_clips)
        used = detector or _default_detector(plan, few or few_clips, normalize=embeds)
        if not labeled and "labels" in used.learns:
            what = "images" if source.fps is None else "videos"
            how = f"put the {what} of each class in a subfolder of its own"
            how = how if source.kind in (IMAGES, FRAMES) else "name their column (label_column, --label-column)"
            raise DataError(
                f"{used!r} needs labels to fit, and {source.title} has none, or clusters are the targets: "
                f"{how} and use labels, or choose another detector"
            )
        not_alone = thresholds_by is not None or units is not None or per != "input"
        if few and used.needs_fit and (used.needs_model or not_alone):
            why = f"{used!r} runs the model again" if used.needs_model else "a threshold per group needs scores"
            why = why if units is None else "each clip needs scores (--fps takes more frames)"
            why = why if per == "input" else f"verdicts per {per} need scores"
            raise DataError(
                f"found fewer than {MIN_HELD_OUT} readable {items} in {source.title} (duplicates excluded), which "
                f"cannot be left out of the fit in turn: {why}; add {items}, or choose a detector that needs no "
                "fit"
            )
        if plan.head != "train":
            needs_classifier = not {"logits", "classifier"}.isdisjoint(used.reads)
            if plan.head == "none" and plan.example.logits is None and needs_classifier:
                raise ValueError(
                    f"{used!r} needs a classifier, and there is none: use head='train' (--head train) to train "
                    "one, or choose another detector"
                )
            for name in used.reads:
                plan.example.linear() if name == "classifier" else plan.example.tensor(name)
        cached = backbone_features(source, loaded, plan.network, cache=cache, runtime=runtime)
        several, read = cached.several, len(cached.rows)
        copies = read - len({*cached.digests})
        computed = max(computed, cached.computed)
        cached = _without_duplicates(cached) if embeds else cached
        if few or len(cached.rows) >= MIN_HELD_OUT:
            break
    if few and (count := len(cached.rows)) <= (needed := min_scores(tpr)):
        raise DataError(
            f"found {count} readable {noun if count == 1 else items} in {source.title} (duplicates excluded); at "
            f"least {needed + 1} are needed for tpr={tpr}: {needed} to calibrate on, and others to fit to; add "
            f"{items}, or lower tpr"
        )
    # Frames of a clip resemble each other more than they resemble new images.
    pooled = plan.pooled(cached.values)
    of_frames = None if units is None else [units[row] for row in cached.rows.tolist()]
    if of_frames is not None:
        # Clips are near-duplicates if their first frames are; the others of a clip are no further evidence.
        firsts, numbers = join_groups(of_frames).unique(return_inverse=True)
        near = firsts[near_duplicates(pooled[firsts])][numbers]
    else:
        near = near_duplicates(pooled) if embeds else torch.arange(len(cached.rows))
    sides = [] if split_groups is None else [[split_groups[row] for row in cached.rows.tolist()]]
    splits = join_groups(near, *sides)
    if detector is None and not few:
        if used.needs_held_out and len(splits.unique()) < 2 * (min_scores(tpr) + MIN_CONSTANTS):
            used = KLUniform()
        elif used.needs_fit and pooled.numel() > _MAX_BANK:
            used = _default_detector(plan, few_clips, normalize=embeds, size=_MAX_BANK // pooled.shape[1])
    detector, jackknife = used, None
    calibrates = first_of_groups(cached.digests, splits)
    if of_frames is not None:
        # The frames of one clip of each group.
        chosen_units = {of_frames[i] for i in calibrates.nonzero().squeeze(1).tolist()}
        calibrates = torch.tensor([unit in chosen_units for unit in of_frames])
    fits = detector.needs_fit or plan.head == "train"
    constants = torch.zeros_like(calibrates)
    if few or not fits:
        is_held_out = torch.zeros_like(calibrates)
        if detector.needs_fit:
            left = left_out(cached.digests, tpr, splits)
            detector = jackknife = Jackknife(detector, len(left))
            calibrates = torch.zeros_like(calibrates).index_fill(0, left, True)
    else:
        is_held_out = held_out(cached.digests, splits, tpr, MIN_CONSTANTS if detector.needs_held_out else 0)
        if detector.needs_held_out:
            constants = for_constants(cached.digests, splits, is_held_out, tpr)
        calibrates &= is_held_out & ~torch.isin(splits, splits[constants])
    ways = ["near-duplicates", *(["clips"] if units else []), *([f"groups by {group_by!r}"] if group_by else [])]
    if (count := len(splits[calibrates].unique())) < (needed := min_scores(tpr)):
        raise ValueError(
            f"the {len(cached.rows)} {items} of {source.title} form {count} groups of {items} that belong "
            f"together ({' and '.join(ways)}), too few for "
            f"tpr={tpr}: calibration needs one {noun} of each of {needed} groups; add {items} of other groups, or "
            "lower tpr"
        )
    train = (~is_held_out).nonzero().squeeze(1)
    labels, names = _labels(source, cached.rows, ~is_held_out, targets)
    own_names = loaded.classes if plan.head == "keep" else None
    if own_names is not None and labels is not None:
        # Labels without names are the indices of the model's classes.
        given = own_names if source.class_names is not None else map(str, range(len(own_names)))
        if (numbers := class_indices(names, given)) is not None:
            labels, names = torch.tensor([*numbers, -1])[labels], own_names
    features_of: nn.Module = plan.features_of
    about = plan.about
    model = plan.network.model if isinstance(plan.network, _Columns) else plan.network
    if plan.head == "train":
        train_values = cached.values[train]
        train_targets = cluster(train_values, seed) if labels is None else labels[~is_held_out]
        trained_head = fit_head(train_values, train_targets, seed=seed, progress=runtime.progress)
        del train_values  # a copy
        features_of = HeadFeatures(trained_head.to(runtime.torch_device))
        model = with_head(model, trained_head, loaded.kind)
        kind = "clusters of the features" if labels is None else "classes"
        about = {"head": f"trained on {int(train_targets.max()) + 1} {kind}", **about}
    parts = ((cached.values[rows], None if labels is None else labels[rows]) for rows in train.split(_ROWS))

    def loader_of(chosen: Tensor) -> SourceLoader:
        part = SlicedSource(source, cached.rows[chosen].tolist(), source.title)
        size = runtime.batch_of(source.kind)
        return source_loader(part, loaded.transform, batch_size=size, workers=runtime.workers)

    def held_out_features(chosen: Tensor) -> Iterator[Features]:
        own = None if labels is None else labels[chosen]
        if not (detector.needs_model or per != "input"):
            yield from training_features(features_of, ActivationStatistics(), [(cached.values[chosen], own)])
            return
        for batch in loader_of(chosen):
            features = scorer.tap.capture(to_device(batch.inputs, scorer.tap.device), classifier=True)
            yield features if own is None else features.replace(labels=own[batch.indices])

    spec = loaded.name or None
    known: dict[str, Any] = {"spec": spec, "head": plan.head, "thresholds_by": thresholds_by}
    scorer = Scorer(model, detector, preprocess=loaded.transform, **known, **captured)
    statistics = ActivationStatistics()
    if jackknife is not None:
        # Left-out items are scored as new ones will be, in the same precision.
        with runtime.autocast():
            jackknife.fit(next(training_features(features_of, statistics, parts)), left, splits)
    elif per != "input":
        # Of a few hundred positions or the boxes of each image, which are not cached.
        with runtime.autocast():
            apart = held_out_features(constants) if detector.needs_held_out else None
            scorer.fit_features(held_out_features(~is_held_out) if fits else (), apart)
    elif runtime.cluster is None or few:
        with detector.refit():
            for features in training_features(features_of, statistics, parts):
                detector.partial_fit(features)
    else:
        runtime.cluster.fit(parts, features_of, detector, statistics)
    scorer.statistics = None if statistics.is_empty else statistics
    if per == "input":
        scorer.examples = _examples(source, cached, train, features_of, seed, thumbnails, runtime)
    loader, chosen = loader_of(calibrates), int(calibrates.sum())
    scorer.tap.trace(next(iter(loader)).inputs)
    # In the precision in which new items will be scored.
    with runtime.autocast():
        if detector.needs_held_out and per == "input":
            if labels is not None and "labels" in detector.learns:
                constants &= labels >= 0  # the head does not know a class without training items
            detector.fit_held_out(held_out_features(constants))
        batches = [] if per != "input" else [features_of(part) for part in cached.values[calibrates].split(_ROWS)]
        accuracy, scorer.classes, notes = _classes(
            source, batches, labels, names, calibrates, plan.head, own_names
        )
        held_out_groups = None if groups is None else [groups[row] for row in cached.rows[calibrates].tolist()]
        if jackknife is not None:
            scorer.use_scores(jackknife.calibration_scores, tpr=tpr)
        elif per != "input":
            scorer.calibrate_features(held_out_features(calibrates), tpr)
            assert scorer.item_calibration is not None
            chosen = len(scorer.item_calibration.scores)  # images without boxes do not count
        else:
            of_clips = None if units is None else [units[row] for row in cached.rows[calibrates].tolist()]
            by: dict[str, Any] = {"groups": held_out_groups, "units": of_clips}
            if detector.needs_model:
                batches_of_one = ((batch.inputs,) for batch in loader)
                scorer.calibrate(batches_of_one, tpr, **by, progress=runtime.progress)
            else:
                scorer.calibrate_features(batches, tpr, **by)
    version = f"{date.today().isoformat()}, with featnorm {featnorm.__version__}"
    if jackknife is not None:
        split = f"{len(train)} to fit on, {chosen} of them left out in turn for calibration"
    elif not fits:
        split = f"{chosen} for calibration, none to fit on"
    else:
        count = int(constants.sum())
        others = f"{count} held out for the detector's constants, " if count else ""
        split = f"{len(train)} to fit on, {others}{chosen} held out for calibration"
    if isinstance(scorer.calibration, PartCalibration) and clips is not None:
        split += f", the latter of {len(scorer.calibration.unit_scores)} of the {clips} clips"
    scorer.facts = {
        items: f"{source.title}: {split}",
        **about,
        **({} if source.fps is None else {"frames per second": f"{source.fps:g}"}),
        **({} if source.text_column is None else {"text column": source.text_column}),
        **({} if per == "input" else {"verdicts": f"per {per}"}),
        "precision": runtime.precision,
        "engine": cached.engine,
        "made": f"{version}, seed {seed}, from {read} {items}",
        "digest of the fitting data": _digest(cached.digests),
    }
    assert scorer.calibration is not None
    notes += plan.notes
    if naming := getattr(loaded.transform, "naming", None):
        notes.append(
            f"not used: {', '.join(map(repr, naming))}, whose texts differ in more than half of the {items}, as "
            "names do; numbers need a decimal point to be read as such"
        )
    if empty := getattr(loaded.transform, "empty", None):
        notes.append(f"not used: {', '.join(map(repr, empty))}, without a value in any of the {items}")
    if source.kind is ROWS and head == "auto" and labeled and "labels" not in used.learns:
        notes.append(f"the labels are not used: no head is trained (--head train), and {used!r} needs none")
    if jackknife is None and bool(scorer.calibration.scores[0] == scorer.calibration.scores[-1]):
        notes.append(f"all calibration {items} have the same score: check the transform and the model")
    notes += _duplicate_notes(source, near, cached.rows) if units is None else []
    counts = len(train), chosen, computed, copies
    report = FitReport(
        plan.head, plan.why, notes, cached.corrupt, *counts, accuracy, cached.changed, cached.damaged, several
    )
    return scorer, report


class _Plan(NamedTuple):
    """How the features of a scorer are computed.

    ``network`` maps inputs to what is cached, from which ``features_of`` makes features, if no head is trained.
    """

    head: HeadKind
    why: str
    network: nn.Module
    features_of: nn.Module
    example: Features
    about: dict[str, str]
    notes: Sequence[str] = ()

    def pooled(self, values: Tensor) -> Tensor:
        """Return the pooled features in cached values (n, D), or all of them where there are none."""
        columns = self.features_of.columns if isinstance(self.features_of, ColumnFeatures) else {}
        return values[:, columns["pooled"][0]] if "pooled" in columns else values


def _plan(
    source: Source[Any],
    loaded: LoadedModel,
    head: Head,
    captured: Mapping[str, Any],
    runtime: Runtime,
    few: bool,
    few_clips: bool,
) -> _Plan:
    """Choose what to do with the model's classifier, and trace the model on the first items."""
    why, items = "", source.kind.name
    if head == "train" and few:
        raise DataError(
            f"found fewer than {MIN_HELD_OUT} readable {items} in {source.title} (duplicates excluded), too few "
            "to train a head: use head='none' or, for a model with a classifier, head='keep' (--head), or add "
            f"{items}"
        )
    if head == "auto" and loaded.name == ROWS_SPEC:
        head, why = "none", "rows are features already"
    if head == "auto" and not loaded.own and captured["per"] == "input":
        head, why = "train", f"the model is pretrained on other {loaded.kind.name}"
    example = None
    if captured["per"] != "input" and head not in ("auto", "keep"):
        raise ValueError(
            f"verdicts per {captured['per']} need the model's own classifier: use head='keep' (--head)"
        )
    if head in ("auto", "keep"):
        example = _Columns.of(loaded.model, source, loaded, runtime, captured)
        if head == "auto":
            has_logits = example[1].logits is not None
            head = "keep" if has_logits else "train"
            why = "the model is your own" if has_logits else "your model returns features, not logits"
    if head == "train" and why and (few or few_clips):
        head = "none"
        why += f", and fewer than {MIN_HELD_OUT} {'clips' if few_clips else items} are too few to train a head"
    notes = "".join(f"; {note}" for note in loaded.notes)
    if head != "keep" and captured != _FOUND:
        raise ValueError(
            "a layer or an output can be chosen only for a model whose classifier is kept (--head keep)"
        )
    if head == "keep":
        assert example is not None
        columns, features = example
        if features.logits is None:
            raise ValueError(
                f"the model {loaded.name} returns no logits, so it has no classifier to keep: use head='train' or "
                "head='none' (--head)"
            )
        about = {
            "head": f"the model's own classifier, {features.logits.shape[1]} logits",
            "model": f"{loaded.name}{notes}",
        }
        heads = columns.tap.describe_heads()
        about_heads = [f"the model has several heads: {heads} (--output)"] if heads else []
        features_of = ColumnFeatures(features) if features.parts is None else nn.Identity()
        return _Plan("keep", why, columns, features_of, features, about, about_heads)
    backbone, cut = backbone_of(loaded)
    removed = "its classifier removed" if cut else _headless_note(backbone)
    description = str(loaded.transform) if loaded.name == ROWS_SPEC else f"{loaded.name}{notes}; {removed}"
    if head == "none":
        columns, features = _Columns.of(backbone, source, loaded, runtime)
        about = {"head": "none", "backbone": description}
        # The output of a backbone is cached under one key, whether a head is trained on it or not.
        network = columns.model if columns.are_output else columns
        return _Plan("none", why, network, ColumnFeatures(features), features, about)
    backbone = fast_layout(backbone.to(runtime.torch_device).eval())
    about = {"backbone": description}
    return _Plan("train", why, backbone, nn.Identity(), Features(pooled=torch.zeros(1, 1)), about)


def _default_detector(plan: _Plan, few: bool, **options: Any) -> Detector:
    """Return the detector of `fit` for a plan, by whether there are few items; the options are KNN's."""
    if plan.head != "train" and plan.example.logits is None:
        return KNN(k=1 if few else 10, **options)
    if plan.example.parts is not None:
        return KLUniform()
    # The example of a head that is yet to be trained has pooled features.
    return KLUniform() if few or plan.example.pooled is None else KLUniform() + KNN(k=10, **options)


class _Columns(nn.Module):
    """The features that a tap captures in a model, side by side, so that they are cached as one matrix."""

    def __init__(self, tap: FeatureTap) -> None:
        super().__init__()
        self.model = tap.model
        self.tap = tap
        self.are_output = False  # whether they are what the model returns

    @classmethod
    def of(
        cls,
        model: nn.Module,
        source: Source[Any],
        loaded: LoadedModel,
        runtime: Runtime,
        captured: Mapping[str, Any] = _FOUND,
    ) -> "tuple[_Columns, Features]":
        """Return the columns of a model, and the features of the first items that can be read."""
        tap = FeatureTap(fast_layout(model.to(runtime.torch_device).eval()), **captured)
        batch = next(iter(source_loader(source, loaded.transform, batch_size=_TRACED, workers=0)), None)
        if batch is None:
            raise DataError(f"none of the {len(source)} {source.kind.name} of {source.title} can be read")
        with users_forward(loaded.name, model, named(source, batch.indices.tolist())), runtime.autocast():
            columns, features = cls(tap), tap(batch.inputs)
            if features.logits is None:
                with torch.no_grad():
                    output = run(columns.model, to_device(batch.inputs, tap.device))
                    values = torch.cat([*{id(value): value for _, value in features.fields()}.values()], 1)
                    columns.are_output = isinstance(output, Tensor) and torch.equal(output, values)
            return columns, features

    def forward(self, *tensors: Tensor, **by_name: Tensor) -> Tensor:
        """Return the distinct features (n, D) of a batch, or the mean over its parts, in single precision."""
        exports = torch.compiler.is_compiling()
        inputs = by_name or tensors[0]
        features = self.tap.traced(inputs) if exports else self.tap.capture(inputs, classifier=False)
        if (parts := features.parts) is not None:
            values = (features.tensor("logits") if features.pooled is None else features.pooled).float()
            sums = values.new_zeros(parts.count, values.shape[1]).index_add(0, parts.owners, values)
            return sums / torch.bincount(parts.owners, minlength=parts.count).clamp(min=1)[:, None]
        distinct = {id(value): value for _, value in features.fields()}
        return torch.cat([value.float() for value in distinct.values()], 1)


class ColumnFeatures(nn.Module):
    """Makes `Features` of their columns side by side.

    Parameters
    ----------
    example : features of a few inputs, whose fields, widths and types are those of all inputs.
    """

    weight: Tensor | None
    bias: Tensor | None
    place: Tensor

    def __init__(self, example: Features) -> None:
        super().__init__()
        self.columns: dict[str, tuple[slice, torch.dtype]] = {}
        slices: dict[int, slice] = {}
        stop = 0
        for name, value in example.fields():
            if id(value) not in slices:
                start, stop = stop, stop + value.shape[1]
                slices[id(value)] = slice(start, stop)
            self.columns[name] = slices[id(value)], value.dtype
        weight, bias = example.classifier or (None, None)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self._absent = dict(example.absent)
        # Where the values belong; it moves with the module.
        self.register_buffer("place", torch.empty(0, device=next(example.fields())[1].device), persistent=False)

    def forward(self, values: Tensor) -> Features:
        """Return the features of inputs whose columns (n, D) are known."""
        values = values.to(self.place.device)
        # A tensor under two names stays one.
        parts = {(part.start, dtype): values[:, part].to(dtype) for part, dtype in self.columns.values()}
        fields: dict[str, Any] = {name: parts[part.start, dtype] for name, (part, dtype) in self.columns.items()}
        classifier = None if self.weight is None else (self.weight, self.bias)
        return Features(**fields, classifier=classifier, absent=self._absent)


class HeadFeatures(nn.Module):
    """Makes `Features` of pooled features, by a head; see `features_behind`."""

    def __init__(self, head: ProjectionHead) -> None:
        super().__init__()
        self.head = head

    def forward(self, values: Tensor) -> Features:
        """Return the features of inputs whose pooled features (n, D) are known."""
        return features_behind(self.head, values.to(self.head.hidden.weight.device))


def _classes(
    source: Source[Any],
    batches: Sequence[Features],
    labels: Tensor | None,
    names: list[str] | None,
    calibrates: Tensor,
    head: HeadKind,
    own_names: list[str] | None,
) -> tuple[float | None, list[str] | None, list[str]]:
    """Return the accuracy on the held-out items, the class names where they are the logits', and notes.

    The own names are those of the model's classes, if it has them.
    """
    if labels is None or names is None or head == "none":
        return None, own_names, []
    logits = torch.cat([features.tensor("logits").cpu() for features in batches])
    if own_names is not None and names is not own_names:
        other = next((name for name in names if class_indices([name], own_names) is None), names[0])
        note = (
            f"{other!r} of {source.title} is not one of the model's {len(own_names)} classes "
            f"({listed(own_names)}): its accuracy is not known"
        )
        return None, own_names, [note]
    if logits.shape[1] != len(names):
        note = (
            f"the model has {logits.shape[1]} logits, but {source.title} has {len(names)} classes: its class "
            "names are not used, and its accuracy is not known"
        )
        return None, None, [note]
    hits = int((logits.argmax(1) == labels[calibrates]).sum())
    accuracy = hits / len(logits)
    if head == "keep" and hits <= _most_by_chance(len(logits), len(names)):
        note = (
            f"the model classifies {100 * accuracy:.1f} % of the held-out {source.kind.name} of {source.title} "
            "correctly, no better than chance"
        )
        if own_names is not None:
            return accuracy, own_names, [f"{note}: its transform may not be that of its training"]
        note += (
            ", so the class names are not used: its classes may be in another order than the folders, or its "
            "transform may not be that of its training"
        )
        return accuracy, None, [note]
    return accuracy, names, []


def _examples(
    source: Source[Any],
    cached: CachedFeatures,
    train: Tensor,
    features_of: nn.Module,
    seed: int,
    thumbnails: bool,
    runtime: Runtime,
) -> Examples | None:
    """Return a random sample of the items to fit on, ``train``; None if they have no pooled features."""
    sample = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:MAX_EXAMPLES]]
    pooled = features_of(cached.values[sample]).pooled
    if pooled is None:
        return None
    pooled = pooled.float().cpu()
    chosen = cached.rows[sample].tolist()
    files: dict[int, bytes] = {}
    if thumbnails:
        # In the order of the source, which reads neighboring items together.
        with ThreadPoolExecutor(source.max_readers or runtime.workers or None) as threads:
            made = threads.map(lambda row: _preview(source, row), sorted(chosen))
            files = dict(zip(sorted(chosen), made, strict=True))
    sizes = np.cumsum([len(files.get(row, b"")) for row in chosen])
    # An item that was removed meanwhile has an empty preview.
    kept = [
        i
        for i, row in enumerate(chosen)
        if sizes[i] <= MAX_BYTES and files.get(row) != b"" and pooled[i].isfinite().all()
    ]
    if not kept:
        return None
    names = source.class_names
    labels = [source.label(chosen[i]) for i in kept]
    words = [None if k is None else str(k) if names is None or k >= len(names) else names[k] for k in labels]
    return Examples(pooled[kept], words, [files[chosen[i]] for i in kept] if thumbnails else None)


def _preview(source: Source[Any], row: int) -> bytes:
    try:
        return source.kind.preview(source.item(row))
    except ItemError:
        return b""


def _duplicate_notes(source: Source[Any], near: Tensor, rows: Tensor) -> list[str]:
    """Return a note on the near-duplicates, if there are any."""
    groups, sizes = near.unique(return_counts=True)
    groups, sizes = groups[sizes > 1], sizes[sizes > 1]
    if not len(groups):
        return []
    first = int(groups[0])
    second = int((near == first).nonzero()[1])
    one, other = source.name(int(rows[first])), source.name(int(rows[second]))
    count = f"{len(groups)} groups" if len(groups) > 1 else "a group"
    return [
        f"{int(sizes.sum())} {source.kind.name} are near-duplicates in {count}, such as {one} and {other}: each "
        "group is on one side of the split, and counts once in the calibration"
    ]


def _most_by_chance(count: int, classes: int) -> int:
    """Return how many of some items a random classifier gets right at most, with probability 0.99."""
    from scipy.stats import binom

    return int(binom.ppf(0.99, count, 1 / classes))


def _digest(digests: Iterable[bytes]) -> str:
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest()


def training_features(
    features_of: nn.Module, statistics: ActivationStatistics, parts: Iterable[tuple[Tensor, Tensor | None]]
) -> Iterator[Features]:
    """Yield the features that a detector is fitted to, and update the activation statistics with them.

    Parameters
    ----------
    features_of : `HeadFeatures` or `ColumnFeatures`.
    statistics : statistics of the last hidden layer, on the CPU; left empty if it has no classifier.
    parts : cached values (n, D) and classes (n,), or None where there are none.
    """
    for values, labels in parts:
        features: Features = features_of(values)
        count_units(features, statistics)
        yield features if labels is None else features.replace(labels=labels.to(next(features.fields())[1].device))


def _headless_note(backbone: nn.Module) -> str:
    """Return a note that the output of a user's own model is used as features, and when that may be wrong."""
    note = "its output used as features"
    *_, (name, last) = backbone.named_modules()
    if isinstance(last, nn.Linear):
        note += f", from the linear layer {name!r}: if that is its classifier, return the model without it"
    return note


def _without_duplicates(cached: CachedFeatures) -> CachedFeatures:
    """Keep one of each set of identical items: duplicates are not further draws from the distribution."""
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
    train(model, values, targets, recipe, runtime=Runtime(progress=progress), seed=seed)
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
    source: Source[Any], rows: Tensor, is_train: Tensor, targets: Targets
) -> tuple[Tensor | None, list[str] | None]:
    """Return labels (n,), from 0 for the classes of training items and -1 for others, and the class names."""
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
            f"{source.title} has {what}: every {source.kind.noun} needs a label, and there must be at least two "
            "classes; or use clusters as targets"
        )
    indices = {label: i for i, label in enumerate(classes)}
    names = source.class_names
    class_names = [str(label) if names is None or label >= len(names) else names[label] for label in classes]
    return torch.tensor([-1 if label is None else indices.get(label, -1) for label in given]), class_names


def backbone_features(
    source: Source[Any],
    loaded: LoadedModel,
    backbone: nn.Module,
    *,
    cache: str | Path | None = None,
    runtime: Runtime | None = None,
) -> CachedFeatures:
    """Return the features of items, from the backbone's `FeatureCache` or computed and stored there.

    Parameters
    ----------
    source : items.
    loaded : model whose transform is applied, and whose name stands in errors.
    backbone : module from transformed items to features (n, D), on its device and in eval mode.
    cache, runtime : see `fit`.

    Raises
    ------
    DataError
        See `FeatureCache.features`; or the transform is random.
    """
    if isinstance(loaded.transform, Rows) and loaded.name == ROWS_SPEC:
        return row_features(source, loaded.transform)
    runtime = runtime or Runtime()
    device = next((parameter.device for parameter in backbone.parameters()), torch.device("cpu"))
    of_parts = isinstance(backbone, _Columns) and backbone.tap.per != "input"
    wanted = not of_parts and is_wanted(runtime, loaded.kind, device, len(source))

    @torch.no_grad()
    def extract_batch(inputs: Inputs) -> Tensor:
        inputs = to_device(inputs, device)
        with users_forward(loaded.name, backbone), runtime.autocast():
            return run(backbone, inputs)

    key = {
        "weights": archive.fingerprint(backbone)["sha256"],
        "output for noise": _probe_digest(loaded, extract_batch),
        "precision": runtime.precision,
        "pillow": PIL.__version__,
        "decoding": DECODING,
        **({"engine": "onnx"} if wanted else {}),
    }

    @functools.cache
    def network() -> Callable[[Inputs], Tensor]:
        """Return what computes features; it is exported only if some are not in the cache."""
        make = partial(network_engine, backbone, loaded.kind, loaded.transform)
        engine: Engine | None = required_or_none(runtime, make) if wanted else None
        return extract_batch if engine is None else engine.features(extract_batch)

    def extract(part: Source[Any]) -> Iterator[Extracted]:
        by_torch = network() is extract_batch
        if runtime.cluster is not None:
            there = replace(runtime, engine="torch" if by_torch else "onnx")
            yield from runtime.cluster.extract(loaded, backbone, runtime=there)(part)
            return
        how: dict[str, Any] = {"batch_size": runtime.batch_of(source.kind), "workers": runtime.workers}
        how["passes"] = pass_size(runtime, source.kind, device, len(part)) if by_torch else None
        yield from extract_features(part, loaded.transform, network(), **how)

    features = FeatureCache(cache or DEFAULT_CACHE, json.dumps(key)).features
    cached = features(source, extract, progress=runtime.progress)
    by_onnx = wanted and not (cached.computed and network() is extract_batch)
    return replace(cached, engine="onnxruntime") if by_onnx else cached


def _probe_digest(loaded: LoadedModel, backbone: Callable[[Inputs], Tensor]) -> str:
    """Return a digest of a transform and a backbone's code: of their outputs for a few fixed items."""
    kind = loaded.kind
    name = f"{kind.one} of noise"
    with users_transform(loaded.name, name):
        first, again = ([loaded.transform(item) for item in kind.probes(loaded.transform)] for _ in range(2))
    tensors = tree_leaves(first)
    if any(not torch.equal(a, b) for a, b in zip(tensors, tree_leaves(again), strict=True)):
        raise DataError(f"the transform of {loaded.name} is random: use its evaluation transform")
    digest = hashlib.sha256(b"".join(t.float().numpy().tobytes() for t in tensors))
    try:
        features = backbone(kind.collate(first[:1], loaded.transform))
    except UserCodeError as error:
        raise error.on(name) from error.__cause__
    if isinstance(features, Tensor):
        # Rounded, because the last bits may differ from run to run.
        values = features.float().cpu()
        digest.update(f"{tuple(values.shape)} {float(values.abs().mean()):.2g} {float(values.std()):.2g}".encode())
    return digest.hexdigest()
