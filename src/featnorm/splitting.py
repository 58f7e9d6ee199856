"""The split between inputs to fit on and inputs to calibrate on, which keeps near-duplicates on one side.

Calibration assumes that its inputs are exchangeable with new ones. Frames of one clip, bursts and re-encoded
copies are not: if some are fitted on, the others look more familiar than new inputs do, and new inputs are flagged
more often than stated.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components, minimum_spanning_tree
from torch import Tensor

from featnorm._utils.checks import min_scores
from featnorm.detectors.held_out import MAX_HELD_OUT
from featnorm.detectors.neighbors import Index, Search
from featnorm.detectors.statistics import single_unit_rows

#: One group in five is held out for calibration.
HELD_OUT = 5
#: Number of held-out groups that the constants of a detector need.
MIN_CONSTANTS = 10
# One held-out group in this number is for constants.
_CONSTANTS = 4
# How much farther the nearest other input is, at least, from a group than its members are from each other
# (squared), and the number of groups that may look isolated by chance.
_ISOLATION, _BY_CHANCE = 1.5, 0.05
# A group of more inputs is a kind of input, and not near-duplicates: one input in this number, and this number.
_MAX_SHARE, _MAX_GROUP = 20, 1000
# Neighbors of each input that are searched first.
_NEIGHBORS = 16
# More inputs than this are searched by an approximate index, in some of its cells.
_MAX_EXACT, _CELLS = 1 << 15, 16
# So that the isolation of equal inputs stays finite.
_MAX_EXPONENT = 50.0
# Pairs of neighbors that are searched at a time.
_PAIRS = 1 << 18

_Array = npt.NDArray[Any]


def near_duplicates(values: Tensor, labels: Tensor | None = None) -> Tensor:
    """Find groups of near-duplicates, such as the frames of a clip, by their features.

    Inputs are clustered by single linkage, by the squared distance of their features, scaled to unit length. A
    group is a cluster that is isolated: its distance to the nearest other input is a multiple of its longest inner
    link. The multiple is at least 1.5, and so large that independent inputs would hardly have it: among inputs of
    intrinsic dimension m, the distances d and D to the first and second neighbor have ``(d / D)^m`` uniform in
    [0, 1] (Facco et al., "Estimating the intrinsic dimension of datasets by a minimal neighborhood information",
    Scientific Reports 7, 2017), and m is estimated from neighbors k and 2k, for several k. A larger group is less
    likely by chance, and needs less isolation. Of isolated clusters
    inside each other, the group is the largest. Distances are only compared with each other, so that the rule
    works for every backbone and every density of inputs. A group holds at most one input in 20, at most 1000
    inputs, and never all inputs of a class: what is larger is a kind of input.

    Parameters
    ----------
    values
        (n, D) features, such as those of the frozen backbone. A copy of them in float32 is made. The neighbors of
        more than 32,768 inputs are found by an approximate index, and some may be missed.
    labels
        (n,) classes, negative for none. Default: no classes.

    Returns
    -------
    Tensor
        (n,) int64, the group of each input; an input without near-duplicates has a group of its own. The number of
        a group is the index of its first input.
    """
    n = len(values)
    limit = min(n // _MAX_SHARE, _MAX_GROUP)
    if limit < 2:
        return torch.arange(n)
    first, second, distances, of_a_pair = _links(single_unit_rows(values).numpy(), limit)
    groups = _isolated_clusters(first, second, distances, n, limit, of_a_pair)
    if labels is not None:
        classes, members = labels[labels >= 0], groups[labels >= 0]
        pairs, sizes = torch.stack([classes, members]).unique(dim=1, return_counts=True)
        whole = pairs[1, sizes == classes.bincount()[pairs[0]]]
        groups = torch.where(torch.isin(groups, whole), torch.arange(n), groups)
    return groups


def _links(rows: _Array, limit: int) -> tuple[_Array, _Array, _Array, float]:
    """Return the links of single-linkage clustering in ascending order: two inputs each, and their distance.

    The last value is that of `_isolation`.

    They are a minimum spanning tree of the graph of nearest neighbors. Where all neighbors of a cluster are inside
    it, more of them are searched, until its link to another input is known or it has more inputs than ``limit``.
    """
    n = len(rows)
    search = Search(rows)
    if n > _MAX_EXACT:
        search = index = Index(rows)
        index.cells.nprobe = _CELLS
    graph = coo_array((n, n), dtype=np.float32).tocsr()
    open_rows, k = np.arange(n), _NEIGHBORS
    nearest = []
    while len(open_rows):
        k = min(k, n - 1)
        for start in range(0, len(open_rows), step := max(_PAIRS // k, 1)):
            ids = open_rows[start : start + step]
            distances, found = search.neighbors(rows[ids], k + 1)
            first = np.repeat(ids, found.shape[1]).reshape(found.shape)
            known = (found >= 0) & (found != first)
            if k <= _NEIGHBORS:
                nearest.append(np.sort(np.where(known, distances, np.inf), 1)[:, :_NEIGHBORS])
            # The graph has no link where the distance is 0, as it is between equal features.
            # scipy before 1.17 makes trees of 32-bit rows only.
            links = distances[known].clip(1e-9), (first[known].astype(np.int32), found[known].astype(np.int32))
            graph = minimum_spanning_tree(graph.maximum(coo_array(links, (n, n)).tocsr()))
        _, clusters = connected_components(graph, directed=False)
        sizes = np.bincount(clusters)
        open_rows = np.flatnonzero((sizes <= limit)[clusters]) if k < limit else open_rows[:0]
        k *= 4
    graph = graph.tocoo()
    order = np.argsort(graph.data, kind="stable")
    return graph.row[order], graph.col[order], graph.data[order], _isolation(np.concatenate(nearest))


def _isolation(nearest: _Array) -> float:
    """Return how isolated a pair must be, as the logarithm of a ratio of squared distances.

    It follows from the squared distances of n inputs to their nearest neighbors, (n, k).

    Groups of near-duplicates distort the estimates of the dimension from few neighbors or from many: the highest
    estimate counts, which is the lowest ratio of distances.
    """
    ratios = []
    for k in (1, 2, 4, 8):
        near, far = nearest[:, k - 1], nearest[:, min(2 * k, nearest.shape[1]) - 1]
        valid = (near > 0) & np.isfinite(far)
        if valid.any():
            # (d_k / d_2k)^m has the distribution Beta(k, k), whose median is 1/2.
            ratios.append(float(np.median(np.log(far[valid] / near[valid]))))
    return float(min(ratios) * np.log2(len(nearest) / _BY_CHANCE)) if ratios else 0.0


def _isolated_clusters(
    first: _Array, second: _Array, distances: _Array, n: int, limit: int, of_a_pair: float
) -> Tensor:
    """Return the outermost isolated cluster of each of n inputs, by the index of its first input.

    Parameters
    ----------
    first, second, distances : links, see `_links`.
    n : number of inputs.
    limit : maximum number of inputs of a cluster.
    of_a_pair : see `_isolation`.
    """
    # That all neighbors of k + 1 inputs are as near by chance is the product of k probabilities.
    needed = [1.0, 1.0, *(max(_ISOLATION, np.exp(min(of_a_pair / k, _MAX_EXPONENT))) for k in range(1, limit))]
    # Clusters 0 to n - 1 are single inputs; link t makes cluster n + t of two others.
    root, cluster = list(range(n)), list(range(n))
    size, height, parent = [1] * n, [0.0] * n, [-1] * (n + len(distances))
    isolated = [False] * len(parent)

    def find(i: int) -> int:
        while root[i] != i:
            root[i] = i = root[root[i]]
        return i

    links = zip(first.tolist(), second.tolist(), distances.tolist(), strict=True)
    for new, (i, j, distance) in enumerate(links, n):
        i, j = find(i), find(j)
        for joined in (cluster[i], cluster[j]):
            isolated[joined] = 1 < size[joined] <= limit and distance >= needed[size[joined]] * height[joined]
            parent[joined] = new
        size.append(size[cluster[i]] + size[cluster[j]])
        height.append(distance)
        if size[cluster[i]] < size[cluster[j]]:
            i, j = j, i
        root[j], cluster[i] = i, new
    outermost = [-1] * len(parent)
    for this in range(len(parent) - 1, -1, -1):
        above = outermost[parent[this]] if parent[this] >= 0 else -1
        outermost[this] = this if above < 0 and isolated[this] else above
    found = np.array(outermost[:n])
    return _numbered_by_first(np.where(found < 0, np.arange(n), found))


def join_groups(*groupings: Sequence[str] | Sequence[bytes] | Tensor) -> Tensor:
    """Return the groups that result if inputs of one group, by any grouping, are in one group.

    Parameters
    ----------
    *groupings : group of each of n inputs: names, digests, or numbers (n,).

    Returns
    -------
    Tensor
        (n,) int64, the group of each input, by the index of its first input.
    """
    n = len(groupings[0])
    edges = []
    for start, grouping in enumerate(groupings, 1):
        numbers = np.unique(np.asarray(grouping), return_inverse=True)[1]
        edges.append((np.arange(n), start * n + numbers))
    ends = np.concatenate(edges, 1)
    size = (len(groupings) + 1) * n
    graph = coo_array((np.ones(ends.shape[1], bool), tuple(ends)), (size, size))
    return _numbered_by_first(connected_components(graph, directed=False)[1][:n])


def _numbered_by_first(groups: _Array) -> Tensor:
    _, firsts, numbers = np.unique(groups, return_index=True, return_inverse=True)
    return torch.from_numpy(firsts[numbers])


def held_out(
    digests: Sequence[bytes], groups: Tensor | None = None, tpr: float | None = None, constants: int = 0
) -> Tensor:
    """Return which inputs are held out for calibration: every fifth group, in the order of their digests.

    A group is held out as a whole, or fitted on. Calibrate on one input of each group (`first_of_groups`): inputs
    of one group depend on each other, while single inputs of groups are exchangeable with an input of a new group,
    for which the stated rate then holds.

    Parameters
    ----------
    digests : digest of each of n inputs. Inputs with the same digest are in one group.
    groups : (n,) group of each input. Default: one group per digest.
    tpr
        Share of new ID inputs to accept. More than every fifth group is held out if it needs them: 19 at 0.95.
        Default: every fifth group, however few they are.
    constants : number of groups that are needed in addition, for `for_constants`.

    Returns
    -------
    Tensor
        (n,) bool. It depends on the content, and not on the order of the inputs.

    Raises
    ------
    ValueError
        There are too few groups for ``tpr``.
    """
    groups, ordered = _ordered(digests, groups)
    chosen = ordered[::HELD_OUT]
    if tpr is not None and len(chosen) < (needed := _needed(ordered, tpr, constants)):
        chosen = [ordered[i * len(ordered) // needed] for i in range(needed)]
    return torch.isin(groups, torch.tensor(chosen))


def for_constants(digests: Sequence[bytes], groups: Tensor, is_held_out: Tensor, tpr: float) -> Tensor:
    """Return which held-out inputs a detector's constants are fitted to; the threshold is set on the others.

    The detector's scores of both are then alike, and like those of new inputs: the stated rate holds.

    Parameters
    ----------
    digests, groups : see `held_out`.
    is_held_out : (n,) bool, the inputs that are held out.
    tpr : share of new ID inputs to accept.

    Returns
    -------
    Tensor
        (n,) bool, one input of every fourth group that is held out; of at least `MIN_CONSTANTS` groups and at most
        `featnorm.detectors.held_out.MAX_HELD_OUT`, as long as as many are left as the rate needs.
    """
    groups, ordered = _ordered(digests, groups)
    members = set(groups[is_held_out].tolist())
    held = [group for group in ordered if group in members]
    count = min(max(len(held) // _CONSTANTS, MIN_CONSTANTS), MAX_HELD_OUT, len(held) - min_scores(tpr))
    chosen = [held[i * len(held) // count] for i in range(count)]
    return first_of_groups(digests, groups) & torch.isin(groups, torch.tensor(chosen))


def first_of_groups(digests: Sequence[bytes], groups: Tensor) -> Tensor:
    """Return one input of each group, by the smallest digest, as a mask (n,) bool; see `held_out`."""
    first: dict[int, tuple[bytes, int]] = {}
    for i, (group, digest) in enumerate(zip(groups.tolist(), digests, strict=True)):
        first[group] = min((digest, i), first.get(group, (digest, i)))
    chosen = torch.zeros(len(digests), dtype=torch.bool)
    chosen[[i for _, i in first.values()]] = True
    return chosen


def left_out(digests: Sequence[bytes], tpr: float, groups: Tensor | None = None) -> Tensor:
    """Return the inputs of a small set that are left out in turn, one of each group: as many as the rate needs.

    With each of them, its whole group is left out of the fit; see `featnorm.detectors.Jackknife`.

    Parameters
    ----------
    digests, groups : see `held_out`.
    tpr : share of new ID inputs to accept.

    Returns
    -------
    Tensor
        (J,) int64, indices of inputs: 19 at 0.95. They depend on the content, and not on the order of the inputs.

    Raises
    ------
    ValueError
        There are too few groups for ``tpr``.
    """
    groups, ordered = _ordered(digests, groups)
    chosen = torch.tensor(ordered[: _needed(ordered, tpr, 0)])
    return (first_of_groups(digests, groups) & torch.isin(groups, chosen)).nonzero().squeeze(1)


def _ordered(digests: Sequence[bytes], groups: Tensor | None) -> tuple[Tensor, list[int]]:
    """Return the group of each input, and the groups in the order of their smallest digests."""
    groups = join_groups(digests) if groups is None else join_groups(digests, groups)
    keys: dict[int, bytes] = {}
    for group, digest in zip(groups.tolist(), digests, strict=True):
        keys[group] = min(digest, keys.get(group, digest))
    return groups, sorted(keys, key=keys.__getitem__)


def _needed(groups: Sequence[int], tpr: float, constants: int) -> int:
    """Return the number of held-out groups that a rate needs; a ValueError if there are too few groups."""
    needed = min_scores(tpr) + constants
    if len(groups) <= needed:
        raise ValueError(
            f"{len(groups)} groups of inputs are too few for tpr={tpr}: {needed} are needed for calibration"
            f"{' and constants' if constants else ''}, and others to fit on; add inputs of other groups, or lower "
            "tpr"
        )
    return needed
