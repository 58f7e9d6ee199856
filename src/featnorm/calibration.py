"""From scores to verdicts with a stated error rate: thresholds, conformal p-values, false discovery rate.

Everything here rests on one assumption: calibration inputs and new ID inputs are exchangeable (for instance,
independent draws from one distribution), and no calibration input was used to train the model or to fit the
detector. The stated rates then hold at every sample size and for every distribution of the scores, on average over
calibration sets. Higher scores mean more in-distribution (ID).

Calibration scores have shape (n,). They may be a tensor on any device, a numpy array or a sequence, of any integer
or floating-point type; infinite scores are valid. All functions raise a `TypeError` for values that are not real
numbers and a `ValueError` for values that are not one-dimensional or contain a NaN; the error names the argument
and the index of the first NaN.
"""

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from featnorm._utils.checks import ScoreLike, as_p_values, as_score_tensor, check_share, threshold_rank
from featnorm._utils.groups import GroupRanks, check_groups, members_of_groups, names_of_groups
from featnorm._utils.weights import ExactModule

__all__ = ["Calibration", "are_repeats", "benjamini_hochberg", "conformal_p_values", "threshold_at_tpr"]

#: The group of each score: its name, or an integer tensor or array of its index.
Groups: TypeAlias = Sequence[str] | Tensor | npt.NDArray[np.integer[Any]]

# Number of scores up to which each is looked up by itself: operations on tensors have a fixed cost.
_FEW_SCORES = 16
# Number of scores from which repeats are recognized, that among more scores, and maximum distance between two
# scores of one item, relative to the range of all.
_MIN_REPEATS, _MIN_PART, _ROUNDING = 4, 8, 1e-4
# Share of the distinct scores that a single item has, from which an equal score is that of the same item.
_UNTIED = 0.9
_LOOKED_UP = ("reference", "keys", "starts", "sizes", "ranks")


def threshold_at_tpr(id_scores: ScoreLike, tpr: float = 0.95) -> float:
    """Largest threshold that accepts a new ID input with probability at least ``tpr``.

    With ``alpha = 1 - tpr`` it is the k-th smallest of the n scores, ``k = floor(alpha (n + 1))``: a new,
    exchangeable score is equally likely to take each of the n + 1 ranks, and is below the threshold only in the k
    lowest. The plain quantile accepts ``tpr`` of the n calibration scores, but fewer of the new ones.

    Source: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005; Bates et al.,
    "Testing for outliers with conformal p-values", Annals of Statistics 51(1), 2023.

    Parameters
    ----------
    id_scores
        (n,) scores of ID inputs that were used neither to train the model nor to fit the detector.
    tpr
        Share of ID inputs to accept, in (0, 1).

    Returns
    -------
    float
        The threshold, one of the scores; an input is ID if ``score >= threshold``.

    Raises
    ------
    ValueError
        ``tpr`` is outside (0, 1), there are too few scores for it (19 are needed at 0.95, 99 at 0.99), or the
        scores are empty or invalid (see the module's description).

    Examples
    --------
    >>> threshold_at_tpr(torch.arange(1.0, 100), 0.95)
    5.0
    """
    scores = as_score_tensor(id_scores, "id_scores")
    return float(scores.kthvalue(threshold_rank(len(scores), tpr)).values)


def conformal_p_values(calibration_scores: ScoreLike, scores: Tensor) -> Tensor:
    """P-values of the hypothesis that an input is ID: ``(1 + #{calibration <= score}) / (n + 1)``.

    A small p-value is evidence for OOD. For an ID input, ``P(p <= u) <= u`` at every u: flagging inputs with
    ``p <= u`` raises a false alarm for at most a share u of ID inputs.

    Source: Bates et al., "Testing for outliers with conformal p-values", Annals of Statistics 51(1), 2023.

    Parameters
    ----------
    calibration_scores
        (n,) scores of ID inputs that were used neither to train the model nor to fit the detector, n >= 1.
    scores
        (m,) scores of new inputs; m = 0 is valid.

    Returns
    -------
    Tensor
        (m,) float64 in [1 / (n + 1), 1], on the device of ``scores``.

    Raises
    ------
    ValueError
        There is no calibration score, or scores are invalid (see the module's description).

    Examples
    --------
    >>> conformal_p_values(torch.arange(1.0, 100), torch.tensor([50.0, 2.0]))
    tensor([0.5100, 0.0300], dtype=torch.float64)
    """
    calibration = _sorted(calibration_scores, "calibration_scores")
    return _p_values(_count_at_most(calibration, _batch(scores)), len(calibration))


