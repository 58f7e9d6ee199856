"""The page of the service in a real browser."""

import copy
import io
import re
import threading
import time
from contextlib import contextmanager

import numpy as np
import pytest
import uvicorn
from fastapi import FastAPI
from PIL import Image

import featnorm as fn
import tiny_texts
from featnorm.fitting import fit_source
from featnorm.inputs import IMAGES, ROWS, TEXTS, open_source
from featnorm.serve import Limits, ScorerFile, create_app, workers
from featnorm.serve.page import home_page
from featnorm.serve.server import _Server, bind

playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
# A machine that is busy takes longer than the 5 seconds of the default.
playwright.expect.set_options(timeout=20_000)
EVIL = "<img src=x onerror=alert(1)>.png"


@pytest.fixture(scope="module")
def scorer(folder, loaded, cache):
    source = open_source(str(folder))
    runtime = fn.Runtime(progress=False, workers=0)
    return fit_source(source, loaded, detector=fn.KNN(k=3), cache=cache, runtime=runtime)[0]


@contextmanager
def served(app):
    """Serve an application on a free port in a thread, and yield its URL."""
    bound = bind("127.0.0.1", 0)
    started = threading.Event()
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, ws="none"), started.set, 10.0)
    thread = threading.Thread(target=server.run, args=([bound],))
    thread.start()
    try:
        assert started.wait(30)
        yield f"http://127.0.0.1:{bound.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(30)


@pytest.fixture(scope="module")
def url(scorer):
    with served(create_app(scorer)) as url:
        yield url


def catch_choosers(page):
    """Intercept file choosers from the start, because a key that is pressed at once opens one immediately."""
    page.on("filechooser", lambda _: None)


@pytest.fixture
def page(browser):
    """A page without errors in its scripts, or violations of its content security policy."""
    page = browser.new_page(viewport={"width": 1100, "height": 900})
    page.set_default_timeout(20_000)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.on(
        "console",
        lambda message: errors.append(message.text) if "Content Security Policy" in message.text else None,
    )
    page.on("dialog", lambda dialog: errors.append(dialog.message))
    catch_choosers(page)
    yield page
    page.close()
    assert not errors


def picture(name, color, size=(32, 32)):
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "PNG")
    return {"name": name, "mimeType": "image/png", "buffer": file.getvalue()}


def image_of(folder, name="005.png"):
    (file,) = folder.glob(f"*/{name}")
    return {"name": name, "mimeType": "image/png", "buffer": file.read_bytes()}


def card(page, name):
    return page.locator(".card", has=page.get_by_role("heading", name=name, exact=True))


def tally(page, words):
    playwright.expect(page.locator("#tally")).to_have_text(words)


def test_without_a_script_the_page_has_the_words_of_the_scorers():
    words = {
        frozenset({IMAGES}): (
            "Does the model know this image?",
            "Drop an image to see",
            "JavaScript to send images",
        ),
        frozenset({TEXTS}): ("Does the model know this text?", "Paste a text to see", "JavaScript to send texts"),
        frozenset({ROWS}): (
            "Does the model know this row?",
            "Paste a row to see",
            'Paste <span id="pasted">rows,',
        ),
        frozenset({IMAGES, ROWS}): ("know this input?", "Send an input to see", "JavaScript to send inputs"),
    }
    for kinds, found in words.items():
        content = home_page(kinds).body.decode()
        body = content[content.index("</style>") : content.index('"use strict"')]
        for text in found:
            assert text in body
        pasted = not kinds & {IMAGES}
        assert ('<label class="drop" id="drop" hidden>' in body) == pasted
        assert ('<form class="paste" id="paste" hidden>' in body) != pasted
        if pasted:  # the rest is hidden
            assert "image" not in body[: body.index('<label class="drop"')]


