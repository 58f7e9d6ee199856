"""The pages of results show the tables of the kept results."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
#: Those that keep results beside them.
PAGES = sorted({file.parent.name for file in (ROOT / "docs" / "results").glob("*/*.json")})
TOOL = ROOT / "tools" / "update_results.py"


@pytest.fixture(scope="module")
def update_results():
    spec = importlib.util.spec_from_file_location("update_results", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", PAGES)
def test_the_published_tables_are_of_the_published_results(update_results, page):
    assert list((update_results.RESULTS / page).glob("*.json"))
    text = (update_results.RESULTS / f"{page}.md").read_text("utf-8")
    assert update_results.render(page) == text, "run tools/update_results.py"


def test_every_result_is_on_a_page(update_results):
    assert {"cifar10", "own-images", "imagenet", "theory", "label-free", "one-class", "speed"} <= set(PAGES)
    assert set(update_results.PAGES) == set(PAGES)
    for page in PAGES:
        kept = {file.stem for file in (update_results.RESULTS / page).glob("*.json")}
        assert kept <= {study.name for study in update_results.on_page(page)} | set(
            update_results.OTHERS.get(page, ())
        )
