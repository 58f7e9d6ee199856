"""`Scorer`: a model, a detector and a calibration, with what is known of preprocessing and classes."""

import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Any, Literal, Self

import numpy as np
import torch
from torch import Tensor, nn

from featnorm import archive
from featnorm._utils.checks import check_share, check_text
from featnorm._utils.ranks import are_ranks
from featnorm.calibration import Calibration
from featnorm.detectors import Detector, Jackknife, Sum, parse_detector
from featnorm.detectors.base import check_detector
from featnorm.detectors.held_out import fit_in_batches
from featnorm.engine import (
    TOLERANCE,
    EngineError,
    FeatureEngine,
    is_wanted,
    pass_size,
    relative_gap,
    required_or_none,
)
from featnorm.export import export_onnx
from featnorm.features import Features, Parts
from featnorm.hidden.classifier import HiddenClassifier
from featnorm.hidden.examples import Examples
from featnorm.hidden.explanation import Why, explain
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.inputs import IMAGES, DataError, ItemError, Source, group_items, kind_of, source_loader
from featnorm.inputs.arrays import ArrayRows
from featnorm.inputs.kinds import Inputs, OfAnySize, rows_in, to_device
from featnorm.inputs.loading import named, over_parts
from featnorm.inputs.rows import Rows
from featnorm.inputs.video import FrameRate
from featnorm.models.heads import head_settings
from featnorm.models.loading import users_forward, users_transform
from featnorm.parts import PartCalibration, Units, check_lowest, drawn_parts, sampled_parts, unit_scores
from featnorm.runtime import Runtime
from featnorm.tap import FeatureTap
from featnorm.tap.batch import LabelsOf
from featnorm.tap.contents import Contents
from featnorm.tap.find import Per, Pooling
from featnorm.tap.heat import NoHeatError, heat_maps
from featnorm.tap.tap import check_loader
from featnorm.verdict import BoxVerdict, ItemVerdict, Verdict, unreadable

HeadKind = Literal["keep", "train", "none"]

#: Beginnings of the names of tensors in a scorer's file.
MODEL, DETECTOR, CALIBRATION = "model.", "detector.", "calibration."
STATISTICS, EXAMPLES, ROWS = "statistics.", "examples.", "rows."
#: Share of the lowest parts that the score of a whole image or clip is the mean of, by default.
LOWEST: dict[Per, float] = {"input": 0.25, "position": 0.05, "box": 0.0}
_CHANGED = (
    "the model's weights or their precision have changed since the detector was fitted or calibrated: fit and "
    "calibrate it again"
)


