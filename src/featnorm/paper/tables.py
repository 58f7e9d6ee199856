"""The paper's tables with our numbers beside its own."""

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from featnorm.paper.numbers import numbers
from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.report.tables import escape

Result = Mapping[str, Any]
"""The content of a run's ``result.json``, see `featnorm.paper.cifar10.run`."""

# AUROC and FPR95 in percent of one run.
_Pair = Sequence[float]
_NORMS = ("L1Norm()", "NAN()")
_LABELS = {
    "L1Norm()": "NAN without the sparsity term (l1-norm)",
    "NAN()": "NAN",
    "EmbeddingMagnitude()": "embedding magnitude",
    "HiddenConfidence()": "confidence of the hidden classifier",
}


@dataclass(frozen=True)
class Table:
    """A table of text, with what to know of it."""

    title: str
    headers: list[str]
    rows: list[list[str]]
    notes: list[str] = field(default_factory=list)

    def markdown(self) -> str:
        """The table in Markdown, with its notes."""
        lines = [f"**{escape(self.title)}**", "", *(f"- {escape(note)}" for note in self.notes), ""]
        rule = ["---", *("---:" for _ in self.headers[1:])]
        lines += [f"| {' | '.join(map(escape, row))} |" for row in (self.headers, rule, *self.rows)]
        return "\n".join(lines) + "\n"


def make_table(name: str, results: Sequence[Result]) -> Table:
    """Return a table of the CIFAR-10 benchmark.

    Parameters
    ----------
    name : one of `featnorm.paper.cifar10.TABLES` or `featnorm.paper.label_free.TABLES`.
    results : of the runs that ``jobs`` of that module names.
    """
    return _MAKERS[name](results)


def mean_pair(result: Result, detector: str, part: str = "scores") -> _Pair:
    """Return AUROC and FPR95 of a detector, averaged over the OOD sets, in percent."""
    pairs = list(result[part][detector].values())
    return [statistics.fmean(pair[i] for pair in pairs) for i in range(2)]


def width_figure(results: Sequence[Result]) -> str:
    """Return Figure 7 as SVG text: AUROC and FPR95 of NAN and the l1-norm over the width of the hidden layer."""
    widths = [result["variant"]["hidden"] for result in results]
    panels = [
        Panel(
            xlabel="width of the last hidden layer",
            ylabel=f"{measure} in percent",
            log2=True,
            lines=[
                Line(name, [mean_pair(result, detector)[i] for result in results], widths, style)
                for style, (name, detector) in enumerate([("NAN", "NAN()"), ("l1-norm", "L1Norm()")])
            ],
        )
        for i, measure in enumerate(["AUROC", "FPR95"])
    ]
    return panel_figure([panels])


def _table3(results: Sequence[Result]) -> Table:
    paper = numbers("cifar10")["table3"]
    names = [name for name in results[0]["scores"] if all(name in result["scores"] for result in results)]
    names.sort(key=lambda name: -statistics.fmean(mean_pair(result, name)[0] for result in results))
    sets = list(results[0]["scores"][names[0]])
    rows = []
    for name in names:
        theirs = paper["rows"].get(name, {})
        row = [name, cell([mean_pair(result, name) for result in results]), printed(theirs.get("Average"))]
        for set_name in sets:
            ours = cell([result["scores"][name][set_name] for result in results])
            row.append(ours + (f" ({printed(theirs[set_name])})" if set_name in theirs else ""))
        rows.append(row)
    shared = [set_name for set_name in sets if any(set_name in row for row in paper["rows"].values())]
    notes = _notes(results)
    notes.append(
        f"the paper's accuracy is {paper['accuracy']} %; its OOD sets are LSUN-fix, ImageNet-fix, CIFAR-100, "
        "SVHN and Places365" + (", its number is in brackets where the set is the same" if shared else "")
    )
    notes += [f"left out {name}: {why}" for name, why in results[0]["left_out"].items()]
    title = f"Table 3, {paper['where'].partition(', ')[2]}: AUROC ↑ / FPR95 ↓ in percent"
    return Table(title, ["Detector", "Mean, ours", "Average, paper", *sets], rows, notes)


