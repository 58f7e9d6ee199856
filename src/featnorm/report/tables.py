"""The table of detectors and OOD sets, for the terminal, a document, a paper and the page."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from featnorm.evaluation import Comparison
    from featnorm.significance import Array

__all__ = [
    "Column",
    "by_reason",
    "chance_warning",
    "columns",
    "escape",
    "latex_table",
    "markdown_page",
    "markdown_table",
    "note",
    "remarks",
    "table_rows",
    "text_table",
]

_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Column:
    """A column of numbers, one per detector, in the order of `Comparison.ranked`."""

    group: str  # "Mean", "Near", "Far", the OOD set, or empty
    measure: str
    higher_is_better: bool
    values: list[float]
    intervals: list[str] = field(default_factory=list)  # empty if there are none
    is_main: bool = False  # whether tables of text have the intervals too
    is_difference: bool = False

    @property
    def header(self) -> str:
        """The group and the measure, with an arrow that shows whether higher or lower is better."""
        return f"{self.group} {self.measure} {'↑' if self.higher_is_better else '↓'}".lstrip()

    @property
    def cells(self) -> list[str]:
        """The values with one decimal; differences with their sign."""
        if self.is_difference:
            return [f"{value:+.1f}".replace("-", _MINUS) for value in self.values]
        return [f"{value:,.1f}" for value in self.values]

    @property
    def texts(self) -> list[str]:
        """The cells, with the intervals of a main column."""
        if not self.is_main:
            return self.cells
        return [f"{cell} {interval}".rstrip() for cell, interval in zip(self.cells, self.intervals, strict=True)]

    @property
    def best(self) -> list[bool]:
        """Whether each cell, as printed, equals the best one; values that round to the same text are ties."""
        cells = self.cells
        best = cells[self.values.index((max if self.higher_is_better else min)(self.values))]
        return [cell == best and not self.is_difference for cell in cells]


def columns(comparison: Comparison) -> list[Column]:
    """Return AUROC and FPR95 in percent, of the means and of each OOD set, with intervals, and the time.

    The first AUROC is followed by its differences from the reference.
    """
    names = [result.detector for result in comparison.ranked]
    reference = names.index(comparison.reference)
    table = []
    for place, summary in enumerate(comparison.summaries):
        for measure, estimate, higher in (("AUROC %", summary.auroc, True), ("FPR95 %", summary.fpr95, False)):
            values = [100 * value for value in estimate.value.tolist()]
            intervals = _intervals(estimate.low, estimate.high, "{:.1f}")
            table.append(Column(summary.title, measure, higher, values, intervals, is_main=place == 0))
            if place == 0 and higher and len(names) > 1:
                intervals = _intervals(estimate.difference_low, estimate.difference_high, "{:+.1f}")
                intervals[reference] = ""
                values = [100 * value for value in estimate.difference.tolist()]
                table.append(
                    Column(summary.title, "Δ AUROC", True, values, intervals, is_main=True, is_difference=True)
                )
    table.append(Column("", "µs / input", False, [result.microseconds for result in comparison.ranked]))
    return table


def _intervals(low: Array, high: Array, template: str) -> list[str]:
    """Return intervals in percent, empty where there are too few inputs for one."""
    return [
        f"[{', '.join(template.format(100 * end) for end in ends)}]".replace("-", _MINUS)
        if np.isfinite(ends).all()
        else ""
        for ends in zip(low, high, strict=True)
    ]


def table_rows(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Return the table as text.

    Returns
    -------
    headers, rows
        One header per column, with an arrow that shows whether higher or lower is better; and one row per
        detector, best mean AUROC first, each as long as the headers. The first columns are the detector and its
        cliques.
    """
    table = columns(comparison)
    names = [result.detector for result in comparison.ranked]
    headers = ["Detector", "Clique", *(column.header for column in table)]
    texts = (column.texts for column in table)
    return headers, [list(row) for row in zip(names, comparison.cliques, *texts, strict=True)]


def note(comparison: Comparison) -> str:
    """Return what the numbers of the table are."""
    reference = f" Δ AUROC is the difference from {comparison.reference}." if len(comparison.results) > 1 else ""
    return (
        "AUROC is the probability that an in-distribution (ID) input scores above an OOD input; 50 is chance. "
        "FPR95 is the share of OOD inputs accepted when 95 % of ID inputs are accepted. Brackets: 95 % confidence "
        f"intervals over test inputs (AUROC: DeLong; FPR95: bootstrap).{reference} Detectors that share a letter "
        "under Clique cannot be told apart by their AUROC (DeLong's test, Holm's correction, 5 % over all pairs). "
        "The time is that of scoring, without the model's forward pass."
    )


