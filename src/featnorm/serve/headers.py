"""The cost of decoding an image, by its header: `decoding_cost`."""

import struct
from io import BytesIO
from typing import NamedTuple

from PIL import Image, JpegImagePlugin, PngImagePlugin

from featnorm.inputs.decoding import count_scans
from featnorm.inputs.formats import FORMATS, HEAD_BYTES, format_of, register_format

# Maximum number of parts of a header: a million take seconds to read. A camera's header takes about a hundred
# reads, and the chunks of a large PNG have kilobytes each.
_MAX_PARTS = 4096
_MIN_BYTES_PER_PART = 64
# Maximum number of times that the bytes of an image are read for its header: WebP and AVIF are read as a whole,
# and the entries of a TIFF can refer to the same bytes many times.
_MAX_TIMES_READ = 3
_FREE_BYTES = 2**16
# Maximum number of bytes that deflate expands a byte to, and the number of bytes that are inflated in the time in
# which a pixel is decoded.
_MAX_INFLATION, _INFLATED_PER_PIXEL = 1032, 20
_PNG_SIGNATURE_BYTES = 8
_COMPRESSED_CHUNKS = (b"zTXt", b"iTXt", b"iCCP")
# Number of pixels of other formats that are decoded in the time in which Pillow decodes a byte in Python.
_PIXELS_PER_BYTE_IN_PYTHON = 20
# Number of scans of a JPEG that take as long as the first, which includes the conversion to pixels.
_SCANS_PER_IMAGE = 10


class DecodingCost(NamedTuple):
    """The cost of decoding an image, as the number of pixels that are decoded in the same time."""

    pixels: int = 0
    """Number of pixels that the header declares; 0 if it cannot be read."""
    decoding: int = 0
    """Cost of decoding the pixels."""
    opening: int = 0
    """Additional cost of opening the image, also if it is rejected for its size."""


class LongHeaderError(Exception):
    """Raised if a header has too many parts to be read."""


def decoding_cost(data: bytes) -> DecodingCost:
    """Return the cost of decoding an encoded image.

    Raises
    ------
    LongHeaderError
        If its header has too many parts.
    """
    head = data[:HEAD_BYTES]
    try:
        match format_of(head):
            # Pillow inflates the texts of a PNG and parses the EXIF data of a JPEG before the size is known.
            case "PNG":
                return _png_cost(data)
            case "JPEG":
                return _jpeg_cost(data)
        other = register_format(head)
        with Image.open(_Header(data), formats=FORMATS if other is None else (other,)) as image:
            return _opened_cost(image, len(data))
    except LongHeaderError:
        raise
    except Exception:  # nearly any; the error is reported when the image is decoded
        return DecodingCost()


def _png_cost(data: bytes) -> DecodingCost:
    pixels = inflated = 0
    at = _PNG_SIGNATURE_BYTES
    for _ in range(_MAX_PARTS + len(data) // _MIN_BYTES_PER_PART):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        if kind == b"IHDR":
            # If there are several, Pillow uses the last one.
            width, height = struct.unpack_from(">II", data, at + 8)
            pixels = max(pixels, width * height)
        elif kind in _COMPRESSED_CHUNKS:
            inflated += min(_MAX_INFLATION * length, PngImagePlugin.MAX_TEXT_CHUNK)
        elif kind == b"IEND":
            break
        at += 12 + length
    else:
        raise LongHeaderError
    return DecodingCost(pixels, pixels, inflated // _INFLATED_PER_PIXEL)


def _jpeg_cost(data: bytes) -> DecodingCost:
    pixels, at = 0, 2
    for _ in range(_MAX_PARTS):
        at = data.find(b"\xff", at)
        (kind,) = struct.unpack_from(">H", data, at)
        if kind == 0xFFDA:
            return DecodingCost(pixels, _with_scans(pixels, data.count(b"\xff\xda", at)))
        if kind == 0xFFFF:  # padding
            at += 1
            continue
        # Pillow's own table, so that the size is found wherever Pillow finds it.
        _, _, handler = JpegImagePlugin.MARKER.get(kind, ("", "", None))
        at += 2
        if handler is JpegImagePlugin.SOF:
            height, width = struct.unpack_from(">HH", data, at + 3)
            pixels = max(pixels, width * height)
        if handler is not None:
            at += max(2, *struct.unpack_from(">H", data, at))
    raise LongHeaderError


def _opened_cost(image: Image.Image, size: int) -> DecodingCost:
    pixels = image.width * image.height
    if any(tile[0] in Image.DECODERS for tile in getattr(image, "tile", ())):
        return DecodingCost(pixels, max(pixels, _PIXELS_PER_BYTE_IN_PYTHON * size))
    scans, parts = count_scans(image)
    return DecodingCost(pixels, _with_scans(pixels, scans // parts))


def _with_scans(pixels: int, scans: int) -> int:
    return pixels * (_SCANS_PER_IMAGE - 1 + max(1, scans)) // _SCANS_PER_IMAGE


class _Header(BytesIO):
    """The bytes of an image, of which only the header may be read."""

    def __init__(self, data: bytes) -> None:
        super().__init__(data)
        self._reads = _MAX_PARTS
        self._left = _FREE_BYTES + _MAX_TIMES_READ * len(data)

    def read(self, size: int | None = -1, /) -> bytes:
        if self._reads <= 0 or self._left <= 0:
            raise LongHeaderError
        part = super().read(size)
        self._reads -= 1
        self._left -= len(part)
        return part
