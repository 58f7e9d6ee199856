"""Norms of a layer: the paper's negative-aware norm, and those it is compared with."""

import math

import torch
from torch import Tensor

from featnorm._utils.checks import Interval, table
from featnorm.detectors.base import Detector
from featnorm.features import Features
from featnorm.norms import l0_norm, l1_norm, lp_norm, negative_aware_norm


class _Norm(Detector):
    reads = ("activation",)
    role = "norm"
    cost = "O(d)"


class NAN(_Norm):
    """The negative-aware norm of the last hidden layer, ``||a||_1 / ||a||_0`` (paper eq. 10).

    It has no hyperparameter and needs no fit. An input that activates no unit scores 0.

    Examples
    --------
    >>> features = Features(activation=torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]]))
    >>> NAN().score(features)
    tensor([2.0000, 0.5000])
    """

    source = "Park et al., ICCV 2023, eq. 10"
    formula = r"\lVert a \rVert_1 / \lVert a \rVert_0"
    standard = ("NAN()",)

    def _score(self, features: Features) -> Tensor:
        return negative_aware_norm(features.tensor("activation"))


class L1Norm(_Norm):
    """The feature norm ``||a||_1``, the confidence of the hidden classifier (paper Thm. 3, eq. 4).

    Examples
    --------
    >>> features = Features(activation=torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]]))
    >>> L1Norm().score(features)
    tensor([4.0000, 1.5000])
    """

    source = "Park et al., ICCV 2023, Theorem 3 and eq. 4"
    formula = r"\lVert a \rVert_1"
    standard = ("L1Norm()",)

    def _score(self, features: Features) -> Tensor:
        return l1_norm(features.tensor("activation"))


class LpNorm(_Norm):
    """The norm ``||a||_p`` (paper A.2.1).

    Parameters
    ----------
    p : exponent in (0, inf]; infinity gives the largest unit. For the number of active units see `Sparsity`.

    Raises
    ------
    ValueError
        ``p`` is not positive.

    Examples
    --------
    >>> features = Features(activation=torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]]))
    >>> LpNorm(2).score(features)
    tensor([3.1623, 0.8660])
    """

    source = "Park et al., ICCV 2023, A.2.1"
    formula = r"\lVert a \rVert_p = \left( \sum_i \lvert a_i \rvert^p \right)^{1/p}"
    standard = ("LpNorm()",)
    settings = table(p=Interval(0, math.inf, closed="right"))
    p: float

    def __init__(self, p: float = 2) -> None:
        super().__init__()
        self._set(p=p)

    def _score(self, features: Features) -> Tensor:
        return lp_norm(features.tensor("activation"), self.p)


class Sparsity(_Norm):
    """The sparsity term ``1 / ||a||_0`` (paper eq. 9, Table 12), so that NAN = L1Norm x Sparsity.

    If no unit is active, the count is taken as 1, as in NAN.

    Examples
    --------
    >>> features = Features(activation=torch.tensor([[3.0, 0.0, 1.0], [0.5, 0.5, 0.5]]))
    >>> Sparsity().score(features)
    tensor([0.5000, 0.3333])
    """

    source = "Park et al., ICCV 2023, eq. 9"
    formula = r"1 / \lVert a \rVert_0"
    standard = ("Sparsity()",)

    def _score(self, features: Features) -> Tensor:
        return l0_norm(features.tensor("activation")).clamp_min(1).reciprocal()


class EmbeddingMagnitude(Detector):
    """``||g||_2`` of the embedding before normalization (paper Table 8; Dhamija et al., NeurIPS 2018).

    Examples
    --------
    >>> EmbeddingMagnitude().score(Features(embedding=torch.tensor([[3.0, 4.0]])))
    tensor([5.])
    """

    reads = ("embedding",)
    role = "norm"
    source = "Park et al., ICCV 2023, Table 8; Dhamija et al., NeurIPS 2018"
    formula = r"\lVert g \rVert_2"
    cost = "O(e)"
    standard = ("EmbeddingMagnitude()",)

    def _score(self, features: Features) -> Tensor:
        return lp_norm(features.tensor("embedding"), 2)


class HiddenConfidence(Detector):
    """The hidden classifier's confidence, ``max_k sum_i sign(C_ki) a_i`` (paper eq. 3, Table 10).

    C is the linear map from the last hidden layer to the logits: the classifier's weights, times those of the
    embedding if there is one (A.1). ``sign(0) = -1``. The score never exceeds ``||a||_1`` (Thm. 3).

    Raises
    ------
    ValueError
        The classifier does not read the last hidden layer: their widths differ.

    Examples
    --------
    >>> features = FeatureTap(model)(images)
    >>> bool((HiddenConfidence().score(features) <= L1Norm().score(features)).all())
    True
    """

    reads = ("activation", "classifier")
    source = "Park et al., ICCV 2023, eq. 3 and Table 10"
    formula = r"\max_k \sum_i \operatorname{sign}(C_{ki})\, a_i"
    cost = "O(C d)"
    standard = ("HiddenConfidence()",)

    def _score(self, features: Features) -> Tensor:
        weight, _ = features.linear()
        a = features.tensor("activation")
        a = a.to(torch.promote_types(a.dtype, torch.float32))
        if weight.shape[1] != a.shape[1]:
            raise ValueError(
                f"{self!r} needs the classifier of the last hidden layer: the layer has {a.shape[1]} units, "
                f"the classifier reads {weight.shape[1]}"
            )
        signs = torch.where(weight.to(a.device) > 0, 1.0, -1.0).to(a.dtype)
        return (a @ signs.T).amax(1)
