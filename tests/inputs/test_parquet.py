"""Labels of a parquet file, in the types that people write."""

import io
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from featnorm.inputs import DataError, SlicedImages, open_images, open_to_score


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
    source = open_images(str(write(tmp_path / "a.parquet", label=column)))
    assert source.class_names == ["cat", "dog"]
    assert labels(source) == [1, None, 0, 1]


def test_numbers_and_booleans(tmp_path: Path) -> None:
    numbers = pa.array([2, -1, None, 0], pa.int16())
    source = open_images(str(write(tmp_path / "a.parquet", label=numbers)))
    assert (labels(source), source.class_names) == ([2, None, None, 0], None)
    source = open_images(str(write(tmp_path / "b.parquet", label=numbers.dictionary_encode())))
    assert (labels(source), source.class_names) == ([2, None, None, 0], None)
    source = open_images(str(write(tmp_path / "c.parquet", label=[True, False, None])))
    assert (labels(source), source.class_names) == ([1, 0, None], ["False", "True"])
    source = open_images(str(write(tmp_path / "d.parquet", label=pa.nulls(2))))
    assert (labels(source), source.class_names) == ([None, None], None)


def test_a_column_of_another_name(tmp_path: Path) -> None:
    names = {"breed": {"_type": "ClassLabel", "names": ["pug", "tabby"]}}
    path = write(tmp_path / "a.parquet", names, breed=[1, 0, 1], kind=["x", "y", "x"], weight=[1.0, 2.0, 3.0])
    source = open_images(str(path))
    assert labels(source) == [None] * 3
    assert source.label_columns == ("breed", "kind")
    assert SlicedImages(source, [0], "one").label_columns == ("breed", "kind")
    source = open_images(str(path), label_column="breed")
    assert (labels(source), source.class_names, source.label_columns) == ([1, 0, 1], ["pug", "tabby"], ())
    source = open_images(f"{path}[1:]", label_column="kind")
    assert (labels(source), source.class_names) == ([1, 0], ["x", "y"])
    with pytest.raises(DataError, match=r"no column 'sort' in .*a\.parquet: it has image, breed, kind, weight"):
        open_images(str(path), label_column="sort")
    with pytest.raises(
        DataError, match=r"column 'weight' of .* is double: labels are integers, strings or booleans; "
    ):
        open_images(str(path), label_column="weight")


@pytest.mark.parametrize("column", [[0.0, 1.0], [[0], [1]], [{"id": 0}, {"id": 1}], [b"cat", b"dog"]])
def test_what_cannot_be_labels_is_refused_where_labels_are_wanted(tmp_path: Path, column: list[Any]) -> None:
    path = write(tmp_path / "a.parquet", label=column)
    with pytest.raises(
        DataError, match=r"column 'label' of .*a\.parquet is .*: labels are integers, strings or"
    ) as error:
        open_images(str(path))
    assert "\n" not in str(error.value)
    for source in (open_images(str(path), labels=False), open_to_score([str(path)])):
        assert labels(source) == [None, None]
        assert source.label_columns == ()


def test_shards_share_their_classes(tmp_path: Path) -> None:
    write(tmp_path / "0.parquet", label=["b", "d"])
    write(tmp_path / "1.parquet", label=["a", "b"])
    (tmp_path / "README.md").write_text("a data set")
    source = open_images(str(tmp_path))
    assert (labels(source), source.class_names) == ([1, 2, 0, 1], ["a", "b", "d"])
    assert str(source.passed_over) == "passed over 1 file that is not an image (.md 1)"


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
        open_images(str(tmp_path))


def test_only_a_table_has_columns(tmp_path: Path) -> None:
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png")
    with pytest.raises(
        DataError, match=r"is no parquet file and has no column 'breed': the classes of images in fold"
    ):
        open_images(str(tmp_path), label_column="breed")
    with pytest.raises(DataError, match=r"torchvision's CIFAR10 is no parquet file"):
        open_images("cifar10", root=tmp_path, label_column="breed")
