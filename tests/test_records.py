"""The journal of a run, whatever becomes of its file, and the tables that are made of it."""

import csv
import json

import filelock
import pytest

from featnorm._utils.sealed import seal
from featnorm.inputs import open_source
from featnorm.records import Journal, kept_columns, read_scores
from featnorm.verdict import ItemVerdict

RUN = {"images": "x"}
BATCHES = 5


def verdicts(batch):
    """Three verdicts, of which one image could not be read, and another has a name that is no text."""
    return [
        ItemVerdict(f"{batch}/a.png", 0.1 + batch, 0.25, True, "cat", None),
        ItemVerdict(f"{batch}/b\udcff.png", float("-inf"), 0.05, False, None, None),
        ItemVerdict(f"{batch}/c.png", None, None, None, None, "not an image", "left"),
    ]


def run_on(out, run=RUN):
    """Write what is missing and then the table; return what there was, and the line that was damaged."""
    with Journal(out, run, 3) as journal:
        done, damaged = journal.done, journal.damaged
        for batch in journal.missing(BATCHES):
            journal.add(batch, verdicts(batch))
        journal.write(out)
        journal.remove()
    return done, damaged


@pytest.fixture
def whole(tmp_path):
    """The table of a run that nothing befell, and the journal of one that was killed before its end."""
    run_on(tmp_path / "whole.csv")
    with Journal(tmp_path / "t.csv", RUN, 3) as journal:
        for batch in (2, 0, 1, 4):
            journal.add(batch, verdicts(batch))
    return (tmp_path / "whole.csv").read_bytes()


def damaged_lines():
    other = {"batch": 1, "verdicts": [["a", 1.0, 0.5, True, None, None, False]]}
    return {
        "nothing": b"",
        "null": b"null",
        "no JSON": b'{"batch": 1, "verdicts"',
        "no text": b"\xff\xfe\x00",
        "an array": b"[1, []]",
        "no checksum": json.dumps(other).encode(),
        "nesting": 100_000 * b"[",
        # What no damage does, but another program may.
        "a batch without a number": seal({**other, "batch": None}).encode(),
        "a negative number": seal({**other, "batch": -1}).encode(),
        "a number that is none": seal({**other, "batch": True}).encode(),
        "no verdicts": seal({"batch": 1}).encode(),
        "verdicts that are none": seal({**other, "verdicts": 5}).encode(),
        "a verdict that is none": seal({**other, "verdicts": [None]}).encode(),
        "a score that is text": seal({**other, "verdicts": [["a", "1.0", 0.5, True, None, None, False]]}).encode(),
        "a verdict with too little": seal({**other, "verdicts": [["a", 1.0, 0.5]]}).encode(),
    }


@pytest.mark.parametrize("what", damaged_lines())
@pytest.mark.parametrize("place", [1, 2, 4])
def test_a_run_resumes_from_the_last_good_line(whole, tmp_path, what, place):
    journal = tmp_path / ".t.csv.part"
    lines = journal.read_bytes().splitlines()
    lines[place] = damaged_lines()[what]
    journal.write_bytes(b"\n".join(lines) + b"\n")
    assert run_on(tmp_path / "t.csv") == (3 * (place - 1), place + 1)
    assert (tmp_path / "t.csv").read_bytes() == whole


def test_any_flipped_bit_is_seen(whole, tmp_path):
    journal = tmp_path / ".t.csv.part"
    good = journal.read_bytes()
    for place in range(0, len(good), 7):
        flipped = good[:place] + bytes([good[place] ^ 1 << place % 8]) + good[place + 1 :]
        journal.write_bytes(flipped)
        done, _ = run_on(tmp_path / "t.csv")
        # The lines before it are kept, and nothing behind it.
        assert done <= 3 * max(0, good[: place + 1].count(b"\n") - (good[place : place + 1] == b"\n"))
        assert (tmp_path / "t.csv").read_bytes() == whole


@pytest.mark.parametrize("kept", [0, 1, 30, 200, 400, 1000])
def test_a_truncated_journal_is_one_of_a_killed_run(whole, tmp_path, kept):
    journal = tmp_path / ".t.csv.part"
    journal.write_bytes(journal.read_bytes()[:kept])
    run_on(tmp_path / "t.csv")
    assert (tmp_path / "t.csv").read_bytes() == whole


def test_of_a_power_cut_there_may_be_zeros(whole, tmp_path):
    journal = tmp_path / ".t.csv.part"
    good = journal.read_bytes()
    journal.write_bytes(good[:-200] + bytes(200))
    assert run_on(tmp_path / "t.csv") == (9, None)
    assert (tmp_path / "t.csv").read_bytes() == whole


def test_a_journal_of_another_run_or_of_none_is_started_over(whole, tmp_path):
    with Journal(tmp_path / "t.csv", {"images": "y"}, 3) as journal:
        assert (journal.done, journal.restarted, journal.damaged) == (0, True, None)
    (tmp_path / ".t.csv.part").write_bytes(b"Once upon a time\n")
    with Journal(tmp_path / "t.csv", RUN, 3) as journal:
        assert (journal.done, journal.restarted, journal.damaged) == (0, False, 1)
    with Journal(tmp_path / "t.csv", RUN, 3) as journal:
        assert (journal.done, journal.restarted, journal.damaged) == (0, False, None)


