"""Detectors that run the model again on changed inputs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from featnorm._utils.checks import Choice, Interval, SequenceOf, table
from featnorm.detectors.base import Detector, Wrapper
from featnorm.features import Features


class ODIN(Detector):
    """Maximum softmax probability at a high temperature, after a step that raises it (Liang et al., ICLR 2018).

    ``x' = x - (eps / std) sign(grad_x CE(f(x) / T, argmax f(x)))``, then ``max softmax(f(x') / T)``. It needs the
    inputs and the model that made the features, as `FeatureTap` and `Scorer` keep them: one forward and backward
    pass, and one more forward pass.

    Parameters
    ----------
    temperature : T; 1000 in the source.
    eps : size of the step, in units of a pixel between 0 and 1; 0.0014 in the source.
    std : standard deviation of each channel by which the model's inputs were divided. Default: None, undivided.

    Raises
    ------
    ValueError
        ``temperature`` or a deviation is not positive, ``eps`` is negative, the features came without their
        inputs, or there is not one deviation per channel.

    Examples
    --------
    >>> Scorer(model, ODIN())(images).score.shape
    torch.Size([8])
    """

    reads = ("logits",)
    needs_model = True
    source = "Liang et al., ICLR 2018"
    formula = (
        r"\max_k \operatorname{softmax}(f(x') / T)_k, \quad x' = x - \varepsilon \operatorname{sign} "
        r"\nabla_x \operatorname{CE}(f(x) / T, y)"
    )
    cost = "2 forward passes and 1 backward pass"
    standard = ("ODIN()",)
    settings = table(
        temperature=Interval(0, math.inf),
        eps=Interval(0, math.inf, closed="left"),
        std=SequenceOf(Interval(0, math.inf)) | Choice(None),
    )
    temperature: float
    eps: float
    std: tuple[float, ...] | None

    def __init__(self, temperature: float = 1000, eps: float = 0.0014, std: Sequence[float] | None = None) -> None:
        super().__init__()
        self._set(temperature=temperature, eps=eps, std=std)

    def _score(self, features: Features) -> Tensor:
        call = features.require_call(self)
        inputs = call.inputs

        def loss(again: Features) -> Tensor:
            logits = again.tensor("logits").float() / self.temperature
            return torch.nn.functional.cross_entropy(logits, logits.argmax(1), reduction="sum")

        step = self.eps * call.gradient(loss).sign()
        if self.std is not None:
            if inputs.ndim < 3 or inputs.shape[1] != len(self.std):
                raise ValueError(
                    f"{self!r} has {len(self.std)} deviations, one per channel, and the inputs have shape "
                    f"{tuple(inputs.shape)}"
                )
            shape = (1, -1, *(1 for _ in inputs.shape[2:]))
            step = step / torch.tensor(self.std, device=step.device, dtype=step.dtype).reshape(shape)
        logits = call.features(inputs - step).tensor("logits").double()
        # At high temperatures the probabilities are so near 1 / C that float32 cannot tell them apart.
        return (logits / self.temperature).softmax(1).amax(1)


class Views(Wrapper):
    """The score of a detector averaged over an input and its eight translations (paper C.1, after CSI).

    The paper aggregates NAN over nine views for models that are trained without labels. It does not state the
    distance: here it is an eighth of the image, 4 pixels of 32, along each axis and along both; the border is
    filled by reflection.

    Parameters
    ----------
    detector : any detector; it is fitted to untranslated inputs.
    shift : distance as a share of the image's height and width, between 0 and 1.

    Raises
    ------
    ValueError
        ``shift`` is out of range, the features came without their inputs, or the inputs are not images
        (n, channels, height, width).

    Examples
    --------
    >>> Scorer(model, Views(NAN()))(images).score.shape
    torch.Size([8])
    """

    needs_model = True
    source = "Park et al., ICCV 2023, C.1"
    formula = r"\frac{1}{9} \sum_{v} s(x_v)"
    cost = "8 forward passes and 9 times that of the detector"
    standard = ("Views(NAN())",)
    settings = table(shift=Interval(0, 1))
    detector: Detector
    shift: float

    def __init__(self, detector: Detector, shift: float = 0.125) -> None:
        super().__init__()
        self._wrap(detector=detector)
        self._set(shift=shift)
        self.role = detector.role

    def _score(self, features: Features) -> Tensor:
        call = features.require_call(self)
        images = call.inputs
        if images.ndim != 4:
            raise ValueError(
                f"{self!r} moves images (n, c, h, w), and the inputs have shape {tuple(images.shape)}"
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
                    total = total + self.detector.score(call.features(view))
        return total / 9