def test_chosen_images_are_scored(page, url, folder):
    page.goto(url)
    broken = {"name": EVIL, "mimeType": "image/png", "buffer": b"no"}
    page.set_input_files("#files", [image_of(folder), picture("white.png", "white", (300, 200)), broken])
    tally(page, "2 images scored, 1 flagged as OOD, 1 not scored.")
    in_distribution = card(page, "005.png")
    playwright.expect(in_distribution.locator(".verdict")).to_have_text("In-distribution")
    playwright.expect(in_distribution).to_contain_text("Predicted class: b")
    assert re.search(r"p-value 0\.\d+, score −\d", in_distribution.inner_text())
    assert in_distribution.get_by_role(
        "img", name=re.compile("In-distribution: score .* threshold .* p-value")
    ).is_visible()
    assert in_distribution.locator("circle.here").count() == 1
    ood = card(page, "white.png")
    playwright.expect(ood.locator(".verdict")).to_have_text("Out-of-distribution")
    assert ood.locator("path.here").count() == 1  # outside the histogram
    assert ood.locator(".thumb img").first.evaluate("image => image.naturalWidth") == 300
    ood.get_by_text("Units of the last hidden layer").click()
    assert ood.get_by_role("rowheader", name="the network predicts").is_visible()
    unreadable = card(page, EVIL)
    playwright.expect(unreadable).to_contain_text("not an image in a format that featnorm reads")
    assert unreadable.locator("img").count() == 0
    assert "KNN(k=3)" in page.locator("#about").inner_text()
    page.get_by_role("button", name="Clear").click()
    assert page.locator(".card").count() == 0


def test_flagged_images_have_heat_maps_and_similar_images(page, url, folder):
    page.goto(url)
    page.set_input_files("#files", [image_of(folder), picture("white.png", "white", (300, 200))])
    tally(page, "2 images scored, 1 flagged as OOD.")
    ood, in_distribution = card(page, "white.png"), card(page, "005.png")
    heat = ood.get_by_role("img", name="Heat map of white.png")
    similar = ood.get_by_role("list", name="Most similar in-distribution images").get_by_role("listitem")
    pictures = [heat, *similar.get_by_role("img", name=re.compile("^similar image, [a-d]$")).all()]
    assert (len(pictures), similar.count()) == (4, 3)
    for shown in pictures:
        assert shown.evaluate("image => image.decode().then(() => image.naturalWidth)") in (32, 96)
    assert re.fullmatch(r"[a-d]\s0\.\d\d", similar.first.inner_text())
    assert in_distribution.locator("img").count() == 1
    assert in_distribution.locator(".similar").count() == 0
    for note in ("Under each flagged image are the most similar ones", "the average of the most similar images"):
        assert page.get_by_text(note).is_visible()
    assert page.locator("#no-heat").inner_text() == ""
    page.get_by_role("button", name="Clear").click()
    assert not page.locator("#heat-note").is_visible()


def test_what_has_no_heat_map_says_why(page, scorer, folder):
    other = copy.deepcopy(scorer)
    other.examples.thumbnails = None
    other.detector = fn.Views(other.detector)
    with served(create_app(other)) as url:
        page.goto(url)
        page.set_input_files("#files", [picture("white.png", "white")])
        tally(page, "1 image scored, 1 flagged as OOD.")
        assert page.locator("#no-heat").inner_text().startswith("Some images have no heat map: Views(")
        assert page.locator(".card img").count() == 1
        assert page.locator(".similar li").count() == 3
        assert page.locator(".similar .thumb").count() == 0


def test_the_drift_of_all_images_is_shown(page, scorer, folder):
    with served(create_app(scorer)) as url:
        page.goto(url)
        playwright.expect(page.locator("#about")).to_be_visible()
        drift = page.locator("#drift")
        playwright.expect(drift).to_be_empty()
        page.set_input_files("#files", [image_of(folder)])
        playwright.expect(drift).to_contain_text(
            "No drift in the 1 image scored since the detector was loaded: the "
        )
        playwright.expect(drift).to_contain_text("and the alarm is raised at 100 to 1.")
        page.set_input_files("#files", [picture(f"{i}.png", "white") for i in range(40)])
        playwright.expect(drift).to_contain_text("of 41 scored since the detector was loaded, the evidence")
        assert drift.inner_text().startswith("Drift: at image ")


