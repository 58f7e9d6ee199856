"""Which files of a folder are images, and what is ignored."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featnorm.inputs import ItemError, open_source
from featnorm.inputs.files import LocalFolder
from featnorm.inputs.formats import PassedOver
from image_files import write_images


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def mixed_folder(folder: Path) -> Path:
    """Return a typical folder of two classes: files of various endings, without endings, and other files."""
    for place in ("cat", "dog"):
        (folder / place).mkdir(parents=True)
    for name, form in {
        "cat/a.jfif": "JPEG",
        "cat/b.avif": "AVIF",
        "cat/c": "PNG",
        "dog/d.gif": "GIF",
        "dog/e.png": "WEBP",  # named like another format
        "dog/f.jpeg.download": "JPEG",
        "dog/g.JPG": "JPEG",
    }.items():
        (folder / name).write_bytes(encoded(form))
    for name in (
        "cat/a.txt",
        "cat/b.txt",
        "dog/clip.MP4",
        "classes.json",
        "dog/Thumbs.db",
        "Makefile",
        "dog/x.0001",
    ):
        (folder / name).write_bytes(b"something else")
    (folder / ".DS_Store").write_bytes(b"hidden")
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "a.png").write_bytes(encoded("PNG"))
    (folder / "dog" / "z.jpg").write_text("not a photograph")
    return folder


def test_files_are_images_by_their_names_or_content(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "pets")
    source = open_source(str(folder))
    names = [
        "cat/a.jfif",
        "cat/b.avif",
        "cat/c",
        "dog/d.gif",
        "dog/e.png",
        "dog/f.jpeg.download",
        "dog/g.JPG",
        "dog/z.jpg",
    ]
    assert [Path(source.name(i)).relative_to(folder).as_posix() for i in range(len(source))] == names
    assert source.class_names == ["cat", "dog"]
    assert [source.label(i) for i in range(len(source))] == [0, 0, 0, 1, 1, 1, 1, 1]
    for i in range(7):
        assert source.item(i).size == (8, 8)
    with pytest.raises(ItemError, match="not an image in a format that featnorm reads"):
        source.item(7)
    assert str(source.passed_over) == (
        "ignored 7 files that are not images (.txt 2, no ending 2, .db 1, .json 1, .mp4 1) and 2 hidden"
    )


def test_files_named_by_the_user_are_not_passed_over(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "pets")
    source = open_source(str(folder / "cat"), str(folder / "Makefile"), f"{folder}/dog[:1]")
    assert [Path(source.name(i)).name for i in range(len(source))] == [
        "a.jfif",
        "b.avif",
        "c",
        "Makefile",
        "d.gif",
    ]
    assert source.passed_over == PassedOver({".txt": 2, ".mp4": 1, ".db": 1, "no ending": 1})
    with pytest.raises(ItemError, match="not an image"):
        source.item(3)


def test_only_files_of_other_names_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path / "pets")
    looked: list[str] = []

    def head(self: LocalFolder, path: str) -> bytes:
        looked.append(Path(path).name)
        return b""

    monkeypatch.setattr(LocalFolder, "head", head)
    open_source(str(folder))
    assert sorted(looked) == sorted(
        ["c", "a.txt", "b.txt", "clip.MP4", "classes.json", "Thumbs.db", "Makefile", "x.0001", "f.jpeg.download"]
    )


def test_a_folder_that_cannot_be_opened_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path / "pets")
    scan = os.scandir

    def refusing(place: str):  # type: ignore[no-untyped-def]
        if str(place).endswith("dog"):
            raise PermissionError(13, "Permission denied", place)
        return scan(place)

    monkeypatch.setattr(os, "scandir", refusing)
    source = open_source(str(folder))
    assert len(source) == 3
    assert str(source.passed_over).endswith("and 2 hidden; could not open 1 folder (dog)")


@pytest.mark.posix
def test_link_to_a_folder_above_is_not_followed(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "f", "sub/a.png")
    (folder / "sub" / "loop").symlink_to(folder)
    (folder / "other").symlink_to(write_images(tmp_path / "g", "b.png"))
    assert [Path(open_source(str(folder)).name(i)).name for i in range(2)] == ["b.png", "a.png"]


@pytest.mark.posix
def test_folders_that_link_to_each_other_are_read_once(tmp_path: Path) -> None:
    folder, outside = tmp_path / "f", tmp_path / "g"
    write_images(folder, "a/1.png", "b/2.png")
    write_images(outside, "c/3.png", "d/4.png")
    for place, other in (("a", "b"), ("b", "a")):
        for link in ("l", "m"):
            (folder / place / link).symlink_to(folder / other)
    for place, other in (("c", "d"), ("d", "c")):
        for link in ("l", "m"):
            (outside / place / link).symlink_to(outside / other)
            (folder / f"{place}{link}").symlink_to(outside / place)
    assert [os.path.basename(file) for file in LocalFolder(folder).images[0]] == [
        "1.png",
        "2.png",
        "3.png",
        "4.png",
    ]


@pytest.mark.posix
def test_pipes_and_devices_are_passed_over(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "f", "a.png")
    os.mkfifo(folder / "pipe.jpg")
    (folder / "zero.png").symlink_to("/dev/zero")
    (folder / "lost.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(folder / "pipe")
    files, passed_over = LocalFolder(folder).images
    assert files == ["a.png", "lost.png"]
    assert passed_over == PassedOver({"pipes and devices": 3})
