"""What the callbacks of training frameworks share: a scorer of the model as it is, and what it measures."""

import copy
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from featnorm.drift import DriftMonitor
from featnorm.metrics import auroc, fpr_at_tpr
from featnorm.scorer import Scorer
from featnorm.tap.tap import check_loader

_RESERVED = ("mean", "drift")


class TrainingScorer:
    """Fits, calibrates and measures a scorer of a model that is being trained.

    This does not affect the training: the model's mode, weights and gradients, the random generators
    and the iterators of loaders are left as they were. Every process of a distributed training runs all batches.

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
        """Raise a ValueError before the training if the detector does not work on the model, or needs a fit."""
        scorer = self.make_scorer(model)
        if scorer.detector.needs_fit and self.train is None:
            raise ValueError(f"{scorer.detector!r} needs a fit: pass train=, a loader of training inputs")
        with _as_found(self._loaders.values()), _batches(self.calibration, "calibration") as batches:
            for batch in batches:
                features = scorer.tap(batch)
                if not scorer.detector.needs_fit:
                    scorer.detector.score(features)
                break

    def fitted(self, model: nn.Module) -> Scorer:
        """Return a scorer of the model as it is, fitted and calibrated."""
        with _as_found(self._loaders.values()):
            return self._fitted(model)

    def measured(self, model: nn.Module) -> dict[str, float]:
        """Return what a scorer of the model as it is measures, by names such as "svhn/auroc"."""
        values: dict[str, float] = {}
        with _as_found(self._loaders.values()):
            scorer = self._fitted(model)
            assert scorer.item_calibration is not None
            id_scores = scorer.item_calibration.scores
            for name, loader in self.ood.items():
                scores, flagged = _scores(scorer, loader, f"ood[{name!r}]")
                values[f"{name}/auroc"] = auroc(id_scores, scores)
                values[f"{name}/fpr95"] = fpr_at_tpr(id_scores, scores)
                values[f"{name}/flagged"] = flagged
            if len(self.ood) > 1:
                for measure in ("auroc", "fpr95", "flagged"):
                    values[f"mean/{measure}"] = fmean(values[f"{name}/{measure}"] for name in self.ood)
            if self.drift is not None:
                scores, values["drift/flagged"] = _scores(scorer, self.drift, "drift")
                monitor = DriftMonitor(id_scores)
                monitor.update(scores)
                values["drift/log10_evidence"] = monitor.highest
                values["drift/alarm"] = float(monitor.alarmed_at is not None)
        return values

    def save(self, model: nn.Module, path: Path, *, write: bool) -> None:
        """Fit and calibrate a scorer of the model, and write it to a file in the process that writes."""
        scorer = self.fitted(model)
        if write:
            path.parent.mkdir(parents=True, exist_ok=True)
            scorer.save(path)
        self.path = path

    def _fitted(self, model: nn.Module) -> Scorer:
        scorer = self.make_scorer(model)
        if self.train is not None:
            with _batches(self.train, "train") as batches:
                scorer.fit(batches, progress=False)
        with _batches(self.calibration, "calibration") as batches:
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


@contextmanager
def _as_found(loaders: Iterable[Any]) -> Iterator[None]:
    """Run a block outside of inference mode, and restore the random generators that loaders draw from."""
    places = [place for loader in loaders for place in (loader, getattr(loader, "sampler", None))]
    generators = [generator for place in places if (generator := getattr(place, "generator", None)) is not None]
    of_torch = [generator.get_state() for generator in generators]
    # Transforms of users draw from numpy's global generator.
    of_python, of_numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
    try:
        with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
            yield
    finally:
        random.setstate(of_python)
        np.random.set_state(of_numpy)  # noqa: NPY002
        for generator, state in zip(generators, of_torch, strict=True):
            generator.set_state(state)


@contextmanager
def _batches(loader: Iterable[Any], name: str) -> Iterator[Iterable[Any]]:
    """Provide the batches of a loader, whose name is added to errors.

    A `DataLoader` with persistent workers has one iterator, which each loop starts again: the trainer's own loop
    over it would end. A copy has another one.
    """
    batches: Any = loader
    if isinstance(loader, DataLoader):
        batches = copy.copy(loader)
        batches._iterator = None
    try:
        yield batches
    except Exception as error:
        error.add_note(f"(in {name})")
        raise


def _scores(scorer: Scorer, loader: Iterable[Any], name: str) -> tuple[Tensor, float]:
    """Return the scores of a loader's inputs, and the share of them that is flagged."""
    scores, are_id = [], []
    with _batches(loader, name) as batches:
        for features in scorer.tap.stream(batches, progress=False):
            verdict = scorer.predict_features(features)
            verdict = verdict.units or verdict
            assert verdict.is_id is not None
            scores.append(verdict.score)
            are_id.append(verdict.is_id)
    return torch.cat(scores), 1 - float(torch.cat(are_id).double().mean())
