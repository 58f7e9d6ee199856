"""What the pages share: rendering of templates, colors, thumbnails, and the format of numbers."""

import base64
import io
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from PIL import Image

from featnorm._utils.files import write_text

#: Longer side of a thumbnail, in pixels.
THUMBNAIL = 96
# Images with fewer pixels than this on each side are enlarged without smoothing.
_TINY = 64

# In both themes, text has a contrast of at least 4.5 to its background, and a line in a plot at least 3.
THEMES = {
    "light": {
        "ground": "#fbfbf9",
        "raised": "#f1f2ef",
        "ink": "#1a1d21",
        "muted": "#5a626c",
        "rule": "#dfe1dc",
        "accent": "#0b5cad",
        "s0": "#0b5cad",
        "s1": "#cc4a00",
        "s2": "#007a5a",
        "s3": "#a33f87",
        "s4": "#8a6400",
        "s5": "#0a7f96",
        "s6": "#7a4b2a",
        "s7": "#5d6370",
        "s8": "#6a4fc9",
    },
    "dark": {
        "ground": "#15181c",
        "raised": "#1f2429",
        "ink": "#e8eaed",
        "muted": "#a4adb8",
        "rule": "#343b43",
        "accent": "#7cbcff",
        "s0": "#6ab2ff",
        "s1": "#ff9257",
        "s2": "#3fcf9f",
        "s3": "#e98fca",
        "s4": "#e6b643",
        "s5": "#62d3e8",
        "s6": "#cfa98a",
        "s7": "#b4bac4",
        "s8": "#ab9dff",
    },
}
"""CSS custom properties of the page; ``s0`` is the color of the ID set, ``s1`` and up those of the OOD sets."""


@dataclass(frozen=True)
class Key:
    """The legend entry of one set of scores."""

    name: str
    color: str
    dash: str
    auroc: str = ""


@dataclass(frozen=True)
class Picture:
    """An image as a data URI, embedded once in a page and referenced by its id."""

    id: str
    uri: str
    width: int
    height: int
    tiny: bool


def render(template: str, package: str = "featnorm.report", **values: Any) -> str:
    """Render a template of a package, which may extend the templates of this package, with the given values."""
    return _environment(package).get_template(template).render(themes=THEMES, **values)


@cache
def _environment(package: str) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(package, "."), PackageLoader("featnorm.report", ".")]),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        auto_reload=False,
    )


def write(path: Path, html: str) -> None:
    """Write a page, replacing an existing file."""
    # File names may contain bytes that cannot be decoded; they are shown as escapes.
    write_text(path, html, errors="backslashreplace")


def thumbnail(image: Image.Image, id_: str) -> Picture:
    """Return the thumbnail of an image, ready to be embedded."""
    tiny = max(image.size) < _TINY
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    if image.mode != "L":
        image = image.convert("RGB")
    if not tiny:
        image = image.copy()  # `thumbnail` works in place, and the image may be the caller's
        image.thumbnail((THUMBNAIL, THUMBNAIL))
    uri = data_uri(image, "PNG", optimize=True) if tiny else data_uri(image, "JPEG", quality=75, optimize=True)
    return Picture(id_, uri, *image.size, tiny)


def data_uri(image: Image.Image, format_: str, **options: bool | int) -> str:
    """Encode an image as a data URI."""
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return f"data:image/{format_.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def percent(share: float) -> str:
    """Format a share as a percentage."""
    if 0 < share < 0.0005:
        return "<0.1\N{NO-BREAK SPACE}%"
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def number(value: float) -> str:
    """Format a score."""
    # Distances reach millions, where scientific notation would hide the digits in which scores differ.
    text = f"{value:,.0f}" if 1e4 <= abs(value) < 1e9 else f"{value:.4g}"
    return text.replace("inf", "∞").replace("-", "−")