class Scorer(nn.Module):
    """Scores how in-distribution each input of a model is, and decides whether it is ID or OOD.

    Scoring always runs in evaluation mode and without gradients, and restores the model's mode. Several threads
    may score at the same time, but the model must not be trained meanwhile.

    Parameters
    ----------
    model : user's model, on any device.
    detector : detector, which is moved to the model's device.
    layer, output, channel_axis, pooling : what the tap captures, see `FeatureTap`. Default: found automatically.
    preprocess
        Function from an item to what the model takes: from an image (a PIL image in RGB) to a tensor without the
        batch dimension, from a text to the tensors (L,) that the model takes by name, or from a row to a tensor
        (D,), see `featnorm.inputs.rows.Rows`. With it, the scorer takes files of such items, and so do all
        commands. Several threads may call it at the same time.
    kind
        What the preprocess takes: "images", "texts" or "rows". Default: its attribute ``kind``; images if it has
        none.
    classes : class names, one per logit.
    spec
        Specification from which `featnorm.models.create_model` makes the model. With it, a file with weights opens
        without the model.
    head
        How the model was made from the specification: "keep", as it is; "train", its backbone with a
        `ProjectionHead`; "none", its backbone alone.
    statistics : activation statistics of in-distribution inputs, for explanations. Default: those of `fit`.
    examples : sample of in-distribution items, for explanations. Default: none.
    facts : provenance shown with results, as label -> text.
    thresholds_by
        Groups of inputs that get a threshold each, so that the stated rate holds in every group: "class" for the
        predicted class, or "folder", a column or a regular expression, as `featnorm.inputs.group_items` takes
        them. Default: one threshold for all.
    per
        What gets a verdict: each "input", each "position" of a model whose outputs are maps, or each "box" that an
        object detector finds. Calibration then takes images as independent, and not their positions or boxes, see
        `featnorm.parts.PartCalibration`; `Verdict.units` holds the verdicts on images.
    lowest
        Share of the parts of an image or a clip whose mean score is that of the whole, see
        `featnorm.parts.unit_scores`. Default: 0.05 of the positions; the lowest box; 0.25 of the frames of a clip.

    Raises
    ------
    TypeError
        The model is not a `torch.nn.Module`, or the detector is not a `Detector`.
    ValueError
        ``layer`` is not in the model; ``per`` or ``lowest`` is invalid, or is given with groups.

    Examples
    --------
    >>> scorer = Scorer(model, NAN()).fit(train_loader).calibrate(held_out_loader, tpr=0.95)
    >>> verdict = scorer(images)
    >>> verdict.is_id.shape
    torch.Size([8])
    """

    def __init__(
        self,
        model: nn.Module,
        detector: Detector,
        layer: str | nn.Module | None = None,
        *,
        output: str | int | None = None,
        channel_axis: int | None = None,
        pooling: Pooling = "mean",
        preprocess: Callable[[Any], Any] | None = None,
        kind: str | None = None,
        classes: Sequence[str] | None = None,
        spec: str | None = None,
        head: HeadKind = "keep",
        statistics: ActivationStatistics | None = None,
        examples: Examples | None = None,
        facts: Mapping[str, str] | None = None,
        thresholds_by: str | None = None,
        per: Per = "input",
        lowest: float | None = None,
    ) -> None:
        super().__init__()
        check_detector(detector, "Scorer")
        if isinstance(classes, str):
            raise TypeError(f"classes must be a sequence of names, got the string {classes!r}")
        self.model = model
        if per != "input" and thresholds_by is not None:
            raise ValueError("thresholds_by is for a scorer per input: omit it, or per")
        if lowest is not None:
            check_lowest(lowest)
        self.tap = FeatureTap(model, layer, output, channel_axis, pooling, per)
        self.detector = detector.to(self.tap.device)
        self.calibration: Calibration | PartCalibration | None = None
        self.classes = None if classes is None else [check_text(name) for name in classes]
        self.spec = spec
        self.head = head
        self.statistics = statistics
        self.examples = examples
        self.facts = dict(facts or {})
        self.thresholds_by = thresholds_by
        self.lowest = LOWEST[per] if lowest is None else lowest
        # Digest of the weights that the fit and the calibration are for, and the versions that have it.
        self._weights: str | None = None
        self._versions: Any = None
        self._fitted: list[float] | None = None  # `_summed` of what `fit` read
        self.kind = kind_of(kind or preprocess)
        if per == "box" and self.kind is not IMAGES:
            raise ValueError(f"boxes are found in images, and the preprocess takes {self.kind.name}")
        if per == "box" and preprocess is not None:
            preprocess = OfAnySize(preprocess)
        # In a tuple, because a transform that is a module must neither be moved nor saved with the model.
        self._preprocess = (preprocess,)

    def __repr__(self) -> str:
        name = f"{type(self).__name__}({type(self.model).__name__}, {self.detector!r}"
        if self.calibration is None:
            return f"{name}, not calibrated)"
        count = len(self.calibration.scores)
        return f"{name}, tpr={self.calibration.tpr:g}, calibrated on {count:,} scores)"

    @property
    def preprocess(self) -> Callable[[Any], Any] | None:
        """Function from an item to what the model takes."""
        return self._preprocess[0]

    @property
    def unit_count(self) -> int:
        """Number of images or clips whose parts the calibration is on; 0 if it is not on parts."""
        return len(self.calibration.unit_scores) if isinstance(self.calibration, PartCalibration) else 0

    @property
    def per(self) -> Per:
        """What gets a verdict: each "input", "position" or "box"."""
        return self.tap.per

    @property
    def input_size(self) -> tuple[int, ...]:
        """Channels, height and width of a preprocessed image."""
        inputs: Any = self.reference_inputs()
        return tuple(inputs[0].shape)

    def reference_inputs(self) -> Inputs:
        """Return a batch of one fixed item, preprocessed, on the model's device."""
        preprocess = self.require_preprocess()
        return to_device(
            self.kind.collate([preprocess(self.kind.reference(preprocess))], preprocess), self.tap.device
        )

    def require_preprocess(self) -> Callable[[Any], Any]:
        """Return `preprocess`; raise a ValueError if there is none."""
        if self.preprocess is None:
            raise ValueError(
                f"this scorer takes tensors, not {self.kind.name}, because it has no preprocess: pass "
                "preprocess=transform to Scorer or fn.load, or open the file with the specification of a model "
                "that has one (fn.load(file, 'MODULE:FUNCTION'), --model MODULE:FUNCTION)"
            )
        return self.preprocess

    @property
    def is_jackknife(self) -> bool:
        """Whether the calibration is that of a `featnorm.Jackknife`, without scores of held-out inputs."""
        fixed = isinstance(self.calibration, Calibration) and are_ranks(self.calibration.scores.cpu().numpy())
        return fixed and isinstance(self.detector, Jackknife)

    @property
    def item_calibration(self) -> Calibration | PartCalibration | None:
        """Calibration of the verdicts on items: for a scorer of positions or boxes, that of whole images."""
        if self.per != "input" and isinstance(self.calibration, PartCalibration):
            return self.calibration.units
        return self.calibration

    @property
    def explains(self) -> bool:
        """Whether the scorer can explain verdicts, because it has activation statistics or examples."""
        return self.statistics is not None or self.examples is not None

    def fit(
        self,
        loader: Iterable[Any],
        held_out: Iterable[Any] | None = None,
        *,
        labels: LabelsOf | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Fit the detector to in-distribution inputs, in one pass and without keeping their features in memory.

        Of the positions or boxes of an image, at most 256 are used, see `featnorm.parts.sampled_parts`. For a
        detector that needs no fit, only the first batch is read, to check that the detector works on this model. A
        fit drops an earlier calibration. The same pass collects the statistics for explanations, if the model has
        a last hidden layer and a classifier on it.

        Parameters
        ----------
        loader : iterable of batches as the model takes them, with or without labels; see `FeatureTap.stream`.
        held_out
            Batches of other in-distribution inputs, for a detector that `needs_held_out`, such as a sum; with
            labels only for `TemperatureScaling`. Calibrate on a third set. Default: one input in five of
            ``loader`` is held out, at most 1024.
        labels
            Where the labels of a batch are: a key, an index or a function of the batch. Default: found by their
            position or name.
        progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        ValueError
            The model has no layer that the detector reads, an input or a label is invalid, or the loader is empty.
            An earlier fit is then kept.
        TypeError
            The loader is not an iterable of batches, or the model does not take them.
        """
        check_loader(loader)
        if not self.detector.needs_fit:
            if iter(loader) is loader:
                return self  # an iterator yields each batch once, and calibration needs them all
            for features in self.tap.stream(loader, labels, progress=False):
                self.detector.score(features)
                break
            return self
        statistics = ActivationStatistics()
        others = None if held_out is None else self.tap.stream(held_out, labels, progress=progress)
        sums = [0.0, 0.0, 0.0]
        batches = _summed(self.tap.stream(loader, labels, progress=progress), sums)
        self.fit_features(_counted(batches, statistics), others)
        self._fitted = sums
        self.statistics = None if statistics.is_empty else statistics
        return self

    def fit_features(self, batches: Iterable[Features], held_out: Iterable[Features] | None = None) -> Self:
        """Fit the detector to features of in-distribution inputs, in one pass.

        Parameters
        ----------
        batches : features as `tap` extracts them, with labels for detectors that need them.
        held_out : features of other in-distribution inputs, see `fit`.

        Raises
        ------
        ValueError
            The features lack what the detector reads, or are not finite; an earlier fit is then kept.
        """
        with self.detector.refit():
            others = None if held_out is None else sampled_parts(held_out)
            for error in fit_in_batches([self.detector], sampled_parts(batches), others).values():
                raise error
        if self.detector.needs_fit:
            self.calibration = self._fitted = None
            self.keep_weights()
        return self

    def calibrate(
        self,
        loader: Iterable[Any],
        tpr: float | None = None,
        *,
        groups: Sequence[str] | None = None,
        units: Units | None = None,
        update: bool = False,
        labels: LabelsOf | None = None,
        progress: bool | None = None,
    ) -> Self:
        """Set the threshold that accepts a share of in-distribution inputs, and keep their scores for p-values.

        Parameters
        ----------
        loader : in-distribution inputs that were used neither to train the model nor to fit the detector.
        tpr
            Share of in-distribution inputs to accept, between 0 and 1. Default: 0.95, or with ``update`` that of
            the earlier calibration.
        groups : group of each input, if ``thresholds_by`` is neither None nor "class".
        units
            Unit of each input, for inputs that depend on each other, such as the clip of each frame; see
            `featnorm.parts.PartCalibration`. Default: the inputs are independent.
        update : whether to add the inputs to those of the earlier calibration.
        labels : where the labels of a batch are, which are ignored; see `fit`.
        progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        ValueError
            There are too few inputs or units for the share (19 are needed at 0.95, 99 at 0.99), an input cannot be
            scored, groups are missing, or there is no earlier calibration to update.

        Warns
        -----
        UserWarning
            These are the inputs that the detector was fitted to.
        """
        self._check_rate(tpr, update)
        sums = [0.0, 0.0, 0.0]
        batches = self.tap.stream(loader, labels, progress=progress)
        if self._fitted:
            batches = _summed(batches, sums)
        self.calibrate_features(batches, tpr, groups=groups, units=units, update=update)
        # In any order, and with the rounding of other batches.
        if self._fitted and all(map(partial(math.isclose, rel_tol=1e-5), sums, self._fitted)):
            warnings.warn(
                f"these are the {int(sums[0]):,} inputs that the detector was fitted to, whose scores are too "
                "high for a calibration: calibrate on others, or more than the stated share of new ID inputs is "
                "flagged",
                stacklevel=2,
            )
        return self

    @torch.no_grad()
    def calibrate_features(
        self,
        batches: Iterable[Features],
        tpr: float | None = None,
        *,
        groups: Sequence[str] | None = None,
        units: Units | None = None,
        update: bool = False,
    ) -> Self:
        """Calibrate as `calibrate` does, on features of in-distribution inputs.

        Parameters
        ----------
        batches : features as `tap` extracts them.
        tpr, groups, units, update : see `calibrate`.

        Raises
        ------
        ValueError
            As `calibrate`.
        """
        self._check_rate(tpr, update)
        if self.per != "input" or units is not None:
            return self._calibrate_parts(batches, units, tpr, update)
        if self.thresholds_by is not None and self.thresholds_by != "class" and groups is None:
            raise ValueError(f"this scorer has thresholds by {self.thresholds_by!r}: pass the group of each input")
        scores, classes, count = [], [], 0
        for features in batches:
            scores.append(self.detector.score(features))
            if self.thresholds_by == "class":
                classes.append(features.tensor("logits").argmax(1))
                count = features.tensor("logits").shape[1]
        members = torch.cat(classes) if classes else groups
        names = self._class_names(count) if classes else None
        return self.use_scores(torch.cat(scores), members, names, tpr, update=update)

    def _calibrate_parts(
        self, batches: Iterable[Features], units: Units | None, tpr: float | None, update: bool
    ) -> Self:
        """Calibrate on the parts of units: of the inputs, or of units that are given."""
        if self.thresholds_by is not None:
            raise ValueError("thresholds_by is for inputs that are independent: omit it, or units")
        before = self.unit_count if update else 0
        if self.per == "input":
            assert units is not None
            scores = torch.cat([self.detector.score(features) for features in batches])
            return self.use_parts(drawn_parts(scores, units, self.lowest, before), tpr, update=update)
        if units is not None:
            raise ValueError(f"the units of a scorer per {self.per} are the inputs: omit units")
        found: list[tuple[Tensor, ...]] = []
        count = 0
        for features in batches:
            if len(features):
                assert features.parts is not None
                scores, owners, of_units = drawn_parts(
                    self.detector.score(features), features.parts.owners, self.lowest, before + count
                )
                found.append((scores, owners + count, of_units))
                count += len(of_units)
        if not found:
            raise ValueError(f"there is no {self.per} in the calibration inputs")
        scores, owners, of_units = map(torch.cat, zip(*found, strict=True))
        return self.use_parts((scores, owners, of_units), tpr, update=update)

    def use_parts(
        self, parts: tuple[Tensor, Tensor, Tensor], tpr: float | None = None, *, update: bool = False
    ) -> Self:
        """Calibrate on the scores of parts of in-distribution units, such as positions, boxes or frames.

        Parameters
        ----------
        parts : scores of parts, their owners, and scores of units, as `featnorm.parts.drawn_parts` returns them.
        tpr, update : see `calibrate`.

        Raises
        ------
        ValueError
            There are too few units for the share, or the earlier calibration is not of parts.
        """
        if not update:
            made = PartCalibration.from_state(*parts, 0.95 if tpr is None else tpr, self.lowest)
        elif isinstance(self.calibration, PartCalibration):
            if self.calibration.lowest != self.lowest:
                raise ValueError(
                    f"the earlier calibration averages the lowest {self.calibration.lowest:g} of a unit's parts, "
                    f"and the scorer {self.lowest:g}: calibrate without update"
                )
            made = self.calibration.with_parts(*parts)
            made = made if tpr is None else made.with_tpr(tpr)
        else:
            raise ValueError("the earlier calibration is of independent inputs: calibrate without update")
        return self._use(made)

    def use_scores(
        self,
        scores: Tensor,
        groups: Tensor | Sequence[str] | None = None,
        group_names: Sequence[str] | None = None,
        tpr: float | None = None,
        *,
        update: bool = False,
    ) -> Self:
        """Calibrate on the scores of in-distribution inputs.

        Parameters
        ----------
        scores, groups, group_names : see `Calibration`.
        tpr, update : see `calibrate`.

        Raises
        ------
        ValueError
            See `calibrate`.
        """
        if update and isinstance(self.calibration, PartCalibration):
            raise ValueError(
                "the earlier calibration is of parts of units: calibrate without update, or pass units"
            )
        if update and isinstance(self.calibration, Calibration):
            if self.is_jackknife:
                raise ValueError(
                    "the earlier calibration left inputs out of the fit in turn, so it has no scores to add to: "
                    "calibrate without update (--update)"
                )
            made = self.calibration.with_scores(scores, groups)
            made = made if tpr is None else made.with_tpr(tpr)
        else:
            made = Calibration(scores, 0.95 if tpr is None else tpr, groups, group_names)
        return self._use(made)

    def _use(self, made: Calibration | PartCalibration) -> Self:
        if self.detector.needs_fit:
            self._check_weights()
        self.calibration = made.to(self.tap.device)
        self.keep_weights()
        return self

    def keep_weights(self, digest: str | None = None) -> None:
        """Take the model's present weights for those of the fit and the calibration.

        Parameters
        ----------
        digest : their SHA-256, if it is known.
        """
        self._versions = self.tap.contents().versions()
        self._weights = digest or archive.fingerprint(self.tap.model)["sha256"]

    def _check_weights(self) -> Contents:
        """Return the model's contents; raise a ValueError if the weights have changed since the fit.

        The weights are the parameters and the buffers in the model's state. A change through ``.data``, of a
        non-persistent buffer, or of a layer without parameters (a ReLU replaced by a GELU) is not detected.
        """
        contents = self.tap.contents()
        if self._weights is None or self._versions == (versions := contents.versions()):
            return contents
        if archive.fingerprint(self.tap.model)["sha256"] != self._weights:
            raise ValueError(_CHANGED)
        self._versions = versions
        return contents

    def _check_rate(self, tpr: float | None, update: bool) -> None:
        if tpr is not None:
            check_share(tpr, "tpr")
        if update and self.calibration is None:
            raise ValueError("there is no calibration to update: calibrate without update=True first")

    def _class_names(self, count: int) -> list[str]:
        """Return the class names, or words for the classes where there are none."""
        word = "cluster" if self.head == "train" else "class"
        return self.classes or [f"{word} {k}" for k in range(count)]

    def class_words(self) -> list[str]:
        """Return the class names, or words such as "class 0" if they are not known."""
        if self.classes is not None:
            return self.classes
        features = self.tap.capture(self.reference_inputs(), classifier=False)
        return self._class_names(features.tensor("logits").shape[1])

    def set_tpr(self, tpr: float) -> Self:
        """Accept another share of in-distribution inputs, from the stored calibration scores.

        Raises
        ------
        ValueError
            The scorer is not calibrated, or has too few calibration scores for the share.
        """
        if self.calibration is None:
            raise ValueError("the scorer is not calibrated: it has no scores for another share")
        self.calibration = self.calibration.with_tpr(tpr).to(self.tap.device)
        return self

    def forward(self, inputs: Any, groups: Sequence[str] | None = None) -> Verdict:
        """Score a batch of inputs.

        Parameters
        ----------
        inputs : batch as the model takes it; see `FeatureTap`.
        groups : group of each input, if ``thresholds_by`` is neither None nor "class".

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        ValueError
            The model has no layer that the detector reads, one of its outputs is not finite, or its weights have
            changed since the fit or the calibration.
        """
        if torch.is_grad_enabled():
            with torch.no_grad():
                return Scorer.forward(self, inputs, groups)  # not self.forward, which a subclass may override
        contents = self._check_weights()
        features = self.tap.capture(inputs, classifier="classifier" in self.detector.reads, contents=contents)
        return self._verdict(features, groups)

    @torch.no_grad()
    def predict_features(self, features: Features, groups: Sequence[str] | None = None) -> Verdict:
        """Score inputs by their features.

        Parameters
        ----------
        features : features as `tap` extracts them, with the classifier if the detector reads it.
        groups : see `forward`.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        ValueError
            The features lack what the detector reads, or a group is missing or was not in the calibration.
        """
        return self._verdict(features, groups)

    def _verdict(self, features: Features, groups: Sequence[str] | None) -> Verdict:
        score = self.detector.score(features)
        parts, calibration = features.parts, self.calibration
        if calibration is None:
            return Verdict(score, None, None, features.logits, parts)
        if isinstance(calibration, PartCalibration):
            units = None if parts is None else calibration.predict_units(score, parts.owners, parts.count)
            return Verdict(score, *calibration.predict(score), features.logits, parts, units)
        members: Any = groups
        if self.thresholds_by == "class" and calibration.group_names:
            members = features.tensor("logits").argmax(1)
        return Verdict(score, *calibration.predict(score, members), features.logits)

    def predict(
        self,
        items: Sequence[Any],
        *,
        groups: Sequence[str] | None = None,
        explain: bool = False,
        runtime: Runtime | None = None,
    ) -> list[ItemVerdict]:
        """Return the verdict on each item, including those that cannot be read.

        Parameters
        ----------
        items
            Images as paths, PIL images or arrays of shape (H, W), (H, W, 3) or (H, W, 4) and type uint8, which
            `preprocess` turns into tensors; or tensors that the model takes, without the batch dimension. Of a
            scorer of texts: str, or mappings of the tensors (L,) that the model takes by name.
        groups : group of each item, if ``thresholds_by`` is neither None nor "class".
        explain : whether to explain the verdicts, with heat maps.
        runtime : precision and batch size. Default: `Runtime()`. The scorer stays on the device where it is.

        Raises
        ------
        TypeError
            The items are a single one, or an item is of another type.
        ValueError
            The scorer has no preprocess and an item needs one, an array or tensor of rows has another width, an
            output of the model is not finite, or explanations are requested and there are neither statistics nor
            examples.
        UserModelError
            The model or its preprocess is the user's own, and raised an error.
        """
        is_array = isinstance(items, (np.ndarray, Tensor))
        items = self.kind.sequence_of(items)
        if is_array and isinstance(items, np.ndarray) and len(items) and items.dtype.kind in "fiub":
            self.kind.check_source(ArrayRows(items, "the array"), self.preprocess)  # one error, not one per row
        runtime = runtime or Runtime()
        verdicts: list[ItemVerdict] = []
        size = runtime.batch_of(self.kind)
        for start in range(0, len(items), size):
            rows = range(start, min(start + size, len(items)))
            named_items = [(self.kind.name_of(items[i], i), items[i]) for i in rows]
            some = None if groups is None else [groups[i] for i in rows]
            verdicts += self._predict_items(named_items, some, explain, runtime)
        return verdicts

    def _predict_items(
        self, items: Sequence[tuple[str, Any]], groups: Sequence[str] | None, explain: bool, runtime: Runtime
    ) -> list[ItemVerdict]:
        verdicts: dict[int, ItemVerdict] = {}
        # Inputs of different shapes are different batches.
        shapes: dict[Any, dict[int, Any]] = {}
        several: set[int] = set()
        for row, (name, item) in enumerate(items):
            try:
                prepared = self._preprocessed(item, name, row, several)
            except ItemError as error:
                verdicts[row] = unreadable(name, error.reason)
            else:
                shapes.setdefault(getattr(prepared, "shape", None), {})[row] = prepared
        for inputs in shapes.values():
            names = [items[row][0] for row in inputs]
            rows = range(len(names)) if explain else ()
            batch = self.kind.collate([*inputs.values()], self.preprocess)
            some = None if groups is None else [groups[row] for row in inputs]
            found = self.predict_batch(batch, names, groups=some, explain=rows, heat=explain, runtime=runtime)
            for row, verdict in zip(inputs, found, strict=True):
                verdicts[row] = verdict._replace(first_of_several=row in several)
        return [verdicts[row] for row in range(len(items))]

    def _preprocessed(self, raw: Any, name: str, row: int, several: set[int]) -> Any:
        """Return what the model takes for an item; add its row to ``several`` if its file has more of them."""
        if self.kind.is_prepared(raw):
            return raw
        preprocess = self.require_preprocess()
        item = self.kind.item_of(raw, name)
        if self.kind.is_first_of_several(item):
            several.add(row)
        with users_transform(self.spec or "", name):
            return preprocess(item)

    def engine(self, runtime: Runtime, count: int) -> FeatureEngine | None:
        """Return what runs the model in place of PyTorch, for `stream` and `predict_batch`; None for PyTorch.

        Parameters
        ----------
        runtime : its ``engine`` is used.
        count : number of items to score.

        Raises
        ------
        EngineError, ValueError
            The runtime's ``engine`` is "onnx", and onnxruntime cannot run the model, or not with the same result.
        ImportError
            It is "onnx", and ``featnorm[onnx]`` is not installed.
        """
        if not is_wanted(runtime, self.kind, self.tap.device, count):
            return None
        return required_or_none(runtime, self._onnx_engine)

    @torch.no_grad()
    def _onnx_engine(self) -> FeatureEngine:
        if self.detector.needs_model:
            raise EngineError(f"{self.detector!r} runs it again on changed inputs")
        engine = FeatureEngine(self.tap, self.kind, self.require_preprocess())
        contents = self._check_weights()
        found = engine.features(engine.example, contents, classifier=True)
        expected = self.tap.capture(engine.example, classifier=True, contents=contents)
        assert found is not None  # it is the example
        known = () if self.calibration is None else self.calibration.group_names[:1]
        groups = None if not known or self.thresholds_by == "class" else len(expected) * [*known]
        ours, torchs = (self.predict_features(features, groups) for features in (found, expected))
        if not (gap := relative_gap(ours.score, torchs.score)) <= TOLERANCE:
            raise EngineError(f"its score differs from PyTorch's by {gap:.1e} of the largest")
        if ours.is_id is not None and torchs.is_id is not None and not torch.equal(ours.is_id, torchs.is_id):
            raise EngineError("its verdict on a fixed item differs from PyTorch's")
        return engine

    def stream(
        self, source: Source[Any], *, runtime: Runtime | None = None, engine: FeatureEngine | None = None
    ) -> Iterator[list[ItemVerdict]]:
        """Yield the verdicts on a source's items, including unreadable ones, batch by batch in its order.

        A batch that does not fit in the device's memory is scored in parts.

        Parameters
        ----------
        source : items to score.
        runtime
            Precision, batch size and workers. Default: `Runtime()`. The scorer stays on the device where it is.
        engine : what `engine` returned. Default: PyTorch runs the model.

        Raises
        ------
        DataError
            The preprocess fails on an item, or the source holds items of another kind.
        ValueError
            The scorer has no preprocess, an output of the model is not finite, or a group was not in the
            calibration.
        """
        runtime = runtime or Runtime()
        source.require(self.kind, "this scorer", self.preprocess)
        groups = self.groups_of(source)

        def predict(inputs: Inputs, rows: Tensor) -> list[ItemVerdict]:
            some = None if groups is None else [groups[row] for row in rows.tolist()]
            names = [source.name(row) for row in rows.tolist()]
            return self._predict(inputs, names, groups=some, runtime=runtime, engine=engine)

        size, workers = runtime.batch_of(source.kind), runtime.workers
        passes = pass_size(runtime, source.kind, self.tap.device, len(source)) if engine is None else None
        for part in source_loader(source, self.require_preprocess(), batch_size=size, workers=workers).parts():
            verdicts = {row: unreadable(source.name(row), why) for row, why in part.unread.items()}
            if part.batch is not None:
                with self._users_forward(named(source, part.batch.indices.tolist())):
                    found = over_parts(predict, part.batch.inputs, part.batch.indices, passes=passes)
                for row, verdict in zip(part.batch.indices.tolist(), found, strict=True):
                    several, moment = row in part.several, source.time(row)
                    verdicts[row] = verdict._replace(first_of_several=several, time=moment)
            yield [verdicts[row] for row in part.rows]

    def watch(
        self,
        frames: Iterable[Any],
        *,
        fps: float | None = None,
        batch_size: int = 1,
        runtime: Runtime | None = None,
    ) -> Iterator[ItemVerdict]:
        """Yield the verdicts on the frames of a stream, such as a camera or a pipe, as they come.

        Memory holds one batch, however long the stream. The frames of a stream depend on each other: calibrate on
        clips (``units`` of `calibrate`), so that the stated rate is that of the frames of a new clip. For the same
        reason a `DriftMonitor` must not be updated with all of them.

        Parameters
        ----------
        frames
            Frames as `predict` takes them, in the order of time: PIL images, arrays (H, W, 3), tensors, or what
            PyAV decodes.
        fps
            Maximum number of frames per second to score; the others are skipped. Default: all frames are scored.
        batch_size : number of frames to score at a time; verdicts come after the last one of them.
        runtime : precision. Default: `Runtime()`. The scorer stays on the device where it is.

        Yields
        ------
        ItemVerdict
            Its ``time`` is that of PyAV's frame, or else the number of seconds since the first frame came.

        Raises
        ------
        TypeError, ValueError
            See `predict`; or ``fps`` or ``batch_size`` is not positive.

        Examples
        --------
        >>> camera = av.open("/dev/video0", format="v4l2")
        >>> for verdict in scorer.watch(camera.decode(video=0), fps=5):
        ...     if not verdict.is_id:
        ...         print(verdict.time, verdict.p_value)
        """
        if batch_size < 1 or (fps is not None and not fps > 0):
            raise ValueError(f"fps and batch_size must be positive, got {fps} and {batch_size}")
        return self._watched(frames, fps, batch_size, runtime or Runtime())

    def _watched(
        self, frames: Iterable[Any], fps: float | None, batch_size: int, runtime: Runtime
    ) -> Iterator[ItemVerdict]:
        batch: list[tuple[str, Any]] = []
        times: list[float] = []
        began, rate = None, FrameRate(fps)
        for number, frame in enumerate(frames):
            now = perf_counter()
            began = now if began is None else began
            stamp = getattr(frame, "time", None)
            moment = now - began if stamp is None else float(stamp)
            if not rate.takes(moment):
                continue
            batch.append((f"frame {number}", frame))
            times.append(moment)
            if len(batch) == batch_size:
                yield from self._timed(batch, times, runtime)
                batch, times = [], []
        yield from self._timed(batch, times, runtime)

    def _timed(
        self, batch: Sequence[tuple[str, Any]], times: Sequence[float], runtime: Runtime
    ) -> Iterator[ItemVerdict]:
        for moment, verdict in zip(times, self._predict_items(batch, None, False, runtime), strict=True):
            yield verdict._replace(time=moment)

    def groups_of(self, source: Source[Any]) -> list[str] | None:
        """Return the group of each item of a source; None if the scorer has no groups, or those of classes.

        Raises
        ------
        DataError
            An item has no group, or one that was not in the calibration.
        """
        if self.thresholds_by is None or self.thresholds_by == "class":
            return None
        groups = group_items(source, self.thresholds_by)
        known = set(groups if self.calibration is None else self.calibration.group_names)
        for i, group in enumerate(groups):
            if group not in known:
                raise DataError(
                    f"{source.name(i)} is of the group {group!r}, which was not in the calibration: calibrate "
                    "with in-distribution inputs of that group, or leave it out"
                )
        return groups

    @torch.no_grad()
    def predict_batch(
        self,
        inputs: Inputs,
        names: Sequence[str],
        *,
        groups: Sequence[str] | None = None,
        explain: Sequence[int] = (),
        heat: bool = False,
        runtime: Runtime | None = None,
        engine: FeatureEngine | None = None,
    ) -> list[ItemVerdict]:
        """Return the verdict on each input of a batch.

        Parameters
        ----------
        inputs : batch of preprocessed inputs, on any device.
        names : one name per input.
        groups : group of each input, if ``thresholds_by`` is neither None nor "class".
        explain : rows of the inputs to explain.
        heat : whether explanations include a heat map, for one more forward pass on each input to explain.
        runtime, engine : see `stream`.

        Raises
        ------
        ValueError
            An output of the model is not finite, or inputs are to be explained and there are neither statistics
            nor examples.
        UserModelError
            The model is the user's own and raised an error.
        """
        with self._users_forward(
            f"a batch of {len(names)} {self.kind.name}, {names[0]} to {names[-1]}" if names else ""
        ):
            how: dict[str, Any] = {"heat": heat, "runtime": runtime, "engine": engine}
            return self._predict(inputs, names, groups=groups, explain=explain, **how)

    def _users_forward(self, inputs: str) -> AbstractContextManager[None]:
        model: Any = self.model
        return users_forward(self.spec or "", model[0] if self.head == "train" else model, inputs)

    def _predict(
        self,
        inputs: Inputs,
        names: Sequence[str],
        *,
        groups: Sequence[str] | None = None,
        explain: Sequence[int] = (),
        heat: bool = False,
        runtime: Runtime | None = None,
        engine: FeatureEngine | None = None,
    ) -> list[ItemVerdict]:
        contents = self._check_weights()
        reads_classifier = bool(explain) or "classifier" in self.detector.reads
        found = None if engine is None else engine.features(inputs, contents, classifier=reads_classifier)
        with (runtime or Runtime()).autocast():
            if found is None or explain:
                inputs = to_device(inputs, contents.device)
            features = found or self.tap.capture(inputs, classifier=reads_classifier, contents=contents)
            verdict = self.predict_features(features, groups)
        if verdict.parts is not None:
            return self._of_inputs(names, verdict, verdict.parts)
        nothing = [None] * len(names)
        p_values, is_id = (nothing if v is None else v.tolist() for v in (verdict.p_value, verdict.is_id))
        predicted: list[Any] = nothing
        if self.classes is not None and verdict.logits is not None:
            self.check_classes(verdict.logits)
            predicted = [self.classes[i] for i in verdict.logits.argmax(1).tolist()]
        members: Sequence[Any] = groups or nothing
        if self.thresholds_by == "class" and verdict.logits is not None:
            words = self._class_names(verdict.logits.shape[1])
            members = [words[i] for i in verdict.logits.argmax(1).tolist()]
        columns = (names, verdict.score.tolist(), p_values, is_id, predicted, nothing, members)
        verdicts = [ItemVerdict(*row) for row in zip(*columns, strict=True)]
        for row, why in zip(explain, self._explained(inputs, features, explain, heat), strict=True):
            verdicts[row] = verdicts[row]._replace(why=why)
        return verdicts

    def _of_inputs(self, names: Sequence[str], verdict: Verdict, parts: Parts) -> list[ItemVerdict]:
        """Return the verdict on each input, from those on all parts."""
        units = verdict.units
        if units is None:
            units = Verdict(unit_scores(verdict.score, parts.owners, parts.count, self.lowest), None, None, None)
        sizes = torch.bincount(parts.owners, minlength=parts.count).tolist()
        nothing = [None] * parts.count
        whole = (nothing if values is None else values.tolist() for values in units[:3])
        # Copies, because a verdict that is kept would otherwise keep its whole batch.
        of_parts = (
            nothing if values is None else [part.clone() for part in values.cpu().split(sizes)]
            for values in verdict[:3]
        )
        boxes = self._boxes_of(verdict, parts)
        found = []
        rows: Iterable[tuple[Any, ...]] = zip(names, *whole, *of_parts, strict=True)
        for (name, score, p_value, is_id, scores, p_values, are_id), size in zip(rows, sizes, strict=True):
            owners = torch.zeros(len(scores), dtype=torch.int64)
            own = Verdict(scores, p_values, are_id, None, Parts(owners, 1, parts.grid))
            share = None if are_id is None else 1 - float(are_id.double().mean()) if len(owners) else 0.0
            of_boxes = None if boxes is None else tuple(islice(boxes, size))
            whole_item = ItemVerdict(name, score, p_value, is_id, None, None)
            found.append(whole_item._replace(flagged_share=share, boxes=of_boxes, parts=own))
        return found

    def _boxes_of(self, verdict: Verdict, parts: Parts) -> Iterator[BoxVerdict] | None:
        """Return the verdicts on boxes one by one; None if the parts are not boxes."""
        if parts.boxes is None:
            return None
        if verdict.logits is not None:
            self.check_classes(verdict.logits)
        corners, labels, confidence = (values.tolist() for values in parts.boxes)
        words = [str(label) if self.classes is None else self.classes[label] for label in labels]
        nothing = [None] * len(words)
        p_values, are_id = (nothing if v is None else v.tolist() for v in (verdict.p_value, verdict.is_id))
        columns = (map(tuple, corners), words, confidence, verdict.score.tolist(), p_values, are_id)
        return (BoxVerdict(*row) for row in zip(*columns, strict=True))

    def check_classes(self, logits: Tensor) -> None:
        """Raise a ValueError if the number of class names is not that of the logits (n, C)."""
        if self.classes is not None and len(self.classes) != logits.shape[1]:
            raise ValueError(
                f"there are {len(self.classes)} class names, but the model has {logits.shape[1]} logits: pass one "
                "name per logit"
            )

    def _explained(self, inputs: Inputs, features: Features, rows: Sequence[int], heat: bool) -> list[Why]:
        """Explain some rows of a batch, whose features include the classifier."""
        if not rows:
            return []
        if not self.explains:
            raise ValueError(
                "this scorer has neither activation statistics nor examples of in-distribution inputs: fit again"
            )
        chosen = list(rows)
        parts: list[dict[str, Any]] = [{} for _ in rows]
        if self.statistics is not None:
            weight, bias = features.linear()
            hidden = HiddenClassifier(
                features.tensor("activation")[chosen].float(),
                weight.float(),
                None if bias is None else bias.float().expand(len(chosen), -1),
            )
            names = self._class_names(len(weight))
            for part, units in zip(parts, explain(hidden, self.statistics, names), strict=True):
                part["units"] = units
        if isinstance(self.detector, Sum) and not self.detector.needs_model:
            words = [repr(term) for term in self.detector.terms]
            for part, values in zip(parts, self.detector.term_scores(features)[chosen].tolist(), strict=True):
                part["terms"] = list(zip(words, values, strict=True))
        reference = None
        if self.examples is not None:
            by_distance = not getattr(self.preprocess, "embeds", True)
            nearest = self.examples.nearest(features.tensor("pooled")[chosen], by_distance=by_distance)
            reference = torch.stack([self.examples.mean(found) for found in nearest])
            for part, found in zip(parts, nearest, strict=True):
                part["nearest"] = found
        if heat:
            try:
                if self.detector.needs_model:
                    raise NoHeatError(f"{self.detector!r} runs the model on changed inputs")
                if self.kind is not IMAGES or not isinstance(inputs, Tensor):
                    raise NoHeatError(f"the scorer takes {self.kind.name}")
                maps, compared = heat_maps(self.tap, inputs[chosen], self.detector.score, reference)
                for part, one in zip(parts, maps.cpu(), strict=True):
                    part |= {"heat": one, "compared": compared}
            except NoHeatError as error:
                for part in parts:
                    part["no_heat"] = str(error)
        return [Why(**part) for part in parts]

    def export(self, path: str | Path) -> float:
        """Write one ONNX graph from preprocessed inputs to verdicts; see `featnorm.export.export_onnx`."""
        return export_onnx(self, path)

    def get_extra_state(self) -> dict[str, Any]:
        """Return the share to accept and the groups, which are not in buffers, for `state_dict`."""
        return {"tpr": None} if self.calibration is None else self.calibration.to_dict()

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Accept what `get_extra_state` returned; the calibration is made when its scores are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        self._weights = self._fitted = None  # they are loaded too, and so is the fit
        scores, extra = state_dict.get(f"{prefix}calibration.scores"), state_dict.get(f"{prefix}_extra_state")
        if scores is not None and extra is not None and extra.get("lowest") is not None:
            owners, of_units = (state_dict[f"{prefix}calibration.{name}"] for name in ("owners", "unit_scores"))
            self.lowest = extra["lowest"]
            self.calibration = PartCalibration.from_state(
                scores, owners, of_units, extra["tpr"], extra["lowest"]
            ).to(self.tap.device)
        elif scores is not None and extra is not None and extra["tpr"] is not None:
            members = state_dict.get(f"{prefix}calibration.members")
            made = Calibration(scores, extra["tpr"], members, extra["groups"])
            self.calibration = made.to(self.tap.device)
        if self.statistics is None and any(key.startswith(f"{prefix}{STATISTICS}") for key in state_dict):
            self.statistics = ActivationStatistics()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, path: str | Path, *, weights: bool | None = None) -> None:
        """Write the scorer to one file: safetensors with a JSON header, no pickle.

        Parameters
        ----------
        path : file to write.
        weights
            Whether to write the model's weights too. `load` then makes the model from ``spec``; a specification
            MODULE:FUNCTION, whose code is the user's own, must be given again. Otherwise the file holds only a
            fingerprint of the model. Default: yes if `fit` trained the head, which would be lost with the program.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        ValueError
            The detector is of a class that cannot be made again from its expression, or the model's weights have
            changed since the fit or the calibration.
        OSError
            The file cannot be written. An earlier file of that name is kept.
        """
        tensors, header = self._fitted_tensors(), self._header()
        if self.head == "train" if weights is None else weights:
            tensors |= {f"{MODEL}{name}": value for name, value in self.tap.model.state_dict().items()}
        if self.preprocess is not None:
            tensors["preprocessed"], tensors["response"] = self.reference_outputs()
        settings, fitted = self._rows()
        tensors |= fitted
        if self.statistics is not None:
            tensors |= {f"{STATISTICS}{name}": value for name, value in self.statistics.state_dict().items()}
        if self.examples is not None:
            tensors |= {f"{EXAMPLES}{name}": value for name, value in self.examples.tensors().items()}
        made: Any = self.model
        header["scorer"] = {
            "kind": self.kind.name,
            "input size": self.input_size if self.kind is IMAGES and self.preprocess is not None else None,
            "rows": settings,
            "spec": self.spec,
            "head": self.head,
            "head settings": head_settings(made[1]) if self.head == "train" else None,
            "classes": self.classes,
            "facts": self.facts,
            "example classes": None if self.examples is None else self.examples.classes,
            "thresholds by": self.thresholds_by,
            "lowest": self.lowest,
        }
        archive.write(path, tensors, header)

    def digest(self) -> str:
        """Return the SHA-256 of everything that verdicts depend on: weights, detector, calibration and classes.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        """
        settings, fitted = self._rows()
        about = {"spec": self.spec, "classes": self.classes, "thresholds by": self.thresholds_by}
        header = {**self._header(), **about, "rows": settings}
        return archive.digest(self._fitted_tensors() | fitted, header)

    def _rows(self) -> tuple[dict[str, Any] | None, dict[str, Tensor]]:
        """Return the settings and the tensors of the preprocess of rows; None and nothing for other kinds."""
        if not isinstance(self.preprocess, Rows):
            return None, {}
        settings, fitted = self.preprocess.state()
        return settings, {f"{ROWS}{name}": value for name, value in fitted.items()}

    def _fitted_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of detector and calibration, by name."""
        self.detector.require_fitted()
        tensors = {f"{DETECTOR}{name}": value for name, value in self.detector.state_dict().items()}
        if self.calibration is not None:
            named_tensors = self.calibration.fitted_tensors().items()
            tensors |= {f"{CALIBRATION}{name}": value for name, value in named_tensors}
        return tensors

    def _header(self) -> dict[str, Any]:
        if self.tap._plan is None and self.preprocess is not None:
            self.tap.trace(self.reference_inputs())
        model = archive.fingerprint(self.tap.model)
        if self._weights not in (None, model["sha256"]):
            raise ValueError(_CHANGED)
        return {
            "detector": _expression(self.detector),
            **({} if self.calibration is None else self.calibration.to_dict()),
            "tap": self.tap.to_dict(),
            "model": model,
        }

    @torch.no_grad()
    def reference_outputs(self) -> tuple[Tensor, Tensor]:
        """Return the outputs for a fixed item: of preprocess, and of the model, (D,).

        Of images, the former is pooled to (c, 8, 8). The latter are its pooled features, or else its logits.
        """
        name = f"{self.kind.one} of reference"
        with users_transform(self.spec or "", name):
            inputs = self.reference_inputs()
        with self._users_forward(name):
            features = self.tap.capture(inputs, classifier=False)
        _, response = next(features.fields()) if features.pooled is None else ("", features.pooled)
        # A detector may find no box in the image: its response is then zero.
        return self.kind.fingerprint(rows_in(inputs, 0)), response[:1].float().sum(0).cpu()


def _summed(batches: Iterable[Features], sums: list[float]) -> Iterator[Features]:
    """Yield features; add their number, and sums over a random projection of their first field, to ``sums``."""
    weights: Tensor | None = None
    for features in batches:
        values = next(features.fields())[1].flatten(1).float()
        if weights is None:
            generator = torch.Generator().manual_seed(0)
            weights = torch.randn(values.shape[1], generator=generator, dtype=torch.float32).to(values.device)
        projected = (values @ weights).double()
        found = len(values), float(projected.abs().sum()), float(projected.square().sum())
        sums[:] = (a + b for a, b in zip(sums, found, strict=True))
        yield features


def _counted(batches: Iterable[Features], statistics: ActivationStatistics) -> Iterator[Features]:
    """Yield features, and update the statistics with those that can be explained."""
    for features in batches:
        yield features
        count_units(features, statistics)


def count_units(features: Features, statistics: ActivationStatistics) -> None:
    """Update statistics with features from which verdicts can be explained; others are not counted."""
    if features.parts is not None or features.classifier is None:
        return
    if features.activation is not None and features.logits is not None:
        statistics.update(features.activation.cpu(), features.logits.argmax(1).cpu())


def _expression(detector: Detector) -> str:
    """Return the expression of a detector; a ValueError if the detector cannot be made from it again."""
    expression = repr(detector)
    try:
        rebuilt = repr(parse_detector(expression)) == expression
    except ValueError:
        rebuilt = False
    if not rebuilt:
        raise ValueError(
            f"{expression} cannot be saved: this expression does not make it again. A class of your own must keep "
            "its settings as attributes: numbers, strings, bools, None, or tuples of these"
        )
    return expression
