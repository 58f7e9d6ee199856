"""The reports: single files that work offline and in both themes, for any scores and names."""

import base64
import io
import math
import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featnorm.evaluation import Comparison, Result
from featnorm.metrics import evaluate, roc_curve
from featnorm.report import plots
from featnorm.report.comparison import write_page
from featnorm.report.html import THEMES
from featnorm.report.tables import columns, latex_table, markdown_page, markdown_table, table_rows
from pages import Page, check

pytestmark = pytest.mark.slow

ODD = """a "quoted" & <b>bold</b> 'name' $x_1$ {{ 1 }}"""


def outcome(name, id_scores, ood, microseconds=1.0):
    measures = {key: evaluate(id_scores, scores) for key, scores in ood.items()}
    return Result(name, np.asarray(id_scores), {k: np.asarray(v) for k, v in ood.items()}, measures, microseconds)


def evaluation(detectors=("NAN()", "KNN(k=50) / NAN()"), sets=("SVHN", "Textures"), n=200, seed=0):
    rng = np.random.default_rng(seed)
    result = Comparison("CIFAR-10", dict.fromkeys(sets, ""))
    for place, name in enumerate(detectors):
        ood = {key: rng.normal(0.4 * place, 1, n).astype(np.float32) for key in sets}
        result.results.append(outcome(name, rng.normal(2, 1, n).astype(np.float32), ood, 1.5 + place))
    return result


def digit(set_name: str, index: int) -> Image.Image:
    pixels = np.random.default_rng([len(set_name), index]).integers(0, 256, (8, 8), np.uint8)
    return Image.fromarray(pixels)


def written(tmp_path: Path, result: Comparison, image=None, title="A title", summary="A summary.") -> Page:
    path = tmp_path / "page.html"
    write_page(result, path, title=title, summary=summary, image=image)
    return Page(path.read_text("utf-8"))


def test_page_shows_everything(tmp_path):
    result = evaluation()
    result.accuracy = 0.9312
    result.facts = {"Model": "resnet18", "Device": "cpu"}
    result.excluded = {"ViM()": "it needs a linear classifier"}
    result.skipped = {"SVHN": [("broken.png", "it cannot be read")], "Textures": []}
    result.patterns = {name: np.eye(5, 7, dtype=bool) for name in ("CIFAR-10", "SVHN", "Textures")}
    page = written(tmp_path, result, digit)
    check(page)
    for text in (
        *("A title", "A summary.", "93.1 %", "resnet18"),
        *("Skipped detectors", "ViM()", "it needs a linear classifier"),
        *("broken.png", "it cannot be read", "CIFAR-10", "SVHN", "Textures", "14.3 % of units on"),
        "share of OOD inputs accepted when 95 % of ID inputs are accepted",
    ):
        assert text in page.text
    table = columns(result)
    assert all(cell in page.text for row in table_rows(result)[1] for cell in row[:2])
    assert all(text in page.text for column in table for text in (*column.cells, *column.intervals))
    radios = [attrs for tag, attrs in page.attributes if tag == "input" and attrs["type"] == "radio"]
    assert ["checked" in radio for radio in radios] == [True, False]
    assert page.tags["article"] == 2
    assert page.tags["details"] == 1


def test_one_set_has_no_mean_and_no_empty_sections(tmp_path):
    page = written(tmp_path, evaluation(["NAN()"], ["SVHN"]))
    check(page)
    headings = {attrs["id"] for tag, attrs in page.attributes if tag == "h2"}
    assert headings == {"detectors", "closer"}
    assert "Mean" not in page.text
    assert "image" not in page.tags


