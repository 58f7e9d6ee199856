"""``featnorm monitor`` as a user types it, on tables of every kind and whatever is wrong with them."""

import csv
import io
import json
import re
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from apart import run_all_apart
from featnorm import Calibration, archive
from featnorm._utils.sealed import write_sealed
from featnorm.records import COLUMNS, FORMATS, Journal
from featnorm.report.drift import StreamHistory
from featnorm.verdict import ItemVerdict
from pages import Page, check

CALIBRATION = Calibration(np.random.default_rng(0).normal(2, 1, 600).astype(np.float32))


@pytest.fixture
def detector(tmp_path):
    """What `featnorm fit` writes, as far as the command reads it: there is no model to build."""
    content = {"tpr": 0.95, "detector": "NAN()", "model": {}, "scorer": {"kind": "images"}}
    archive.write(tmp_path / "d.featnorm", {"calibration.scores": CALIBRATION.scores}, content)
    return "d.featnorm"


def scored(shift=0.0, after=2000, n=3000):
    """Scores of n images that drift by some of their standard deviations, but never to an extreme."""
    scores = np.random.default_rng(1).normal(2, 1, n)
    scores[after:] += shift
    return np.clip(scores, 0, 4).astype(np.float32)


def table(path: Path, scores, unread=(5, 1700)):
    """Write what `featnorm score --out` writes, with images that could not be read."""
    p_values = CALIBRATION.p_value(torch.from_numpy(np.asarray(scores)))
    rows = [
        ItemVerdict(f"day/{i:05}, “a”.png", score, p, p > 0.05, None, None)
        for i, (score, p) in enumerate(zip(np.asarray(scores).tolist(), p_values.tolist(), strict=True))
    ]
    for i in unread:
        if i < len(rows):
            rows.insert(i, ItemVerdict(f"broken/{i}.png", None, None, None, None, "not an image"))
    journal = Journal(path, {}, 1)
    journal.add(0, rows)
    journal.write(path)
    journal.remove()
    return path.name


@pytest.mark.parametrize("ending", FORMATS)
@pytest.mark.parametrize("shift", [-0.5, 0.5])
def test_drift_is_told_and_is_the_exit_status(featnorm, detector, tmp_path, ending, shift):
    scores = table(tmp_path / f"t{ending}", scored(shift))
    status, printed, error = featnorm("monitor", detector, scores)
    assert status == 3
    assert error == ""
    assert (
        f"3,000 scores from t{ending} (2 rows without a score skipped), compared with 600 calibration scores"
        in printed
    )
    for words in ("Drift. At image 2,", "the evidence reached the alarm level of 100 to 1.", "It was at most ",
                  "the chance of ever raising this alarm is at most 1 %,",
                  "fit again on current images"):  # fmt: skip
        assert words in printed
    image, row = (int(printed.split(word)[1].split(end)[0].replace(",", ""))
                  for word, end in (("At image ", ", day"), ("(row ", ")")))  # fmt: skip
    assert 2000 < image < 2400
    assert row == image + 2
    assert f"day/{image - 1:05}, “a”.png" in printed
    assert sorted(place.name for place in tmp_path.iterdir()) == ["d.featnorm", f"t{ending}"]


@pytest.mark.parametrize(
    ("kind", "cause"), [("texts", "did the source, the language or the topic change?"), (None, "did their source")]
)
def test_the_words_are_those_of_the_inputs(featnorm, tmp_path, kind, cause):
    content = {"tpr": 0.95, "detector": "NAN()", "model": {}} | ({"scorer": {"kind": kind}} if kind else {})
    archive.write(tmp_path / "d.featnorm", {"calibration.scores": CALIBRATION.scores}, content)
    scores = table(tmp_path / "t.jsonl", scored(-0.5))
    status, printed, _ = featnorm("monitor", "d.featnorm", scores, "--html", "page.html")
    noun = "input" if kind is None else kind[:-1]
    page = Page((tmp_path / "page.html").read_text("utf-8")).text
    assert status == 3
    for text in (printed, page):
        assert "image" not in text
        assert f"At {noun} 2," in text
    assert cause in printed
    assert f"{noun}, in order of time" in page


