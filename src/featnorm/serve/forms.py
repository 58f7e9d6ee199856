"""Parsing of ``multipart/form-data`` that is in memory as a whole: `read_form`."""

import re
from typing import NamedTuple
from urllib.parse import unquote_to_bytes

# Maximum number of bytes of the headers of a part.
_MAX_HEAD = 4096
# Maximum number of characters of the header with the boundary, which itself has at most 70.
_MAX_CONTENT_TYPE = 512
_PARAMETER = re.compile(r';[ \t]*([^\s=;"]+)[ \t]*=[ \t]*(?:"((?:[^"\\]|\\.)*)"|([^;\s"]*))')
_ESCAPED = re.compile(r'\\(["\\])')
_FOLD = re.compile(r"\r\n[ \t]+")
# The only ones in RFC 5987.
_CHARSETS = {"utf-8", "iso-8859-1"}


class Part(NamedTuple):
    """One part of a form: the name of its field ("" for none), of its file (None for none), and its content."""

    field: str
    filename: str | None
    content: bytes


class FormError(ValueError):
    """A form that cannot be read."""


def read_form(body: bytes, content_type: str, max_parts: int) -> list[Part]:
    """Return the parts of a form; of a form with more than `max_parts`, the first ``max_parts + 1``.

    Parameters
    ----------
    body : bytes
        The form.
    content_type : str
        The header of the request, which contains the boundary.
    max_parts : int
        Maximum number of parts.

    Raises
    ------
    FormError
        If the form is malformed or ends early.
    """
    if len(content_type) > _MAX_CONTENT_TYPE:
        raise FormError(f"the content type is longer than {_MAX_CONTENT_TYPE} characters")
    boundary = parameters(content_type).get("boundary", "").encode("latin-1", "replace")
    if not boundary:
        raise FormError("the content type has no boundary")
    if not body:
        return []
    mark = b"\r\n--" + boundary
    body = b"\r\n" + body
    parts: list[Part] = []
    begin = None
    at = body.find(mark)
    while at >= 0:
        if begin is not None:
            parts.append(_part(body[begin:at], len(parts) + 1))
            if len(parts) > max_parts:
                return parts
        after = at + len(mark)
        if body.startswith(b"--", after):
            return parts
        begin = body.find(b"\r\n", after) + 2
        if begin == 1 or body[after : begin - 2].strip(b" \t"):
            raise FormError("the boundary is followed by other text on the same line")
        # The line break after the boundary may be that before the next one, if a part is empty.
        at = body.find(mark, begin - 2)
    raise FormError(
        "it ends before its last boundary" if begin is not None else "it does not contain its boundary"
    )


def parameters(header: str) -> dict[str, str]:
    """Return the parameters of a header. A parameter ``name*`` (RFC 5987) is decoded and returned as ``name``."""
    plain: dict[str, str] = {}
    extended: dict[str, str] = {}
    for name, quoted, token in _PARAMETER.findall(header):
        name = name.lower()
        value = _ESCAPED.sub(r"\1", quoted) or token
        if name.endswith("*"):
            charset, _, rest = value.partition("'")
            _, tick, encoded = rest.partition("'")
            if tick and charset.lower() in _CHARSETS:
                extended[name[:-1]] = unquote_to_bytes(encoded).decode(charset, "replace")
        else:
            plain.setdefault(name, value)
    return plain | extended


def _part(raw: bytes, number: int) -> Part:
    # A part without headers begins with the empty line that ends them.
    head, end, content = (b"", b"\r\n", raw[2:]) if raw.startswith(b"\r\n") else raw.partition(b"\r\n\r\n")
    if not end:
        raise FormError(f"the headers of part {number} do not end")
    if len(head) > _MAX_HEAD:
        raise FormError(f"the headers of part {number} are longer than {_MAX_HEAD} bytes")
    for line in _FOLD.sub(" ", head.decode("utf-8", "replace")).split("\r\n"):
        name, _, value = line.partition(":")
        if name.strip().lower() == "content-disposition":
            given = parameters(value)
            return Part(given.get("name", ""), given.get("filename"), content)
    return Part("", None, content)
