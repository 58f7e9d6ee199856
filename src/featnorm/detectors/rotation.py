"""Detectors that rotate an input, for models that are trained to predict the rotation."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import Integer, Interval, table
from featnorm.augmentation import Distortion, distort, rotations
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Bank, single_unit_rows
from featnorm.features import Features

_ROTATIONS = 4
# Training inputs per matrix product in CSI's score.
_COMPARED = 8192


class RotNet(Detector):
    """Confidence of a model in the rotation of an input (Hendrycks et al., NeurIPS 2019).

    ``1/4 sum_r softmax(f(x rotated by r))_r`` over 0, 90, 180 and 270 degrees, for a model that is trained to
    predict the rotation (Gidaris et al., ICLR 2018; the objective "rotnet"). It runs the model on the three
    rotated inputs.

    Raises
    ------
    ValueError
        The model does not return four logits, the features came without their inputs, or the inputs are not square
        images (n, channels, height, height).

    Examples
    --------
    >>> rotations = torch.nn.Sequential(model[:4], torch.nn.Linear(16, 4))  # trained to predict the rotation
    >>> Scorer(rotations, RotNet())(images).score.shape
    torch.Size([8])
    """

    reads = ("logits",)
    needs_model = True
    source = "Hendrycks et al., NeurIPS 2019"
    formula = r"\frac{1}{4} \sum_r \operatorname{softmax}(f(x_r))_r"
    cost = "3 forward passes"
    network = "trained to predict rotations (objective rotnet)"

    def _score(self, features: Features) -> Tensor:
        _require_rotation_logits(self, features)
        call = features.require_call(self)
        total = torch.zeros(len(features), dtype=torch.float64, device=features.tensor("logits").device)
        for rotation, images in enumerate(rotations(call.inputs)):
            # The features of the unrotated input are known.
            rotated = call.features(images) if rotation else features
            total += rotated.tensor("logits").double().softmax(1)[:, rotation]
        return total / _ROTATIONS


class _Axes(NamedTuple):
    """What CSI's score needs of the training inputs, per rotation."""

    axes: Tensor  # (4, n, e) float32, of unit length
    similarity_weight: Tensor  # (4,) lambda
    logit_weight: Tensor  # (4,) omega


