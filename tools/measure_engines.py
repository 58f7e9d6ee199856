"""Measure an earlier commit, this one and the bare libraries in turn, on images, texts and single calls.

    git worktree add --detach /tmp/before COMMIT
    python tools/measure_engines.py --before /tmp/before/src

It writes docs/results/speed/engines.json and the page. The machine should be idle otherwise; it takes about ten
minutes on two CPUs. The data are the images of DATA/imagenet1k_sample and the texts of DATA/text, see
`featnorm.inputs`.
"""

import argparse
import csv
import io
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pyarrow.parquet as pq
from measure_shipped import measure
from PIL import Image, ImageOps
from service_process import running_service
from update_results import RESULTS, render

from featnorm.cli.console import environment

HERE = str(Path(__file__).parents[1] / "src")
# Rounds in which both commits run the same command, in turn.
ROUNDS = 2

#: Images per second of the bare network on decoded tensors, by layout and batch size, and of onnxruntime.
BARE = """
import json, sys, time, numpy as np, torch
from featnorm._utils.memory import keep_freed_memory
keep_freed_memory()
from featnorm.engine import network_engine
from featnorm.inputs.kinds import IMAGES
from featnorm.models import create_model
from featnorm.models.loading import backbone_of, default_model
loaded = create_model(default_model(IMAGES))
network = backbone_of(loaded)[0].eval()
engine = network_engine(network, IMAGES, loaded.transform)
images = torch.randn(256, *loaded.input_size)
found = {}
with torch.no_grad():
    for layout in (torch.contiguous_format, torch.channels_last):
        model = network.to(memory_format=layout)
        for size in (1, 8, 64):
            parts = [part.contiguous(memory_format=layout) for part in images.split(size)]
            parts = parts[: max(1, 64 // size)] if layout is torch.contiguous_format else parts
            model(parts[0])
            began = time.perf_counter()
            for part in parts:
                model(part)
            found[f"{str(layout).removeprefix('torch.')}, batches of {size}"] = (
                sum(map(len, parts)) / (time.perf_counter() - began)
            )
    for size in (1, 64):
        parts = images.split(size)
        engine(parts[0])
        began = time.perf_counter()
        for part in parts:
            engine(part)
        found[f"onnxruntime, batches of {size}"] = len(images) / (time.perf_counter() - began)
print(json.dumps(found))
"""

#: Seconds of one call of a model and of a Scorer on one input, after one of the other.
CALLS = """
import json, statistics, time, torch
from torch import nn
from torchvision.models import resnet18
import featnorm as fn
from featnorm._utils.memory import keep_freed_memory
keep_freed_memory()
torch.manual_seed(0)
mlp = nn.Sequential(nn.Linear(32, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10)).eval()
found = {}
for name, model, shape, expression, rounds in (
    ("ResNet-18 at 32 x 32, NAN", resnet18(num_classes=10).eval(), (3, 32, 32), "NAN()", 150),
    ("a tabular MLP, NAN", mlp, (32,), "NAN()", 3000),
    ("a tabular MLP, KLUniform + KNN", mlp, (32,), "KLUniform() + KNN(k=10)", 3000),
):
    data = [torch.randn(256, *shape)]
    scorer = fn.Scorer(model, fn.parse_detector(expression)).fit(data).calibrate(data)
    x, alone, scored = torch.randn(1, *shape), [], []
    with torch.no_grad():
        for _ in range(rounds):
            start = time.perf_counter()
            model(x)
            middle = time.perf_counter()
            scorer(x)
            alone.append(middle - start)
            scored.append(time.perf_counter() - middle)
    found[name] = [statistics.median(alone), statistics.median(scored)]
print(json.dumps(found))
"""

#: Texts per second of PyTorch, as the `encode` of sentence-transformers works: batches of 32, by length.
ENCODE = """
import csv, json, sys, time, torch
from featnorm.inputs.kinds import TEXTS
from featnorm.models import create_model
from featnorm.models.loading import default_model
texts = [row["text"] for row in csv.DictReader(open(sys.argv[1], encoding="utf-8"))]
loaded = create_model(default_model(TEXTS))
network = loaded.model.eval()
def encode(texts):
    order = sorted(range(len(texts)), key=lambda i: -len(texts[i]))
    for start in range(0, len(order), 32):
        tokens = [loaded.transform(texts[i]) for i in order[start : start + 32]]
        torch.nn.functional.normalize(network(**TEXTS.collate(tokens, loaded.transform)))
with torch.no_grad():
    encode(texts[:64])
    began = time.perf_counter()
    encode(texts)
print(json.dumps(len(texts) / (time.perf_counter() - began)))
"""


