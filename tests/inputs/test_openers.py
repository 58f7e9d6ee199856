"""Opening of data by path, address or name."""

import importlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from featnorm.inputs import DataError, ItemError, Opener, Source, open_source, openers
from featnorm.inputs.files import Files
from image_files import values, write_images, write_parquet


@pytest.fixture(autouse=True)
def no_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEATNORM_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


# folders


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", "dog/b.png", "cat/x/a.JPG", "dog/a.png", ".hidden/a.png", "cat/.h.png")
    (tmp_path / "pets" / "cow").mkdir()
    (tmp_path / "pets" / "dog" / "notes.txt").write_text("no image")
    source = open_source(str(tmp_path / "pets"))
    assert source.title == "pets"
    assert source.class_names == ["cat", "cow", "dog"]
    assert [source.label(i) for i in range(len(source))] == [0, 2, 2]
    assert [source.name(i) for i in range(3)] == [
        str(tmp_path / "pets" / name) for name in ("cat/x/a.JPG", "dog/a.png", "dog/b.png")
    ]
    assert values(source) == [1, 2, 0]


def test_flat_and_mixed_folders_have_no_classes(tmp_path: Path) -> None:
    for name, files in {"flat": ["b.png", "a.png"], "mixed": ["a.png", "dog/b.png"]}.items():
        source = open_source(str(write_images(tmp_path / name, *files)))
        assert source.class_names is None
        assert [source.label(i) for i in range(len(source))] == [None, None]


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images or videos in [^:]*, which holds no files: check the path$"):
        open_source(str(tmp_path))
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "b.PDF").touch()
    with pytest.raises(DataError, match=r"no images or videos in .*: ignored 2 files .* \(\.pdf 1, \.txt 1\)"):
        open_source(str(tmp_path))


def test_index_out_of_range_ends_iteration(tmp_path: Path) -> None:
    source = open_source(str(write_images(tmp_path / "f", "a.png")))
    assert len(list(source)) == 1  # type: ignore[call-overload]
    for i in (1, -1):
        with pytest.raises(IndexError, match=f"no item {i} in f, whose length is 1"):
            source.item(i)


# names


def test_names_are_searched_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a" / "test.parquet", 1, 11)
    write_parquet(tmp_path / "a" / "train.parquet", 2, 21)
    write_parquet(tmp_path / "nested" / "b.parquet", 3, 31)
    write_images(tmp_path / "c" / "test", "dog/1.png", "cat/1.png")
    write_images(tmp_path / "d", "1.png")
    monkeypatch.setenv("FEATNORM_DATA", str(tmp_path))
    found = {spec: open_source(spec) for spec in ("a", "a:test", "a:train", "nested/b", "c", "d:test")}
    assert {spec: len(source) for spec, source in found.items()} == {
        "a": 1,
        "a:test": 1,
        "a:train": 2,
        "nested/b": 3,
        "c": 2,
        "d:test": 1,
    }
    assert [source.title for source in found.values()] == ["a", "a:test", "a:train", "b", "c", "d:test"]
    assert found["c"].class_names == ["cat", "dog"]
    monkeypatch.setenv("FEATNORM_DATA", "/nowhere")
    assert len(open_source("a:train[1:]", root=tmp_path)) == 1


def test_data_without_splits_is_test_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", 3)
    wanted = r"cannot find 'b:train': no such path, and none of this name under .* \(it has b\)"
    with pytest.raises(DataError, match=wanted):
        open_source("b:train", root=tmp_path)


def test_splits_are_not_mixed_by_default(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "train.parquet")
    write_parquet(tmp_path / "a" / "val-0000.parquet")
    write_images(tmp_path / "b", "train/dog/1.png", "test/dog/1.png")
    for name, splits in {"a": "train, val", "b": "test, train"}.items():
        with pytest.raises(DataError, match=rf"{name} holds several splits, .*: name one of {splits}"):
            open_source(str(tmp_path / name))
    with pytest.raises(DataError, match=r"cannot find 'a'.*\(it has a/val-0000, a:train, b\)"):
        open_source("a", root=tmp_path)
    assert len(open_source(str(tmp_path / "a"), mix_splits=True)) == 20
    assert len(open_source(f"{tmp_path / 'b'}[1:]", mix_splits=True)) == 1


