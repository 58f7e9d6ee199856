"""`Scorer`: a model, a tap, a detector and a calibration in one module."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from featnorm import archive
from featnorm._utils.checks import check_share
from featnorm.calibration import Calibration
from featnorm.detectors import Detector, parse_detector
from featnorm.detectors.base import check_detector
from featnorm.detectors.expression import UnknownDetectorError
from featnorm.features import Features
from featnorm.tap import FeatureTap
from featnorm.tap.tap import check_loader


class Verdict(NamedTuple):
    """Predictions of a `Scorer` for n inputs."""

    score: Tensor  # (n,), higher is more in-distribution
    p_value: Tensor | None  # (n,) conformal p-value, small for OOD; None before calibration
    is_id: Tensor | None  # (n,) whether score >= threshold; None before calibration
    logits: Tensor | None  # (n, C); None for a model without a classifier


class Scorer(nn.Module):
    """Scores how in-distribution each input of a model is, and decides whether it is ID or OOD.

    Scoring always runs in evaluation mode and without gradients, and restores the model's mode. Several threads
    may score at the same time, but the model must not be trained meanwhile.

    Parameters
    ----------
    model : user's model, on any device.
    detector : detector, which is moved to the model's device.
    layer : module whose output is the last hidden layer. Default: found by `FeatureTap`.

    Raises
    ------
    TypeError
        The model is not a `torch.nn.Module`, or the detector is not a `Detector`.

    Examples
    --------
    >>> scorer = Scorer(model, NAN()).fit(train_loader).calibrate(held_out_loader, tpr=0.95)
    >>> verdict = scorer(images)
    >>> verdict.is_id
    """

    def __init__(self, model: nn.Module, detector: Detector, layer: str | nn.Module | None = None) -> None:
        super().__init__()
        check_detector(detector, "Scorer")
        self.model = model
        self.tap = FeatureTap(model, layer)
        parameter = next(model.parameters(), None)
        self.detector = detector if parameter is None else detector.to(parameter.device)
        self.calibration: Calibration | None = None

    def fit(self, loader: Iterable[Any], *, progress: bool | None = None) -> Self:
        """Fit the detector to in-distribution inputs, in one pass and without keeping their features in memory.

        For a detector that needs no fit, only the first batch is read, to check that the detector works on this
        model. A fit drops an earlier calibration.

        Parameters
        ----------
        loader : iterable of inputs and, for detectors that need them, labels; see `FeatureTap.stream`.
        progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        ValueError
            The model has no layer that the detector reads, an input or a label is invalid, or the loader is empty.
            An earlier fit is then kept.
        TypeError
            The loader is not an iterable of batches, or the inputs are not tensors.
        """
        check_loader(loader)
        if not self.detector.needs_fit:
            if iter(loader) is loader:
                return self  # an iterator yields each batch once, and calibration needs them all
            for features in self.tap.stream(loader, progress=False):
                self.detector.score(features)
                break
            return self
        return self.fit_features(self.tap.stream(loader, progress=progress))

    def fit_features(self, batches: Iterable[Features]) -> Self:
        """Fit the detector to features of in-distribution inputs, in one pass.

        Parameters
        ----------
        batches : features as `tap` extracts them, with labels for detectors that need them.

        Raises
        ------
        ValueError
            The features lack what the detector reads, or are not finite; an earlier fit is then kept.
        """
        with self.detector.refit():
            for features in batches:
                self.detector.partial_fit(features)
        if self.detector.needs_fit:
            self.calibration = None
        return self

    def calibrate(self, loader: Iterable[Any], tpr: float = 0.95, *, progress: bool | None = None) -> Self:
        """Set the threshold that accepts a share of in-distribution inputs, and keep their scores for p-values.

        Parameters
        ----------
        loader : in-distribution inputs that were used neither to train the model nor to fit the detector.
        tpr : share of in-distribution inputs to accept, between 0 and 1.
        progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.

        Raises
        ------
        ValueError
            There are too few inputs for the share (19 are needed at 0.95, 99 at 0.99), or an input cannot be
            scored.
        """
        check_share(tpr, "tpr")
        return self.calibrate_features(self.tap.stream(loader, progress=progress), tpr)

    def calibrate_features(self, batches: Iterable[Features], tpr: float = 0.95) -> Self:
        """Calibrate as `calibrate` does, on features of in-distribution inputs.

        Parameters
        ----------
        batches : features as `tap` extracts them.
        tpr : share of in-distribution inputs to accept, between 0 and 1.

        Raises
        ------
        ValueError
            As `calibrate`.
        """
        check_share(tpr, "tpr")
        scores = torch.cat([self.detector.score(features) for features in batches])
        self.calibration = Calibration(scores, tpr).to(scores.device)
        return self

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Verdict:
        """Score a batch of inputs.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        ValueError
            The model has no layer that the detector reads, or one of its outputs is not finite.
        """
        return self.predict_features(self.tap.capture(inputs, classifier="classifier" in self.detector.reads))

    @torch.no_grad()
    def predict_features(self, features: Features) -> Verdict:
        """Score inputs by their features.

        Parameters
        ----------
        features : features as `tap` extracts them, with the classifier if the detector reads it.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        ValueError
            The features lack what the detector reads.
        """
        score = self.detector.score(features)
        if self.calibration is None:
            return Verdict(score, None, None, features.logits)
        return Verdict(score, *self.calibration.predict(score), features.logits)

    def get_extra_state(self) -> dict[str, float | None]:
        """Return the share to accept, which is not in a buffer, for `state_dict`."""
        return {"tpr": None if self.calibration is None else self.calibration.tpr}

    def set_extra_state(self, state: dict[str, float | None]) -> None:
        """Accept what `get_extra_state` returned; the calibration is made when its scores are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        scores, extra = state_dict.get(f"{prefix}calibration.scores"), state_dict.get(f"{prefix}_extra_state")
        if scores is not None and extra is not None and extra["tpr"] is not None:
            self.calibration = Calibration(scores, extra["tpr"]).to(self.tap.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write detector, calibration and tap to one file: safetensors with a JSON header, no pickle.

        The file holds the model's fingerprint, but not the model.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        OSError
            The file cannot be written. An earlier file of that name is kept.
        """
        archive.write(path, self.fitted_tensors(), self.to_dict())

    def fitted_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the fit, by name: those of detector and calibration, without the model's.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        """
        self.detector.require_fitted()
        tensors = {f"detector.{name}": value for name, value in self.detector.state_dict().items()}
        if self.calibration is not None:
            tensors[archive.CALIBRATION] = self.calibration.scores
        return tensors

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain data: detector, share to accept, tap, model fingerprint."""
        return {
            "detector": _expression(self.detector),
            "tpr": None if self.calibration is None else self.calibration.tpr,
            "tap": self.tap.to_dict(),
            "model": archive.fingerprint(self.tap.model),
        }

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """Read a scorer that `save` wrote, for the same model. No code in the file is run.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        ArchiveError
            The file is damaged, has a later format, or was made for another model.
        """
        tensors, header = archive.read(path)
        if "images" in header:
            raise archive.ArchiveError(f"{path} contains its model: load it with featnorm.ImageScorer.load(path)")
        return cls.from_dict(header, tensors, model, path)

    @classmethod
    def from_dict(
        cls, header: Mapping[str, Any], tensors: Mapping[str, Tensor], model: nn.Module, path: str | Path
    ) -> Self:
        """Make a scorer from the results of `to_dict` and `fitted_tensors`.

        Parameters
        ----------
        header, tensors : plain data and tensors.
        model : model that the scorer was made for.
        path : file that they were read from, for errors.

        Raises
        ------
        ArchiveError
            See `load`.
        """
        try:
            detector = parse_detector(header["detector"])
            # Everything but the calibration must be the detector's.
            state = {
                name.removeprefix("detector."): value
                for name, value in tensors.items()
                if name != archive.CALIBRATION
            }
            detector.load_state_dict(state)
            detector.validate()
            scorer = cls(model, detector)
            archive.check_fingerprint(scorer.tap.model, header["model"], path)
            scorer.tap = FeatureTap.from_dict(model, header["tap"])
            scorer.tap.require(detector.reads)
            calibration = archive.calibration(tensors, header, path)
            if calibration is not None:
                scorer.calibration = calibration.to(scorer.tap.device)
        except archive.ArchiveError:
            raise
        except UnknownDetectorError as error:
            raise archive.ArchiveError(
                f"{path} needs the detector class {error.name}, which is not defined here: import the module that "
                "defines it, then load the file again"
            ) from None
        except archive.MALFORMED as error:
            raise archive.damaged(path, error) from None
        return scorer


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
