"""Figures that stand alone, as SVG files for documents."""

import io
from collections.abc import Mapping, Sequence

import matplotlib
from matplotlib.figure import Figure

# Told apart without colour too, by marker and dash.
_STYLES = [("#1f5fa8", "o", "-"), ("#c2571a", "s", "--"), ("#4d7a2b", "^", ":")]


def line_panels(
    x: Sequence[float], panels: Mapping[str, Mapping[str, Sequence[float]]], *, xlabel: str, log2: bool = False
) -> str:
    """Return lines over a common axis as SVG text, a panel a measure.

    Parameters
    ----------
    x : (n,) where the points stand.
    panels : by what a panel's axis says, the lines in it by name, each (n,).
    xlabel : what the common axis says.
    log2 : whether it is logarithmic, with ticks at the points.
    """
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "featnorm", "font.size": 10})
        figure = Figure((4.2 * len(panels), 3.2), layout="constrained")
        for ax, (ylabel, lines) in zip(
            figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
        ):
            for (name, values), (color, marker, dash) in zip(lines.items(), _STYLES, strict=False):
                ax.plot(x, values, color=color, marker=marker, ls=dash, label=name)
            if log2:
                ax.set_xscale("log", base=2)
                ax.set_xticks(x, [f"{value:g}" for value in x])
                ax.minorticks_off()
            ax.set_xlabel(xlabel)
            ax.set_ylabel(ylabel)
            ax.grid(axis="y", alpha=0.3)
            ax.spines[["top", "right"]].set_visible(False)
            ax.legend(frameon=False)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