def test_neither_a_table_nor_a_page_takes_torch(detector, tmp_path):
    tables = [table(tmp_path / f"t{ending}", scored()) for ending in FORMATS]
    commands = [
        *(["monitor", detector, scores] for scores in tables),
        ["monitor", detector, "t.csv", "--html", "p.html"],
    ]
    *told, page = run_all_apart(tmp_path, commands, without="torch")
    assert all("No drift" in printed for printed in told)
    assert "Wrote p.html" in page


def test_the_stored_calibration_agrees_with_the_modules(tmp_path):
    rng = np.random.default_rng(0)
    for n, tpr in ((19, 0.95), (20, 0.95), (600, 0.9), (7, 0.5)):
        calibration = Calibration(rng.integers(0, 9, n).astype(float), tpr)
        path = tmp_path / "c.featnorm"
        archive.write(path, {"calibration.scores": calibration.scores}, {"tpr": tpr, "model": {}})
        stored = archive.read_calibration(path)
        assert stored.scores.dtype == np.float64
        np.testing.assert_array_equal(stored.scores, calibration.scores)
        assert (stored.threshold, stored.tpr) == (float(calibration.threshold), tpr)
        scores = np.array([-np.inf, -1, 0, 0.5, 4, 8, 9, np.inf])
        np.testing.assert_array_equal(stored.p_value(scores), calibration.p_value(torch.from_numpy(scores)))


def test_every_type_of_tensor_is_checked_without_torch(tmp_path):
    """A file is read as a whole, though only its calibration is wanted."""
    kinds = [torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16,
             torch.bfloat16, torch.float32, torch.float64, torch.complex64, torch.uint16, torch.uint32,
             torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2]  # fmt: skip
    tensors = {str(kind): torch.ones(2, 3).to(kind) for kind in kinds}
    tensors |= {"none": torch.ones(0), "one": torch.tensor(1.0), "calibration.scores": CALIBRATION.scores}
    path = tmp_path / "c.featnorm"
    archive.write(path, tensors, {"tpr": 0.95, "model": {}})
    np.testing.assert_array_equal(archive.read_calibration(path).scores, CALIBRATION.scores)
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    for read in (archive.read, archive.read_calibration):
        with pytest.raises(archive.ArchiveError, match="its checksum is wrong"):
            read(path)


@pytest.mark.parametrize("ending", FORMATS)
def test_no_drift_is_told(featnorm, detector, tmp_path, ending):
    scores = table(tmp_path / f"t{ending}", scored())
    status, printed, _ = featnorm("monitor", detector, scores, "--false-alarm", "0.001")
    assert status == 0
    for words in ("No drift. The evidence never reached the alarm level of 1,000 to 1. It was at most ",
                  "the chance of ever raising this alarm is at most 0.1 %,", "does not prove"):  # fmt: skip
        assert words in printed


def test_scores_that_are_infinite_are_scores(featnorm, detector, tmp_path):
    for ending in FORMATS:
        scores = table(tmp_path / f"t{ending}", np.array([np.inf, 1.0, -np.inf, 2.0]))
        status, printed, _ = featnorm("monitor", detector, scores, "--html", "page.html")
        assert status == 0
        assert "4 scores from" in printed
        check(Page((tmp_path / "page.html").read_text("utf-8")))


