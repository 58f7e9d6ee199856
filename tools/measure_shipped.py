"""Measure the speed of a detector fitted by `featnorm fit`: scored, exported, and served.

    python tools/measure_shipped.py DETECTOR DATA [--clients 1 8 32] [--seconds 10] [--requests 1000] [--out FILE]

It scores the first images of DATA (a folder, a parquet file or a name, as for `featnorm score`) with the network
alone, the scorer, and the ONNX graph, in turn. Then it starts `featnorm serve DETECTOR` on a free port of the
loopback interface and sends the images, one per request, from each number of clients at once, until the time is up
or all images are sent. The machine should be idle otherwise.
"""

import argparse
import http.client
import io
import json
import re
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import onnxruntime
import torch
from prometheus_client.parser import text_string_to_metric_families
from service_process import running_service

from featnorm._utils.memory import keep_freed_memory
from featnorm.cli.console import environment
from featnorm.export import OUTPUTS, export_onnx
from featnorm.inputs import ImageSource, SlicedSource, open_source, source_loader
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.scorer_file import load

# Maximum number of images, which are all kept in memory as tensors.
MAX_IMAGES = 512
BATCH = 64
ROUNDS = 3
SCORE = ("POST", "/v1/score")


def main() -> None:
    """Run the measurements."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("detector", type=Path)
    parser.add_argument("data")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="maximum per number of clients")
    parser.add_argument("--requests", type=int, default=1000, help="maximum per number of clients")
    parser.add_argument("--data-root", type=Path)
    parser.add_argument("--out", type=Path, default=Path("shipped.json"))
    options = parser.parse_args()
    keep_freed_memory()  # as the commands do
    source = open_source(options.data, root=options.data_root)
    source = SlicedSource(source, range(min(len(source), MAX_IMAGES)), source.title)
    content = {
        "images": f"{len(source)} of {source.title}",
        **scored(load(options.detector), source),
        "service": served(options, [as_jpeg(source, row) for row in range(len(source))]),
        # The command is left out, because it contains paths of this machine.
        "environment": {name: fact for name, fact in environment().items() if name != "command"},
    }
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def scored(scorer: Scorer, source: ImageSource) -> dict[str, Any]:
    """Return the speed of each way of scoring, and the differences between the ONNX graph and PyTorch."""
    loader = source_loader(source, scorer.transform, batch_size=BATCH, workers=0)
    batches = [batch.images for batch in loader]
    rows = [part.contiguous(memory_format=torch.channels_last) for part in batches]
    with TemporaryDirectory() as folder:
        graph = Path(folder) / "detector.onnx"
        export_onnx(scorer, graph)
        session = onnxruntime.InferenceSession(graph)
    names = [""] * BATCH
    network = scorer.model

    def run_graph() -> list[list[np.ndarray[Any, Any]]]:
        return [session.run(None, {"images": part.numpy()}) for part in batches]

    ways: dict[str, Callable[[], Any]] = {
        "the network alone, images in memory": lambda: [network(part) for part in rows],
        "the scorer, images in memory": lambda: [scorer.predict_batch(part, names[: len(part)]) for part in rows],
        "the ONNX graph under onnxruntime, images in memory": run_graph,
        "`featnorm score`, from files": lambda: list(scorer.stream(source, runtime=Runtime(batch_size=BATCH))),
    }
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.no_grad():
        for _ in range(ROUNDS):
            for way, run in ways.items():
                began = time.perf_counter()
                run()
                seconds[way].append(time.perf_counter() - began)
        mine = [scorer(part) for part in rows]
    theirs = [np.concatenate(column) for column in zip(*run_graph(), strict=True)]
    ours = [
        torch.cat([getattr(v, name) for v in mine]).numpy() for name in ("logits", "score", "p_value", "is_id")
    ]
    largest = [float(np.abs(a.astype(float) - b.astype(float)).max()) for a, b in zip(ours, theirs, strict=True)]
    return {
        "per_second": {way: len(source) / min(times) for way, times in seconds.items()},
        "detector": repr(scorer.detector),
        "difference": dict(zip(OUTPUTS[:3], largest, strict=False)),
        "other_verdicts": int((ours[3] != theirs[3]).sum()),
    }


def as_jpeg(source: ImageSource, row: int) -> bytes:
    """Return an image encoded as a client would send it."""
    buffer = io.BytesIO()
    source.item(row).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def served(options: argparse.Namespace, images: list[bytes]) -> list[dict[str, Any]]:
    """Start the service, measure it with each number of clients, and stop it."""
    with running_service(options.detector) as (_, port):
        rows = []
        for clients in options.clients:
            rows.append(measure(port, images, clients, options.seconds, options.requests))
            print(json.dumps(rows[-1]))
        return rows


def measure(port: int, images: list[bytes], clients: int, seconds: float, requests: int) -> dict[str, Any]:
    """Return the latencies and errors that a number of concurrent clients see."""
    numbers = count()  # request numbers; `next` is atomic
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
    """Return the number of items that the service has scored, and the number of batches."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    families = text_string_to_metric_families(connection.getresponse().read().decode())
    found = {sample.name: sample.value for family in families for sample in family.samples}
    # Earlier versions have another word for the items.
    words = next(name for name in found if re.fullmatch(r"featnorm_batch_\w+_sum", name)).removesuffix("_sum")
    return found[f"{words}_sum"], found[f"{words}_count"]


if __name__ == "__main__":
    main()