def test_a_line_that_is_damaged_meanwhile_never_enters_the_table(tmp_path):
    with Journal(tmp_path / "t.csv", RUN, 3) as journal:
        journal.add(0, verdicts(0))
        journal.path.write_bytes(journal.path.read_bytes().replace(b"0.25", b"0.95"))
        with pytest.raises(ValueError, match=r"\.t\.csv\.part was damaged during the run, at batch 0: rerun"):
            journal.write(tmp_path / "t.csv")
    assert not (tmp_path / "t.csv").exists()
    assert run_on(tmp_path / "t.csv") == (0, 2)


def test_a_folder_in_the_place_of_the_journal_is_named(tmp_path):
    (tmp_path / ".t.csv.part").mkdir()
    with pytest.raises(
        ValueError, match=r"\.t\.csv\.part is a folder, but must be a file: move or remove the folder"
    ):
        Journal(tmp_path / "t.csv", RUN, 3)
    (tmp_path / ".t.csv.part").rmdir()
    assert run_on(tmp_path / "t.csv") == (0, None)


def test_a_lock_that_cannot_be_written_is_called_so(tmp_path, monkeypatch):
    (tmp_path / ".t.csv.lock").mkdir()
    with pytest.raises(OSError, match=r"^cannot write .*\.t\.csv\.lock: "):
        Journal(tmp_path / "t.csv", RUN, 3)

    def busy(lock, **_):
        raise filelock.Timeout(lock.lock_file)

    # As where the system refuses a lock file in a way that looks like one that is held.
    monkeypatch.setattr(filelock.FileLock, "acquire", busy)
    with pytest.raises(OSError, match=r"^cannot write .*\.t\.csv\.lock: "):
        Journal(tmp_path / "t.csv", RUN, 3)
    with pytest.raises(ValueError, match=r"another process is writing .*u\.csv"):
        Journal(tmp_path / "u.csv", RUN, 3)


def test_no_cell_is_a_formula(tmp_path):
    """Whatever a file or a class is called, and an error says: a spreadsheet runs none of it."""
    names = ['=HYPERLINK("http://e.example","x").png', "+1.png", "-2+3|cmd' /C calc'!A0.png", "@SUM(A1).png",
             "\t=1.png", "\r=1.png", "\n=1.png", "plain.png", "'quoted.png", "/=1.png"]  # fmt: skip
    texts = ["=1+1", "+x", "-x", "@x", "\tx", "\rx", "\nx", "a = b", "'x", None]
    rows = [ItemVerdict(name, -1.5, 0.5, True, text, text) for name, text in zip(names, texts, strict=True)]
    for out in (tmp_path / "t.csv", tmp_path / "t.jsonl"):
        journal = Journal(out, RUN, len(rows))
        journal.add(0, rows)
        journal.write(out)
        journal.remove()
    with (tmp_path / "t.csv").open(newline="", encoding="utf-8") as file:
        cells = list(csv.DictReader(file))
    numbers = ("score", "p_value")
    for row in cells:
        assert all(not row[name].startswith(tuple("=+-@\t\r\n")) for name in row if name not in numbers)
        assert row["score"] == "-1.5"
    assert [row["path"] for row in cells] == [f"./{name}" for name in names[:7]] + names[7:]
    for column in ("predicted", "error"):
        assert [row[column] for row in cells] == [f"'{text}" for text in texts[:7]] + ["a = b", "'x", ""]
    assert [row.path for row in read_scores(tmp_path / "t.csv")] == [row["path"] for row in cells]
    assert [row.score for row in read_scores(tmp_path / "t.csv")] == [-1.5] * len(rows)
    assert [row.path for row in read_scores(tmp_path / "t.jsonl")] == names


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_any_kept_value_is_written(tmp_path, ending):
    table, out = tmp_path / "t.jsonl", tmp_path / f"out.{ending}"
    long = "a" * 200_000
    csv.field_size_limit(131_072)  # the default of Python
    rows = [{"text": "cut \ud83d", "n": 1 << 63, "m": -(1 << 63)}, {"text": long, "n": 1, "m": None}]
    table.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    kept = kept_columns(open_source(str(table)), ["text", "n", "m"])
    assert kept == {"text": ["cut ?", long], "n": [str(1 << 63), "1"], "m": [-(1 << 63), None]}
    with Journal(out, RUN, 2) as journal:
        journal.add(0, [ItemVerdict(name, -1.5, 0.5, True, None, None) for name in ("row 0", "row 1")])
        journal.write(out, kept=kept)
    assert [row.path for row in read_scores(out)] == ["row 0", "row 1"]


def test_a_byte_that_is_not_utf8_and_a_single_name_to_keep(tmp_path):
    (tmp_path / "t.csv").write_bytes(b"text,id\na few words,caf\xe9\n")
    assert kept_columns(open_source(str(tmp_path / "t.csv")), "id") == {"id": ["caf?"]}
