"""Verdicts on the parts of a unit: the positions or boxes of an image, or the frames of a clip.

Parts of one unit depend on each other, so that a thousand positions of ten images are ten observations and not ten
thousand. The assumption here is therefore that units are exchangeable: calibration images (or clips) and new ID
ones. Nothing is assumed of the parts within a unit.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featnorm._utils.checks import ScoreLike, as_score_tensor, min_scores, shown
from featnorm._utils.groups import check_groups
from featnorm._utils.weights import ExactModule
from featnorm.calibration import Calibration
from featnorm.features import Features
from featnorm.verdict import Verdict

__all__ = ["MAX_PARTS", "PartCalibration", "drawn_parts", "sampled_parts", "unit_scores"]

#: Largest number of parts per unit whose scores a calibration keeps, and whose features a detector is fitted to.
MAX_PARTS = 256

#: The unit of each part: its name, or an integer tensor or array.
Units: TypeAlias = Sequence[str] | Tensor | npt.NDArray[np.integer[Any]]

# More than the rounding of a sum of shares, and far less than a share itself.
_ROUNDING = 1e-9


def unit_scores(scores: Tensor, owners: Tensor, count: int, lowest: float) -> Tensor:
    """Score of each unit: the mean of the lowest scores of its parts.

    Parameters
    ----------
    scores : (n,) scores of the parts.
    owners : (n,) int64, index of the unit of each part.
    count : number of units.
    lowest
        Share of a unit's parts to average, in [0, 1], rounded up to at least one part: 0 is the lowest part alone,
        1 the mean of all.

    Returns
    -------
    Tensor
        (count,) float64; infinite for a unit without parts, which no part of it makes OOD.

    Examples
    --------
    >>> unit_scores(torch.tensor([3.0, 1.0, 2.0, 5.0]), torch.tensor([0, 0, 0, 1]), 3, lowest=0.5)
    tensor([1.5000, 5.0000,    inf], dtype=torch.float64)
    """
    scores = scores.to(torch.float64)
    order, ranks = _by_unit(scores.argsort(), owners, count)
    sizes = torch.bincount(owners, minlength=count)
    # Rounded up in decimal arithmetic: 0.1 of 30 parts are 3, although 0.1 * 30 > 3 in floating point.
    taken = (sizes * lowest - _ROUNDING).ceil().clamp(min=1).to(torch.int64)
    chosen = order[ranks < taken[owners[order]]]
    sums = scores.new_zeros(count).index_add(0, owners[chosen], scores[chosen])
    return torch.where(sizes > 0, sums / taken, math.inf)


class PartCalibration(ExactModule):
    """Threshold and p-values for the parts of units, from the scores of held-out ID units.

    Let F_j(s) be the share of the parts of unit j whose scores are at most s. With m units, the p-value of a part
    is ``(1 + sum_j F_j(s)) / (m + 1)``, and a part is ID exactly if its p-value is above ``1 - tpr``. In a new ID
    unit, the expected share of flagged parts is then at most ``1 - tpr``, whatever the parts of a unit have to do
    with each other and however many there are; equivalently, this bounds the probability that a part drawn at
    random from a new ID unit is flagged. The share varies from unit to unit: a few units may have most of the
    flagged parts.

    Of each unit at most `MAX_PARTS` scores are kept, drawn at random. The bound remains exact, because it holds
    for a random part of the new unit among as many drawn from it.

    `units` calibrates the score of a whole unit, see `unit_scores`: a `Calibration` with one score per unit.

    Source: Angelopoulos, Bates, Fisch, Lei and Schuster, "Conformal risk control", ICLR 2024, Theorem 1, with the
    share of flagged parts as the loss; Dunn, Wasserman and Ramdas, "Distribution-free prediction sets for
    two-layer hierarchical models", JASA 118, 2023.

    Parameters
    ----------
    id_scores
        (n,) scores of all parts of ID units that were used neither to train the model nor to fit the detector.
    units
        Unit of each part: n names, or an integer tensor or array (n,).
    tpr
        Share of the parts of a new ID unit to accept, and of new ID units, in (0, 1).
    lowest
        Share of a unit's parts whose mean is the score of the unit, in [0, 1]; see `unit_scores`.

    Attributes
    ----------
    scores : Tensor
        (k,) float64, the scores that were kept, in ascending order.
    owners : Tensor
        (k,) int64, index of the unit of each of `scores`.
    threshold : Tensor
        0-d float64; a part is ID if its score is at or above it.
    units : Calibration
        Threshold and p-values of whole units, in the order in which their parts came.

    Raises
    ------
    ValueError
        There are fewer units than ``tpr`` needs (19 at 0.95), there is not one unit per score, or scores are
        invalid.

    Examples
    --------
    >>> scores, images = torch.randn(2000), torch.arange(2000) // 50  # 40 images with 50 positions each
    >>> calibration = PartCalibration(scores, images, lowest=0.05)
    >>> p_value, is_id = calibration.predict(torch.randn(50))
    """

    scores: Tensor
    owners: Tensor
    unit_scores: Tensor
    threshold: Tensor
    _sums: Tensor
    #: Parts have no thresholds by group.
    group_names: tuple[str, ...] = ()

    def __init__(self, id_scores: ScoreLike, units: Units, tpr: float = 0.95, *, lowest: float) -> None:
        self._set(*drawn_parts(id_scores, units, lowest), tpr, lowest)

    def _set(self, scores: Tensor, owners: Tensor, of_units: Tensor, tpr: float, lowest: float) -> None:
        super().__init__()
        _check_enough(len(of_units), tpr)
        self.lowest = lowest
        self.units = Calibration(of_units, tpr)
        # In the order of the units, which `Calibration` sorts.
        self.register_buffer("unit_scores", of_units)
        scores, order = scores.sort(stable=True)
        owners = owners[order]
        weights = 1 / torch.bincount(owners, minlength=len(of_units)).to(torch.float64)
        sums = torch.cat([weights.new_zeros(1), weights[owners].cumsum(0)])
        at_most = torch.searchsorted(scores, scores, right=True)
        self._rank = int((sums[at_most] + 1 <= (1 - tpr + _ROUNDING) * (len(of_units) + 1)).sum()) + 1
        self.register_buffer("scores", scores)
        self.register_buffer("owners", owners)
        self.register_buffer("threshold", scores[self._rank - 1].clone())
        self.register_buffer("_sums", sums, persistent=False)

    @classmethod
    def from_state(
        cls, scores: Tensor, owners: Tensor, of_units: Tensor, tpr: float, lowest: float
    ) -> "PartCalibration":
        """Make a calibration again from `fitted_tensors` and `to_dict`, or from what `drawn_parts` returned.

        Raises
        ------
        ValueError, TypeError
            They are not those of a calibration.
        """
        scores = as_score_tensor(scores, "the scores").to(torch.float64)
        of_units = as_score_tensor(of_units, "the scores of units").to(scores)
        if owners.shape != scores.shape or owners.unique().tolist() != list(range(len(of_units))):
            raise ValueError("its parts are not those of its units")
        check_lowest(lowest)
        made = cls.__new__(cls)
        made._set(scores, owners.to(scores.device), of_units, tpr, lowest)
        return made

    @property
    def tpr(self) -> float:
        """Share of the parts of a new ID unit to accept, and of new ID units."""
        return self.units.tpr

    def with_tpr(self, tpr: float) -> "PartCalibration":
        """Return a calibration with the same scores for another share to accept.

        Raises
        ------
        ValueError
            There are too few units for it.
        """
        return self.from_state(self.scores, self.owners, self.unit_scores, tpr, self.lowest)

    def with_parts(self, scores: Tensor, owners: Tensor, of_units: Tensor) -> "PartCalibration":
        """Return a calibration with further units added, as `drawn_parts` returned them."""
        return self.from_state(
            torch.cat([self.scores, scores.to(self.scores)]),
            torch.cat([self.owners, owners.to(self.owners) + len(self.unit_scores)]),
            torch.cat([self.unit_scores, of_units.to(self.scores)]),
            self.tpr,
            self.lowest,
        )

    def p_value(self, scores: Tensor) -> Tensor:
        """P-values of the scores (k,) of parts, small for OOD: (k,) float64; see `predict`."""
        return self.predict(scores)[0]

    def is_id(self, scores: Tensor, groups: object = None) -> Tensor:
        """Whether each of the scores (k,) of parts is at or above the threshold: (k,) bool; see `predict`."""
        return self.predict(scores, groups)[1]

    def predict(self, scores: Tensor, groups: object = None) -> tuple[Tensor, Tensor]:
        """Return the p-values of the scores (k,) of parts, (k,) float64, and whether each part is ID, (k,) bool.

        Parameters
        ----------
        scores : (k,) scores of parts.
        groups : not allowed.

        Raises
        ------
        ValueError
            The scores are not one-dimensional or contain a NaN, or there are groups.
        """
        check_groups(groups, ())
        scores = as_score_tensor(scores, "scores", allow_empty=True).to(torch.float64)
        at_most = torch.searchsorted(self.scores.to(scores.device), scores.contiguous(), right=True)
        p_values = (1 + self._sums.to(scores.device)[at_most]) / (len(self.unit_scores) + 1)
        # A sum of shares ends in rounding errors, such as 0.8999999999999992.
        return p_values.round(decimals=12).clamp(max=1), at_most >= self._rank

    def predict_units(self, scores: Tensor, owners: Tensor, count: int) -> Verdict:
        """Return the verdicts on whole units, from the scores of their parts.

        Parameters
        ----------
        scores, owners, count : see `unit_scores`.
        """
        of_units = unit_scores(scores, owners, count, self.lowest)
        return Verdict(of_units, *self.units.predict(of_units), None)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain data."""
        return {"tpr": self.tpr, "groups": None, "lowest": self.lowest}

    def fitted_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that with `to_dict` make the calibration again."""
        return {"scores": self.scores, "owners": self.owners, "unit_scores": self.unit_scores}


def drawn_parts(scores: ScoreLike, units: Units, lowest: float, first: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Return what a `PartCalibration` keeps of some units: scores of parts, their owners, and scores of the units.

    At most `MAX_PARTS` parts of each unit are kept, drawn at random, independently between units.

    Parameters
    ----------
    scores, units, lowest : see `PartCalibration`.
    first : number of units that were drawn from before, which is the seed.

    Returns
    -------
    tuple of Tensor
        Scores (k,) float64, owners (k,) int64, and scores of the units (m,) float64, in the order in which their
        first parts come.

    Raises
    ------
    ValueError, TypeError
        See `PartCalibration`.
    """
    check_lowest(lowest)
    scores = as_score_tensor(scores, "id_scores").to(torch.float64)
    owners, count = _numbered(units, len(scores))
    owners = owners.to(scores.device)
    order = torch.randperm(len(owners), generator=torch.Generator().manual_seed(first)).to(owners.device)
    order, ranks = _by_unit(order, owners, count)
    kept = order[ranks < MAX_PARTS].sort().values
    return scores[kept], owners[kept], unit_scores(scores, owners, count, lowest)


