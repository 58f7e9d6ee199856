"""Figures that stand alone, as SVG files for documents."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import matplotlib
import numpy as np
import numpy.typing as npt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Told apart without colour too, by dash, and by marker where points are few.
_STYLES = [
    ("#1f5fa8", "o", "-"),
    ("#c2571a", "s", "--"),
    ("#4d7a2b", "^", ":"),
    ("#8a3f8f", "D", "-."),
    ("#7a6a1f", "v", (0, (5, 1, 1, 1, 1, 1))),
    ("#5a5a5a", "P", (0, (1, 2))),
]
_FEW = 16  # points of a line, which get markers
_MOST_INSIDE = 4  # lines whose legend finds room among them


@dataclass(frozen=True)
class Line:
    """Points by name; joined, or where ``histogram`` is set values to count."""

    name: str
    y: Sequence[float]
    x: Sequence[float] = ()
    style: int = 0
    faint: bool = False
    histogram: bool = False
    scatter: bool = False


@dataclass(frozen=True)
class Panel:
    """One pair of axes: its lines, or an image of booleans, a row a unit."""

    title: str = ""
    xlabel: str = ""
    ylabel: str = ""
    lines: Sequence[Line] = ()
    image: npt.NDArray[np.bool_] | None = None
    log2: bool = False  # whether the x axis is logarithmic, with ticks at the points

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data, numbers to four digits, an image as a text of bits a row."""
        data = asdict(replace(self, image=None))
        for line in data["lines"]:
            line |= {axis: [float(f"{value:.4g}") for value in line[axis]] for axis in ("x", "y")}
        if self.image is not None:
            data["image"] = ["".join("1" if bit else "0" for bit in row) for row in self.image]
        return data

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> "Panel":
        """Make it again from plain data."""
        image = data["image"]
        if image is not None:
            image = np.array([[bit == "1" for bit in row] for row in image])
        return cls(**{**data, "lines": [Line(**line) for line in data["lines"]], "image": image})


def panel_figure(rows: Sequence[Sequence[Panel]], *, width: float = 3.8, height: float = 3.0) -> str:
    """Return panels in rows as SVG text; each panel is of that width and height in inches."""
    columns = max(map(len, rows))
    with _figure(width * columns, height * len(rows)) as (figure, text):
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
        alpha = 0.45 if line.faint else 1.0
        if line.histogram:
            ax.hist(line.y, bins=40, density=True, histtype="step", color=color, ls=dash, lw=1.5, label=line.name)
        elif line.scatter:
            ax.plot(line.x, line.y, color=color, marker=marker, ls="", ms=3.5, alpha=0.7, label=line.name)
        else:
            shape = marker if len(line.y) <= _FEW else None
            ax.plot(line.x, line.y, color=color, marker=shape, ms=4, ls=dash, lw=1.4, alpha=alpha, label=line.name)
    if panel.log2:
        ticks = panel.lines[0].x
        ax.set_xscale("log", base=2)
        ax.set_xticks(ticks, [f"{value:g}" for value in ticks])
        ax.minorticks_off()
    _plain(ax)
    if len(panel.lines) > _MOST_INSIDE:
        ax.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0), borderaxespad=0.0)
    elif len(panel.lines) > 1:
        ax.legend(frameon=False, fontsize=8)


def explanation_figure(
    activation: Sequence[float],
    on_rate: Sequence[float],
    logits: Sequence[float],
    norm: float,
    predicted: int,
    peers: str,
) -> str:
    """Return the picture of an explanation as SVG text.

    Parameters
    ----------
    activation, on_rate : (d,) of the input, and how often each unit is on for its class.
    logits, norm : (K,) of the hidden classifier, and the l1-norm, which none of them exceeds.
    predicted, peers : the class, and what to call those inputs.
    """
    order = sorted(range(len(activation)), key=lambda i: -on_rate[i])
    rank = range(len(order))
    with _figure(9, 3.4) as (figure, text):
        units, classes = figure.subplots(1, 2, width_ratios=[2.2, 1])
        units.fill_between(
            rank, [on_rate[i] for i in order], color="#b9c6d6", lw=0, label=f"share of {peers} that it is on for"
        )
        units.set_ylim(0, 1.02)
        units.set_ylabel("share of inputs")
        units.set_xlabel("units, the most usual first")
        values = units.twinx()
        values.vlines(
            rank, 0, [activation[i] for i in order], color="#c2571a", lw=0.8, label="this input's activation"
        )
        values.set_ylabel("activation")
        values.set_ylim(min(0, *activation), 1.05 * max(*activation, 1e-9))
        handles = [handle for ax in (units, values) for handle in ax.get_legend_handles_labels()[0]]
        values.legend(handles=handles, frameon=False, loc="upper right")
        colors = ["#1f5fa8" if k == predicted else "#b9c6d6" for k in range(len(logits))]
        classes.bar(range(len(logits)), logits, color=colors)
        classes.axhline(norm, color="#333333", ls="--", lw=1)
        classes.text(len(logits) - 0.5, norm, "l1-norm", ha="right", va="bottom")
        classes.axhline(0, color="#333333", lw=0.6)
        classes.margins(y=0.1)
        classes.xaxis.set_major_locator(MaxNLocator(integer=True))
        classes.set_xlabel("class (dark: predicted)")
        classes.set_ylabel("hidden logit")
        for ax in (units, values, classes):
            _plain(ax)
        values.grid(visible=False)
    return text.getvalue()


@contextmanager
def _figure(width: float, height: float) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure, drawn and saved to the text inside the context, free of the user's own settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "featnorm", "font.size": 10})
        figure, text = Figure((width, height), layout="constrained"), io.StringIO()
        yield figure, text
        figure.savefig(text, format="svg", metadata={"Date": None})


def _plain(ax: Axes) -> None:
    ax.grid(axis="y", alpha=0.3)
    ax.spines["top"].set_visible(False)
