"""JSON files and lines with a digest, which detects damage."""

import json
import math

import pytest

from featnorm._utils.sealed import read_sealed, seal, unseal, write_sealed

ENTRY = {
    "epoch": 3,
    "loss": 0.1,
    "accuracy": None,
    "names": ["a", "\udcff", 'q"}'],
    "lr": 1e-300,
    "more": {"b": True},
}


def flips(content: bytes):
    """Yield the content with one bit of each byte flipped in turn."""
    for place in range(len(content)):
        yield content[:place] + bytes([content[place] ^ 1 << place % 8]) + content[place + 1 :]


def parsed(content: bytes):
    try:
        return json.loads(content)
    except ValueError:
        return None


def test_a_line_is_json_and_comes_back():
    line = seal(ENTRY)
    assert "\n" not in line
    assert {**ENTRY, "sha256": json.loads(line)["sha256"]} == json.loads(line)
    for end in (b"", b"\n", b"\r\n"):
        assert unseal(line.encode() + end) == ENTRY
    assert math.isnan(unseal(seal({"loss": math.nan}).encode())["loss"])


def test_a_damaged_line_is_detected():
    line = seal(ENTRY).encode()
    for damaged in (*flips(line), *(line[:n] for n in range(len(line))), b"null", json.dumps(ENTRY).encode()):
        with pytest.raises(ValueError, match="the content does not match its digest"):
            unseal(damaged)


def test_a_file_is_json_and_comes_back(tmp_path):
    write_sealed(tmp_path / "r.json", ENTRY)
    assert read_sealed(tmp_path / "r.json") == ENTRY
    shown = json.loads((tmp_path / "r.json").read_text())
    assert list(shown) == [*ENTRY, "sha256"]


def test_a_damaged_file_is_detected(tmp_path):
    file = tmp_path / "r.json"
    write_sealed(file, ENTRY)
    good = file.read_bytes()
    detected = 0
    for damaged in flips(good):
        file.write_bytes(damaged)
        # Some flips do not change the values: white space between them, or the "e" of a power of ten.
        if parsed(damaged) == parsed(good):
            assert read_sealed(file) == ENTRY
            continue
        with pytest.raises(
            ValueError, match=r"r\.json is damaged, or of an earlier version: delete it, and rerun"
        ):
            read_sealed(file)
        detected += 1
    assert detected > len(good) / 2
    for damaged in (b"", b"null", b"[]", b"5", good[:-9], 100_000 * b"[", json.dumps(ENTRY).encode(), b"\xff"):
        file.write_bytes(damaged)
        with pytest.raises(ValueError, match=r"r\.json is damaged"):
            read_sealed(file)
