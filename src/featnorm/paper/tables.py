"""Tables of the reproduction: our numbers beside the paper's, and their provenance."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from featnorm.report.tables import escape

Result = Mapping[str, Any]
"""The content of a run's ``result.json``, see `featnorm.paper.study.Study.run`."""

#: AUROC and FPR95 in percent of one run.
Pair = Sequence[float]

MEASURES = "AUROC ↑ / FPR95 ↓ in percent"


@dataclass(frozen=True)
class Table:
    """A table of text, with notes on it."""

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


def mean_pair(result: Result, detector: str, part: str = "scores") -> Pair:
    """Return AUROC and FPR95 of a detector, averaged over the OOD sets, in percent."""
    pairs = list(result[part][detector].values())
    return [statistics.fmean(pair[i] for pair in pairs) for i in range(2)]


def cell(pairs: Sequence[Pair]) -> str:
    """Return "AUROC / FPR95", means over the runs, with standard deviations if there are several."""
    return " / ".join(map(mean_and_deviation, zip(*pairs, strict=True)))


def mean_and_deviation(values: Sequence[float]) -> str:
    """Return the mean, with the standard deviation if there are several values."""
    deviation = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{deviation}"


def printed(pair: Sequence[float | None] | None) -> str:
    """Return "AUROC / FPR95" as the paper prints them, or a dash for what it does not print."""
    return "–" if pair is None else " / ".join("–" if value is None else f"{value}" for value in pair)


def compared(
    results: Sequence[Result], detector: str, theirs: Mapping[str, Sequence[float | None]], sets: Sequence[str]
) -> list[str]:
    """Return a detector's cells: our mean over the OOD sets, the paper's average, and ours for each set.

    Parameters
    ----------
    results : the runs that it was measured in, such as those of several seeds; if there are none, ours are dashes.
    detector : its expression.
    theirs : the paper's numbers by set and "Average"; those of a set stand in brackets behind ours.
    sets : names of the OOD sets.
    """
    means = cell([mean_pair(result, detector) for result in results])
    cells = [means or "–", printed(theirs.get("Average"))]
    for name in sets:
        ours = cell([result["scores"][detector][name] for result in results])
        cells.append((ours or "–") + (f" ({printed(theirs[name])})" if name in theirs else ""))
    return cells


def ranked(
    results: Sequence[Result], theirs: Mapping[str, Mapping[str, Sequence[float | None]]]
) -> tuple[list[str], list[list[str]]]:
    """Return the headers and rows of a table of the detectors that all runs have, the best mean AUROC first.

    Parameters
    ----------
    results : see `compared`.
    theirs : the paper's numbers by detector, see `compared`.
    """
    names = [name for name in results[0]["scores"] if all(name in result["scores"] for result in results)]
    names.sort(key=lambda name: -statistics.fmean(mean_pair(result, name)[0] for result in results))
    sets = list(results[0]["scores"][names[0]])
    rows = [[name, *compared(results, name, theirs.get(name, {}), sets)] for name in names]
    return ["Detector", "Mean, ours", "Average, paper", *sets], rows


def left_out(result: Result) -> list[str]:
    """Return a note for each reason why detectors were left out of a run, and which."""
    by_reason: dict[str, list[str]] = {}
    for name, reason in result["excluded"].items():
        by_reason.setdefault(reason, []).append(name)
    return [f"left out {', '.join(names)}: {reason}" for reason, names in by_reason.items()]


def facts(results: Sequence[Result]) -> list[str]:
    """Return notes on the images, and on where the numbers were made."""
    return [*(f"{name}: {value}" for name, value in results[0]["images"].items()), *environment(results)]


def environment(results: Sequence[Result]) -> list[str]:
    """Return notes on where the numbers were made; tables that share networks have several values of a fact."""
    return [
        f"{fact}: {', '.join(dict.fromkeys(result['environment'][fact] for result in results))}"
        for fact in results[0]["environment"]
    ]
