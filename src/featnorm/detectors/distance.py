"""Detectors that measure a distance to Gaussians of the training features."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import choice, table, whole
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Moments, RowSample, single_unit_rows, unit_blocks, unit_rows, whitening
from featnorm.features import Features

# Above this many rows k-means and its covariances are learned from a sample of them.
_CLUSTERED_ROWS = 1 << 16


class _Gaussians(NamedTuple):
    """Whitened Gaussians: ``|| (z - origin) L - centre ||^2`` is a squared Mahalanobis distance."""

    origin: Tensor  # (D,)
    scale: Tensor | None  # (D,) the standard deviations by which features are divided; None for by none
    factors: list[Tensor]  # each (D, r)
    centres: list[Tensor]  # each (C, r), the means that share the factor
    lengths: list[Tensor]  # each (C,), the squared lengths of the centres

    @classmethod
    def about(
        cls, origin: Tensor, scale: Tensor | None, factors: list[Tensor], centres: list[Tensor]
    ) -> "_Gaussians":
        """Make it of the means; their lengths, which each batch needs, are taken once."""
        return cls(origin, scale, factors, centres, [means.square().sum(1) for means in centres])

    def nearest(self, z: Tensor) -> Tensor:
        """Return the squared distance of each row to the nearest mean, (n,) float64."""
        z = z.double() - self.origin
        if self.scale is not None:
            z = z / self.scale
        nearest = z.new_full((z.shape[0],), torch.inf)
        for factor, centres, lengths in zip(self.factors, self.centres, self.lengths, strict=True):
            white = z @ factor
            # ||w - c||^2 expanded, so that no (n, C, r) tensor is made.
            offsets = torch.addmm(lengths, white, centres.T, alpha=-2).amin(1)
            nearest = torch.minimum(nearest, white.square().sum(1) + offsets)
        return nearest.clamp_min(0)


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class mean, negated (Lee et al., NeurIPS 2018).

    Reads the pooled feature. Class means and one class-centred covariance, pooled over the classes and
    divided by N, in float64; directions without variance are left out (pseudo-inverse).

    Raises
    ------
    ValueError
        An input of the fit has no label, or no class has two inputs that differ.
    """

    reads = ("pooled",)
    learns = ("pooled", "labels")
    role = "distance"

    def __init__(self) -> None:
        super().__init__()
        self.moments = Moments()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        _require_labels(self, features.tensor("labels"))

    def _partial_fit(self, features: Features) -> None:
        self.moments.update(features.tensor("pooled"), features.labels)

    def _derive(self) -> _Gaussians:
        factor = whitening(self.moments.within_covariance(), self.moments.rounding().max())
        if factor.shape[1] == 0:
            raise ValueError(
                f"{self!r} found no variation within the {len(self.moments.groups)} classes "
                f"of its {int(self.moments.total)} inputs: it needs several different inputs of a class "
                "(SSD and KNN need no labels)"
            )
        origin = self.moments.mean()
        centres = (self.moments.means() - origin) @ factor
        return _Gaussians.about(origin, None, [factor], [centres])

    def _score(self, features: Features) -> Tensor:
        self._same_width("pooled", features.tensor("pooled"), self.moments.width)
        gaussians: _Gaussians = self._learned()
        return -gaussians.nearest(features.tensor("pooled"))