def test_dropped_images_are_scored(page, url, folder):
    page.goto(url)
    data = page.evaluate_handle(
        """(bytes) => {
            const data = new DataTransfer();
            for (const name of ["one.png", "two.png"]) data.items.add(new File([new Uint8Array(bytes)], name));
            return data;
        }""",
        list(image_of(folder)["buffer"]),
    )
    page.dispatch_event(".drop", "dragenter", {"dataTransfer": data})
    playwright.expect(page.locator("body")).to_have_class("over")
    page.dispatch_event(".drop", "drop", {"dataTransfer": data})
    playwright.expect(page.locator("body")).not_to_have_class("over")
    tally(page, "2 images scored, 0 flagged as OOD.")


def test_without_a_mouse(page, url, folder):
    page.goto(url)
    for _ in range(2):  # skip the button of the theme
        page.keyboard.press("Tab")
    assert page.locator("#files").evaluate("input => input === document.activeElement")
    with page.expect_file_chooser() as chooser:
        page.keyboard.press("Enter")
    chooser.value.set_files([image_of(folder)])
    tally(page, "1 image scored, 0 flagged as OOD.")
    page.locator("summary").focus()
    page.keyboard.press("Enter")
    assert page.get_by_role("rowheader", name="the network predicts").is_visible()


def test_on_a_phone(browser, url, folder):
    page = browser.new_page(viewport={"width": 360, "height": 740}, is_mobile=True, has_touch=True)
    catch_choosers(page)
    page.goto(url)
    with page.expect_file_chooser() as chooser:
        page.locator(".drop").tap()
    chooser.value.set_files([image_of(folder), picture("a" * 90 + ".png", "white")])
    tally(page, "2 images scored, 1 flagged as OOD.")
    page.locator("summary").first.tap()
    assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.close()


def test_pasted_texts_and_rows_on_a_phone(browser, tmp_path):
    tiny_texts.write_texts(tmp_path / "known.parquet", 2, 60, tiny_texts.WORDS[4:])
    options = {"cache": tmp_path / "cache", "runtime": fn.Runtime(progress=False, workers=0)}
    encoder = f"hf:{tiny_texts.saved(tmp_path / 'encoder')}"
    scorers = {
        "words": fn.fit(tmp_path / "known.parquet", encoder, detector="KNN(k=3)", **options),
        "numbers": fn.fit(np.random.default_rng(0).normal(size=(200, 3)), **options),
    }
    page = browser.new_page(viewport={"width": 360, "height": 740})
    with served(create_app(scorers)) as url:
        page.goto(url)
        for name, lines, heading in (
            ("words", "where is my card ?\nthe news is lost", "where is my card ?"),
            ("numbers", "0.1, 0.2, 0.3\n[90, -80, 70]", "0.1, 0.2, 0.3"),
        ):
            page.get_by_label("Detector", exact=True).select_option(name)
            page.locator("textarea").fill(lines)
            page.get_by_role("button", name="Score them").click()
            playwright.expect(page.locator("#tally")).to_contain_text("2 ")
            shown = card(page, heading).get_by_role("heading")
            # Beside the plot, the words would have a column of a few letters.
            assert shown.bounding_box()["width"] > 250
            assert page.evaluate("() => document.documentElement.scrollWidth") <= 360
    page.close()


def test_many_images_are_sent_a_few_at_a_time(page, url, folder):
    requests = []
    page.on("request", lambda request: requests.append(request) if "/score?" in request.url else None)
    page.goto(url)
    page.set_input_files("#files", [image_of(folder) | {"name": f"{i}.png"} for i in range(20)])
    tally(page, "20 images scored, 0 flagged as OOD.")
    assert len(requests) == 3
    assert [card.inner_text() for card in page.locator(".card h3").all()] == [f"{i}.png" for i in range(20)]


