"""Figures as SVG text, made of panels of lines."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from PIL import Image

from featnorm._utils.svg import plain_axes, svg_figure
from featnorm.report.html import data_uri

_GAP = 24  # pixels between the images of a grid

# Lines differ in dash too, and in marker if they have few points, for readers who cannot see the colors.
_STYLES = [
    ("#1f5fa8", "o", "-"),
    ("#c2571a", "s", "--"),
    ("#4d7a2b", "^", ":"),
    ("#8a3f8f", "D", "-."),
    ("#7a6a1f", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#5a5a5a", "P", (0, (1, 2))),
]
_MAX_MARKERS = 16  # a line with more points has no markers
_MAX_LEGEND = 4  # the legend of more lines stands beside the panel


@dataclass(frozen=True)
class Line:
    """A named line through points; values to count if ``histogram`` is set, points alone if ``scatter`` is."""

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()
    style: int = 0
    histogram: bool = False
    scatter: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes with lines, or an image of booleans with one row per unit."""

    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    lines: Sequence[Line] = ()
    image: npt.NDArray[np.bool_] | None = None
    log2: bool = False  # whether the x-axis is logarithmic, with ticks at the points

    def to_dict(self) -> dict[str, Any]:
        """Return plain data for JSON: numbers to four digits, an image as one string of bits per row."""
        data = asdict(replace(self, image=None))
        for line in data["lines"]:
            line |= {axis: [float(f"{value:.4g}") for value in line[axis]] for axis in ("x", "y")}
        if self.image is not None:
            data["image"] = ["".join("1" if bit else "0" for bit in row) for row in self.image]
        return data

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Panel":
        """Return a panel from the output of `to_dict`."""
        image = data["image"]
        if image is not None:
            image = np.array([[bit == "1" for bit in row] for row in image])
        return cls(**{**data, "lines": [Line(**line) for line in data["lines"]], "image": image})


def panel_figure(rows: Sequence[Sequence[Panel]], *, width: float = 3.8, height: float = 3.0) -> str:
    """Return panels in rows as SVG text; width and height of a panel are in inches."""
    columns = max(map(len, rows))
    with svg_figure(width * columns, height * len(rows)) as (figure, text):
        grid = figure.subplots(len(rows), columns, squeeze=False)
        for axes, panels in zip(grid, rows, strict=True):
            for ax in axes[len(panels) :]:
                ax.set_axis_off()
            for ax, panel in zip(axes, panels, strict=False):
                _draw(ax, panel)
    return text.getvalue()


def _draw(ax: Axes, panel: Panel) -> None:
    ax.set_title(panel.title, fontsize=10)
    ax.set_xlabel(panel.xlabel)
    ax.set_ylabel(panel.ylabel)
    if panel.image is not None:
        ax.imshow(panel.image, aspect="auto", cmap="Greys", vmin=0, vmax=1, interpolation="nearest")
        return
    for line in panel.lines:
        color, marker, dash = _STYLES[line.style % len(_STYLES)]
        if line.histogram:
            ax.hist(line.y, bins=40, density=True, histtype="step", color=color, ls=dash, lw=1.5, label=line.name)
        elif line.scatter:
            ax.plot(line.x, line.y, color=color, marker=marker, ls="", ms=3.5, alpha=0.7, label=line.name)
        else:
            shape = marker if len(line.y) <= _MAX_MARKERS else None
            ax.plot(line.x, line.y, color=color, marker=shape, ms=4, ls=dash, lw=1.4, label=line.name)
    if panel.log2:
        ticks = panel.lines[0].x
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
        ax.minorticks_off()
    plain_axes(ax)
    if len(panel.lines) > _MAX_LEGEND:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    elif len(panel.lines) > 1:
        ax.legend(frameon=False, fontsize=8)


def image_grid(images: Sequence[Image.Image], columns: int) -> str:
    """Return images of one size in rows, as SVG text."""
    width, height = (side + _GAP for side in images[0].size)
    rows = -(-len(images) // columns)
    drawn = "".join(
        f'<image x="{i % columns * width}" y="{i // columns * height}" '
        f'width="{image.width}" height="{image.height}" '
        f'href="{data_uri(image, "JPEG", quality=85, optimize=True)}"/>'
        for i, image in enumerate(images)
    )
    size = f'width="{columns * width}" height="{rows * height}" viewBox="0 0 {columns * width} {rows * height}"'
    ground = '<rect width="100%" height="100%" fill="white"/>'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{ground}{drawn}</svg>\n'