def test_the_page_shows_the_stream(featnorm, detector, tmp_path):
    scores = table(tmp_path / "t <b>.csv", scored(-0.5))
    status, printed, _ = featnorm("monitor", detector, scores, "--html", "page.html")
    assert status == 3
    assert "Wrote page.html." in printed
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    check(page)
    assert page.source.startswith("<!doctype html>")
    for words in ("Drift", "t <b>.csv", "600 calibration scores", "the latest 1,000 scores",
                  "alarm level, 100 to 1", "log₁₀ of the evidence", "mean p-value",
                  "image, in order of time", "alarm at image 2,", "day/0"):  # fmt: skip
        assert words in page.text
    assert len(page.source) < 200_000

    calm = table(tmp_path / "calm.csv", scored())
    assert featnorm("monitor", detector, calm, "--html", "page.html")[0] == 0
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    check(page)
    assert "No drift" in page.text
    assert "the alarm, at image" not in page.text


def test_thresholds_by_group(featnorm, tmp_path):
    rng = np.random.default_rng(0)
    members = rng.integers(0, 2, 600)
    grouped = Calibration(rng.normal(2 - members, 1), 0.95, members, ["day", "night"])
    tensors = {archive.CALIBRATION: grouped.scores, archive.MEMBERS: grouped.members}
    content = {"tpr": 0.95, "groups": ["day", "night"], "model": {}}
    archive.write(tmp_path / "d.featnorm", tensors, content)
    new = rng.integers(0, 2, 900)
    scores = torch.from_numpy(rng.normal(2 - new, 1))
    p_values, is_id = grouped.predict(scores, [("day", "night")[i] for i in new])
    with (tmp_path / "t.csv").open("w", newline="") as file:
        rows = zip(range(900), scores.tolist(), p_values.tolist(), (("day", "night")[i] for i in new), strict=True)
        csv.writer(file).writerows([("path", "score", "p_value", "group"), *rows])
    assert featnorm("monitor", "d.featnorm", "t.csv", "--html", "page.html")[0] == 0
    page = Page((tmp_path / "page.html").read_text("utf-8"))
    check(page)
    share = f"{100 * (~is_id).double().mean():.1f}"
    assert re.search(rf"{share}.% of the latest scores are below the threshold of their group\.", page.text)
    assert "threshold 0" not in page.text


def test_a_page_of_one_score(featnorm, detector, tmp_path):
    scores = table(tmp_path / "t.csv", scored(n=1))
    assert featnorm("monitor", detector, scores, "--html", "page.html")[0] == 0
    check(Page((tmp_path / "page.html").read_text("utf-8")))


@pytest.mark.parametrize("n", [1, 19, 1999, 2000, 2001, 12_345])
def test_a_course_keeps_the_highest_evidence_in_few_points(n):
    rng = np.random.default_rng(n)
    evidence, p_values = rng.normal(size=n), rng.random(n)
    history = StreamHistory()
    for part in np.array_split(np.arange(n), 7):
        history.add(p_values[part], evidence[part], p_values[part])
    images, kept = history.evidence()
    assert len(images) == len(kept) <= 2001
    assert images[0] == kept[0] == 0
    assert images[-1] == history.count == n
    assert (np.diff(images) > 0).all()
    for start, end, highest in zip(images[:-1].astype(int), images[1:].astype(int), kept[1:], strict=True):
        assert highest == evidence[start:end].max()
    edges, means = history.mean_p_values()
    assert len(means) <= 50
    assert edges[0] == 0
    assert edges[-1] == n
    stretches = np.diff(edges)
    assert len(stretches) == 1 or stretches[-1] >= stretches[0] / 2
    expected = [p_values[a:b].mean() for a, b in zip(edges[:-1].astype(int), edges[1:].astype(int), strict=True)]
    np.testing.assert_allclose(means, expected)
    assert list(history.latest) == p_values[-1000:].tolist()


def joined(tmp_path) -> tuple[str, list[list[str]]]:
    """Write a table, and return its name and its rows."""
    name = table(tmp_path / "t.csv", scored(-0.5))
    with (tmp_path / name).open(newline="", encoding="utf-8") as file:
        return name, list(csv.reader(file))


