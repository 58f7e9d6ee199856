import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from featnorm._utils.files import WriteError
from featnorm.inputs import (
    CachedFeatures,
    DataError,
    Extracted,
    FeatureCache,
    ImageSource,
    cache,
    extract_features,
    open_source,
)

BATCH = 4


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


class Backbone:
    """Computes features, records its inputs, and raises before a given batch."""

    def __init__(self, die_at: int | None = None, width: int = 3) -> None:
        self.asked: list[list[int]] = []
        self.die_at = die_at
        self.width = width

    def __call__(self, images: Tensor) -> Tensor:
        if self.die_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append([int(red) for red in images[:, 0, 0, 0]])
        return (images.mean((2, 3)) / 7).repeat(1, self.width // 3)


def paint(file: Path, red: int) -> None:
    Image.new("RGB", (5, 4), (red, 3, 9)).save(file)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty images, of which 2, 3 and the second batch and 19 are corrupt; 9 and 15 are the same."""
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(20):
        if i in (2, 3, 4, 5, 6, 7, 19):
            (folder / f"{i:02}.png").write_bytes(f"broken {i}".encode())
        else:
            paint(folder / f"{i:02}.png", 9 if i == 15 else i)
    return folder


def ask(
    cache: FeatureCache, source: ImageSource, backbone: Callable[[Tensor], Tensor], workers: int = 0
) -> CachedFeatures:
    def extract(images):
        return extract_features(images, to_tensor, backbone, batch_size=BATCH, workers=workers)

    return cache.features(source, extract, progress=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_features_are_computed_once_per_content(folder: Path, tmp_path: Path, workers: int) -> None:
    source = open_source(str(folder))
    cache = FeatureCache(tmp_path / "cache", "key")
    backbone = Backbone()
    found = ask(cache, source, backbone, workers)
    good = [i for i in range(20) if i not in (2, 3, 4, 5, 6, 7, 19)]
    assert found.rows.tolist() == good
    assert [round(7 * float(red)) for red in found.values[:, 0]] == [9 if i == 15 else i for i in good]
    assert found.values.dtype == torch.float32
    assert [Path(name).stem for name, _ in found.corrupt] == ["02", "03", "04", "05", "06", "07", "19"]
    assert all(why for _, why in found.corrupt)
    assert found.digests[good.index(9)] == found.digests[good.index(15)]
    assert len(set(found.digests)) == len(good) - 1
    assert found.computed == sum(map(len, backbone.asked)) == 12
    again = Backbone()
    second = ask(FeatureCache(tmp_path / "cache", "key"), source, again)
    assert (again.asked, second.computed) == ([], 0)
    assert torch.equal(second.values, found.values)
    assert second.corrupt == found.corrupt
    other = Backbone()
    ask(FeatureCache(tmp_path / "cache", "another key"), source, other)
    assert other.asked == backbone.asked


@pytest.mark.parametrize("die_at", [0, 1, 2])
@pytest.mark.parametrize("torn", ["nothing", "features", "index"])
def test_a_killed_process_resumes_with_the_same_batches(
    folder: Path, tmp_path: Path, die_at: int, torn: str
) -> None:
    source = open_source(str(folder))
    whole = Backbone()
    wanted = ask(FeatureCache(tmp_path / "whole", "key"), source, whole)
    cache = FeatureCache(tmp_path / "killed", "key")
    first, second = Backbone(die_at), Backbone()
    with pytest.raises(KeyboardInterrupt):
        ask(cache, source, first)
    # As left by a process that was killed while writing.
    if torn != "nothing":
        with (cache.folder / "features.f32").open("ab") as file:
            file.write(b"\1" * (4 * 3 * 3 + 2))
    if torn == "index":
        with (cache.folder / "index.jsonl").open("a") as file:
            file.write('{"width": 3, "digests": ["00')
    found = ask(cache, source, second)
    assert first.asked + second.asked == whole.asked
    assert torch.equal(found.values, wanted.values)
    assert (found.rows.tolist(), found.corrupt) == (wanted.rows.tolist(), wanted.corrupt)
    again = ask(cache, source, Backbone())
    assert (again.computed, again.damaged) == (0, 0)


def test_a_changed_image_is_computed_again_but_a_moved_one_is_not(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "key")
    ask(cache, open_source(str(folder)), Backbone())
    before = (folder / "08.png").stat()
    paint(folder / "08.png", 200)
    os.utime(folder / "08.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "10.png").rename(folder / "99.png")
    paint(folder / "04.png", 77)  # was corrupt
    backbone = Backbone()
    found = ask(cache, open_source(str(folder)), backbone)
    assert backbone.asked == [[77, 200]]
    assert {round(7 * float(red)) for red in found.values[:, 0]} >= {77, 200, 10}
    assert 8 not in {round(7 * float(red)) for red in found.values[:, 0]}


def test_unreadable_images_are_tried_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from featnorm.inputs import images

    def busy(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    cache = FeatureCache(tmp_path / "cache", "key")
    source = open_source(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(images.Image, "open", busy)
        with pytest.raises(DataError, match="Too many open files"):
            ask(cache, source, Backbone())
    assert 8 in ask(cache, source, Backbone()).rows
    lines = (cache.folder / "index.jsonl").read_text()
    ask(cache, source, Backbone())
    assert (cache.folder / "index.jsonl").read_text() == lines


def test_parquet_and_slices(shared_data: Path, tmp_path: Path) -> None:
    source = open_source("tiny_imagenet:val[:40]", root=shared_data)
    cache = FeatureCache(tmp_path, "key")
    found = ask(cache, source, Backbone())
    assert found.computed == len(found.rows) == 40
    assert found.digests[3] == open_source("tiny_imagenet:val", root=shared_data).digest(3)
    assert ask(cache, open_source("tiny_imagenet:val[10:30]", root=shared_data), Backbone()).computed == 0


def test_errors(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    cache = FeatureCache(tmp_path / "cache", "key")
    with pytest.raises(DataError, match=r"returned \(2, 3, 4, 5\) for 2 images, not features"):
        ask(cache, source, lambda images: images)
    with pytest.raises(DataError, match=r"feature of .*00.png is not finite"):
        ask(cache, source, lambda x: x.mean((2, 3)).log() - torch.inf)
    with (
        FileLock(cache.folder / "lock"),
        pytest.raises(DataError, match=r"another process uses the cache .*: wait"),
    ):
        ask(cache, source, Backbone())
    ask(cache, source, Backbone())
    for file in folder.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of the 20 images of images can be read; .*00.png: not an image"):
        ask(FeatureCache(tmp_path / "none", "key"), open_source(str(folder)), Backbone())


def test_an_image_that_cannot_be_opened_is_reported_and_tried_again(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "key")
    source = open_source(str(folder))
    (folder / "08.png").rename(tmp_path / "away.png")
    found = ask(cache, source, Backbone())
    assert "No such file or directory" in dict(found.corrupt)[str(folder / "08.png")]
    assert 8 not in found.rows
    (tmp_path / "away.png").rename(folder / "08.png")
    assert 8 in ask(cache, source, Backbone()).rows
    assert all(json.loads(line) for line in (cache.folder / "index.jsonl").read_text().splitlines())


def test_features_of_one_pass_are_memory_mapped(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    known = ask(FeatureCache(tmp_path / "cache", "key"), source, Backbone())
    # Image 15 is a copy of 9, so that the rows are not consecutive.
    assert not torch.equal(known.stored_rows, torch.arange(len(known.stored_rows)))
    parts = list(known.batches(5))
    assert [len(part) for part in parts] == [5, 5, 3]
    assert torch.equal(torch.cat(parts), known.values)
    (folder / "15.png").unlink()
    known = ask(FeatureCache(tmp_path / "cache", "key"), open_source(str(folder)), Backbone())
    assert known.values.data_ptr() == known.stored.data_ptr()
    before = known.values.clone()
    known.values.zero_()  # changes do not reach the file
    again = ask(FeatureCache(tmp_path / "cache", "key"), open_source(str(folder)), Backbone())
    assert torch.equal(again.values, before)


@pytest.mark.parametrize("workers", [0, 2])
def test_files_that_are_replaced_meanwhile(folder: Path, tmp_path: Path, workers: int) -> None:
    known = FeatureCache(tmp_path / "cache", "key")
    source = open_source(str(folder))
    before = {row: (folder / f"{row:02}.png").read_bytes() for row in range(20)}

    def extract(images: ImageSource) -> Iterator[Extracted]:
        paint(folder / "08.png", 200)
        paint(folder / "09.png", 201)  # 15 is no longer a copy of it
        (folder / "10.png").write_bytes(b"half of an upload")
        (folder / "11.png").unlink(missing_ok=True)
        paint(folder / "12.png", 13)  # the content of another image
        paint(folder / "04.png", 77)  # was corrupt
        return extract_features(images, to_tensor, Backbone(), batch_size=BATCH, workers=workers)

    found = known.features(source, extract, progress=False)
    rows = [0, 1, 4, 8, 9, 12, 13, 14, 15, 16, 17, 18]
    reds = [0, 1, 77, 200, 201, 13, 13, 14, 9, 16, 17, 18]
    assert found.rows.tolist() == rows
    assert [round(7 * float(red)) for red in found.values[:, 0]] == reds
    # The cache has the features of the new content, under its digest.
    assert found.digests == [source.digest(row) for row in rows]
    assert {Path(name).stem for name, _ in found.corrupt} == {"02", "03", "05", "06", "07", "10", "11", "19"}
    assert found.changed == 5
    # The backbone never saw the content that was replaced.
    for row, content in before.items():
        (folder / f"{row:02}.png").write_bytes(content)
    again = Backbone()
    restored = ask(known, source, again)
    assert [red for batch in again.asked for red in batch] == [8, 10, 11, 12]
    assert restored.changed == 0
    assert torch.equal(restored.values, ask(FeatureCache(tmp_path / "other", "key"), source, Backbone()).values)


def zero_the_second_batch(folder: Path, *_: Path) -> None:
    with (folder / "features.f32").open("r+b") as file:
        file.seek(2 * 3 * 4)
        file.write(bytes(2 * 3 * 4))


def cut_the_features(folder: Path, *_: Path) -> None:
    os.truncate(folder / "features.f32", 7 * 3 * 4 + 5)


def lose_the_features(folder: Path, *_: Path) -> None:
    (folder / "features.f32").unlink()


def lose_the_index(folder: Path, *_: Path) -> None:
    (folder / "index.jsonl").unlink()


def swap_two_rows(folder: Path, *_: Path) -> None:
    rows = np.memmap(folder / "features.f32", np.float32, "r+").reshape(-1, 3)
    rows[[4, 5]] = rows[[5, 4]]


def _lines(folder: Path, change: Callable[[list[bytes]], list[bytes]]) -> None:
    index = folder / "index.jsonl"
    index.write_bytes(b"".join(change(index.read_bytes().splitlines(keepends=True))))


def swap_two_lines(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [lines[0], lines[3], lines[2], lines[1]])


def lose_a_line(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines[:2], *lines[3:]])


def double_a_line(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines, lines[1]])


def change_a_digit(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines[:2], lines[2].replace(b'"start": 6', b'"start": 2'), *lines[3:]])


def change_the_last_byte(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines[:2], lines[2][:-3] + b'0"\n', *lines[3:]])


def blank_a_line(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines[:2], b"\n", *lines[3:]])


def zero_a_line(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines[:2], bytes(len(lines[2]) - 1) + b"\n", *lines[3:]])


def cut_a_line(folder: Path, *_: Path) -> None:
    _lines(folder, lambda lines: [*lines[:2], lines[2][:40], *lines[3:]])


def take_lines_of_another_backbone(folder: Path, other: Path) -> None:
    for name in ("index.jsonl", "features.f32"):
        shutil.copyfile(other / name, folder / name)


@pytest.mark.parametrize(
    ("damage", "damaged", "asked"),
    [
        (zero_the_second_batch, 1, [1]),
        (cut_the_features, 2, [2, 3]),
        (lose_the_features, 4, [0, 1, 2, 3]),
        (lose_the_index, 0, [0, 1, 2, 3]),
        (swap_two_rows, 1, [1]),
        (swap_two_lines, 0, []),
        (lose_a_line, 0, [2]),
        (double_a_line, 0, []),
        (change_a_digit, 1, [2]),
        (change_the_last_byte, 1, [2]),
        (blank_a_line, 1, [2]),
        (zero_a_line, 1, [2]),
        (cut_a_line, 1, [2, 3]),
        (take_lines_of_another_backbone, 4, [0, 1, 2, 3]),
    ],
)
def test_a_damaged_cache_is_repaired(
    tmp_path: Path, damage: Callable[[Path, Path], None], damaged: int, asked: list[int]
) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(14):
        paint(folder / f"{i:02}.png", i)
    # Batches of 4; two images of the first are corrupt.
    for i in (1, 3):
        (folder / f"{i:02}.png").write_bytes(f"broken {i}".encode())
    source = open_source(str(folder))
    known = FeatureCache(tmp_path / "cache", "key")
    backbone = Backbone()
    whole = ask(known, source, backbone)
    size = (known.folder / "features.f32").stat().st_size
    other = FeatureCache(tmp_path / "cache", "another key")
    ask(other, source, lambda images: -Backbone()(images))
    damage(known.folder, other.folder)
    again = Backbone()
    found = ask(FeatureCache(tmp_path / "cache", "key"), source, again)
    # Only the batches of these images.
    assert again.asked == [backbone.asked[i] for i in asked]
    assert found.damaged == damaged
    assert torch.equal(found.values, whole.values)
    assert torch.equal(found.stored_rows, whole.stored_rows)
    assert (found.rows.tolist(), found.digests, found.corrupt) == (
        whole.rows.tolist(),
        whole.digests,
        whole.corrupt,
    )
    assert (known.folder / "features.f32").stat().st_size == size
    # The cache is repaired.
    again = Backbone()
    found = ask(known, source, again)
    assert (again.asked, found.damaged) == ([], 0)
    assert torch.equal(found.values, whole.values)


def test_a_power_cut_loses_at_most_the_current_batch(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = FeatureCache(tmp_path / "cache", "key")
    source = open_source(str(folder))
    # The disk has the content of the last flush.
    durable: dict[str, bytes] = {}
    folders: list[Path] = []
    flush_to_disk, sync_folder = cache.flush_to_disk, cache.sync_folder

    def flushed(file) -> None:
        flush_to_disk(file)
        durable[Path(file.name).name] = Path(file.name).read_bytes()
        # The content is complete at any time.
        after_the_cut(len(durable["index.jsonl"].splitlines()) if "index.jsonl" in durable else 0)

    def after_the_cut(batches: int) -> None:
        place = FeatureCache(tmp_path / "after", "key").folder
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        for name, content in durable.items():
            (place / name).write_bytes(content)
        with monkeypatch.context() as patch:
            patch.setattr(cache, "flush_to_disk", flush_to_disk)
            store = cache._Store(place, True)
        with store:
            assert store.damaged == 0
            assert len({*store.rows, *store.corrupt}) == sum(sizes[:batches])

    def synced(place: Path) -> None:
        sync_folder(place)
        folders.append(Path(place))

    sizes = [4, 4, 4, 4, 3]  # images per batch; the last is short because of a copy
    monkeypatch.setattr(cache, "flush_to_disk", flushed)
    monkeypatch.setattr(cache, "sync_folder", synced)
    ask(known, source, Backbone())
    assert len(durable["index.jsonl"].splitlines()) == len(sizes)
    assert {known.folder, known.folder.parent} <= set(folders)


@pytest.mark.parametrize("width", [3, 3000])
def test_a_full_disk_is_reported_and_loses_nothing(folder: Path, tmp_path: Path, width: int) -> None:
    resource = pytest.importorskip("resource")
    source = open_source(str(folder))
    whole = Backbone(width=width)
    wanted = ask(FeatureCache(tmp_path / "whole", "key"), source, whole)
    files = [(FeatureCache(tmp_path / "whole", "key").folder / name) for name in ("features.f32", "index.jsonl")]
    # A limit that the third batch of the larger file exceeds.
    larger = max(files, key=lambda file: file.stat().st_size)
    limit = larger.stat().st_size // 2
    known = FeatureCache(tmp_path / "full", "key")
    first, second = Backbone(width=width), Backbone(width=width)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
    try:
        with pytest.raises(WriteError) as caught:
            ask(known, source, first)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert str(caught.value).startswith(f"cannot write {known.folder / larger.name}: File too large (")
    assert "\n" not in str(caught.value)
    found = ask(known, source, second)
    assert 0 < len(second.asked) < len(whole.asked)
    # Only the incomplete batch is computed again.
    assert first.asked[:-1] + second.asked == whole.asked
    again = ask(known, source, Backbone())
    assert (found.damaged, again.damaged, again.computed) == (0, 0, 0)
    assert torch.equal(found.values, wanted.values)


def test_a_folder_that_cannot_be_written_is_reported_before_the_work(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = open_source(str(folder))

    def never(*_: object) -> bytes:
        raise AssertionError("the work has begun")

    monkeypatch.setattr(source, "digest", never)
    (tmp_path / "file").touch()
    with pytest.raises(WriteError, match=r"cannot write .*file.3-[0-9a-f]{32}: "):
        ask(FeatureCache(tmp_path / "file", "key"), source, never)
    for name in ("lock", "features.f32", "index.jsonl"):
        known = FeatureCache(tmp_path / name, "key")
        (known.folder / name).mkdir(parents=True)
        with pytest.raises(WriteError, match=rf"cannot write .*{name}: "):
            ask(known, source, never)


def test_a_cache_of_an_earlier_format_is_not_read(folder: Path, tmp_path: Path) -> None:
    known = FeatureCache(tmp_path, "key")
    assert known.folder.name.startswith("3-")
    old = tmp_path / known.folder.name.replace("3-", "2-", 1)
    old.mkdir()
    (old / "index.jsonl").write_text('{"width": 3, "digests": [], "corrupt": []}\n')
    assert ask(known, open_source(str(folder)), Backbone()).damaged == 0