def chance_warning(comparison: Comparison) -> str:
    """Return a sentence that names the detectors whose mean AUROC is below chance beyond noise; empty if none."""
    highs = comparison.summaries[0].auroc.high  # of 95 % intervals
    ranked = zip(comparison.ranked, highs, strict=True)
    found = [(one.detector, 100 * one.mean.auroc) for one, high in ranked if high < 0.5]
    if not found:
        return ""
    is_one = len(found) == 1
    return (
        f"{', '.join(f'{name} ({auroc:.1f} %)' for name, auroc in found)} {'is' if is_one else 'are'} worse than "
        "chance here (AUROC below 50 %): OOD inputs get larger scores than ID inputs. Do not use "
        f"{'it' if is_one else 'them'} on this model."
    )


def remarks(comparison: Comparison) -> list[str]:
    """Return the lines below a table: which detectors are worse than chance, and which were skipped and why."""
    reasons = by_reason(comparison.excluded).items()
    lines = [chance_warning(comparison), *(f"skipped {', '.join(names)}: {reason}" for reason, names in reasons)]
    return [line for line in lines if line]


def by_reason(excluded: dict[str, str]) -> dict[str, list[str]]:
    """Return the excluded detectors by the reason, in order."""
    reasons: dict[str, list[str]] = {}
    for name, reason in excluded.items():
        reasons.setdefault(reason, []).append(name)
    return reasons


def text_table(comparison: Comparison) -> str:
    """Return the table as aligned text with `remarks` below it, and a trailing newline."""
    headers, rows = table_rows(comparison)
    lines = [headers, *rows]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "".join(
        "  ".join(
            cell.ljust(width) if place < 2 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        + "\n"
        for line in lines
    ) + "".join(f"{line}\n" for line in remarks(comparison))


def markdown_table(comparison: Comparison) -> str:
    """Return the table in Markdown, with the best of each column in bold and a trailing newline."""
    headers, rows = table_rows(comparison)
    bests = zip(*(column.best for column in columns(comparison)), strict=True)
    marked = [
        [escape(name), clique, *(f"**{text}**" if best else text for text, best in zip(texts, row, strict=True))]
        for (name, clique, *texts), row in zip(rows, bests, strict=True)
    ]
    lines = [
        [escape(header) for header in headers],
        ["---", "---", *("---:" for _ in headers[2:])],
        *marked,
    ]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def latex_table(comparison: Comparison) -> str:
    """Return the table in LaTeX, for the package booktabs, with the best of each column in bold.

    Characters beyond Latin scripts in names of sets need XeLaTeX or LuaLaTeX.
    """
    table = columns(comparison)
    groups = [(group, len(list(members))) for group, members in groupby(column.group for column in table)]
    heads = " & ".join(rf"\multicolumn{{{width}}}{{c}}{{{_latex(group)}}}" for group, width in groups)
    rules, start = "", 3
    for group, width in groups:
        rules += rf"\cmidrule(lr){{{start}-{start + width - 1}}}" if group else ""
        start += width
    measures = " & ".join(
        f"{_latex(column.measure)} " + (r"$\uparrow$" if column.higher_is_better else r"$\downarrow$")
        for column in table
    )
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{ll{'r' * len(table)}}}",
        r"\toprule",
        rf" & & {heads} \\",
        rules,
        rf"Detector & Clique & {measures} \\",
        r"\midrule",
    ]
    for i, result in enumerate(comparison.ranked):
        cells = []
        for column in table:
            cell = _latex(column.cells[i])
            cell = rf"\textbf{{{cell}}}" if column.best[i] else cell
            if column.is_main and column.intervals[i]:
                cell += rf" {{\scriptsize {_latex(column.intervals[i])}}}"
            cells.append(cell)
        lines.append(rf"\texttt{{{_latex(result.detector)}}} & {comparison.cliques[i]} & {' & '.join(cells)} \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}"]) + "\n"


_LATEX = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    "µ": r"$\mu$",
    "Δ": r"$\Delta$",
    "–": "--",
    _MINUS: "$-$",
} | {character: f"\\{character}" for character in "&%$#_{}"}


def _latex(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in " ".join(text.split()))


def markdown_page(comparison: Comparison, *, title: str, summary: str) -> str:
    """Return the table as a page for the documentation, with its provenance and the skipped detectors."""
    lines = [f"# {escape(title)}", "", escape(summary), ""]
    lines += [f"- {escape(name)}: {_code(name, value)}" for name, value in comparison.facts.items()]
    if comparison.accuracy is not None:
        lines.append(f"- accuracy on {escape(comparison.id_name)}: {100 * comparison.accuracy:.1f} %")
    lines += ["", markdown_table(comparison), escape(note(comparison))]
    if warning := chance_warning(comparison):
        lines += ["", escape(warning)]
    if comparison.excluded:
        lines += ["", "Skipped detectors:", ""]
        lines += [
            f"- {escape(', '.join(names))}: {escape(reason)}"
            for reason, names in by_reason(comparison.excluded).items()
        ]
    return "\n".join(lines) + "\n"


def _code(name: str, value: str) -> str:
    return f"`{value}`" if name == "command" else escape(value)


_MARKUP = re.compile(r"([\\`*_{}\[\]<>|])")


def escape(text: str) -> str:
    """Escape text for one line of Markdown."""
    return _MARKUP.sub(r"\\\1", " ".join(text.split()))
