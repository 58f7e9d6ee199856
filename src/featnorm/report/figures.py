"""Figures that stand alone, as SVG files for documents."""

import io
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import matplotlib
from matplotlib.axes import Axes
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
    with _figure(4.2 * len(panels), 3.2) as (figure, text):
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
            _plain(ax)
            ax.legend(frameon=False)
    return text.getvalue()


def explanation_figure(
    activation: Sequence[float], on_rate: Sequence[float], logits: Sequence[float], norm: float, predicted: int
) -> str:
    """Return the picture of an explanation as SVG text.

    Parameters
    ----------
    activation, on_rate : (d,) of the input, and how often each unit is on for its class.
    logits, norm : (K,) of the hidden classifier, and the l1-norm, which none of them exceeds.
    predicted : the class.
    """
    order = sorted(range(len(activation)), key=lambda i: -on_rate[i])
    rank = range(len(order))
    with _figure(9, 3.4) as (figure, text):
        units, classes = figure.subplots(1, 2, width_ratios=[2.2, 1])
        units.fill_between(
            rank, [on_rate[i] for i in order], color="#b9c6d6", lw=0, label=f"on for class {predicted}, share"
        )
        units.set_ylim(0, 1.02)
        units.set_ylabel("share of the class's inputs")
        units.set_xlabel("units, those that the class uses most first")
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
