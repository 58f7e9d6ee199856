"""Ranks within groups of calibration scores (Mondrian conformal), on arrays.

This module does not import torch, which takes seconds: `featnorm.archive` ranks scores without it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from featnorm._utils.checks import is_tensor, min_scores, shown, threshold_rank

Indices = npt.NDArray[np.int64]

# Number of groups that an error names.
_NAMED = 5


@dataclass(frozen=True)
class GroupRanks:
    """The calibration scores that each group is compared with, by their positions among all n scores.

    Scores that some group is compared with form a reference. Its positions are stored as keys: the position plus
    n + 1 times the number of the reference. The keys ascend, so that one binary search counts the scores of a
    reference that are no larger than a new score, given their number among all scores.

    Attributes
    ----------
    reference : (G,) the reference of each group.
    pools : for each reference, its groups (one, or those of a pool) in ascending order.
    keys : keys of all references, one reference after the other.
    starts : (R,) index in `keys` of the first key of each reference.
    sizes : (R,) number of scores of each reference.
    ranks : (R,) rank of the threshold among the scores of each reference, from 1.
    thresholds : (G,) position of the threshold of each group.
    """

    reference: Indices
    pools: list[Indices]
    keys: Indices
    starts: Indices
    sizes: Indices
    ranks: Indices
    thresholds: Indices

    @classmethod
    def of(cls, members: Indices, count: int, tpr: float) -> "GroupRanks":
        """Rank scores by group.

        Parameters
        ----------
        members : (n,) group of each score, with the scores in ascending order.
        count : number of groups.
        tpr : share of new ID inputs to accept in each group, in (0, 1).

        Raises
        ------
        ValueError
            There are too few scores for ``tpr``, all groups together.
        """
        n = len(members)
        threshold_rank(n, tpr)  # raises if there are too few
        numbers: dict[bytes, int] = {}
        pools: list[Indices] = []
        reference = np.empty(count, np.int64)
        ends = np.bincount(members, minlength=count).cumsum()
        for group, pool in enumerate(_pools(np.diff(ends, prepend=0), min_scores(tpr))):
            reference[group] = number = numbers.setdefault(pool.tobytes(), len(pools))
            if number == len(pools):
                pools.append(pool)
        by_group = np.split(np.argsort(members, kind="stable"), ends[:-1])
        positions = [np.sort(np.concatenate([by_group[group] for group in pool])) for pool in pools]
        sizes = np.array([len(of_one) for of_one in positions])
        keys = np.concatenate([number * (n + 1) + of_one for number, of_one in enumerate(positions)])
        ranks = np.array([threshold_rank(size, tpr) for size in sizes.tolist()])
        thresholds = np.array([of_one[rank - 1] for of_one, rank in zip(positions, ranks.tolist(), strict=True)])
        return cls(reference, pools, keys, sizes.cumsum() - sizes, sizes, ranks, thresholds[reference])


def _pools(sizes: Indices, needed: int) -> list[Indices]:
    """Return the groups whose scores each group is compared with: its own, or those of the pool of small groups.

    A new input counts as a member of its group when the small groups are chosen. The choice is then the same
    whichever of these inputs is the new one, and therefore the pool as a whole has the stated rate. The same is
    true of a pool that another group joins, unless the pool has, with the new input, exactly as many inputs as are
    needed: they then have at most twice the rate.

    Parameters
    ----------
    sizes : (G,) number of scores of each group, 0 or more.
    needed : smallest number of scores that a threshold can be set by.
    """
    pools = []
    for group in range(len(sizes)):
        counts = sizes.copy()
        counts[group] += 1
        pooled = counts <= needed
        if counts[pooled].any() and sizes[pooled].sum() < needed:  # the smallest of the other groups joins
            pooled[np.where(pooled, counts.sum(), counts).argmin()] = True
        pools.append(np.flatnonzero(pooled) if pooled[group] else np.array([group]))
    return pools


def names_of_groups(groups: object, names: Sequence[str] | None) -> tuple[str, ...]:
    """Return the names of all groups: those given, or else those that occur, sorted.

    Raises
    ------
    TypeError
        The groups are numbers and there are no names, or a name is not a string.
    ValueError
        A name is given twice.
    """
    if names is None:
        names = sorted(set(_strings(groups, "groups")))
    unique = set(_strings(names, "group_names"))
    if len(unique) < len(names):
        twice = next(name for i, name in enumerate(names) if name in names[:i])
        raise ValueError(f"group_names has {twice!r} twice: each group needs a name of its own")
    return tuple(names)


def members_of_groups(groups: object, names: tuple[str, ...], n: int) -> Indices:
    """Return the group of each of n scores, (n,) indices of names.

    Parameters
    ----------
    groups : their names, or an integer tensor or array of their indices in ``names``.
    names : names of all groups.
    n : number of scores.

    Raises
    ------
    TypeError
        The groups are neither strings nor integers.
    ValueError
        Their number is not n, or a group has none of the names.
    """
    if is_tensor(groups):
        groups = groups.detach().cpu().numpy()
    if isinstance(groups, np.ndarray) and groups.dtype.kind in "iu":
        members = groups.astype(np.int64)
        wrong = (members < 0) | (members >= len(names))
        unknown = [members[wrong][0], wrong.tolist().index(True)] if wrong.any() else None
    else:
        indices = {name: index for index, name in enumerate(names)}
        found = [indices.get(name, -1) for name in _strings(groups, "groups")]
        members = np.array(found, np.int64)
        unknown = [repr(groups[found.index(-1)]), found.index(-1)] if -1 in found else None  # type: ignore[index]
    if members.shape != (n,):
        raise ValueError(f"groups must have one entry per score, got shape {members.shape} for {n} scores")
    if unknown is not None:
        raise ValueError(
            f"group {unknown[0]} (index {unknown[1]}) was not in the calibration, whose groups are "
            f"{_listed(names)}: calibrate with inputs of that group, or correct its name"
        )
    return members


def check_groups(groups: object, names: Sequence[str]) -> None:
    """Raise a ValueError if groups are missing, or given to a calibration that has no groups, and so no names."""
    if groups is None and names:
        raise ValueError(f"this calibration has groups ({_listed(names)}): pass the group of each score")
    if groups is not None and not names:
        raise ValueError("this calibration has no groups: calibrate with groups, or pass none")


def _listed(names: Sequence[str]) -> str:
    """Return the first names, and the number of the others."""
    others = len(names) - _NAMED
    return ", ".join(map(repr, names[:_NAMED])) + (f" and {others} more" if others > 0 else "")


def _strings(values: object, name: str) -> Sequence[str]:
    """Return a sequence of strings; a TypeError if the values are anything else."""
    if isinstance(values, np.ndarray) and values.ndim == 1:
        values = values.tolist()
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name} must be a sequence of strings, got {shown(values)}")
    for index, value in enumerate(values):
        if not isinstance(value, str):
            raise TypeError(f"{name} must be a sequence of strings, got {shown(value)} at index {index}")
    return values
