"""The memory of a command for n, 2n and 4n images, texts or rows, which must not grow with the items themselves.

`score`, `calibrate` and `evaluate` keep names and scores, and `fit` the features of all items. The models of
`wide` have features that are large enough to show.
"""

from functools import cache

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from measuring import command_peaks
from tiny_texts import WORDS, saved
from wide import WIDTH

# Of the memory of the whole process, most of which are libraries. The features of the items would be more.
GROWTH = 1.05
# Numbers per item in its features.
WIDTHS = {"images": WIDTH, "texts": 256, "rows": 256}
COMMANDS = {
    "images": ("score", "calibrate", "evaluate", "fit"),
    "texts": ("score", "fit"),
    "rows": ("score", "monitor", "fit"),
}
TIMES = (1, 2, 4)


def write(kind, path, count):
    """Write a folder of images, or a parquet file of texts or rows in one row group."""
    random = np.random.default_rng(count)
    if kind == "images":
        path.mkdir()
        for i in range(count):
            Image.fromarray(random.integers(0, 256, (32, 32, 3), np.uint8)).save(path / f"{i:06}.jpg")
        return
    if kind == "texts":
        values = [" ".join(random.choice(WORDS[4:], 20)) for _ in range(count)]
    else:
        vectors = random.random((count, WIDTHS[kind]), dtype=np.float32)
        values = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel()), WIDTHS[kind])
    pq.write_table(pa.table({"text" if kind == "texts" else "vector": values}), path, row_group_size=count)


def arguments(command, data, detector, model, out):
    plain = [*model, "--device", "cpu", "--workers", "0"]
    few = [*plain, "--engine", "torch"]
    runs = {
        "score": [detector, data, *plain, "-o", f"{out}.csv"],
        "calibrate": [detector, data, *few, "-o", f"{out}.featnorm"],
        "evaluate": [detector, "--id", f"{data}[50%:]", "--ood", f"{data}[::2]", *few, "--out", out],
        "monitor": [detector, f"{str(out).removesuffix('monitor')}score.csv"],
        "fit": [data, *few, "-o", f"{out}.featnorm", "--cache", out],
    }
    return [command, *map(str, runs[command])]


@pytest.fixture(scope="module")
def counts(size):
    return {"images": size(2_000, 300), "texts": size(2_000, 300), "rows": size(20_000, 2_000)}


@pytest.fixture(scope="module")
def peaks(tmp_path_factory, counts):
    """Return a function that measures the peak memory of the commands on n, 2n and 4n items of a kind, once."""
    root = tmp_path_factory.mktemp("memory")

    @cache
    def measured(kind):
        models = {"images": ["--model", "wide:images"], "texts": ["--model", f"hf:{root / 'bert'}"], "rows": []}
        if kind == "texts":
            saved(root / "bert", hidden_size=WIDTHS[kind], num_hidden_layers=1)
        model = models[kind]
        data = {n: root / f"{kind}-{n}{'' if kind == 'images' else '.parquet'}" for n in TIMES}
        for n, path in data.items():
            write(kind, path, n * counts[kind])
        detector = root / f"{kind}.featnorm"
        first = ["fit", f"{data[1]}[:300]", *model, "-o", str(detector)]
        # Twice on n items: the first run of a command imports what it needs, and exports the network.
        order = [(command, n) for command in COMMANDS[kind] for n in (0, *TIMES)]
        runs = [
            arguments(command, data[n or 1], detector, model, root / f"{kind}-{n}-{command}")
            for command, n in order
        ]
        return dict(zip(order, command_peaks([first, *runs], root)[1:], strict=True))

    return measured


@pytest.mark.parametrize("n", TIMES[1:])
@pytest.mark.parametrize(
    ("kind", "command"), [(kind, command) for kind, commands in COMMANDS.items() for command in commands]
)
def test_growth(compare, peaks, counts, kind, command, n):
    few, many = (f"{times * counts[kind]:,} {kind}" for times in (1, n))
    found = peaks(kind)
    more = (found[command, n] - found[command, 1]) / ((n - 1) * counts[kind])
    compare.memory(
        f"featnorm {command}, {many}",
        lambda: found[command, n],
        {few: (lambda: found[command, 1], None if command == "fit" else GROWTH)},
        sizes=f"{more:,.0f} bytes more per item, whose features are {4 * WIDTHS[kind]:,}",
    )


def test_a_million_rows(compare, tmp_path, size):
    count = size(1_000_000, 10_000)
    data, detector = tmp_path / "rows.parquet", tmp_path / "rows.featnorm"
    write("rows", data, count)
    fit = ["fit", f"{data}[:300]", "-o", str(detector)]
    score = arguments("score", data, detector, [], tmp_path / "scores")
    compare.memory(
        f"featnorm score, {count:,} rows",
        lambda: command_peaks([fit, score], tmp_path)[1],
        {"1.5 GB": (lambda: 1.5e9, 1)},
        sizes=f"{WIDTHS['rows']} numbers per row, in one row group of a parquet file",
    )
