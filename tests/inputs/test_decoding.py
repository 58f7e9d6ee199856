"""Decoding of files to pixels: upright, on white, the first of several frames."""

import io
import pickle
import struct
import sys
import types
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image, ImageFile, ImageOps, TiffImagePlugin

from featnorm.inputs import ItemError, open_source
from featnorm.inputs.decoding import decode, is_first_of_several
from image_files import write_images

# For each orientation, the transformation of the upright image before it was saved.
STORED = {
    1: None,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_90,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_270,
}


def picture(seed: int = 0, size: tuple[int, int] = (9, 6)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), dtype=np.uint8))


def saved(image: Image.Image, form: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def turned(orientation: int, form: str, **options: Any) -> bytes:
    """Return the image as a rotated file with its orientation."""
    stored = picture()
    if (turn := STORED[orientation]) is not None:
        stored = stored.transpose(turn)
    exif = Image.Exif()
    exif[274] = orientation
    return saved(stored, form, exif=exif, **options)


def pixels(data: bytes) -> list[Any]:
    return np.asarray(decode(data, "it")).tolist()


# orientation


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize(
    ("form", "options"),
    [
        ("PNG", {}),
        ("WEBP", {"lossless": True, "exact": True}),
        ("TIFF", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ],
)
def test_a_rotated_file_is_decoded_upright(orientation: int, form: str, options: dict[str, Any]) -> None:
    assert pixels(turned(orientation, form, **options)) == np.asarray(picture()).tolist()


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("form", ["JPEG", "AVIF"])
def test_lossy_files_are_rotated_after_decoding(orientation: int, form: str) -> None:
    data = turned(orientation, form)
    image = decode(data, "it")
    assert image.size == picture().size
    with Image.open(io.BytesIO(data)) as stored:
        assert np.array_equal(image, ImageOps.exif_transpose(stored).convert("RGB"))


def test_a_rotated_image_has_no_orientation() -> None:
    """A user's transform that applies the orientation must not rotate the image again."""
    for form in ("PNG", "JPEG", "TIFF"):
        image = decode(turned(6, form), "it")
        assert image == ImageOps.exif_transpose(image)
        assert not image.getexif()
    profile = b"a color profile"
    assert decode(saved(picture(), "PNG", icc_profile=profile), "it").info == {"icc_profile": profile}


@pytest.mark.parametrize(
    "exif",
    [
        b"Exif\0\0no tiff",
        b"Exif\0\0",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x09\0\0\0\0\0\0\0",  # orientation 9
        b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x02\0\x04\0\0\0abc\0\0\0\0\0",  # a text
        b"Exif\0\0MM\0*\0\0\0\x08\xff\xff" + b"\x01\x12\0\x03" * 3,
    ],
)
@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.filterwarnings("ignore::UserWarning:PIL")
def test_broken_metadata_is_ignored(exif: bytes, form: str) -> None:
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    assert pixels(saved(picture(), form, exif=exif, **options)) == pixels(saved(picture(), form, **options))


def test_torchvision_images_are_rotated_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Photographs:
        def __init__(self, root: Path, **options: Any) -> None:
            self.labels = [0]

        def __getitem__(self, i: int) -> tuple[Image.Image, int]:
            return Image.open(io.BytesIO(turned(8, "PNG"))).convert("RGB"), 0

    monkeypatch.setattr(torchvision.datasets, "SVHN", Photographs)
    assert open_source("svhn", root=tmp_path).item(0) == picture()


# transparency


def gray_png(depth: int, row: bytes, width: int, key: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, 1, depth, 0, 0, 0, 0)
    parts = [
        chunk(b"IHDR", header),
        chunk(b"tRNS", struct.pack(">H", key)),
        chunk(b"IDAT", zlib.compress(b"\0" + row)),
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts) + chunk(b"IEND", b"")


def deep_rgb_png(key: tuple[int, int, int], *colors: tuple[int, int, int]) -> bytes:
    row = b"".join(struct.pack(">3H", *color) for color in colors)
    data = bytearray(gray_png(16, row, len(colors), 0))
    header = struct.pack(">IIBBBBB", len(colors), 1, 16, 2, 0, 0, 0)
    data[16:29] = header
    data[29:33] = struct.pack(">I", zlib.crc32(b"IHDR" + header))
    start = data.index(b"tRNS") - 4
    chunk = b"tRNS" + struct.pack(">3H", *key)
    data[start : start + 14] = struct.pack(">I", 6) + chunk + struct.pack(">I", zlib.crc32(chunk))
    return bytes(data)


@pytest.mark.parametrize(
    ("mode", "form"),
    [(mode, form) for mode in ("RGBA", "LA") for form in ("PNG", "WEBP", "TIFF")]
    + [("RGBA", "GIF"), ("P", "GIF"), ("P", "PNG"), ("PA", "TIFF")],
)
def test_transparent_pixels_are_white(mode: str, form: str) -> None:
    image = Image.new("RGBA", (8, 8), (40, 40, 40, 0))
    image.paste((40, 40, 40, 255), (0, 0, 4, 8))
    options = {"lossless": True, "exact": True} if form == "WEBP" else {}
    if mode == "P":
        image = image.convert("RGB").convert("P")
        image.paste(255, (4, 0, 8, 8))
        image.putpalette([*([40] * 765), 40, 40, 40])
        options["transparency"] = 255
    else:
        image = image.convert(mode)
    decoded = decode(saved(image, form, **options), "it")
    assert decoded.getpixel((0, 0)) == (40, 40, 40)
    assert decoded.getpixel((7, 0)) == (255, 255, 255)


def test_half_transparent_pixels_are_blended() -> None:
    assert pixels(saved(Image.new("RGBA", (1, 1), (0, 100, 200, 51)), "PNG")) == [[[204, 224, 244]]]
    opaque = Image.merge("RGBA", (*picture().split(), Image.new("L", (9, 6), 255)))
    assert pixels(saved(opaque, "PNG")) == np.asarray(picture()).tolist()


def test_alpha_of_sixteen_bits() -> None:
    row = struct.pack(">4H", 1000, 0, 5140, 65535)
    data = bytearray(gray_png(16, row, 2, 0))
    header = struct.pack(">IIBBBBB", 2, 1, 16, 4, 0, 0, 0)
    data[16:33] = header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    start = data.index(b"tRNS") - 4
    del data[start : start + 14]
    assert pixels(bytes(data)) == [[[255] * 3, [20] * 3]]


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (gray_png(1, bytes([0b01000000]), 2, 0), [255, 255]),
        (gray_png(1, bytes([0b01000000]), 2, 1), [0, 255]),
        (gray_png(2, bytes([0b00011011]), 4, 2), [0, 85, 255, 255]),
        (gray_png(4, bytes([0x3C]), 2, 3), [255, 204]),
        (gray_png(8, bytes([100, 7]), 2, 100), [255, 7]),
        (gray_png(16, struct.pack(">HH", 25700, 257), 2, 25700), [255, 1]),
    ],
    ids=["1 bit, black", "1 bit, white", "2 bits", "4 bits", "8 bits", "16 bits"],
)
def test_a_gray_that_stands_for_transparency_is_white(data: bytes, expected: list[int]) -> None:
    assert [pixel[0] for pixel in pixels(data)[0]] == expected


