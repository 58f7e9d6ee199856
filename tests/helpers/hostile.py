"""Files that are no images, and claim to be."""

import os
import struct
import zlib
from collections.abc import Iterator

NAMES = ["plain", "\u96ea", "\u202egnp", "a b", "[red]x", "\u00e9", "'quote\"", "-o"]
SVG = b'<svg xmlns="http://www.w3.org/2000/svg"><script>alert(1)</script></svg>'


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def huge_png() -> bytes:
    """Claim 50,000 x 50,000 pixels in a few hundred bytes."""
    header = struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(b"\0" * 150_001))
        + chunk(b"IEND", b"")
    )


def hostile_files(n: int, whole: bytes) -> Iterator[tuple[str, bytes]]:
    """Yield names and contents of n files; some are the beginning of a whole PNG."""
    kinds = [
        lambda i: ("png", whole[: len(whole) * (i % 9) // 10]),
        lambda i: ("jpg", b"\xff\xd8\xff\xe0" + os.urandom(50)),
        lambda i: ("png", b""),
        lambda i: ("png", huge_png()),
        lambda i: ("png", b"PK\x03\x04" + zlib.compress(b"\0" * 10**6)),
        lambda i: ("svg", SVG),
        lambda i: ("txt", b"notes"),
        lambda i: ("gif", b"GIF89a" + os.urandom(20)),
        lambda i: ("tif", b"II*\0" + os.urandom(40)),
        lambda i: ("webp", b"RIFF\xff\xff\xff\xffWEBPVP8 " + os.urandom(30)),
    ]
    for i in range(n):
        ending, data = kinds[i % len(kinds)](i)
        yield f"{NAMES[i % len(NAMES)]}{i}.{ending}", data
