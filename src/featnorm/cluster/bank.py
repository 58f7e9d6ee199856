"""KNN with a bank that is split over processes, for banks too large to copy."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featnorm.detectors import KNN, parse_detector


class BankPart:
    """Some rows of a bank, for a process of its own.

    Parameters
    ----------
    rows : rows as in `featnorm.KNN.use_bank`, (n, D) float32.
    expression : expression of the `featnorm.KNN` of the whole bank.
    """

    def __init__(self, rows: np.ndarray, expression: str) -> None:
        knn = parse_detector(expression)
        assert isinstance(knn, KNN)
        self._knn = knn.use_bank(torch.from_numpy(np.array(rows)))

    def nearest(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return the squared distances (m, k) of queries (m, D) to the nearest rows, or to all if fewer."""
        return self._knn.nearest(torch.from_numpy(np.array(queries)), k).numpy()


class ShardedKNN(KNN, registered=False):
    """`featnorm.KNN` with a bank that is split over other processes.

    Parameters
    ----------
    like : detector with the same settings and the whole bank.
    parts : handles of the `BankPart` actors that together have the bank.
    """

    def __init__(self, like: KNN, parts: Sequence[Any]) -> None:
        super().__init__(like.k, like.squared, like.recall, like.normalize, like.size)
        self.parts = list(parts)
        self.shape = like.bank_shape

    def __repr__(self) -> str:
        return repr(KNN(self.k, self.squared, self.recall, self.normalize, self.size))

    @property
    def is_fitted(self) -> bool:
        """Always true: a bank is split after the fit."""
        return True

    @property
    def bank_shape(self) -> tuple[int, int]:
        """Number of rows and width of the bank."""
        return self.shape

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """See `featnorm.KNN.nearest`: the nearest rows of the bank are among the nearest of each part."""
        import ray

        rows = queries.cpu().numpy()
        found = ray.get([part.nearest.remote(rows, k) for part in self.parts])
        return torch.from_numpy(np.concatenate(found, 1)).topk(k, largest=False).values
