"""Distances and similarities to single training inputs."""

import math
from typing import Self

import numpy as np
import torch
from torch import Tensor

from featnorm._utils.checks import Choice, Integer, Interval, shown, table
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Bank, RowSample, single_unit_rows, unit_rows, write_unit_rows
from featnorm.features import Features

# Rows of a bank that are processed at a time.
_CHECKED_ROWS = 1 << 14
# A bank with fewer rows is searched exactly: an index would save little.
_MIN_INDEXED_ROWS = 1 << 17
# Number of queries times their width from which faiss multiplies matrices.
_MIN_PRODUCT = 1 << 12
# Candidates that such a product selects in addition to the k nearest.
_SPARE = 16
# Minimum number of rows in the bank of NNGuide, and of inputs that are compared with it at a time.
_MIN_GUIDES = 1000
_QUERIES = 4096


class KNN(Detector):
    """Distance to the k-th nearest training input, negated (Sun et al., ICML 2022).

    It reads the pooled feature, normalized to unit length: ``z / (||z|| + 1e-10)``. faiss searches the neighbors.
    In the columns of a table, length is information: there, use ``normalize=False``.

    Parameters
    ----------
    k : rank of the neighbor; 50 for CIFAR-10 and 1000 for ImageNet-1k in the source, each with the whole bank.
    squared
        Whether to score the squared distance, as the source does. This does not change the ranking, except in a
        `Fusion`.
    recall
        Share of the k nearest neighbors that an approximate index must find, such as 0.99, for a bank of at least
        131,072 inputs. The index is built for the first score (a minute or two for a million inputs), and needs
        about a twentieth of the bank's memory in addition. The share of the bank that it searches is chosen by
        comparison with the exact search on inputs of the bank; if it would be a quarter or more, the search is
        exact. A missed neighbor makes a distance larger, never smaller. Default: None, an exact search.
    normalize : whether to normalize features to unit length.
    size
        Maximum number of inputs in the bank, which bounds its memory and the time of a search. Of more inputs, a
        uniform sample is kept that does not depend on their order; its k-th neighbor is farther away. Default:
        None, all of them.

    Raises
    ------
    ValueError
        ``k`` is not a positive integer, or larger than the number of inputs in the bank; ``recall`` is not between
        0 and 1; ``size`` is not a positive integer.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> KNN(k=10).fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled",)
    learns = ("pooled",)
    role = "distance"
    source = "Sun et al., ICML 2022"
    formula = r"-\lVert z - z_{(k)} \rVert_2"
    cost = "O(n D)"
    standard = ("KNN()",)
    settings = table(
        k=Integer(1),
        squared=Choice(True, False),
        recall=Interval(0, 1) | Choice(None),
        normalize=Choice(True, False),
        size=Integer(1) | Choice(None),
    )
    k: int
    squared: bool
    recall: float | None
    normalize: bool
    size: int | None

    def __init__(
        self,
        k: int = 50,
        squared: bool = True,
        recall: float | None = None,
        normalize: bool = True,
        size: int | None = None,
    ) -> None:
        super().__init__()
        self._set(k=k, squared=squared, recall=recall, normalize=normalize, size=size)
        self.bank = Bank() if self.size is None else RowSample(self.size)

    def use_bank(self, rows: Tensor) -> Self:
        """Replace the fit by a bank, which is used without a copy and may be mapped from a file.

        Parameters
        ----------
        rows : training features, (n, D) float32; of unit length, as `unit_rows` makes them, if ``normalize``.

        Raises
        ------
        ValueError
            The rows have another shape or type, or one is neither of unit length nor zero, as ``normalize`` needs;
            or ``size`` is set.
        TypeError
            The rows are not a tensor.
        """
        if self.size is not None:
            raise ValueError(f"{self!r} keeps a sample of the inputs of its fit: leave out size to use a bank")
        if not isinstance(rows, Tensor):
            raise TypeError(f"{self!r} takes a bank (n, D) as a tensor of float32, got {shown(rows)}")
        if rows.ndim != 2 or rows.dtype != torch.float32:
            raise ValueError(f"{self!r} takes a bank (n, D) of float32, got {rows.dtype} {tuple(rows.shape)}")
        for start in range(0, len(rows) if self.normalize else 0, _CHECKED_ROWS):
            lengths = torch.linalg.vector_norm(rows[start : start + _CHECKED_ROWS], dim=1)
            wrong = ~(((lengths - 1).abs() < 1e-3) | (lengths == 0))
            if wrong.any():
                row = int(wrong.nonzero()[0])
                raise ValueError(
                    f"row {start + row} of the bank of {self!r} has length {float(lengths[row]):.3g}: "
                    "divide each row by its length"
                )
        self.bank.rows = rows
        self._drop_fitted_state()
        return self

    def _partial_fit(self, features: Features) -> None:
        pooled = features.tensor("pooled")
        if isinstance(self.bank, Bank):
            self.bank.update(pooled, write_unit_rows if self.normalize else None)
        else:
            self.bank.update(single_unit_rows(pooled) if self.normalize else pooled)

    def _validate(self) -> None:
        rows, _ = self.bank_shape
        if rows < self.k:
            more = "raise size" if rows == self.size else "fit on more"
            raise ValueError(f"{self!r} has only {rows} inputs in its bank: {more}, or lower k")

    def _finalize(self) -> "Search":
        bank = self._centered(self.bank.rows).cpu().numpy()
        if self.recall is None or len(bank) < _MIN_INDEXED_ROWS:
            return Search(bank)
        return Index.reaching(self.recall, bank, self.k) or Search(bank)

    def _centered(self, rows: Tensor) -> Tensor:
        """Return rows minus the first of the bank: far from 0, ``||q||^2 - 2 q.b + ||b||^2`` loses its digits."""
        return rows if self.normalize else rows - self.bank.rows[0].to(rows.device)

    @property
    def bank_shape(self) -> tuple[int, int]:
        """Number of rows and width of the bank."""
        return len(self.bank.rows), self.bank.width

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """Return the squared distances to the nearest rows of the bank.

        Parameters
        ----------
        queries : features as in the bank, see `use_bank`, (m, D) float32.
        k : number of neighbors; at most those in the bank.

        Returns
        -------
        (m, k) on the CPU, in ascending order.
        """
        search: Search = self._fitted_state()
        k = min(k, len(search.bank))
        if queries.shape[0] == 0:
            return queries.new_empty(0, k)
        return torch.from_numpy(search.nearest(self._centered(queries).cpu().contiguous().numpy(), k))

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled").detach()
        rows, width = self.bank_shape
        self._same_width("pooled", pooled, width)
        if rows < self.k:
            self._validate()
        queries = (unit_rows(pooled) if self.normalize else pooled).float()
        # A graph that is being traced cannot call faiss: there the search is exact.
        tracing = torch.compiler.is_compiling()
        squared = self._traced(queries) if tracing else self.nearest(queries, self.k)[:, -1]
        # The expansion ||q||^2 - 2 q.b + ||b||^2 can end a rounding error below zero.
        squared = squared.clamp_min(0).to(pooled.device)
        return -(squared if self.squared else squared.sqrt())

    def _traced(self, queries: Tensor) -> Tensor:
        bank, queries = self._centered(self.bank.rows.float()), self._centered(queries)
        products = torch.addmm(bank.square().sum(1), queries, bank.T, alpha=-2)
        return products.topk(self.k, largest=False).values[:, -1] + queries.square().sum(1)


class NNGuide(Detector):
    """The energy times its mean over the nearest training inputs, by similarity (Park, Jung, Teoh, ICCV 2023).

    ``E(x) mean_i E_i <h / ||h||, h_i / ||h_i||>`` over the k training inputs of a bank with the largest
    ``E_i <h / ||h||, h_i / ||h_i||>``, where h is the pooled feature and ``E = logsumexp(l)``. As in the source,
    energies are used with their sign: a training input with a negative energy counts more if its direction is
    *unlike* that of x, and two negative factors make a positive score. The score is meant for models with positive
    energies.

    Parameters
    ----------
    k : number of training inputs.
    share
        Share of the training inputs in the bank, in (0, 1]. The bank has at least 1,000 inputs, or all if there
        are fewer, and does not depend on their order.

    Raises
    ------
    ValueError
        ``k`` is not a positive integer, or larger than the number of inputs in the bank; ``share`` is not in
        (0, 1].

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> NNGuide().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled", "logits")
    learns = ("pooled", "logits")
    source = "Park, Jung and Teoh, ICCV 2023"
    formula = (
        r"E(x) \cdot \frac{1}{k} \sum_{i} E_i \left\langle \frac{h}{\lVert h \rVert}, \frac{h_i}{\lVert "
        r"h_i \rVert} \right\rangle"
    )
    cost = "O(C + b D) for a bank of b inputs"
    standard = ("NNGuide()",)
    settings = table(k=Integer(1), share=Interval(0, 1, closed="right"))
    k: int
    share: float

    def __init__(self, k: int = 10, share: float = 0.01) -> None:
        super().__init__()
        self._set(k=k, share=share)
        self.bank = RowSample(_MIN_GUIDES, self.share)

    def _partial_fit(self, features: Features) -> None:
        rows = single_unit_rows(features.tensor("pooled"))
        self.bank.update(rows.mul_(_energy(features).to(rows)[:, None]))

    def _validate(self) -> None:
        if len(self.bank.rows) < self.k:
            raise ValueError(
                f"{self!r} has only {len(self.bank.rows)} inputs in its bank: fit on more, or lower k"
            )

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.bank.width)
        self._validate()
        queries = unit_rows(pooled).float().split(_QUERIES)
        guides = [(part @ self.bank.rows.T).topk(self.k).values.mean(1) for part in queries]
        return _energy(features) * torch.cat(guides)


