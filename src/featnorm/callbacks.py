"""What the callbacks of training frameworks share: a scorer of the model as it is, and what it measures."""

import copy
import math
import random
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from featnorm._utils.checks import min_scores, threshold_rank
from featnorm._utils.errors import NotFiniteError
from featnorm.drift import DriftMonitor
from featnorm.metrics import auroc, fpr_at_tpr
from featnorm.scorer import Scorer
from featnorm.tap.batch import map_tensors
from featnorm.tap.tap import check_loader

_RESERVED = ("mean", "drift")
_OF_SETS = ("auroc", "fpr95", "flagged")
_OF_DRIFT = ("log10_evidence", "alarm", "flagged")


class TrainingScorer:
    """Fits, calibrates and measures a scorer of a model that is being trained.

    This does not affect the training. The model's mode, weights and gradients are left as they were, and so are
    the iterators of loaders, the generators of their samplers, and the global random generators of Python, NumPy
    and PyTorch (of the CPU and of CUDA). If the features or scores are not finite, because the training has
    diverged, the measures are NaN and no scorer is written, with a warning.

    Floating-point inputs are converted to the precision of the model's weights. Every process of a distributed
    training runs all batches.

    Parameters
    ----------
    make_scorer
        Function from the model to an unfitted `Scorer`, such as ``lambda model: fn.Scorer(model, fn.NAN())``.
    calibration
        Loader of in-distribution inputs that the model is not trained on; 19 are needed at ``tpr=0.95``, and 99 at
        0.99.
    ood
        Loaders of OOD inputs by the names of their sets. They measure, and neither fit nor calibrate.
    train
        Loader of training inputs, for a detector that needs a fit; with labels if it needs them.
    drift
        Loader of inputs that may have drifted from the calibration inputs, such as the most recent ones, in the
        order of time; see `featnorm.DriftMonitor` for what it assumes.
    tpr : share of in-distribution inputs to accept, between 0 and 1.

    Raises
    ------
    TypeError
        A loader is not an iterable of batches, or is an iterator, which yields its batches once.
    ValueError
        A loader is empty, or an OOD set has one of the names "mean" and "drift".
    """

    path: Path | None = None

    def __init__(
        self,
        make_scorer: Callable[[Any], Scorer],
        *,
        calibration: Iterable[Any],
        ood: Mapping[str, Iterable[Any]] | None = None,
        train: Iterable[Any] | None = None,
        drift: Iterable[Any] | None = None,
        tpr: float = 0.95,
    ) -> None:
        super().__init__()
        self.make_scorer = make_scorer
        self.calibration, self.ood, self.train, self.drift = calibration, dict(ood or {}), train, drift
        self.tpr = tpr
        for name in set(_RESERVED) & self.ood.keys():
            raise ValueError(f"ood: {name!r} is the name of other values: give this set another name")
        named = {"calibration": calibration, "train": train, "drift": drift}
        named |= {f"ood[{name!r}]": loader for name, loader in self.ood.items()}
        self._loaders = {name: loader for name, loader in named.items() if loader is not None}
        for name, loader in self._loaders.items():
            _check(loader, name)

    def check(self, model: nn.Module) -> None:
        """Raise an error before the training for what would fail after its first epoch.

        The first batch of each loader is read, and of ``calibration`` as many as ``tpr`` needs.

        Raises
        ------
        TypeError
            A loader yields its batches only once.
        ValueError
            The detector does not work on the model or on these inputs, lacks ``train`` or labels, or a loader
            yields too few inputs.
        """
        scorer = self.make_scorer(model)
        if scorer.detector.needs_fit and self.train is None:
            raise ValueError(f"{scorer.detector!r} needs a fit: pass train=, a loader of training inputs")
        if scorer.thresholds_by not in (None, "class"):
            raise ValueError(
                f"thresholds_by={scorer.thresholds_by!r} needs the group of each input, which loaders do not "
                "yield: omit it, or use 'class'"
            )
        needed = min_scores(self.tpr)
        with _as_found(self._loaders.values()):
            for name, loader in self._loaders.items():
                if not isinstance(loader, DataLoader) and iter(loader) is iter(loader):
                    raise TypeError(f"{name} yields its batches once: pass a DataLoader or a list")
                count = 0
                with _batches(loader, name, scorer) as batches:
                    for features in scorer.tap.stream(batches, progress=False):
                        if not scorer.detector.needs_fit:
                            scorer.detector.score(features)
                        elif name == "train":
                            scorer.detector._check_fit(features)
                        count += len(features) if features.parts is None else features.parts.count
                        if name != "calibration" or count >= needed:
                            break
                    else:
                        threshold_rank(count, self.tpr)

    def fitted(self, model: nn.Module) -> Scorer:
        """Return a scorer of the model as it is, fitted and calibrated."""
        with _as_found(self._loaders.values()):
            return self._fitted(model)

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Return what a scorer of the model as it is measures, by names such as "svhn/auroc"."""
        try:
            with _as_found(self._loaders.values()):
                return self._measured(self._fitted(model))
        except NotFiniteError as error:
            warn_of("the OOD measures are NaN", error)
        sets = [*self.ood, "mean"] if len(self.ood) > 1 else [*self.ood]
        names = [f"{name}/{measure}" for name in sets for measure in _OF_SETS]
        names += [f"drift/{measure}" for measure in _OF_DRIFT if self.drift is not None]
        return dict.fromkeys(names, math.nan)

    def _measured(self, scorer: Scorer) -> dict[str, float]:
        values: dict[str, float] = {}
        assert scorer.item_calibration is not None
        id_scores = scorer.item_calibration.scores
        for name, loader in self.ood.items():
            scores, flagged = _scores(scorer, loader, f"ood[{name!r}]")
            of_set = (auroc(id_scores, scores), fpr_at_tpr(id_scores, scores), flagged)
            values |= {f"{name}/{measure}": value for measure, value in zip(_OF_SETS, of_set, strict=True)}
        if len(self.ood) > 1:
            for measure in _OF_SETS:
                values[f"mean/{measure}"] = fmean(values[f"{name}/{measure}"] for name in self.ood)
        if self.drift is not None:
            scores, flagged = _scores(scorer, self.drift, "drift")
            monitor = DriftMonitor(id_scores)
            monitor.update(scores)
            of_drift = (monitor.highest, float(monitor.alarmed_at is not None), flagged)
            values |= {f"drift/{measure}": value for measure, value in zip(_OF_DRIFT, of_drift, strict=True)}
        return values

    def save(self, model: nn.Module, path: Path, *, write: bool) -> None:
        """Fit and calibrate a scorer of the model, and write it to a file in the process that writes."""
        try:
            scorer = self.fitted(model)
        except NotFiniteError as error:
            warn_of(f"{path.name} is not written", error)
            return
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            scorer.save(path)
        self.path = path

    def _fitted(self, model: nn.Module) -> Scorer:
        scorer = self.make_scorer(model)
        if self.train is not None:
            with _batches(self.train, "train", scorer) as batches:
                scorer.fit(batches, progress=False)
        with _batches(self.calibration, "calibration", scorer) as batches:
            return scorer.calibrate(batches, self.tpr, progress=False)


def _check(loader: Iterable[Any], name: str) -> None:
    """Raise an error before the training, and not after its first epoch, if a loader cannot be used."""
    try:
        check_loader(loader)
    except TypeError as error:
        raise TypeError(f"{name}: {error}") from None
    if hasattr(loader, "__next__"):
        raise TypeError(f"{name} is an iterator, which yields its batches once: pass a DataLoader or a list")
    length = None
    with suppress(TypeError):  # a DataLoader of a stream has no length
        length = len(loader)  # type: ignore[arg-type]
    if length == 0:
        raise ValueError(f"{name} is empty: pass a loader of at least one batch")


def warn_of(what: str, error: Exception) -> None:
    """Warn of an error that comes from the values of the model, which must not end a training."""
    warnings.warn(" ".join([f"{what}: {error}", *getattr(error, "__notes__", ())]), stacklevel=3)


@contextmanager
def _as_found(loaders: Iterable[Any]) -> Iterator[None]:
    """Run a block outside of inference mode, and restore the generators from which loaders draw random numbers."""
    generators = list(chain.from_iterable(map(_generators, loaders)))
    of_torch = [generator.get_state() for generator in generators]
    # Transforms of users draw from numpy's global generator.
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else ()
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for generator, state in zip(generators, of_torch, strict=True):
            generator.set_state(state)


def _generators(place: Any) -> Iterator[torch.Generator]:
    """Yield the generators of a loader, of its samplers, and of the samplers within these."""
    if isinstance(generator := getattr(place, "generator", None), torch.Generator):
        yield generator
    for name in ("sampler", "batch_sampler"):
        if (inner := getattr(place, name, None)) is not None:
            yield from _generators(inner)


@contextmanager
def _batches(loader: Iterable[Any], name: str, scorer: Scorer) -> Iterator["_Batches"]:
    """Provide the batches of a loader, whose name is added to errors.

    A `DataLoader` with persistent workers has one iterator, which each loop starts again: the trainer's own loop
    over it would end. A copy has another one.
    """
    batches: Any = loader
    if isinstance(loader, DataLoader):
        batches = copy.copy(loader)
        batches._iterator = None
    try:
        yield _Batches(batches, scorer.tap.model)
    except Exception as error:
        error.add_note(f"(in {name})")
        raise


class _Batches:
    """Batches of a loader, whose floating-point tensors have the precision of a model's weights."""

    def __init__(self, loader: Iterable[Any], model: nn.Module) -> None:
        self.loader = loader
        dtypes = {parameter.dtype for parameter in model.parameters() if parameter.is_floating_point()}
        # A model in several precisions converts its inputs itself.
        self._dtype = dtypes.pop() if len(dtypes) == 1 else None

    def __iter__(self) -> Iterator[Any]:
        for batch in self.loader:
            yield map_tensors(batch, self._converted, lambda value: value)

    def _converted(self, value: Tensor) -> Tensor:
        return value.to(self._dtype) if self._dtype is not None and value.is_floating_point() else value


def _scores(scorer: Scorer, loader: Iterable[Any], name: str) -> tuple[Tensor, float]:
    """Return the scores of a loader's inputs, and the share of them that is flagged."""
    scores, are_id = [], []
    with _batches(loader, name, scorer) as batches:
        for features in scorer.tap.stream(batches, progress=False):
            verdict = scorer.predict_features(features)
            verdict = verdict.units or verdict
            assert verdict.is_id is not None
            scores.append(verdict.score)
            are_id.append(verdict.is_id)
    return torch.cat(scores), 1 - float(torch.cat(are_id).double().mean())
