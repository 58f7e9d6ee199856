"""A page of many results: tables and figures, one after another, with what each was made with."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featnorm.paper.tables import Table
from featnorm.report.html import render, write


@dataclass(frozen=True)
class Section:
    """A result on the page.

    Parameters
    ----------
    name : unique name, by which the page links to it, such as "table3".
    table : its table; the first cell of a row names the row.
    pictures : its figures as SVG text.
    """

    name: str
    table: Table
    pictures: Sequence[str] = ()

    @property
    def uris(self) -> list[str]:
        """The figures as images that the page embeds, so that ids in one cannot clash with those in another."""
        return [f"data:image/svg+xml;base64,{base64.b64encode(svg.encode()).decode()}" for svg in self.pictures]


def write_results_page(
    path: Path,
    sections: Sequence[Section],
    *,
    title: str,
    summary: str,
    facts: Mapping[str, str],
    missing: Mapping[str, str],
) -> None:
    """Write results as one HTML file that opens offline.

    Parameters
    ----------
    path : file to write, in a folder that exists; an existing file is replaced.
    sections : the results, in the order of the page.
    title, summary : heading, and sentences under it.
    facts : what the results were made with, as label -> text.
    missing : results that are not on the page, and why.
    """
    values = {"title": title, "summary": summary, "facts": facts, "sections": sections, "missing": dict(missing)}
    write(path, render("page.html", "featnorm.paper", **values))
