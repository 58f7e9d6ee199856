"""What an image takes to decode, as far as its header tells: `measure`."""

import struct
from io import BytesIO
from typing import NamedTuple

from PIL import Image, JpegImagePlugin, PngImagePlugin

from featnorm.inputs.decoding import count_scans
from featnorm.inputs.formats import FORMATS, HEAD_BYTES, format_of, register_format

# A header of a million parts would keep a thread busy for seconds. The header that a camera writes takes some
# hundred reads, and the chunks of a large PNG hold kilobytes each.
_MAX_PARTS = 4096
_BYTES_PER_PART = 64
# How often the bytes of an image may be read for its header: WebP and AVIF are read as a whole, and the entries of
# a TIFF can name the same bytes again and again.
_TIMES_READ = 3
_FREE_BYTES = 2**16
# What deflate makes of a byte at most, and how many bytes are inflated while a pixel is decoded.
_INFLATION, _INFLATED_PER_PIXEL = 1032, 20
_PNG_MARK = 8  # bytes before the first chunk
_INFLATED = (b"zTXt", b"iTXt", b"iCCP")
# Pixels that other formats have decoded while Pillow decodes a byte in Python.
_PIXELS_PER_BYTE_IN_PYTHON = 20
# Scans of a JPEG that take as long as the first, in which its pixels are made too.
_SCANS = 10


class Measure(NamedTuple):
    """What an image takes, in pixels that are decoded in the same time."""

    pixels: int = 0
    """How many the header declares; 0 where it cannot be read."""
    decoding: int = 0
    opening: int = 0
    """What it takes beside, also if the image is refused for its size."""


class LongHeaderError(Exception):
    """Raised where a header has more parts than any that is meant to be read."""


def measure(data: bytes) -> Measure:
    """Return what an encoded image takes to decode.

    Raises
    ------
    LongHeaderError
        Its header has too many parts.
    """
    head = data[:HEAD_BYTES]
    try:
        match format_of(head):
            # Pillow inflates the texts of a PNG and parses the EXIF data of a JPEG before it tells the size.
            case "PNG":
                return _measure_png(data)
            case "JPEG":
                return _measure_jpeg(data)
        other = register_format(head)
        with Image.open(_Header(data), formats=FORMATS if other is None else (other,)) as image:
            return _measure_opened(image, len(data))
    except LongHeaderError:
        raise
    except Exception:  # nearly anything; what is wrong is said where the image is decoded
        return Measure()


def _measure_png(data: bytes) -> Measure:
    pixels = inflated = 0
    at = _PNG_MARK
    for _ in range(_MAX_PARTS + len(data) // _BYTES_PER_PART):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IHDR":
            # Of several the last one holds.
            width, height = struct.unpack_from(">II", data, at + 8)
            pixels = max(pixels, width * height)
        elif kind in _INFLATED:
            inflated += min(_INFLATION * length, PngImagePlugin.MAX_TEXT_CHUNK)
        elif kind == b"IEND":
            break
        at += 12 + length
    else:
        raise LongHeaderError
    return Measure(pixels, pixels, inflated // _INFLATED_PER_PIXEL)


def _measure_jpeg(data: bytes) -> Measure:
    pixels, at = 0, 2
    for _ in range(_MAX_PARTS):
        at = data.find(b"\xff", at)
        (kind,) = struct.unpack_from(">H", data, at)
        if kind == 0xFFDA:
            return Measure(pixels, _with_scans(pixels, data.count(b"\xff\xda", at)))
        if kind == 0xFFFF:  # padding
            at += 1
            continue
        # Pillow's own table, so that no other marker hides the size from here.
        _, _, handler = JpegImagePlugin.MARKER.get(kind, ("", "", None))
        at += 2
        if handler is JpegImagePlugin.SOF:
            height, width = struct.unpack_from(">HH", data, at + 3)
            pixels = max(pixels, width * height)
        if handler is not None:
            at += max(2, *struct.unpack_from(">H", data, at))
    raise LongHeaderError


def _measure_opened(image: Image.Image, size: int) -> Measure:
    pixels = image.width * image.height
    if any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        return Measure(pixels, max(pixels, _PIXELS_PER_BYTE_IN_PYTHON * size))
    scans, parts = count_scans(image)
    return Measure(pixels, _with_scans(pixels, scans // parts))


def _with_scans(pixels: int, scans: int) -> int:
    return pixels * (_SCANS - 1 + max(1, scans)) // _SCANS


class _Header(BytesIO):
    """The bytes of an image, of which only a header is to be read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = _MAX_PARTS
        self._left = _FREE_BYTES + _TIMES_READ * len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        if self._reads <= 0 or self._left <= 0:
            raise LongHeaderError
        part = super().read(size)
        self._reads -= 1
        self._left -= len(part)
        return part
