"""Attack `featnorm serve` on the loopback interface, and measure what other clients see meanwhile.

    python tools/attack_service.py DETECTOR [--source NAME=FOLDER ...] [--seconds 4] [--page PAGE]

For each attack, it starts the service on a free port and then the attack, repeatedly requests `/healthz` and the
verdict on a small image, and stops the service while the attack continues. Each attack runs in its own process.
`--source before=OTHER/src --source after=src` compares two checkouts, which takes about two minutes each. The
table is written to PAGE, between `<!-- attacks -->` and `<!-- end -->`.
"""

import argparse
import io
import json
import multiprocessing
import os
import platform
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import zlib
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

from PIL import Image
from service_process import HOST, PATIENCE, ask, running_service

# Targets: median latency of /healthz in milliseconds, verdict in seconds, exit in seconds.
HEALTHZ, VERDICT, END = 100, 30, 10
HALF, UNREAD, BOMBS = 200, 50, 60
SIDE = 7000


def main() -> None:
    """Run the attacks."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("detector", type=Path)
    parser.add_argument(
        "--source", action="append", metavar="NAME=FOLDER", help="src of a checkout. Default: this"
    )
    parser.add_argument("--seconds", type=float, default=4.0, help="duration of the requests per attack")
    parser.add_argument("--page", type=Path)
    options = parser.parse_args()
    here = Path(__file__).resolve().parent.parent / "src"
    sources = dict(entry.split("=", 1) for entry in options.source or [f"now={here}"])
    rows = {
        attack: {
            name: attacked(folder, options.detector, attack, options.seconds) for name, folder in sources.items()
        }
        for attack in ATTACKS
    }
    text = table(rows, [*sources])
    print(text)
    if options.page is not None:
        page = options.page.read_text(encoding="utf-8")
        begin, end = "<!-- attacks -->\n", "<!-- end -->"
        head, _, rest = page.partition(begin)
        options.page.write_text(f"{head}{begin}\n{text}\n\n{end}{rest.partition(end)[2]}", encoding="utf-8")


def attacked(source: str, detector: Path, attack: str, seconds: float) -> dict[str, Any]:
    """Return what other clients see while a service is attacked."""
    stop = multiprocessing.Event()
    with running_service(detector, source) as (service, port):
        attackers = multiprocessing.Process(target=ATTACKS[attack], args=(port, stop), daemon=True)
        attackers.start()
        try:
            time.sleep(2.5)
            alive = asked(port, "/healthz", None, seconds)
            verdict = asked(port, "/v1/score", small(), seconds)
            found: dict[str, Any] = {"healthz": alive(), "verdict": verdict()}
            began = time.perf_counter()
            service.send_signal(signal.SIGTERM)
            try:
                service.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                service.kill()
            found["end"] = time.perf_counter() - began
        finally:
            stop.set()
            service.kill()
            attackers.join(5)
            attackers.kill()
    print(attack, source, json.dumps(found), file=sys.stderr, flush=True)
    return found


def asked(port: int, path: str, body: bytes | None, seconds: float) -> Callable[[], dict[str, Any]]:
    """Send requests in a thread, and return a function that waits for it and returns the results."""
    seen: list[tuple[float, str]] = []

    def run() -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            seen.append(ask(port, path, body))
            time.sleep(0.05)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()

    def result() -> dict[str, Any]:
        thread.join()
        times = [took for took, _ in seen]
        errors = Counter(said for _, said in seen if said != "200")
        return {"median": median(times), "worst": max(times), "asked": len(seen), "errors": dict(errors)}

    return result


def small() -> bytes:
    """Return a small JPEG."""
    file = io.BytesIO()
    Image.effect_noise((256, 256), 60).convert("RGB").save(file, "JPEG")
    return file.getvalue()


def bomb() -> bytes:
    """Return a PNG of 49 megapixels in 150 KB."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", SIDE, SIDE, 8, 2, 0, 0, 0)
    pixels = zlib.compress(bytes((3 * SIDE + 1) * SIDE), 9)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")


def head(port: int, request: str, *headers: str) -> bytes:
    """Return the head of a request."""
    return "\r\n".join([f"{request} HTTP/1.1", f"Host: {HOST}:{port}", *headers, "", ""]).encode()


