"""The fixed calibration scores of a `featnorm.Jackknife`. This module does not import torch."""

import numpy as np
import numpy.typing as npt


def rank_scores(count: int) -> npt.NDArray[np.float64]:
    """Return the calibration scores (J,) of a jackknife with J left-out inputs: the first J of 1, 1, 2, 2, ..."""
    return np.arange(2.0, count + 2) // 2


def are_ranks(scores: npt.NDArray[np.float64]) -> bool:
    """Return whether calibration scores (n,), in ascending order, are the fixed ones and not scores of inputs."""
    # One or two scores may be these by chance.
    return len(scores) > 2 and np.array_equal(scores, rank_scores(len(scores)))


def shown_scores(scores: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the calibration scores (n,) that a page compares scores with.

    These are the scores themselves, or 1, 2, ..., J for a jackknife, whose scores count the left-out inputs that
    score no higher.
    """
    return np.arange(1.0, len(scores) + 1) if are_ranks(scores) else scores
