"""Plots as inline SVG, whose colors come from the style sheet of the page.

Matplotlib draws with placeholder colors; the finished SVG refers to the custom properties of the page (``--ink``,
``--s0``, ...), so that one plot works in a light and a dark theme. Plots contain no text from the user: the page
puts names beside them, where they wrap and screen readers can read them.
"""

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter, StrMethodFormatter

from featnorm.metrics import roc_curve

__all__ = ["DASHES", "SERIES", "Outside", "evidence", "histogram", "mean_p_values", "roc", "series", "span"]

Array = npt.NDArray[np.float64]

SERIES = 9
"""Number of colors: one for ID, the others for OOD sets, which reuse them if there are more sets."""

DASHES = ("", "7 2.5", "2.5 2", "8 2.5 2 2.5")
"""Dash patterns of lines, so that color is never the only difference between OOD sets."""

_ROLES = {role: f"#0101{index:02x}" for index, role in enumerate(["ink", "muted", "rule"])} | {
    f"s{index}": f"#0102{index:02x}" for index in range(SERIES)
}
_FONT_SIZE = 13.0
_CURVE_POINTS = 200
# Sizes in SVG units; the page shows the first two side by side, at the ratio of their widths.
_HISTOGRAM = (430, 310)
_ROC = (310, 310)
_STREAM = (760, 300)


@dataclass(frozen=True)
class Outside:
    """Shares of the scores of a set that lie outside the range of a histogram."""

    below: float
    above: float
    minus_infinity: float  # included in `below`
    plus_infinity: float  # included in `above`


def series(index: int) -> tuple[str, str]:
    """Return the custom property and dash pattern of a set: index 0 is ID, OOD sets start at 1."""
    if index == 0:
        return "s0", DASHES[0]
    return f"s{1 + (index - 1) % (SERIES - 1)}", DASHES[(index - 1) % len(DASHES)]


def span(samples: Sequence[Array]) -> tuple[float, float]:
    """Return the range of histograms of samples: their joint 0.5 to 99.5 percentile, ignoring infinities.

    The ends are scores, moved apart if they are nearly equal. If no score is finite, the range is (0, 1).
    """
    pooled = np.concatenate(samples)
    pooled = pooled[np.isfinite(pooled)]
    if len(pooled) == 0:
        return 0.0, 1.0
    # The difference of two scores can overflow float64, and matplotlib computes a few such differences.
    pooled = np.clip(pooled, -1e300, 1e300)
    low = float(np.quantile(pooled, 0.005, method="lower"))
    high = float(np.quantile(pooled, 0.995, method="higher"))
    scale = max(abs(low), abs(high))
    if high - low <= 1e-9 * scale or scale < 1e-300:
        pad = 0.05 * scale if scale >= 1e-300 else 0.5
        return low - pad, high + pad
    return low, high


def histogram(
    samples: Sequence[Array], threshold: float, *, prefix: str, label: str
) -> tuple[Markup, list[Outside]]:
    """Draw histograms of several sets of scores over the same bins, each bin as a share of its set.

    Scores outside the range of `span` are counted in an extra, separate bar at either end. Such a bar is truncated
    if it would flatten the rest.

    Parameters
    ----------
    samples : the ID scores, then the scores of each OOD set, each (n,).
    threshold : score at which to draw the line between accepted and flagged, if it is in the range.
    prefix : prefix of the ids in this SVG, unique in its page.
    label : description of the picture, for screen readers.

    Returns
    -------
    svg, outside
        The picture, and the shares outside the range for each of the samples.
    """
    low, high = span(samples)
    bins = int(np.clip(np.sqrt(min(map(len, samples))), 12, 60))
    edges = np.linspace(low, high, bins + 1)
    width = (high - low) / bins
    inside = [np.histogram(sample, edges)[0] / len(sample) for sample in samples]
    outside = [
        Outside(*(float(np.mean(x)) for x in (s < low, s > high, s == -np.inf, s == np.inf))) for s in samples
    ]
    peak = max(float(shares.max()) for shares in inside)
    beyond = max(max(o.below, o.above) for o in outside)
    top = max(peak, min(beyond, 1.25 * peak)) if peak else beyond
    # The extra bars are set off by one and a half bins, to show that they are different.
    ends = [(low - 2.5 * width, low - 1.5 * width), (high + 1.5 * width, high + 2.5 * width)]

    with _axes(_HISTOGRAM, "score (higher: more in-distribution)", "share of the set per bin") as (figure, ax):

        def bars(index: int, shares: npt.ArrayLike, edges: npt.ArrayLike) -> None:
            filled = index == 0 or len(samples) <= 3
            ax.stairs(
                shares,
                edges,
                fill=True,
                facecolor=(_color(index), 0.16 if filled else 0.0),
                edgecolor=_color(index),
                linestyle=_dash(index),
                linewidth=2.2 if index == 0 else 1.6,
                clip_on=False,
            )

        for index in reversed(range(len(samples))):  # ID last, on top
            bars(index, inside[index], edges)
            for end, share in zip(ends, (outside[index].below, outside[index].above), strict=True):
                if share:
                    bars(index, [min(share, top)], end)
        limits = [low, high]
        for side, (end, word) in enumerate(zip(ends, ("below", "above"), strict=True)):
            largest = max(getattr(out, word) for out in outside)
            if largest:
                limits[side] = end[side]
                text = f"{word}, up to {100 * largest:.0f}\N{NO-BREAK SPACE}%" if largest > top else word
                ax.text(
                    end[side],
                    1.05 * top,
                    text,
                    ha=("left", "right")[side],
                    color=_ROLES["muted"],
                    fontsize=_FONT_SIZE - 2,
                )
        ax.set_xlim(*limits)
        ax.set_ylim(0, 1.14 * top)
        ticks = MaxNLocator(5).tick_values(low, high)
        ax.set_xticks([tick for tick in ticks if low <= tick <= high])
        ax.yaxis.set_major_locator(MaxNLocator(4))
        ax.yaxis.set_major_formatter(PercentFormatter(1, symbol="\N{NO-BREAK SPACE}%"))
        if low <= threshold <= high:
            ax.plot([threshold] * 2, [0, 1.02 * top], color=_ROLES["ink"], lw=1.3, ls=(0, (4, 3)), clip_on=False)
        return _svg(figure, _HISTOGRAM, prefix, label), outside


