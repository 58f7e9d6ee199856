import importlib
import io
import json
import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torchvision.datasets
from PIL import Image

from featnorm.inputs import DataError, ImageError, ImageSource, open_images
from featnorm.inputs.formats import PassedOver
from featnorm.inputs.images import decode, image_files


@pytest.fixture(autouse=True)
def no_root(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("FEATNORM_DATA", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))


def encoded(value: int, size: tuple[int, int] = (8, 6), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def write_images(folder: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(value))
    return folder


def write_parquet(
    path: Path,
    rows: int = 10,
    start: int = 0,
    *,
    names: list[str] | None = None,
    images: list[dict[str, Any] | None] | None = None,
    labels: list[int | None] | None = None,
) -> Path:
    values = range(start, start + rows)
    images = images or [{"bytes": encoded(v), "path": f"{v}.png"} for v in values]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array(images, struct),
            "label": pa.array(labels or [v % 3 for v in range(len(images))], pa.int64()),
        }
    )
    if names:
        info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def values(source: ImageSource) -> list[int]:
    return [image.getpixel((0, 0))[0] for image, _ in iterate(source)]  # type: ignore[index]


def iterate(source: ImageSource) -> Iterator[tuple[Image.Image, int | None]]:
    return (source[i] for i in range(len(source)))


# folders


def test_sub_folders_are_classes(tmp_path: Path) -> None:
    write_images(tmp_path / "pets", "dog/b.png", "cat/x/a.JPG", "dog/a.png", ".hidden/a.png", "cat/.h.png")
    (tmp_path / "pets" / "cow").mkdir()
    (tmp_path / "pets" / "dog" / "notes.txt").write_text("no image")
    source = open_images(str(tmp_path / "pets"))
    assert source.title == "pets"
    assert source.class_names == ["cat", "cow", "dog"]
    assert [source.label(i) for i in range(len(source))] == [0, 2, 2]
    assert [source.name(i) for i in range(3)] == [
        str(tmp_path / "pets" / name) for name in ("cat/x/a.JPG", "dog/a.png", "dog/b.png")
    ]
    assert values(source) == [1, 2, 0]


def test_flat_and_mixed_folders_have_no_classes(tmp_path: Path) -> None:
    for name, files in {"flat": ["b.png", "a.png"], "mixed": ["a.png", "dog/b.png"]}.items():
        source = open_images(str(write_images(tmp_path / name, *files)))
        assert source.class_names is None
        assert [source.label(i) for i in range(len(source))] == [None, None]


def test_empty_folder(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"no images in [^:]*$"):
        open_images(str(tmp_path))
    (tmp_path / "a.txt").write_text("no image")
    (tmp_path / "b.MP4").touch()
    with pytest.raises(DataError, match=r"no images in .*: passed over 2 files .* \(\.mp4 1, \.txt 1\)"):
        open_images(str(tmp_path))


def test_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "f", "sub/a.png")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "other").symlink_to(write_images(tmp_path / "g", "b.png"))
    assert [Path(open_images(str(folder)).name(i)).name for i in range(2)] == ["b.png", "a.png"]


def test_folders_that_link_to_each_other_are_read_once(tmp_path: Path) -> None:
    folder, outside = tmp_path / "f", tmp_path / "g"
    write_images(folder, "a/1.png", "b/2.png")
    write_images(outside, "c/3.png", "d/4.png")
    for place, other in (("a", "b"), ("b", "a")):
        for link in ("l", "m"):
            (folder / place / link).symlink_to(folder / other)
    for place, other in (("c", "d"), ("d", "c")):
        for link in ("l", "m"):
            (outside / place / link).symlink_to(outside / other)
            (folder / f"{place}{link}").symlink_to(outside / place)
    assert [os.path.basename(file) for file in image_files(folder)[0]] == ["1.png", "2.png", "3.png", "4.png"]


