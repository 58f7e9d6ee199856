"""Why an input scores as it does: which units carry its norm, which are missing, what is predicted in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from featnorm.hidden.classifier import HiddenClassifier
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.norms import l0_norm, l1_norm, negative_aware_norm

# A unit belongs to a class where it is on for at least this share of the class's inputs.
_OWN = 0.5


@dataclass(frozen=True, eq=False)
class Explanation:
    """What there is to say of one input.

    Attributes
    ----------
    predicted, predicted_name : the class that the network predicts, and its name.
    seen : how many in-distribution inputs were taken for that class.
    hidden_prediction, hidden_predicted_name, hidden_confidence
        Of the classifier that is hidden in the last hidden layer (paper eq. 3).
    hidden_logits : psi (K,).
    norm, active, nan : ``||a||_1``, the number of units on, and the negative-aware norm.
    activation : a (d,).
    on_rate
        (d,) how often each unit is on for in-distribution inputs that are taken for the class too; for all
        in-distribution inputs where there is none.
    """

    predicted: int
    predicted_name: str
    seen: int
    hidden_prediction: int
    hidden_predicted_name: str
    hidden_confidence: float
    hidden_logits: Tensor
    norm: float
    active: int
    nan: float
    activation: Tensor
    on_rate: Tensor

    @property
    def top_units(self) -> Tensor:
        """The units that are not 0, by their share of the norm, largest first."""
        size = self.activation.abs()
        return size.argsort(descending=True, stable=True)[: int((size > 0).sum())]

    @property
    def inactive_units(self) -> Tensor:
        """The units that are off here and on for most inputs of the class, the most usual first."""
        usual = torch.where((self.activation <= 0) & (self.on_rate >= _OWN), self.on_rate, -1.0)
        return usual.argsort(descending=True, stable=True)[: int((usual >= 0).sum())]

    @property
    def unexpected_units(self) -> Tensor:
        """The units that are on here and off for most inputs of the class, the largest first."""
        odd = torch.where((self.activation > 0) & (self.on_rate < _OWN), self.activation, -1.0)
        return odd.argsort(descending=True, stable=True)[: int((odd >= 0).sum())]

    @property
    def sentence(self) -> str:
        """What is unlike in-distribution inputs of the class, in words."""
        usual = self.on_rate >= _OWN
        off, on = float((1 - self.on_rate)[usual].sum()), float(self.on_rate[~usual].sum())
        return (
            f"Taken for {self.predicted_name}. "
            f"Of the {int(usual.sum())} units that are on for most of {self._peers}, "
            f"{len(self.inactive_units)} are off ({off:.0f} expected); of the {int((~usual).sum())} others, "
            f"{len(self.unexpected_units)} are on ({on:.0f} expected)."
        )

    @property
    def _peers(self) -> str:
        return self.predicted_name if self.seen else "the in-distribution inputs"

    def rows(self, most: int = 8) -> list[tuple[str, str]]:
        """The explanation as a table of two columns: what, and how it is.

        Parameters
        ----------
        most : units that are named a row.
        """
        expected = int((self.on_rate >= _OWN).sum())
        carried = self.activation.abs()[self.top_units[:most]].sum() / max(self.norm, 1e-30)
        return [
            (
                "the network predicts",
                self.predicted_name + ("" if self.seen else ", which it predicts for no in-distribution input"),
            ),
            (
                "the hidden classifier predicts",
                f"{self.hidden_predicted_name}, with a confidence of {self.hidden_confidence:.4g} "
                f"({self.hidden_confidence / max(self.norm, 1e-30):.0%} of the norm)",
            ),
            (
                "l1-norm; units on; NAN",
                f"{self.norm:.4g}; {self.active} of {len(self.activation)}; {self.nan:.4g}",
            ),
            ("units that carry the norm", f"{_units(self.top_units, most)} ({float(carried):.0%} of it)"),
            (
                f"on for most of {self._peers}, off here",
                f"{len(self.inactive_units)} of {expected}" + _named(self.inactive_units, most),
            ),
            (
                f"off for most of {self._peers}, on here",
                f"{len(self.unexpected_units)} of {len(self.activation) - expected}"
                + _named(self.unexpected_units, most),
            ),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"{what:<{width}}  {how}" for what, how in rows)

    def svg(self) -> str:
        """The explanation as a picture, SVG text: the units beside those of the class, and the hidden logits."""
        from featnorm.hidden.figure import explanation_figure

        return explanation_figure(
            self.activation.tolist(),
            self.on_rate.tolist(),
            self.hidden_logits.tolist(),
            self.norm,
            self.predicted,
            self._peers,
        )


def explain(
    hidden: HiddenClassifier, statistics: ActivationStatistics, names: Sequence[str] | None = None
) -> list[Explanation]:
    """Explain each of n inputs.

    Parameters
    ----------
    hidden : of the inputs.
    statistics : of in-distribution inputs in the same layer, by the class that the network predicts for them.
    names : of the classes.

    Raises
    ------
    ValueError
        The statistics are of nothing, or of another number of units, or the names of another number of classes.
    """
    if names is not None and len(names) != hidden.logits.shape[1]:
        raise ValueError(f"there are {len(names)} names for {hidden.logits.shape[1]} classes")
    a = hidden.activation.cpu()
    if a.shape[1] != statistics.width:
        raise ValueError(
            f"statistics of {statistics.width} units cannot explain inputs in {a.shape[1]}: an explanation names "
            "single units, of a layer of vectors"
        )
    predicted = hidden.output_logits.argmax(1).tolist()
    overall, seen = statistics.on_rate, statistics.class_inputs.tolist()
    norms, counts, nans = l1_norm(a).tolist(), l0_norm(a).tolist(), negative_aware_norm(a).tolist()
    psi, confidence = hidden.logits.cpu(), hidden.confidence.tolist()

    def name(k: int) -> str:
        return f"class {k}" if names is None else names[k]

    explanations = []
    for i, k in enumerate(predicted):
        known = seen[k] if k < len(seen) else 0
        hidden_prediction = int(psi[i].argmax())
        explanations.append(
            Explanation(
                predicted=k,
                predicted_name=name(k),
                seen=known,
                hidden_prediction=hidden_prediction,
                hidden_predicted_name=name(hidden_prediction),
                hidden_confidence=confidence[i],
                hidden_logits=psi[i],
                norm=norms[i],
                active=int(counts[i]),
                nan=nans[i],
                activation=a[i],
                on_rate=statistics.class_on[k].double() / known if known else overall,
            )
        )
    return explanations


def _units(units: Tensor, most: int) -> str:
    return ", ".join(str(unit) for unit in units[:most].tolist())


def _named(units: Tensor, most: int) -> str:
    if not len(units):
        return ""
    return f": {_units(units, most)}" + (", ..." if len(units) > most else "")
