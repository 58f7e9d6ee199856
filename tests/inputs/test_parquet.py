"""Parquet files: their labels, in the types that people write, and their rows."""

import io
import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featnorm.inputs import DataError, ItemError, SlicedSource, open_source
from image_files import encoded, values, write_parquet


def write(path: Path, metadata: dict[str, Any] | None = None, **columns: Any) -> Path:
    """Write a file of as many images as its columns have rows."""
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4)).save(buffer, "PNG")
    rows = len(next(iter(columns.values())))
    table = pa.table({"image": [{"bytes": buffer.getvalue(), "path": None}] * rows, **columns})
    if metadata is not None:
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": metadata}})})
    pq.write_table(table, path)
    return path


def labels(source: Any) -> list[int | None]:
    return [source.label(i) for i in range(len(source))]


STRINGS = ["dog", None, "cat", "dog"]


@pytest.mark.parametrize(
    "column",
    [
        pa.array(STRINGS, pa.string()),
        pa.array(STRINGS, pa.large_string()),
        pa.array(STRINGS, pa.string_view()),
        pa.array(STRINGS).dictionary_encode(),
        pa.DictionaryArray.from_arrays(pa.array([0, None, 1, 0], pa.int8()), pa.array(["dog", "cat"])),
    ],
    ids=["string", "large string", "string view", "dictionary", "categories"],
)
def test_strings_are_classes_in_their_order(tmp_path: Path, column: pa.Array) -> None:
    source = open_source(str(write(tmp_path / "a.parquet", label=column)))
    assert source.class_names == ["cat", "dog"]
    assert labels(source) == [1, None, 0, 1]


def test_numbers_and_booleans(tmp_path: Path) -> None:
    numbers = pa.array([2, -1, None, 0], pa.int16())
    source = open_source(str(write(tmp_path / "a.parquet", label=numbers)))
    assert (labels(source), source.class_names) == ([2, None, None, 0], None)
    source = open_source(str(write(tmp_path / "b.parquet", label=numbers.dictionary_encode())))
    assert (labels(source), source.class_names) == ([2, None, None, 0], None)
    source = open_source(str(write(tmp_path / "c.parquet", label=[True, False, None])))
    assert (labels(source), source.class_names) == ([1, 0, None], ["False", "True"])
    source = open_source(str(write(tmp_path / "d.parquet", label=pa.nulls(2))))
    assert (labels(source), source.class_names) == ([None, None], None)


def test_a_column_of_another_name(tmp_path: Path) -> None:
    names = {"breed": {"_type": "ClassLabel", "names": ["pug", "tabby"]}}
    path = write(tmp_path / "a.parquet", names, breed=[1, 0, 1], kind=["x", "y", "x"], weight=[1.0, 2.0, 3.0])
    source = open_source(str(path))
    assert labels(source) == [None] * 3
    assert source.label_columns == ("breed", "kind")
    assert SlicedSource(source, [0], "one").label_columns == ("breed", "kind")
    source = open_source(str(path), label_column="breed")
    assert (labels(source), source.class_names, source.label_columns) == ([1, 0, 1], ["pug", "tabby"], ())
    source = open_source(f"{path}[1:]", label_column="kind")
    assert (labels(source), source.class_names) == ([1, 0], ["x", "y"])
    with pytest.raises(DataError, match=r"no column 'sort' in .*a\.parquet: it has image, breed, kind, weight"):
        open_source(str(path), label_column="sort")
    with pytest.raises(
        DataError, match=r"column 'weight' of .* is double: labels are integers, strings or booleans; "
    ):
        open_source(str(path), label_column="weight")


@pytest.mark.parametrize("column", [[0.0, 1.0], [[0], [1]], [{"id": 0}, {"id": 1}], [b"cat", b"dog"]])
def test_columns_of_other_types_are_an_error_if_labels_are_read(tmp_path: Path, column: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", label=column)
    with pytest.raises(
        DataError, match=r"column 'label' of .*a\.parquet is .*: labels are integers, strings or"
    ) as error:
        open_source(str(path))
    assert "\n" not in str(error.value)
    source = open_source(str(path), labels=False)
    assert labels(source) == [None, None]
    assert source.label_columns == ()


def test_shards_share_their_classes(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", label=["b", "d"])
    write(tmp_path / "1.parquet", label=["a", "b"])
    (tmp_path / "README.md").write_text("a data set")
    source = open_source(str(tmp_path))
    assert (labels(source), source.class_names) == ([1, 2, 0, 1], ["a", "b", "d"])
    assert str(source.passed_over) == "ignored 1 file that is not an image (.md 1)"


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (
            {"label": ["a", "b"]},
            r"the labels of .*1\.parquet are strings, those of .*0\.parquet integers: the shards",
        ),
        ({"other": [1, 2]}, r"the labels of .*1\.parquet are missing, those of .*0\.parquet integers: the shards"),
        (
            {"label": [0, 1], "metadata": {"label": {"names": ["cat", "dog"]}}},
            r"1\.parquet and .*0\.parquet name their classes differently: the shards of a data set must agree",
        ),
    ],
)
def test_shards_that_do_not_agree(tmp_path: Path, second: dict[str, Any], message: str) -> None:
    write(tmp_path / "0.parquet", {"label": {"names": ["dog", "cat"]}}, label=[0, 1])
    write(tmp_path / "1.parquet", **second)
    with pytest.raises(DataError, match=message):
        open_source(str(tmp_path))


