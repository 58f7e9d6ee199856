"""A plot of the ranking of detectors for papers and slides, as SVG, PDF or PNG."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from featnorm._utils.files import replacing

if TYPE_CHECKING:
    from featnorm.evaluation import Comparison

_LABELS = ("AUROC in % (higher is better)", "FPR95 in % (lower is better)")
_BLUE, _GRAY = "#0b5cad", "#9aa1a9"


def plot_ranking(comparison: Comparison, path: Path) -> None:
    """Draw AUROC and FPR95 of every detector, best AUROC first, with 95 % intervals; gray: the single OOD sets.

    Parameters
    ----------
    comparison : results to draw.
    path : file to write; its ending is the format, which may be any that matplotlib writes.

    Raises
    ------
    ValueError
        The ending is not that of a format.
    """
    first, *others = comparison.summaries
    names = [f"{r.detector}  {c}" for r, c in zip(comparison.ranked, comparison.cliques, strict=True)]
    places = np.arange(len(names))
    # Fixed fonts and no dates, so that equal results are equal files; the user's own settings do not matter.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update({"svg.hashsalt": "featnorm", "font.size": 9, "pdf.fonttype": 42})
        figure = Figure((7.2, 1.0 + 0.22 * len(names)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for ax, measure, words in zip(
            axes,
            ("auroc", "fpr95"),
            _LABELS,
            strict=True,
        ):
            for summary in others:
                if not summary.is_mean:
                    ax.plot(100 * getattr(summary, measure).value, places, "|", color=_GRAY, ms=6)
            estimate = getattr(first, measure)
            ax.hlines(places, 100 * estimate.low, 100 * estimate.high, color=_BLUE, lw=1.4)
            ax.plot(100 * estimate.value, places, "o", color=_BLUE, ms=4)
            ax.set_xlabel(f"{'mean ' if first.is_mean else ''}{words}")
            ax.grid(axis="x", color="#dfe1dc", lw=0.8)
            ax.set_axisbelow(True)
            ax.spines[["top", "right", "left"]].set_visible(False)
            ax.tick_params(length=0)
        # A dollar sign in the name of a detector would begin a formula.
        axes[0].set_yticks(places, names, family="monospace", parse_math=False)
        axes[0].invert_yaxis()
        dates = {".svg": {"Date": None}, ".pdf": {"CreationDate": None}}
        with replacing(path) as temporary:
            figure.savefig(temporary, format=path.suffix.lstrip(".") or None, metadata=dates.get(path.suffix))
