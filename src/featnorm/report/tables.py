"""The table of detectors and OOD sets, the same in a terminal, a document and the page."""

import re
from dataclasses import dataclass

from featnorm.evaluation import Evaluation, Result

__all__ = ["Column", "columns", "escape", "markdown_page", "markdown_table", "ranked", "table_rows"]


@dataclass(frozen=True)
class Column:
    """A column of numbers: one a detector, in the order of `ranked`."""

    group: str  # the OOD set, "Mean" or nothing
    measure: str
    higher_is_better: bool
    values: list[float]

    @property
    def header(self) -> str:
        """The group and the measure, and an arrow that points to where better is."""
        return f"{self.group} {self.measure} {'↑' if self.higher_is_better else '↓'}".lstrip()

    @property
    def cells(self) -> list[str]:
        """The values with one decimal."""
        return [f"{value:,.1f}" for value in self.values]

    @property
    def best(self) -> list[bool]:
        """Which cells read the same as the best one: a difference nobody can see is a tie."""
        cells = self.cells
        best = cells[self.values.index((max if self.higher_is_better else min)(self.values))]
        return [cell == best for cell in cells]


def ranked(evaluation: Evaluation) -> list[Result]:
    """The results by mean AUROC, best first; equal ones stay in the order they came in."""
    return sorted(evaluation.results, key=lambda result: -result.mean.auroc)


def columns(evaluation: Evaluation) -> list[Column]:
    """AUROC and FPR95 in percent, averaged (where there is more than one OOD set) and by OOD set; the time."""
    results = ranked(evaluation)
    groups = [(name, [result.metrics[name] for result in results]) for name in evaluation.ood_names]
    if len(groups) > 1:
        groups.insert(0, ("Mean", [result.mean for result in results]))
    table = []
    for group, measures in groups:
        table.append(Column(group, "AUROC %", True, [100 * m.auroc for m in measures]))
        table.append(Column(group, "FPR95 %", False, [100 * m.fpr95 for m in measures]))
    table.append(Column("", "µs / input", False, [result.microseconds for result in results]))
    return table


def table_rows(evaluation: Evaluation) -> tuple[list[str], list[list[str]]]:
    """The table as text.

    Returns
    -------
    headers, rows
        A header a column, with an arrow that points to where better is; a row a detector, best mean AUROC
        first, each as long as the headers.
    """
    table = columns(evaluation)
    names = [result.detector for result in ranked(evaluation)]
    headers = ["Detector", *(column.header for column in table)]
    return headers, [list(row) for row in zip(names, *(column.cells for column in table), strict=True)]


def markdown_table(evaluation: Evaluation) -> str:
    """The table in Markdown, the best of each column in bold; it ends in a newline."""
    headers, rows = table_rows(evaluation)
    best = zip(*(column.best for column in columns(evaluation)), strict=True)
    marked = [
        [escape(name), *(f"**{cell}**" if is_best else cell for cell, is_best in zip(cells, bests, strict=True))]
        for (name, *cells), bests in zip(rows, best, strict=True)
    ]
    lines = [
        [escape(header) for header in headers],
        ["---", *("---:" for _ in headers[1:])],
        *marked,
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def markdown_page(evaluation: Evaluation, *, title: str, summary: str) -> str:
    """The table with what it was made with and who was left out, as a page for the documentation."""
    lines = [f"# {escape(title)}", "", escape(summary), ""]
    lines += [f"- {escape(name)}: {_code(name, value)}" for name, value in evaluation.facts.items()]
    if evaluation.accuracy is not None:
        lines.append(f"- accuracy on {escape(evaluation.id_name)}: {evaluation.accuracy:.1%}")
    lines += ["", markdown_table(evaluation)]
    lines.append(
        "AUROC is the probability that an in-distribution input scores above an OOD input; FPR95 is the share of "
        "OOD inputs accepted when 95 % of the in-distribution inputs are. The time is of scoring, without the "
        "model's forward pass."
    )
    if evaluation.excluded:
        lines += ["", "Left out:", ""]
        lines += [f"- {escape(name)}: {escape(reason)}" for name, reason in evaluation.excluded.items()]
    return "\n".join(lines) + "\n"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else escape(value)


_MARKUP = re.compile(r"([\\`*_{}\[\]<>|])")


def escape(text: str) -> str:
    """Return text for a line of Markdown, where it reads as it is."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
