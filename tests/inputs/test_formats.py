"""Recognition of image formats, and the summary of other files."""

import io

import numpy as np
import pytest
from PIL import Image, features

from featnorm.inputs import ItemError
from featnorm.inputs.decoding import decode
from featnorm.inputs.formats import FORMATS, HEAD_BYTES, PassedOver, ending, format_of, looks_like_image


def encoded(form: str) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, form)
    return buffer.getvalue()


def test_every_format_is_recognized_by_its_first_bytes() -> None:
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
def test_related_formats_are_recognized(head: bytes, form: str) -> None:
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


def test_passed_over_files_are_summarized() -> None:
    assert str(PassedOver()) == ""
    assert str(PassedOver({}, 3)) == "ignored 3 hidden"
    many = PassedOver({f".{chr(97 + i)}": 1000 + i for i in range(10)}, 0, tuple("abcd"))
    assert str(many) == (
        "ignored 10,045 files that are not images (.j 1,009, .i 1,008, .h 1,007, .g 1,006, .f 1,005, "
        ".e 1,004, .d 1,003, .c 1,002, others 2,001); could not open 4 folders (a, b, c, ...)"
    )
    both = PassedOver({".txt": 1}, 1, ("x",)) + PassedOver({".txt": 2, ".md": 1}, 1)
    assert both == PassedOver({".txt": 3, ".md": 1}, 2, ("x",))
    kinds = [ending(name) for name in ("a.TXT", "a", ".a", "a.tar.gz", "a.0001", "a.\u202etxt", "a." + "x" * 50)]
    assert kinds == [".txt", "no ending", "no ending", ".gz", "no ending", "no ending", "no ending"]


def test_a_format_that_pillow_was_built_without(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: name != "avif")
    with pytest.raises(ItemError, match=r"an image in AVIF, which this Pillow was built without: pip install"):
        decode(encoded("AVIF")[:40] + bytes(100), "it")
    monkeypatch.undo()
    with pytest.raises(ItemError, match="damaged"):
        decode(encoded("AVIF")[:40] + bytes(100), "it")
    with pytest.raises(ItemError, match="JPEG XL image, which Pillow cannot read: save it as JPEG or PNG"):
        decode(b"\0\0\0\x0cJXL \r\n\x87\n" + bytes(60), "it")