def benjamini_hochberg(p_values: ScoreLike, fdr: float = 0.05) -> Tensor:
    """Which inputs of a batch to flag so that, in expectation, at most a share ``fdr`` of the flagged is ID.

    The inputs of the k smallest p-values are flagged, for the largest k with ``p_(k) <= fdr k / m``. A fixed
    threshold bounds the share of false alarms among ID inputs; this procedure bounds it among alarms.

    Source: Benjamini and Hochberg, "Controlling the false discovery rate", JRSS B 57(1), 1995. Conformal
    p-values share their calibration set and so are dependent, but positively (PRDS), so that the procedure remains
    valid: proved by Bates et al., "Testing for outliers with conformal p-values", Annals of
    Statistics 51(1), 2023.

    Parameters
    ----------
    p_values
        (m,) p-values in [0, 1], such as those of `conformal_p_values`; m = 0 is valid.
    fdr
        False-discovery rate, in (0, 1).

    Returns
    -------
    Tensor
        (m,) bool, True where the input is flagged, on the device of ``p_values``.

    Raises
    ------
    ValueError
        ``fdr`` is outside (0, 1), or p-values are outside [0, 1] or invalid (see the module's description).

    Examples
    --------
    >>> benjamini_hochberg(torch.tensor([0.001, 0.02, 0.5, 0.9]))
    tensor([ True,  True, False, False])
    """
    check_share(fdr, "fdr")
    p = as_p_values(p_values, "p_values")
    if p.numel() == 0:
        return torch.zeros_like(p, dtype=torch.bool)
    ordered = p.sort().values
    # Conformal p-values lie on a grid, so p_(k) = fdr k / m is common, and rounding must not decide it.
    limit = fdr * (1 + 1e-12) / len(p) * torch.arange(1, len(p) + 1, dtype=p.dtype, device=p.device)
    return p <= torch.where(ordered <= limit, ordered, -1.0).max()


def are_repeats(earlier: ScoreLike, added: ScoreLike) -> bool:
    """Whether all scores that are added to a calibration are of items that it has already.

    Another engine or batch size changes the score of an item by rounding. If as many scores are added as there
    were, both are compared in ascending order: new items differ by the sampling error, far above rounding.
    Otherwise each added score is compared with the two earlier scores around it. A new item's distance to the
    nearer one is a quarter of the gap between the two, on average; repeats must have less than a tenth of the gap.
    Scores that several earlier items have in common say nothing here, nor do equal scores of a detector with few
    values.

    Parameters
    ----------
    earlier, added
        (n,) and (m,) scores.

    Returns
    -------
    bool
        Whether they are repeats. Fewer than four are not recognized, nor fewer than eight among more scores.

    Examples
    --------
    >>> scores = torch.randn(100, generator=torch.Generator().manual_seed(0))
    >>> are_repeats(scores, scores[:50] + 1e-6), are_repeats(scores, scores[:50] + 0.1)
    (True, False)
    """
    before, after = (_sorted(scores, "scores").cpu().numpy() for scores in (earlier, added))
    known, counts = np.unique(before[np.isfinite(before)], return_counts=True)
    if min(len(known), len(after)) < _MIN_REPEATS:
        return False
    if len(before) == len(after):
        differ = before != after  # and not the infinite ones
        spread = np.subtract(*np.quantile(before[np.isfinite(before)], (0.9, 0.1)))
        return bool(abs(before[differ] - after[differ]).sum() <= 0.05 * spread * math.sqrt(len(after)))
    if len(after) < _MIN_PART:
        return False
    above = np.searchsorted(known, after).clip(1, len(known) - 1)
    gaps = known[above] - known[above - 1]
    nearest = above - (after - known[above - 1] < known[above] - after)
    distances = abs(after - known[nearest])
    telling = (distances > 0) | ((counts[nearest] == 1) & ((counts == 1).mean() > _UNTIED))
    if 2 * telling.sum() < len(after) or distances.max() > _ROUNDING * (known[-1] - known[0]):
        return False
    # A single wide gap does not outweigh the others.
    weights = np.minimum(gaps, np.median(gaps))
    return bool((weights * distances / gaps)[telling].sum() <= 0.1 * weights[telling].sum())


