"""Image files and tables of them, made by tests of what opens them."""

import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from featnorm.inputs import ImageSource


def encoded(value: int, size: tuple[int, int] = (8, 6), form: str = "PNG") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 0, 0)).save(buffer, form)
    return buffer.getvalue()


def write_images(folder: Path, *names: str) -> Path:
    for value, name in enumerate(names):
        file = folder / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encoded(value))
    return folder


def write_parquet(
    path: Path,
    rows: int = 10,
    start: int = 0,
    *,
    names: list[str] | None = None,
    images: list[dict[str, Any] | None] | None = None,
    labels: list[int | None] | None = None,
) -> Path:
    values = range(start, start + rows)
    images = images or [{"bytes": encoded(v), "path": f"{v}.png"} for v in values]
    struct = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "image": pa.array(images, struct),
            "label": pa.array(labels or [v % 3 for v in range(len(images))], pa.int64()),
        }
    )
    if names:
        info = {"info": {"features": {"label": {"_type": "ClassLabel", "names": names}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, path, row_group_size=4)
    return path


def values(source: ImageSource) -> list[int]:
    return [image.getpixel((0, 0))[0] for image, _ in iterate(source)]  # type: ignore[index]


def iterate(source: ImageSource) -> Iterator[tuple[Image.Image, int | None]]:
    return (source[i] for i in range(len(source)))