def test_table_is_sorted_and_marks_ties():
    near, far = [0.0, 1.0, 2.0, 3.0], [-4.0, -3.0, -2.0, -1.0]
    result = Comparison("ID", {"A": "", "B": ""})
    result.results = [
        outcome("poor", near, {"A": near, "B": far}, 2.0),
        outcome("good|1", near, {"A": far, "B": far}, 1234.56),
        outcome("good_2", near, {"A": far, "B": far}, 2.04),
    ]
    headers, rows = table_rows(result)
    assert headers == [
        *("Detector", "Clique", "Mean AUROC % ↑", "Mean Δ AUROC ↑", "Mean FPR95 % ↓"),
        *("A AUROC % ↑", "A FPR95 % ↓", "B AUROC % ↑", "B FPR95 % ↓"),
        "µs / input ↓",
    ]
    assert [row[0] for row in rows] == ["good|1", "good_2", "poor"]
    assert rows[2][:2] == ["poor", "a"]
    assert [text.partition(" ")[0] for text in rows[2][2:5]] == ["75.0", "−25.0", "50.0"]
    assert rows[2][5:] == ["50.0", "100.0", "100.0", "0.0", "2.0"]
    assert rows[0][-1] == "1,234.6"
    lines = markdown_table(result).splitlines()
    assert lines[2].startswith(
        r"| good\|1 | a | **100.0 [100.0, 100.0]** | +0.0 | **0.0 [0.0, 0.0]** | **100.0** | **0.0** |"
    )
    assert lines[3].startswith(
        r"| good\_2 | a | **100.0 [100.0, 100.0]** | +0.0 [+0.0, +0.0] | **0.0 [0.0, 0.0]** |"
    )
    assert lines[3].endswith("| **2.0** |")
    assert lines[4].endswith("| 50.0 | 100.0 | **100.0** | **0.0** | **2.0** |")


def test_names_are_escaped(tmp_path):
    sets = [ODD, "naïve 数据 \N{RIGHT-TO-LEFT OVERRIDE}", "</script><script>alert(1)</script>"]
    result = evaluation([ODD, "B"], sets)
    result.excluded = {ODD + "!": ODD}
    result.facts = {ODD: ODD}
    result.skipped = {sets[0]: [("caf\udce9.png", ODD)]}
    page = written(tmp_path, result, digit, ODD, ODD)
    check(page)
    assert page.tags["b"] == 0
    assert page.tags["script"] == 2
    assert page.text.count(ODD) > 10
    assert any(ODD in label for label in page.values("aria-label"))


def test_mistakes_are_those_beyond_the_threshold(tmp_path):
    result = Comparison("ID", {"OOD": ""})
    result.results = [outcome("D", np.arange(100.0), {"OOD": np.arange(-50.0, 50.0)})]
    seen = []

    def image(set_name, index):
        seen.append((set_name, index))
        return digit(set_name, index)

    page = written(tmp_path, result, image)
    assert "ID: 5 of 100 flagged (5.0 %)" in page.text
    assert "OOD: 45 of 100 accepted (45.0 %); the 12 highest scores" in page.text
    assert "threshold 5" in page.text
    assert seen == [("ID", i) for i in range(5)] + [("OOD", i) for i in range(99, 87, -1)]
    assert result.results[0].metrics["OOD"].fpr95 == 0.45


def test_an_image_is_read_and_embedded_once(tmp_path):
    result = evaluation(["NAN()"])
    result.results *= 5
    seen = Counter()

    def image(set_name, index):
        seen[set_name, index] += 1
        return digit(set_name, index)

    page = written(tmp_path, result, image)
    check(page)
    assert set(seen.values()) == {1}
    assert page.tags["image"] == len(seen)
    assert page.tags["use"] >= 5 * len(seen)


def embedded(page: Page) -> list[tuple[dict[str, str | None], Image.Image]]:
    return [
        (attrs, Image.open(io.BytesIO(base64.b64decode((attrs["href"] or "").partition(",")[2]))))
        for tag, attrs in page.attributes
        if tag == "image"
    ]


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "I;16", "F"])
@pytest.mark.parametrize("size", [(1, 1), (28, 28), (63, 10), (64, 64), (400, 3), (300, 500)])
def test_thumbnails_of_any_kind(tmp_path, mode, size):
    original = Image.new(mode, size)
    [(attrs, thumbnail), *_] = embedded(written(tmp_path, evaluation(["D"], ["A"], 20), lambda *_: original))
    assert original.size == size
    assert (attrs["width"], attrs["height"]) == tuple(map(str, thumbnail.size))
    if max(size) < 64:
        assert thumbnail.size == size
        assert "pixelated" in attrs["style"]
    else:
        assert max(thumbnail.size) <= 96
        assert "style" not in attrs


def test_an_unreadable_image_costs_its_thumbnail_only(tmp_path):
    def image(set_name, index):
        raise FileNotFoundError(index)

    page = written(tmp_path, evaluation(), image)
    check(page)
    assert "no image" in page.text
    assert "image" not in page.tags


INF = math.inf


