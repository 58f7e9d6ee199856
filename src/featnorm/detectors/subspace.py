"""Distances to the principal subspace of the training features, and shares of a feature within it."""

from typing import NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import Choice, Integer, Interval, table
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Moments, RowSample, Total, single_unit_rows, unit_rows
from featnorm.features import Features

# Rows whose residual norms are averaged for ViM's alpha. With the control variate the relative error of the mean
# is well under a thousandth, and 4096 rows need no more memory than one float64 Gram matrix of the same width.
_MAX_ALPHA_ROWS = 4096


def principal_dimension(width: int) -> int:
    """Return ViM's default: 1000 for widths of at least 2048, 512 for at least 768, otherwise half the width."""
    if width >= 2048:
        return 1000
    return 512 if width >= 768 else width // 2


class _Subspace(NamedTuple):
    origin: Tensor  # (D,)
    complement: Tensor  # (D, D - dim)
    variance: Tensor  # 0-d, mean squared residual norm of the training rows

    def residual(self, z: Tensor) -> Tensor:
        """Return ``||R'(z - u)||`` of each row, (n,) float64."""
        return torch.linalg.vector_norm((z.double() - self.origin) @ self.complement, dim=1)


class _SubspaceDetector(Detector):
    """The principal subspace of the pooled features about the classifier's origin, or of unit features about 0."""

    settings = table(dim=Integer(1) | Choice(None), normalize=Choice(True, False))
    dim: int | None
    normalize: bool

    def __init__(self, dim: int | None = None, normalize: bool = False) -> None:
        super().__init__()
        self._set(dim=dim, normalize=normalize)
        if self.normalize:
            self.learns = tuple(name for name in self.learns if name != "classifier")
        self.moments = Moments()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        self._require_residual(features.tensor("pooled").shape[1])

    def _partial_fit(self, features: Features) -> None:
        pooled, origin = features.tensor("pooled"), None
        if self.moments.is_empty:
            origin = pooled.new_zeros(pooled.shape[1]) if self.normalize else _origin(features)
        update = self.moments.update_unit if self.normalize else self.moments.update
        update(pooled, shift=origin)

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
        # eigh sorts in ascending order: the first columns are the directions of least variance.
        complement = vectors[:, :kept].contiguous()
        variance = values[:kept].clamp_min(0).sum()
        if variance <= kept * self.moments.rounding().max():
            # Rounding would decide which of the directions without variance count as principal.
            raise ValueError(
                f"{self!r}: the {int(self.moments.total)} training inputs lie in the principal subspace of "
                f"{dim} dimensions; fit on more inputs than that, or use a smaller dim"
            )
        return _Subspace(self.moments.shift, complement, variance)

    def _residual(self, features: Features, subspace: _Subspace) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.moments.width)
        return subspace.residual(unit_rows(pooled) if self.normalize else pooled)


class Residual(_SubspaceDetector):
    """Distance to the principal subspace, ``||R'(z - u)||``, negated (ViM: Wang et al., CVPR 2022).

    It is one of the norms of the paper's Table 12. It reads the pooled feature z. The origin ``u = -pinv(W) b`` is
    the point at which the classifier's logits have no bias; it is 0 if the classifier has no bias, is a cosine
    classifier, or does not read z itself but a head. R are the eigenvectors of ``(Z - u)'(Z - u) / N`` that are
    not principal.

    Parameters
    ----------
    dim : principal dimension. Default: 1000 if D >= 2048, 512 if D >= 768, otherwise D // 2.
    normalize
        Whether to normalize z to unit length, in training and at test, as Müller and Hein (ICML 2025) do for
        `Mahalanobis`. The origin is then 0, because the logits are no affine map of the unit feature, and no
        classifier is needed.

    Raises
    ------
    ValueError
        ``dim`` is not a positive integer, or leaves no residual: it is at least D, or at least the number of
        inputs; ``normalize`` is not a boolean.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> Residual().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled",)
    learns = ("pooled", "classifier")
    role = "distance"
    source = "Wang et al., CVPR 2022; Park et al., ICCV 2023, Table 12"
    formula = r"-\lVert R^\top (z - u) \rVert"
    cost = "O(D^2)"
    standard = ("Residual()",)

    def _finalize(self) -> _Subspace:
        return self._subspace()

    def _score(self, features: Features) -> Tensor:
        return -self._residual(features, self._fitted_state())


class ViM(_SubspaceDetector):
    """Virtual-logit matching, ``logsumexp(l) - alpha ||R'(z - u)||`` (Wang et al., CVPR 2022).

    The residual (see `Residual`) is an additional logit, scaled to the others: ``alpha = mean max-logit / mean
    ||R'(z - u)||`` over the training inputs. The second mean is exact for up to 4096 inputs. Above, it is the mean
    of a sample of that size, which does not depend on their order, corrected by the mean square of all inputs.

    Parameters
    ----------
    dim, normalize : as for `Residual`. The logits are not normalized.

    Raises
    ------
    ValueError
        As `Residual`.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> ViM().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled", "logits")
    learns = ("pooled", "logits", "classifier")
    source = "Wang et al., CVPR 2022"
    formula = r"\log \sum_k \exp l_k - \alpha \lVert R^\top (z - u) \rVert"
    cost = "O(D^2 + C)"
    standard = ("ViM()", "ViM(normalize=True)")

    def __init__(self, dim: int | None = None, normalize: bool = False) -> None:
        super().__init__(dim, normalize)
        self.max_logit = Total()
        self.sample = RowSample(_MAX_ALPHA_ROWS)

    def _partial_fit(self, features: Features) -> None:
        super()._partial_fit(features)
        pooled = features.tensor("pooled")
        self.sample.update(single_unit_rows(pooled) if self.normalize else pooled)
        self.max_logit.update(features.tensor("logits").amax(1))

    def _finalize(self) -> tuple[_Subspace, Tensor]:
        subspace = self._subspace()
        norms = subspace.residual(self.sample.rows)
        mean = norms.mean()
        if not self.sample.is_complete:
            # A control variate: the true mean of the squared norms is the sum of the eigenvalues.
            squares = norms.square()
            slope = torch.cov(torch.stack([norms, squares]))
            mean = mean + slope[0, 1] / slope[1, 1].clamp_min(1e-300) * (subspace.variance - squares.mean())
        return subspace, self.max_logit.mean() / mean

    def _score(self, features: Features) -> Tensor:
        subspace, alpha = self._fitted_state()
        return features.tensor("logits").double().logsumexp(1) - alpha * self._residual(features, subspace)


