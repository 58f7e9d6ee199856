"""The cost of decoding an image, by its header."""

import io
import struct
import zlib

import pytest
from PIL import Image, PngImagePlugin

from featnorm.inputs.formats import FORMATS
from featnorm.serve.headers import LongHeaderError, decoding_cost
from hostile import chunk


def encoded(form, size=(40, 30), mode="RGB", **options):
    file = io.BytesIO()
    Image.effect_noise(size, 60).convert(mode).save(file, form, **options)
    return file.getvalue()


@pytest.mark.parametrize("form", FORMATS)
def test_every_format(form):
    data = encoded(form)
    pixels, decoding, opening = decoding_cost(data)
    assert pixels == 1200
    assert decoding == (20 * len(data) if form == "QOI" else 1200)
    assert opening == 0
    assert decoding_cost(data[:8]) == (0, 0, 0)


def plain_ppm():
    return b"P3 10 10 255\n" + b"1 " * 300


def scaled_ppm():
    return b"P6 10 10 254\n" + bytes(300)


def run_length_bmp():
    bare = encoded("BMP", (10, 10), "P")
    return bare[:30] + struct.pack("<I", 1) + bare[34:]


@pytest.mark.parametrize("made", [plain_ppm, scaled_ppm, run_length_bmp])
def test_formats_that_are_decoded_in_python(made):
    data = made()
    assert decoding_cost(data) == (100, 20 * len(data), 0)


def test_scans_of_a_jpeg():
    data = encoded("JPEG", progressive=True)
    scans = data.count(b"\xff\xda")
    assert scans == 10
    assert decoding_cost(data) == (1200, 1200 * 19 // 10, 0)
    scan = data[data.rfind(b"\xff\xda") : -2]
    assert decoding_cost(data[:-2] + scan * 50 + data[-2:]) == (1200, 1200 * 69 // 10, 0)
    # A preview in the header is not decoded.
    preview = b"\xff\xda" + bytes(20)
    application = b"\xff\xe1" + struct.pack(">H", len(preview) + 2) + preview
    assert decoding_cost(data[:2] + application + data[2:]) == decoding_cost(data)


def test_scans_of_a_jpeg_in_a_tiff():
    assert decoding_cost(encoded("TIFF", compression="jpeg")) == (1200, 1200, 0)


@pytest.mark.parametrize("marker", [b"\xff\xd0\x7f\xff", b"\xff\xf0\x7f\xff", b"\xff\xff", b"\xff\x00", b"junk"])
def test_the_size_of_a_jpeg_is_found_after_any_marker(marker):
    data = encoded("JPEG")
    start = data.index(b"\xff\xc0")
    hidden = data[:start] + marker + data[start:]
    with Image.open(io.BytesIO(hidden)) as image:
        assert image.size == (40, 30)
    assert decoding_cost(hidden).pixels == 1200


def test_texts_of_a_png_are_counted_but_not_inflated(monkeypatch):
    data = encoded("PNG")
    text = chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**20 - 10), 9))
    monkeypatch.setattr(PngImagePlugin, "PngImageFile", None)
    for made in (data[:33] + text * 60 + data[33:], data[:-12] + text * 60 + data[-12:]):
        assert decoding_cost(made) == (1200, 1200, 60 * 2**20 // 20)


def test_the_largest_of_several_sizes_counts():
    data = encoded("PNG")
    large = chunk(b"IHDR", struct.pack(">IIBBBBB", 7000, 7000, 8, 0, 0, 0, 0))
    assert decoding_cost(data[:33] + large + data[33:]).pixels == 49_000_000


def test_a_header_is_read_a_few_times_at_most(monkeypatch):
    def read_again(file, formats):
        for _ in range(100):
            file.seek(0)
            file.read()

    monkeypatch.setattr(Image, "open", read_again)
    with pytest.raises(LongHeaderError):
        decoding_cost(bytes(100_000))
