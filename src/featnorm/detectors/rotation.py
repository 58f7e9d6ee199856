"""Detectors that turn an input, for models that were trained to tell rotations apart."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import real, table, whole
from featnorm.augmentation import Distortion, distort, rotations
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Bank, single_unit_rows
from featnorm.features import Features

_TURNS = 4
# Training inputs that one product of CSI's score compares with.
_COMPARED = 8192


class RotNet(Detector):
    """How surely a model tells how an input is turned (Hendrycks et al., NeurIPS 2019).

    ``1/4 sum_r softmax(f(x turned by r))_r`` over 0, 90, 180 and 270 degrees, for a model that was trained to tell
    these apart (Gidaris et al., ICLR 2018; the objective "rotnet"). It asks the model about the three others.

    Raises
    ------
    ValueError
        The model does not return four logits, the features came without their inputs, or these are not square
        images (n, channels, height, height).
    """

    reads = ("logits",)
    _asks_again = True

    def _score(self, features: Features) -> Tensor:
        _require_turns(self, features)
        source = features.source_of(self)
        total = torch.zeros(len(features), dtype=torch.float64, device=features.tensor("logits").device)
        for turn, images in enumerate(rotations(source.inputs)):
            # As it is, it was seen already.
            again = source.features(images) if turn else features
            total += again.tensor("logits").double().softmax(1)[:, turn]
        return total / _TURNS


class _Learned(NamedTuple):
    """What CSI's score reads of the training inputs, by rotation."""

    axes: Tensor  # (4, n, e) float32, of unit length
    of_similarity: Tensor  # (4,) lambda
    of_logit: Tensor  # (4,) omega


class CSI(Detector):
    """Similarity to a training input, and the logit of the rotation, over rotations (Tack et al., NeurIPS 2020).

    ``1/4 sum_r [lambda_r max_m <z_r(x), z_r(x_m) / ||z_r(x_m)||> + omega_r f_r(x)]`` for a model with an embedding
    z and logits f of the four rotations (the objective "csi"). ``z_r`` and ``f_r``, the r-th logit, are of the
    input turned by r, each a mean over augmented views: mirrored or not before it is turned, then crops of a set
    share of the area, jitter of the colours, greyscale. ``lambda_r`` is 1 over the mean of ``||z_r||`` over the
    training inputs, ``omega_r`` 1 over that of ``f_r``. Where the source draws views anew for every input, the
    same are taken of all inputs here, so that a score does not depend on the others of its batch.

    It asks the model again in fitting and in scoring, for four rotations of each view.

    Parameters
    ----------
    augmentations : number of views of each rotation; 10 in the source.
    scale : area of the crops, as a share of the image's; 0.54 in the source.

    Raises
    ------
    ValueError
        A setting is out of its range; the model does not return four logits; the features came without their
        inputs, or these are not square colour images between 0 and 1; the model did not learn the rotations: the
        mean logit of one is not positive over the training inputs.
    """

    reads = ("embedding", "logits")
    learns = ("embedding", "logits")
    settings = table(augmentations=whole(1), scale=real(0, 1, closed="right"))
    augmentations: int
    scale: float
    _asks_again = True

    def __init__(self, augmentations: int = 10, scale: float = 0.54) -> None:
        super().__init__()
        self._set(augmentations=augmentations, scale=scale)
        self.bank = Bank()  # of z_0 to z_3 and f_0 to f_3, side by side

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        _require_turns(self, features)
        self._require_colours(features.source_of(self).inputs)

    def _partial_fit(self, features: Features) -> None:
        if len(features):
            embeddings, logits = self._ask(features)
            self.bank.update(torch.cat([embeddings.flatten(1), logits], 1))

    def _derive(self) -> _Learned:
        rows = self.bank.rows
        embeddings, logits = rows[:, :-_TURNS].unflatten(1, (_TURNS, -1)), rows[:, -_TURNS:].double()
        means = logits.mean(0)
        if not (means > 0).all():
            raise ValueError(
                f"{self!r} needs a model that tells rotations apart, and the mean logit of "
                f"{90 * int((means <= 0).nonzero()[0])} degrees over the training inputs is not positive"
            )
        lengths = torch.linalg.vector_norm(embeddings.double(), dim=2).mean(0)
        axes = torch.stack([single_unit_rows(embeddings[:, turn]) for turn in range(_TURNS)])
        return _Learned(axes, 1 / lengths, 1 / means)

    def _score(self, features: Features) -> Tensor:
        _require_turns(self, features)
        width = _TURNS * features.tensor("embedding").shape[1]
        if width + _TURNS != self.bank.width:
            fitted = (self.bank.width - _TURNS) // _TURNS
            raise ValueError(f"{self!r} was fitted to `embedding` of width {fitted}, got width {width // _TURNS}")
        self._require_colours(features.source_of(self).inputs)
        if len(features) == 0:
            return features.tensor("logits").new_empty(0)
        learned: _Learned = self._learned()
        embeddings, logits = self._ask(features)
        total = logits.double() @ learned.of_logit.to(logits.device)
        for turn in range(_TURNS):
            z = embeddings[:, turn]
            near = [(z @ axes.T.to(z)).amax(1) for axes in learned.axes[turn].split(_COMPARED)]
            total += learned.of_similarity[turn] * torch.stack(near).amax(0).double()
        return total / _TURNS

    def _ask(self, features: Features) -> tuple[Tensor, Tensor]:
        """Return embeddings (n, 4, e) of every rotation and its logit (n, 4), means over the views, float32."""
        source = features.source_of(self)
        embeddings, logits = [], []
        for turn, views in enumerate(zip(*self._views(source.inputs), strict=True)):
            asked = [source.features(view) for view in views]
            embeddings.append(torch.stack([again.tensor("embedding").float() for again in asked]).mean(0))
            logits.append(torch.stack([again.tensor("logits").float()[:, turn] for again in asked]).mean(0))
        return torch.stack(embeddings, 1), torch.stack(logits, 1)

    def _views(self, images: Tensor) -> Iterator[list[Tensor]]:
        """Yield the views of every rotation, an augmentation after the other."""
        height, width = images.shape[2:]
        for augmentation in range(self.augmentations):
            generator = torch.Generator().manual_seed(augmentation)
            turned = []
            mirrored = images.flip(3) if torch.rand((), generator=generator, dtype=torch.float32) < 0.5 else images
            for turn in rotations(mirrored):
                scale = (self.scale, self.scale)
                drawn = Distortion.draw(1, (height, width), generator, scale=scale, flips=False)
                turned.append(distort(turn, drawn))
            yield turned

    def _require_colours(self, images: Tensor) -> None:
        rotations(images[:1])
        if images.shape[1] != 3 or (len(images) and not (images.amin() >= 0 and images.amax() <= 1)):
            raise ValueError(
                f"{self!r} changes the colours of images (n, 3, h, h) between 0 and 1, so the model must take "
                "such: let Normalize be its first layer"
            )


def _require_turns(detector: Detector, features: Features) -> None:
    width = features.tensor("logits").shape[1]
    if width != _TURNS:
        raise ValueError(f"{detector!r} reads the logits of 4 rotations, and the model returns {width}")
