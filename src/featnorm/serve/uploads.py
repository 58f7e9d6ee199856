"""The images, texts or rows in the body of a request: `read_body` and `read_uploads`."""

import asyncio
import binascii
import json
import re
from concurrent.futures import Executor
from typing import Any, NamedTuple

from starlette.exceptions import HTTPException
from starlette.requests import Request

from featnorm.inputs.kinds import IMAGES, ROWS, TEXTS, Kind
from featnorm.serve.forms import FormError, read_form
from featnorm.serve.headers import DecodingCost, LongHeaderError, decoding_cost
from featnorm.serve.limits import Limits

# Maximum number of JSON values, of which a request has a few per image or text, and as many per row as it has
# columns. A million take seconds to parse.
_BASE_VALUES, _VALUES_PER_ITEM, _VALUES_PER_ROW = 1000, 100, 4096

DESCRIPTION: dict[str, Any] = {
    "required": True,
    "description": "For a scorer of images: one image file, or several images as base64 in JSON or as the files "
    "of a form. For a scorer of texts or rows: `texts` or `rows` in JSON.",
    "content": {
        "image/*": {"schema": {"type": "string", "format": "binary"}},
        "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        "application/json": {
            "schema": {
                "type": "object",
                "properties": {
                    "rows": {
                        "type": "array",
                        "minItems": 1,
                        "items": {"oneOf": [{"type": "array", "items": {}}, {"type": "object"}]},
                    },
                    "texts": {
                        "type": "array",
                        "minItems": 1,
                        "items": {
                            "oneOf": [
                                {"type": "string"},
                                {
                                    "type": "object",
                                    "required": ["text"],
                                    "properties": {"name": {"type": "string"}, "text": {"type": "string"}},
                                },
                            ]
                        },
                    },
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
                    },
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
"""OpenAPI description of the request body."""

_TYPES = ("application/json", "multipart/form-data", "application/octet-stream")  # and images
_SCHEMAS = {
    IMAGES: '{"images": ["BASE64", {"name": "NAME", "data": "BASE64"}, ...]}',
    TEXTS: '{"texts": ["TEXT", {"name": "NAME", "text": "TEXT"}, ...]}',
    ROWS: '{"rows": [[NUMBER, ...], {"COLUMN": VALUE, ...}, ...]}',
}
_STRING = re.compile(rb'"(?:[^"\\]|\\.)*"', re.DOTALL)


class Upload(NamedTuple):
    """One item of a request: its name, and its bytes (of a text in UTF-8) or its row, or why there are none.

    The size is the number of bytes in the request that a row counts as.
    """

    name: str
    data: Any
    error: str | None = None
    cost: DecodingCost = DecodingCost()
    size: int = 0


class Body(NamedTuple):
    """The body of a request, and its content type without and with parameters."""

    media_type: str
    content_type: str
    content: bytes


async def read_body(request: Request, kind: Kind) -> Body:
    """Read the body of a request with items of a kind; `BodyLimit` limits its length.

    Raises
    ------
    HTTPException
        If its type is not supported, or it is compressed.
    ClientDisconnect
        If the client disconnected.
    """
    coding = request.headers.get("content-encoding", "").strip().lower()
    if coding not in ("", "identity"):
        raise HTTPException(
            415,
            f"the content encoding is {coding}: send the body as it is, without compression",
            {"Accept-Encoding": "identity"},
        )
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if kind is not IMAGES and media_type != "application/json":
        given = media_type or "not given"
        raise HTTPException(
            415, f"the content type is {given}, and this scorer takes {kind.name}: send application/json"
        )
    if media_type not in _TYPES and not media_type.startswith("image/"):
        ways = "image/*, application/octet-stream, application/json or multipart/form-data"
        advice = f"send {ways}"
        if media_type.startswith("video/"):
            advice = "this service scores single images; score videos with `featnorm score SCORER VIDEOS`"
        raise HTTPException(415, f"the content type is {media_type or 'not given'}: {advice}")
    return Body(media_type, content_type, await request.body())


async def read_uploads(body: Body, kind: Kind, limits: Limits, parser: Executor) -> list[Upload]:
    """Return the items in a body, one or more. If it is cancelled, work that has not begun is dropped.

    Parameters
    ----------
    body : Body
        Body of the request.
    kind : Kind
        What the items are.
    limits : Limits
        Limits on the items.
    parser : Executor
        Single thread in which bodies are parsed: a body of JSON can take twenty times its length in memory.

    Raises
    ------
    HTTPException
        If the body cannot be read, or contains no item or too many.
    """
    loop = asyncio.get_running_loop()
    uploads = await loop.run_in_executor(parser, _parse, body, kind, limits.inputs)
    if not uploads:
        raise HTTPException(400, f"the request contains no {kind.noun}")
    if kind is not IMAGES:
        return uploads
    # One by one, so that other requests do not wait for all of them.
    return [
        upload if upload.error else await loop.run_in_executor(parser, _with_cost, upload) for upload in uploads
    ]


def _parse(body: Body, kind: Kind, max_items: int) -> list[Upload]:
    if body.media_type == "application/json":
        return _from_json(body.content, kind, max_items)
    if body.media_type == "multipart/form-data":
        return _from_form(body.content, body.content_type, max_items)
    return [Upload("image 1", body.content)]


def _from_json(body: bytes, kind: Kind, max_items: int) -> list[Upload]:
    schema = _SCHEMAS[kind]
    max_values = _BASE_VALUES + (_VALUES_PER_ROW if kind is ROWS else _VALUES_PER_ITEM) * max_items
    bare = body if kind is IMAGES else _STRING.sub(b"", body)  # base64 has none of these
    if sum(map(bare.count, (b",", b":", b"[", b"{"))) > max_values:
        raise HTTPException(400, f"the body contains more than {max_values:,} values: send {schema}")
    try:
        content = json.loads(body)
    except (ValueError, RecursionError):
        raise HTTPException(400, f"the body is not valid JSON: send {schema}") from None
    items = content.get(kind.name) if isinstance(content, dict) else None
    if not isinstance(items, list):
        why = f"this scorer takes {kind.name}, and the body contains no list of {kind.name}: send {schema}"
        raise HTTPException(400, why)
    if len(items) > max_items:
        raise _too_many(kind, max_items)
    size = len(body) // max(1, len(items))
    return [_from_entry(kind, number, entry, size) for number, entry in enumerate(items, start=1)]


def _from_entry(kind: Kind, number: int, entry: Any, size: int) -> Upload:
    if kind is ROWS:
        if not isinstance(entry, (list, dict)):
            raise HTTPException(400, f"row {number} must be a list or an object: send {_SCHEMAS[kind]}")
        return Upload(f"row {number}", entry, size=size)
    key, what = ("data", "a base64 string") if kind is IMAGES else ("text", "a string")
    name, data = (entry.get("name"), entry.get(key)) if isinstance(entry, dict) else (None, entry)
    if not isinstance(data, str) or not isinstance(name, str | None):
        must = f"must be {what} or an object with `name` and `{key}`"
        raise HTTPException(400, f"{kind.noun} {number} {must}: send {_SCHEMAS[kind]}")
    name = _item_name(kind, name, number)
    if kind is not IMAGES:
        return Upload(name, data.encode("utf-8", "surrogatepass"))
    try:
        return Upload(name, decode_base64(data))
    except ValueError as error:
        return Upload(name, b"", str(error))


def decode_base64(text: str) -> bytes:
    """Decode base64 in either alphabet, with or without line breaks and padding, or a ``data:`` URL.

    Raises
    ------
    ValueError
        If the text is neither.
    """
    if _DATA_URL.match(text):
        media_type, _, text = text.partition(",")
        if not media_type.rstrip().lower().endswith(";base64"):
            raise ValueError("the data: URL is not base64-encoded: send data:image/png;base64,...")
    try:
        encoded = text.encode("ascii").translate(_ALPHABET, b" \t\r\n")
        bare = encoded.removesuffix(b"=").removesuffix(b"=")
        if b"=" in bare:
            raise ValueError("the data is not base64")
        return binascii.a2b_base64(bare + b"=" * (-len(bare) % 4), strict_mode=True)
    except (UnicodeEncodeError, binascii.Error):
        raise ValueError("the data is not base64") from None


_DATA_URL = re.compile(r"\s*data:", re.IGNORECASE)
_ALPHABET = bytes.maketrans(b"-_", b"+/")


def _from_form(body: bytes, content_type: str, max_items: int) -> list[Upload]:
    try:
        parts = read_form(body, content_type, max_items)
    except FormError as error:
        raise HTTPException(400, f"the form cannot be read: {error}") from None
    if len(parts) > max_items:
        raise _too_many(IMAGES, max_items)
    for number, part in enumerate(parts, start=1):
        if part.filename is None:
            raise HTTPException(400, f"part {number} of the form, {part.field!r}, is not a file")
    return [
        Upload(_item_name(IMAGES, part.filename, number), part.content)
        for number, part in enumerate(parts, start=1)
    ]


def _with_cost(upload: Upload) -> Upload:
    """Return an image with the cost of decoding it, or why its header is not read."""
    try:
        return upload._replace(cost=decoding_cost(upload.data))
    except LongHeaderError:
        return upload._replace(data=b"", error="the header of the image has too many parts")


def _item_name(kind: Kind, name: str | None, number: int) -> str:
    # JSON can contain lone surrogates, which cannot be encoded.
    return name.encode("utf-8", "replace").decode() if name else f"{kind.noun} {number}"


def _too_many(kind: Kind, maximum: int) -> HTTPException:
    return HTTPException(413, f"the request contains more than {maximum} {kind.name}")
