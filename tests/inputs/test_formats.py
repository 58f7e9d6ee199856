"""Which files are images, and what is said of the others."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from featnorm.inputs import ImageError, open_images, open_to_score
from featnorm.inputs.formats import FORMATS, HEAD_BYTES, PassedOver, ending, format_of, looks_like_image
from featnorm.inputs.images import decode


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def test_every_format_is_known_by_its_first_bytes() -> None:
    for form in FORMATS:
        data = encoded(form)
        assert format_of(data[:HEAD_BYTES]) == form
        assert decode(data, form).size == (8, 8)


@pytest.mark.parametrize(
    ("head", "form"),
    [
        (b"MM\0*\0\0\0\x08", "TIFF"),
        (b"II+\0\x08\0\0\0", "TIFF"),
        (b"P4\n# made by hand\n8 8\n", "PPM"),
        (b"\xff\x4f\xff\x51\0", "JPEG2000"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1avifmiaf", "AVIF"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIF"),
        (b"\0\0\0\x1cftypmif1\0\0\0\0mif1heicmiaf", "HEIF"),
        (b"\0\0\0\x0cJXL \r\n\x87\n", "JXL"),
    ],
)
def test_relatives_are_known_too(head: bytes, form: str) -> None:
    assert format_of(head) == form
    assert looks_like_image(head)


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"notes",
        b"BMW has a new car, and more of this",
        b"P1 is a tier, P2 another",
        b"Python 3",
        b"#define x",
        b'{"a": 1}',
        b"%!PS-Adobe-3.0",
        b"%PDF-1.7",
        b"\0\0\0\x1cftypisom\0\0\2\0isomiso2avc1mp41",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"RIFF\0\0\0\0AVI LIST",
        b"PK\3\4",
        b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1",  # Thumbs.db
        b"IIII" + bytes(20),
    ],
)
def test_other_files_are_not_taken_for_images(head: bytes) -> None:
    assert not looks_like_image(head)


def mixed_folder(folder: Path) -> Path:
    """Return a folder of two classes as people have them: every ending, none, and other things."""
    for place in ("cat", "dog"):
        (folder / place).mkdir(parents=True)
    for name, form in {
        "cat/a.jfif": "JPEG",
        "cat/b.avif": "AVIF",
        "cat/c": "PNG",
        "dog/d.gif": "GIF",
        "dog/e.png": "WEBP",  # named after another format
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


def test_fit_and_score_read_the_same_files(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "pets")
    source = open_images(str(folder))
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
    scored = open_to_score([str(folder)])
    assert [scored.name(i) for i in range(len(scored))] == [source.name(i) for i in range(len(source))]
    for i in range(7):
        assert source.image(i).size == (8, 8)
    with pytest.raises(ImageError, match="not an image in a format that featnorm reads"):
        source.image(7)
    assert source.passed_over == scored.passed_over
    assert str(source.passed_over) == (
        "passed over 7 files that are not images (.txt 2, no ending 2, .db 1, .json 1, .mp4 1) and 2 hidden"
    )


def test_what_a_user_names_is_not_passed_over(tmp_path: Path) -> None:
    folder = mixed_folder(tmp_path / "pets")
    source = open_to_score([str(folder / "cat"), str(folder / "Makefile"), f"{folder}/dog[:1]"])
    assert [Path(source.name(i)).name for i in range(len(source))] == [
        "a.jfif",
        "b.avif",
        "c",
        "Makefile",
        "d.gif",
    ]
    assert source.passed_over == PassedOver({".txt": 2, ".mp4": 1, ".db": 1, "no ending": 1})
    with pytest.raises(ImageError, match="not an image"):
        source.image(3)


def test_only_files_of_other_names_are_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mixed_folder(tmp_path / "pets")
    looked: list[str] = []
    monkeypatch.setattr(
        "featnorm.inputs.images._begins_as_image", lambda path: looked.append(Path(path).name) is not None
    )
    open_images(str(folder))
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
    source = open_images(str(folder))
    assert len(source) == 3
    assert str(source.passed_over).endswith("and 2 hidden; could not open 1 folder (dog)")


def test_what_is_passed_over_is_said_in_few_words() -> None:
    assert str(PassedOver()) == ""
    assert str(PassedOver({}, 3)) == "passed over 3 hidden"
    many = PassedOver({f".{chr(97 + i)}": 1000 + i for i in range(10)}, 0, tuple("abcd"))
    assert str(many) == (
        "passed over 10,045 files that are not images (.j 1,009, .i 1,008, .h 1,007, .g 1,006, .f 1,005, "
        ".e 1,004, .d 1,003, .c 1,002, others 2,001); could not open 4 folders (a, b, c, ...)"
    )
    both = PassedOver({".txt": 1}, 1, ("x",)) + PassedOver({".txt": 2, ".md": 1}, 1)
    assert both == PassedOver({".txt": 3, ".md": 1}, 2, ("x",))
    kinds = [ending(name) for name in ("a.TXT", "a", ".a", "a.tar.gz", "a.0001", "a.\u202etxt", "a." + "x" * 50)]
    assert kinds == [".txt", "no ending", "no ending", ".gz", "no ending", "no ending", "no ending"]


def test_a_pillow_without_a_format_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(ImageError, match=r"an image in AVIF, which this Pillow was built without: pip install"):
        decode(encoded("AVIF")[:40] + bytes(100), "it")
    monkeypatch.undo()
    with pytest.raises(ImageError, match="damaged"):
        decode(encoded("AVIF")[:40] + bytes(100), "it")
    with pytest.raises(ImageError, match="JPEG XL image, which Pillow does not read: save it as JPEG or PNG"):
        decode(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "it")
