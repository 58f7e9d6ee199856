"""Which files are images: by what they begin with, not by what they are called; and what became of the others."""

import importlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image, features

#: Formats that are read, as Pillow names them, wherever an image comes from. JPEG includes a camera's MPO. Of the
#: others that Pillow knows some start programs (EPS), and most have no mark to tell them from other files.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
# Endings of names whose files are taken for images without a look inside: in a folder of millions that would cost
# more than the list of them.
_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".qoi"),
    *(".heic", ".heif", ".hif", ".jxl"),
)
#: Bytes that tell what a file is.
HEAD_BYTES = 64

_KINDS_SHOWN = 8
_FOLDERS_SHOWN = 3

_MARKS = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    # After "BM", which text may begin with, the length of the header.
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6]\s+(?:\d+\s+\d+\s|#)",
    "AVIF": rb"....ftyp(?:.{4}){0,12}?avi[fs]",
    # Of the brands of its container, those of HEVC and, where no brand says AVIF, the container's own.
    "HEIF": rb"....ftyp(?:.{4}){0,12}?(?:he[iv][cxms]|mif1|msf1)",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "QOI": rb"qoif",
    "JXL": rb"\0\0\0\x0cJXL \r\n\x87\n",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
}
# Formats that Pillow can be built without, by what it calls them then.
_FEATURES = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}
_PATTERN = re.compile(b"|".join(b"(?P<%s>%s)" % (name.encode(), mark) for name, mark in _MARKS.items()), re.DOTALL)


def format_of(head: bytes) -> str | None:
    """Return the format of a file by its first `HEAD_BYTES`; None where it is no image that is known here."""
    match = _PATTERN.match(head)
    return None if match is None else match.lastgroup


def named_as_image(name: str) -> bool | None:
    """Whether a file is an image as far as its name tells; None where only its content does."""
    if name.lower().endswith(_ENDINGS):
        return True
    # A table of images; a folder may hold thousands.
    return False if name.endswith(".parquet") else None


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins so is an image, though perhaps one that cannot be read here.

    PostScript is a program that draws, and none.
    """
    return format_of(head) not in (None, "EPS")


def register_format(head: bytes) -> str | None:
    """Let Pillow read a format that another package reads for it, if that package is installed.

    Parameters
    ----------
    head : bytes
        What a file that Pillow does not know begins with.

    Returns
    -------
    str or None
        The format, as Pillow names it now; None if Pillow cannot read the file even so.
    """
    if format_of(head) != "HEIF":
        return None
    if "HEIF" not in Image.OPEN:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            return None
    return "HEIF"


def reason_not_read(head: bytes) -> str:
    """Say why Pillow does not know a file that begins so, and what to do about it."""
    match format_of(head):
        case "HEIF" if "HEIF" not in Image.OPEN:
            return "an HEIC or HEIF image, which Pillow reads with pillow-heif: pip install pillow-heif"
        case "AVIF" | "WEBP" | "JPEG2000" as name if not features.check(_FEATURES[name]):
            return f"an image in {name}, which this Pillow was built without: pip install --upgrade pillow"
        case "JXL":
            return "a JPEG XL image, which Pillow does not read: save it as JPEG or PNG"
        case "EPS":
            return "PostScript is a program, and not run here: save it as PNG"
        case None:
            return "not an image in a format that featnorm reads" if head else "an empty file"
        case name:
            return f"a {name} file that is damaged, or of a kind that Pillow does not read"


def ending(name: str) -> str:
    """Return the kind of a file that is no image: the ending of its name, in lower case."""
    match = re.fullmatch(r".+(\.[a-z0-9_+-]{1,12})", name.lower(), re.DOTALL)
    # Numbers are not kinds, and there may be as many as files.
    return match[1] if match and not match[1][1:].isdigit() else "no ending"


@dataclass(frozen=True)
class PassedOver:
    """What was found beside the images of a folder.

    Parameters
    ----------
    kinds : mapping of str to int
        Files that are not images, counted by kind; see `ending`.
    hidden : int
        Hidden files and folders, which are not looked into.
    closed : tuple of str
        Folders that could not be opened.
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    hidden: int = 0
    closed: tuple[str, ...] = ()

    def __add__(self, other: "PassedOver") -> "PassedOver":
        kinds = Counter(self.kinds) + Counter(other.kinds)
        return PassedOver(kinds, self.hidden + other.hidden, self.closed + other.closed)

    def __str__(self) -> str:
        """Say it in a few words, or in none where there is nothing to say."""
        found, said = [], []
        if total := sum(self.kinds.values()):
            shown = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))[:_KINDS_SHOWN]
            rest = total - sum(count for _, count in shown)
            listed = [f"{kind} {count:,}" for kind, count in [*shown, *([("others", rest)] if rest else [])]]
            what = "1 file that is not an image" if total == 1 else f"{total:,} files that are not images"
            found.append(f"{what} ({', '.join(listed)})")
        if self.hidden:
            found.append(f"{self.hidden:,} hidden")
        if found:
            said.append(f"passed over {' and '.join(found)}")
        if self.closed:
            named = ", ".join([*self.closed[:_FOLDERS_SHOWN], *(["..."] if self.closed[_FOLDERS_SHOWN:] else [])])
            folders = "1 folder" if len(self.closed) == 1 else f"{len(self.closed):,} folders"
            said.append(f"could not open {folders} ({named})")
        return "; ".join(said)
