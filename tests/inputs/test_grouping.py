"""Groups of items by folder, column and pattern."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from featnorm.inputs import DataError, JoinedSource, group_items, open_source
from image_files import encoded, write_images


def table(path: Path, **columns: list[object]) -> Path:
    rows = len(next(iter(columns.values())))
    images = [{"bytes": encoded(i), "path": f"day1/clip_{i % 2}_{i}.png"} for i in range(rows)]
    pq.write_table(pa.table({"image": images, **columns}), path, row_group_size=2)
    return path


def test_a_folder_is_the_one_that_holds_the_file(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "photos", "a/x.png", "a/y.png", "b/day1/x.png", "c/day1/x.png", "z.png")
    assert group_items(open_source(str(folder)), "folder") == ["a", "a", "day1", "day1", "photos"]
    assert group_items(open_source(str(folder / "a" / "x.png")), "folder") == ["a"]
    rows = open_source(str(table(tmp_path / "t.parquet", camera=[1, 2])))
    assert group_items(rows, "folder") == ["day1", "day1"]


def test_a_pattern_is_searched_in_the_name(tmp_path: Path) -> None:
    folder = write_images(tmp_path, "cam_1/clip07_1.png", "cam_1/clip07_2.png", "cam_2/clip07_1.png")
    source = open_source(str(folder))
    assert group_items(source, r"clip(\d+)") == ["07"] * 3
    assert group_items(source, r"(cam_\d[\\/](?:clip)\d+)_") == [
        source.name(i).removeprefix(str(folder))[1:].rpartition("_")[0] for i in range(3)
    ]
    rows = open_source(str(table(tmp_path / "t.parquet", camera=[1, 2, 3])))
    assert group_items(rows, r"clip_(\d)") == ["0", "1", "0"]


def test_a_column_is_read_from_every_file_and_row(tmp_path: Path) -> None:
    first = table(tmp_path / "1.parquet", camera=["b", "a", "a"], **{"day (of year)": [3, 2, 1]}, folder=[7, 8, 9])
    second = table(tmp_path / "2.parquet", camera=["c", None], other=[1, 2])
    source = open_source(str(first))
    assert source.columns == ("camera", "day (of year)", "folder")
    assert group_items(source, "camera") == ["b", "a", "a"]
    assert group_items(source, "day (of year)") == ["3", "2", "1"]
    assert group_items(source, "folder") == ["7", "8", "9"]
    assert group_items(open_source(f"{first}[::-2]"), "camera") == ["a", "b"]
    joined = open_source(f"{first}[1:]", f"{second}[:1]")
    assert isinstance(joined, JoinedSource)
    assert joined.columns == ("camera",)
    assert group_items(joined, "camera") == ["a", "a", "c"]
    with pytest.raises(
        DataError, match=r"^day1/clip_1_1\.png has no value in the column 'camera', and so no group"
    ):
        group_items(open_source(str(second)), "camera")
    with pytest.raises(DataError, match=r"^no column 'other' in .*1\.parquet: it has image, camera"):
        open_source(str(first)).column("other")


@pytest.mark.parametrize(
    ("by", "message"),
    [
        ("camera", r"has no column 'camera' to group by \(it is not a table\): name a column, write folder, or"),
        ("clip(", r"^cannot group by 'clip\(': it is neither a column nor a regular expression"),
        ("[", r"^cannot group by .\[.: it is neither a column nor a regular expression \(unterminated"),
        (r"(\w)(\w)", r"^cannot group by .*: it has 2 groups, but"),
        (r"\(x\)", r"^cannot group by .*: it has 0 groups, but"),
        (r"clip(\d+)", r"b[\\/]x\.png has no match of .*, and so no group: every item needs one"),
        (r"(?:clip(\d+)\.)?x\.png", r"b[\\/]x\.png has no match"),
    ],
)
def test_items_without_a_group_are_refused(tmp_path: Path, by: str, message: str) -> None:
    source = open_source(str(write_images(tmp_path, "a/clip07.x.png", "b/x.png")))
    with pytest.raises(DataError, match=message):
        group_items(source, by)
    rows = open_source(str(table(tmp_path / "t.parquet", day=[1, 2])))
    with pytest.raises(DataError, match=r"^t has no column 'image' to group by \(its columns are day\)"):
        group_items(rows, "image")
    with pytest.raises(DataError, match=r"^no column 'day' in .*: it is not a table"):
        source.column("day")
