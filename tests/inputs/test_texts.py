"""Sources of texts: formats, columns, labels, and hostile files."""

import json
import pickle
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featnorm.inputs import TEXTS, DataError, ItemError, group_items, open_source, source_of
from featnorm.inputs.texts import MAX_ROW

TEXT = ["I lost my card", "¿Dónde está?", 'He said "no", twice', "two\nlines", "שלום עולם", "last one"]
LABELS = ["card", "where", "card", "", "hello", "card"]


def quoted(value: str) -> str:
    return '"' + value.replace('"', '""') + '"'


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def csv_of(*rows: tuple[str, ...], separator: str = ",", end: str = "\r\n") -> str:
    return "".join(separator.join(map(quoted, row)) + end for row in rows)


def results(source: Any) -> list[str]:
    """Return the text of each item, or the reason why it cannot be read."""
    found = []
    for i in range(len(source)):
        try:
            found.append(source.item(i))
        except ItemError as error:
            found.append(f"! {error.reason}" if error.name == source.name(i) else f"! of {error.name}")
    return found


def labels_of(source: Any) -> list[str | None]:
    labels = [source.label(i) for i in range(len(source))]
    return [None if label is None else source.class_names[label] for label in labels]


def table_file(path: Path) -> str:
    rows = [
        {"text": text, "label": label or None, "n": i}
        for i, (text, label) in enumerate(zip(TEXT, LABELS, strict=True))
    ]
    match path.suffix:
        case ".csv":
            lines = [("text", "label", "n"), *((r["text"], r["label"] or "", str(r["n"])) for r in rows)]
            return write(path, csv_of(*lines))
        case ".jsonl":
            return write(path, "".join(json.dumps(row) + "\n\n" for row in rows))
        case _:
            pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=4)
            return str(path)


@pytest.mark.parametrize("ending", [".csv", ".jsonl", ".parquet"])
def test_a_table_of_texts(tmp_path, ending):
    source = open_source(table_file(tmp_path / f"tickets{ending}"))
    assert source.kind is TEXTS
    assert (source.title, len(source), results(source)) == ("tickets", 6, TEXT)
    assert labels_of(source) == ["card", "where", "card", None, "hello", "card"]
    assert [source.name(i) for i in (0, 5)] == ["row 0", "row 5"]
    assert set(source.columns) == {"text", "label", "n"}
    assert group_items(source, "n") == list("012345")
    assert source.column("label")[3] is None
    assert source.digest(0) != source.digest(1)
    assert source.identity(0) != source.identity(1)
    with pytest.raises(DataError, match=r"no column 'topic' in .*tickets"):
        source.column("topic")
    with pytest.raises(DataError, match=r"no column 'topic' in .*tickets.*: it has text, label, n; check its na"):
        open_source(str(tmp_path / f"tickets{ending}"), text_column="topic")
    with pytest.raises(DataError, match=r"no column 'topic' in .*tickets.*: it has text, label, n"):
        open_source(str(tmp_path / f"tickets{ending}"), label_column="topic")
    unlabeled = open_source(str(tmp_path / f"tickets{ending}"), labels=False)
    assert (unlabeled.class_names, unlabeled.label(0)) == (None, None)
    assert results(open_source(str(tmp_path / f"tickets{ending}[1::2]"))) == TEXT[1::2]


def test_the_digest_is_that_of_the_text_in_every_format(tmp_path):
    sources = [open_source(table_file(tmp_path / f"a{ending}")) for ending in (".csv", ".jsonl", ".parquet")]
    assert len({source.digest(2) for source in sources}) == 1


def test_lines_of_text(tmp_path):
    source = open_source(write(tmp_path / "notes.txt", "\ufefffirst\r\n\nthird, with a comma\r\nlast"))
    assert results(source) == ["first", "! an empty text", "third, with a comma", "last"]
    assert (source.columns, source.class_names, source.label_columns) == (("text",), None, ())
    joined = open_source(str(tmp_path / "notes.txt"), table_file(tmp_path / "a.csv"))
    assert joined.kind is TEXTS
    assert [joined.name(i) for i in (3, 4)] == ["notes: line 4", "a: row 0"]


