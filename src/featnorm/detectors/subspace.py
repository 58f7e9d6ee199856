"""Detectors that measure how far a feature lies from the subspace that training fills."""

from typing import NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import choice, table, whole
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Moments, RowSample, Total
from featnorm.features import Features

# Rows whose residual norms are averaged for ViM's alpha. With the control variate the error of the mean is
# well under a thousandth, and 4096 rows weigh no more than one float64 Gram matrix of the same width.
_ALPHA_ROWS = 4096


def principal_dimension(width: int) -> int:
    """Return ViM's default: 1000 from 2048 dimensions on, 512 from 768 on, otherwise half of them."""
    if width >= 2048:
        return 1000
    return 512 if width >= 768 else width // 2


class _Subspace(NamedTuple):
    origin: Tensor  # (D,)
    complement: Tensor  # (D, D - dim)
    variance: Tensor  # 0-d, the mean squared residual norm of the training rows

    def residual(self, z: Tensor) -> Tensor:
        """Return ``||R'(z - u)||`` of each row, (n,) float64."""
        return torch.linalg.vector_norm((z.double() - self.origin) @ self.complement, dim=1)


class _SubspaceDetector(Detector):
    """The principal subspace of the pooled features about the classifier's origin."""

    settings = table(dim=whole(1) | choice(None))
    dim: int | None

    def __init__(self, dim: int | None = None) -> None:
        super().__init__()
        self._set(dim=dim)
        self.moments = Moments()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        self._require_residual(features.tensor("pooled").shape[1])

    def _partial_fit(self, features: Features) -> None:
        origin = _origin(features) if self.moments.is_empty else None
        self.moments.update(features.tensor("pooled"), shift=origin)

    def _validate(self) -> None:
        self._require_residual(self.moments.width)

    def _require_residual(self, width: int) -> None:
        if self.dim is not None and self.dim >= width:
            raise ValueError(
                f"{self!r} leaves no residual: the features have {width} dimensions, use dim < {width}"
            )

    def _subspace(self) -> _Subspace:
        width = self.moments.width
        dim = principal_dimension(width) if self.dim is None else self.dim
        values, vectors = torch.linalg.eigh(self.moments.second_moment())
        kept = width - dim
        # eigh orders ascending: the first columns are the directions that training fills least.
        complement = vectors[:, :kept].contiguous()
        variance = values[:kept].clamp_min(0).sum()
        if variance <= kept * self.moments.rounding().max():
            # Which of the directions without variance count as principal would be up to rounding.
            raise ValueError(
                f"{self!r}: the {int(self.moments.total)} training inputs lie in the principal subspace of "
                f"{dim} dimensions; fit on more inputs than that, or use a smaller dim"
            )
        return _Subspace(self.moments.shift, complement, variance)


class Residual(_SubspaceDetector):
    """Distance to the principal subspace, ``||R'(z - u)||``, negated (ViM: Wang et al., CVPR 2022).

    One of the norms of the paper's Table 12. Reads the pooled feature z. The origin ``u = -pinv(W) b`` is
    where the classifier's logits are free of bias; 0 where the classifier has none, is a cosine classifier,
    or reads a head and not z itself. R are the eigenvectors of ``(Z - u)'(Z - u) / N`` that are not
    principal.

    Parameters
    ----------
    dim : the principal dimension; None for 1000 if D >= 2048, 512 if D >= 768, otherwise D // 2.

    Raises
    ------
    ValueError
        ``dim`` is not a positive whole number, or leaves no residual: D <= dim, or as few inputs.
    """

    reads = ("pooled",)
    learns = ("pooled", "classifier")
    role = "distance"

    def _derive(self) -> _Subspace:
        return self._subspace()

    def _score(self, features: Features) -> Tensor:
        self._same_width("pooled", features.tensor("pooled"), self.moments.width)
        subspace: _Subspace = self._learned()
        return -subspace.residual(features.tensor("pooled"))


class ViM(_SubspaceDetector):
    """Virtual-logit matching, ``logsumexp(l) - alpha ||R'(z - u)||`` (Wang et al., CVPR 2022).

    The residual (see `Residual`) enters as one more logit, at the scale of the others:
    ``alpha = mean max-logit / mean ||R'(z - u)||`` over the training inputs. The second mean is exact up to
    4096 inputs; beyond, it is that of a sample which does not depend on their order, corrected by the mean
    square, which is known exactly.

    Parameters
    ----------
    dim : the principal dimension, as for `Residual`.

    Raises
    ------
    ValueError
        As `Residual`.
    """

    reads = ("pooled", "logits")
    learns = ("pooled", "logits", "classifier")

    def __init__(self, dim: int | None = None) -> None:
        super().__init__(dim)
        self.max_logit = Total()
        self.sample = RowSample(_ALPHA_ROWS)

    def _partial_fit(self, features: Features) -> None:
        super()._partial_fit(features)
        self.sample.update(features.tensor("pooled"))
        self.max_logit.update(features.tensor("logits").amax(1))

    def _derive(self) -> tuple[_Subspace, Tensor]:
        subspace = self._subspace()
        norms = subspace.residual(self.sample.rows)
        mean = norms.mean()
        if not self.sample.is_complete:
            # Norms and their squares vary together, and the squares' true mean is the sum of the eigenvalues.
            squares = norms.square()
            slope = torch.cov(torch.stack([norms, squares]))
            mean = mean + slope[0, 1] / slope[1, 1].clamp_min(1e-300) * (subspace.variance - squares.mean())
        return subspace, self.max_logit.mean() / mean

    def _score(self, features: Features) -> Tensor:
        self._same_width("pooled", features.tensor("pooled"), self.moments.width)
        subspace, alpha = self._learned()
        return features.tensor("logits").double().logsumexp(1) - alpha * subspace.residual(
            features.tensor("pooled")
        )


def _origin(features: Features) -> Tensor:
    """Return ``-pinv(W) b``, or 0 where the classifier is not an affine map of the pooled feature."""
    assert features.pooled is not None
    assert features.classifier is not None
    weight, bias = features.linear()
    zero = features.tensor("pooled").new_zeros(features.tensor("pooled").shape[1], dtype=torch.float64)
    if bias is None or not features.classifier_reads("pooled"):
        return zero
    # The shortest solution of least squares is the pseudo-inverse's, for a third of its time and memory; of its
    # drivers the one that takes any rank runs on a CPU alone.
    weight, bias = weight.cpu().double(), bias.cpu().double()
    found: Tensor = torch.linalg.lstsq(weight, -bias[:, None], driver="gelsd").solution
    return found[:, 0].to(zero.device)
