import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from filelock import FileLock
from PIL import Image
from torch import Tensor

from featnorm.data import CachedFeatures, DataError, FeatureCache, ImageSource, extract_images, open_images

BATCH = 4


def to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


class Backbone:
    """Three features of an image; notes which it was asked for, and dies before a batch."""

    def __init__(self, die_at: int | None = None) -> None:
        self.asked: list[list[int]] = []
        self.die_at = die_at

    def __call__(self, images: Tensor) -> Tensor:
        if self.die_at == len(self.asked):
            raise KeyboardInterrupt
        self.asked.append([int(red) for red in images[:, 0, 0, 0]])
        return images.mean((2, 3)) / 7


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
        return extract_images(images, to_tensor, backbone, batch_size=BATCH, workers=workers)

    return cache.features(source, extract, progress=False)


@pytest.mark.parametrize("workers", [0, 2])
def test_every_content_is_asked_for_once(folder: Path, tmp_path: Path, workers: int) -> None:
    source = open_images(str(folder))
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
def test_a_killed_one_goes_on_with_the_same_batches(folder: Path, tmp_path: Path, die_at: int, torn: str) -> None:
    source = open_images(str(folder))
    whole = Backbone()
    wanted = ask(FeatureCache(tmp_path / "whole", "key"), source, whole)
    cache = FeatureCache(tmp_path / "killed", "key")
    first, second = Backbone(die_at), Backbone()
    with pytest.raises(KeyboardInterrupt):
        ask(cache, source, first)
    # What a process leaves that dies while it writes.
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


def test_a_changed_image_is_seen_and_a_moved_one_is_known(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "key")
    ask(cache, open_images(str(folder)), Backbone())
    before = (folder / "08.png").stat()
    paint(folder / "08.png", 200)
    os.utime(folder / "08.png", ns=(before.st_atime_ns, before.st_mtime_ns))
    (folder / "10.png").rename(folder / "99.png")
    paint(folder / "04.png", 77)  # was corrupt
    backbone = Backbone()
    found = ask(cache, open_images(str(folder)), backbone)
    assert backbone.asked == [[77, 200]]
    assert {round(7 * float(red)) for red in found.values[:, 0]} >= {77, 200, 10}
    assert 8 not in {round(7 * float(red)) for red in found.values[:, 0]}


def test_what_could_not_be_read_is_tried_again(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from featnorm.data import images

    def busy(*_: object, **__: object) -> None:
        raise OSError(24, "Too many open files")

    cache = FeatureCache(tmp_path / "cache", "key")
    source = open_images(str(folder))
    with monkeypatch.context() as patch:
        patch.setattr(images.Image, "open", busy)
        with pytest.raises(DataError, match="Too many open files"):
            ask(cache, source, Backbone())
    assert 8 in ask(cache, source, Backbone()).rows
    lines = (cache.folder / "index.jsonl").read_text()
    ask(cache, source, Backbone())
    assert (cache.folder / "index.jsonl").read_text() == lines


def test_parquet_and_slices(shared_data: Path, tmp_path: Path) -> None:
    source = open_images("tiny_imagenet:val[:40]", root=shared_data)
    cache = FeatureCache(tmp_path, "key")
    found = ask(cache, source, Backbone())
    assert found.computed == len(found.rows) == 40
    assert found.digests[3] == open_images("tiny_imagenet:val", root=shared_data).digest(3)
    assert ask(cache, open_images("tiny_imagenet:val[10:30]", root=shared_data), Backbone()).computed == 0


def test_what_is_refused(folder: Path, tmp_path: Path) -> None:
    source = open_images(str(folder))
    cache = FeatureCache(tmp_path / "cache", "key")
    with pytest.raises(DataError, match=r"returned \(2, 3, 4, 5\) for 2 images, not features"):
        ask(cache, source, lambda images: images)
    with pytest.raises(DataError, match=r"feature of .*00.png is not finite"):
        ask(cache, source, lambda x: x.mean((2, 3)).log() - torch.inf)
    with FileLock(cache.folder / "lock"), pytest.raises(DataError, match="another process is at work"):
        ask(cache, source, Backbone())
    ask(cache, source, Backbone())
    index = (cache.folder / "index.jsonl").read_text()
    (cache.folder / "features.f32").write_bytes(b"\0" * 12)
    with pytest.raises(DataError, match="features missing: delete it"):
        ask(cache, source, Backbone())
    (cache.folder / "index.jsonl").write_text(index.replace(":", ";", 1))
    with pytest.raises(DataError, match="damaged: delete it"):
        ask(cache, source, Backbone())
    for file in folder.iterdir():
        file.write_bytes(b"broken")
    with pytest.raises(DataError, match=r"none of the 20 images of images can be read; .*00.png: not an image"):
        ask(FeatureCache(tmp_path / "none", "key"), open_images(str(folder)), Backbone())


def test_an_image_that_cannot_be_opened_is_named_and_tried_again(folder: Path, tmp_path: Path) -> None:
    cache = FeatureCache(tmp_path / "cache", "key")
    source = open_images(str(folder))
    (folder / "08.png").rename(tmp_path / "away.png")
    found = ask(cache, source, Backbone())
    assert "No such file or directory" in dict(found.corrupt)[str(folder / "08.png")]
    assert 8 not in found.rows
    (tmp_path / "away.png").rename(folder / "08.png")
    assert 8 in ask(cache, source, Backbone()).rows
    assert all(json.loads(line) for line in (cache.folder / "index.jsonl").read_text().splitlines())


def test_features_of_one_pass_stay_in_the_file(folder: Path, tmp_path: Path) -> None:
    source = open_images(str(folder))
    known = ask(FeatureCache(tmp_path / "cache", "key"), source, Backbone())
    # Image 15 is a copy of 9, so that the places are not one after the other.
    assert not torch.equal(known.places, torch.arange(len(known.places)))
    parts = list(known.batches(5))
    assert [len(part) for part in parts] == [5, 5, 3]
    assert torch.equal(torch.cat(parts), known.values)
    (folder / "15.png").unlink()
    known = ask(FeatureCache(tmp_path / "cache", "key"), open_images(str(folder)), Backbone())
    assert known.values.data_ptr() == known.stored.data_ptr()
    before = known.values.clone()
    known.values.zero_()  # whoever changes them does not change the file
    again = ask(FeatureCache(tmp_path / "cache", "key"), open_images(str(folder)), Backbone())
    assert torch.equal(again.values, before)
