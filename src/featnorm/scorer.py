"""`Scorer`: a model, a tap, a detector and a threshold in one module."""

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
    """What a `Scorer` says of n inputs."""

    score: Tensor  # (n,), higher is more in-distribution
    p_value: Tensor | None  # (n,) conformal, small is OOD; None before calibration
    is_id: Tensor | None  # (n,) whether score >= threshold; None before calibration
    logits: Tensor | None  # (n, C); None for a model without a classifier


class Scorer(nn.Module):
    """Says for every input how well the model knows it, and whether it is in-distribution.

    Scoring always runs in evaluation mode and without gradients, whatever mode the model is in, and leaves
    the model as it was. Any number of threads may score; none may train the model meanwhile.

    Parameters
    ----------
    model : the user's model, on any device.
    detector : any detector; it is moved to the model's device.
    layer : the module whose output is the last hidden layer, where `FeatureTap` should not find it itself.

    Raises
    ------
    TypeError
        The model is no `torch.nn.Module`, or the detector no `Detector`.

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
        """Fit the detector to in-distribution inputs, in one pass and without holding their features.

        A detector with nothing to learn looks at the first batch only, to see that it can work on this model.
        A calibration made for an earlier fit is dropped.

        Parameters
        ----------
        loader : yields inputs and, for detectors that learn from them, labels; see `FeatureTap.stream`.
        progress : show a progress bar; None for where there is a terminal.

        Raises
        ------
        ValueError
            The model has no layer that the detector reads, an input or a label is bad, or the loader is
            empty; an earlier fit is then kept.
        TypeError
            The loader is no iterable of batches, or the inputs are not tensors.
        """
        check_loader(loader)
        if not self.detector.needs_fit:
            if iter(loader) is loader:
                return self  # an iterator gives each batch once, and calibration wants them all
            for features in self.tap.stream(loader, progress=False):
                self.detector.score(features)
                break
            return self
        with self.detector.refit():
            for features in self.tap.stream(loader, progress=progress):
                self.detector.partial_fit(features)
        self.calibration = None
        return self

    def calibrate(self, loader: Iterable[Any], tpr: float = 0.95, *, progress: bool | None = None) -> Self:
        """Learn the threshold that keeps a share of in-distribution inputs, and the scores for p-values.

        Parameters
        ----------
        loader : in-distribution inputs that neither trained the model nor fitted the detector.
        tpr : the share of in-distribution inputs to accept, between 0 and 1.
        progress : show a progress bar; None for where there is a terminal.

        Raises
        ------
        ValueError
            There are too few inputs for the share (19 at 0.95, 99 at 0.99), or a score cannot be had.
        """
        check_share(tpr, "tpr")
        scores = [self.detector.score(features) for features in self.tap.stream(loader, progress=progress)]
        joined = torch.cat(scores)
        self.calibration = Calibration(joined, tpr).to(joined.device)
        return self

    @torch.no_grad()
    def forward(self, inputs: Tensor) -> Verdict:
        """Judge a batch of inputs.

        Raises
        ------
        NotFittedError
            The detector learns and has not been fitted.
        ValueError
            The model has no layer that the detector reads, or gives a value that is not finite.
        """
        return self.judge(self.tap.capture(inputs, classifier="classifier" in self.detector.reads))

    @torch.no_grad()
    def judge(self, features: Features) -> Verdict:
        """Judge inputs by what the tap heard of them.

        Parameters
        ----------
        features : with the classifier, where the detector reads it.

        Raises
        ------
        NotFittedError
            The detector learns and has not been fitted.
        ValueError
            The features lack what the detector reads.
        """
        score = self.detector.score(features)
        if self.calibration is None:
            return Verdict(score, None, None, features.logits)
        return Verdict(score, *self.calibration.judge(score), features.logits)

    def get_extra_state(self) -> dict[str, float | None]:
        """Return the share to accept, which is in no buffer, for `state_dict`."""
        return {"tpr": None if self.calibration is None else self.calibration.tpr}

    def set_extra_state(self, state: dict[str, float | None]) -> None:
        """Take what `get_extra_state` gave; the calibration itself is made when its scores are loaded."""

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any) -> None:
        scores, extra = state_dict.get(f"{prefix}calibration.scores"), state_dict.get(f"{prefix}_extra_state")
        if scores is not None and extra is not None and extra["tpr"] is not None:
            self.calibration = Calibration(scores, extra["tpr"]).to(self.tap.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def save(self, path: str | Path) -> None:
        """Write detector, calibration and tap to one file: safetensors with a JSON header, no pickle.

        The model is not in it, but its fingerprint is.

        Raises
        ------
        NotFittedError
            The detector learns and has not been fitted.
        OSError
            The file cannot be written; an earlier one of that name stays.
        """
        archive.write(path, *self.content())

    def content(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return tensors and header of the file that `save` writes.

        Raises
        ------
        NotFittedError
            The detector learns and has not been fitted.
        """
        self.detector.require_fitted()
        tensors = {f"detector.{name}": value for name, value in self.detector.state_dict().items()}
        if self.calibration is not None:
            tensors[archive.CALIBRATION] = self.calibration.scores
        header = {
            "detector": _expression(self.detector),
            "tpr": None if self.calibration is None else self.calibration.tpr,
            "tap": self.tap.state(),
            "model": archive.fingerprint(self.tap.model),
        }
        return tensors, header

    @classmethod
    def load(cls, path: str | Path, model: nn.Module) -> Self:
        """Read a scorer that `save` wrote, for the same model. Nothing in the file is ever run.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ArchiveError
            The file is damaged, of a later format, or was made for another model.
        """
        tensors, header = archive.read(path)
        if "images" in header:
            raise archive.ArchiveError(f"{path} holds its model too: read it by featnorm.ImageScorer.load(path)")
        return cls.from_content(tensors, header, model, path)

    @classmethod
    def from_content(
        cls, tensors: Mapping[str, Tensor], header: Mapping[str, Any], model: nn.Module, path: str | Path
    ) -> Self:
        """Make a scorer of what `content` returned, read from a file that errors name; see `load`."""
        try:
            detector = parse_detector(header["detector"])
            # Besides the calibration all is the detector's, or an error.
            state = {
                name.removeprefix("detector."): value
                for name, value in tensors.items()
                if name != archive.CALIBRATION
            }
            detector.load_state_dict(state)
            detector.validate()
            scorer = cls(model, detector)
            archive.check_fingerprint(scorer.tap.model, header["model"], path)
            scorer.tap = FeatureTap.from_state(model, header["tap"])
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
