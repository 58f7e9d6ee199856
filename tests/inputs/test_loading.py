import copy
import ctypes
import io
import os
import shutil
import subprocess
import textwrap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from apart import command, start
from featnorm.inputs import Batch, DataError, extract_features, loading, open_source, source_loader


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def fails_on_seven(image: Image.Image) -> Tensor:
    tensor = to_tensor(image)
    if tensor[0, 0, 0] == 7:
        raise KeyError("seven")
    return tensor


def returns_the_image(image: Image.Image) -> Image.Image:
    return image


def never(name: str, reason: str) -> None:
    raise AssertionError(f"{name} is not corrupt ({reason})")


def write_folder(folder: Path, count: int, corrupt: tuple[int, ...] = ()) -> Path:
    folder.mkdir()
    for i in range(count):
        if i in corrupt:
            (folder / f"{i:02}.png").write_bytes(b"broken")
        else:
            Image.new("RGB", (5, 4), (i, 0, 0)).save(folder / f"{i:02}.png")
    return folder


def reds(batches: list[Batch]) -> list[int]:
    return [int(v) for batch in batches for v in batch.inputs[:, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_are_in_order_without_corrupt_images(tmp_path: Path, workers: int) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 10, corrupt=(1, 3, 4, 5, 9))))
    corrupt: list[tuple[str, str]] = []
    loader = source_loader(
        source, to_tensor, batch_size=3, workers=workers, on_corrupt=lambda *pair: corrupt.append(pair)
    )
    assert len(loader) == 4
    batches = list(loader)
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [6, 7, 8]]
    assert reds(batches) == [0, 2, 6, 7, 8]
    assert batches[0].inputs.shape == (2, 3, 4, 5)
    assert [batch.labels.tolist() for batch in batches] == [[-1, -1], [-1, -1, -1]]
    assert batches[0].labels.dtype == batches[0].indices.dtype == torch.int64
    assert [Path(name).name for name, _ in corrupt] == [f"{i:02}.png" for i in (1, 3, 4, 5, 9)]
    assert {reason for _, reason in corrupt} == {"not an image in a format that featnorm reads"}
    assert reds(list(loader)) == [0, 2, 6, 7, 8]
    assert len(corrupt) == 10


@pytest.mark.parametrize("workers", [0, 2])
def test_digests_are_those_of_the_decoded_content(tmp_path: Path, workers: int) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 6, corrupt=(1, 4))))
    (tmp_path / "f" / "05.png").unlink()
    parts = list(source_loader(source, to_tensor, batch_size=4, workers=workers).parts())
    found = {row: digest for part in parts for row, digest in part.digests.items()}
    assert found == {row: source.digest(row) for row in range(5)}
    assert sorted(row for part in parts for row in part.unread) == [1, 4, 5]


def test_parquet_in_threads(tmp_path: Path) -> None:
    images = []
    for i in range(24):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": images, "label": list(range(24))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = open_source(str(tmp_path / "a.parquet"))
    source.item(13)  # what this thread has read must not disturb the others
    # A copy begins without what was read.
    for loaded in (source, copy.deepcopy(source)):
        batches = list(source_loader(loaded, to_tensor, batch_size=4, workers=3, on_corrupt=never))
        assert reds(batches) == list(range(24))
        assert [int(label) for batch in batches for label in batch.labels] == list(range(24))


def test_threads_leave_torch_as_it_is_and_end(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 30)))
    inside: set[int] = set()

    def transform(image: Image.Image) -> Tensor:
        inside.add(torch.get_num_threads())
        return to_tensor(image)

    def of_a_new_thread() -> int:
        found: list[int] = []
        thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
        thread.start()
        thread.join()
        return found[0]

    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        loader = iter(source_loader(source, transform, batch_size=2, workers=2))
        next(loader)
        # With torch's threads in each of ours, there would be the square of the number of CPUs.
        assert inside == {1}
        assert (torch.get_num_threads(), of_a_new_thread()) == (3, 3)
        loader.close()  # the caller needs no more batches
    finally:
        torch.set_num_threads(before)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("featnorm-images")]


def test_an_abandoned_loader_stops_reading(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 60)))
    go_on = threading.Event()
    read: list[int] = []

    def transform(image: Image.Image) -> Tensor:
        read.append(1)
        assert len(read) <= 20 or go_on.wait(60)
        return to_tensor(image)

    class Pool(ThreadPoolExecutor):
        def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
            go_on.set()
            super().shutdown(wait, cancel_futures=cancel_futures)

    monkeypatch.setattr(loading, "ThreadPoolExecutor", Pool)
    loader = iter(source_loader(source, transform, batch_size=20, workers=1))
    assert len(next(loader).inputs) == 20
    # As after an interrupt: the thread ends after its current image, not after its batch.
    with pytest.raises(KeyboardInterrupt):
        loader.throw(KeyboardInterrupt)
    assert len(read) <= 21


def test_plugins_are_loaded_before_threads_begin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """If a thread opens an image while another loads the plugins, its format would be unknown."""
    calls: list[threading.Thread] = []
    monkeypatch.setattr(Image, "init", lambda: calls.append(threading.current_thread()))
    source = open_source(str(write_folder(tmp_path / "f", 8)))
    assert len(list(source_loader(source, to_tensor, batch_size=2, workers=2))) == 4
    assert calls == [threading.current_thread()]


def test_an_error_of_the_source_is_raised_unchanged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 8)))

    def gone(i: int) -> None:
        raise DataError("cannot read row group 3")

    monkeypatch.setattr(source, "read", gone)
    with pytest.raises(DataError) as caught:
        list(source_loader(source, to_tensor, batch_size=2, workers=2))
    assert str(caught.value) == "cannot read row group 3"