def test_a_token_is_required_and_kept(page, scorer, folder):
    with served(create_app(scorer, token="s3cret")) as url:
        page.goto(url)
        secret = page.get_by_label("This service requires a token")
        playwright.expect(secret).to_be_focused()
        assert not page.locator("#about").is_visible()
        page.set_input_files("#files", [image_of(folder)])
        tally(page, "0 images scored, 1 waiting.")
        secret.fill("other")
        page.get_by_role("button", name="Use this token").click()
        playwright.expect(page.locator("#wrong")).to_have_text("This token is wrong.")
        secret.fill("s3cret")
        secret.press("Enter")
        tally(page, "1 image scored, 0 flagged as OOD.")
        assert not secret.is_visible()
        page.reload()
        playwright.expect(page.locator("#about")).to_be_visible()
        assert not secret.is_visible()


def test_errors_are_shown(page, scorer, folder):
    with served(create_app(scorer, Limits(body_bytes=200_000))) as url:
        page.goto(url)
        playwright.expect(page.locator("#bounds")).to_contain_text("up to 195 kB each")
        large = {"name": "large.png", "mimeType": "image/png", "buffer": b"x" * 190_000}
        page.set_input_files("#files", [large])
        playwright.expect(card(page, "large.png")).to_contain_text("The file has 186 kB; the maximum is 131 kB")
        page.get_by_role("button", name="Clear").click()

        page.context.set_offline(True)
        page.set_input_files("#files", [image_of(folder)])
        playwright.expect(page.get_by_role("alert").filter(has_text="cannot be reached")).to_be_visible()
        playwright.expect(card(page, "005.png")).to_contain_text("Not scored yet")
        page.context.set_offline(False)
        page.get_by_role("button", name="Try again").click()
        tally(page, "1 image scored, 0 flagged as OOD.")
        assert not page.locator("#trouble").is_visible()

        times = []

        def busy(route):
            times.append(route)
            if len(times) > 2:
                return route.continue_()
            return route.fulfill(
                status=503, headers={"Retry-After": "0.01"}, json={"error": "9 images wait already"}
            )

        page.route("**/v1/*/score*", busy)
        page.set_input_files("#files", [image_of(folder, "006.png")])
        tally(page, "2 images scored, 0 flagged as OOD.")
        assert len(times) == 3
        page.unroute("**/v1/*/score*")
        too_much = {"error": "the body is longer than 9 bytes"}
        page.route("**/v1/*/score*", lambda route: route.fulfill(status=413, json=too_much))
        page.set_input_files("#files", [image_of(folder, "007.png")])
        playwright.expect(page.locator("#message")).to_have_text(
            "The request is too large: the body is longer than 9 bytes."
        )


def test_another_scorer_is_chosen(page, scorer, folder):
    other = copy.deepcopy(scorer)
    other.calibration = scorer.calibration.with_tpr(0.5)
    requests = []
    page.on("request", lambda request: requests.append(request.url) if request.method == "POST" else None)
    with served(create_app({"colors": scorer, "strict ones": other})) as url:
        page.goto(url)
        choice = page.get_by_label("Detector", exact=True)
        playwright.expect(choice).to_have_value("colors")
        playwright.expect(page.locator("#promise")).to_contain_text("accepts at least 95 %")
        page.set_input_files("#files", [image_of(folder, f"{i:03}.png") for i in range(5, 25)])
        tally(page, re.compile("^20 images scored"))
        before = page.locator("#tally").inner_text()
        plots = page.locator(".plot").count()
        choice.select_option("strict ones")  # all images are sent again
        playwright.expect(page.locator("#promise")).to_contain_text("accepts at least 50 %")
        playwright.expect(page.locator("#tally")).not_to_have_text(before)
        tally(page, re.compile("^20 images scored"))
        assert [url.rsplit("/", 2)[1] for url in requests] == ["colors"] * 3 + ["strict%20ones"] * 3
        assert page.locator(".plot").count() == plots == 20
        # While requests are under way.
        page.route("**/colors/score*", lambda route: (time.sleep(0.1), route.continue_()))
        choice.select_option("colors")
        choice.select_option("strict ones")
        choice.select_option("colors")
        tally(page, before)
        assert page.locator(".plot").count() == 20
        assert not page.locator("#trouble").is_visible()