def rounded(rows: list[list[str]], digits: str) -> list[list[str]]:
    header, *rest = rows
    return [header, *([r[0], *(format(float(x), digits) if x else x for x in r[1:3]), *r[3:]] for r in rest)]


HANDS = {
    "a byte-order mark": lambda text, rows: "\ufeff" + text,
    "blank lines": lambda text, rows: text.replace("\r\nday/00007", "\r\n\r\n,,,,,\r\nday/00007") + "\r\n\r\n",
    "two files, one after the other": lambda text, rows: text + text,
    "two files with a mark each": lambda text, rows: "\ufeff" + text + "\ufeff" + text,
    "six decimals": lambda text, rows: as_text(rounded(rows, ".6f")),
    "three decimals": lambda text, rows: as_text(rounded(rows, ".3f")),
    "four digits": lambda text, rows: as_text(rounded(rows, ".3e")),
    "semicolons": lambda text, rows: as_text(rows, ";"),
    "semicolons and decimal commas": lambda text, rows: "\ufeff" + as_text(with_commas(rows), ";"),
    "semicolons, quoted, blank lines first": lambda text, rows: (
        ";;;;;\r\n" + as_text(with_commas(rows), ";", csv.QUOTE_ALL)
    ),
    "further columns, first": lambda text, rows: as_text([["x", *row] for row in rows]),
}


def with_commas(rows: list[list[str]]) -> list[list[str]]:
    return [[row[0], *(number.replace(".", ",") for number in row[1:3]), *row[3:]] for row in rows]


def as_text(rows: list[list[str]], separator: str = ",", quoting: int = csv.QUOTE_MINIMAL) -> str:
    text = io.StringIO()
    csv.writer(text, delimiter=separator, quoting=quoting).writerows(rows)
    return text.getvalue()


@pytest.mark.parametrize("hands", HANDS)
def test_a_table_may_have_been_through_other_hands(featnorm, detector, tmp_path, hands):
    name, rows = joined(tmp_path)
    text = (tmp_path / name).read_bytes().decode()
    (tmp_path / name).write_bytes(HANDS[hands](text, rows).encode())
    status, printed, error = featnorm("monitor", detector, name)
    assert (status, error) == (3, "")
    n = 2 if "two files" in hands else 1
    assert f"{3000 * n:,} scores from t.csv ({2 * n} rows without a score skipped)" in printed
    assert "At image 2," in printed


def test_a_number_that_is_ambiguous_is_refused(featnorm, detector, tmp_path):
    (tmp_path / "t.csv").write_text("path;score;p_value\na.png;1.234,5;0,5\n")
    words = "row 1 of t.csv cannot be read (could not convert string to float: '1.234.5')"
    assert_refused(featnorm("monitor", detector, "t.csv"), words)


@pytest.mark.parametrize("digits", [".3f", ".6f", ".17g"])
def test_scores_of_another_detector_are_refused_whatever_their_digits(featnorm, detector, tmp_path, digits):
    _, rows = joined(tmp_path)
    other = Calibration(np.random.default_rng(5).normal(2, 1, 600).astype(np.float32))
    (tmp_path / "t.csv").write_text(as_text(rounded(rows, digits)), encoding="utf-8")
    archive.write(tmp_path / "other.featnorm", {"calibration.scores": other.scores}, {"tpr": 0.95, "model": {}})
    assert featnorm("monitor", detector, "t.csv")[0] == 3
    assert_refused(featnorm("monitor", "other.featnorm", "t.csv"), "of t.csv is from another detector: its score")


