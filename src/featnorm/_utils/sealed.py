"""JSON with its own SHA-256, so that damage is detected on reading."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featnorm._utils.files import write_text

_KEY = "sha256"
# The end of a sealed line: a last key, whose value is the digest of the rest of the line.
_SEAL = f', "{_KEY}": "%s"}}'
_LENGTH = len(_SEAL % (64 * "0"))


def seal(entry: Mapping[str, Any]) -> str:
    """Return a non-empty object as a line of JSON with a digest, for `unseal`."""
    text = json.dumps(entry)
    return text[:-1] + _SEAL % _digest(text.encode())


def unseal(line: bytes) -> dict[str, Any]:
    """Return the object of a line that `seal` wrote.

    Raises
    ------
    ValueError
        If the line is damaged, or has no digest.
    """
    line = line.rstrip(b"\r\n")
    text = line[:-_LENGTH] + b"}"
    if line[-_LENGTH:] != (_SEAL % _digest(text)).encode():
        raise ValueError("the content does not match its digest")
    content: dict[str, Any] = json.loads(text)
    return content


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as an indented JSON file with a digest, for `read_sealed`."""
    sealed = {**content, _KEY: _digest(json.dumps(content).encode())}
    write_text(path, json.dumps(sealed, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Return the object in a file that `write_sealed` wrote.

    Raises
    ------
    ValueError
        If the file is damaged, or is of an earlier version, which wrote no digest.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        digest = content.pop(_KEY)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        digest = content = None  # type: ignore[assignment]
    if digest is None or digest != _digest(json.dumps(content).encode()):
        raise ValueError(
            f"{path} is damaged, or of an earlier version: delete it, and rerun the same command to recreate it"
        )
    return content


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
