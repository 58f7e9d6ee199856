"""The page of scored images: all that is on it, and how it is sorted, filtered and searched in a browser."""

import base64
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image

from featnorm.hidden import Why
from featnorm.hidden.examples import Neighbor
from featnorm.inputs import IMAGES
from featnorm.report.scores import ScoredItem, write_scores_page
from featnorm.verdict import ItemVerdict
from pages import Page, check

pytestmark = pytest.mark.slow

ODD = """a "quoted" & <b>bold</b> 'name'"""


def picture(i, size=(120, 90)):
    return Image.fromarray(np.random.default_rng(i).integers(0, 256, (*size[::-1], 3), np.uint8))


def shown(i, *, flagged, folder="new/a", predicted="cat", heat=True, name=None, group=None):
    thumbnail = None if i % 4 == 3 else IMAGES.preview(picture(i % 2))
    nearest = [Neighbor(i % 2, 0.83, "dog", thumbnail), Neighbor(5, 0.5, ODD, b"damaged")]
    map_ = -torch.eye(3) if heat else None
    terms = [("MSP()", 1.5), ("KNN()", -i)] if i % 2 else []
    why = Why(
        terms=terms,
        nearest=nearest,
        heat=map_,
        compared=heat,
        no_heat="" if heat else "the model does not average maps",
    )
    verdict = ItemVerdict(
        name or f"{folder}/{i}.png", float(i), 0.01 * (i + 1), not flagged, predicted, None, group
    )
    return ScoredItem(verdict._replace(why=why), folder, picture(i), np.full((30, 40), 0.5, np.float32))


def written(tmp_path, cards, *, flagged=None, folders=None, unread=()):
    path = tmp_path / "page.html"
    folders = folders or {"new/a": (60, 3), "new/b": (40, 1)}
    write_scores_page(
        path,
        kind=IMAGES,
        title="new",
        summary="4 of 100 images look unlike yours.",
        detail="KNN() is calibrated.",
        facts={"images": "x" * 80, ODD: ODD},
        calibration_scores=np.random.default_rng(0).normal(30, 3, 200),
        scores=np.random.default_rng(1).normal(30, 9, 100),
        threshold=24.0,
        flagged=sum(counts[1] for counts in folders.values()) if flagged is None else flagged,
        folders=folders,
        shown=cards,
        unread=list(unread),
        unread_count=len(unread),
    )
    return Page(path.read_text("utf-8"))


def few():
    kinds = [("new/b", "dog"), ("new/a", "cat"), ("new/a", "dog"), ("new/a", "cat")]
    cards = [shown(i, flagged=True, folder=f, predicted=p) for i, (f, p) in enumerate(kinds)]
    return [*cards, *(shown(i, flagged=False) for i in range(4, 9))]


def test_everything_is_on_the_page(tmp_path):
    page = written(tmp_path, few(), unread=[("broken.png", "not an image")])
    check(page)
    for text in (
        *("Folders", "new/a", "new/b", "5.0", "2.5", "broken.png", "not an image", "dog", "0.83", ODD),
        "4 of 100 images look unlike yours.",
        "KNN() is calibrated.",
        "Then the other 5 images with the lowest scores.",
        "The score is the sum of MSP() and KNN(), in this order,",
        "score 3 = +1.50 −3.00",
        "the image lowers the score here",
        "compared with the average of the most similar images",
        "most similar ones of a sample of the images that the detector was fitted to",
    ):
        assert text in page.text
    assert page.text.count("predicted:") == 5
    assert page.text.count("nearest class:") == 4, "of those that are flagged"
    # Nine images and their heat maps, and two thumbnails shared by the cards; the damaged one costs its picture.
    assert page.tags["image"] == 9 + 9 + 2
    assert "form" in page.tags
    assert page.values("hidden"), "the controls are hidden without JavaScript"
    assert "default-src 'none'" in page.values("content")[-1]


def test_a_heat_map_is_colored_where_it_is(tmp_path):
    """Orange along the diagonal, where the score is lowered; blue where it is raised; gray elsewhere."""
    card = shown(0, flagged=True)
    card.verdict.why.heat[0, 2] = 1.0
    page = written(tmp_path, [card])
    uri = next(attrs["href"] for tag, attrs in page.attributes if tag == "image" and attrs["id"] == "m0")
    heat = np.asarray(Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2]))).convert("RGB")).astype(int)
    assert heat.shape == (72, 96, 3)
    warm = heat[..., 0] - heat[..., 2]
    assert warm[12, 16] > 80
    assert warm[60, 80] > 80
    assert warm[12, 80] < -80
    assert abs(warm[60, 16]) < 40