def test_a_new_kind_is_registered_by_its_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An opener is asked by its endings and names, before those that take any file, also under the data root."""
    monkeypatch.setattr(openers, "_OPENERS", [*openers._OPENERS])

    class Lines(Source[str]):
        def __init__(self, path: Path, title: str) -> None:
            self.lines = path.read_text("utf-8").splitlines()
            super().__init__(title, [None] * len(self.lines), None)

        def _read(self, i: int) -> tuple[str, bytes]:
            return self.lines[i], self.lines[i].encode()

        def _name(self, i: int) -> str:
            return f"line {i}"

    class LinesOpener(Opener):
        endings = (".lines",)
        names = ("poems",)

        def open(self, place: Any, title: str, options: openers.Options) -> Lines:
            if isinstance(place, Files):
                return Lines(Path(place.folder.name(place.paths[0])), title)
            return Lines(tmp_path / "root" / "a" / "test.lines", title)

    file = tmp_path / "root" / "a" / "test.lines"
    file.parent.mkdir(parents=True)
    file.write_text("one\ntwo\nthree")
    for source in (open_source(str(file)), open_source("a", root=tmp_path / "root"), open_source("Poems")):
        assert [source[i] for i in range(3)] == [("one", None), ("two", None), ("three", None)]
    sliced = open_source(f"{file}[1:]", str(file))
    assert [sliced.item(i) for i in range(5)] == ["two", "three", "one", "two", "three"]
    assert sliced.name(0) == "a:test[1:]: line 1"
    with pytest.raises(DataError, match=r"no file or folder 'b\.lines': check the path"):
        open_source("b.lines")
    with pytest.raises(DataError, match=r"cannot find 'b': .*\(it has a:test\); check the path$"):
        open_source("b", root=tmp_path / "root")
    monkeypatch.delenv("FEATNORM_DATA", raising=False)
    with pytest.raises(DataError, match=r"^cannot find 'phtos/': no such path; check the path$"):
        open_source("phtos/")
    for near in ("poem", "cifra10:test"):
        with pytest.raises(
            DataError, match=rf"cannot find '{near}': no such path, no data root .*\(only poems, CIFAR10,"
        ):
            open_source(near)


def test_titles_of_paths(tmp_path: Path) -> None:
    assert open_source(str(write_parquet(tmp_path / "a" / "train.parquet"))).title == "a:train"
    assert open_source(str(write_images(tmp_path / "b" / "val", "1.png"))).title == "b:val"
    assert open_source(str(tmp_path / "b" / "val") + "/[:1]").title == "b:val[:1]"


@pytest.mark.parametrize("spec", ["nosuch:train", ":test", "cifar11"])
def test_unknown_name(spec: str) -> None:
    with pytest.raises(
        DataError,
        match=r"no data root is set \(FEATNORM_DATA\), and no data set of that name can be .* \(only CIFAR10,",
    ) as caught:
        open_source(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["", "/no/where", "./x", "~/x", "x.parquet"])
def test_missing_path(spec: str) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*: check the path"):
        open_source(spec)


def test_named_files_are_one_source(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "f", "a.png", "b/c.png", "notes.txt", "d.png")
    (folder / "notes.txt").write_text("no image")
    names = [str(folder / name) for name in ("d.png", "notes.txt", "a.png")]
    source = open_source(*names)
    assert (source.title, len(source), source.class_names) == ("3 files", 3, None)
    assert [source.name(i) for i in range(3)] == names
    assert [source.label(i) for i in range(3)] == [None] * 3
    with pytest.raises(ItemError, match=r"notes\.txt: not an image in a format that featnorm reads"):
        source.item(1)
    one = open_source(names[0])
    assert (one.title, values(one)) == ("d.png", [3])
    assert open_source(names[0], str(folder / "b"), names[2], names[2] + "[:1]").title == (
        "d.png and b and a.png and a.png[:1]"
    )
    with pytest.raises(ValueError, match="no data is given"):
        open_source()
    with pytest.raises(DataError, match=r"d\.png is not a table and has no column 'breed'"):
        open_source(names[0], label_column="breed")


def test_joined_sources_keep_the_labels_of_their_common_classes(tmp_path: Path) -> None:
    one = write_images(tmp_path / "one", "cat/a.png", "dog/b.png")
    two = write_images(tmp_path / "two", "dog/c.png", "cat/d.png")
    other = write_images(tmp_path / "other", "cow/e.png")
    joined = open_source(str(one), str(two))
    assert (joined.title, joined.class_names) == ("one and two", ["cat", "dog"])
    assert [joined.label(i) for i in range(4)] == [0, 1, 0, 1]
    assert values(joined) == [0, 1, 1, 0]
    joined = open_source(str(one), str(other))
    assert (joined.class_names, [joined.label(i) for i in range(3)]) == (None, [None] * 3)


class FakeSVHN:
    def __init__(self, root: Path, *, split: str, download: bool) -> None:
        assert download
        self.root, self.split = root, split
        self.labels = np.array([3, -1])

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        if i:
            raise OSError("broken")
        return Image.new("L", (2, 2), 9), 3


def test_torchvision_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "SVHN", FakeSVHN)
    source = open_source("svhn:extra", root=tmp_path)
    assert (source.title, len(source), source.class_names) == ("svhn:extra", 2, None)
    assert (source.label(0), source.label(1)) == (3, None)
    assert source.item(0).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(ItemError, match="svhn:extra image 1: broken"):
        source.item(1)
    assert source._dataset.root == tmp_path  # type: ignore[attr-defined]
    assert open_source("SVHN")._dataset.root == tmp_path / "home/.cache/featnorm"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="SVHN has no split 'val': it has train, test, extra"):
        open_source("svhn:val")


def test_torchvision_keeps_its_own_tree(tmp_path: Path) -> None:
    """A download of DTD lies in dtd/dtd: reading that as a folder would mix its splits."""
    tree = write_images(tmp_path / "dtd" / "dtd", "images/banded/a.png", "images/dotted/b.png")
    for split, name in {"train": "banded/a.png", "test": "dotted/b.png"}.items():
        (tree / "labels").mkdir(exist_ok=True)
        (tree / "labels" / f"{split}1.txt").write_text(name + "\n")
    assert [len(open_source(spec, root=tmp_path)) for spec in ("dtd", "dtd:train")] == [1, 1]
    assert open_source("dtd", root=tmp_path).class_names == ["dotted"]


def test_failing_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(
        DataError, match=r"downloading CIFAR10 to .* failed \(no route to host\): put it"
    ) as caught:
        open_source("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)
    assert "cifar10/test.parquet" in str(caught.value)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"this needs pyarrow .*pip install 'featnorm\[tables\]'$"):
        open_source(str(path))


# slices


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[:3]", range(3)),
        ("[3:]", range(3, 10)),
        ("[-2:]", range(8, 10)),
        ("[5:100]", range(5, 10)),
        ("[::2]", range(0, 10, 2)),
        ("[1::2]", range(1, 10, 2)),
        ("[::-1]", range(9, -1, -1)),
        ("[ 2 : 4 ]", range(2, 4)),
        ("[:25%]", range(2)),
        ("[25%:]", range(2, 10)),
        ("[-30%:]", range(7, 10)),
        ("[:-30%]", range(7)),
        ("[50%:200%]", range(5, 10)),
        ("[50%:][1:3]", range(6, 8)),
    ],
)
def test_slices(tmp_path: Path, text: str, expected: range) -> None:
    path = write_parquet(tmp_path / "a.parquet", names=["x", "y", "z"])
    source = open_source(f"{path}{text}")
    assert values(source) == list(expected)
    assert [source.name(i) for i in range(len(source))] == [f"{v}.png" for v in expected]
    assert [source.label(i) for i in range(len(source))] == [v % 3 for v in expected]
    assert source.class_names == ["x", "y", "z"]
    assert source.title == f"a{text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[10:]", r"\[10:\] selects nothing from a, whose length is 10"),
        ("[:1%]", "selects nothing"),
        ("[-1%:]", "selects nothing"),
        ("[5]", r"write \[start:stop\]"),
        ("[]", r"write \[start:stop\]"),
        ("[::0]", "the step must not be 0"),
        ("[::50%]", "cannot read '50%'"),
        ("[:x]", "cannot read 'x'"),
        ("[:1.5]", "cannot read '1.5'"),
    ],
)
def test_bad_slices(tmp_path: Path, text: str, message: str) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match=message):
        open_source(f"{path}{text}")


def test_a_folder_called_like_a_slice_wins(tmp_path: Path) -> None:
    write_images(tmp_path / "f", "a.png", "b.png")
    write_images(tmp_path / "f[:1]", "c.png", "d.png", "e.png")
    assert len(open_source(str(tmp_path / "f[:1]"))) == 3
    assert len(open_source(str(tmp_path / "f[:1]") + "[:2]")) == 2


# real data


def test_real_data(shared_data: Path) -> None:
    cifar = open_source("cifar10", root=shared_data)
    assert (len(cifar), cifar.title) == (6000, "cifar10")
    assert cifar.class_names is not None
    assert cifar.class_names[:2] == ["airplane", "automobile"]
    assert cifar.item(5999).size == (32, 32)
    textures = open_source("ood32/textures[-10%:]", root=shared_data)
    assert (len(textures), textures.title) == (72, "textures[-10%:]")
    assert {textures.label(i) for i in range(72)} == {5}
    with pytest.raises(DataError, match=r"it has .*cifar10:train.*tiny_imagenet:val"):
        open_source("tiny_imagenet", root=shared_data)