def test_a_color_that_stands_for_transparency_is_white() -> None:
    data = saved(Image.fromarray(np.array([[[1, 2, 3], [1, 2, 4]]], np.uint8)), "PNG", transparency=(1, 2, 3))
    assert pixels(data) == [[[255, 255, 255], [1, 2, 4]]]
    deep = deep_rgb_png((1000, 2000, 3000), (1000, 2000, 3000), (257, 514, 771))
    assert pixels(deep) == [[[255, 255, 255], [1, 2, 3]]]


# frames and pages


@pytest.mark.parametrize("form", ["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
def test_the_first_frame_is_used_and_marked(form: str) -> None:
    first, second = Image.new("RGB", (32, 32), (200, 0, 0)), Image.new("RGB", (32, 32), (0, 0, 200))
    one, two = (decode(saved(first, form, save_all=True, append_images=more), form) for more in ([], [second]))
    assert (is_first_of_several(one), is_first_of_several(two)) == (False, True)
    for image in (one, two):
        red, _, blue = image.getpixel((16, 16))  # type: ignore[misc]
        assert red > 190
        assert blue < 10


def test_previews_do_not_count_as_frames() -> None:
    """A camera's MPO has a preview, and a TIFF may have a smaller copy: both contain one photograph."""
    small = picture(1, (3, 2))
    assert not is_first_of_several(decode(saved(picture(), "MPO", save_all=True, append_images=[small]), "it"))
    data = bytearray(saved(picture(), "TIFF", save_all=True, append_images=[picture(1)]))
    assert is_first_of_several(decode(bytes(data), "it"))
    # NewSubfileType in place of the second page's first tag, ImageWidth, which comes from the tag after it.
    first = struct.unpack_from("<I", data, 4)[0]
    (count,) = struct.unpack_from("<H", data, first)
    (second,) = struct.unpack_from("<I", data, first + 2 + 12 * count)
    struct.pack_into("<HHII", data, second + 2, 254, 4, 1, 1)
    assert not is_first_of_several(decode(bytes(data), "it"))


@pytest.mark.parametrize("tags", [{254: 1}, {50706: b"\1\4\0\0"}])
def test_a_raw_file_is_an_error(tags: dict[int, Any]) -> None:
    info = TiffImagePlugin.ImageFileDirectory_v2()
    for tag, value in tags.items():
        info[tag] = value
        if isinstance(value, bytes):
            info.tagtype[tag] = 1
    with pytest.raises(ItemError, match="a camera's raw file, or a TIFF that begins with a thumbnail"):
        decode(saved(picture(), "TIFF", tiffinfo=info), "it")


# formats of other packages


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic" + bytes(40)


def test_heic_names_the_package_that_reads_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    (tmp_path / "a.HEIC").write_bytes(HEIC)
    for read in (lambda: decode(HEIC, "it"), lambda: open_source(str(tmp_path)).item(0)):
        with pytest.raises(ItemError, match=r"HEIC or HEIF .*: pip install pillow-heif$"):
            read()


def test_heic_is_read_with_its_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Heif(ImageFile.ImageFile):
        format = "HEIF"

        def _open(self) -> None:
            if b"damaged" in self.fp.read():
                raise SyntaxError("not a HEIF file")
            self._size, self._mode, self.is_animated = (9, 6), "RGB", True

        def load(self) -> None:  # type: ignore[override]
            self.im = picture().im

    package = types.ModuleType("pillow_heif")
    package.register_heif_opener = (
        lambda: Image.register_open(  # type: ignore[attr-defined]
            "HEIF", Heif, lambda prefix: prefix[4:12] == b"ftypheic"
        )
    )
    monkeypatch.setattr(Image, "OPEN", {**Image.OPEN})
    monkeypatch.setattr(Image, "ID", [*Image.ID])
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    monkeypatch.setitem(sys.modules, "pillow_heif", package)
    (tmp_path / "a.heic").write_bytes(HEIC)
    for image in (decode(HEIC, "it"), open_source(str(tmp_path)).item(0)):
        assert np.array_equal(image, picture())
        assert is_first_of_several(image)
    with pytest.raises(ItemError, match="it: a HEIF file that is damaged, or of a kind that Pillow cannot read"):
        decode(HEIC + b"damaged", "it")


# whole files


def test_every_mode_comes_out_as_rgb(tmp_path: Path) -> None:
    gray = Image.new("L", (4, 4), 100)
    palette = gray.convert("RGB").convert("P")
    palette.save(tmp_path / "palette.png", transparency=b"\x00" * 256)
    gray.save(tmp_path / "gray.png")
    gray.convert("LA").save(tmp_path / "la.png")
    gray.convert("1").save(tmp_path / "one.png")
    Image.new("RGBA", (4, 4), (100, 100, 100, 255)).save(tmp_path / "rgba.png")
    Image.new("CMYK", (4, 4), (10, 20, 30, 40)).save(tmp_path / "cmyk.jpg")
    source = open_source(str(tmp_path))
    images = {Path(source.name(i)).name: source.item(i) for i in range(len(source))}
    assert {image.mode for image in images.values()} == {"RGB"}
    for name in ("gray.png", "la.png", "rgba.png"):
        assert images[name].getpixel((0, 0)) == (100, 100, 100)


@pytest.mark.parametrize("suffix", ["png", "tif", "pgm"])
def test_sixteen_bits_are_scaled(tmp_path: Path, suffix: str) -> None:
    pixels = np.array([[0, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(pixels).save(tmp_path / f"deep.{suffix}", format="PPM" if suffix == "pgm" else None)
    image = open_source(str(tmp_path)).item(0)
    assert np.asarray(image)[0, :, 1].tolist() == [0, 1, 128, 255]


def test_pixels_without_a_range_are_an_error(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0.5]], dtype=np.float32)).save(tmp_path / "a.tif")
    Image.fromarray(np.array([[70000]], dtype=np.int32)).save(tmp_path / "b.tif")
    source = open_source(str(tmp_path))
    for i, reason in enumerate(["floating-point", "32-bit integer"]):
        with pytest.raises(ItemError, match=rf"\.tif: {reason}.* save it with 8 or 16 bits"):
            source.item(i)


def test_a_jpeg_of_too_many_scans_is_an_error(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).convert("RGB").save(buffer, "JPEG", progressive=True)
    data = buffer.getvalue()
    last = data.rindex(b"\xff\xda")
    assert 5 < data.count(b"\xff\xda") < 20
    bomb = data[:last] + data[last:-2] * 200 + data[-2:]
    assert decode(data, "fine").size == (64, 64)
    (tmp_path / "bomb.jpg").write_bytes(bomb)
    for read in (lambda: decode(bomb, "bomb"), lambda: open_source(str(tmp_path / "bomb.jpg")).item(0)):
        with pytest.raises(ItemError, match=r"a JPEG of 2\d\d scans, more than 100: save it again"):
            read()


def test_a_tiff_of_many_jpegs_is_read(tmp_path: Path) -> None:
    noise = Image.effect_noise((64, 4096), 50).convert("RGB")
    noise.save(tmp_path / "strips.tif", compression="jpeg", tiffinfo={278: 16})
    assert (tmp_path / "strips.tif").read_bytes().count(b"\xff\xda") > 200
    assert decode((tmp_path / "strips.tif").read_bytes(), "strips").size == (64, 4096)


def test_postscript_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jpg").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\nshowpage\n")
    monkeypatch.setattr("PIL.EpsImagePlugin.Ghostscript", lambda *_args, **_options: pytest.fail("it was run"))
    with pytest.raises(ItemError, match="PostScript is a program"):
        decode((tmp_path / "a.jpg").read_bytes(), "a.jpg")


def test_corrupt_images_raise_on_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    for name in ("cut.png", "cut.jpg"):
        buffer = io.BytesIO()
        Image.fromarray(noise).save(buffer, "PNG" if name.endswith("png") else "JPEG")
        (tmp_path / name).write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 2])
    (tmp_path / "empty.jpg").touch()
    (tmp_path / "text.jpg").write_text("I am not an image")
    (tmp_path / "lost.png").symlink_to(tmp_path / "nowhere")
    source = open_source(str(tmp_path))
    assert len(source) == 5
    reasons = {}
    for i in range(5):
        with pytest.raises(ItemError) as caught:
            source.item(i)
        assert caught.value.name == source.name(i)
        assert str(caught.value) == f"{source.name(i)}: {caught.value.reason}"
        assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)
        reasons[Path(caught.value.name).name] = caught.value.reason
    assert reasons["text.jpg"] == "not an image in a format that featnorm reads"
    assert reasons["empty.jpg"] == "an empty file"
    assert reasons["lost.png"] == "No such file or directory"
    assert "truncated" in reasons["cut.jpg"]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)
    with pytest.raises(ItemError, match="decompression bomb"):
        open_source(str(write_images(tmp_path / "bomb", "a.png"))).item(0)
