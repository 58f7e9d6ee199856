"""Detectors that measure a distance to the training features."""

from typing import Any, Literal, NamedTuple, Self

import torch
from torch import Tensor

from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Bank, Moments, RowSample, single_unit_rows, unit_rows, whitening
from featnorm.features import Features

# Above this many rows k-means and its covariances are learned from a sample of them.
_CLUSTERED_ROWS = 1 << 16
# Rows of a bank that are looked at at a time.
_CHECKED_ROWS = 1 << 14


class _Gaussians(NamedTuple):
    """Whitened Gaussians: ``|| (z - origin) L - centre ||^2`` is a squared Mahalanobis distance."""

    origin: Tensor  # (D,)
    scale: Tensor  # (D,) the standard deviations by which features are divided
    factors: list[Tensor]  # each (D, r)
    centres: list[Tensor]  # each (C, r), the means that share the factor

    def nearest(self, z: Tensor) -> Tensor:
        """Return the squared distance of each row to the nearest mean, (n,) float64."""
        z = (z.double() - self.origin) / self.scale
        nearest = z.new_full((z.shape[0],), torch.inf)
        for factor, centres in zip(self.factors, self.centres, strict=True):
            white = z @ factor
            # ||w - c||^2 expanded, so that no (n, C, r) tensor is made.
            offsets = torch.addmm(centres.square().sum(1), white, centres.T, alpha=-2).amin(1)
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

    def _learn(self, features: Features) -> None:
        self.moments.add(features.tensor("pooled"), features.labels)

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
        return _Gaussians(origin, torch.ones_like(origin), [factor], [centres])

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

    def __init__(self, clusters: int | Literal["labels"] = 1) -> None:
        if clusters != "labels" and (not isinstance(clusters, int) or clusters < 1):
            raise ValueError(f"SSD takes clusters=1, a larger whole number or 'labels', got {clusters!r}")
        super().__init__()
        self.clusters = clusters
        self.learns = ("pooled", "labels") if clusters == "labels" else ("pooled",)
        self.moments = Moments(gram_per_group=clusters == "labels")
        self.sample = RowSample(_CLUSTERED_ROWS) if clusters not in (1, "labels") else None

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        if self.clusters == "labels":
            _require_labels(self, features.tensor("labels"))

    def _learn(self, features: Features) -> None:
        unit = unit_rows(features.tensor("pooled"))
        self.moments.add(unit, features.labels if self.clusters == "labels" else None)
        if self.sample is not None:
            self.sample.add(unit)

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
            return _Gaussians(origin, scale, [factor], [torch.zeros_like(factor[:1])])
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
        return _Gaussians(origin, scale, factors, centres)

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
            moments.add(rows, self._k_means(rows))
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


class KNN(Detector):
    """Distance to the k-th nearest training input, negated (Sun et al., ICML 2022).

    Reads the pooled feature, normalised to unit length: ``z / (||z|| + 1e-10)``. Exact search by faiss.

    Parameters
    ----------
    k : which neighbour; 50 for CIFAR-10 and 1000 for ImageNet-1k in the source, each with the whole bank.
    squared
        Score the squared distance, as the source does. It ranks alike alone, but not in a `Fusion`.

    Raises
    ------
    ValueError
        ``k`` is not a positive whole number, or is more than the inputs in the bank.
    """

    reads = ("pooled",)
    learns = ("pooled",)
    role = "distance"

    def __init__(self, k: int = 50, squared: bool = True) -> None:
        if not isinstance(k, int) or isinstance(k, bool) or k < 1:
            raise ValueError(f"KNN takes a whole number k >= 1, got {k!r}")
        if not isinstance(squared, bool):
            raise ValueError(f"KNN takes squared=True or False, got {squared!r}")
        super().__init__()
        self.k = k
        self.squared = squared
        self.bank = Bank()

    def use_bank(self, rows: Tensor) -> Self:
        """Take a bank as it is, in place of what was learned, without a copy: it may be mapped from a file.

        Parameters
        ----------
        rows : training features of unit length, as `unit_rows` makes them, (n, D) float32.

        Raises
        ------
        ValueError
            The rows are of another shape or type, or one is neither of unit length nor zero.
        """
        if rows.ndim != 2 or rows.dtype != torch.float32:
            raise ValueError(f"{self!r} takes a bank (n, D) of float32, got {rows.dtype} {tuple(rows.shape)}")
        for start in range(0, len(rows), _CHECKED_ROWS):
            lengths = torch.linalg.vector_norm(rows[start : start + _CHECKED_ROWS], dim=1)
            wrong = ~(((lengths - 1).abs() < 1e-3) | (lengths == 0))
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"row {start + row} of the bank of {self!r} has length {float(lengths[row]):.3g}: "
                    "divide each row by its length"
                )
        self.bank.rows = rows
        self._forget_derived()
        return self

    def _learn(self, features: Features) -> None:
        self.bank.add(single_unit_rows(features.tensor("pooled")))

    def _derive(self) -> Any:
        return self.bank.rows.cpu().numpy()

    @property
    def bank_shape(self) -> tuple[int, int]:
        """Rows and width of the bank."""
        return len(self.bank.rows), self.bank.width

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """Return the squared distances to the nearest of the bank.

        Parameters
        ----------
        queries : features of unit length, as `unit_rows` makes them, (m, D) float32.
        k : how many neighbours; all where the bank has fewer.

        Returns
        -------
        (m, k) on the CPU, the nearest first.
        """
        import faiss

        k = min(k, self.bank_shape[0])
        if len(queries) == 0:
            return queries.new_empty(0, k)
        return torch.from_numpy(faiss.knn(queries.cpu().contiguous().numpy(), self._learned(), k)[0])

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        rows, width = self.bank_shape
        self._same_width("pooled", pooled, width)
        if rows < self.k:
            raise ValueError(f"{self!r} has only {rows} inputs in its bank: fit on more, or lower k")
        queries = unit_rows(pooled.detach()).float()
        # faiss has no place in a graph that is traced, and the search is exact either way.
        tracing = torch.compiler.is_compiling()
        squared = self._traced(queries) if tracing else self.nearest(queries, self.k)[:, -1].clone()
        # The expansion ||q||^2 - 2 q.b + ||b||^2 can end a rounding error below zero.
        squared = squared.clamp_min(0).to(pooled.device)
        return -(squared if self.squared else squared.sqrt())

    def _traced(self, queries: Tensor) -> Tensor:
        bank = self.bank.rows.float()
        products = torch.addmm(bank.square().sum(1), queries, bank.T, alpha=-2)
        return products.topk(self.k, largest=False).values[:, -1] + queries.square().sum(1)


def _require_labels(detector: Detector, labels: Tensor) -> None:
    without = (labels < 0).nonzero()
    if len(without):
        raise ValueError(
            f"{detector!r} learns from labels, and {len(without)} of {len(labels)} inputs have none, "
            f"the first at row {int(without[0])} (SSD and KNN need no labels)"
        )