def test_what_there_is_no_heat_for_is_said_once(tmp_path):
    page = written(tmp_path, [shown(i, flagged=True, heat=False) for i in range(3)])
    check(page)
    assert page.text.count("There are no heat maps: the model does not average maps.") == 1
    assert "heat map over" not in page.text


def test_a_group_is_named(tmp_path):
    page = written(tmp_path, [shown(0, flagged=True, group="camera 1"), shown(1, flagged=True, group="cat")])
    assert "group: camera 1" in page.text
    assert page.text.count("group: ") == 1, "a group that is the predicted class is not repeated"
    assert "each group has its own" in page.text


def test_names_are_escaped(tmp_path):
    name = "</script><script>alert(1)</script>"
    cards = [shown(0, flagged=True, name=name, folder=ODD, predicted=name), shown(1, flagged=True, predicted=ODD)]
    page = written(tmp_path, cards, folders={ODD: (9, 1), name: (9, 1)})
    check(page)
    assert page.tags["b"] == 0
    assert page.tags["script"] == 3
    assert name in page.values("data-name")


def test_without_flagged_images_and_without_any(tmp_path):
    page = written(tmp_path, [shown(0, flagged=False)], folders={"new": (100, 0)})
    check(page)
    assert "No image is flagged" in page.text
    assert "The image with the lowest score." in page.text
    assert "Folders" not in page.text
    page = written(tmp_path, [], folders={})
    check(page)
    assert "No image could be read" in page.text


def test_many_folders_and_flagged_images(tmp_path):
    folders = {f"new/{i}": (100, i % 7) for i in range(1000)}
    page = written(tmp_path, [shown(i, flagged=True) for i in range(100)], folders=folders)
    check(page)
    assert "The 200 of 1,000 folders with the largest share of flagged images" in page.text
    assert "The 100 flagged images with the lowest scores, of 2,997" in page.text
    assert len(page.source) < 1_500_000


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_it_is_sorted_filtered_and_searched(browser, tmp_path, scheme):
    written(tmp_path, few())
    page = browser.new_page(viewport={"width": 1280, "height": 800}, color_scheme=scheme)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on("console", lambda message: errors.append(message.text))
    page.goto((tmp_path / "page.html").as_uri())

    def names():
        return [re.sub(r".*/", "", card.inner_text()) for card in page.locator("#cards > li:visible .name").all()]

    every = [f"{i}.png" for i in range(9)]
    assert names() == every
    assert page.evaluate("document.documentElement.scrollHeight") <= 2 * 800
    page.get_by_label("Show").select_option("flagged")
    assert names() == every[:4]
    assert page.locator("#count").inner_text() == "4 of 9 shown"
    page.get_by_label("Predicted class").select_option("dog")
    assert names() == ["0.png", "2.png"]
    page.get_by_label("Sort by").select_option("folder")
    assert names() == ["2.png", "0.png"]
    page.locator("select[name=folder]").select_option("new/b")
    assert names() == ["0.png"]
    for name in ("folder", "show", "predicted"):
        page.locator(f"select[name={name}]").select_option("")
    page.get_by_label("Sort by").select_option("score")
    assert names() == every
    # By keyboard alone.
    page.get_by_label("Search by name").focus()
    page.keyboard.type("A/7")
    assert names() == ["7.png"]
    page.keyboard.press("Enter")
    assert names() == ["7.png"]
    assert errors == []


@pytest.mark.parametrize("script", [True, False])
def test_a_phone_scrolls_down_only_and_needs_no_script(browser, tmp_path, script):
    folder = "a/rather/long/folder/that/does/not/fit/on/the/screen/of/any/phone"
    written(
        tmp_path,
        [*few(), shown(9, flagged=False, folder=folder, predicted="w" * 60)],
        folders={"new/a": (60, 3), folder: (12_345, 678)},
        unread=[("x" * 90, "not an image in a format that featnorm reads")],
    )
    page = browser.new_page(viewport={"width": 390, "height": 844}, java_script_enabled=script)
    page.goto((tmp_path / "page.html").as_uri())
    assert page.locator("#cards > li:visible").count() == 10
    assert page.locator("#controls").is_visible() == script
    assert page.locator("html").evaluate("html => html.scrollWidth") == 390
    # Tables are not scrolled sideways either, and all parts have the same margins.
    regions = page.locator(".scroll")
    assert regions.count() == 2
    assert regions.evaluate_all("all => all.every(region => region.scrollWidth === region.clientWidth)")
    visible = page.locator("h1, h2, .lead, .overview > *, .scroll, #controls, #cards > li").and_(
        page.locator(":visible")
    )
    sides = visible.evaluate_all(
        "all => all.map(part => part.getBoundingClientRect()).map(({ left, right }) => [left, right])"
    )
    assert {tuple(side) for side in sides} == {tuple(sides[0])}
