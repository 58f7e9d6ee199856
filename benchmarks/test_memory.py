"""The memory of a command for n, 2n and 4n images, texts or rows, which must not grow with the items themselves.

`score` and `evaluate` keep names and scores. `fit` keeps the features of all images.
"""

import os
import subprocess
import sys
from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

MODEL = "featnorm:cifar10-resnet18"
# Of the memory of the whole process, most of which are libraries.
GROWTH = 1.05


def peak(*arguments):
    """Return the peak memory of a command in bytes."""
    process = subprocess.Popen(
        [sys.executable, "-m", "featnorm", *map(str, arguments), "--device", "cpu", "--workers", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0, said.decode()
    return used.ru_maxrss * 1024


@pytest.fixture(scope="module")
def photographs(tmp_path_factory, size):
    """Create folders of n, 2n and 4n images."""
    root, n = tmp_path_factory.mktemp("photographs"), size(4_000, 300)
    random = np.random.default_rng(0)
    folders = {}
    for times in (1, 2, 4):
        folders[times * n] = root / str(times)
        folders[times * n].mkdir()
        for i in range(times * n):
            pixels = random.integers(0, 256, (32, 32, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folders[times * n] / f"{i:06}.jpg")
    return folders


@pytest.fixture(scope="module")
def detector(photographs, tmp_path_factory):
    file = tmp_path_factory.mktemp("detector") / "d.featnorm"
    fewest = photographs[min(photographs)]
    peak("fit", f"{fewest}[:200]", "--model", MODEL, "-o", file, "--cache", file.parent)
    return file


@pytest.fixture(scope="module")
def held(photographs, detector, tmp_path_factory):
    """Return a function that measures the peak memory of a command on a number of images, once."""
    out = tmp_path_factory.mktemp("out")

    @cache
    def ask(command, n):
        folder = photographs[n]
        if command == "score":
            return peak("score", detector, folder, "-o", out / "scores.csv")
        if command == "evaluate":
            sets = ("--fit", f"{folder}[:50%]", "--id", f"{folder}[50%:]", "--ood", f"{folder}[::2]")
            return peak("evaluate", "--model", MODEL, *sets, "--detector", "SSD", "--out", out / folder.name)
        return peak("fit", folder, "--model", MODEL, "-o", out / "f.featnorm", "--cache", out / f"cache-{n}")

    return ask


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("command", ["score", "evaluate", "fit"])
def test_growth(compare, photographs, held, command, times):
    least = min(photographs)
    more = (held(command, times * least) - held(command, least)) / ((times - 1) * least)
    compare.memory(
        f"featnorm {command}, {times * least:,} images",
        lambda: held(command, times * least),
        {f"{least:,} images": (lambda: held(command, least), None if command == "fit" else GROWTH)},
        sizes=f"32 x 32 pixels, {more:,.0f} bytes more for each image that is more",
    )


@pytest.fixture(scope="module")
def tables(tmp_path_factory, size):
    """Create files of n, 2n and 4n rows, each in one row group, and of a tenth as many texts; fit to the first."""
    root, n = tmp_path_factory.mktemp("tables"), size(100_000, 2_000)
    random = np.random.default_rng(0)
    files = {}
    for times in (1, 2, 4):
        vectors = random.random((times * n, 256), dtype=np.float32)
        column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), 256)
        words = [" ".join(map(str, random.integers(0, 999, 20))) for _ in range(times * n // 10)]
        for kind, values in (("rows", {"vector": column}), ("texts", {"text": words})):
            files[kind, times] = root / f"{kind}-{times}.parquet"
            pq.write_table(pa.table(values), files[kind, times])
    for kind in ("rows", "texts"):
        fit = ("fit", f"{files[kind, 1]}[:200]", "-o", root / f"{kind}.featnorm", "--cache", root / "cache")
        peak(*fit, "--head", "none")
    return files


@pytest.mark.parametrize("times", [2, 4])
@pytest.mark.parametrize("kind", ["rows", "texts"])
def test_growth_of_tables(compare, tables, kind, times):
    @cache
    def held(times):
        file = tables[kind, times]
        return peak("score", file.with_name(f"{kind}.featnorm"), file, "-o", file.with_suffix(".csv"))

    counts = {one: pq.read_metadata(tables[kind, one]).num_rows for one in (1, times)}
    compare.memory(
        f"featnorm score, {counts[times]:,} {kind}",
        lambda: held(times),
        {f"{counts[1]:,} {kind}": (lambda: held(1), GROWTH)},
        sizes="of 256 numbers, in one row group" if kind == "rows" else "of 20 numbers in words",
    )
