"""The tables of the ImageNet-1k benchmark, with our numbers beside the paper's."""

import statistics
from collections.abc import Mapping, Sequence

from featnorm.detectors import KNN
from featnorm.paper.numbers import numbers
from featnorm.paper.tables import Result, Table, cell, distinct, mean_pair, printed

# As the paper's nearest neighbors are called in the rows below and in its numbers.
_KNN = repr(KNN(1000))
_NORMS = ("L1Norm()", "NAN()")
#: The detectors of each table, in the paper's order.
ROWS = {
    "table1": (
        *("MSP()", "Energy()", "MaxLogit()", "KLUniform()", "Mahalanobis()", "ViM()", "SSD()"),
        *(_KNN, "NAN()"),
    ),
    "table2": tuple(
        f"{distance}{norm}"
        for norm in ("NAN()", "PooledReAct(NAN())")
        for distance in ("", f"{_KNN} / ", "SSD() / ")
    ),
    "table6-imagenet": _NORMS,
    "table9": ("MSP()", "Energy()", "Mahalanobis()", _KNN, "EmbeddingMagnitude()", *_NORMS),
    "table12": tuple(
        form.format(norm)
        for form in ("{}", "PooledReAct({})")
        for norm in ("L1Norm()", "Sparsity()", "Residual()", "NAN()")
    ),
}
_TITLES = {
    "table1": "Table 1, the large-scale benchmark",
    "table2": "Table 2, distances over NAN",
    "table6-imagenet": "Table 6, the projection head",
    "table9": "Table 9, a head on a frozen backbone",
    "table12": "Table 12, norms",
}
#: Those that print means alone.
_MEANS = ("table2", "table6-imagenet")
_MEASURES = "AUROC ↑ / FPR95 ↓ in percent"
#: Whose place in the paper's tables the networks at scale "laptop" take.
_STANDS_FOR = {
    "table1": {"efficientnet-lite0 with a head": "supcon"},
    "table2": {"efficientnet-lite0 with a head": "supcon"},
    "table6-imagenet": {"efficientnet-lite0": "resnet50", "efficientnet-lite0 with a head": "supcon"},
    "table9": {"efficientnet-lite0 with a head": "vit"},
    "table12": {"efficientnet-lite0 with a head": "supcon"},
}


def make_tables(name: str, results: Sequence[Result]) -> dict[str, Table]:
    """Return a table of the paper as tables of ours, by their names.

    Parameters
    ----------
    name : one of `featnorm.paper.imagenet.TABLES`.
    results : of the runs that `featnorm.paper.imagenet.jobs` names.
    """
    blocks: dict[str, list[Result]] = {}
    for result in results:
        blocks.setdefault(f"{result['network']}, {result['data']}", []).append(result)
    if name in _MEANS:
        return {name: _means(name, list(blocks.values()))}
    if len(blocks) == 1:
        return {name: _detailed(name, *blocks.values())}
    return {
        f"{name}, {block}".replace(", ", "-").replace(" ", "-"): _detailed(name, runs)
        for block, runs in blocks.items()
    }


def _detailed(table: str, runs: Sequence[Result]) -> Table:
    """A row a detector, a column an OOD set."""
    first = runs[0]
    paper = _paper(table, first["network"])
    sets = list(next(iter(first["scores"].values())))
    rows = []
    for expected in ROWS[table]:
        ours = _ours(expected, first)
        theirs = paper.get(expected, {})
        if not all(ours in run["scores"] for run in runs):
            continue
        row = [ours, cell([mean_pair(run, ours) for run in runs]), printed(theirs.get("Average"))]
        for name in sets:
            own = cell([run["scores"][ours][name] for run in runs])
            row.append(own + (f" ({printed(theirs[name])})" if name in theirs else ""))
        rows.append([*row, f"{statistics.fmean(run['microseconds'][ours] for run in runs):.1f}"])
    if table == "table1":
        rows += _parts(runs, sets)
    wanted = {_ours(expected, first) for expected in ROWS[table]}
    left_out = [f"left out {ours}: {why}" for ours, why in first["left_out"].items() if ours in wanted]
    headers = ["Detector", "Mean, ours", "Average, paper", *sets, "µs / input"]
    title = f"{_TITLES[table]}: {first['network']} on {first['data']}, {_MEASURES}"
    return Table(title, headers, rows, [*_notes(table, [runs]), *left_out])


