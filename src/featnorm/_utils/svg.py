"""Figures as SVG text, whatever the user's own settings of matplotlib."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure


@contextmanager
def svg_figure(width: float, height: float) -> Iterator[tuple[Figure, io.StringIO]]:
    """A figure, drawn and saved to the text inside the context, free of the user's own settings."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "featnorm", "font.size": 10})
        figure, text = Figure((width, height), layout="constrained"), io.StringIO()
        yield figure, text
        figure.savefig(text, format="svg", metadata={"Date": None})


def plain_axes(ax: Axes) -> None:
    """Leave out what is no data: the frame on top and on the right, and all but faint horizontal lines."""
    ax.grid(axis="y", alpha=0.3)
    ax.spines["top"].set_visible(False)
