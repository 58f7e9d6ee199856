"""KNN's bank in parts, for one that is too large to lie in every worker."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from featnorm.detectors import KNN


class BankPart:
    """Some rows of a bank, in a process of its own.

    Parameters
    ----------
    rows : (n, D) float32, of unit length.
    k, recall : of the whole bank's `featnorm.KNN`.
    """

    def __init__(self, rows: np.ndarray, k: int, recall: float | None) -> None:
        self._knn = KNN(k, recall=recall).use_bank(torch.from_numpy(np.array(rows)))

    def nearest(self, queries: np.ndarray, k: int) -> np.ndarray:
        """Return the squared distances (m, k) of queries (m, D) to the nearest rows, or to all where fewer."""
        return self._knn.nearest(torch.from_numpy(np.array(queries)), k).numpy()


class ShardedKNN(KNN):
    """`featnorm.KNN` whose bank lies in the parts that other processes hold.

    Parameters
    ----------
    like : the detector whose settings and bank it has.
    parts : handles of `BankPart` actors, which together hold the bank.
    """

    def __init__(self, like: KNN, parts: Sequence[Any]) -> None:
        super().__init__(like.k, like.squared, like.recall)
        self.parts = list(parts)
        self.shape = like.bank_shape

    def __repr__(self) -> str:
        return repr(KNN(self.k, self.squared, self.recall))

    @property
    def is_fitted(self) -> bool:
        """Always: a bank lies in parts once it is whole."""
        return True

    @property
    def bank_shape(self) -> tuple[int, int]:
        """Rows and width of the bank."""
        return self.shape

    def nearest(self, queries: Tensor, k: int) -> Tensor:
        """See `featnorm.KNN.nearest`: the nearest of the bank are the nearest of each part's nearest."""
        import ray

        asked = queries.cpu().numpy()
        found = ray.get([part.nearest.remote(asked, k) for part in self.parts])
        return torch.from_numpy(np.concatenate(found, 1)).topk(k, largest=False).values