class CSI(Detector):
    """Similarity to a training input, and the logit of the rotation, over rotations (Tack et al., NeurIPS 2020).

    ``1/4 sum_r [lambda_r max_m <z_r(x), z_r(x_m) / ||z_r(x_m)||> + omega_r f_r(x)]`` for a model with an embedding
    z and logits f of the four rotations (the objective "csi"). ``z_r`` and ``f_r``, the r-th logit, are those of
    the input rotated by r, each a mean over augmented views: a random flip before the rotation, then a crop of a
    given share of the area, color jitter and grayscale. ``lambda_r`` is 1 over the mean of ``||z_r||`` over the
    training inputs, ``omega_r`` is 1 over the mean of ``f_r``. The source draws new views for every input; here
    all inputs have the same views, so that a score does not depend on the rest of its batch.

    Fitting and scoring run the model on four rotations of each view.

    Parameters
    ----------
    augmentations : number of views of each rotation; 10 in the source.
    scale : area of the crops as a share of the image's area; 0.54 in the source.

    Raises
    ------
    ValueError
        A setting is out of its range; the model does not return four logits; the features came without their
        inputs, or the inputs are not square color images between 0 and 1; the model does not predict the
        rotations: the mean logit of one is not positive over the training inputs.

    Examples
    --------
    >>> CSI(augmentations=5)
    CSI(augmentations=5)
    """

    reads = ("embedding", "logits")
    learns = ("embedding", "logits")
    needs_model = True
    source = "Tack et al., NeurIPS 2020"
    formula = (
        r"\frac{1}{4} \sum_r \left[ \lambda_r \max_m \left\langle z_r(x), \frac{z_r(x_m)}{\lVert "
        r"z_r(x_m) \rVert} \right\rangle + \omega_r f_r(x) \right]"
    )
    cost = "40 forward passes and O(n e)"
    network = "trained to predict rotations (objective csi)"
    settings = table(augmentations=Integer(1), scale=Interval(0, 1, closed="right"))
    augmentations: int
    scale: float

    def __init__(self, augmentations: int = 10, scale: float = 0.54) -> None:
        super().__init__()
        self._set(augmentations=augmentations, scale=scale)
        self.bank = Bank()  # of z_0 to z_3 and f_0 to f_3, concatenated

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        _require_rotation_logits(self, features)
        self._require_colors(features.require_call(self).inputs)

    def _partial_fit(self, features: Features) -> None:
        if len(features):
            embeddings, logits = self._rotated_outputs(features)
            self.bank.update(torch.cat([embeddings.flatten(1), logits], 1))

    def _finalize(self) -> _Axes:
        rows = self.bank.rows
        embeddings, logits = rows[:, :-_ROTATIONS].unflatten(1, (_ROTATIONS, -1)), rows[:, -_ROTATIONS:].double()
        means = logits.mean(0)
        if not (means > 0).all():
            raise ValueError(
                f"{self!r} needs a model that predicts rotations, and the mean logit of "
                f"{90 * int((means <= 0).nonzero()[0])} degrees over the training inputs is not positive"
            )
        lengths = torch.linalg.vector_norm(embeddings.double(), dim=2).mean(0)
        axes = torch.stack([single_unit_rows(embeddings[:, rotation]) for rotation in range(_ROTATIONS)])
        return _Axes(axes, 1 / lengths, 1 / means)

    def _score(self, features: Features) -> Tensor:
        _require_rotation_logits(self, features)
        width = _ROTATIONS * features.tensor("embedding").shape[1]
        if width + _ROTATIONS != self.bank.width:
            own, got = (self.bank.width - _ROTATIONS) // _ROTATIONS, width // _ROTATIONS
            raise ValueError(f"{self!r} was fitted to `embedding` of width {own}, got width {got}")
        self._require_colors(features.require_call(self).inputs)
        if len(features) == 0:
            return features.tensor("logits").new_empty(0)
        fitted: _Axes = self._fitted_state()
        embeddings, logits = self._rotated_outputs(features)
        total = logits.double() @ fitted.logit_weight.to(logits.device)
        for rotation in range(_ROTATIONS):
            z = embeddings[:, rotation]
            near = [(z @ axes.T.to(z)).amax(1) for axes in fitted.axes[rotation].split(_COMPARED)]
            total += fitted.similarity_weight[rotation] * torch.stack(near).amax(0).double()
        return total / _ROTATIONS

    def _rotated_outputs(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return the embeddings (n, 4, e) and logits (n, 4) of the rotations, float32 means over the views."""
        call = features.require_call(self)
        embeddings, logits = [], []
        for rotation, views in enumerate(zip(*self._views(call.inputs), strict=True)):
            outputs = [call.features(view) for view in views]
            embeddings.append(torch.stack([output.tensor("embedding").float() for output in outputs]).mean(0))
            rotated = [output.tensor("logits").float()[:, rotation] for output in outputs]
            logits.append(torch.stack(rotated).mean(0))
        return torch.stack(embeddings, 1), torch.stack(logits, 1)

    def _views(self, images: Tensor) -> Iterator[list[Tensor]]:
        """Yield the views of the four rotations, once per augmentation."""
        height, width = images.shape[2:]
        for augmentation in range(self.augmentations):
            generator = torch.Generator().manual_seed(augmentation)
            views = []
            flipped = images.flip(3) if torch.rand((), generator=generator, dtype=torch.float32) < 0.5 else images
            for rotated in rotations(flipped):
                scale = (self.scale, self.scale)
                drawn = Distortion.draw(1, (height, width), generator, scale=scale, flips=False)
                views.append(distort(rotated, drawn))
            yield views

    def _require_colors(self, images: Tensor) -> None:
        rotations(images[:1])
        if images.shape[1] != 3 or (len(images) and not (images.amin() >= 0 and images.amax() <= 1)):
            raise ValueError(
                f"{self!r} changes the colors of images (n, 3, h, h) between 0 and 1, so the model must take "
                "such images: let Normalize be its first layer"
            )


def _require_rotation_logits(detector: Detector, features: Features) -> None:
    width = features.tensor("logits").shape[1]
    if width != _ROTATIONS:
        raise ValueError(f"{detector!r} reads the logits of 4 rotations, and the model returns {width}")