class SSD(Detector):
    """Squared Mahalanobis distance in unit-length features, negated (Sehwag et al., ICLR 2021).

    The pooled feature is normalised to unit length and standardised by the training mean and population
    deviation; then ``(z - mu)' pinv(cov) (z - mu)``, the least over the clusters, each with its own mean and
    biased covariance.

    Parameters
    ----------
    clusters
        1 for a single one; a number for k-means (scikit-learn; learned from a sample of 65,536 inputs that
        does not depend on their order, where there are more); ``"labels"`` for one cluster a class.

    Raises
    ------
    ValueError
        ``clusters`` is neither a positive whole number nor ``"labels"``; a cluster has a single input; labels
        were asked for and an input has none.
    """

    reads = ("pooled",)
    role = "distance"
    settings = table(clusters=whole(1) | choice("labels"))
    clusters: int | Literal["labels"]

    def __init__(self, clusters: int | Literal["labels"] = 1) -> None:
        super().__init__()
        self._set(clusters=clusters)
        self.learns = ("pooled", "labels") if self.clusters == "labels" else ("pooled",)
        self.moments = Moments(gram_per_group=self.clusters == "labels")
        self.sample = RowSample(_CLUSTERED_ROWS) if self.clusters not in (1, "labels") else None

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        if self.clusters == "labels":
            _require_labels(self, features.tensor("labels"))

    def _partial_fit(self, features: Features) -> None:
        pooled, row = features.tensor("pooled"), 0
        for unit in unit_blocks(pooled):
            labels = features.tensor("labels")[row : row + len(unit)] if self.clusters == "labels" else None
            self.moments.update(unit, labels)
            row += len(unit)
        if self.sample is not None:
            self.sample.update(single_unit_rows(pooled))

    def _derive(self) -> _Gaussians:
        covariance, rounding = self.moments.covariance(), self.moments.rounding()
        variance = covariance.diagonal()
        alive = variance > rounding
        if not alive.any():
            raise ValueError(
                f"{self!r} found no variation among its {int(self.moments.total)} inputs: "
                "it needs several different ones"
            )
        origin = self.moments.mean()
        # A unit that never moved in training has no deviation to divide by, and the pseudo-inverse drops it.
        scale = torch.where(alive, variance, torch.ones_like(variance)).sqrt()
        if self.clusters == 1:
            standard = covariance / torch.outer(scale, scale)
            factor = whitening(standard, (rounding / scale.square())[alive].max())
            return _Gaussians.about(origin, scale, [factor], [torch.zeros_like(factor[:1])])
        factors, centres = [], []
        for mean, own, noise in self._clusters(origin, scale):
            factor = whitening(own, noise[alive].max())
            if factor.shape[1] == 0:
                raise ValueError(
                    f"{self!r} has a cluster whose inputs are all alike, which has no covariance: "
                    "use fewer clusters"
                )
            factors.append(factor)
            centres.append((mean @ factor)[None])
        return _Gaussians.about(origin, scale, factors, centres)

    def _clusters(self, origin: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the mean, covariance and rounding error of each cluster, standardised."""
        if self.sample is None:
            moments = self.moments
            sizes = moments.counts
            means = (moments.means() - origin) / scale
            covariances = [
                (own / torch.outer(scale, scale), noise / scale.square())
                for own, noise in moments.group_covariances()
            ]
        else:
            rows = (self.sample.rows.double() - origin) / scale
            moments = Moments(gram_per_group=True).to(rows.device)
            moments.update(rows, self._k_means(rows))
            sizes, means, covariances = moments.counts, moments.means(), list(moments.group_covariances())
        if (sizes < 2).any():
            raise ValueError(
                f"{self!r} has a cluster of a single input, which has no covariance: use fewer clusters"
            )
        return [(mean, *covariance) for mean, covariance in zip(means, covariances, strict=True)]

    def _k_means(self, rows: Tensor) -> Tensor:
        from sklearn.cluster import KMeans

        assert isinstance(self.clusters, int)
        if len(rows) < 2 * self.clusters:
            raise ValueError(f"{self!r} has only {len(rows)} inputs to cluster: use fewer clusters")
        assigned = KMeans(self.clusters, n_init=10, random_state=0).fit_predict(rows.cpu().numpy())
        return torch.from_numpy(assigned).to(rows.device)

    def _score(self, features: Features) -> Tensor:
        self._same_width("pooled", features.tensor("pooled"), self.moments.width)
        gaussians: _Gaussians = self._learned()
        return -gaussians.nearest(unit_rows(features.tensor("pooled")))


def _require_labels(detector: Detector, labels: Tensor) -> None:
    without = (labels < 0).nonzero()
    if len(without):
        raise ValueError(
            f"{detector!r} learns from labels, and {len(without)} of {len(labels)} inputs have none, "
            f"the first at row {int(without[0])} (SSD and KNN need no labels)"
        )
