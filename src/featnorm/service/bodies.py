"""From the body of a request to the images in it."""

import asyncio
import base64
import binascii
import json
from collections.abc import AsyncGenerator
from concurrent.futures import Executor
from typing import Any, NamedTuple

from starlette.datastructures import Headers, UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from featnorm.service.limits import Limits

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

_SHAPE = '{"images": ["BASE64", {"name": "NAME", "data": "BASE64"}, ...]}'


class Upload(NamedTuple):
    """One image of a request: its name and its bytes, or why there are none."""

    name: str
    data: bytes
    error: str | None = None


async def read_uploads(request: Request, limits: Limits, parser: Executor) -> list[Upload]:
    """Read the images of a request, one or more.

    Parameters
    ----------
    request : whose body is bounded by `BodyBound`.
    limits : the bounds.
    parser : where JSON is read. One thread: in memory a body of JSON can be twenty times as long.

    Raises
    ------
    HTTPException
        The body is of no kind that is known, cannot be read, or holds no image or too many.
    ClientDisconnect
        The client went away.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind == "application/json":
        body = await request.body()
        uploads = await asyncio.get_running_loop().run_in_executor(parser, _from_json, body, limits.images)
    elif kind == "multipart/form-data":
        uploads = await _from_form(request, limits)
    elif kind.startswith("image/") or kind == "application/octet-stream":
        uploads = [Upload("image 1", await request.body())]
    else:
        raise HTTPException(
            415,
            f"the content type is {kind or 'not given'}: send image/*, application/octet-stream, application/json "
            "or multipart/form-data",
        )
    if not uploads:
        raise HTTPException(400, "the request holds no image")
    return uploads


def _from_json(body: bytes, most: int) -> list[Upload]:
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
        raise HTTPException(400, f"image {number} is neither a text nor a name and a text: send {_SHAPE}")
    name = _named(name, number)
    try:
        return Upload(name, base64.b64decode(data, validate=True))
    except (binascii.Error, ValueError):
        return Upload(name, b"", "its data is not base64")


async def _from_form(request: Request, limits: Limits) -> list[Upload]:
    parser = _Form(request.headers, request.stream(), limits)
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise HTTPException(400, f"the form cannot be read: {error.message}") from None
    uploads = []
    try:
        for number, (field, part) in enumerate(form.multi_items(), start=1):
            if not isinstance(part, UploadFile):
                raise HTTPException(400, f"part {number} of the form, {_text(field)!r}, is no file")
            uploads.append(Upload(_named(part.filename, number), await part.read()))
    finally:
        await form.close()
    return uploads


class _Form(MultiPartParser):
    """A form of no more parts than images are allowed, kept in memory, which `BodyBound` has bounded already."""

    def __init__(self, headers: Headers, stream: AsyncGenerator[bytes, None], limits: Limits) -> None:
        super().__init__(headers, stream)
        self.spool_max_size = limits.body_bytes
        self._most = limits.images
        self._parts = 0

    def on_part_begin(self) -> None:
        self._parts += 1
        if self._parts > self._most:
            raise _too_many(self._most)
        super().on_part_begin()


def _named(name: str | None, number: int) -> str:
    return _text(name) if name else f"image {number}"


def _text(name: str) -> str:
    # JSON can name halves of characters, which no encoding has.
    return name.encode("utf-8", "replace").decode()


def _too_many(most: int) -> HTTPException:
    return HTTPException(413, f"the request holds more than {most} images")
