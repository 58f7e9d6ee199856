"""Ask a service as fast as it answers, and write down how fast that is.

    python tools/load_test.py DETECTOR FOLDER [--clients 1 8 32] [--seconds 10] [--requests 1000] [--out FILE]

starts `featnorm serve DETECTOR` on a free port of the loopback, sends the images of FOLDER one a request from that
many clients at once, each until the time is up or all requests are sent, and stops the service.
"""

import argparse
import http.client
import json
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
from prometheus_client.parser import text_string_to_metric_families

from featnorm.cli.show import environment
from featnorm.data.images import image_files

# Images that are read from the folder, at most.
MOST_IMAGES = 500
SCORE = ("POST", "/v1/score")


def main() -> None:
    """Run it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("detector", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each number of clients, at most")
    parser.add_argument("--requests", type=int, default=1000, help="for each number of clients, at most")
    parser.add_argument("--out", type=Path, default=Path("load-test.json"))
    options = parser.parse_args()
    images = [(options.folder / file).read_bytes() for file in image_files(options.folder)[:MOST_IMAGES]]
    if not images:
        parser.error(f"there are no images in {options.folder}")
    command = [sys.executable, "-c", "from featnorm.cli import main; main()", "serve", str(options.detector)]
    service = subprocess.Popen(
        [*command, "--port", "0"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    try:
        assert service.stdout is not None
        said = re.search(r"http://127\.0\.0\.1:(\d+)/", service.stdout.readline())
        if said is None:
            sys.exit(f"the service did not start: run featnorm serve {options.detector} to see why")
        port = int(said[1])
        wait_until_ready(port)
        rows = []
        for clients in options.clients:
            rows.append(measure(port, images, clients, options.seconds, options.requests))
            print(json.dumps(rows[-1]))
    finally:
        service.terminate()
        service.wait(60)
    content = {**environment(), "images": len(images), "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def wait_until_ready(port: int) -> None:
    """Ask until the service judges images."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    for _ in range(600):
        connection.request("GET", "/readyz")
        answer = connection.getresponse()
        answer.read()
        if answer.status == 200:
            return
        time.sleep(0.1)
    sys.exit("the service was not ready within a minute")


def measure(port: int, images: list[bytes], clients: int, seconds: float, requests: int) -> dict[str, Any]:
    """Return what some clients at once see."""
    numbers = count()  # of requests; the next one of it is atomic
    before = batches(port)
    began = time.perf_counter()

    def ask() -> list[tuple[float, str]]:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        seen = []
        while (number := next(numbers)) < requests and time.perf_counter() - began < seconds:
            start = time.perf_counter()
            try:
                connection.request(*SCORE, images[number % len(images)], {"Content-Type": "image/jpeg"})
                answer = connection.getresponse()
                answer.read()
                said = str(answer.status)
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                said = type(error).__name__
            seen.append((time.perf_counter() - start, said))
        return seen

    with ThreadPoolExecutor(clients) as pool:
        seen = [one for client in [pool.submit(ask) for _ in range(clients)] for one in client.result()]
    took = time.perf_counter() - began
    after = batches(port)
    latencies = [latency for latency, said in seen if said == "200"]
    median, slowest = np.percentile(latencies, [50, 99]).tolist() if latencies else (None, None)
    return {
        "clients": clients,
        "requests": len(seen),
        "seconds": round(took, 2),
        "per_second": round(len(latencies) / took, 1),
        "p50_ms": median and round(1000 * median, 1),
        "p99_ms": slowest and round(1000 * slowest, 1),
        "images_a_batch": round((after[0] - before[0]) / max(1, after[1] - before[1]), 2),
        "errors": dict(Counter(said for _, said in seen if said != "200")),
    }


def batches(port: int) -> tuple[float, float]:
    """Return how many images the service has judged, and in how many batches."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    families = text_string_to_metric_families(connection.getresponse().read().decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    return found["featnorm_batch_images_sum"], found["featnorm_batch_images_count"]


if __name__ == "__main__":
    main()