@pytest.mark.parametrize(
    ("id_scores", "ood_scores"),
    [
        ([1.0], [0.0]),
        ([0.0], [0.0]),
        ([3.5] * 30, [3.5] * 20),
        ([-INF] * 5, [-INF] * 5),
        ([INF], [-INF]),
        ([INF, 1.0, -INF], [-INF, -INF, 2.0]),
        ([1e30, 1e30, 2.0], [-1e30, 0.0, 1.0]),
        ([1.7e308, 0.0], [-1.7e308, 1.0]),
        ([5e-324, 0.0], [0.0, 1e-310]),
        ([1e9, np.nextafter(1e9, 2e9)], [1e9]),
        (np.float32([16777216.0, 16777218.0]), np.float32([16777214.0])),
        ([0, 1, 2], [1, 1, 1]),
    ],
)
def test_degenerate_scores(tmp_path, id_scores, ood_scores):
    result = Comparison("ID", {"OOD": ""})
    result.results = [outcome("D", id_scores, {"OOD": ood_scores})]
    page = written(tmp_path, result, digit)
    check(page)
    numbers = [float(x) for d in page.values("d") for x in re.findall(r"-?\d[\d.e+-]*", d)]
    assert all(-5 <= x <= 500 for x in numbers)


@pytest.mark.parametrize(
    ("sets", "detectors"), [(1, 1), (3, 1), (8, 1), (11, 1), (1, 30), (3, 6), (8, 6), (11, 6)]
)
def test_any_number_of_sets_and_detectors(tmp_path, sets, detectors):
    names = [f"LpNorm(p={i})" for i in range(detectors)]
    page = written(tmp_path, evaluation(names, [f"set {i}" for i in range(sets)], 25))
    check(page)
    assert page.tags["article"] == detectors
    assert len([1 for tag, attrs in page.attributes if tag == "input"]) == detectors


def test_a_histogram_hides_nothing():
    inside = np.linspace(0, 1, 995)
    samples = [np.concatenate([inside, [-INF, -INF, -INF, 1e9, INF]]), np.full(100, 0.5)]
    svg, outside = plots.histogram(samples, 0.5, prefix="x", label="<label>")
    assert plots.span(samples)[0] >= 0
    assert plots.span(samples)[1] <= 1
    id_outside, ood_outside = outside
    assert id_outside.minus_infinity == 0.003
    assert id_outside.plus_infinity == 0.001
    low, high = plots.span(samples)
    assert id_outside.below == np.mean(samples[0] < low)
    assert id_outside.above == np.mean(samples[0] > high)
    assert ood_outside == plots.Outside(0, 0, 0, 0)
    assert "below" in svg
    assert "above" in svg
    assert "&lt;label&gt;" in svg


def test_a_bar_that_is_cut_says_its_height():
    scores = np.concatenate([np.full(600, -INF), np.linspace(0, 1, 400)])
    svg, _ = plots.histogram([np.linspace(0, 1, 400), scores], 0.1, prefix="x", label="")
    assert "below, up to 60\N{NO-BREAK SPACE}%" in svg


def test_thinned_curves_keep_their_shape():
    rng = np.random.default_rng(0)
    full = roc_curve(rng.normal(1.5, 1, 5000), rng.normal(0, 1, 5000))
    fpr, tpr = plots._thinned(*full)
    assert len(fpr) <= 200
    assert (fpr[0], tpr[0], fpr[-1], tpr[-1]) == (0, 0, 1, 1)
    # Along the diagonal, in which the curve only increases; it has vertical parts.
    along = np.linspace(0, 2, 4001)
    kept = np.interp(along, fpr + tpr, tpr)
    assert np.abs(kept - np.interp(along, full[0] + full[1], full[1])).max() < 0.006


def test_svgs_are_reproducible_and_follow_the_theme(tmp_path):
    first = written(tmp_path, evaluation(), digit).source
    assert written(tmp_path, evaluation(), digit).source == first
    assert "#0101" not in first
    assert "#0102" not in first
    used = set(re.findall(r"var\(--([\w-]+)\)", first))
    assert {"ink", "muted", "rule", "s0", "s1", "s2"} <= used <= set(THEMES["light"])
    styles = re.findall(r'<path[^>]*style="([^"]*)"', first)
    assert not [style for style in styles if re.search(r"#[0-9a-f]{6}", style)]


def luminance(color: str) -> float:
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return float(np.dot(linear, [0.2126, 0.7152, 0.0722]))