def sampled_parts(batches: Iterable[Features], seed: int = 0) -> Iterator[Features]:
    """Yield features to fit a detector to: of each input at most `MAX_PARTS` parts, drawn at random.

    Neighboring parts resemble each other, so that all of them would cost time and teach a detector little more.
    Parts without a label are left out if others have one. Features with one row per input are yielded as they are.

    Parameters
    ----------
    batches : features as `featnorm.FeatureTap.stream` yields them.
    seed : seed of the draws.
    """
    generator = torch.Generator().manual_seed(seed)
    for features in batches:
        if features.parts is None:
            yield features
            continue
        order = torch.randperm(len(features), generator=generator).to(features.parts.owners.device)
        if features.labels is not None and bool((labeled := features.labels >= 0).any()):
            order = order[labeled[order]]
        order, ranks = _by_unit(order, features.parts.owners, features.parts.count)
        yield features[order[ranks < MAX_PARTS]]


def check_lowest(lowest: float) -> None:
    """Raise a ValueError if a share of lowest parts is outside [0, 1]."""
    if not isinstance(lowest, (int, float)) or not 0 <= lowest <= 1:
        raise ValueError(f"lowest must be a share between 0 and 1, got {lowest!r}")


def _by_unit(order: Tensor, owners: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Return an order of parts sorted by unit, and the rank of each within its unit, from 0."""
    order = order[owners[order].argsort(stable=True)]
    sizes = torch.bincount(owners[order], minlength=count)
    return order, torch.arange(len(order), device=owners.device) - (sizes.cumsum(0) - sizes)[owners[order]]


def _check_enough(count: int, tpr: float) -> None:
    if count < (needed := min_scores(tpr)):
        raise ValueError(
            f"{count} calibration images or clips are too few for tpr={tpr}: at least {needed} are needed, "
            "whatever the number of their positions, boxes or frames; add images or clips, or lower tpr"
        )


def _numbered(units: object, n: int) -> tuple[Tensor, int]:
    """Return the unit of each of n scores as an index (n,), numbered as they first occur, and their number."""
    if isinstance(units, Tensor):
        units = units.detach().cpu().numpy()
    if isinstance(units, Sequence) and not isinstance(units, str) and all(isinstance(one, str) for one in units):
        units = np.array(units, dtype=object)
    elif not isinstance(units, np.ndarray) or units.dtype.kind not in "iu":
        raise TypeError(f"units must be names or integers, one per score, got {shown(units)}")
    if units.shape != (n,):
        raise ValueError(f"units must have one entry per score, got shape {units.shape} for {n} scores")
    _, first, numbers = np.unique(units, return_index=True, return_inverse=True)
    return torch.from_numpy(first.argsort().argsort()[numbers]), len(first)
