"""Distances to Gaussians that are fitted to the training features."""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from featnorm._utils.checks import Choice, Integer, table
from featnorm.detectors.base import Detector, Role, require_labels
from featnorm.detectors.statistics import Moments, RowSample, single_unit_rows, unit_rows, whitening
from featnorm.features import Features

# Above this number of rows k-means and its covariances are fitted to a sample.
_MAX_CLUSTERED_ROWS = 1 << 16


class _Gaussians(NamedTuple):
    """Whitened Gaussians: ``|| (z - origin) L - center ||^2`` is a squared Mahalanobis distance."""

    origin: Tensor  # (D,)
    scale: Tensor | None  # (D,) standard deviations by which features are divided, if they are
    factors: list[Tensor]  # each (D, r)
    centers: list[Tensor]  # each (C, r), means that share the factor
    lengths: list[Tensor]  # each (C,), squared lengths of the centers

    @classmethod
    def about(
        cls, origin: Tensor, scale: Tensor | None, factors: list[Tensor], centers: list[Tensor]
    ) -> "_Gaussians":
        """Make it from the means, whose lengths are computed once for all batches."""
        return cls(origin, scale, factors, centers, [means.square().sum(1) for means in centers])

    def nearest(self, z: Tensor) -> Tensor:
        """Return the squared distance of each row to the nearest mean, (n,) float64."""
        z = z.double() - self.origin
        if self.scale is not None:
            z = z / self.scale
        nearest = z.new_full((z.shape[0],), torch.inf)
        for factor, centers, lengths in zip(self.factors, self.centers, self.lengths, strict=True):
            white = z @ factor
            # ||w - c||^2 expanded, so that no (n, C, r) tensor is made.
            offsets = torch.addmm(lengths, white, centers.T, alpha=-2).amin(1)
            nearest = torch.minimum(nearest, white.square().sum(1) + offsets)
        return nearest.clamp_min(0)


class Mahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest class mean, negated (Lee et al., NeurIPS 2018).

    It reads the pooled feature. Class means and one class-centered covariance, pooled over the classes and divided
    by N, are computed in float64; directions without variance are dropped (pseudo-inverse).

    Parameters
    ----------
    normalize
        Whether to normalize features to unit length, in training and at test (Mahalanobis++: Müller and Hein, ICML
        2025). Otherwise a short feature is near every class mean, whatever its direction.
    relative
        Whether to subtract the squared distance to the mean of all training inputs, under their total covariance
        (Ren et al., 2021). The score may then be positive, and is not a distance that a `Fusion` takes.

    Raises
    ------
    ValueError
        An input of the fit has no label, or no class has two inputs that differ; an argument is not a boolean.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> Mahalanobis(normalize=True).fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled",)
    learns = ("pooled", "labels")
    role: Role = "distance"
    source = "Lee et al., NeurIPS 2018; Ren et al., 2021; Müller and Hein, ICML 2025"
    formula = r"-\min_c\, (h - \mu_c)^\top \Sigma^{+} (h - \mu_c)"
    cost = "O(D^2 + C D)"
    standard = ("Mahalanobis()", "Mahalanobis(normalize=True)", "Mahalanobis(relative=True)")
    settings = table(normalize=Choice(True, False), relative=Choice(True, False))
    normalize: bool
    relative: bool

    def __init__(self, normalize: bool = False, relative: bool = False) -> None:
        super().__init__()
        self._set(normalize=normalize, relative=relative)
        if self.relative:
            self.role = "confidence"
        self.moments = Moments()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        require_labels(self, features.tensor("labels"))

    def _partial_fit(self, features: Features) -> None:
        update = self.moments.update_unit if self.normalize else self.moments.update
        update(features.tensor("pooled"), features.labels)

    def _finalize(self) -> list[_Gaussians]:
        rounding = self.moments.rounding().max()
        factor = whitening(self.moments.within_covariance(), rounding)
        if factor.shape[1] == 0:
            raise ValueError(
                f"{self!r} found no variation within the {len(self.moments.groups)} classes "
                f"of its {int(self.moments.total)} inputs: it needs several different inputs per class "
                "(SSD and KNN need no labels)"
            )
        origin = self.moments.mean()
        centers = (self.moments.means() - origin) @ factor
        gaussians = [_Gaussians.about(origin, None, [factor], [centers])]
        if self.relative:
            factor = whitening(self.moments.covariance(), rounding)
            gaussians.append(_Gaussians.about(origin, None, [factor], [torch.zeros_like(factor[:1])]))
        return gaussians

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.moments.width)
        z = unit_rows(pooled) if self.normalize else pooled
        classes, *background = self._fitted_state()
        score: Tensor = -classes.nearest(z)
        return score + background[0].nearest(z) if background else score


