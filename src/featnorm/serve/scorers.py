"""The scorers of a service by name, each loaded again when its file is replaced: `ServedScorers`, `ScorerFile`."""

import dataclasses
import logging
import os
import shutil
import tempfile
import time
import timeit
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from featnorm._utils.checks import check_type
from featnorm._utils.errors import first_line
from featnorm.engine import MIN_ITEMS, FeatureEngine
from featnorm.parts import PartCalibration
from featnorm.report.explanation import grayscale, heat_map
from featnorm.report.html import thumbnail
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.scorer_file import load
from featnorm.serve.batching import Pending
from featnorm.serve.limits import Limits
from featnorm.serve.metrics import ScoredInputs
from featnorm.serve.responses import Detector, Drift, HeatMap, Why, finite, histogram, why_of
from featnorm.verdict import ItemVerdict

log = logging.getLogger("featnorm.serve")

_ALONE = "default"
# Seconds per item from which a model is worth an export, which takes about ten seconds.
_SLOW = 0.005


class ScorerFile:
    """A file of a scorer. The service loads it again when it is replaced.

    Parameters
    ----------
    path : file written by `Scorer.save`.
    load : function that returns the scorer in a file. Default: `featnorm.load`.
    """

    def __init__(self, path: str | Path, load: Callable[[Path], Scorer] = load) -> None:
        self.path = Path(path)
        self._load = load
        self._requested = False
        self._loaded: tuple[int, ...] | None = None
        self._seen: tuple[int, ...] | None = None

    def load(self) -> Scorer:
        """Load the scorer."""
        self._note()
        return self._load(self.path)

    def reload(self) -> Scorer:
        """Load the scorer from a copy of the file.

        Reading maps the file into memory, so that the process would be killed if the file were truncated
        meanwhile. Errors that contain the path of the copy contain that of the file instead.
        """
        self._note()
        with tempfile.TemporaryDirectory(prefix="featnorm-", ignore_cleanup_errors=True) as folder:
            copy = Path(folder) / self.path.name
            try:
                return self._load(Path(shutil.copyfile(self.path, copy)))
            except (OSError, ValueError) as error:
                raise ValueError(first_line(error).replace(str(copy), str(self.path))) from error

    def request_reload(self) -> None:
        """Load the file again within seconds, whether or not it has changed. Signal handlers may call this."""
        self._requested = True

    def needs_reload(self) -> bool:
        """Whether a reload was requested, or the file was replaced and has not changed since the last call."""
        before, self._seen = self._seen, self._state()
        return self._requested or (self._seen == before and self._seen != self._loaded)

    def _note(self) -> None:
        self._requested = False
        # Before the file is read, so that a change meanwhile is noticed.
        self._loaded = self._state()

    def _state(self) -> tuple[int, ...] | None:
        try:
            state = os.stat(self.path)
        except OSError:
            return None
        return state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns


class ServedScorer:
    """A scorer under a name, from when it is loaded until it is replaced.

    Parameters
    ----------
    name : name in addresses and metrics.
    scorer : calibrated scorer with a preprocess.
    limits : limits of the service, for its description.
    runtime : precision to score in, and the engine. Default: PyTorch in single precision.

    Attributes
    ----------
    kind : Kind
        What it scores.
    transform : callable
        From an item to what the model takes.
    description : Detector
        What `/v1/detector` returns, with the drift when the scorer was loaded; see `current`.
    seen : ScoredInputs
        Statistics of the inputs that this scorer has scored.
    groups : tuple of str
        Groups of which each input must have one; empty if the scorer needs none.

    Raises
    ------
    ValueError
        The scorer is not calibrated, or has no preprocess.
    """

    def __init__(self, name: str, scorer: Scorer, limits: Limits, runtime: Runtime | None) -> None:
        check_type(scorer, Scorer, f"the scorer {name!r}", "a Scorer or a ScorerFile")
        calibration = scorer.item_calibration
        if calibration is None:
            raise ValueError(f"the scorer {name!r} is not calibrated: it has no threshold for a verdict")
        self.name = name
        self.transform = scorer.require_preprocess()
        self.kind = scorer.kind
        exchangeable = not isinstance(calibration, PartCalibration)
        self.seen = ScoredInputs(name, calibration.scores, exchangeable=exchangeable)
        self.groups = () if scorer.thresholds_by == "class" else calibration.group_names
        self._scorer = scorer
        self._runtime = runtime
        # The digest contains the trace of the model, which a scorer calibrated on features does not have yet.
        scorer.tap.capture(scorer.reference_inputs(), classifier=False)
        self._engine = None if runtime is None else _engine(scorer, runtime)
        thresholds = calibration.threshold.reshape(-1).tolist()
        names = calibration.group_names
        self.description = Detector(
            name=name,
            detector=repr(scorer.detector),
            digest=scorer.digest(),
            inputs=scorer.kind.name,
            model=scorer.spec,
            facts=scorer.facts,
            classes=scorer.classes,
            threshold=None if names else finite(thresholds[0]),
            thresholds_by=scorer.thresholds_by if names else None,
            thresholds=dict(zip(names, map(finite, thresholds), strict=True)) if names else None,
            tpr=calibration.tpr,
            calibration=histogram(calibration.scores, thresholds),
            explains=scorer.explains,
            limits=dataclasses.asdict(limits),
            drift=Drift.of(self.seen.drift),
        )

    @property
    def current(self) -> Detector:
        """The description with the drift of now."""
        return self.description.model_copy(update={"drift": Drift.of(self.seen.drift)})

    @property
    def any_group(self) -> str | None:
        """A group for the item of a warm-up."""
        return next(iter(self.groups), None)

    def predict(self, images: Sequence[Pending], *, heat: bool = False) -> list[ItemVerdict]:
        """Return the verdict on each image of a batch; with ``heat``, explanations have heat maps."""
        return self._scorer.predict_batch(
            self.kind.collate([image.prepared for image in images], self.transform),
            [image.upload.name for image in images],
            groups=[image.group or "" for image in images] if self.groups else None,
            explain=[i for i, image in enumerate(images) if image.explain],
            heat=heat,
            runtime=self._runtime,
            engine=self._engine,
        )

    def explain(self, images: Sequence[Pending]) -> list[Why]:
        """Return the explanation of the verdict on each image of a batch, with pictures."""
        explanations = []
        for image, verdict in zip(images, self.predict(images, heat=True), strict=True):
            assert verdict.why is not None
            why = why_of(verdict.why, self.kind, thumbnails=True)
            if verdict.why.heat is not None and image.prepared.ndim == 3:
                (gray,) = grayscale(image.prepared[None], self.transform)
                picture = thumbnail(heat_map(verdict.why.heat, gray), "")
                why.heat = HeatMap(picture=picture.uri, reference=verdict.why.reference)
            explanations.append(why)
        return explanations

    def warm_up(self, **how: Any) -> None:
        """Score the item of reference, as the first takes longer; ``how`` is passed to `Scorer.predict_batch`."""
        groups = None if self.any_group is None else [self.any_group]
        inputs = self._scorer.reference_inputs()
        self._scorer.predict_batch(
            inputs, ["warm-up"], groups=groups, runtime=self._runtime, engine=self._engine, **how
        )

    def warm_up_explanations(self) -> None:
        """Explain the item of reference, as the first takes seconds. If that fails, items are scored anyway."""
        if self.description.explains:
            try:
                self.warm_up(explain=[0], heat=True)
            except Exception:
                log.exception("an explanation failed")


