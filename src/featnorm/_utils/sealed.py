"""JSON with a SHA-256 of its own, so that what is read later is what was written."""

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from featnorm._utils.files import write_text

_KEY = "sha256"
# What follows the content of a sealed line: a last key, whose value is the digest of the line without it.
_SEAL = f', "{_KEY}": "%s"}}'
_LENGTH = len(_SEAL % (64 * "0"))


def seal(entry: Mapping[str, Any]) -> str:
    """Return an object, which must not be empty, as a line of JSON that `unseal` can tell from a damaged one."""
    text = json.dumps(entry)
    return text[:-1] + _SEAL % _digest(text.encode())


def unseal(line: bytes) -> dict[str, Any]:
    """Return what `seal` made a line of.

    Raises
    ------
    ValueError
        The line is damaged, or no sealed one.
    """
    line = line.rstrip(b"\r\n")
    text = line[:-_LENGTH] + b"}"
    if line[-_LENGTH:] != (_SEAL % _digest(text)).encode():
        raise ValueError("its content is not what was written")
    content: dict[str, Any] = json.loads(text)
    return content


def write_sealed(path: Path, content: Mapping[str, Any]) -> None:
    """Write an object as a JSON file that people read too, for `read_sealed`."""
    sealed = {**content, _KEY: _digest(json.dumps(content).encode())}
    write_text(path, json.dumps(sealed, indent=1) + "\n")


def read_sealed(path: Path) -> dict[str, Any]:
    """Return what `write_sealed` wrote.

    Raises
    ------
    ValueError
        The file is damaged, or is of an earlier version, which wrote no digest.
    """
    try:
        content: dict[str, Any] = json.loads(path.read_bytes())
        digest = content.pop(_KEY)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        digest = content = None  # type: ignore[assignment]
    if digest is None or digest != _digest(json.dumps(content).encode()):
        raise ValueError(
            f"{path} is damaged, or of an earlier version: delete it, and rerun the same command to make it again"
        )
    return content


def _digest(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()