def test_the_group_of_the_images_is_chosen(page, scorer, folder):
    grouped = copy.deepcopy(scorer)
    grouped.thresholds_by = "folder"
    scores = grouped.calibration.scores
    grouped.use_scores(scores, ["low"] * 24 + ["high"] * (len(scores) - 24), tpr=0.9)
    with served(create_app({"one": scorer, "two": grouped})) as url:
        page.goto(url)
        page.set_input_files("#files", [image_of(folder)])
        tally(page, "1 image scored, 0 flagged as OOD.")
        group = page.get_by_label("Group of the images")
        assert not group.is_visible()
        page.get_by_label("Detector", exact=True).select_option("two")
        playwright.expect(page.locator("#promise")).to_contain_text(
            "at least 90 % of in-distribution images of every group"
        )
        first = grouped.calibration.group_names[0]
        playwright.expect(group).to_have_value(first)
        lines = {}
        for name in ("high", "low"):
            group.select_option(name)
            playwright.expect(card(page, "005.png")).to_contain_text(f"Group: {name}")
            lines[name] = page.locator(".plot .threshold").bounding_box()["x"]
        assert lines["low"] < lines["high"]
        page.get_by_label("Detector", exact=True).select_option("one")
        tally(page, "1 image scored, 0 flagged as OOD.")
        playwright.expect(card(page, "005.png")).not_to_contain_text("Group")
        assert not group.is_visible()


def test_a_single_scorer_is_no_choice(page, url):
    page.goto(url)
    playwright.expect(page.locator("#about")).to_be_visible()
    assert not page.locator("#scorers").is_visible()


def test_it_shows_a_file_that_was_replaced(page, scorer, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "_POLL", 0.1)
    file = tmp_path / "d.featnorm"
    scorer.save(file, weights=True)
    with served(create_app({"d": ScorerFile(file)})) as url:
        page.goto(url)
        playwright.expect(page.locator("#promise")).to_contain_text("accepts at least 95 %")
        other = copy.deepcopy(scorer)
        other.calibration = scorer.calibration.with_tpr(0.5)
        other.save(file, weights=True)
        digest = page.request.get(f"{url}v1/detector").json()["digest"]
        while page.request.get(f"{url}v1/detector").json()["digest"] == digest:
            time.sleep(0.02)
        page.set_input_files("#files", [image_of(folder)])
        tally(page, re.compile("^1 image scored"))
        playwright.expect(page.locator("#promise")).to_contain_text("accepts at least 50 %")


@pytest.mark.parametrize("place", ["mounted", "kept by the proxy", "removed by the proxy"])
def test_under_a_path(page, scorer, folder, place):
    if place == "mounted":
        app = FastAPI()
        app.mount("/a/b", create_app(scorer))
    else:
        app = create_app(scorer, root_path="/a/b")
    if place == "removed by the proxy":

        async def proxied(scope, receive, send, app=app):
            path = scope.get("path", "")
            await app({**scope, "path": path.removeprefix("/a/b") or "/"}, receive, send)

        app = proxied
    with served(app) as url:
        for ending in ("", "/", "?x=1#y"):
            page.goto(f"{url}a/b{ending}")
            playwright.expect(page.locator("#about")).to_be_visible()
            page.set_input_files("#files", [image_of(folder)])
            tally(page, "1 image scored, 0 flagged as OOD.")


def test_a_wrong_address_leads_to_the_page(page, url):
    answer = page.goto(f"{url}v1/nothing")
    assert answer.status == 404
    playwright.expect(page.get_by_role("heading", name="There is nothing at this address")).to_be_visible()
    page.get_by_text("a page on which images can be dropped").get_by_role("link").click()
    playwright.expect(page.locator("#about")).to_be_visible()


def test_the_theme(page, url):
    page.emulate_media(color_scheme="dark")
    page.goto(url)
    ground = "() => getComputedStyle(document.body).backgroundColor"
    assert page.evaluate(ground) == "rgb(21, 24, 28)"
    page.get_by_role("button", name="Dark theme").click()
    assert page.evaluate(ground) == "rgb(251, 251, 249)"