def _parts(runs: Sequence[Result], sets: Sequence[str]) -> list[list[str]]:
    """Nearest neighbors in parts of the bank."""
    rows = []
    for ours, share in runs[0]["shares"].items():
        if share == 1 or ours not in runs[0]["scores"]:
            continue
        pairs = [cell([run["scores"][ours][name] for run in runs]) for name in sets]
        speed = statistics.fmean(run["microseconds"][ours] for run in runs)
        mean = cell([mean_pair(run, ours) for run in runs])
        rows.append([f"{ours}, {share:.0%} of the bank", mean, "–", *pairs, f"{speed:.1f}"])
    return rows


def _means(table: str, blocks: Sequence[Sequence[Result]]) -> Table:
    """A row a detector, two columns a network: ours and the paper's."""
    headers = ["Detector"]
    for runs in blocks:
        name = f"{runs[0]['network']}, {runs[0]['data']}"
        headers += [f"{name}: ours", "paper"]
    rows = []
    for expected in ROWS[table]:
        row = [expected if _KNN not in expected else _ours(expected, blocks[0][0])]
        for runs in blocks:
            ours = _ours(expected, runs[0])
            known = all(ours in run["scores"] for run in runs)
            row.append(cell([mean_pair(run, ours) for run in runs]) if known else "–")
            row.append(printed(_paper(table, runs[0]["network"]).get(expected, {}).get("Average")))
        rows.append(row)
    return Table(f"{_TITLES[table]}: mean of the OOD sets, {_MEASURES}", headers, rows, _notes(table, blocks))


def _paper(table: str, network: str) -> Mapping[str, Mapping[str, Sequence[float]]]:
    """The paper's rows of a network, or of that which ours stands for."""
    rows: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]] = numbers("imagenet")[table]["rows"]
    return rows.get(_STANDS_FOR[table].get(network, network), {})


def _ours(expected: str, result: Result) -> str:
    """What a detector of the paper is called in a result, where k is that of its scale."""
    return expected.replace(_KNN, repr(KNN(result["k"])))


def _notes(table: str, blocks: Sequence[Sequence[Result]]) -> list[str]:
    notes = [f"the paper's numbers are of {numbers('imagenet')[table]['where']}"]
    for runs in blocks:
        first = runs[0]
        name = f"{first['network']} on {first['data']}"
        several = f"; {len(runs)} heads, mean ± standard deviation" if len(runs) > 1 else ""
        notes.append(f"{name}: {_accuracy(table, runs)}{several}")
        heads = [run["seconds"]["head"] for run in runs if run["seconds"]["head"] is not None]
        if heads:
            notes.append(f"{name}: {statistics.fmean(heads):.0f} s to train a head")
        notes += [f"{name}, {what}: {value}" for what, value in first["images"].items()]
        notes += [f"{name}, {count} images of {what} cannot be read" for what, count in first["unread"].items()]
    everyone = [run for runs in blocks for run in runs]
    notes += [f"{fact}: {', '.join(distinct(everyone, fact))}" for fact in everyone[0]["environment"]]
    return notes


def _accuracy(table: str, runs: Sequence[Result]) -> str:
    known = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
    theirs = numbers("imagenet")[table].get("accuracy", {}).get(runs[0]["network"])
    ours = "no accuracy, as it has no logits of these classes"
    if known:
        ours = f"accuracy on ID {statistics.fmean(known):.1f} %"
    return ours + ("" if theirs is None else f", the paper's is {theirs} %")