def test_what_would_be_waited_for_is_no_image(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "f", "a.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    files, passed_over = image_files(folder)
    assert files == ["a.png", "lost.png"]
    assert passed_over == PassedOver({"pipes and devices": 3})


def test_index_out_of_range_ends_iteration(tmp_path: Path) -> None:
    source = open_images(str(write_images(tmp_path / "f", "a.png")))
    assert len(list(source)) == 1  # type: ignore[call-overload]
    for i in (1, -1):
        with pytest.raises(IndexError, match="f has 1 images"):
            source.image(i)


# decoding


def test_every_mode_comes_out_as_rgb(tmp_path: Path) -> None:
    gray = Image.new("L", (4, 4), 100)
    palette = gray.convert("RGB").convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x00" * 256)
    gray.save(tmp_path / "gray.png")
    gray.convert("LA").save(tmp_path / "la.png")
    gray.convert("1").save(tmp_path / "one.png")
    Image.new("RGBA", (4, 4), (100, 100, 100, 255)).save(tmp_path / "rgba.png")
    Image.new("CMYK", (4, 4), (10, 20, 30, 40)).save(tmp_path / "cmyk.jpg")
    source = open_images(str(tmp_path))
    images = {Path(source.name(i)).name: source.image(i) for i in range(len(source))}
    assert {image.mode for image in images.values()} == {"RGB"}
    for name in ("gray.png", "la.png", "rgba.png"):
        assert images[name].getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    pixels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"deep.{suffix}", format="PPM" if suffix == "pgm" else None)
    image = open_images(str(tmp_path)).image(0)
    assert np.asarray(image)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_range_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.array([[70000]], dtype=np.int32)).save(tmp_path / "b.tif")
    source = open_images(str(tmp_path))
    for i, reason in enumerate(["floating-point", "32-bit integer"]):
        with pytest.raises(ImageError, match=rf"\.tif: {reason}.* save it with 8 or 16 bits"):
            source.image(i)


def test_a_jpeg_of_endless_scans_is_refused_at_once(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    assert 5 < data.count(b"\xff\xda") < 20
    bomb = data[:last] + data[last:-2] * 200 + data[-2:]
    assert decode(data, "fine").size == (64, 64)
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    for place in (bomb, tmp_path / "bomb.jpg"):
        with pytest.raises(ImageError, match=r"a JPEG of 2\d\d scans, more than 100: save it again"):
            decode(place, "bomb")


def test_a_tiff_of_many_jpegs_is_read(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 4096), 50).convert("RGB")
    noise.save(tmp_path / "strips.tif", compression="jpeg", tiffinfo={278: 16})
    assert (tmp_path / "strips.tif").read_bytes().count(b"\xff\xda") > 200
    assert decode(tmp_path / "strips.tif", "strips").size == (64, 4096)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_args, **_options: pytest.fail("it was run"))
    with pytest.raises(ImageError, match="PostScript is a program"):
        decode(tmp_path / "a.jpg", "a.jpg")


def test_corrupt_images_raise_on_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG" if name.endswith("png") else "JPEG")
        (tmp_path / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("I am not an image")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    source = open_images(str(tmp_path))
    assert len(source) == 5
    reasons = {}
    for i in range(5):
        with pytest.raises(ImageError) as caught:
            source.image(i)
        assert caught.value.name == source.name(i)
        assert str(caught.value) == f"{source.name(i)}: {caught.value.reason}"
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        reasons[Path(caught.value.name).name] = caught.value.reason
    assert reasons["text.jpg"] == "not an image in a format that featnorm reads"
    assert reasons["empty.jpg"] == "an empty file"
    assert reasons["lost.png"] == "No such file or directory"
    assert "truncated" in reasons["cut.jpg"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ImageError, match="decompression bomb"):
        open_images(str(write_images(tmp_path / "bomb", "a.png"))).image(0)


# parquet


def test_parquet(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "pets.parquet", names=["cat", "dog", "cow"])
    source = open_images(str(path))
    assert (source.title, len(source), source.class_names) == ("pets", 10, ["cat", "dog", "cow"])
    assert values(source) == list(range(10))
    assert [source.label(i) for i in range(4)] == [0, 1, 2, 0]
    assert source.name(7) == "7.png"
    order = np.random.default_rng(0).permutation(10)
    assert [source.image(int(i)).getpixel((0, 0))[0] for i in order] == order.tolist()  # type: ignore[index]
    assert values(pickle.loads(pickle.dumps(source))) == list(range(10))


def test_reading_in_order_reads_each_row_group_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images(str(write_parquet(tmp_path / "a.parquet")))
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
    source = open_images(str(path))
    assert [source.label(i) for i in range(5)] == [None, None, 2, 0, 1]
    assert [source.name(i) for i in range(4)] == ["row 0", "row 1", "row 2", "beside.png"]
    for i in (0, 1):
        with pytest.raises(ImageError, match=f"row {i}: no image in this row"):
            source.image(i)
    assert values(open_images(f"{path}[2:4]")) == [3, 7]
    with pytest.raises(ImageError, match="row 4: an empty file"):
        source.image(4)


def test_shards_are_one_source(tmp_path: Path) -> None:
    write_parquet(tmp_path / "train-00001.parquet", 5, 10, images=[{"bytes": encoded(v)} for v in range(10, 15)])
    write_parquet(tmp_path / "train-00000.parquet", 10)
    source = open_images(str(tmp_path))
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
        "named": "no column 'image' in .*named.parquet: it has img, fine_label",
        "bare": "column 'image' of .*bare.parquet is binary: it must be a struct",
        "broken": "cannot read .*broken.parquet as parquet: ",
        "none": "no rows in .*none.parquet",
        "missing": "no file or folder .*missing.parquet",
    }.items():
        with pytest.raises(DataError, match=message) as caught:
            open_images(str(tmp_path / f"{name}.parquet"))
        assert "\n" not in str(caught.value)


