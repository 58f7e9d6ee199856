"""Image formats, recognized by the first bytes of a file; and counts of the files that are not images."""

import importlib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field

from PIL import Image, features

#: Formats that are read, by Pillow's names, wherever an image comes from. JPEG includes a camera's MPO. Pillow's
#: other formats are left out: some run programs (EPS), and most cannot be recognized by their first bytes.
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "AVIF", "JPEG2000", "QOI")
# Endings of files that count as images without being opened: in a folder of millions of files, opening each would
# take longer than listing them.
_ENDINGS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".gif", ".bmp", ".dib", ".tif", ".tiff"),
    *(".ppm", ".pgm", ".pbm", ".pnm", ".avif", ".jp2", ".j2k", ".j2c", ".jpc", ".jpx", ".qoi"),
    *(".heic", ".heif", ".hif", ".jxl"),
)
#: Endings of videos, in lower case.
VIDEO_ENDINGS = (
    *(".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi", ".mpg", ".mpeg", ".ts", ".mts", ".m2ts", ".wmv", ".flv"),
    *(".ogv", ".3gp", ".mxf", ".y4m", ".mjpeg"),
)
#: Number of bytes at the beginning of a file by which its format is recognized.
HEAD_BYTES = 64

_MAX_KINDS_SHOWN = 8
_MAX_FOLDERS_SHOWN = 3

_SIGNATURES = {
    "JPEG": rb"\xff\xd8\xff",
    "PNG": rb"\x89PNG\r\n\x1a\n",
    "WEBP": rb"RIFF....WEBP",
    "GIF": rb"GIF8[79]a",
    # "BM", which text may begin with too, followed by the length of the header.
    "BMP": rb"BM.{12}[\x0c\x10\x28\x34\x38\x40\x6c\x7c]\0\0\0",
    "TIFF": rb"II[*+]\0|MM\0[*+]",
    "PPM": rb"P[1-6]\s+(?:\d+\s+\d+\s|#)",
    "AVIF": rb"....ftyp(?:.{4}){0,12}?avi[fs]",
    # The brands of HEVC in the container, and the container's own if no brand is AVIF's.
    "HEIF": rb"....ftyp(?:.{4}){0,12}?(?:he[iv][cxms]|mif1|msf1)",
    "JPEG2000": rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51",
    "QOI": rb"qoif",
    "JXL": rb"\0\0\0\x0cJXL \r\n\x87\n",
    "EPS": rb"%!PS|\xc5\xd0\xd3\xc6",
    # MP4 and MOV, Matroska and WebM, AVI.
    "VIDEO": rb"....ftyp|\x1aE\xdf\xa3|RIFF....AVI ",
}
# Formats that Pillow can be built without, and the names of these features.
_FEATURES = {"AVIF": "avif", "WEBP": "webp", "JPEG2000": "jpg_2000"}
_PATTERN = re.compile(
    b"|".join(b"(?P<%s>%s)" % (name.encode(), signature) for name, signature in _SIGNATURES.items()), re.DOTALL
)


def format_of(head: bytes) -> str | None:
    """Return the format of a file by its first `HEAD_BYTES`; None if it is not a known image format."""
    match = _PATTERN.match(head)
    return None if match is None else match.lastgroup


def named_as_image(name: str) -> bool | None:
    """Whether a file is an image by its name; None if only its content can tell."""
    if name.lower().endswith(_ENDINGS):
        return True
    # A table of images; a folder may hold thousands of them.
    return False if name.endswith(".parquet") else None


def looks_like_image(head: bytes) -> bool:
    """Whether a file that begins with these bytes is an image, even if Pillow cannot read it.

    PostScript does not count as an image, because it is a program, and neither do videos.
    """
    return format_of(head) not in (None, "EPS", "VIDEO")


def register_format(head: bytes) -> str | None:
    """Register the package that reads a format for Pillow, if it is installed.

    Parameters
    ----------
    head : bytes
        First bytes of a file that Pillow does not know.

    Returns
    -------
    str or None
        Pillow's name of the format; None if no package reads it.
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
    """Return why Pillow cannot read a file that begins with these bytes, and what to do about it."""
    match format_of(head):
        case "HEIF" if "HEIF" not in Image.OPEN:
            return "an HEIC or HEIF image, which Pillow reads with pillow-heif: pip install pillow-heif"
        case "AVIF" | "WEBP" | "JPEG2000" as name if not features.check(_FEATURES[name]):
            return f"an image in {name}, which this Pillow was built without: pip install --upgrade pillow"
        case "JXL":
            return "a JPEG XL image, which Pillow cannot read: save it as JPEG or PNG"
        case "EPS":
            return "PostScript is a program, and is not run: save it as PNG"
        case "VIDEO":
            return "a video: pass videos apart from images"
        case None:
            return "not an image in a format that featnorm reads" if head else "an empty file"
        case name:
            return f"a {name} file that is damaged, or of a kind that Pillow cannot read"


def ending(name: str) -> str:
    """Return the kind of a file that is not an image: the ending of its name, in lower case."""
    match = re.fullmatch(r".+(\.[a-z0-9_+-]{1,12})", name.lower(), re.DOTALL)
    # Numbers are not kinds: there may be as many as files.
    return match[1] if match and not match[1][1:].isdigit() else "no ending"


@dataclass(frozen=True)
class PassedOver:
    """Counts of what was found in a folder besides images, or besides videos.

    Parameters
    ----------
    kinds : mapping of str to int
        Number of the other files, by kind; see `ending`.
    hidden : int
        Number of hidden files and folders, which are not opened.
    closed : tuple of str
        Folders that could not be opened.
    besides : str
        What the other files are not: "an image" or "a video".
    """

    kinds: Mapping[str, int] = field(default_factory=dict)
    hidden: int = 0
    closed: tuple[str, ...] = ()
    besides: str = "an image"

    def __add__(self, other: "PassedOver") -> "PassedOver":
        kinds = Counter(self.kinds) + Counter(other.kinds)
        besides = other.besides if other.kinds else self.besides
        return PassedOver(kinds, self.hidden + other.hidden, self.closed + other.closed, besides)

    def __str__(self) -> str:
        """Return a short description; empty if there is nothing to report."""
        found, parts = [], []
        if total := sum(self.kinds.values()):
            shown = sorted(self.kinds.items(), key=lambda item: (-item[1], item[0]))[:_MAX_KINDS_SHOWN]
            rest = total - sum(count for _, count in shown)
            listed = [f"{kind} {count:,}" for kind, count in [*shown, *([("others", rest)] if rest else [])]]
            plural = f"{self.besides.split()[1]}s"
            what = f"1 file that is not {self.besides}" if total == 1 else f"{total:,} files that are not {plural}"
            found.append(f"{what} ({', '.join(listed)})")
        if self.hidden:
            found.append(f"{self.hidden:,} hidden")
        if found:
            parts.append(f"ignored {' and '.join(found)}")
        if self.closed:
            named = ", ".join(
                [*self.closed[:_MAX_FOLDERS_SHOWN], *(["..."] if self.closed[_MAX_FOLDERS_SHOWN:] else [])]
            )
            folders = "1 folder" if len(self.closed) == 1 else f"{len(self.closed):,} folders"
            parts.append(f"could not open {folders} ({named})")
        return "; ".join(parts)
