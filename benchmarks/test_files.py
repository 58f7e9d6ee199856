"""`featnorm score` on JPEGs, compared with the bare model on decoded tensors (target: 90 % of its throughput).

The target is meant for machines with cores to spare for decoding. If decoding and the model share the same cores,
running the model after the decoding is the lower limit, which is the second row.
"""

import subprocess
import sys

import numpy as np
import torch
from PIL import Image, ImageFilter

import featnorm as fn
from featnorm.fitting import fit_source
from featnorm.inputs import open_source, source_loader
from featnorm.models import create_model

BATCH = 64
DISTINCT = 500


def photographs(folder, n):
    """Write images of smooth and fine noise, whose JPEGs are about as large as those of photographs."""
    random = np.random.default_rng(0)
    folder.mkdir()
    contents = []
    for i in range(n):
        if i < DISTINCT:
            fine = Image.fromarray(random.integers(0, 256, (256, 256, 3), dtype=np.uint8))
            image = Image.blend(fine.filter(ImageFilter.GaussianBlur(6)), fine, 0.1)
            image.save(folder / f"{i:05}.jpg", quality=90)
            contents.append((folder / f"{i:05}.jpg").read_bytes())
        else:
            (folder / f"{i:05}.jpg").write_bytes(contents[i % DISTINCT])
    return folder


def test_score(compare, size, tmp_path):
    n = size(20_000, 128)
    folder = photographs(tmp_path / "photographs", n)
    source = open_source(str(folder))
    loaded = create_model("featnorm:efficientnet-lite0" if size(True, False) else "featnorm:cifar10-resnet18")
    known = open_source(f"{folder}[:{min(n, DISTINCT)}]")
    file = tmp_path / "detector.featnorm"
    options = {"cache": tmp_path / "cache", "runtime": fn.Runtime(progress=False)}
    fit_source(known, loaded, **options)[0].save(file, weights=True)
    scorer = fn.load(file)
    model = scorer.model.eval()
    loader = source_loader(source, scorer.transform, batch_size=BATCH)
    decoded = next(iter(loader)).inputs.contiguous(memory_format=torch.channels_last)

    def command():
        out = tmp_path / "scores.csv"
        out.unlink(missing_ok=True)
        call = [
            sys.executable,
            "-m",
            "featnorm",
            "score",
            str(file),
            str(folder),
            "-o",
            str(out),
            "--device",
            "cpu",
        ]
        subprocess.run(call, check=True, capture_output=True)

    def bare():
        with torch.no_grad():
            for start in range(0, n, BATCH):
                model(decoded[: n - start])

    def decode():
        for _ in loader:
            pass

    def one_after_the_other():
        decode()
        bare()

    compare.time(
        "featnorm score, the process included",
        command,
        {
            "the model on decoded tensors": (bare, 1 / 0.9),
            "decoding by all cores, then the model": (one_after_the_other, None),
        },
        rounds=1,  # each round takes several minutes and hundreds of batches
        sizes=f"{n:,} JPEGs of 256 x 256, {loaded.name}, batches of {BATCH}",
        warm=False,
    )