def test_row_group_that_cannot_be_read_is_not_one_bad_image(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "a.parquet")
    source = open_images(str(path))
    path.unlink()
    with pytest.raises(DataError, match=r"cannot read row group 1 of .*a\.parquet") as caught:
        source.image(5)
    assert not isinstance(caught.value, ImageError)


# names


def test_names_are_looked_for_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_parquet(tmp_path / "a" / "test.parquet", 1, 11)
    write_parquet(tmp_path / "a" / "train.parquet", 2, 21)
    write_parquet(tmp_path / "nested" / "b.parquet", 3, 31)
    write_images(tmp_path / "c" / "test", "dog/1.png", "cat/1.png")
    write_images(tmp_path / "d", "1.png")
    monkeypatch.setenv("FEATNORM_DATA", str(tmp_path))
    found = {spec: open_images(spec) for spec in ("a", "a:test", "a:train", "nested/b", "c", "d:test")}
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
    assert len(open_images("a:train[1:]", root=tmp_path)) == 1


def test_data_without_splits_is_test_only(tmp_path: Path) -> None:
    write_parquet(tmp_path / "b.parquet", 3)
    with pytest.raises(DataError, match=r"cannot find 'b:train': no such path, not under .* \(it has b\)"):
        open_images("b:train", root=tmp_path)


def test_splits_are_never_mixed(tmp_path: Path) -> None:
    write_parquet(tmp_path / "a" / "train.parquet")
    write_parquet(tmp_path / "a" / "val-0000.parquet")
    write_images(tmp_path / "b", "train/dog/1.png", "test/dog/1.png")
    for name, splits in {"a": "train, val", "b": "test, train"}.items():
        with pytest.raises(DataError, match=rf"{name} holds several splits, .*: name one of {splits}"):
            open_images(str(tmp_path / name))
    with pytest.raises(DataError, match=r"cannot find 'a'.*\(it has a/val-0000, a:train, b\)"):
        open_images("a", root=tmp_path)


def test_titles_of_paths(tmp_path: Path) -> None:
    assert open_images(str(write_parquet(tmp_path / "a" / "train.parquet"))).title == "a:train"
    assert open_images(str(write_images(tmp_path / "b" / "val", "1.png"))).title == "b:val"
    assert open_images(str(tmp_path / "b" / "val") + "/[:1]").title == "b:val[:1]"


@pytest.mark.parametrize("spec", ["nosuch", "nosuch:train", ":test", "cifar11"])
def test_unknown_name(spec: str) -> None:
    with pytest.raises(
        DataError, match=r"no data root is set \(FEATNORM_DATA\), and torchvision.*CIFAR10"
    ) as caught:
        open_images(spec)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spec", ["", "/no/where", "./x", "~/x", "x.parquet"])
