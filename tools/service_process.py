"""`featnorm serve` in a process of its own, for the tools that measure it."""

import http.client
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = "127.0.0.1"
# Seconds after which the service counts as unresponsive.
PATIENCE = 45


@contextmanager
def running_service(detector: Path, source: str | None = None) -> Iterator[tuple[subprocess.Popen[str], int]]:
    """Start the service on a free port, wait until it is ready, and end it with the block.

    Parameters
    ----------
    detector : the file to serve.
    source : the folder ``src`` of the checkout to run. Default: what is installed.

    Yields
    ------
    The process and its port.
    """
    service = subprocess.Popen(
        [sys.executable, "-m", "featnorm", "serve", str(detector), "--port", "0"],
        env=os.environ if source is None else {**os.environ, "PYTHONPATH": source},
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    try:
        assert service.stdout is not None
        printed = re.search(r"http://127\.0\.0\.1:(\d+)/", service.stdout.readline())
        if printed is None:
            sys.exit(f"the service did not start: run featnorm serve {detector} to see why")
        port = int(printed[1])
        for _ in range(600):
            if ask(port, "/readyz")[1] == "200":
                break
            time.sleep(0.1)
        else:
            sys.exit("the service was not ready within a minute")
        yield service, port
    finally:
        service.kill()
        service.wait()


def ask(port: int, path: str, body: bytes | None = None) -> tuple[float, str]:
    """Return how long an answer took on a connection of its own, and its status or why there was none."""
    began = time.perf_counter()
    connection = http.client.HTTPConnection(HOST, port, timeout=PATIENCE)
    try:
        connection.request("GET" if body is None else "POST", path, body, {"Content-Type": "image/jpeg"})
        answer = connection.getresponse()
        answer.read()
        said = str(answer.status)
    except (OSError, http.client.HTTPException) as error:
        said = type(error).__name__
    finally:
        connection.close()
    return time.perf_counter() - began, said
