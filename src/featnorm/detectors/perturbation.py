"""Detectors that ask the model again about a changed input."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featnorm._utils.checks import choice, real, several, table
from featnorm.detectors.base import Detector, check_detector
from featnorm.features import Features


class ODIN(Detector):
    """Maximum softmax probability at a high temperature, after a step that raises it (Liang et al., ICLR 2018).

    ``x' = x - (eps / std) sign(grad_x CE(f(x) / T, argmax f(x)))``, then ``max softmax(f(x') / T)``. It reads the
    inputs themselves, through the model that the features came from (`FeatureTap`, `Scorer`): one pass forward and
    back, and one more forward.

    Parameters
    ----------
    temperature : T; 1000 in the source.
    eps : the step, in units of a pixel between 0 and 1; 0.0014 in the source.
    std
        Deviation of each channel by which the model's inputs were divided; None for inputs that were not.

    Raises
    ------
    ValueError
        ``temperature`` or a deviation is not positive, ``eps`` is negative, the features came without their
        inputs, or the deviations are not one a channel.
    """

    reads = ("logits",)
    settings = table(
        temperature=real(0, math.inf),
        eps=real(0, math.inf, closed="left"),
        std=several(real(0, math.inf)) | choice(None),
    )
    temperature: float
    eps: float
    std: tuple[float, ...] | None
    _asks_again = True

    def __init__(self, temperature: float = 1000, eps: float = 0.0014, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self._set(temperature=temperature, eps=eps, std=std)

    def _score(self, features: Features) -> Tensor:
        source = features.source_of(self)
        inputs = source.inputs

        def loss(again: Features) -> Tensor:
            logits = again.tensor("logits").float() / self.temperature
            return torch.nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")

        step = self.eps * source.gradient(loss).sign()
        if self.std is not None:
            if inputs.ndim < 3 or inputs.shape[1] != len(self.std):
                raise ValueError(
                    f"{self!r} has {len(self.std)} deviations, one a channel, and the inputs are of shape "
                    f"{tuple(inputs.shape)}"
                )
            shape = (1, -1, *(1 for _ in inputs.shape[2:]))
            step = step / torch.tensor(self.std, device=step.device, dtype=step.dtype).reshape(shape)
        logits = source.features(inputs - step).tensor("logits").double()
        # Near 1 / C the probabilities differ by less than float32 tells apart at this temperature.
        return (logits / self.temperature).softmax(1).amax(1)


class Views(Detector):
    """The score of a detector averaged over an input and its eight translations (paper C.1, after CSI).

    The paper aggregates NAN over nine views for models trained without labels. It does not give the distance:
    here it is an eighth of the image, 4 pixels of 32, along each axis and both; what moves in is mirrored.

    Parameters
    ----------
    detector : any detector; what it learns, it learns from inputs as they are.
    shift : the distance as a share of the image's height and width, between 0 and 1.

    Raises
    ------
    ValueError
        ``shift`` is out of range, the features came without their inputs, or these are not images
        (n, channels, height, width).
    """

    settings = table(shift=real(0, 1))
    shift: float
    _asks_again = True

    def __init__(self, detector: Detector, shift: float = 0.125) -> None:
        check_detector(detector, "Views")
        super().__init__()
        self._set(shift=shift)
        self.detector = detector
        self.role = detector.role
        self.reads = detector.reads
        self.learns = detector.learns

    @property
    def is_fitted(self) -> bool:
        """Whether the inner detector is fitted."""
        return self.detector.is_fitted

    def _check_fit(self, features: Features) -> None:
        self.detector._check_fit(features)

    def _partial_fit(self, features: Features) -> None:
        self.detector._partial_fit(features)

    def _score(self, features: Features) -> Tensor:
        source = features.source_of(self)
        images = source.inputs
        if images.ndim != 4:
            raise ValueError(
                f"{self!r} moves images (n, c, h, w), and the inputs are of shape {tuple(images.shape)}"
            )
        height, width = images.shape[2:]
        dy, dx = max(1, round(self.shift * height)), max(1, round(self.shift * width))
        if dy >= height or dx >= width:
            raise ValueError(f"{self!r} cannot move images of {height} x {width} pixels by {dy} and {dx}")
        padded = torch.nn.functional.pad(images, (dx, dx, dy, dy), mode="reflect")
        total = self.detector.score(features)
        for top in (0, dy, 2 * dy):
            for left in (0, dx, 2 * dx):
                if (top, left) != (dy, dx):
                    view = padded[:, :, top : top + height, left : left + width]
                    total = total + self.detector.score(source.features(view))
        return total / 9