def test_missing_path(spec: str) -> None:
    with pytest.raises(DataError, match=r"no file or folder .*: check the path"):
        open_images(spec)


def test_a_file_is_not_a_folder(tmp_path: Path) -> None:
    file = write_images(tmp_path, "a.png") / "a.png"
    with pytest.raises(DataError, match=r"neither a folder nor a \.parquet file"):
        open_images(str(file))


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
    source = open_images("svhn:extra", root=tmp_path)
    assert (source.title, len(source), source.class_names) == ("svhn:extra", 2, None)
    assert (source.label(0), source.label(1)) == (3, None)
    assert source.image(0).getpixel((0, 0)) == (9, 9, 9)
    with pytest.raises(ImageError, match="svhn:extra image 1: broken"):
        source.image(1)
    assert source._dataset.root == tmp_path  # type: ignore[attr-defined]
    assert open_images("SVHN")._dataset.root == tmp_path / "home/.cache/featnorm"  # type: ignore[attr-defined]
    with pytest.raises(DataError, match="SVHN has no split 'val': it has train, test, extra"):
        open_images("svhn:val")


def test_torchvision_keeps_its_own_tree(tmp_path: Path) -> None:
    """A download of DTD lies in dtd/dtd: reading that as a folder would mix its splits."""
    tree = write_images(tmp_path / "dtd" / "dtd", "images/banded/a.png", "images/dotted/b.png")
    for split, name in {"train": "banded/a.png", "test": "dotted/b.png"}.items():
        (tree / "labels").mkdir(exist_ok=True)
        (tree / "labels" / f"{split}1.txt").write_text(name + "\n")
    assert [len(open_images(spec, root=tmp_path)) for spec in ("dtd", "dtd:train")] == [1, 1]
    assert open_images("dtd", root=tmp_path).class_names == ["dotted"]


def test_failing_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("no route to host\nsecond line")

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", offline)
    with pytest.raises(
        DataError, match=r"downloading CIFAR10 to .* failed \(no route to host\): put it"
    ) as caught:
        open_images("cifar10", root=tmp_path)
    assert "\n" not in str(caught.value)
    assert "cifar10/test.parquet" in str(caught.value)


def test_missing_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_parquet(tmp_path / "a.parquet")

    def absent(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(ImportError, match=r"pyarrow is needed.*pip install '\.\[vision\]' in a checkout"):
        open_images(str(path))


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
    source = open_images(f"{path}{text}")
    assert values(source) == list(expected)
    assert [source.name(i) for i in range(len(source))] == [f"{v}.png" for v in expected]
    assert [source.label(i) for i in range(len(source))] == [v % 3 for v in expected]
    assert source.class_names == ["x", "y", "z"]
    assert source.title == f"a{text}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[10:]", r"\[10:\] leaves nothing of a, which has 10 images"),
        ("[:1%]", "leaves nothing"),
        ("[-1%:]", "leaves nothing"),
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
        open_images(f"{path}{text}")


def test_a_folder_called_like_a_slice_wins(tmp_path: Path) -> None:
    write_images(tmp_path / "f", "a.png", "b.png")
    write_images(tmp_path / "f[:1]", "c.png", "d.png", "e.png")
    assert len(open_images(str(tmp_path / "f[:1]"))) == 3
    assert len(open_images(str(tmp_path / "f[:1]") + "[:2]")) == 2


# the real thing


def test_real_data(shared_data: Path) -> None:
    cifar = open_images("cifar10", root=shared_data)
    assert (len(cifar), cifar.title) == (6000, "cifar10")
    assert cifar.class_names is not None
    assert cifar.class_names[:2] == ["airplane", "automobile"]
    assert cifar.image(5999).size == (32, 32)
    textures = open_images("ood32/textures[-10%:]", root=shared_data)
    assert (len(textures), textures.title) == (72, "textures[-10%:]")
    assert {textures.label(i) for i in range(72)} == {5}
    with pytest.raises(DataError, match=r"it has .*cifar10:train.*tiny_imagenet:val"):
        open_images("tiny_imagenet", root=shared_data)