def roc(
    id_scores: Array,
    ood_scores: Sequence[Array],
    operating_points: Sequence[tuple[float, float]],
    *,
    prefix: str,
    label: str,
) -> Markup:
    """Draw ROC curves as SVG, one per OOD set, with ID as the positive class.

    Parameters
    ----------
    id_scores, ood_scores : (n,) scores of the ID set, and of each OOD set.
    operating_points : FPR and TPR of the point to mark on each curve.
    prefix, label : see `histogram`.
    """
    with _axes(_ROC, "FPR: OOD accepted", "TPR: ID accepted") as (figure, ax):
        ax.plot([0, 1], [0, 1], color=_ROLES["muted"], lw=1, ls=(0, (2, 3)), clip_on=False)
        for index, (scores, point) in enumerate(zip(ood_scores, operating_points, strict=True), 1):
            fpr, tpr = _thinned(*roc_curve(id_scores, scores))
            ax.plot(fpr, tpr, color=_color(index), ls=_dash(index), lw=1.9, clip_on=False)
            ax.plot(*([x] for x in point), "o", color=_color(index), ms=6, clip_on=False)
        for axis in (ax.xaxis, ax.yaxis):
            axis.set_ticks([0, 0.25, 0.5, 0.75, 1])
            axis.set_major_formatter(PercentFormatter(1, 0, symbol=""))
        ax.set_xlim(0, 1)
        ax.set_ylim(0, 1)
        return _svg(figure, _ROC, prefix, label)


def evidence(
    counts: Array, log10: Array, alarm_level: float, alarmed_at: int | None, *, noun: str, prefix: str, label: str
) -> Markup:
    """Draw the evidence for drift over a stream, as SVG.

    Parameters
    ----------
    counts, log10 : (n,) numbers of inputs, and the base-10 logarithm of the evidence there.
    alarm_level, alarmed_at : logarithm at which the alarm is raised, and the number of the input at which it was.
    noun : what an input is called.
    prefix, label : see `histogram`.
    """
    with _stream("log\N{SUBSCRIPT ONE}\N{SUBSCRIPT ZERO} of the evidence", counts[-1], alarmed_at, noun) as (
        figure,
        ax,
    ):
        ax.axhline(alarm_level, color=_ROLES["ink"], lw=1.3, ls=(0, (4, 3)))
        ax.plot(counts, log10, color=_color(0), lw=1.7, clip_on=False)
        ax.set_ylim(min(-1.0, float(log10.min())), 1.08 * max(alarm_level, float(log10.max())))
        ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
        return _svg(figure, _STREAM, prefix, label)


def mean_p_values(
    edges: Array, means: Array, usual: Array, alarmed_at: int | None, *, noun: str, prefix: str, label: str
) -> Markup:
    """Draw the mean p-value of a stream in bins, as SVG.

    Parameters
    ----------
    edges, means : (n + 1,) edges of the bins as numbers of inputs, and (n,) mean p-value in each.
    usual : (n,) half-width of the interval around 1/2 that holds 95 % of the means without drift.
    alarmed_at, noun, prefix, label : see `evidence`.
    """
    with _stream("mean p-value", edges[-1], alarmed_at, noun) as (figure, ax):
        ax.stairs(0.5 + usual, edges, baseline=0.5 - usual, fill=True, color=_ROLES["rule"])
        ax.axhline(0.5, color=_ROLES["ink"], lw=1.3, ls=(0, (4, 3)))
        ax.stairs(means, edges, baseline=None, color=_color(0), lw=1.7)
        ax.set_ylim(0, 1)
        ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
        return _svg(figure, _STREAM, prefix, label)