@pytest.mark.parametrize("workers", [0, 1])
def test_failing_transform_is_raised_and_names_the_image(tmp_path: Path, workers: int) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 10)))
    loader = iter(source_loader(source, fails_on_seven, batch_size=4, workers=workers, on_corrupt=never))
    assert next(loader).indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"the transform failed on .*07\.png \(KeyError: 'seven'\)") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert "in fails_on_seven" in caught.value.__notes__[0]


def test_different_shapes_in_a_batch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 4)
    Image.new("RGB", (9, 4)).save(folder / "02.png")
    source = open_source(str(folder))
    with pytest.raises(
        DataError, match=r"02\.png has shape \(3, 4, 9\) .* \(3, 4, 5\): use a transform that resizes"
    ):
        list(source_loader(source, to_tensor, on_corrupt=never))
    assert len(list(source_loader(source, to_tensor, batch_size=1, on_corrupt=never))) == 4


def test_transform_must_return_a_tensor(tmp_path: Path) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 1)))
    with pytest.raises(DataError, match=r"returned Image for .*00\.png: it must return a Tensor"):
        list(source_loader(source, returns_the_image, on_corrupt=never))  # type: ignore[arg-type]


def test_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(str(write_folder(tmp_path / "f", 3)))
    assert source_loader(source, to_tensor, on_corrupt=never)._workers == 0
    monkeypatch.setattr(loading, "_MIN_THREADED", 3)
    monkeypatch.setattr(loading, "_processors", lambda: 1)
    assert source_loader(source, to_tensor, on_corrupt=never)._workers == 1
    with pytest.raises(ValueError, match="batch_size is 0"):
        source_loader(source, to_tensor, batch_size=0, on_corrupt=never)


def test_real_data_with_workers(shared_data: Path) -> None:
    source = open_source("cifar10[900:2100]", root=shared_data)
    batches = list(source_loader(source, to_tensor, batch_size=250, on_corrupt=never))
    assert [len(batch.inputs) for batch in batches] == [250, 250, 250, 250, 200]
    assert [int(i) for batch in batches for i in batch.labels] == [source.label(i) for i in range(1200)]
    assert torch.equal(batches[4].inputs[199], to_tensor(source.item(1199)))


def test_fit_and_score_in_little_shared_memory(tmp_path: Path) -> None:
    """A container has 64 MB of shared memory by default, and a batch may need more."""
    private = ["unshare", "--mount"]
    if not shutil.which("unshare") or subprocess.run([*private, "true"], capture_output=True).returncode:
        pytest.skip("only root can mount a small /dev/shm here")
    folder = tmp_path / "images"
    folder.mkdir()
    random = np.random.default_rng(0)
    for i in range(loading._MIN_THREADED):
        Image.fromarray(random.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(folder / f"{i:03}.png")
    model = """
        import numpy as np
        import torch

        def make():
            torch.manual_seed(0)
            layers = torch.nn.Conv2d(3, 8, 3), torch.nn.ReLU(), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten()
            return torch.nn.Sequential(*layers), lambda image: torch.tensor(np.array(image)).permute(2, 0, 1) / 255
    """
    (tmp_path / "tiny.py").write_text(textwrap.dedent(model))

    own = ("--model", "tiny:make", "--device", "cpu")

    def run() -> None:
        assert ctypes.CDLL(None).unshare(0x20000) == 0  # CLONE_NEWNS
        # A quarter of a batch.
        for mount in ("--make-rprivate /", "-t tmpfs -o size=192k tmpfs /dev/shm"):
            subprocess.run(["mount", *mount.split()], check=True)
        os.chdir(tmp_path)
        for arguments in (
            ("fit", folder, "--cache", "cache", "-o", "a.featnorm", *own),
            ("score", "a.featnorm", folder, "-o", "scores.csv", *own),
        ):
            try:
                command(*arguments)
            except SystemExit as end:
                if end.code:
                    raise

    process = start(run, out=tmp_path / "out", error=tmp_path / "log")
    process.join(240)
    assert process.exitcode == 0, (tmp_path / "log").read_text("utf-8")
    assert len((tmp_path / "scores.csv").read_text().splitlines()) == 1 + loading._MIN_THREADED


def test_first_frames_are_reported_wherever_a_part_begins(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 5, corrupt=(1,))
    frames = [Image.new("RGB", (5, 4), (value, 0, 0)) for value in (3, 200)]
    frames[0].save(folder / "03.png", save_all=True, append_images=frames[1:])
    source = open_source(str(folder))
    parts = list(extract_features(source, to_tensor, lambda images: images.flatten(1), batch_size=2, workers=0))
    assert [part.several for part in parts] == [set(), {3}, set()]
    assert parts[1].moved(10).several == {11}


@pytest.mark.parametrize(("seconds", "expected"), [({8: 1.0, 64: 9.0}, [8] * 8), ({8: 2.0, 64: 9.0}, [64])])
def test_a_network_runs_as_many_images_at_once_as_take_the_least_time(monkeypatch, seconds, expected):
    clock = [0.0]
    monkeypatch.setattr(loading.time, "perf_counter", lambda: clock[0])
    ran = []

    def network(images, rows):
        ran.append(len(images))
        clock[0] += seconds[8] if len(images) <= 8 else seconds[64] * len(images) / 64
        return images + rows[:, None]

    passes = loading.PassSize()
    for size in (64, 10, 64, 64, 64):
        ran.clear()
        images, rows = torch.rand(size, 2), torch.arange(size)
        assert torch.equal(loading.over_parts(network, images, rows, passes=passes), images + rows[:, None])
        if size == 10:
            assert ran == ([8, 2] if expected[0] == 8 else [10])
    assert ran == expected
