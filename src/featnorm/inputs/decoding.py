"""How the bytes of an image file become RGB pixels, as they are meant to be seen."""

import hashlib
from collections.abc import Callable
from contextlib import suppress
from io import BytesIO
from typing import Any

import numpy as np
from PIL import ExifTags, Image, TiffImagePlugin, UnidentifiedImageError

from featnorm._utils.errors import first_line
from featnorm.inputs.errors import ItemError
from featnorm.inputs.formats import FORMATS, HEAD_BYTES, reason_not_read, register_format

#: Version of the rule by which a file becomes RGB pixels. Whatever is kept of decoded images depends on it.
DECODING = 2
#: Number of pixels from which Pillow rejects an image as a decompression bomb: twice that at which it warns.
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)

_MAX_ASPECT = 100  # long side / short side
# Passes of a JPEG over its pixels. Encoders make some ten; each costs as much as the image, however few its bytes.
_MAX_SCANS = 100
_START_OF_SCAN = b"\xff\xda"
_CHUNK = 2**20
# The transformation of the stored pixels for each EXIF orientation.
_TRANSPOSE = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
# The same for each counterclockwise rotation of the frames of a video, in degrees.
_ROTATE = {
    90: Image.Transpose.ROTATE_90,
    -90: Image.Transpose.ROTATE_270,
    180: Image.Transpose.ROTATE_180,
    -180: Image.Transpose.ROTATE_180,
}
# Bits of TIFF's NewSubfileType: a smaller copy of another page, and a mask of one.
_NEW_SUBFILE_TYPE, _SMALLER, _MASK = 254, 1, 4
# TIFF's PhotometricInterpretation of a sensor's values, and the tag that every DNG has.
_PHOTOMETRIC, _SENSOR, _DNG_VERSION = 262, 32803, 50706
_FIRST_OF_SEVERAL = "first of several"


def decode(data: bytes, name: str, *, max_pixels: int | None = None) -> Image.Image:
    """Decode an image file into RGB, as it is meant to be seen.

    Any of the `FORMATS` is read, whatever the file is called. An EXIF orientation is applied, transparent pixels
    are laid on white, sixteen bits per channel are scaled to eight, and of several frames or pages the first is
    returned (`is_first_of_several`). Color profiles are not applied.

    Parameters
    ----------
    data : bytes
        The encoded image.
    name : str
        Name of the image in errors.
    max_pixels : int, optional
        Number of pixels above which an image is rejected before it is decoded. Default: `MAX_PIXELS`, which is
        also the highest.

    Raises
    ------
    ItemError
        If the image cannot be decoded.
    """
    return to_rgb(lambda: _open(data), name, max_pixels)


def decode_with_digest(data: bytes, name: str) -> tuple[Image.Image, bytes]:
    """Decode an image file as `decode` does, and return the SHA-256 of its bytes too.

    Raises
    ------
    ItemError
        If the image cannot be decoded; the error holds the digest.
    """
    digest = hashlib.sha256(data).digest()
    try:
        return decode(data, name), digest
    except ItemError as error:
        error.digest = digest
        raise


def upright(frame: Any, name: str) -> Image.Image:
    """Return a decoded frame, an `av.VideoFrame`, as an image in RGB, as it is meant to be seen.

    Raises
    ------
    ItemError
        If its pixels cannot be converted, or it is too narrow for a model.
    """

    def convert() -> Image.Image:
        image: Image.Image = frame.to_image()
        transpose = _ROTATE.get(frame.rotation)
        return image if transpose is None else image.transpose(transpose)

    return to_rgb(convert, name)


def is_first_of_several(image: Image.Image) -> bool:
    """Whether a decoded image is the first of several frames or pages of its file."""
    return _FIRST_OF_SEVERAL in image.info


