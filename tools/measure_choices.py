"""Measure what the network, its precision and its memory layout cost in each engine, and what decoders cost.

    pip install openvino simplejpeg
    python tools/measure_choices.py

It writes docs/results/speed/choices.json and the page. Times are CPU times of one thread, the best of some rounds
in which all ways take turns, so that other work on the machine matters little; it takes two minutes. Ways whose
package is not installed are left out. The data are the images of DATA/imagenet1k_sample, see `featnorm.inputs`.
"""

import argparse
import io
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torchvision.io import ImageReadMode, decode_jpeg
from update_results import RESULTS, render

from featnorm._utils.memory import keep_freed_memory
from featnorm.cli.console import environment
from featnorm.engine import _Network, example_batch, exported, relative_gap
from featnorm.inputs.kinds import IMAGES, TEXTS, Kind
from featnorm.models import create_model
from featnorm.models.loading import backbone_of, default_model

ROUNDS = 2
TOKENS = 32
SIZES = {"256 x 256": (256, 256), "1152 x 896": (1152, 896)}


def main() -> None:
    """Run the measurements, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("FEATNORM_DATA"), required=False)
    parser.add_argument("--out", type=Path, default=RESULTS / "speed" / "choices.json")
    parser.add_argument("--freed", action="store_true", help=argparse.SUPPRESS)  # the process of `freed`
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    network = Network(IMAGES)
    if options.freed:
        print(json.dumps([*network.batches((8, 64), {"PyTorch, channels last, freed memory given back"})]))
        return
    if options.data is None:
        parser.error("pass --data FOLDER, or set FEATNORM_DATA")
    keep_freed_memory()
    rows = [
        *network.batches((8, 64)),
        *freed(),
        *Network(TEXTS).batches((64,)),
        *decoders(options.data, network),
    ]
    facts = {name: fact for name, fact in environment().items() if name not in ("command", "machine")}
    facts["machine"] = f"{environment()['machine'].partition(', ')[0]}, 1 thread"
    options.out.write_text(json.dumps({"environment": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    if options.out.parent.parent == RESULTS:
        (RESULTS / "speed.md").write_text(render("speed"), encoding="utf-8")


class Network:
    """The default network for a kind of inputs, and the ways to run it."""

    def __init__(self, kind: Kind) -> None:
        self.kind = kind
        self.loaded = create_model(default_model(kind))
        self.module = (backbone_of(self.loaded)[0] if kind is IMAGES else self.loaded.model).eval()

    def batches(self, sizes: tuple[int, ...], ways: set[str] | None = None) -> Iterator[dict[str, Any]]:
        """Yield one row per batch size and way."""
        runs: dict[str, Callable[[Any], Any]]
        if self.kind is TEXTS:
            noun, runs = "a text of 32 tokens, MiniLM", {"PyTorch": lambda batch: self.module(**batch)}
        else:
            noun = "an image, EfficientNet-Lite0"
            runs = {
                "PyTorch, contiguous": lambda batch: self.run(batch, torch.contiguous_format),
                "PyTorch, channels last": lambda batch: self.run(batch, torch.channels_last),
                "PyTorch, channels last, bfloat16": self.run_bfloat16,
            }
        if ways is None:
            runs |= self.exported()
        else:
            runs = {way: runs["PyTorch, channels last"] for way in ways}
        for size in sizes:
            batch = self.random(size)
            found = in_turn(
                {way: lambda r=run, b=batch: r(b) for way, run in runs.items()}, 64 if size > 8 else 16, size
            )
            few = batch[:8] if isinstance(batch, Tensor) else {name: value[:8] for name, value in batch.items()}
            expected = torch.as_tensor(next(iter(runs.values()))(few))
            for way, run in runs.items():
                gap = relative_gap(torch.as_tensor(run(few)).float(), expected)
                yield {"work": f"{noun}, batches of {size}", "way": way, "seconds": found[way], "gap": gap}

    def run(self, batch: Tensor, layout: torch.memory_format) -> Tensor:
        """Return the features of images in a memory layout."""
        output: Tensor = self.module.to(memory_format=layout)(batch.contiguous(memory_format=layout))
        return output

    def run_bfloat16(self, batch: Tensor) -> Tensor:
        """Return the features of images in mixed precision."""
        with torch.autocast("cpu", torch.bfloat16):
            return self.run(batch, torch.channels_last)

    def exported(self) -> dict[str, Callable[[Any], Any]]:
        """Return the ways to run the exported graph."""
        example = example_batch(self.kind, self.loaded.transform)
        model = exported(_Network(self.module).eval(), example, self.kind, ["features"]).SerializeToString()
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = 1
        session = onnxruntime.InferenceSession(model, settings, providers=["CPUExecutionProvider"])
        names = [one.name for one in session.get_inputs()]

        def arrays(batch: Any) -> dict[str, Any]:
            return {name: (batch if isinstance(batch, Tensor) else batch[name]).numpy() for name in names}

        found: dict[str, Callable[[Any], Any]] = {"onnxruntime": lambda batch: session.run(None, arrays(batch))[0]}
        if find_spec("openvino"):
            import openvino

            core = openvino.Core()
            how = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "f32"}
            request = core.compile_model(core.read_model(model, b""), "CPU", how).create_infer_request()
            found["OpenVINO"] = lambda batch: request.infer(arrays(batch))[0].copy()
        return found

    def random(self, size: int) -> Any:
        """Return a batch of noise."""
        generator = torch.Generator().manual_seed(0)
        if self.kind is IMAGES:
            return torch.randn(size, *self.loaded.input_size, generator=generator)
        example: Any = example_batch(self.kind, self.loaded.transform)
        ones = {name: torch.ones(size, TOKENS, dtype=value.dtype) for name, value in example.items()}
        return ones | {"input_ids": torch.randint(1000, 9000, (size, TOKENS), generator=generator)}


def freed() -> list[dict[str, Any]]:
    """Measure PyTorch in a process that gives freed memory back, as a Python program does by default."""
    command = [sys.executable, __file__, "--freed"]
    rows: list[dict[str, Any]] = json.loads(subprocess.run(command, check=True, capture_output=True).stdout)
    return [row | {"gap": None} for row in rows]


def decoders(data: Path, network: Network) -> Iterator[dict[str, Any]]:
    """Yield one row per size of image and decoder."""
    table = pq.read_table(data / "imagenet1k_sample" / "test.parquet")["image"].to_pylist()
    ways: dict[str, Callable[[bytes], Any]] = {
        "Pillow": lambda content: Image.open(io.BytesIO(content)).convert("RGB"),
        "Pillow, scaled by `draft`": _drafted,
        "torchvision.io": lambda content: decode_jpeg(
            torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB
        ),
    }
    if find_spec("simplejpeg"):
        import simplejpeg

        ways["simplejpeg"] = simplejpeg.decode_jpeg
        ways["simplejpeg, fast and inexact"] = lambda content: simplejpeg.decode_jpeg(
            content, fastdct=True, fastupsample=True
        )
    for name, size in SIZES.items():
        files = [_jpeg(row["bytes"], size) for row in table[:: len(table) // 24][:24]]
        found = in_turn({way: lambda d=decode, f=files: [*map(d, f)] for way, decode in ways.items()}, 96, 24)
        features = {
            way: network.run(_prepared(files, decode, network), torch.channels_last)
            for way, decode in ways.items()
        }
        for way in ways:
            gap = relative_gap(features[way], features["Pillow"])
            yield {"work": f"decoding a JPEG of {name} pixels", "way": way, "seconds": found[way], "gap": gap}


def _drafted(content: bytes) -> Image.Image:
    image: Any = Image.open(io.BytesIO(content))
    image.draft("RGB", (256, 256))
    return image.convert("RGB")  # type: ignore[no-any-return]


def _jpeg(content: bytes, size: tuple[int, int]) -> bytes:
    out = io.BytesIO()
    ImageOps.fit(Image.open(io.BytesIO(content)).convert("RGB"), size).save(out, "JPEG", quality=90)
    return out.getvalue()


def _prepared(files: list[bytes], decode: Callable[[bytes], Any], network: Network) -> Tensor:
    def image(pixels: Any) -> Image.Image:
        if isinstance(pixels, Tensor):
            pixels = pixels.permute(1, 2, 0).numpy()
        return Image.fromarray(np.asarray(pixels))

    return torch.stack([network.loaded.transform(image(decode(content))) for content in files])


def in_turn(runs: Mapping[str, Callable[[], Any]], items: int, per_run: int) -> dict[str, float]:
    """Return the least CPU seconds per item of each way, after a run that is not timed."""
    times = dict.fromkeys(runs, float("inf"))
    for round_ in range(ROUNDS + 1):
        for way, run in runs.items():
            began = time.process_time()
            for _ in range(max(1, items // per_run)):
                run()
            seconds = (time.process_time() - began) / max(items, per_run)
            times[way] = min(times[way], seconds) if round_ else times[way]
    return times


if __name__ == "__main__":
    main()