def _engine(scorer: Scorer, runtime: Runtime) -> FeatureEngine | None:
    """Return what runs a scorer's model in place of PyTorch, for any number of items; see `Scorer.engine`."""
    inputs = scorer.reference_inputs()
    seconds = min(timeit.repeat(lambda: scorer.tap.capture(inputs, classifier=False), number=1, repeat=3))
    return scorer.engine(runtime, MIN_ITEMS if seconds >= _SLOW else 0)


class ServedScorers(Mapping[str, ServedScorer]):
    """The scorers of a service by name.

    Parameters
    ----------
    scorers : scorer, or scorers and files by name.
    limits, runtime : see `ServedScorer`.

    Attributes
    ----------
    watched : bool
        Whether there are files.
    reloads : Counter
        Number of reloads by name and result, ``"loaded"`` or ``"failed"``.

    Raises
    ------
    ValueError
        There is no scorer, a name cannot be a part of an address, or a scorer is not as `ServedScorer` needs it.
    """

    def __init__(
        self, scorers: Scorer | Mapping[str, Scorer | ScorerFile], limits: Limits, runtime: Runtime | None
    ) -> None:
        named = scorers if isinstance(scorers, Mapping) else {_ALONE: scorers}
        if not named:
            raise ValueError("there is no scorer: pass at least one")
        for name in named:
            if not name or not name.isprintable() or "/" in name or name in (".", ".."):
                raise ValueError(
                    f"{name!r} cannot be the name of a scorer, which is a part of its address: choose another"
                )
        self._limits = limits
        self._runtime = runtime
        self._files = {name: file for name, file in named.items() if isinstance(file, ScorerFile)}
        self.reloads: Counter[tuple[str, str]] = Counter()
        self.watched = bool(self._files)
        self._served = {
            name: self._serve(name, scorer.load() if isinstance(scorer, ScorerFile) else scorer)
            for name, scorer in named.items()
        }

    def __getitem__(self, name: str) -> ServedScorer:
        return self._served[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._served)

    def __len__(self) -> int:
        return len(self._served)

    def reload(self) -> None:
        """Replace the scorers whose files need it. If a file cannot be used, log why, and keep its scorer."""
        for name, file in self._files.items():
            if not file.needs_reload():
                continue
            began = time.perf_counter()
            fields = {"scorer": name, "file": str(file.path)}
            try:
                scorer = self._serve(name, file.reload())
                scorer.warm_up()
                scorer.warm_up_explanations()
            except Exception as error:
                self.reloads[name, "failed"] += 1
                log.error(
                    "the scorer's file cannot be used, and its previous scorer stays",
                    exc_info=not isinstance(error, ValueError),
                    extra={"fields": {**fields, "error": first_line(error)}},
                )
            else:
                if scorer.description.digest == self._served[name].description.digest:
                    scorer.seen = self._served[name].seen
                self._served[name] = scorer
                self.reloads[name, "loaded"] += 1
                seconds = round(time.perf_counter() - began, 1)
                fields["digest"] = scorer.description.digest
                log.info("scorer loaded again", extra={"fields": {**fields, "seconds": seconds}})

    def _serve(self, name: str, scorer: Scorer) -> ServedScorer:
        return ServedScorer(name, scorer, self._limits, self._runtime)
