"""The basis of the estimate in docs/scale.md: the bytes of one more image, and merging two fits."""

import os
import tracemalloc

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

import featnorm as fn
from featnorm.inputs import open_source
from featnorm.records import Journal
from featnorm.verdict import ItemVerdict

BATCH = 64


@pytest.fixture
def many(tmp_path, size):
    """Return a folder of files that are listed but not read, and their number."""
    n = size(50_000, 2_000)
    (tmp_path / "photographs").mkdir()
    first = tmp_path / "photographs" / "2026-11-26-camera-000000.jpg"
    first.write_bytes(b"no image")
    for i in range(1, n):
        os.link(first, first.with_name(f"2026-11-26-camera-{i:06}.jpg"))
    return first.parent, n


def held(make):
    """Return the memory of a result in bytes, as traced by Python."""
    tracemalloc.start()
    kept = make()
    size = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    del kept
    return size


def test_a_list_of_images(compare, many, tmp_path):
    folder, n = many
    table = pa.table({"image": [{"bytes": b"no image", "path": f"{i:06}.jpg"} for i in range(n)]})
    file = tmp_path / "shard.parquet"
    pq.write_table(table, file)
    open_source(str(file))  # imports
    compare.memory(
        f"a folder of {n:,} files, listed",
        lambda: held(lambda: open_source(str(folder))),
        {
            "as many bytes as files": (lambda: n, None),
            "a parquet file of as many rows": (lambda: held(lambda: open_source(str(file))), None),
        },
        sizes="names of 28 characters, of 10 in the parquet file",
    )


def test_a_verdict_on_disk(compare, tmp_path, size):
    n = size(64_000, 6_400)
    verdicts = [
        ItemVerdict(f"/photographs/2026-11-26-camera-{i:06}.jpg", 3.0 + i / 7, i / n, True, "cat", None)
        for i in range(n)
    ]

    def journal():
        with Journal(tmp_path / "scores.parquet", {}, BATCH) as opened:
            for number in range(n // BATCH):
                opened.add(number, verdicts[number * BATCH : (number + 1) * BATCH])
            length = opened.path.stat().st_size
            opened.write(tmp_path / "scores.parquet")
            opened.remove()
        return length

    compare.memory(
        f"{n:,} verdicts in the journal",
        journal,
        {
            "as many bytes as verdicts": (lambda: n, None),
            "the .parquet file made of it": (lambda: (tmp_path / "scores.parquet").stat().st_size, None),
        },
        sizes="paths of 40 characters",
    )


@pytest.mark.parametrize("detector", ["Mahalanobis()", "ViM()"])
def test_joining_fits(compare, size, detector):
    d, rows = size(2048, 128), size(8_192, 512)
    random = torch.Generator().manual_seed(0)
    weight = torch.randn(100, d, generator=random)
    pooled = torch.randn(rows, d, generator=random)
    features = fn.Features(
        pooled=pooled,
        logits=pooled @ weight.T,
        labels=torch.randint(100, (rows,), generator=random),
        classifier=(weight, None),
    )
    part, whole = (fn.parse_detector(detector).fit(features) for _ in range(2))
    compare.time(
        f"{detector}, joining a fit",
        lambda: whole.merge(part),
        {f"the fit of {rows:,} rows": (lambda: fn.parse_detector(detector).fit(features), None)},
        rounds=5,
        sizes=f"d = {d}, {sum(b.numel() * b.element_size() for b in part.buffers()) / 1e6:.0f} MB to send",
    )