def _frameworks(name: str, title: str) -> Callable[[Sequence[Result]], Table]:
    """A table of the rows that the paper has, and what else was measured, each of the network that it is for."""

    def make(results: Sequence[Result]) -> Table:
        paper = numbers("cifar10")[name]
        measured = {
            detector: (result, pairs) for result in results for detector, pairs in result["scores"].items()
        }
        sets = [fact.removeprefix("OOD, ") for fact in results[0]["images"] if fact.startswith("OOD, ")]
        rows = []
        for detector in dict.fromkeys((*paper["rows"], *measured)):
            theirs = paper["rows"].get(detector, {})
            result, pairs = measured.get(detector, (None, {}))
            ours = "–" if result is None else cell([mean_pair(result, detector)])
            row = [detector, "–" if result is None else result["framework"], ours, printed(theirs.get("Average"))]
            for set_name in sets:
                bracket = f" ({printed(theirs[set_name])})" if set_name in theirs else ""
                row.append((cell([pairs[set_name]]) if pairs else "–") + bracket)
            rows.append(row)
        first = results[0]
        notes = [
            f"scale {first['scale']}: {_network(first)}, one network a framework, seed {first['seed']}",
            *(f"{result['framework']}: {_training(result)}" for result in results),
            f"the paper's: {paper['where'].partition(', ')[2]}; its number for a set is in brackets",
            *_facts(results),
        ]
        notes += [f"left out {what}: {why}" for result in results for what, why in result["left_out"].items()]
        headers = ["Detector", "trained by", "Mean, ours", "Average, paper", *sets]
        return Table(f"{title}: AUROC ↑ / FPR95 ↓ in percent", headers, rows, notes)

    return make


def _training(result: Result) -> str:
    """How a framework's network was trained and its detectors fitted, in words."""
    recipe = result["recipe"]
    batches = f"batch {recipe['batch_size']}, learning rate {recipe['lr']}"
    if result["framework"] == "GOAD":
        text = (
            f"a WideResNet of depth {recipe['depth']} and width {recipe['width']}, {recipe['epochs']} epochs of "
            f"Adam on 72 transformations of each image, {batches}"
        )
    else:
        text = f"{recipe['epochs']} epochs of {recipe['optimizer'].upper()}, {batches}, weight decay "
        text += f"{recipe['weight_decay']}"
    if recipe.get("crop") is not None:
        text += f", views of {recipe['crop']} pixels for the first {recipe['crop_share']:.0%}"
    text += f"; training took {result['train_seconds'] / 60:.0f} minutes, scoring "
    text += f"{result['score_seconds'] / 60:.0f}"
    verb = "trained on" if result["framework"] == "GOAD" else "fitted to"
    return text + ("" if result["most"] is None else f"; {verb} {result['most']} training images")


def _simple(table: str, title: str, detectors: Sequence[str]) -> Callable[[Sequence[Result]], Table]:
    """A table of some detectors' means on the main networks."""

    def make(results: Sequence[Result]) -> Table:
        rows = []
        for detector in detectors:
            theirs = numbers("cifar10")[table]["rows"].get(detector)
            theirs = theirs.get("Average") if isinstance(theirs, dict) else theirs
            ours = cell([mean_pair(result, detector) for result in results])
            rows.append([_LABELS[detector], ours, printed(theirs)])
        return Table(f"{title}: AUROC ↑ / FPR95 ↓ in percent", ["Score", "Ours", "Paper"], rows, _notes(results))

    return make


def _table6(results: Sequence[Result]) -> Table:
    with_head, headless = results
    theirs = numbers("cifar10")["table6"]["rows"]
    pool, hidden = "average pool", "hidden layer of the projection head"
    rows = [
        ["ResNet-18 without a head", pool, *_norms(headless, "scores", theirs[pool])],
        ["ResNet-18 + projection head", pool, *_norms(with_head, "pooled", {})],
        ["ResNet-18 + projection head", hidden, *_norms(with_head, "scores", theirs[hidden])],
    ]
    return _ablation("Table 6, the projection head", ["Network", "Layer"], rows, results)


def _table7(results: Sequence[Result]) -> Table:
    theirs = numbers("cifar10")["table7"]["rows"]
    names = [result["variant"]["activation"] for result in results]
    rows = [[name, *_norms(result, "scores", theirs[name])] for name, result in zip(names, results, strict=True)]
    return _ablation("Table 7, activation functions", ["Activation"], rows, results)