@pytest.mark.parametrize(
    ("header", "row", "column", "label_columns"),
    [
        (["body"], ["hi"], "body", ()),
        (["body", "label"], ["hi", "a"], "body", ()),
        (["id", "body", "when"], ["7", "my card is lost", ""], "body", ("id", "when")),
        (["subject", "text", "queue"], ["a", "b", "c"], "text", ("subject", "queue")),
    ],
    ids=["only", "beside labels", "of several words", "by its name"],
)
def test_the_column_of_texts_is_found(tmp_path, header, row, column, label_columns):
    source = open_source(write(tmp_path / "a.csv", csv_of(header, row)))
    assert results(source) == [row[header.index(column)]]
    assert source.label_columns == label_columns


def test_the_column_of_texts_is_not_guessed(tmp_path):
    path = write(tmp_path / "a.csv", csv_of(["sentence", "intent"], ["my card is lost", "card"]))
    with pytest.raises(DataError, match=r"no column 'text' in .*a.csv: it has sentence, intent; choose that of"):
        open_source(path)
    source = open_source(path, text_column="sentence", label_column="intent")
    assert results(source) == ["my card is lost"]


@pytest.mark.parametrize(
    ("header", "row"), [(["age", "city"], ["7", "Rome"]), (["a", "b"], ["1", "2"])], ids=["a category", "numbers"]
)
def test_a_table_without_a_column_of_texts_holds_rows(tmp_path, header, row):
    path = write(tmp_path / "a.csv", csv_of(header, row))
    assert open_source(path).item(0) == dict(zip(header, row, strict=True))
    source = open_source(path, text_column=header[0], label_column=header[1])
    assert results(source) == row[:1]


def test_whole_numbers_are_labels_as_they_are(tmp_path):
    source = open_source(
        write(tmp_path / "a.csv", csv_of(("text", "label"), ("a", "10"), ("b", "-1"), ("c", "2")))
    )
    assert ([source.label(i) for i in range(3)], source.class_names) == ([10, None, 2], None)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_line_ends_and_a_byte_order_mark(tmp_path, separator, end):
    content = "\ufeff" + csv_of(("text", "label"), *zip(TEXT, LABELS, strict=True), separator=separator, end=end)
    source = open_source(write(tmp_path / "a.csv", content))
    assert results(source) == TEXT
    assert labels_of(source)[:2] == ["card", "where"]


def test_what_cannot_be_read_costs_its_row_alone(tmp_path):
    rows = [
        b"text,label",
        b"fine,a",
        b"caf\xe9,a",
        b"nul\0,a",
        b"one cell",
        b"a,b,c",
        b'"",a',
        b"   ,a",
        b"",
        b"end,b",
    ]
    source = open_source(write(tmp_path / "a.csv", b"\n".join(rows)))
    assert results(source) == [
        "fine",
        "! it is not valid UTF-8",
        "! it has a NUL character, so it is not text",
        "! the row has 1 cells, but the header has 2",
        "! the row has 3 cells, but the header has 2",
        "! an empty text",
        "! an empty text",
        "end",
    ]
    lines = ['{"text": "fine"}', "{broken", "[1]", '{"text": null}', '{"text": 5}', '{"text": "\\ud800"}', "{}"]
    found = results(open_source(write(tmp_path / "a.jsonl", "\n".join(lines))))
    assert found[0] == "fine"
    assert found[1].startswith("! the line is not JSON (")
    assert found[2:] == [
        "! the line is not a JSON object",
        "! no text in this row",
        "! its text is of type int, not a string",
        "! it is not valid UTF-8",
        "! no text in this row",
    ]
    broken = pa.StringArray.from_buffers(2, pa.py_buffer(b"\0\0\0\0\4\0\0\0\6\0\0\0"), pa.py_buffer(b"caf\xe9ok"))
    pq.write_table(pa.table({"text": broken}), tmp_path / "a.parquet")
    assert results(open_source(str(tmp_path / "a.parquet"))) == ["! it is not valid UTF-8", "ok"]