@contextmanager
def _stream(ylabel: str, count: float, alarmed_at: int | None, noun: str) -> Iterator[tuple[Figure, Axes]]:
    """Yield axes over the inputs of a stream, with a line where the alarm was raised."""
    with _axes(_STREAM, f"{noun}, in order of time", ylabel) as (figure, ax):
        ax.set_xlim(0, count)
        ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
        if alarmed_at is not None:
            ax.axvline(alarmed_at, color=_color(1), lw=1.7)
        yield figure, ax


def _thinned(fpr: Array, tpr: Array) -> tuple[Array, Array]:
    """Return at most 200 points of a curve, evenly spaced along it and including its ends.

    Both shares only increase, so their sum measures the distance along the curve. Between two of the points, the
    curve differs from the straight line by less than a hundredth.
    """
    if len(fpr) <= _CURVE_POINTS:
        return fpr, tpr
    keep = np.unique(np.searchsorted(fpr + tpr, np.linspace(0, 2, _CURVE_POINTS)).clip(0, len(fpr) - 1))
    return fpr[keep], tpr[keep]


def _color(index: int) -> str:
    return _ROLES[series(index)[0]]


def _dash(index: int) -> str | tuple[float, tuple[float, ...]]:
    dash = series(index)[1]
    return (0, tuple(map(float, dash.split()))) if dash else "solid"


@contextmanager
def _axes(size: tuple[int, int], xlabel: str, ylabel: str) -> Iterator[tuple[Figure, Axes]]:
    """Yield a figure and its axes, independent of the user's settings; draw and save it inside the context."""
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(
            {
                "svg.fonttype": "none",
                "svg.hashsalt": "featnorm",
                "font.size": _FONT_SIZE,
                "lines.scale_dashes": False,
                "lines.solid_capstyle": "butt",
                "text.color": _ROLES["ink"],
                "axes.labelcolor": _ROLES["muted"],
                "axes.edgecolor": _ROLES["muted"],
                "axes.spines.top": False,
                "axes.spines.right": False,
                "axes.spines.left": False,
                "xtick.labelcolor": _ROLES["muted"],
                "ytick.labelcolor": _ROLES["muted"],
            }
        )
        # At 72 dots per inch, one point is one dot and so one SVG unit.
        figure = Figure((size[0] / 72, size[1] / 72), dpi=72)
        figure.patch.set_visible(False)
        left, bottom, right, top = 62, 50, 12, 12
        ax = figure.add_axes(
            (
                left / size[0],
                bottom / size[1],
                1 - (left + right) / size[0],
                1 - (bottom + top) / size[1],
            )
        )
        ax.patch.set_visible(False)
        ax.set_axisbelow(True)
        ax.tick_params(bottom=False, left=False)
        ax.grid(axis="y", color=_ROLES["rule"], linewidth=1, clip_on=False)
        ax.set_xlabel(xlabel)
        ax.set_ylabel(ylabel)
        yield figure, ax


def _svg(figure: Figure, size: tuple[int, int], prefix: str, label: str) -> Markup:
    """Return a figure as an SVG element whose ids are unique in the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None})
    text = buffer.getvalue()
    body = text[text.index(">", text.index("<svg")) + 1 : text.rindex("</svg>")]
    body = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", body, flags=re.DOTALL)
    body = body.replace("xlink:href", "href")
    used = set(re.findall(r'(?:href="|url\()#([^")]+)', body))
    body = re.sub(r' id="([^"]*)"', lambda m: f' id="{prefix}-{m[1]}"' if m[1] in used else "", body)
    body = re.sub(r'(href="|url\()#', rf"\1#{prefix}-", body)
    body = re.sub(r' d="[^"]*"', lambda m: _shorter(m[0]), body)
    body = re.sub(r"font-family: [^;\"]*;?", "", body)
    for role, color in _ROLES.items():
        body = body.replace(color, f"var(--{role})")
    body = re.sub(r">\s+<", "><", body.strip())
    svg = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return svg.format(*size, label, Markup(body))


def _shorter(path: str) -> str:
    path = re.sub(r"-?\d+\.\d+", lambda m: f"{float(m[0]):.1f}".removesuffix(".0"), path)
    return re.sub(r"\s+", " ", path).replace(' "', '"')