class Calibration(ExactModule):
    """Threshold and p-values from the scores of held-out ID inputs, for all inputs alike or per group.

    The two agree: an input is ID exactly if its p-value is above ``1 - tpr`` in decimal arithmetic (at ``tpr=0.9``
    compare with 0.1; ``1 - 0.9`` is slightly less in floating point).

    With groups (cameras, sites, predicted classes), a score is compared with the calibration scores of its own
    group, and the stated rate holds in each group (Mondrian conformal prediction). Without them, all false alarms
    may come from one camera. The group of an input is known before the input is scored, or is the output of a
    model that was trained without the calibration inputs.

    A threshold needs at least 19 scores at 0.95, and 99 at 0.99. The groups with fewer, or with none, form one
    pool: an input of such a group is compared with the scores of all of them, and with those of groups that have
    exactly as many as are needed (which have thresholds of their own, too). If all these are too few, the smallest
    other group joins the pool. The rate then holds for the inputs of the pool as a whole, and not for each of its
    groups. It follows that the rate also holds for all inputs together.

    Scores and threshold are float64 buffers. They stay float64 if a surrounding module is cast to another type,
    because rounded scores would void the stated rate. To restore a calibration from a state dict, construct it
    from the stored ``scores`` and ``members``, and from what `to_dict` returns, which is not part of the state.

    Source: Vovk, Gammerman and Shafer, "Algorithmic learning in a random world", 2005, section 4.5.

    Parameters
    ----------
    id_scores
        (n,) scores of ID inputs that were used neither to train the model nor to fit the detector.
    tpr
        Share of new ID inputs to accept, in (0, 1).
    groups
        Group of each score: n names, or an integer tensor or array (n,) of indices in ``group_names``.
        Default: no groups.
    group_names
        Names of all groups that new inputs may have, such as the classes of a classifier, whether or not a
        calibration input has them. Default: the groups of the calibration inputs, sorted.

    Attributes
    ----------
    scores : Tensor
        (n,) float64, the calibration scores in ascending order.
    members : Tensor or None
        (n,) int64, index in `group_names` of the group of each of `scores`; None without groups.
    threshold : Tensor
        float64: 0-d without groups, (G,) with groups, in the order of `group_names`; see `threshold_at_tpr`.
    tpr : float
        Share of new ID inputs to accept; read-only, because the threshold depends on it.
    group_names : tuple of str
        Names of the groups; empty without groups.

    Raises
    ------
    ValueError
        See `threshold_at_tpr`; or there is not one group per score, or a group is not among ``group_names``.
    TypeError
        The groups are neither strings nor indices.

    Examples
    --------
    >>> calibration = Calibration(torch.arange(1.0, 100), tpr=0.95)
    >>> p_value, is_id = calibration.predict(torch.tensor([50.0, 2.0]))
    >>> p_value, is_id
    (tensor([0.5100, 0.0300], dtype=torch.float64), tensor([ True, False]))
    """

    scores: Tensor
    members: Tensor | None
    threshold: Tensor

    def __init__(
        self,
        id_scores: ScoreLike,
        tpr: float = 0.95,
        groups: Groups | None = None,
        group_names: Sequence[str] | None = None,
    ) -> None:
        super().__init__()
        scores, order = as_score_tensor(id_scores, "id_scores").to(torch.float64).sort()
        self._tpr = tpr
        self._rank = threshold_rank(len(scores), tpr)
        self.register_buffer("scores", scores)
        self._view: tuple[Tensor, memoryview] | None = None
        self.group_names: tuple[str, ...] = ()
        if groups is None:
            self.members = None
            self.register_buffer("threshold", scores[self._rank - 1].clone())
            return
        self.group_names = names_of_groups(groups, group_names)
        members = members_of_groups(groups, self.group_names, len(scores))[order.cpu().numpy()]
        self._groups = GroupRanks.of(members, len(self.group_names), tpr)
        self.register_buffer("members", torch.from_numpy(members).to(scores.device))
        self.register_buffer("threshold", scores[torch.from_numpy(self._groups.thresholds).to(scores.device)])
        # What `predict` looks up, on the device of the scores.
        for name in _LOOKED_UP:
            table = torch.from_numpy(getattr(self._groups, name)).to(scores.device)
            self.register_buffer(f"_{name}", table, persistent=False)

    @property
    def tpr(self) -> float:
        """Share of new ID inputs to accept."""
        return self._tpr

    def with_tpr(self, tpr: float) -> "Calibration":
        """Return a calibration with the same scores and groups for another share of ID inputs to accept.

        Raises
        ------
        ValueError
            See `threshold_at_tpr`.
        """
        return Calibration(self.scores, tpr, self.members, self.group_names or None)

    def with_scores(self, id_scores: ScoreLike, groups: Groups | None = None) -> "Calibration":
        """Return a calibration with the scores of further inputs added.

        Parameters
        ----------
        id_scores : (m,) scores of further ID inputs, as for the constructor.
        groups : their groups, if the calibration has groups; new names are appended to `group_names`.

        Raises
        ------
        ValueError, TypeError
            See `Calibration` and `predict`.
        """
        added = as_score_tensor(id_scores, "id_scores").to(self.scores)
        check_groups(groups, self.group_names)
        scores = torch.cat([self.scores, added])
        if self.members is None or groups is None:
            return Calibration(scores, self.tpr)
        names = list(self.group_names)
        if not isinstance(groups, (Tensor, np.ndarray)):
            names += [name for name in names_of_groups(groups, None) if name not in set(names)]
        members = torch.from_numpy(members_of_groups(groups, tuple(names), len(added)))
        return Calibration(scores, self.tpr, torch.cat([self.members.cpu(), members]), names)

    def p_value(self, scores: Tensor, groups: Groups | None = None) -> Tensor:
        """P-values of (m,) scores, small for OOD: (m,) float64; see `conformal_p_values` and `predict`."""
        return self.predict(scores, groups)[0]

    def is_id(self, scores: Tensor, groups: Groups | None = None) -> Tensor:
        """Whether each of (m,) scores is at or above the threshold: (m,) bool, True for ID; see `predict`."""
        return self.predict(scores, groups)[1]

    def predict(self, scores: Tensor, groups: Groups | None = None) -> tuple[Tensor, Tensor]:
        """Return the p-values of (m,) scores, and whether each is at or above the threshold, by one look-up.

        Parameters
        ----------
        scores : (m,) scores of new inputs.
        groups : group of each, as for the constructor; required with groups, and not allowed without.

        Raises
        ------
        ValueError
            The scores are not one-dimensional or contain a NaN; groups are missing, or were not in the
            calibration.
        """
        check_groups(groups, self.group_names)
        # The threshold is the k-th smallest: a score is at or above it if at least k of the scores are no larger.
        if groups is None and (values := _few(scores)) is not None:
            reference = self._ascending()
            counts = [bisect_right(reference, value) for value in values]
            p_values = np.array([(1 + count) / (len(reference) + 1) for count in counts])
            are_id = np.array([count >= self._rank for count in counts])
            return torch.from_numpy(p_values), torch.from_numpy(are_id)
        scores = _batch(scores)
        at_most = _count_at_most(self.scores, scores)
        if groups is None:
            return _p_values(at_most, len(self.scores)), at_most >= self._rank
        members = torch.from_numpy(members_of_groups(groups, self.group_names, len(scores)))
        reference, keys, starts, sizes, ranks = (
            getattr(self, f"_{name}").to(scores.device) for name in _LOOKED_UP
        )
        number = reference[members.to(scores.device)]
        at_most = torch.searchsorted(keys, number * (len(self.scores) + 1) + at_most) - starts[number]
        return _p_values(at_most, sizes[number]), at_most >= ranks[number]

    def _ascending(self) -> memoryview:
        """Return the calibration scores, in the memory of the buffer."""
        scores = self.scores
        if self._view is None or self._view[0] is not scores:
            self._view = scores, memoryview(scores.detach().cpu().numpy())  # type: ignore[arg-type]
        return self._view[1]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_view": None}  # a copy has memory of its own

    def false_alarm_range(self, confidence: float = 0.9, group: str | None = None) -> tuple[float, float]:
        """Bounds of the share of new ID inputs that this threshold flags.

        On average over calibration sets the share is at most ``1 - tpr``. For the n scores at hand it has a
        Beta(k, n + 1 - k) distribution, where k is the rank of the threshold, if there are no ties (with ties it
        is lower). The bounds are the central interval of this distribution.

        Source: Vovk, "Conditional validity of inductive conformal predictors", ACML 2012.

        Parameters
        ----------
        confidence
            Probability that the share lies within the bounds, in (0, 1).
        group
            Group whose threshold is meant; required with groups. Of a pool, the share is that of all its inputs.

        Raises
        ------
        ValueError
            ``confidence`` is outside (0, 1), or the group is missing or was not in the calibration.
        """
        from scipy.stats import beta

        check_share(confidence, "confidence")
        check_groups(group, self.group_names)
        n, k = len(self.scores), self._rank
        if group is not None:
            number = self._groups.reference[members_of_groups([group], self.group_names, 1)[0]]
            n, k = int(self._groups.sizes[number]), int(self._groups.ranks[number])
        low, high = beta.ppf([(1 - confidence) / 2, (1 + confidence) / 2], k, n + 1 - k)
        return float(low), float(high)

    def group_sizes(self) -> dict[str, int]:
        """Number of calibration scores of each group."""
        if self.members is None:
            return {}
        counts = torch.bincount(self.members, minlength=len(self.group_names))
        return dict(zip(self.group_names, counts.tolist(), strict=True))

    def pool(self, group: str) -> tuple[str, ...]:
        """Names of the groups whose scores those of a group are compared with: itself alone, or a pool.

        Raises
        ------
        ValueError
            The group was not in the calibration.
        """
        check_groups(group, self.group_names)
        index = members_of_groups([group], self.group_names, 1)[0]
        return tuple(self.group_names[i] for i in self._groups.pools[self._groups.reference[index]])

    def compared(self) -> tuple[Tensor, Tensor]:
        """Return which of the n scores each of G groups is compared with, (G, n) bool, and their ranks (G,).

        An input of a group is ID if at least as many as the rank of these scores are no larger than its own.
        Without groups, G is 1.
        """
        if self.members is None:
            rows, ranks = torch.ones(1, len(self.scores), dtype=torch.bool), [self._rank]
        else:
            members = self.members.cpu()
            pools = [torch.from_numpy(self._groups.pools[number]) for number in self._groups.reference]
            rows = torch.stack([torch.isin(members, pool) for pool in pools])
            ranks = self._groups.ranks[self._groups.reference].tolist()
        return rows.to(self.scores.device), torch.tensor(ranks, device=self.scores.device)

    def to_dict(self) -> dict[str, Any]:
        """Return everything but tensors as plain data: the share to accept, and the names of the groups."""
        return {"tpr": self.tpr, "groups": list(self.group_names) or None}

    def fitted_tensors(self) -> dict[str, Tensor]:
        """Return the scores and, with groups, their members, which with `to_dict` make the calibration again."""
        return {"scores": self.scores} | ({} if self.members is None else {"members": self.members})


def _sorted(scores: ScoreLike, name: str) -> Tensor:
    return as_score_tensor(scores, name).to(torch.float64).sort().values


def _count_at_most(calibration: Tensor, scores: Tensor) -> Tensor:
    """Number of the calibration scores, in ascending order, that are no larger than each score."""
    return torch.searchsorted(calibration.to(scores.device), scores.contiguous(), right=True)


def _p_values(at_most: Tensor, n: int | Tensor) -> Tensor:
    """Conformal p-values, from the number of the n calibration scores that are no larger."""
    return (1 + at_most).to(torch.float64) / (n + 1)


def _few(scores: object) -> list[float] | None:
    """Return scores as numbers if they are few, on the CPU and valid; None otherwise."""
    if not isinstance(scores, Tensor) or scores.dtype not in (torch.float32, torch.float64) or scores.ndim != 1:
        return None
    if not (scores.is_cpu and 0 < scores.shape[0] <= _FEW_SCORES):
        return None
    values: list[float] = scores.tolist()
    return None if any(map(math.isnan, values)) else values


def _batch(scores: Tensor) -> Tensor:
    """New scores, in the precision of the calibration scores."""
    return as_score_tensor(scores, "scores", allow_empty=True).to(torch.float64)
