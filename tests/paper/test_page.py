"""The page of results opens offline, whatever the names are."""

import base64

from featnorm.paper.page import Section, write_results_page
from featnorm.paper.tables import Table
from pages import Page, check

ODD = """a "quoted" & <b>bold</b> 'name' $x_1$ {{ 1 }}"""


def test_a_page_of_results_shows_every_table_and_figure(tmp_path):
    picture = '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 4 3"><path id="a" d="M0 0H4"/></svg>'
    sections = [
        Section(
            "table1", Table(f"Table 1, {ODD}", ["Score", "Ours"], [["KNN", "88.1"], [ODD, "–"]], ["one seed", ODD])
        ),
        Section("figure1", Table("Figure 1", ["Scheme", "gap"], [["S", "+1.0%"]]), [picture]),
    ]
    path = tmp_path / "results.html"
    missing = {"figure13": "SVHN is not there"}
    write_results_page(path, sections, title="Results", summary="All.", facts={"Machine": "a"}, missing=missing)
    page = Page(path.read_text("utf-8"))
    check(page)
    for text in (ODD, "88.1", "one seed", "+1.0%", "figure13", "SVHN is not there", "Machine"):
        assert text in page.text
    assert page.tags["table"] == 2
    assert page.tags["details"] == 1
    ((_, image),) = [item for item in page.attributes if item[0] == "img"]
    assert base64.b64decode(image["src"].partition("base64,")[2]).decode() == picture
    assert "missing" in page.values("id")


def test_a_page_of_results_with_nothing_missing_says_nothing_of_it(tmp_path):
    path = tmp_path / "results.html"
    section = Section("table1", Table("Table 1", ["Score"], [["KNN"]]))
    write_results_page(path, [section], title="Results", summary="All.", facts={}, missing={})
    page = Page(path.read_text("utf-8"))
    check(page)
    assert "missing" not in page.values("id")
    assert "details" not in page.tags
