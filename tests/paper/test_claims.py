"""The page of claims: every row names a verdict, and numbers that stand on the page that it links to."""

import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).parents[2] / "docs" / "results"
VERDICTS = {"holds", "holds partly", "fails", "not judged"}
_NUMBER = re.compile(r"\d+(?:\.\d+)?")


def rows():
    """The cells of the rows of every table."""
    lines = (RESULTS / "claims.md").read_text("utf-8").splitlines()
    table = [line for line in lines if line.startswith("| ") and not line.startswith(("| ---", "| Claim |"))]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table]


@pytest.mark.parametrize("row", rows(), ids=lambda row: row[0][:60])
def test_a_row_has_a_verdict_and_numbers_of_its_page(row):
    _, verdict, numbers, _, page = row
    assert verdict in VERDICTS
    (file,) = re.findall(r"\]\(([^)#]+)", page)
    text = (RESULTS / file).read_text("utf-8")
    absent = set(_NUMBER.findall(numbers)) - set(_NUMBER.findall(text))
    assert not absent, f"{sorted(absent)} are not in {file}"


def test_the_page_covers_every_table_and_figure_of_the_paper():
    claims = [row[0] for row in rows()]
    for kind, numbers in {"Fig": [*range(1, 7), *range(8, 15)], "Table": range(1, 13)}.items():
        for number in numbers:
            assert any(re.search(rf"{kind}[^()]*\b{number}[a-d]*\b", claim) for claim in claims), (kind, number)


def test_the_summary_counts_the_verdicts():
    found = [row[1] for row in rows()]
    text = " ".join((RESULTS / "claims.md").read_text("utf-8").split())
    counts = [len(found), *(found.count(verdict) for verdict in ("holds", "holds partly", "fails", "not judged"))]
    expected = "Of {} claims, {} hold, {} hold partly, {} fail, and {} are not judged."
    assert expected.format(*counts) in text