def test_blank_lines_and_float32_are_read_in_other_tables(featnorm, detector, tmp_path):
    scores = tmp_path / table(tmp_path / "t.jsonl", scored(-0.5))
    scores.write_bytes(b"\xef\xbb\xbf" + scores.read_bytes().replace(b"\n", b"\n\n"))
    assert featnorm("monitor", detector, scores)[0] == 3
    scores = tmp_path / table(tmp_path / "t.parquet", scored(-0.5))
    whole = pq.read_table(scores)
    for i, name in enumerate(whole.column_names):
        if name in ("score", "p_value"):
            whole = whole.set_column(i, name, whole[name].cast(pa.float32()))
    pq.write_table(whole, scores)
    assert featnorm("monitor", detector, scores)[0] == 3


def lines(path: Path) -> list[str]:
    return path.read_text("utf-8").splitlines(keepends=True)


def damage_csv(path: Path, row: int, cells: list[str]) -> None:
    with path.open(newline="", encoding="utf-8") as file:
        rows = list(csv.reader(file))
    rows[row] = cells
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows(rows)


@pytest.mark.parametrize(
    ("cells", "words"),
    [
        (["a.png", "much", "0.5", "ID", "", "", ""], "row 7 of t.csv cannot be read (could not convert"),
        (["a.png", "nan", "0.5", "ID", "", "", ""], "row 7 of t.csv cannot be read (its score is NaN)"),
        (["a.png", "1.0", "", "ID", "", "", ""], "row 7 of t.csv cannot be read (could not convert"),
        (["a.png", "1.0", "0.5"], "row 7 of t.csv cannot be read (it has 3 instead of 7 columns)"),
        (
            ["a.png", "2.0", "0.9", "ID", "", "", ""],
            "row 7 of t.csv is from another detector: its score 2 has the p-value",
        ),
        (["a.png", "2.0", "nan", "ID", "", "", ""], "its score 2 has the p-value nan there and 0."),
        (["a.png", "2.0", "0.246914", "ID", "", "", ""], "has the p-value 0.246914 there and 0.4"),
    ],
)
def test_a_damaged_csv_is_refused_by_row(featnorm, detector, tmp_path, cells, words):
    scores = table(tmp_path / "t.csv", scored(n=20))
    damage_csv(tmp_path / scores, 7, cells)
    assert_refused(featnorm("monitor", detector, scores, "--html", "page.html"), words)
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"path": "a.png", "sco\n', "(Invalid control character"),
        ("[1, 2]\n", "(it has no path)"),
        ("5\n", "("),
        ('{"path": "a.png", "score": 1.0}\n', "(it has no p_value)"),
        ('{"path": "a.png", "score": [1], "p_value": 0.5}\n', "("),
        ('{"path": "a.png", "score": NaN, "p_value": 0.5}\n', "(its score is NaN)"),
        ('{"path": "a.png", "score": 1' + 400 * "0" + ', "p_value": 0.5}\n', "("),
        (100_000 * "[" + "\n", "("),
        ("\udcff\n", "("),
    ],
)
def test_a_damaged_jsonl_is_refused_by_row(featnorm, detector, tmp_path, line, words):
    scores = table(tmp_path / "t.jsonl", scored(n=20))
    text = lines(tmp_path / scores)
    text[6] = line
    (tmp_path / scores).write_bytes("".join(text).encode("utf-8", "surrogateescape"))
    assert_refused(featnorm("monitor", detector, scores), f"row 7 of t.jsonl cannot be read {words}")


def test_a_damaged_parquet_is_refused_by_row(featnorm, detector, tmp_path):
    scores = tmp_path / table(tmp_path / "t.parquet", scored(n=25_000))
    whole = scores.read_bytes()
    scores.write_bytes(whole[:-100])
    assert_refused(featnorm("monitor", detector, scores.name), "row 1 of t.parquet cannot be read (")
    # Inside the second of the groups of rows that are read one by one.
    group = pq.ParquetFile(pa.BufferReader(whole)).metadata.row_group(1)
    start = group.column(COLUMNS.index("score")).dictionary_page_offset
    scores.write_bytes(whole[:start] + b"\xff" * 40 + whole[start + 40 :])
    assert_refused(featnorm("monitor", detector, scores.name), "row 10001 of t.parquet cannot be read (")
    pq.write_table(pa.table({"path": ["a"], "score": [1.0]}), scores)
    assert_refused(
        featnorm("monitor", detector, scores.name), "row 1 of t.parquet cannot be read (it has no p_value)"
    )
    pq.write_table(pa.table({"path": ["a", "b"], "score": [1.0, float("nan")], "p_value": [0.5, 0.5]}), scores)
    assert_refused(
        featnorm("monitor", detector, scores.name), "row 2 of t.parquet cannot be read (its score is NaN)"
    )


