"""Forms with files."""

import pytest

from featnorm.serve.forms import FormError, parameters, read_form

TYPE = "multipart/form-data; boundary=x"


def form(*parts, end=b"--x--\r\n"):
    return b"".join(b"--x\r\n" + part + b"\r\n" for part in parts) + end


def file(name, content=b"a"):
    return b"Content-Disposition: form-data; name=f; " + name + b"\r\nContent-Type: image/png\r\n\r\n" + content


@pytest.mark.parametrize(
    ("given", "name"),
    [
        (b'filename="a.png"', "a.png"),
        (b"filename=a.png", "a.png"),
        (b'FileName="a;b=c.png"', "a;b=c.png"),
        (b'filename="a\\"b.png"', 'a"b.png'),
        (b'filename="a%22b.png"', "a%22b.png"),
        (b'filename="C:\\dir\\a.png"', "C:\\dir\\a.png"),
        ('filename="\u96ea.png"'.encode(), "\u96ea.png"),
        (b'filename="\xff.png"', "\ufffd.png"),
        (b'filename=""', ""),
        # RFC 5987, alone, before and after the plain one.
        (b"filename*=UTF-8''%E9%9B%AA.png", "\u96ea.png"),
        (b"filename*=utf-8'en'%E9%9B%AA.png; filename=\"snow.png\"", "\u96ea.png"),
        (b"filename=\"snow.png\"; filename*=UTF-8''%E9%9B%AA.png", "\u96ea.png"),
        (b"filename=\"snow.png\"; filename*=iso-8859-1''%e4.png", "\u00e4.png"),
        (b"filename=\"snow.png\"; filename*=punycode''a", "snow.png"),
        (b'filename="snow.png"; filename*=broken', "snow.png"),
        (b"filename*=UTF-8''%ff", "\ufffd"),
        (b'other="filename=a"', None),
        (b"x", None),
    ],
)
def test_names_of_files(given, name):
    (part,) = read_form(form(file(given)), TYPE, 9)
    assert part == ("f", name, b"a")


@pytest.mark.parametrize(
    "content",
    [b"", b"\r\n", b"\r\n\r\n", b"a--x--", b"\r\n-x", b"--\r\n--", b"\n--x\n", b"\r--x\r", bytes(range(256)) * 9],
)
def test_contents_are_exact(content):
    parts = [file(b"filename=a", content), file(b"filename=b"), file(b"filename=c", content)]
    assert [part.content for part in read_form(form(*parts), TYPE, 9)] == [content, b"a", content]


def test_valid_forms():
    assert read_form(b"", TYPE, 9) == read_form(b"--x--", TYPE, 9) == []
    assert read_form(b"preamble\r\n" + form(file(b"filename=a"), end=b"--x--epilogue"), TYPE, 9)[0].filename == "a"
    assert read_form(form(file(b"filename=a")).replace(b"--x\r\n", b"--x \t\r\n"), TYPE, 9)[0].filename == "a"
    assert read_form(form(b"Content-Disposition: form-data;\r\n\tfilename=a\r\n\r\n"), TYPE, 9)[0].filename == "a"
    assert read_form(form(b"\r\nbare"), TYPE, 9) == [("", None, b"bare")]
    quoted = 'multipart/form-data; charset=utf-8; boundary="a b"'
    assert (
        read_form(b'--a b\r\nContent-Disposition: x; filename="c"\r\n\r\nd\r\n--a b--', quoted, 9)[0].content
        == b"d"
    )
    assert len(read_form(form(*[file(b"filename=a")] * 5), TYPE, 3)) == 4


@pytest.mark.parametrize(
    ("body", "header", "words"),
    [
        (b"--x--", "multipart/form-data", "the content type has no boundary"),
        (b"--x--", 'multipart/form-data; boundary=""', "the content type has no boundary"),
        (b"--x--", "multipart/form-data; boundary=x" + ";a=b" * 500, "longer than 512"),
        (b"--y--", TYPE, "does not contain its boundary"),
        (b"--x\r\n", TYPE, "ends before its last boundary"),
        (form(file(b"filename=a"), end=b""), TYPE, "ends before its last boundary"),
        (b"--x\r\n\r\na\n--x--", TYPE, "ends before its last boundary"),
        (form(b"no end of its headers"), TYPE, "the headers of part 1 do not end"),
        (form(file(b"filename=a"), b"A: b"), TYPE, "the headers of part 2 do not end"),
        (form(b"A: " + b"b" * 5000 + b"\r\n\r\n"), TYPE, "the headers of part 1 are longer than 4096 bytes"),
        (b"--xy\r\n\r\na\r\n--x--", TYPE, "followed by other text"),
        (b"--x", TYPE, "followed by other text"),
        (b"--x\r\n--x\r\n--x\r\n--x--", TYPE, "the headers of part 1 do not end"),
    ],
)
def test_invalid_forms(body, header, words):
    with pytest.raises(FormError, match=words):
        read_form(body, header, 9)


def test_parameters_of_a_header():
    assert parameters("a; b=c;d = \"e;f\" ;G=h; b=i; j*=UTF-8''%20") == {"b": "c", "d": "e;f", "g": "h", "j": " "}
    assert parameters("a") == parameters("") == {}
