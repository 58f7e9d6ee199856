"""`select`: ranks detectors for a user's own inputs without any OOD data.

It is not in the library because it does not beat a fixed sum, see docs/results/selection.md.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from featnorm.detectors import parse_detector
from featnorm.features import Features
from featnorm.significance import placements

# The settings were fixed before any score of an OOD set was computed.
PARTITIONS, HELD_OUT = 3, 0.2
# Shares of the inputs of the other classes.
FIT, CONSTANTS = 0.7, 0.1
CLUSTERS, MIN_CLUSTER = 20, 20
# Two-sided, at 95 %.
NORMAL_QUANTILE = 1.96

_Array = npt.NDArray[np.float64]
#: Trains a classifier on pooled features, with labels or without; the result makes the features of others.
Retrain = Callable[[Features], Callable[[Features], Features]]


class DestroyedCopies(NamedTuple):
    """Features of copies of ID inputs whose content is destroyed, such as by blur or noise.

    ``rows`` (m,) are the inputs that were copied, ``kinds`` the features of the m copies by kind.
    """

    rows: Tensor
    kinds: Mapping[str, Features]


@dataclass(frozen=True)
class Candidate:
    """What `select` found about one detector; AUROC in [0, 1].

    Attributes
    ----------
    detector : str
        Its expression.
    auroc : float
        Mean over the two kinds of pseudo-OOD inputs.
    held_out, destroyed : float
        Mean AUROC against held-out classes and against copies whose content is destroyed (NaN without copies).
    behind : float
        Difference to the largest ``auroc``.
    error : float
        Standard error of that difference.
    in_clique : bool
        Whether it cannot be told apart from the best: ``behind`` is at most 1.96 standard errors.
    """

    detector: str
    auroc: float
    held_out: float
    destroyed: float
    behind: float
    error: float
    in_clique: bool


@dataclass(frozen=True)
class Selection:
    """The outcome of `select`.

    Attributes
    ----------
    detector : str
        The cheapest detector of the top clique.
    candidates : list of Candidate
        The candidates, the best first.
    excluded : dict of str
        Reason of each candidate that cannot be used on these features.
    """

    detector: str
    candidates: list[Candidate]
    excluded: dict[str, str]


@torch.no_grad()
def select(
    features: Features,
    candidates: Sequence[str],
    *,
    destroyed: DestroyedCopies | None = None,
    retrain: Retrain | None = None,
    seed: int = 0,
) -> Selection:
    """Rank detectors by how well they tell held-out classes, and destroyed inputs, from ID inputs.

    Three times, a fifth of the classes is held out as pseudo-OOD. Of the inputs of the other
    classes, 70 % are fitted to, 10 % set the constants of sums, and 20 % are ID test inputs. Copies of ID inputs
    whose content is destroyed are a second kind of pseudo-OOD. Detectors are ranked by their AUROC, averaged over
    both kinds. Those that cannot be told apart from the best are the top clique, by standard errors of the paired
    differences (DeLong et al., Biometrics 1988) that are clustered by class. Of these, the cheapest is chosen.

    Parameters
    ----------
    features
        Features of n in-distribution inputs. Classes are their ``labels``; without labels, or with fewer than
        three classes, k-means clusters of the pooled features.
    candidates : expressions of the detectors, from the cheapest to the most costly.
    destroyed : copies whose content is destroyed. Default: only classes are held out.
    retrain
        Trains a new classifier on the pooled features without the held-out classes. Default: the logits of the
        held-out classes are removed from those of a classifier, so that they have no logit of their own.
    seed : seed of the classes, the rows and the clusters.

    Raises
    ------
    ValueError
        No candidate can be used on these features.
    """
    rng = np.random.default_rng(seed)
    classes = _classes(features, seed)
    names = rng.permutation(np.unique(classes))
    copied = np.zeros(0, dtype=np.int64) if destroyed is None else destroyed.rows.numpy()
    share = rng.random(len(classes))
    share[copied] = 1  # a copy's original is never fitted to
    result: dict[str, list[tuple[float, float, _Array]]] = {}
    excluded: dict[str, str] = {}
    for part in range(PARTITIONS):
        out = np.isin(classes, names[part :: round(1 / HELD_OUT)])
        fit, constants = ~out & (share < FIT), ~out & (share >= FIT) & (share < FIT + CONSTANTS)
        test = ~out & (share >= FIT + CONSTANTS)
        if retrain is None:
            made = _without_logits(features, out)
        else:
            with torch.enable_grad():
                made = retrain(features[torch.from_numpy(fit)])
        inside, held_out, rest = (made(features[torch.from_numpy(rows)]) for rows in (test, out, constants))
        fitted_to = made(features[torch.from_numpy(fit)])
        kinds = {} if destroyed is None else {kind: made(values) for kind, values in destroyed.kinds.items()}
        for expression in candidates:
            if expression in excluded:
                continue
            try:
                detector = parse_detector(expression).fit(fitted_to, rest)
                scores = detector.score(inside).numpy()
                cells = [_Cell.of(scores, detector.score(held_out).numpy())]
                cells += [_Cell.of(scores, detector.score(copies).numpy()) for copies in kinds.values()]
            except (ValueError, TypeError) as error:
                excluded[expression] = str(error).removeprefix(expression).removeprefix(":").strip()
                result.pop(expression, None)
                continue
            influence = np.zeros(len(classes))
            for i, cell in enumerate(cells):
                # Held-out classes weigh as much as all kinds of copies.
                weight = (0.5 / len(kinds) if i else 0.5) if kinds else 1.0
                influence[test] += weight * cell.inside
                influence[copied if i else out] += weight * cell.outside
            far = [cell.auroc for cell in cells[1:]]
            result.setdefault(expression, []).append(
                (cells[0].auroc, float(np.mean(far)) if far else float("nan"), influence)
            )
    if not result:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in excluded.items())
        raise ValueError(f"no candidate can be used on these features: {reasons}")
    return _ranked(result, excluded, candidates, classes)


class _Cell(NamedTuple):
    """AUROC of ID against OOD scores, and how much each of them moves it."""

    auroc: float
    inside: _Array  # (n,)
    outside: _Array  # (m,)

    @classmethod
    def of(cls, inside: _Array, outside: _Array) -> "_Cell":
        above, below = (shares[0] for shares in placements(inside[None], outside[None]))
        auroc = float(above.mean())
        return cls(auroc, (above - auroc) / len(above), (below - auroc) / len(below))


def _classes(features: Features, seed: int) -> npt.NDArray[np.int64]:
    """Return the class of each input, or its cluster if there are no labels or fewer than three classes."""
    if features.labels is not None and len(features.labels.unique()) >= 3:
        return features.labels.cpu().numpy()
    from sklearn.cluster import KMeans

    directions = nn.functional.normalize(features.tensor("pooled").float()).cpu().numpy()
    count = max(3, min(CLUSTERS, len(directions) // MIN_CLUSTER))
    return KMeans(count, n_init=1, random_state=seed).fit_predict(directions).astype(np.int64)


def _without_logits(features: Features, out: npt.NDArray[np.bool_]) -> Callable[[Features], Features]:
    """Return a function that removes the logits that are the largest for more held-out inputs than others."""
    if features.logits is None:
        return lambda given: given
    count = features.logits.shape[1]
    predicted = features.logits.argmax(1)
    outside = predicted[torch.from_numpy(out)].bincount(minlength=count)
    keep = outside <= predicted[torch.from_numpy(~out)].bincount(minlength=count)

    def masked(given: Features) -> Features:
        classifier = given.classifier
        if classifier is not None:
            weight, bias = classifier
            classifier = weight[keep], None if bias is None else bias[keep]
        return given.replace(logits=given.tensor("logits")[:, keep], classifier=classifier)

    return masked


def _ranked(
    result: Mapping[str, list[tuple[float, float, _Array]]],
    excluded: dict[str, str],
    candidates: Sequence[str],
    classes: npt.NDArray[np.int64],
) -> Selection:
    found = {}
    for expression, parts in result.items():
        near, far = (float(np.mean([part[i] for part in parts])) for i in (0, 1))
        mean = near if np.isnan(far) else (near + far) / 2
        found[expression] = near, far, mean, np.mean([part[2] for part in parts], 0)
    best = max(found.values(), key=lambda entry: entry[2])
    groups = np.unique(classes, return_inverse=True)[1]
    count = groups.max() + 1
    rows = []
    for expression, (near, far, mean, influence) in found.items():
        # The influence of a class is that of all its inputs, in every partition.
        of_classes = np.bincount(groups, influence - best[3])
        error = float(np.sqrt(np.square(of_classes).sum() * count / (count - 1)))
        behind = best[2] - mean
        rows.append(Candidate(expression, mean, near, far, behind, error, behind <= NORMAL_QUANTILE * error))
    clique = {row.detector for row in rows if row.in_clique}
    chosen = next(expression for expression in candidates if expression in clique)
    return Selection(chosen, sorted(rows, key=lambda row: row.behind), excluded)
