"""From the body of a request to the images in it."""

import asyncio
import binascii
import json
import re
from concurrent.futures import Executor
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request

from featnorm.serve.forms import FormError, read_form
from featnorm.serve.headers import LongHeaderError, Measure, measure
from featnorm.serve.limits import Limits

# JSON of a million values would keep a thread busy for seconds. A request has a few values per image.
_FREE_VALUES, _VALUES_PER_IMAGE = 1000, 100

DESCRIPTION: dict[str, Any] = {
    "required": True,
    "description": "One image as it is; or several as base64 in JSON, or as the files of a form.",
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "required": ["images"],
                "properties": {
                    "images": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "oneOf": [
                                {"type": "string", "format": "byte"},
                                {
                                    "type": "object",
                                    "required": ["data"],
                                    "properties": {
                                        "name": {"type": "string"},
                                        "data": {"type": "string", "format": "byte"},
                                    },
                                },
                            ]
                        },
                    }
                },
            }
        },
        "multipart/form-data": {
            "schema": {
                "type": "object",
                "properties": {
                    "images": {"type": "array", "items": {"type": "string", "format": "binary"}},
                },
            }
        },
    },
}
"""The body of a request, as OpenAPI describes it."""

_KINDS = ("application/json", "multipart/form-data", "application/octet-stream")  # and images
_SHAPE = '{"images": ["BASE64", {"name": "NAME", "data": "BASE64"}, ...]}'


class Upload(NamedTuple):
    """One image of a request: its name and its bytes, or why there are none."""

    name: str
    data: bytes
    error: str | None = None
    measure: Measure = Measure()


class Body(NamedTuple):
    """The body of a request, and its content type with and without parameters."""

    kind: str
    header: str
    content: bytes


async def read_body(request: Request) -> Body:
    """Read the body of a request, which is bounded by `BodyBound`.

    Raises
    ------
    HTTPException
        It is of no kind that is known.
    ClientDisconnect
        The client went away.
    """
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise HTTPException(
            415,
            f"the content encoding is {coding}: send the body as it is, without compression",
            {"Accept-Encoding": "identity"},
        )
    header = request.headers.get("content-type", "")
    kind = header.partition(";")[0].strip().lower()
    if kind not in _KINDS and not kind.startswith("image/"):
        raise HTTPException(
            415,
            f"the content type is {kind or 'not given'}: send image/*, application/octet-stream, application/json "
            "or multipart/form-data",
        )
    return Body(kind, header, await request.body())


async def read_uploads(body: Body, limits: Limits, parser: Executor) -> list[Upload]:
    """Return the images in a body, one or more. When it is cancelled, what has not begun is dropped.

    Parameters
    ----------
    body : of a request.
    limits : the bounds.
    parser : where bodies are parsed. One thread: in memory a body of JSON can be twenty times as long.

    Raises
    ------
    HTTPException
        The body cannot be read, or holds no image or too many.
    """
    loop = asyncio.get_running_loop()
    uploads = await loop.run_in_executor(parser, _parse, body, limits.images)
    if not uploads:
        raise HTTPException(400, "the request holds no image")
    # One by one, so that other requests need not wait for all of them.
    return [upload if upload.error else await loop.run_in_executor(parser, _sized, upload) for upload in uploads]


def _parse(body: Body, most: int) -> list[Upload]:
    if body.kind == "application/json":
        return _from_json(body.content, most)
    if body.kind == "multipart/form-data":
        return _from_form(body.content, body.header, most)
    return [Upload("image 1", body.content)]


def _from_json(body: bytes, most: int) -> list[Upload]:
    values = _FREE_VALUES + _VALUES_PER_IMAGE * most
    if sum(map(body.count, (b",", b":", b"[", b"{"))) > values:
        raise HTTPException(400, f"the body holds more than {values:,} values: send {_SHAPE}")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, f"the body is not JSON that can be read: send {_SHAPE}") from None
    images = content.get("images") if isinstance(content, dict) else None
    if not isinstance(images, list):
        raise HTTPException(400, f"the body holds no list of images: send {_SHAPE}")
    if len(images) > most:
        raise _too_many(most)
    return [_from_entry(number, entry) for number, entry in enumerate(images, start=1)]


def _from_entry(number: int, entry: Any) -> Upload:
    name, data = (entry.get("name"), entry.get("data")) if isinstance(entry, dict) else (None, entry)
    if not isinstance(data, str) or not isinstance(name, str | None):
        raise HTTPException(
            400, f"image {number} must be a base64 string or an object with `name` and `data`: send {_SHAPE}"
        )
    name = _named(name, number)
    try:
        return Upload(name, decode_base64(data))
    except ValueError as error:
        return Upload(name, b"", str(error))


def decode_base64(text: str) -> bytes:
    """Decode base64 of either alphabet, with or without line breaks and padding, or a ``data:`` URL of it.

    Raises
    ------
    ValueError
        It is neither.
    """
    if _DATA_URL.match(text):
        media_type, _, text = text.partition(",")
        if not media_type.rstrip().lower().endswith(";base64"):
            raise ValueError("its data: URL is not base64-encoded: send data:image/png;base64,...")
    try:
        encoded = text.encode("ascii").translate(_ALPHABET, b" \t\r\n")
        bare = encoded.removesuffix(b"=").removesuffix(b"=")
        if b"=" in bare:
            raise ValueError("its data is not base64")
        return binascii.a2b_base64(bare + b"=" * (-len(bare) % 4), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("its data is not base64") from None


_DATA_URL = re.compile(r"\s*data:", re.IGNORECASE)
_ALPHABET = bytes.maketrans(b"-_", b"+/")


def _from_form(body: bytes, header: str, most: int) -> list[Upload]:
    try:
        parts = read_form(body, header, most)
    except FormError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    if len(parts) > most:
        raise _too_many(most)
    for number, part in enumerate(parts, start=1):
        if part.filename is None:
            raise HTTPException(400, f"part {number} of the form, {part.field!r}, is no file")
    return [Upload(_named(part.filename, number), part.content) for number, part in enumerate(parts, start=1)]


def _sized(upload: Upload) -> Upload:
    """Return an image with what it takes to decode, or why its header is not read."""
    try:
        return upload._replace(measure=measure(upload.data))
    except LongHeaderError:
        return upload._replace(data=b"", error="its header has too many parts")


def _named(name: str | None, number: int) -> str:
    # JSON can name halves of characters, which no encoding has.
    return name.encode("utf-8", "replace").decode() if name else f"image {number}"


def _too_many(most: int) -> HTTPException:
    return HTTPException(413, f"the request holds more than {most} images")