def reason_of(error: Exception) -> str:
    """Return why a file cannot be read or decoded, in one line."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return first_line(error)


def _open(data: bytes) -> Image.Image:
    try:
        return Image.open(BytesIO(data), formats=FORMATS)
    except UnidentifiedImageError:
        head = data[:HEAD_BYTES]
        if format_ := register_format(head):
            with suppress(UnidentifiedImageError):
                return Image.open(BytesIO(data), formats=(format_,))
        raise ValueError(reason_not_read(head)) from None


def to_rgb(open_image: Callable[[], Image.Image], name: str, max_pixels: int | None = None) -> Image.Image:
    """Open an image and decode its pixels into RGB.

    Parameters
    ----------
    open_image : callable
        Opens the image.
    name, max_pixels : str, int
        See `decode`.

    Raises
    ------
    ItemError
        If the image cannot be opened or decoded.
    """
    try:
        with open_image() as image:
            if max_pixels is not None and image.width * image.height > max_pixels:
                raise ValueError(f"{image.width} x {image.height} pixels are more than {max_pixels:,}")
            long, short = max(image.size), min(image.size)
            if long > _MAX_ASPECT * short:
                # Resized to a model's height it would take gigabytes, which Pillow's own guard does not foresee.
                raise ValueError(f"{image.width} x {image.height} pixels are too narrow for a model's input")
            _check_scans(image)
            _check_raw(image)
            key = _color_key(image)
            image.load()
            # The other metadata of the file does not describe these pixels any more.
            rgb = _blend_to_rgb(image, key)
            profile = image.info.get("icc_profile")
            rgb.info = {} if profile is None else {"icc_profile": profile}
            if (transpose := _TRANSPOSE.get(_orientation(image))) is not None:
                rgb = rgb.transpose(transpose)
            if _has_several(image):
                rgb.info[_FIRST_OF_SEVERAL] = True
            return rgb
    # A broken file makes Pillow raise nearly anything: OSError, SyntaxError, struct.error, and more.
    except Exception as error:
        raise ItemError(name, reason_of(error)) from error


def _check_scans(image: Any) -> None:
    """Check that an image is not a JPEG of few pixels and so many scans that decoding takes hours.

    Raises
    ------
    ValueError
        If it is one.
    """
    scans, parts = count_scans(image)
    if scans > parts * _MAX_SCANS:
        raise ValueError(f"a JPEG of {scans:,} scans, more than {parts * _MAX_SCANS:,}: save it again")


def count_scans(image: Any) -> tuple[int, int]:
    """Return the number of scans of the JPEGs in an open image, and of the JPEGs; (0, 1) if there are none."""
    parts = 1
    if image.format == "TIFF" and image.info.get("compression") == "jpeg":
        # Each strip or tile is a JPEG.
        offsets = image.tag_v2.get(TiffImagePlugin.STRIPOFFSETS) or image.tag_v2.get(TiffImagePlugin.TILEOFFSETS)
        parts = max(1, len(offsets or ()))
    elif image.format not in ("JPEG", "MPO"):
        return 0, 1
    file, scans, last = image.fp, 0, b""
    if file is None:  # decoded already by the caller
        return 0, parts
    at = file.tell()
    file.seek(0)
    while chunk := file.read(_CHUNK):
        # Outside its markers a JPEG follows each byte of ones by one of zeros, so that none is found by chance.
        scans += (last + chunk).count(_START_OF_SCAN)
        last = chunk[-1:]
    file.seek(at)
    return scans, parts


def _check_raw(image: Any) -> None:
    """Check that an image is not a camera's raw file: a TIFF whose first image is a thumbnail or sensor values.

    Raises
    ------
    ValueError
        If it is one.
    """
    if image.format != "TIFF":
        return
    tags = image.tag_v2
    kind = tags.get(_NEW_SUBFILE_TYPE)
    smaller = isinstance(kind, int) and kind & _SMALLER
    if smaller or _DNG_VERSION in tags or tags.get(_PHOTOMETRIC) == _SENSOR:
        raise ValueError("a camera's raw file, or a TIFF that begins with a thumbnail: convert it to JPEG or PNG")


def _orientation(image: Image.Image) -> int:
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # broken metadata: the image is not turned, but read
        return 1


def _has_several(image: Any) -> bool:
    # The other images of a camera's MPO are previews and maps of the same photograph.
    if image.format == "MPO":
        return False
    try:
        if image.format != "TIFF":
            return bool(getattr(image, "is_animated", False))
        if not image.is_animated:
            return False
        image.seek(1)
        return not image.tag_v2.get(_NEW_SUBFILE_TYPE, 0) & (_SMALLER | _MASK)
    except Exception:  # what follows the first frame is broken, but not needed
        return False


def _color_key(image: Any) -> Any:
    """Return the color that marks transparent pixels in an image without alpha, as in its decoded pixels."""
    if image.mode not in ("1", "L", "RGB", "I;16", "I"):
        return None
    key = image.info.pop("transparency", None)
    tiles = getattr(image, "tile", None)
    if key is None or not tiles:
        return key
    # Pillow scales the pixels to eight bits, and leaves the key in the depth of the file.
    raw = tiles[0][3]
    if raw in ("L;2", "L;4"):
        return key * (85 if raw == "L;2" else 17)
    if raw == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


def _blend_to_rgb(image: Image.Image, key: Any) -> Image.Image:
    """Return an image in RGB, on white where it is transparent or has the color `key`."""
    opaque = None
    if key is not None:
        pixels = np.asarray(image.convert("L") if image.mode == "1" else image)
        differs = pixels != np.asarray(key)
        opaque = Image.fromarray(np.uint8(255) * (differs if differs.ndim == 2 else differs.any(2)))
    # Pillow clips values above 255 instead of scaling them: a 16-bit image would become white.
    if image.mode.startswith("I"):
        values = np.asarray(image)
        if values.min() < 0 or values.max() > 65535:
            raise ValueError("32-bit integer pixels outside the range of 16 bits: save it with 8 or 16 bits")
        image = Image.fromarray(((values.astype(np.uint32) * 255 + 32767) // 65535).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("floating-point pixels have no agreed range: save it with 8 or 16 bits")
    elif image.has_transparency_data:
        image = image.convert("RGBA")
        opaque = image.getchannel("A")
    rgb = image.convert("RGB")
    if opaque is None or opaque.getextrema() == (255, 255):
        return rgb
    white = Image.new("RGB", rgb.size, "white")
    white.paste(rgb, mask=opaque)
    return white