def main() -> None:
    """Run the measurements, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", required=True, help="folder src of a checkout of the earlier commit")
    parser.add_argument("--data", type=Path, default=os.environ.get("FEATNORM_DATA"), required=False)
    parser.add_argument("--images", type=int, default=3000)
    parser.add_argument("--texts", type=int, default=3000)
    parser.add_argument("--seconds", type=float, default=10.0, help="per number of clients of the service")
    parser.add_argument("--only", nargs="+", default=["starts", "calls", "images", "texts", "service"])
    parser.add_argument("--out", type=Path, default=RESULTS / "speed" / "engines.json")
    options = parser.parse_args()
    if options.data is None:
        parser.error("pass --data FOLDER, or set FEATNORM_DATA")
    with TemporaryDirectory() as folder:
        rows = Measurements(options, Path(folder)).rows()
    facts = {name: fact for name, fact in environment().items() if name != "command"}
    content = {"images": options.images, "texts": options.texts, "environment": facts, "rows": rows}
    options.out.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    if options.out.parent.parent == RESULTS:
        (RESULTS / "speed.md").write_text(render("speed"), encoding="utf-8")


class Measurements:
    """The measurements, in a folder that is removed afterwards."""

    def __init__(self, options: argparse.Namespace, folder: Path) -> None:
        self.options = options
        self.folder = folder
        self.commits = {"before": options.before, "now": HERE}

    def rows(self) -> list[dict[str, Any]]:
        """Return what was measured, one row per work."""
        self._write_images()
        self._write_texts()
        rows = []
        for part in self.options.only:
            began = time.perf_counter()
            for row in getattr(self, part)():
                rows.append(row)
                print(json.dumps(row), flush=True)
            print(f"{part}: {time.perf_counter() - began:.0f} s", flush=True)
        return rows

    def starts(self) -> list[dict[str, Any]]:
        """CPU time of commands that need no model."""
        commands = {"featnorm --help": ["--help"], "featnorm monitor --help": ["monitor", "--help"]}
        rows = []
        for name, arguments in commands.items():
            found = self._in_turn(lambda source, a=arguments: self._cpu(source, a), 5)
            rows.append(_row(f"`{name}`, CPU", "s", found, "under 0.5 s", found["now"] < 0.5))
        return rows

    def calls(self) -> list[dict[str, Any]]:
        """One call on one input."""
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in self.commits}
        for _ in range(ROUNDS):
            for name, source in self.commits.items():
                runs[name].append(self._python(source, CALLS))
        rows = []
        for work in runs["now"][0]:
            medians = {
                name: [statistics.median(run[work][i] for run in found) for i in (0, 1)]
                for name, found in runs.items()
            }
            more = {name: scored - alone for name, (alone, scored) in medians.items()}
            ratio = medians["now"][1] / medians["now"][0]
            if "MLP" in work:
                mark, met = f"3 times the model ({ratio:.1f})", ratio <= 3
            else:
                mark, met = "100 µs", more["now"] <= 100e-6
            rows.append(_row(f"a call on one input beyond the model: {work}", "s", more, mark, met))
        return rows

    def images(self) -> list[dict[str, Any]]:
        """Images: fit and score, and the bare network."""
        bare = self._python(HERE, BARE)
        rows = [
            {"work": f"EfficientNet-Lite0 alone, {name}", "unit": "per second", "before": None, "now": value}
            for name, value in bare.items()
        ]
        best = max(value for name, value in bare.items() if "onnxruntime" not in name)
        count, photos = self.options.images, str(self.folder / "photos")
        files = {name: self.folder / f"{name}.featnorm" for name in self.commits}
        seconds = {name: self._fit(source, photos, files[name]) for name, source in self.commits.items()}
        per_second = {name: count / value for name, value in seconds.items()}
        met = per_second["now"] >= 2 * per_second["before"]
        rows.append(_row("`featnorm fit`, export included", "per second", per_second, "2 times before", met))
        paces = self._scored(files, photos, rows, "`featnorm score` on JPEG files")
        ratio = paces["now"] / best
        # The mark depends on the kind of processor.
        mark = 1.3 if "AMD" in environment()["machine"] else 1.4
        rows[-1] |= {"mark": f"{mark} times the bare network ({ratio:.2f})", "met": ratio >= mark}
        return rows

    def texts(self) -> list[dict[str, Any]]:
        """Texts: score, and the bare network."""
        table = str(self.folder / "texts.csv")
        files = {name: self.folder / f"{name}-texts.featnorm" for name in self.commits}
        for name, source in self.commits.items():
            self._fit(source, table, files[name])
        rows: list[dict[str, Any]] = []
        paces = self._scored(files, table, rows, "`featnorm score` on texts, MiniLM")
        encode = self._python(HERE, ENCODE, table)
        ratio = paces["now"] / encode
        rows[-1] |= {"mark": f"1.5 times `encode` ({ratio:.2f})", "met": ratio >= 1.5}
        rows.append(
            {"work": "MiniLM by PyTorch, as `encode`", "unit": "per second", "before": None, "now": encode}
        )
        return rows

    def service(self) -> list[dict[str, Any]]:
        """The service, with 1 and 32 clients."""
        images = [path.read_bytes() for path in sorted((self.folder / "photos").glob("*/*.jpg"))[:512]]
        seen: dict[str, dict[int, Any]] = {}
        for name, source in self.commits.items():
            if not (self.folder / f"{name}.featnorm").exists():
                self._fit(source, str(self.folder / "photos"), self.folder / f"{name}.featnorm")
            with running_service(self.folder / f"{name}.featnorm", source) as (_, port):
                measure(port, images, 4, 2.0, 10_000)
                seen[name] = {n: measure(port, images, n, self.options.seconds, 10_000) for n in (1, 32)}
        rows = []
        for n, per_second, p99 in ((1, 60, 25), (32, 150, 280)):
            found = {name: by_clients[n] for name, by_clients in seen.items()}
            clients = f"the service, {n} client{'s' if n > 1 else ''}"
            values = {name: one["per_second"] for name, one in found.items()}
            rows.append(_row(clients, "per second", values, f"{per_second}", values["now"] >= per_second))
            values = {name: one["p99_ms"] / 1000 for name, one in found.items()}
            rows.append(_row(f"{clients}, p99", "s", values, f"{p99} ms", values["now"] <= p99 / 1000))
        return rows

    def _scored(
        self, files: dict[str, Path], data: str, rows: list[dict[str, Any]], work: str
    ) -> dict[str, float]:
        """Score data by each commit in turn, add a row, and return the items per second."""

        def pace(source: str) -> float:
            name = next(name for name, other in self.commits.items() if other == source)
            out = self.folder / f"scores-{name}.csv"
            printed = self._command(source, ["score", str(files[name]), data, "-o", str(out)])
            found = re.search(r"(\d+) \w+ per second", printed)
            assert found is not None, printed
            return float(found[1])

        paces = self._in_turn(pace, ROUNDS, max)
        rows.append(_row(work, "per second", paces, "", None))
        return paces

    def _fit(self, source: str, data: str, file: Path) -> float:
        """Fit, without features in the cache, and return the seconds."""
        began = time.perf_counter()
        # The home has neither features nor graphs in its cache.
        with TemporaryDirectory() as home:
            arguments = ["fit", data, "-o", str(file), "--cache", f"{home}/features", "--head", "none"]
            self._command(source, arguments, HOME=home)
        return time.perf_counter() - began

    def _in_turn(
        self, measured: Callable[[str], float], rounds: int, best: Callable[[list[float]], float] = min
    ) -> dict[str, float]:
        """Return the best of several measurements of each commit, taken in turn."""
        found: dict[str, list[float]] = {name: [] for name in self.commits}
        for _ in range(rounds):
            for name, source in self.commits.items():
                found[name].append(measured(source))
        return {name: best(values) for name, values in found.items()}

    def _cpu(self, source: str, arguments: list[str]) -> float:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        self._command(source, arguments)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime

    def _command(self, source: str, arguments: list[str], **environment: str) -> str:
        return _run([sys.executable, "-m", "featnorm", *arguments], {"PYTHONPATH": source, **environment})

    def _python(self, source: str, code: str, *arguments: str) -> Any:
        return json.loads(_run([sys.executable, "-c", code, *arguments], {"PYTHONPATH": source}).splitlines()[-1])

    def _write_images(self) -> None:
        """Write JPEG files of 256 x 256 pixels: photos, and mirrored and cropped copies of them."""
        table = pq.read_table(self.options.data / "imagenet1k_sample" / "test.parquet")
        photos = table["image"].to_pylist()
        for i in range(self.options.images):
            image = Image.open(io.BytesIO(photos[i % len(photos)]["bytes"])).convert("RGB")
            turn = i // len(photos)
            image = ImageOps.fit(ImageOps.mirror(image) if turn % 2 else image, (256, 256), bleed=0.02 * turn)
            path = self.folder / "photos" / f"{i % 10}" / f"{i:05}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            image.save(path, quality=90)

    def _write_texts(self) -> None:
        table = pq.read_table(self.options.data / "text" / "ag_news_test.parquet", columns=["text"])
        with (self.folder / "texts.csv").open("w", encoding="utf-8", newline="") as file:
            writer = csv.writer(file)
            writer.writerows([["text"], *([text] for text in table["text"].to_pylist()[: self.options.texts])])


def _run(command: list[str], environment: dict[str, str]) -> str:
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **environment})
    if done.returncode:
        sys.exit(f"{' '.join(command[:4])} failed: {done.stderr[-2000:]}")
    return done.stdout


def _row(work: str, unit: str, found: dict[str, float], mark: str, met: bool | None) -> dict[str, Any]:
    return {"work": work, "unit": unit, **found, "mark": mark, "met": met}


if __name__ == "__main__":
    main()