def _energy(features: Features) -> Tensor:
    return features.tensor("logits").detach().double().logsumexp(1)


class Search:
    """An exact search.

    Parameters
    ----------
    bank : (n, D) float32.
    """

    def __init__(self, bank: np.ndarray) -> None:
        import faiss

        self.bank = np.ascontiguousarray(bank)
        self._longest: float | None = None
        # Below this product, faiss compares the queries with the bank one by one, not by products of matrices: by
        # its default, 64 queries of 768 features take five times as long.
        faiss.cvar.distance_compute_blas_threshold = min(faiss.cvar.distance_compute_blas_threshold, _MIN_PRODUCT)

    def nearest(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return the squared distances (m, k), ascending, of queries (m, D) to their nearest rows of the bank."""
        return self.neighbors(queries, k)[0]

    def neighbors(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared distances (m, k), ascending, of queries (m, D) to their nearest rows, and which."""
        import faiss

        if queries.size < _MIN_PRODUCT:
            return faiss.knn(queries, self.bank, k)
        # By a product, a small distance between long vectors has lost its digits: it selects candidates.
        found, rows = faiss.knn(queries, self.bank, min(k + _SPARE, len(self.bank)))
        distances, rows_of_nearest = self._sorted(queries, rows, k)
        if rows.shape[1] < len(self.bank):
            for i in np.flatnonzero(distances[:, -1] + self._rounding(queries) > found[:, -1]):
                everything = np.arange(len(self.bank))[None]
                distances[i], rows_of_nearest[i] = self._sorted(queries[i : i + 1], everything, k)
        return distances, rows_of_nearest

    def _rounding(self, queries: np.ndarray) -> np.ndarray:
        """Return a bound (m,) of the rounding errors of squared distances that a product of matrices gives."""
        if self._longest is None:
            self._longest = float(np.einsum("nd,nd->n", self.bank, self.bank).max())
        lengths = np.einsum("md,md->m", queries, queries) + self._longest
        bound: np.ndarray = 4 * math.sqrt(queries.shape[1]) * np.finfo(np.float32).eps * lengths
        return bound

    def _sorted(self, queries: np.ndarray, rows: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Return the squared distances (m, k), ascending, of queries to the nearest of rows (m, c), and which."""
        distances = self._distances(queries, rows)
        nearest = np.argsort(distances, 1, kind="stable")[:, :k]
        return np.take_along_axis(distances, nearest, 1), np.take_along_axis(rows, nearest, 1)

    def _distances(self, queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Return the squared distances (m, c) of queries to rows of the bank; infinity for the row -1."""
        import faiss

        distances = np.empty(rows.shape, np.float32)
        arrays = [faiss.swig_ptr(array) for array in (distances, queries, self.bank, rows)]
        faiss.fvec_L2sqr_by_idx(*arrays, queries.shape[1], *rows.shape)  # type: ignore[attr-defined]
        return distances


class Index(Search):
    """A search of some cells of the bank (Jegou et al., TPAMI 2011), in which a row is one bit per dimension.

    The bits (RaBitQ: Gao and Long, SIGMOD 2024) select candidates, whose exact distances are then computed.
    """

    # Training rows per cell, and rows of the bank that serve as queries to measure the recall.
    _ROWS_PER_CELL, _QUERIES = 64, 512
    # Candidates per neighbor: 4 are enough for the features of a ResNet-18; with fewer units, and so fewer bits,
    # more candidates save the search of more cells.
    _CANDIDATES = (4, 16)
    # Candidates of all queries that are processed at a time.
    _BLOCK = 1 << 22

    def __init__(self, bank: np.ndarray) -> None:
        import faiss

        super().__init__(bank)
        rows, width = bank.shape
        cells = round(2 * math.sqrt(rows))
        # The rotation spreads the information of few units over all, since one bit is kept per unit.
        self._index = faiss.index_factory(width, f"RR,IVF{cells},RaBitQfs")
        self.cells = faiss.extract_index_ivf(self._index)
        self.cells.cp.niter = 10
        self.candidates = self._CANDIDATES[0]
        self._index.train(_spaced(bank, self._ROWS_PER_CELL * cells))
        for start in range(0, rows, _CHECKED_ROWS):
            self._index.add(bank[start : start + _CHECKED_ROWS])

    @classmethod
    def reaching(cls, recall: float, bank: np.ndarray, k: int) -> Self | None:
        """Return an index that finds this share of the k nearest, or None if it would search too many cells."""
        index = cls(bank)
        queries = _spaced(bank, cls._QUERIES)
        # The nearest neighbor of a row of the bank is the row itself.
        k = min(k + 1, len(bank))
        _, nearest = Search(bank).neighbors(queries, k)
        true = np.sort(index._distances(queries, nearest), 1)
        index.cells.nprobe = 1
        while index.cells.nprobe <= index.cells.nlist // 4:
            for index.candidates in cls._CANDIDATES:
                found = index.nearest(queries, k)
                # Distances are compared, not rows: rows at equal distances are interchangeable.
                if (found[:, 1:] <= true[:, -1:]).mean() >= recall:
                    return index
            index.cells.nprobe *= 2
        return None

    def nearest(self, queries: np.ndarray, k: int) -> np.ndarray:
        """As `Search.nearest`, but a neighbor may be missed, and a farther one returned in its place."""
        candidates = min(self.candidates * k, len(self.bank))
        found = np.empty((len(queries), k), np.float32)
        block = max(1, self._BLOCK // candidates)
        for start in range(0, len(queries), block):
            some = queries[start : start + block]
            distances = self._distances(some, self._index.search(some, candidates)[1])
            found[start : start + block] = np.sort(np.partition(distances, k - 1, 1)[:, :k], 1)
        # The cells that were searched may hold fewer than k rows.
        short = np.isinf(found[:, -1])
        if short.any():
            found[short] = super().neighbors(queries[short], k)[0]
        return found

    def neighbors(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """As `Search.neighbors`, but a neighbor may be missed; the row is -1 where too few are found."""
        found = self._index.search(queries, min(self.candidates * k, len(self.bank)))[1]
        return self._sorted(queries, found, k)


def _spaced(rows: np.ndarray, count: int) -> np.ndarray:
    """Return ``count`` evenly spaced rows, or all if there are fewer."""
    if len(rows) <= count:
        return rows
    return rows[np.linspace(0, len(rows) - 1, count).astype(np.int64)]