class NECO(Detector):
    """Share of the length of a feature that lies in the principal subspace (Ammar et al., ICLR 2024).

    ``||P h|| / ||h||``, where h is the pooled feature and P projects onto the first principal components of the
    training features. The components are those of the covariance, about the mean; h itself is not centered. This
    is the source's formula; its code also centers and standardizes the features of some networks, and multiplies
    the score by the largest logit for some. A zero vector scores 0.

    Parameters
    ----------
    dim
        Number of principal components, or the share of the variance that they explain at least, in (0, 1). The
        source tunes the number on OOD data for each network.

    Raises
    ------
    ValueError
        ``dim`` is neither a positive integer nor a share, or at least the width of the features; all training
        inputs are the same.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> NECO().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled",)
    learns = ("pooled",)
    source = "Ammar et al., ICLR 2024"
    formula = r"\lVert P h \rVert / \lVert h \rVert"
    cost = "O(D^2)"
    standard = ("NECO()",)
    settings = table(dim=Integer(1) | Interval(0, 1))
    dim: int | float

    def __init__(self, dim: float = 0.9) -> None:
        super().__init__()
        self._set(dim=dim)
        self.moments = Moments()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        self._require_width(features.tensor("pooled").shape[1])

    def _partial_fit(self, features: Features) -> None:
        self.moments.update(features.tensor("pooled"))

    def _validate(self) -> None:
        self._require_width(self.moments.width)

    def _require_width(self, width: int) -> None:
        if self.dim >= width and isinstance(self.dim, int):
            raise ValueError(
                f"{self!r} keeps every direction: the features have {width} dimensions, use dim < {width}"
            )

    def _finalize(self) -> Tensor:
        values, vectors = torch.linalg.eigh(self.moments.covariance())
        if values[-1] <= self.moments.rounding().max():
            raise ValueError(
                f"{self!r} found no variation among its {int(self.moments.total)} inputs: "
                "fit on inputs that differ"
            )
        explained = values.clamp_min(0).flip(0).cumsum(0)
        dim = self.dim if isinstance(self.dim, int) else 1 + int((explained < self.dim * explained[-1]).sum())
        return vectors[:, -dim:].contiguous()

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.moments.width)
        h = pooled.double()
        inside, whole = (torch.linalg.vector_norm(rows, dim=1) for rows in (h @ self._fitted_state(), h))
        return inside / whole.clamp_min(torch.finfo(torch.float64).tiny)


def _origin(features: Features) -> Tensor:
    """Return ``-pinv(W) b``, or 0 if the classifier is not an affine map of the pooled feature."""
    assert features.pooled is not None
    assert features.classifier is not None
    weight, bias = features.linear()
    zero = features.tensor("pooled").new_zeros(features.tensor("pooled").shape[1], dtype=torch.float64)
    if bias is None or not features.classifier_reads("pooled"):
        return zero
    # The minimum-norm least-squares solution is that of the pseudo-inverse, in a third of its time and memory. The
    # driver for matrices of any rank runs on a CPU only.
    weight, bias = weight.cpu().double(), bias.cpu().double()
    found: Tensor = torch.linalg.lstsq(weight, -bias[:, None], driver="gelsd").solution
    return found[:, 0].to(zero.device)
