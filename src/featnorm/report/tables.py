"""The table of detectors and OOD sets, for the terminal, a document and the page."""

import re
from dataclasses import dataclass

from featnorm.evaluation import Evaluation, Result

__all__ = ["Column", "columns", "escape", "markdown_page", "markdown_table", "ranked", "table_rows"]


@dataclass(frozen=True)
class Column:
    """A column of numbers, one per detector, in the order of `ranked`."""

    group: str  # the OOD set, "Mean" or empty
    measure: str
    higher_is_better: bool
    values: list[float]

    @property
    def header(self) -> str:
        """The group and the measure, with an arrow that shows whether higher or lower is better."""
        return f"{self.group} {self.measure} {'↑' if self.higher_is_better else '↓'}".lstrip()

    @property
    def cells(self) -> list[str]:
        """The values with one decimal."""
        return [f"{value:,.1f}" for value in self.values]

    @property
    def best(self) -> list[bool]:
        """Whether each cell, as printed, equals the best one; values that round to the same text are ties."""
        cells = self.cells
        best = cells[self.values.index((max if self.higher_is_better else min)(self.values))]
        return [cell == best for cell in cells]


def ranked(evaluation: Evaluation) -> list[Result]:
    """Return the results by mean AUROC, best first; ties keep their order."""
    return sorted(evaluation.results, key=lambda result: -result.mean.auroc)


def columns(evaluation: Evaluation) -> list[Column]:
    """Return AUROC and FPR95 in percent for each OOD set, after their means if there are several, and the time."""
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
    """Return the table as text.

    Returns
    -------
    headers, rows
        One header per column, with an arrow that shows whether higher or lower is better; and one row per
        detector, best mean AUROC first, each as long as the headers.
    """
    table = columns(evaluation)
    names = [result.detector for result in ranked(evaluation)]
    headers = ["Detector", *(column.header for column in table)]
    return headers, [list(row) for row in zip(names, *(column.cells for column in table), strict=True)]


def markdown_table(evaluation: Evaluation) -> str:
    """Return the table in Markdown, with the best of each column in bold and a trailing newline."""
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
    """Return the table as a page for the documentation, with its provenance and the skipped detectors."""
    lines = [f"# {escape(title)}", "", escape(summary), ""]
    lines += [f"- {escape(name)}: {_code(name, value)}" for name, value in evaluation.facts.items()]
    if evaluation.accuracy is not None:
        lines.append(f"- accuracy on {escape(evaluation.id_name)}: {evaluation.accuracy:.1%}")
    lines += ["", markdown_table(evaluation)]
    lines.append(
        "AUROC is the probability that an in-distribution input scores above an OOD input; FPR95 is the share of "
        "OOD inputs accepted when 95 % of the in-distribution inputs are accepted. The time is that of scoring, "
        "without the model's forward pass."
    )
    if evaluation.excluded:
        lines += ["", "Skipped detectors:", ""]
        lines += [f"- {escape(name)}: {escape(reason)}" for name, reason in evaluation.excluded.items()]
    return "\n".join(lines) + "\n"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else escape(value)


_MARKUP = re.compile(r"([\\`*_{}\[\]<>|])")


def escape(text: str) -> str:
    """Escape text for one line of Markdown."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