def test_what_is_refused(featnorm, detector, tmp_path):
    scores = table(tmp_path / "t.csv", scored(n=50))
    (tmp_path / "empty.csv").write_text("")
    (tmp_path / "other.csv").write_text("a,b\n1,2\n")
    (tmp_path / "unread.jsonl").write_text(json.dumps(dict.fromkeys(COLUMNS)) + "\n")
    (tmp_path / "folder.csv").mkdir()
    (tmp_path / "folder.html").mkdir()
    (tmp_path / "d.html").symlink_to(tmp_path / detector)
    archive.write(tmp_path / "bare.featnorm", {}, {"tpr": None, "model": {}})
    before = sorted(tmp_path.iterdir())
    for arguments, words in {
        (detector, "nowhere.csv"): "cannot find the scores file nowhere.csv",
        (detector, "folder.csv"): "cannot find the scores file folder.csv",
        (detector, detector): "d.featnorm must end in .csv, .jsonl or .parquet",
        (detector, "empty.csv"): "there is no score in empty.csv",
        (detector, "unread.jsonl"): "there is no score in unread.jsonl",
        (detector, "other.csv"): "row 1 of other.csv cannot be read (it has no path)",
        ("nowhere.featnorm", scores): "cannot find the detector file",
        (scores, scores): "not a featnorm detector file",
        ("bare.featnorm", scores): "bare.featnorm holds no calibration scores",
        (detector, scores, "--false-alarm", "0"): "false_alarm must be in (0, 1)",
        (detector, scores, "--html", scores): "--html t.csv must end in .html",
        (detector, scores, "--html", "d.html"): "d.html would overwrite the input ",
        (detector, scores, "--html", "none/page.html"): "there is no folder none",
        (detector, scores, "--html", "folder.html"): "folder.html is a folder",
    }.items():
        assert_refused(featnorm("monitor", *arguments), words)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
    ("ending", "cut"), [(".csv", 1), (".jsonl", 4), (".parquet", 1500), (".csv", 2003), (".jsonl", 3000)]
)
def test_a_stream_continues_where_it_stopped(featnorm, detector, tmp_path, ending, cut):
    """In the part before the cut and the rest, with rows without a score, as in one run."""
    page, state = tmp_path / "p.html", tmp_path / "s.json"
    whole = table(tmp_path / f"whole{ending}", scored(-0.5))
    command = ("monitor", detector, whole, "--html", page.name, "--state", state.name)
    status, printed, _ = featnorm(*command)
    assert status == 3
    expected = page.read_bytes(), state.read_bytes()
    state.unlink()

    rows = table(tmp_path / "rows.csv", scored(-0.5))
    keep_rows(tmp_path / rows, cut)
    featnorm("monitor", detector, rows, "--state", state.name)
    before = state.read_bytes()
    featnorm("monitor", detector, rows, "--state", state.name)  # without new rows
    assert state.read_bytes() == before
    status, resumed, error = featnorm(*command)
    assert (status, error) == (3, "")
    assert resumed == f"Continued after row {cut:,}: {3002 - cut:,} new rows.\n{printed}"
    assert (page.read_bytes(), state.read_bytes()) == expected


def keep_rows(path, number):
    with path.open("rb") as file:
        kept = list(islice(file, 1 + number))
    path.write_bytes(b"".join(kept))