class PredictedMahalanobis(Detector):
    """Squared Mahalanobis distance to the nearest mean of a predicted class, negated; it needs no labels.

    Features are normalized to unit length, and each belongs to the class that the model predicts. Each class also
    counts one input at the mean of all inputs, so that classes with few inputs are defined: with one input per
    class the covariance is proportional to that of `SSD`, and with many the score is that of
    `Mahalanobis(normalize=True)` for a model that predicts the labels.

    Raises
    ------
    ValueError
        All inputs of the fit are the same.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> PredictedMahalanobis().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled", "logits")
    learns = ("pooled", "logits")
    role = "distance"
    source = "this library, docs/results/norms.md"
    formula = r"-\min_y\, (z - \mu_y)^\top \Sigma^{+} (z - \mu_y)"
    cost = "O(D^2 + C D)"
    standard = ("PredictedMahalanobis()",)

    def __init__(self) -> None:
        super().__init__()
        self.moments = Moments()

    def _partial_fit(self, features: Features) -> None:
        self.moments.update_unit(features.tensor("pooled"), features.tensor("logits").argmax(1))

    def _finalize(self) -> tuple[_Gaussians, _Gaussians]:
        means, covariance = self.moments.shrunk()
        # With fewer inputs than units, the inverse of the smallest variances would rule the score.
        factor = whitening(covariance, self.moments.rounding().max(), torch.float32)
        if factor.shape[1] == 0:
            raise ValueError(f"{self!r} found no variation: its {int(self.moments.total)} inputs are the same")
        origin = self.moments.mean()
        centers = torch.cat([means - origin, torch.zeros_like(means[:1])]) @ factor
        known = _Gaussians.about(origin, None, [factor], [centers[:-1]])
        return known, _Gaussians.about(origin, None, [factor], [centers])

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.moments.width)
        # The mean of a class that is predicted for no training input is that of all of them.
        some_missing = features.tensor("logits").shape[1] > len(self.moments.groups)
        return -self._fitted_state()[some_missing].nearest(unit_rows(pooled))


class SSD(Detector):
    """Squared Mahalanobis distance in unit-length features, negated (Sehwag et al., ICLR 2021).

    The pooled feature is normalized to unit length and standardized by the training mean and population deviation.
    The distance is ``(z - mu)' pinv(cov) (z - mu)``, the minimum over the clusters, each with its own mean and
    biased covariance.

    Parameters
    ----------
    clusters
        Number of clusters, found by scikit-learn's k-means if it is not 1, or ``"labels"`` for one cluster per
        class. Above 65,536 inputs k-means is fitted to a sample of that size, which does not depend on their
        order.

    Raises
    ------
    ValueError
        ``clusters`` is neither a positive integer nor ``"labels"``; a cluster has a single input; an input has no
        label with ``clusters="labels"``.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> SSD().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled",)
    learns: tuple[str, ...] = ("pooled",)
    role = "distance"
    source = "Sehwag et al., ICLR 2021"
    formula = r"-\min_m\, (z - \mu_m)^\top \Sigma_m^{+} (z - \mu_m)"
    cost = "O(D^2) per cluster"
    standard = ("SSD()",)
    settings = table(clusters=Integer(1) | Choice("labels"))
    clusters: int | Literal["labels"]

    def __init__(self, clusters: int | Literal["labels"] = 1) -> None:
        super().__init__()
        self._set(clusters=clusters)
        if self.clusters == "labels":
            self.learns = ("pooled", "labels")
        self.moments = Moments(gram_per_group=self.clusters == "labels")
        self.sample = RowSample(_MAX_CLUSTERED_ROWS) if self.clusters not in (1, "labels") else None

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        if self.clusters == "labels":
            require_labels(self, features.tensor("labels"))

    def _partial_fit(self, features: Features) -> None:
        pooled = features.tensor("pooled")
        self.moments.update_unit(pooled, features.labels if self.clusters == "labels" else None)
        if self.sample is not None:
            self.sample.update(single_unit_rows(pooled))

    def _finalize(self) -> _Gaussians:
        covariance, rounding = self.moments.covariance(), self.moments.rounding()
        variance = covariance.diagonal()
        alive = variance > rounding
        if not alive.any():
            raise ValueError(
                f"{self!r} found no variation among its {int(self.moments.total)} inputs: "
                "fit several different ones"
            )
        origin = self.moments.mean()
        # A unit that is constant in training has no deviation to divide by; the pseudo-inverse drops it.
        scale = torch.where(alive, variance, torch.ones_like(variance)).sqrt()
        if self.clusters == 1:
            standard = covariance / torch.outer(scale, scale)
            factor = whitening(standard, (rounding / scale.square())[alive].max())
            return _Gaussians.about(origin, scale, [factor], [torch.zeros_like(factor[:1])])
        factors, centers = [], []
        for mean, own, noise in self._clusters(origin, scale):
            factor = whitening(own, noise[alive].max())
            if factor.shape[1] == 0:
                raise ValueError(
                    f"{self!r} has a cluster of identical inputs, which has no covariance: use fewer clusters"
                )
            factors.append(factor)
            centers.append((mean @ factor)[None])
        return _Gaussians.about(origin, scale, factors, centers)

    def _clusters(self, origin: Tensor, scale: Tensor) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return the mean, covariance and rounding error of each cluster, standardized."""
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
        gaussians: _Gaussians = self._fitted_state()
        return -gaussians.nearest(unit_rows(features.tensor("pooled")))