def test_a_long_text_is_read_whole(tmp_path):
    text = "word " * 2_000_000 + "end"
    source = open_source(write(tmp_path / "a.csv", csv_of(("text",), (text,), ("next",))))
    assert results(source) == [text, "next"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "does not begin with a row of column names"),
        ("a.csv", b"\x89PNG\r\n\0\1,\2", "does not begin with a row of column names"),
        ("a.csv", b"text,text\na,b", "has the column 'text' twice"),
        ("a.csv", b"text,label\n", "no rows in .*a.csv"),
        (
            "a.csv",
            b'text,label\nx,a\n"open,a\nlost,a\n',
            r"has a quote that is not closed, in the row .*: \"open,a",
        ),
        ("a.csv", "text\nx".encode("utf-16"), "is encoded in UTF-16: save it in UTF-8"),
        ("a.txt", b"", "no rows in"),
        ("a.txt", b"x" * (MAX_ROW + 1), "has a line of more than 67,108,864 bytes"),
        ("a.jsonl", b"[1]\n[2]\n", "has no JSON object in its first lines"),
    ],
)
def test_what_is_no_table_of_texts(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        open_source(write(tmp_path / name, content))
    assert "\n" not in str(caught.value)


def test_many_rows_are_read_in_groups_by_any_number_of_threads(tmp_path):
    count = 5000
    rows = [(f"text {i}" + ("\nof two lines" if i % 7 == 0 else ""), str(i % 3)) for i in range(count)]
    source: Any = open_source(write(tmp_path / "a.csv", csv_of(("text", "label"), *rows)))
    assert len(source._starts) == 5
    wrong: list[int] = []

    def read(start: int) -> None:
        wrong.extend(i for i in range(start, count, 4) if source.item(i) != rows[i][0])

    threads = [threading.Thread(target=read, args=(start,)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert pickle.loads(pickle.dumps(source)).item(4999) == rows[4999][0]
    write(tmp_path / "a.csv", csv_of(("text", "label"), *rows[:3000]))
    source = pickle.loads(pickle.dumps(source))
    with pytest.raises(DataError, match=r"a\.csv changed while it was read"):
        source.item(4000)


def test_parquet_with_images_holds_texts_only_if_asked(tmp_path):
    image = pa.array([{"bytes": b"", "path": None}], pa.struct([("bytes", pa.binary()), ("path", pa.string())]))
    pq.write_table(pa.table({"image": image, "caption": ["a dog"], "n": [1]}), tmp_path / "a.parquet")
    assert open_source(str(tmp_path / "a.parquet")).kind.name == "images"
    assert results(open_source(str(tmp_path / "a.parquet"), text_column="caption")) == ["a dog"]
    with pytest.raises(DataError, match=r"column 'n' of .*a\.parquet is int64: texts are strings"):
        open_source(str(tmp_path / "a.parquet"), text_column="n")


def test_shards_of_texts_are_one_source(tmp_path):
    for shard in range(2):
        pq.write_table(pa.table({"text": [f"{shard} {i}" for i in range(3)]}), tmp_path / f"part-{shard}.parquet")
    source = open_source(str(tmp_path))
    assert results(source) == ["0 0", "0 1", "0 2", "1 0", "1 1", "1 2"]
    assert source.name(3) == "part-1.parquet row 0"


def test_shards_of_lines_are_one_source(tmp_path):
    write(tmp_path / "part-0.csv", csv_of(("text", "label"), *((f"0 {i}", "b") for i in range(1500))))
    write(tmp_path / "part-1.jsonl", '{"label": "a", "text": "1 0"}\n{"text": "1 1"}\n')
    write(tmp_path / "part-2.csv", csv_of(("label", "text"), ("b", "2 0")))
    write(tmp_path / "notes.md", "about")
    source: Any = open_source(str(tmp_path))
    texts = [*(f"0 {i}" for i in range(1500)), "1 0", "1 1", "2 0"]
    assert (results(source), source.kind, source.text_column) == (texts, TEXTS, "text")
    assert labels_of(source) == ["b"] * 1500 + ["a", None, "b"]
    assert [source.name(i) for i in (0, 1499, 1500, 1502)] == [
        "part-0.csv row 0",
        "part-0.csv row 1499",
        "part-1.jsonl row 0",
        "part-2.csv row 0",
    ]
    assert len({source.identity(i) for i in range(1503)}) == 1503
    assert source.column("label")[1499:] == ["b", "a", None, "b"]
    assert dict(source.passed_over.kinds) == {".md": 1}
    assert pickle.loads(pickle.dumps(source)).item(1501) == "1 1"
    write(tmp_path / "part-2.csv", csv_of(("label", "body"), ("b", "2 0")))
    with pytest.raises(DataError, match=r"part-2\.csv has other columns than .*part-0\.csv: the shards of a data"):
        open_source(str(tmp_path))
    for name in ("train", "test"):
        write(tmp_path / f"{name}.csv", csv_of(("text",), ("a",)))
    with pytest.raises(DataError, match="holds several splits, which must not be mixed: name one of test, train"):
        open_source(str(tmp_path))


def test_a_list_and_a_column_of_a_data_frame_are_texts(tmp_path):
    given = ["my card is lost", "", "my card is lost", None, 5]
    source = source_of(given, labels=["b", "a", None, "a", "b"])
    assert (source.kind, source.title, labels_of(source)) == (TEXTS, "the list", ["b", "a", None, "a", "b"])
    assert results(source) == [
        "my card is lost",
        "! an empty text",
        "my card is lost",
        "! no text in this row",
        "! its text is of type int, not a string",
    ]
    assert source.digest(0) == open_source(write(tmp_path / "a.txt", given[0])).digest(0)
    assert source.identity(0) == source.identity(2) != source.identity(1)
    assert pickle.loads(pickle.dumps(source)).item(0) == given[0]
    frame = pd.DataFrame({"body": ["where is my card", "a b c"], "label": ["x", "y"], "n": [1, 2]})
    table = source_of(frame)
    assert (results(table), labels_of(table), table.text_column) == (list(frame["body"]), ["x", "y"], "body")
    assert group_items(table, "n") == ["1", "2"]
    for one in (np.array(given[:1]), pd.Series(given[:1]), tuple(given[:1])):
        assert results(source_of(one)) == given[:1]
    assert source_of(frame, text_column="label", label_column="n").item(1) == "y"
    assert source_of(frame.drop(columns="body")).kind.name == "rows"
    with pytest.raises(
        DataError, match="no column 'topic' in the DataFrame: it has body, label, n; check its name"
    ):
        source_of(frame, text_column="topic")
    with pytest.raises(DataError, match="no column 'topic' in the DataFrame: it has body, label, n"):
        source_of(frame, text_column="body", label_column="topic")
    with pytest.raises(DataError, match="labels has 1 labels, and the list has 5 texts"):
        source_of(given, labels=[1])
    with pytest.raises(DataError, match=r"the array has shape \(0,\)"):
        source_of([])


def test_images_and_texts_are_not_one_source(tmp_path):
    from PIL import Image

    (tmp_path / "photos").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "photos/a.png")
    text = write(tmp_path / "notes.txt", "some words")
    with pytest.raises(DataError, match="photos holds images, and notes texts: open them one by one"):
        open_source(str(tmp_path / "photos"), text)
    # A shell lists what lies beside images.
    beside = open_source(str(tmp_path / "photos/a.png"), text)
    assert (beside.kind.name, len(beside)) == ("images", 2)
    with pytest.raises(DataError, match=r"photos is not a table and has no column 'caption'"):
        open_source(str(tmp_path / "photos"), text_column="caption")


def test_files_of_text_beside_images_do_not_change_a_folder(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    for name in ("train.txt", "test.txt", "train.csv", "labels.jsonl"):
        write(tmp_path / name, "a,b\n")
    assert open_source(str(tmp_path)).kind.name == "images"


def test_named_sets_are_found_under_the_data_root(tmp_path):
    (tmp_path / "bank").mkdir()
    write(tmp_path / "bank/train.csv", csv_of(("text",), ("a",)))
    assert open_source("bank:train", root=tmp_path).title == "bank:train"
