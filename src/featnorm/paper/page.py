"""A page of many results: tables and figures, one after another, with what each was made with."""

import base64
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from featnorm.report.html import render, write


@dataclass(frozen=True)
class Section:
    """A result as the page shows it.

    Parameters
    ----------
    name : by which the page refers to it, such as "table3"; no two are the same.
    title : its heading.
    headers, rows : of its table; each row is as long as the headers, its first cell names it.
    notes : what to know of it.
    pictures : its figures as SVG text.
    """

    name: str
    title: str
    headers: Sequence[str]
    rows: Sequence[Sequence[str]]
    notes: Sequence[str] = ()
    pictures: Sequence[str] = ()

    @property
    def uris(self) -> list[str]:
        """The figures as a page embeds them: as images, so that ids inside of one cannot meet those of another."""
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
    """Write results as one HTML file, which opens offline.

    Parameters
    ----------
    path : the file to write, in a directory that exists; a file that is there is replaced.
    sections : the results, in the order of the page.
    title, summary, facts : the heading, sentences under it, and what a reader should know, by short names.
    missing : results that there are none of, and why.
    """
    write(
        path,
        render(
            "page.html",
            "featnorm.paper",
            title=title,
            summary=summary,
            facts=facts,
            sections=sections,
            missing=dict(missing),
        ),
    )