FEWER = "t.csv has 51 rows, but s.json was made of 52: restore the missing rows, or "
OTHERS = "the first 52 rows of t.csv are not those that s.json was made of: restore them, also their order, or "


def swap(rows):
    rows[7], rows[8] = rows[8], rows[7]


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda rows: rows.pop(), FEWER),
        (lambda rows: rows.pop(7), FEWER),
        (swap, OTHERS),
        (lambda rows: rows.insert(3, rows[3]), OTHERS),
        (lambda rows: rows.__setitem__(9, rows[9].replace("day", "night")), OTHERS),
        (lambda rows: rows.__setitem__(9, rows[10]), OTHERS),
        (lambda rows: rows.__setitem__(5, "broken/5.png,1.0,0.5,ID,,,\r\n"), OTHERS),
    ],
)
def test_a_table_that_changed_is_noticed(featnorm, detector, tmp_path, change, words):
    scores = tmp_path / table(tmp_path / "t.csv", scored(n=51), unread=(5,))
    assert featnorm("monitor", detector, scores.name, "--state", "s.json")[0] == 0
    state = (tmp_path / "s.json").read_bytes()
    with scores.open(encoding="utf-8", newline="") as file:
        header, *rows = file.readlines()
    change(rows)
    scores.write_text("".join([header, *rows]), encoding="utf-8", newline="")
    result = featnorm("monitor", detector, scores.name, "--state", "s.json", "--html", "page.html")
    assert_refused(result, words)
    assert "delete s.json to monitor t.csv from its first row" in result[2]
    assert (tmp_path / "s.json").read_bytes() == state
    assert not (tmp_path / "page.html").exists()


def test_a_state_of_something_else_is_refused(featnorm, detector, tmp_path):
    scores = table(tmp_path / "t.csv", scored(n=50))
    state = tmp_path / "s.json"
    assert featnorm("monitor", detector, scores, "--state", "s.json")[0] == 0
    good = state.read_bytes()
    other = Calibration(np.random.default_rng(5).normal(2, 1, 600).astype(np.float32))
    archive.write(tmp_path / "other.featnorm", {"calibration.scores": other.scores}, {"tpr": 0.95, "model": {}})
    words = "s.json was made with another detector: use the same, or delete s.json to monitor t.csv from its"
    assert_refused(featnorm("monitor", "other.featnorm", scores, "--state", "s.json"), words)
    words = "s.json was made with another false-alarm rate: use the same"
    assert_refused(featnorm("monitor", detector, scores, "--false-alarm", "0.05", "--state", "s.json"), words)
    words = "s.json is damaged, or of an earlier version"
    for content in (b"", good[:-30], good.replace(b'"rows": 51', b'"rows": 50'), b"path,score,p_value\n"):
        state.write_bytes(content)
        assert_refused(featnorm("monitor", detector, scores, "--state", "s.json"), words)
    for content in ({"auroc": 0.5}, {**json.loads(good), "monitor": {"format": 9}}, {"monitor": 5}):
        content.pop("sha256", None)
        write_sealed(state, content)
        words = "s.json is not a state that this version of featnorm monitor wrote ("
        assert_refused(featnorm("monitor", detector, scores, "--state", "s.json"), words)
    state.write_bytes(good)
    (tmp_path / "d.json").symlink_to(tmp_path / detector)
    for place, words in {scores: "--state t.csv must end in .json", "d.json": "d.json would overwrite the input ",
                         "none/s.json": "there is no folder none"}.items():  # fmt: skip
        assert_refused(featnorm("monitor", detector, scores, "--state", place), words)
    assert featnorm("monitor", detector, scores, "--state", "s.json")[0] == 0
    assert state.read_bytes() == good


def assert_refused(result, words):
    status, _, error = result
    assert status == 2
    assert words in error
    assert error.count("\n") == 1
