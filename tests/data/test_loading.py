import io
import multiprocessing
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import Tensor

from featnorm.data import DataError, ImageBatch, image_loader, loading, open_images


class ToTensor:
    """A transform that can be sent to a spawned process."""

    def __call__(self, image: Image.Image) -> Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def fails_on_seven(image: Image.Image) -> Tensor:
    tensor = ToTensor()(image)
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


def reds(batches: list[ImageBatch]) -> list[int]:
    return [int(v) for batch in batches for v in batch.images[:, 0, 0, 0]]


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_in_order_without_the_corrupt(tmp_path: Path, workers: int) -> None:
    source = open_images(str(write_folder(tmp_path / "f", 10, corrupt=(1, 3, 4, 5, 9))))
    corrupt: list[tuple[str, str]] = []
    loader = image_loader(
        source, ToTensor(), batch_size=3, workers=workers, on_corrupt=lambda *pair: corrupt.append(pair)
    )
    assert len(loader) == 4
    batches = list(loader)
    assert [batch.indices.tolist() for batch in batches] == [[0, 2], [6, 7, 8]]
    assert reds(batches) == [0, 2, 6, 7, 8]
    assert batches[0].images.shape == (2, 3, 4, 5)
    assert [batch.labels.tolist() for batch in batches] == [[-1, -1], [-1, -1, -1]]
    assert batches[0].labels.dtype == batches[0].indices.dtype == torch.int64
    assert [Path(name).name for name, _ in corrupt] == [f"{i:02}.png" for i in (1, 3, 4, 5, 9)]
    assert {reason for _, reason in corrupt} == {"not an image in a format that featnorm reads"}
    assert reds(list(loader)) == [0, 2, 6, 7, 8]
    assert len(corrupt) == 10


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_parquet_in_workers(tmp_path: Path, method: str) -> None:
    images = []
    for i in range(24):
        buffer = io.BytesIO()
        Image.new("RGB", (4, 4), (i, 0, 0)).save(buffer, "PNG")
        images.append({"bytes": buffer.getvalue(), "path": None})
    table = pa.table({"image": images, "label": list(range(24))})
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=5)
    source = open_images(str(tmp_path / "a.parquet"))
    source.image(13)  # what this process has read must not disturb the workers
    loader = image_loader(source, ToTensor(), batch_size=4, workers=2, on_corrupt=never)
    loader._batches.multiprocessing_context = multiprocessing.get_context(method)
    batches = list(loader)
    assert reds(batches) == list(range(24))
    assert [int(label) for batch in batches for label in batch.labels] == list(range(24))


@pytest.mark.parametrize("workers", [0, 1])
def test_failing_transform_is_raised_and_names_the_image(tmp_path: Path, workers: int) -> None:
    source = open_images(str(write_folder(tmp_path / "f", 10)))
    loader = iter(image_loader(source, fails_on_seven, batch_size=4, workers=workers, on_corrupt=never))
    assert next(loader).indices.tolist() == [0, 1, 2, 3]
    with pytest.raises(DataError, match=r"the transform failed on .*07\.png \(KeyError: 'seven'\)") as caught:
        list(loader)
    assert "\n" not in str(caught.value)
    assert "in fails_on_seven" in caught.value.__notes__[0]


def test_different_shapes_in_a_batch(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "f", 4)
    Image.new("RGB", (9, 4)).save(folder / "02.png")
    source = open_images(str(folder))
    with pytest.raises(
        DataError, match=r"02\.png has shape \(3, 4, 9\) .* \(3, 4, 5\): use a transform that resizes"
    ):
        list(image_loader(source, ToTensor(), on_corrupt=never))
    assert len(list(image_loader(source, ToTensor(), batch_size=1, on_corrupt=never))) == 4


def test_transform_must_return_a_tensor(tmp_path: Path) -> None:
    source = open_images(str(write_folder(tmp_path / "f", 1)))
    with pytest.raises(DataError, match=r"returned Image for .*00\.png: it must return a Tensor"):
        list(image_loader(source, returns_the_image, on_corrupt=never))  # type: ignore[arg-type]


def test_number_of_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_images(str(write_folder(tmp_path / "f", 3)))
    assert image_loader(source, ToTensor(), on_corrupt=never)._batches.num_workers == 0
    monkeypatch.setattr(loading, "_FEW", 3)
    monkeypatch.setattr(loading, "_processors", lambda: 1)
    assert image_loader(source, ToTensor(), on_corrupt=never)._batches.num_workers == 1
    with pytest.raises(ValueError, match="batch_size is 0"):
        image_loader(source, ToTensor(), batch_size=0, on_corrupt=never)


def test_real_data_with_workers(shared_data: Path) -> None:
    source = open_images("cifar10[900:2100]", root=shared_data)
    batches = list(image_loader(source, ToTensor(), batch_size=250, on_corrupt=never))
    assert [len(batch.images) for batch in batches] == [250, 250, 250, 250, 200]
    assert [int(i) for batch in batches for i in batch.labels] == [source.label(i) for i in range(1200)]
    assert torch.equal(batches[4].images[199], ToTensor()(source.image(1199)))