@pytest.mark.parametrize("name", ["light", "dark"])
def test_themes_can_be_read(tmp_path, name):
    theme = THEMES[name]
    assert theme.keys() == THEMES["light"].keys()

    def contrast(a, b):
        low, high = sorted([luminance(theme[a]), luminance(theme[b])])
        return (high + 0.05) / (low + 0.05)

    for text in ("ink", "muted", "accent"):
        for ground in ("ground", "raised"):
            assert contrast(text, ground) >= 4.5
    for line in (key for key in theme if re.fullmatch(r"s\d", key)):
        assert contrast(line, "ground") >= 3
    source = written(tmp_path, evaluation(["D"])).source
    assert "prefers-color-scheme: dark" in source
    assert f':root[data-theme="{name}"] {{ color-scheme: {name};' in source
    assert "prefers-reduced-motion" in source
    assert source.count("try {") == 2


def test_patterns_are_drawn_to_the_pixel(tmp_path):
    rng = np.random.default_rng(0)
    result = evaluation(["D"], ["A"])
    result.patterns = {"CIFAR-10": rng.random((50, 2048)) < rng.random(2048), "A": rng.random((3, 2048)) < 0.2}
    page = written(tmp_path, result)
    check(page)
    order = np.argsort(-result.patterns["CIFAR-10"].mean(0), kind="stable")
    sources = [attrs["src"] for tag, attrs in page.attributes if tag == "img"]
    for source, pattern in zip(sources, result.patterns.values(), strict=True):
        picture = Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))).convert("RGBA")
        on = np.asarray(picture)[..., 3] > 0
        assert (on == pattern[:, order].T).all()
    assert "2,048 units are more than the 512 pixel rows shown" in page.text


def test_a_large_comparison_stays_light(tmp_path):
    page = written(tmp_path, evaluation([f"LpNorm(p={i})" for i in range(20)], n=5000), digit)
    assert len(page.source.encode()) < 3e6


def test_mistakes_are_called_by_their_files(tmp_path):
    result = Comparison("ID", {"OOD": ""})
    result.results = [outcome("D", np.arange(100.0), {"OOD": np.arange(-50.0, 50.0)})]
    result.items = {"ID": [f"cats/{i}/cat.jpg" for i in range(100)]}
    page = written(tmp_path, result, digit)
    assert page.values("title") == [
        *(f"cats/{i}/cat.jpg" for i in range(5)),
        *(f"input {i}" for i in range(99, 87, -1)),
    ]
    assert page.text.count("cat.jpg") == 5


def test_a_table_in_latex_compiles(tmp_path):
    result = evaluation(["NAN()", "X(a_b=1) / Y()"], ['50% & $x_1$ ~^\\{}#<>|"', "SVHN"])
    result.ood_groups = dict.fromkeys(result.ood_groups, "near")
    table = latex_table(result)
    assert r"50\% \& \$x\_1\$ \textasciitilde{}\textasciicircum{}\textbackslash{}\{\}\#" in table
    assert r"\texttt{X(a\_b=1) / Y()}" in table
    rows = [line for line in table.splitlines() if line.endswith(r"\\")]
    width = sum(int(n) for n in re.findall(r"multicolumn{(\d+)}", rows[0]))
    assert rf"\begin{{tabular}}{{ll{'r' * width}}}" in table
    assert {len(re.findall(r"(?<!\\)&", row)) for row in rows[1:]} == {width + 1}
    if shutil.which("pdflatex") is None:
        pytest.skip("no TeX here")
    document = r"\documentclass{article}\usepackage{booktabs}\begin{document}" + table + r"\end{document}"
    (tmp_path / "t.tex").write_text(document, "utf-8")
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "t.tex"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "t.pdf").is_file()


def test_a_phone_scrolls_down_only(tmp_path, browser):
    sets = [f"a set with a rather long name {'x' * 40} {i}" for i in range(5)]
    result = evaluation([f"Mahalanobis(relative=True) + KNN(k={i})" for i in range(8)], sets, 60)
    result.items = {name: [f"folder/{'y' * 70}{i}.png" for i in range(60)] for name in ["CIFAR-10", *sets]}
    result.excluded = {"z" * 80: "w" * 200}
    written(tmp_path, result, digit)
    for width in (390, 1280):
        page = browser.new_page(viewport={"width": width, "height": 844})
        page.goto((tmp_path / "page.html").as_uri())
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_markdown_page_says_what_it_was_made_with():
    result = evaluation()
    result.excluded["ViM()"] = "too few inputs"
    result.facts["machine"] = "a small one"
    page = markdown_page(result, title="A title", summary="A summary.")
    assert page.startswith("# A title\n\nA summary.\n")
    assert "- machine: a small one" in page
    assert markdown_table(result) in page
    assert "- ViM(): too few inputs" in page
    assert "FPR95 is the share of OOD inputs accepted" in page
