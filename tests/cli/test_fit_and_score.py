"""``featnorm fit`` and ``featnorm score`` as a user types them."""

import csv
import html
import io
import json
import os
import re
import signal
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from apart import start
from featnorm import archive
from featnorm.__main__ import COMMANDS
from featnorm.cli.app import run_command
from featnorm.detectors import base
from featnorm.inputs import open_source
from featnorm.models import load_model, loading
from featnorm.records import Journal, source_digest
from featnorm.verdict import ItemVerdict
from hostile import hostile_files
from narrow import load_narrow, slow_command

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("narrow", "few_steps_throughout")]

BACKBONE = ("--model", "featnorm:cifar10-resnet18", "--workers", "0")


def pictures(folder: Path, n: int, seed: int, classes: str = "") -> Path:
    random = np.random.default_rng(seed)
    for i in range(n):
        place = folder / classes[i % len(classes)] if classes else folder
        place.mkdir(parents=True, exist_ok=True)
        pixels = random.integers(0, 256, (32, 32, 3)) // (1 + i % 3)
        Image.fromarray(pixels.astype(np.uint8)).save(place / f"{i:04}.png")
    return folder


@pytest.fixture(scope="module")
def known(tmp_path_factory):
    return pictures(tmp_path_factory.mktemp("known"), 150, 0, "abc")


@pytest.fixture(scope="module")
def detector(known, narrow, few_steps_throughout, tmp_path_factory):
    """A file fitted once, by the command."""
    out = tmp_path_factory.mktemp("detector")
    arguments = ("fit", known, "-o", out / "d.featnorm", "--cache", out / "cache", "--batch-size", 16, *BACKBONE)
    run_command([*map(str, arguments)], COMMANDS)
    return out / "d.featnorm"


def kill(*arguments, when, log):
    """Run the command in a process of its own, and kill it when something is so."""
    process = start(slow_command, *arguments, out=os.devnull, error=log)
    while process.is_alive():
        if when():
            process.kill()
            break
        time.sleep(0.005)
    process.join(300)
    assert process.exitcode == -signal.SIGKILL, log.read_text()