def many(number: int, client: Callable[[], None], stop: Any) -> None:
    """Run clients in threads until stopped; a client that loses its connection reconnects."""

    def run() -> None:
        while not stop.is_set():
            try:
                client()
            except OSError:
                time.sleep(0.05)

    threads = [threading.Thread(target=run, daemon=True) for _ in range(number)]
    for thread in threads:
        thread.start()
    stop.wait(300)


def no_attack(port: int, stop: Any) -> None:
    """Do nothing."""


def bytewise(port: int, stop: Any) -> None:
    """Send a body in chunks of one byte, on one connection."""
    chunks = b"1\r\nx\r\n" * 10_000

    def client() -> None:
        with socket.create_connection((HOST, port), timeout=PATIENCE) as connection:
            connection.sendall(
                head(port, "POST /v1/score", "Content-Type: image/png", "Transfer-Encoding: chunked")
            )
            while not stop.is_set():
                connection.sendall(chunks)

    many(1, client, stop)


def half(port: int, stop: Any) -> None:
    """Send half a request, an unfinished head or body, and keep the connection open."""
    number = count()
    whole = head(port, "POST /v1/score", "Content-Type: image/png", "Content-Length: 100000")

    def client() -> None:
        with socket.create_connection((HOST, port), timeout=PATIENCE) as connection:
            connection.sendall(whole[:-2] if next(number) % 2 else whole + b"x" * 50_000)
            while connection.recv(2**16):
                pass
            time.sleep(0.05)

    many(HALF, client, stop)


def unread(port: int, stop: Any) -> None:
    """Request the page repeatedly without reading it."""
    page = head(port, "GET /")

    def client() -> None:
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((HOST, port))
            while not stop.is_set():
                connection.sendall(page)
                time.sleep(0.02)

    many(UNREAD, client, stop)


def bombs(port: int, stop: Any) -> None:
    """Send images of 49 megapixels, one at a time per client."""
    data = bomb()

    def client() -> None:
        _, said = ask(port, "/v1/score", data)
        if said != "200":
            time.sleep(1.0)  # as Retry-After says

    many(BOMBS, client, stop)


ATTACKS: dict[str, Callable[[int, Any], None]] = {
    "none": no_attack,
    "one connection, chunks of 1 byte": bytewise,
    f"{HALF} connections holding half a request": half,
    f"{UNREAD} clients that do not read": unread,
    f"{BOMBS} clients with PNGs of {SIDE**2 // 10**6} megapixels": bombs,
}


def table(rows: dict[str, dict[str, dict[str, Any]]], names: list[str]) -> str:
    """Return the rows as Markdown, after the command, date and machine."""
    columns = ["/healthz, median", "worst", "a verdict, median", "worst", "answered", "SIGTERM to end"]
    lines = [
        f"- command: python tools/attack_service.py DETECTOR {' '.join(f'--source {name}=...' for name in names)}",
        f"- date: {datetime.now(UTC):%Y-%m-%d}",
        f"- machine: {processor()}, {os.cpu_count()} threads, Python {platform.python_version()}",
        "",
        f"| Attack | code | {' | '.join(columns)} | marks met |",
        "| --- | --- |" + " ---: |" * len(columns) + " ---: |",
    ]
    for attack, by_name in rows.items():
        for name, found in by_name.items():
            alive, verdict = found["healthz"], found["verdict"]
            good = verdict["asked"] - sum(verdict["errors"].values())
            met = 1000 * alive["median"] < HEALTHZ and good == verdict["asked"] and found["end"] < END
            cells = [
                shown(alive["median"]),
                shown(alive["worst"]),
                shown(verdict["median"]),
                shown(verdict["worst"]),
            ]
            cells += [f"{good} of {verdict['asked']}", shown(found["end"], PATIENCE), "yes" if met else "no"]
            lines.append(f"| {attack} | {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def shown(seconds: float, limit: float = float("inf")) -> str:
    """Format a time in milliseconds or seconds."""
    if seconds >= limit:
        return f"> {limit:g} s"
    return f"{1000 * seconds:.0f} ms" if seconds < 1 else f"{seconds:.1f} s"


def processor() -> str:
    """Return the name of the CPU."""
    try:
        found = re.search(r"^model name\s*:\s*(.*)$", Path("/proc/cpuinfo").read_text("utf-8"), re.MULTILINE)
    except OSError:
        found = None
    return found[1] if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
