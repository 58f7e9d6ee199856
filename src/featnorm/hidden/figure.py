"""The picture of an explanation."""

from collections.abc import Sequence

from matplotlib.ticker import MaxNLocator

from featnorm._utils.svg import plain_axes, svg_figure


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
    activation, on_rate : activation (d,) of the input, and share of inputs of its class for which each unit is on.
    logits, norm : logits (K,) of the hidden classifier, and the l1-norm, which is their upper bound.
    predicted, peers : the predicted class, and the name of the inputs to compare with.
    """
    order = sorted(range(len(activation)), key=lambda i: -on_rate[i])
    rank = range(len(order))
    with svg_figure(9, 3.4) as (figure, text):
        units, classes = figure.subplots(1, 2, width_ratios=[2.2, 1])
        units.fill_between(
            rank,
            [on_rate[i] for i in order],
            color="#b9c6d6",
            lw=0,
            label=f"{peers}: share of inputs with the unit on",
        )
        units.set_ylim(0, 1.02)
        units.set_ylabel("share of inputs")
        units.set_xlabel("units, by this share")
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
            plain_axes(ax)
        values.grid(visible=False)
    return text.getvalue()