def lines_in(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


def rows_of(file: Path) -> list[dict[str, str]]:
    with file.open(newline="", encoding="utf-8") as opened:
        return list(csv.DictReader(opened))


def test_fit_says_what_it_learned(featnorm, known, tmp_path):
    options = ["-o", "mine.featnorm", "--cache", "cache", "--detector", "KNN(k=3)/NAN", *BACKBONE]
    status, printed, _ = featnorm("fit", known, *options)
    assert status == 0
    for words in ("150 images", "trained on 3 classes", "KNN(k=3) / NAN()", "30 held-out images",
                  "it flags at most 5.0 % of images like these; with this one, between",
                  "featnorm score mine.featnorm IMAGES", "Computed the features of 150",
                  "The file contains thumbnails of 120 images: --no-thumbnails leaves them out."):  # fmt: skip
        assert words in printed
    assert "damaged" not in printed
    assert "changed" not in printed
    whole = (tmp_path / "mine.featnorm").read_bytes()
    # The weights of the network, in single precision, and more.
    assert len(whole) > 4 * sum(weights.numel() for weights in load_narrow()[1].parameters())
    (features,) = (tmp_path / "cache").glob("*/features.f32")
    content = features.read_bytes()
    # The second of three batches.
    features.write_bytes(content[: len(content) // 2] + bytes(100) + content[len(content) // 2 + 100 :])
    status, printed, _ = featnorm("fit", known, *options)
    assert status == 0
    assert "Removed 1 damaged batch from the feature cache and recomputed it." in printed
    assert "Computed the features of 64 images (besides 86 in the cache); the next fit" in printed
    assert (tmp_path / "mine.featnorm").read_bytes() == whole
    assert "examples.thumbnails" in archive.read(tmp_path / "mine.featnorm")[0]
    status, printed, _ = featnorm("fit", known, *options, "--targets", "clusters", "--no-thumbnails")
    assert status == 0
    assert "thumbnails" not in printed
    assert "examples.thumbnails" not in archive.read(tmp_path / "mine.featnorm")[0]
    assert "The features of all images were in the cache." in printed
    assert "trained on 12 clusters" in printed


def test_a_detector_that_the_module_of_the_model_defines(featnorm, known, tmp_path, monkeypatch):
    monkeypatch.setattr(base, "_REGISTRY", dict(base._REGISTRY))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    (tmp_path / "with_detector.py").write_text(
        "import featnorm as fn\n"
        "from featnorm.models import create_model\n"
        "class LogitSpread(fn.Detector):\n"
        "    reads = ('logits',)\n"
        "    def _score(self, features):\n"
        "        return features.tensor('logits').std(1)\n"
        "def make():\n"
        "    loaded = create_model('featnorm:cifar10-resnet18')\n"
        "    return loaded.model, loaded.transform\n"
    )
    options = ["--model", "with_detector:make", "--workers", 0]
    try:
        status, _, error = featnorm("fit", known, *options, "--detector", "LogitSpread", "--cache", "cache")
        assert status == 0, error
        status, _, error = featnorm("score", "detector.featnorm", f"{known}[:3]", *options, "-o", "t.csv")
        assert status == 0, error
        assert all(row["score"] for row in rows_of(tmp_path / "t.csv"))
        sets = ["--id", f"{known}[:5]", "--ood", f"{known}[5:9]"]
        status, printed, error = featnorm("evaluate", *options, *sets, "--detector", "LogitSpread")
        assert status == 0, error
        assert "LogitSpread()" in printed
    finally:
        sys.modules.pop("with_detector", None)


def test_score_writes_a_page(featnorm, detector, known, tmp_path):
    """The most foreign first, each with its place and its reason; no name breaks the page."""
    strange = tmp_path / "new" / "<b>str\u00e4nge &.png"
    strange.parent.mkdir()
    Image.new("RGB", (400, 300), (250, 250, 0)).save(strange)
    (tmp_path / "new" / "broken.png").write_bytes(b"no")
    arguments = ("score", detector, "new", f"{known}[:150]", "--workers", 0, "--html", "page.html")
    status, printed, _ = featnorm(*arguments, "-o", "t.csv")
    assert status == 0
    assert "Wrote t.csv." in printed
    assert "Wrote page.html." in printed
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    scores = sorted((float(row["score"]), row["path"]) for row in rows_of(tmp_path / "t.csv") if row["score"])
    cards = re.findall(r'<p class="name">(.*?)</p>', page)
    flagged = sum(row["verdict"] == "OOD" for row in rows_of(tmp_path / "t.csv"))
    shown = min(100, flagged)
    shown += min(5, 100 - shown)
    assert 5 < shown <= 100
    assert cards == [html.escape(name) for _, name in scores[:shown]]
    # An image, its heat map, and the thumbnails of similar ones, each once.
    assert 2 * shown < page.count("<image ") <= 5 * shown
    assert len(set(re.findall(r'<image id="(.*?)"', page))) == page.count("<image ")
    assert page.count("largest units") == shown
    assert "not an image in a format that featnorm reads" in page
    assert "<b>" not in page
    assert not list(tmp_path.glob(".*")), "the journal is gone"
    for refused, why in (
        ("page.txt", "must end in .html"),
        (str(tmp_path / "none" / "p.html"), "there is no folder"),
    ):
        status, _, error = featnorm(*arguments[:-1], refused)
        assert status == 2
        assert why in error


def test_score_prints_a_row_an_image(featnorm, detector, known, tmp_path):
    one = tmp_path / "one.png"
    Image.new("RGB", (50, 40), (250, 250, 0)).save(one)
    status, printed, _ = featnorm("score", detector, one, f"{known}[:5]", one, "--workers", "0")
    assert status == 0
    rows = [line.split() for line in printed.splitlines() if line.rstrip(")abc(").rstrip().endswith(".png")]
    assert [Path(row[3]).name for row in rows] == [
        "one.png",
        *(f"{i:04}.png" for i in (0, 3, 6, 9, 12)),
        "one.png",
    ]
    assert all(row[2] in ("ID", "OOD") for row in rows)
    assert rows[0][:3] == rows[-1][:3]
    assert "of 7 images flagged as OOD" in printed
    assert "images per second" in printed


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_score_writes_a_table(featnorm, detector, known, tmp_path, ending):
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "brok\u00e9n, \u201cfile\u201d.png").write_bytes(b"no")
    status, printed, _ = featnorm("score", detector, known, "more", "-o", f"t.{ending}", "--batch-size", 32)
    assert status == 0
    out = tmp_path / f"t.{ending}"
    if ending == "csv":
        rows = rows_of(out)
    elif ending == "jsonl":
        rows = [json.loads(line) for line in out.read_text().splitlines()]
    else:
        rows = pq.read_table(out).to_pylist()
    assert len(rows) == 151
    assert list(rows[0]) == ["path", "score", "p_value", "verdict", "predicted", "error", "group"]
    assert [row["verdict"] for row in rows].count("ID") > 125
    assert {row["predicted"] for row in rows[:-1]} <= {"a", "b", "c"}
    assert rows[-1]["path"].endswith("brok\u00e9n, \u201cfile\u201d.png")
    assert "not an image" in rows[-1]["error"]
    assert not rows[-1]["score"]
    assert "skipped 1 unreadable image" in printed
    assert sorted(place.name for place in tmp_path.iterdir()) == ["more", f"t.{ending}"]


def test_monitor_reads_what_fit_and_score_wrote(featnorm, detector, tmp_path):
    more = pictures(tmp_path / "more", 200, 7)
    (more / "zzz.png").write_bytes(b"no")
    for out in ("t.csv", "t.jsonl", "t.parquet"):
        assert featnorm("score", detector, more, "-o", out, "--workers", "0")[0] == 0
        status, printed, _ = featnorm("monitor", detector, out)
        assert status == 0
        assert (
            f"200 scores from {out} (1 row without a score skipped), compared with 20 calibration scores"
            in printed
        )
    black = tmp_path / "black"
    black.mkdir()
    for i in range(200):
        Image.new("RGB", (32, 32), (i % 8, 0, 0)).save(black / f"{i:04}.png")
    assert featnorm("score", detector, more, black, "-o", "t.csv", "--workers", "0")[0] == 0
    status, printed, _ = featnorm("monitor", detector, "t.csv")
    assert status == 3
    assert f", {black}/0" in printed


@pytest.mark.posix
def test_a_killed_fit_goes_on(featnorm, known, detector, tmp_path):
    cache = tmp_path / "cache"
    arguments = ("fit", known, "-o", tmp_path / "d.featnorm", "--cache", cache, "--batch-size", 16, *BACKBONE)
    ready = lambda: any(lines_in(file) >= 3 for file in cache.glob("*/index.jsonl"))  # noqa: E731
    kill(*arguments, when=ready, log=tmp_path / "log")
    assert not (tmp_path / "d.featnorm").exists()
    status, printed, _ = featnorm(*arguments)
    assert status == 0
    assert "Computed the features of 150" not in printed
    assert "the next fit on them with this model takes seconds" in printed
    assert (tmp_path / "d.featnorm").read_bytes() == detector.read_bytes()


@pytest.mark.posix
def test_a_killed_score_goes_on(featnorm, known, detector, tmp_path):
    (tmp_path / "images").symlink_to(known)
    (known / "a" / "broken.png").write_bytes(b"no")
    arguments = ["score", detector, tmp_path / "images", "--batch-size", 8, "--workers", "0", "-o"]
    assert featnorm(*arguments, tmp_path / "whole.csv")[0] == 0
    journal = tmp_path / ".killed.csv.part"
    kill(*arguments, tmp_path / "killed.csv", when=lambda: lines_in(journal) > 4, log=tmp_path / "log")
    assert not (tmp_path / "killed.csv").exists()
    status, printed, _ = featnorm(*arguments, tmp_path / "killed.csv")
    assert status == 0
    assert "resuming after" in printed
    (known / "a" / "broken.png").unlink()
    assert (tmp_path / "killed.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert not journal.exists()


def test_a_damaged_journal_is_named_and_the_table_is_whole(featnorm, detector, known, tmp_path, monkeypatch):
    arguments = ("score", detector, f"{known}[:12]", "--batch-size", 2, "--workers", 0, "-o")
    assert featnorm(*arguments, "whole.csv")[0] == 0

    def die(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "write", die)
        assert featnorm(*arguments, "t.csv")[0] == 130
    journal = tmp_path / ".t.csv.part"
    lines = journal.read_text().splitlines(keepends=True)
    assert len(lines) == 7
    lines[3] = re.sub(r"\d", lambda digit: str((int(digit[0]) + 1) % 10), lines[3], count=1)
    for damaged, words in ((lines, "line 4 of .t.csv.part is damaged"), (["null\n"], "line 1 of .t.csv.part is")):
        journal.write_text("".join(damaged))
        status, printed, error = featnorm(*arguments, "t.csv")
        assert (status, error) == (0, "")
        assert words in printed
        assert ("resuming after 4 of 12 images" in printed) == (damaged is lines)
        assert (tmp_path / "t.csv").read_bytes() == (tmp_path / "whole.csv").read_bytes()
        assert not journal.exists()


def test_a_disk_that_is_full_at_the_end_costs_no_work(featnorm, detector, known, tmp_path, monkeypatch):
    cache = detector.parent / "cache"
    arguments = ("fit", known, "-o", "d.featnorm", "--cache", cache, "--batch-size", 16, *BACKBONE)

    def full(*_):
        raise archive.SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        status, _, error = featnorm(*arguments)
    assert status == 2
    assert re.fullmatch(
        r"featnorm: cannot write d\.featnorm: No space left on device \([\d,.]+ MB are free\): free some space, "
        r"or choose another path\. The features are cached: rerun the same command to resume from them\n",
        error,
    )
    assert not list(tmp_path.iterdir())
    status, printed, _ = featnorm(*arguments)
    assert status == 0
    assert "The features of all images were in the cache." in printed
    assert (tmp_path / "d.featnorm").read_bytes() == detector.read_bytes()


@pytest.mark.posix
def test_a_place_that_cannot_be_written_to_is_found_before_the_work(
    featnorm, detector, known, tmp_path, monkeypatch
):
    os.mkfifo(tmp_path / "pipe.csv")
    os.mkfifo(tmp_path / "pipe.html")
    before = sorted(tmp_path.iterdir())

    def work(*_args, **_options):
        raise AssertionError("worked before it looked")

    monkeypatch.setattr("featnorm.models.create_model", work)
    monkeypatch.setattr("featnorm.scorer_file.load", work)
    monkeypatch.setattr("featnorm.archive.read_calibration", work)
    table = known / "t.csv"
    for arguments, words in {
        ("fit", known, "-o", "pipe.csv"): "pipe.csv is not a regular file",
        ("score", detector, known, "-o", "pipe.csv"): "pipe.csv is not a regular file",
        ("score", detector, known, "--html", "pipe.html"): "pipe.html is not a regular file",
        ("export", detector, "-o", "pipe.csv"): "pipe.csv is not a regular file",
        ("monitor", detector, table, "--html", "pipe.html"): "pipe.html is not a regular file",
        ("fit", known, "-o", 300 * "n"): "cannot be written: File name too long",
        ("score", detector, known, "-o", 300 * "n" + ".csv"): "cannot be written: File name too long",
    }.items():
        status, _, error = featnorm(*arguments)
        assert status == 2
        assert words in error
        assert error.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_thousand_hostile_files(featnorm, detector, tmp_path):
    place = tmp_path / "upload"
    pictures(place, 30, 5)
    for name, data in hostile_files(1000, (place / "0000.png").read_bytes()):
        (place / name).write_bytes(data)
    status, printed, _ = featnorm("score", detector, place, "-o", "t.csv", "--workers", "0")
    assert status == 0
    rows = rows_of(tmp_path / "t.csv")
    # Text and drawings as text are no images, whatever a browser makes of them.
    others = {str(file) for file in place.iterdir() if file.suffix in (".txt", ".svg")}
    assert len(others) == 200
    assert len(rows) == 830
    refused = {row["path"] for row in rows if row["error"]}
    assert (
        refused
        == {str(file) for file in place.iterdir() if len(file.stem) != 4 or not file.stem.isdigit()} - others
    )
    assert all(row["score"] for row in rows if row["path"] not in refused)
    assert "skipped 800 unreadable images" in printed
    assert "and 790 more" in printed
    assert (
        "read 30 images; ignored 200 files that are not images (.svg 100, .txt 100); 800 unreadable\n" in printed
    )


def test_a_photograph_is_judged_as_it_is_seen(featnorm, detector, tmp_path):
    """Stored on its side with the orientation that camera and viewer agree on, it is the same photograph."""
    upright = Image.effect_noise((40, 30), 90).convert("RGB")
    upright.paste((250, 0, 0), (0, 0, 40, 8))
    scores, pictures_shown = [], []
    exif = Image.Exif()
    exif[274] = 6
    for name, image, options in (
        ("upright", upright, {}),
        ("turned", upright.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        ("cut out", Image.merge("RGBA", (*upright.split(), Image.new("L", upright.size, 255))), {}),
        ("not turned", upright.transpose(Image.Transpose.ROTATE_90), {}),
    ):
        image.save(tmp_path / f"{name}.png", **options)
        out = (f"{name}.csv", f"{name}.html")
        assert featnorm("score", detector, f"{name}.png", "-o", out[0], "--html", out[1], "--workers", "0")[0] == 0
        row = rows_of(tmp_path / out[0])[0]
        scores.append((row["score"], row["p_value"], row["verdict"]))
        page = (tmp_path / out[1]).read_text(encoding="utf-8")
        pictures_shown.append(re.findall(r'data:image/(?:png|jpeg|webp);base64,[^"]+', page))
    assert scores[0] == scores[1] == scores[2] != scores[3]
    # The image, its heat map, and three similar images.
    assert len(pictures_shown[0]) == 5
    assert pictures_shown[0] == pictures_shown[1] == pictures_shown[2] != pictures_shown[3]


def mixed(folder: Path) -> Path:
    """Return a folder of 120 images in two classes, under names of every kind, among other files."""
    random = np.random.default_rng(1)
    for i in range(120):
        place = folder / "ab"[i % 2]
        place.mkdir(parents=True, exist_ok=True)
        image = Image.fromarray(random.integers(0, 256, (16, 16, 3), dtype=np.uint8) // (1 + i % 2))
        name, form = [("jfif", "JPEG"), ("avif", "AVIF"), ("gif", "GIF"), ("", "PNG"), ("bin", "WEBP")][i % 5]
        image.save(place / f"{i:03}{'.' * bool(name)}{name}", form)
    for name in ("a/clip.mp4", "b/1.txt", "b/2.txt", "b/3.txt", "b/Thumbs.db", ".DS_Store"):
        (folder / name).write_bytes(b"no image")
    (folder / "b" / "broken.jpg").write_bytes(b"no image")
    frames = [Image.new("RGB", (16, 16), (red, 0, 0)) for red in (0, 200)]
    frames[0].save(folder / "a" / "moving.gif", save_all=True, append_images=frames[1:])
    return folder


SAID = (
    "read 121 images; ignored 5 files that are not images (.txt 3, .db 1, .mp4 1) and 1 hidden; 1 unreadable; "
    "1 has several frames or pages: the first is used\n"
)


def test_every_command_reads_the_same_files_and_says_so(featnorm, detector, tmp_path):
    folder = mixed(tmp_path / "mixed")
    for times in ("Computed the features of 121", "The features of all images were in the cache"):
        status, printed, _ = featnorm("fit", folder, "-o", "m.featnorm", "--cache", "cache", *BACKBONE)
        assert status == 0
        assert SAID in printed
        assert times in printed
    assert "trained on 2 classes" in printed
    assert "skipped 1 unreadable image in mixed:" in printed
    for out in ((), ("-o", "m.csv")):
        status, printed, _ = featnorm("score", detector, folder, "--workers", "0", *out)
        assert status == 0
        assert SAID in printed
        assert "Thumbs.db" not in printed
    status, printed, _ = featnorm("evaluate", "--model", "featnorm:cifar10-resnet18", "--id", folder,
                                  "--ood", f"{folder}[:10]", "--detector", "NAN", "--workers", "0")  # fmt: skip
    assert status == 0
    assert SAID.replace("121", "131") in printed


def test_score_of_nothing_readable_fails(featnorm, detector, tmp_path):
    folder = tmp_path / "broken"
    folder.mkdir()
    for name in ("a.png", "b.jpg"):
        (folder / name).write_bytes(b"no image")
    for out in ((), ("-o", "t.csv", "--html", "t.html")):
        status, printed, error = featnorm("score", detector, folder, "--workers", "0", *out)
        assert status == 2
        assert "skipped 2 unreadable images" in printed
        assert "read 0 images; 2 unreadable\n" in printed
        assert "flagged" not in printed
        assert error == (
            f"featnorm: none of the 2 images could be read; the first is {folder / 'a.png'}: "
            "not an image in a format that featnorm reads\n"
        )
    assert [row["error"] != "" for row in rows_of(tmp_path / "t.csv")] == [True, True]
    (folder / "a.png").rename(folder / "a.txt")
    (folder / "b.jpg").rename(folder / "b.txt")
    status, _, error = featnorm("score", detector, folder)
    assert status == 2
    assert error == f"featnorm: no images or videos in {folder}: ignored 2 files that are not images (.txt 2)\n"


def test_labels_of_a_column(featnorm, tmp_path):
    random = np.random.default_rng(2)
    images = []
    for i in range(110):
        buffer = io.BytesIO()
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8) // (1 + i % 2)
        Image.fromarray(pixels).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    breeds = ["tabby", "pug"] * 55
    pq.write_table(pa.table({"image": images, "breed": breeds, "weight": [1.0] * 110}), tmp_path / "t.parquet")
    arguments = ("fit", "t.parquet", "-o", "d.featnorm", "--cache", "cache", *BACKBONE)
    status, printed, _ = featnorm(*arguments)
    assert status == 0
    assert (
        "t has no column 'label', so clusters of the features are used instead of classes. Its columns breed "
        "could hold labels: choose one with --label-column." in printed
    )
    assert "trained on 8 clusters" in printed or "clusters of the features." in printed
    status, printed, _ = featnorm(*arguments, "--label-column", "breed")
    assert status == 0
    assert "trained on 2 classes" in printed
    assert "could hold labels" not in printed
    assert featnorm("score", "d.featnorm", "t.parquet", "-o", "t.csv", "--workers", "0")[0] == 0
    assert {row["predicted"] for row in rows_of(tmp_path / "t.csv")} <= {"pug", "tabby"}
    evaluate = ("evaluate", "--model", "featnorm:cifar10-resnet18", "--id", "t.parquet", "--ood", "t.parquet[:9]",
                "--detector", "NAN", "--workers", "0")  # fmt: skip
    status, printed, _ = featnorm(*evaluate)
    assert status == 0
    assert "t has no column 'label', so there are no classes. Its columns breed could hold labels" in printed
    status, printed, _ = featnorm(*evaluate, "--label-column", "breed")
    assert status == 0
    assert "could hold labels" not in printed
    for command_ in (arguments, evaluate):
        status, _, error = featnorm(*command_, "--label-column", "weight")
        assert status == 2
        assert (
            "column 'weight' of t.parquet is double: labels are integers, strings or booleans; breed could be"
            in error
        )
    breeds[7] = None
    pq.write_table(pa.table({"image": images, "label": breeds}), tmp_path / "t.parquet")
    status, printed, _ = featnorm(*arguments)
    assert status == 0
    assert "1 image has no label (row 7), so clusters of the features are used instead of classes." in printed


@pytest.mark.usefixtures("operators_read_once")
def test_export_writes_a_graph_and_says_what_it_takes(featnorm, known, tmp_path, monkeypatch):
    # The score of random features is that of nearly equal distances, which a graph rounds by too much.
    monkeypatch.setattr(loading, "load_model", load_model)
    assert featnorm("fit", known, "-o", "d.featnorm", "--cache", "cache", *BACKBONE)[0] == 0
    status, printed, _ = featnorm("export", "d.featnorm", "-o", "d.onnx")
    assert status == 0
    for words in (
        "Wrote d.onnx",
        "images (n, 3, 32, 32) float32",
        "logits, score, p_value, is_id",
        "differ by at most",
    ):
        assert words in printed
    assert (tmp_path / "d.onnx").stat().st_size > 1e6


def test_a_small_set_through_every_command(featnorm, tmp_path):
    pictures(tmp_path / "few", 34, 0)
    more = pictures(tmp_path / "more", 40, 1)
    status, printed, _ = featnorm("fit", "few", "-o", "d.featnorm", "--cache", "cache", *BACKBONE)
    assert status == 0
    assert "fewer than 100 images are too few to train a head" in printed
    assert (
        "Jackknife(KNN(k=1)) is calibrated by leaving out 19 of 34 images in turn. Averaged over such calibration "
        "sets, it flags at most 5.0 % of images like these.\n"
    ) in printed
    scored = ("score", "d.featnorm", more, "-o", "t.csv", "--html", "t.html", "--workers", "0")
    assert featnorm(*scored)[0] == 0
    for row in rows_of(tmp_path / "t.csv"):
        count = int(float(row["score"]))
        assert float(row["p_value"]) == pytest.approx(min(1, (2 * count + 1) / 20))
        assert row["verdict"] == ("ID" if count else "OOD")
    page = (tmp_path / "t.html").read_text("utf-8")
    assert "a score is the number of them that score no higher than the image, plus a fraction" in page
    shares = [float(share) for share in re.findall(r"below ([\d.]+).% of calibration images", page)]
    scores = sorted(float(row["score"]) for row in rows_of(tmp_path / "t.csv"))[: len(shares)]
    assert len(shares) >= 5
    assert shares == pytest.approx([100 * (19 - int(score)) / 19 for score in scores], abs=0.06)
    status, _, error = featnorm("monitor", "d.featnorm", "t.csv")
    assert status == 2
    assert error.startswith(
        "featnorm: d.featnorm was calibrated by leaving images out of the fit in turn, so it has"
    )
    status, printed, _ = featnorm("calibrate", "d.featnorm", "-o", "90.featnorm", "--tpr", "0.9")
    assert status == 0
    assert "flags at most 10.0 %" in printed
    assert featnorm("calibrate", "d.featnorm", "-o", "99.featnorm", "--tpr", "0.99")[0] == 2
    data = ("calibrate", "d.featnorm", more, "-o", "other.featnorm", "--workers", "0")
    status, _, error = featnorm(*data, "--update")
    assert status == 2
    assert "the earlier calibration left inputs out of the fit in turn, so it has no scores to add to" in error
    assert featnorm(*data)[0] == 0
    assert featnorm("score", "other.featnorm", more, "-o", "t.csv", "--workers", "0")[0] == 0
    assert featnorm("monitor", "other.featnorm", "t.csv")[0] == 0
    status, printed, _ = featnorm("inspect", "d.featnorm")
    assert status == 0
    assert ": 34 to fit on, 19 of them left out in turn for calibration" in printed
    assert (
        featnorm("evaluate", "d.featnorm", "--id", "few", "--ood", f"new={more}", "-o", "e", "--workers", 0)[0]
        == 0
    )
    status, _, error = featnorm("fit", "few", "-o", "h.featnorm", "--cache", "cache", "--head", "train", *BACKBONE)
    assert status == 2
    assert (
        "found fewer than 100 readable images in few (duplicates excluded), too few to train a head: use" in error
    )


def test_a_journal_is_of_these_images_and_one_process(tmp_path):
    row = ItemVerdict("a", 1.0, 0.5, True, None, None)
    with Journal(tmp_path / "t.csv", {"images": "x"}, 1) as first:
        first.add(0, [row])
        with pytest.raises(ValueError, match="another process is writing"):
            Journal(tmp_path / "t.csv", {"images": "x"}, 1)
    with Journal(tmp_path / "t.csv", {"images": "x"}, 1) as again:
        assert (again.done, again.restarted) == (1, False)
    other = Journal(tmp_path / "t.csv", {"images": "y"}, 1)
    assert (other.done, other.restarted) == (0, True)


def test_a_changed_image_is_another(tmp_path):
    folder = pictures(tmp_path / "p", 3, 0)
    before = source_digest(open_source(str(folder)))
    assert source_digest(open_source(str(folder))) == before
    os.utime(folder / "0001.png", ns=(1, 1))
    assert source_digest(open_source(str(folder))) != before


def test_rows_of_two_tables_are_told_apart(shared_data):
    source = open_source("tiny_imagenet:val[:2]", "ood32/mnist[:2]", root=shared_data)
    assert len({source.name(i) for i in range(4)}) == len({source.identity(i) for i in range(4)}) == 4


@pytest.mark.posix
def test_a_pipe_in_a_folder_is_not_waited_for(tmp_path):
    folder = pictures(tmp_path / "p", 2, 0)
    os.mkfifo(folder / "pipe")
    assert len(open_source(str(folder))) == 2


def test_what_is_refused(featnorm, detector, known, tmp_path):
    for arguments, words in {
        ("fit", "nowhere"): "cannot find 'nowhere'",
        ("fit", str(known), "--targets", "some"): "invalid value for '--targets': 'some' is not one of 'labels',",
        ("fit", str(known), "--detector", "NOPE"): "unknown detector 'NOPE'",
        ("fit", str(known), "-o", "none/d.featnorm"): "no folder none",
        ("score", "nothing.featnorm", str(known)): "cannot find the detector file",
        ("score", str(known / "a" / "0000.png"), str(known)): "not a featnorm detector file",
        ("export", "nothing.featnorm"): "cannot find the detector file",
        ("export", str(detector), "-o", "none/d.onnx"): "no folder none",
        ("score", str(detector), "nowhere"): "cannot find 'nowhere'",
        ("score", str(detector), str(known), "-o", "t.xlsx"): "must end in .csv, .jsonl or .parquet",
        (
            "score",
            str(detector),
            str(known),
            "-o",
            str(known / "a" / "t.csv"),
        ): "would overwrite the input ",
        ("export", str(detector), "-o", str(detector)): "would overwrite the input ",
        ("fit", str(known), "-o", str(known)): "is a folder: name a file",
    }.items():
        status, _, error = featnorm(*arguments)
        assert status == 2
        assert words in error, (arguments, error)
        assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