def test_only_a_table_has_columns(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"is not a table and has no column 'breed': the classes of images in fold"
    ):
        open_source(str(tmp_path), label_column="breed")
    with pytest.raises(DataError, match=r"torchvision's CIFAR10 is not a table"):
        open_source("cifar10", root=tmp_path, label_column="breed")


# files and rows


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pets.parquet", names=["cat", "dog", "cow"])
    source = open_source(str(path))
    assert (source.title, len(source), source.class_names) == ("pets", 10, ["cat", "dog", "cow"])
    assert values(source) == list(range(10))
    assert [source.label(i) for i in range(4)] == [0, 1, 2, 0]
    assert source.name(7) == "7.png"
    order = np.random.default_rng(0).permutation(10)
    assert [source.item(int(i)).getpixel((0, 0))[0] for i in order] == order.tolist()  # type: ignore[index]
    assert values(pickle.loads(pickle.dumps(source))) == list(range(10))


def test_reading_in_order_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_parquet(tmp_path / "a.parquet")))
    read: list[int] = []
    original = pq.ParquetFile.read_row_group

    def counted(self: Any, group: int, **options: Any) -> Any:
        read.append(group)
        return original(self, group, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    values(source)
    assert read == [0, 1, 2]


def test_parquet_rows_without_an_image_path_or_label(tmp_path: Path) -> None:
    (tmp_path / "beside.png").write_bytes(encoded(7))
    images: list[dict[str, Any] | None] = [
        None,
        {"bytes": None, "path": None},
        {"bytes": encoded(3), "path": None},
        {"bytes": None, "path": "beside.png"},
        {"bytes": b"", "path": None},
    ]
    path = write_parquet(tmp_path / "a.parquet", images=images, labels=[None, -1, 2, 0, 1])
    source = open_source(str(path))
    assert [source.label(i) for i in range(5)] == [None, None, 2, 0, 1]
    assert [source.name(i) for i in range(4)] == ["row 0", "row 1", "row 2", "beside.png"]
    for i in (0, 1):
        with pytest.raises(ItemError, match=f"row {i}: no image in this row"):
            source.item(i)
    assert values(open_source(f"{path}[2:4]")) == [3, 7]
    with pytest.raises(ItemError, match="row 4: an empty file"):
        source.item(4)


def test_shards_are_one_source(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001.parquet", 5, 10, images=[{"bytes": encoded(v)} for v in range(10, 15)])
    write_parquet(tmp_path / "train-00000.parquet", 10)
    source = open_source(str(tmp_path))
    assert values(source) == list(range(15))
    assert [source.name(i) for i in (9, 10, 14)] == [
        "9.png",
        "train-00001.parquet row 0",
        "train-00001.parquet row 4",
    ]
    assert [source.label(i) for i in (9, 10, 11)] == [0, 0, 1]


def test_unusable_parquet(tmp_path: Path) -> None:
    pq.write_table(pa.table({"img": [b""], "fine_label": [0]}), tmp_path / "named.parquet")
    pq.write_table(pa.table({"image": [b""]}), tmp_path / "bare.parquet")
    (tmp_path / "broken.parquet").write_bytes(b"PAR1 no")
    pq.write_table(pq.read_table(write_parquet(tmp_path / "x.parquet")).slice(0, 0), tmp_path / "none.parquet")
    for name, message in {
        "named": "no column 'image' or 'text' in .*named.parquet: it has img, fine_label",
        "bare": "column 'image' of .*bare.parquet is binary: it must be a struct",
        "broken": "cannot read .*broken.parquet as parquet: ",
        "none": "no rows in .*none.parquet",
        "missing": "no file or folder .*missing.parquet",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            open_source(str(tmp_path / f"{name}.parquet"))
        assert "\n" not in str(caught.value)


def test_a_row_group_that_cannot_be_read_is_not_an_item_error(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    source = open_source(str(path))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read row group 1 of .*a\.parquet") as caught:
        source.item(5)
    assert not isinstance(caught.value, ItemError)