def _figure7(results: Sequence[Result]) -> Table:
    rows = [
        [str(result["variant"]["hidden"]), *_norms(result, "scores", {}), f"{result['inactive']['cifar10']:.0%}"]
        for result in results
    ]
    table = _ablation("Figure 7, the width of the last hidden layer", ["d_L"], rows, results)
    table.headers.append("units off, ID")
    table.notes.append(numbers("cifar10")["figure7"]["where"])
    return table


def _ablation(title: str, first: list[str], rows: list[list[str]], results: Sequence[Result]) -> Table:
    headers = [*first, "l1-norm, ours", "l1-norm, paper", "NAN, ours", "NAN, paper"]
    return Table(f"{title}: AUROC ↑ / FPR95 ↓ in percent", headers, rows, _notes(results))


def _norms(result: Result, part: str, theirs: Mapping[str, _Pair]) -> list[str]:
    cells = []
    for detector in _NORMS:
        cells += [cell([mean_pair(result, detector, part)]), printed(theirs.get(detector))]
    return cells


_MAKERS: dict[str, Callable[[Sequence[Result]], Table]] = {
    "table3": _table3,
    "table5": _simple("table5", "Table 5, the sparsity term", _NORMS),
    "table6": _table6,
    "table7": _table7,
    "table8": _simple("table8", "Table 8, the embedding magnitude", ("EmbeddingMagnitude()", *_NORMS)),
    "table10": _simple("table10", "Table 10, the hidden classifier", ("HiddenConfidence()", "NAN()")),
    "figure7": _figure7,
    "table3-label-free": _frameworks("table3-label-free", "Table 3, without supervised labels of ID"),
    "table11": _frameworks("table11", "Table 11, CIDER"),
}


def cell(pairs: Sequence[_Pair]) -> str:
    """AUROC / FPR95, each with its deviation over the runs where there are several."""
    texts = []
    for values in zip(*pairs, strict=True):
        deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        texts.append(f"{statistics.fmean(values):.1f}{deviation}")
    return " / ".join(texts)


def printed(pair: Sequence[float | None] | None) -> str:
    """AUROC / FPR95 as the paper prints them, or a dash where it does not."""
    return "–" if pair is None else " / ".join("–" if value is None else f"{value}" for value in pair)


def _notes(results: Sequence[Result]) -> list[str]:
    """What the runs of a table have in common, and how long they took."""
    first = results[0]
    recipe = first["recipe"]
    seeds = [result["seed"] for result in results] if len({r["variant"]["hidden"] for r in results}) == 1 else []
    several = len(set(seeds)) > 1
    accuracy = _range([100 * result["accuracy"] for result in results], 1)
    known = _range([100 * result["train_accuracy"] for result in results], 1)
    optimizer = "SGD" if recipe["optimizer"] == "sgd" else "AdamW"
    training = (
        f"{recipe['epochs']} epochs of {optimizer}, batch {recipe['batch_size']}, learning rate {recipe['lr']}, "
        f"weight decay {recipe['weight_decay']}"
    )
    if recipe["crop"] is not None:
        training += f", crops of {recipe['crop']} for the first {recipe['crop_share']:.0%}"
    minutes = [result["train_seconds"] / 60 for result in results]
    return [
        f"scale {first['scale']}: {_network(first)}, {training}",
        (f"{len(results)} seeds, mean ± standard deviation" if several else f"one seed, {first['seed']}")
        + f"; accuracy on ID {accuracy} %, on the training images {known} %",
        f"training took {_range(minutes)} minutes each",
        *_facts(results),
    ]


def _facts(results: Sequence[Result]) -> list[str]:
    """What the images are and where the numbers were made."""
    first = results[0]
    return [
        *(f"{name}: {value}" for name, value in first["images"].items()),
        *(f"{name}: {', '.join(distinct(results, name))}" for name in first["environment"]),
    ]


def distinct(results: Sequence[Result], fact: str) -> list[str]:
    """A fact of the environment, of which tables that share networks have several."""
    return list(dict.fromkeys(result["environment"][fact] for result in results))


def _network(result: Result) -> str:
    if "backbone" in result:
        return f"heads alone on the frozen backbone of {result['backbone']}, on images that are not augmented"
    return f"ResNet-18 of width {result['width']}"


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"
