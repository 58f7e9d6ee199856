"""Explanations of scores: similar inputs, a heat map, and the units that are unexpectedly off or on."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from featnorm.hidden.classifier import HiddenClassifier
from featnorm.hidden.examples import Neighbor
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.norms import l0_norm, l1_norm, negative_aware_norm

# A unit is usually on for a class if it is on for at least this share of the class's inputs.
_USUALLY = 0.5


@dataclass(frozen=True, eq=False)
class Explanation:
    """The explanation of one input.

    Attributes
    ----------
    predicted, predicted_name : class that the network predicts, and its name.
    seen : number of in-distribution inputs for which the network predicts that class.
    hidden_prediction, hidden_predicted_name, hidden_confidence
        Class that the hidden classifier predicts, its name, and the confidence (paper eq. 3).
    hidden_logits : logits psi (K,) of the hidden classifier.
    norm, active, nan : l1-norm ``||a||_1``, number of units that are on, and negative-aware norm.
    activation : activation a (d,) of the last hidden layer.
    on_rate
        Share of in-distribution inputs of the predicted class for which each unit is on (d,); of all
        in-distribution inputs if ``seen`` is 0.

    Examples
    --------
    >>> explanation = Explainer(model).fit(train_loader)(images)[0]
    >>> picture = explanation.svg()
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
        """Indices of the units that are not 0, by their share of the norm, largest first."""
        size = self.activation.abs()
        return size.argsort(descending=True, stable=True)[: int((size > 0).sum())]

    @property
    def inactive_units(self) -> Tensor:
        """Indices of the units that are off but usually on for the class, by on rate, highest first."""
        usual = torch.where((self.activation <= 0) & (self.on_rate >= _USUALLY), self.on_rate, -1.0)
        return usual.argsort(descending=True, stable=True)[: int((usual >= 0).sum())]

    @property
    def unexpected_units(self) -> Tensor:
        """Indices of the units that are on but usually off for the class, by activation, largest first."""
        odd = torch.where((self.activation > 0) & (self.on_rate < _USUALLY), self.activation, -1.0)
        return odd.argsort(descending=True, stable=True)[: int((odd >= 0).sum())]

    @property
    def sentence(self) -> str:
        """How the input differs from in-distribution inputs of the class, in words."""
        usual = self.on_rate >= _USUALLY
        off, on = float((1 - self.on_rate)[usual].sum()), float(self.on_rate[~usual].sum())
        return (
            f"Predicted: {self.predicted_name}. "
            f"{len(self.inactive_units)} of the {int(usual.sum())} units that are usually on for {self._peers} "
            f"are off ({off:.0f} expected); "
            f"{len(self.unexpected_units)} of the {int((~usual).sum())} others are on ({on:.0f} expected)."
        )

    @property
    def _peers(self) -> str:
        return self.predicted_name if self.seen else "the in-distribution inputs"

    def rows(self, max_units: int = 8) -> list[tuple[str, str]]:
        """Return the explanation as a table of two columns, label and value.

        Parameters
        ----------
        max_units : maximum number of units listed per row.
        """
        expected = int((self.on_rate >= _USUALLY).sum())
        top = self.activation.abs()[self.top_units[:max_units]].sum() / max(self.norm, 1e-30)
        return [
            (
                "the network predicts",
                self.predicted_name + ("" if self.seen else ", which it predicts for no in-distribution input"),
            ),
            (
                "the hidden classifier predicts",
                f"{self.hidden_predicted_name}, with a confidence of {self.hidden_confidence:.4g} "
                f"({round(100 * self.hidden_confidence / max(self.norm, 1e-30))}% of the norm)",
            ),
            (
                "l1-norm; units on; NAN",
                f"{self.norm:.4g}; {self.active} of {len(self.activation)}; {self.nan:.4g}",
            ),
            ("largest units", f"{_units(self.top_units, max_units)} ({float(top):.0%} of the norm)"),
            (
                f"usually on for {self._peers}, off here",
                f"{len(self.inactive_units)} of {expected}" + _named(self.inactive_units, max_units),
            ),
            (
                f"usually off for {self._peers}, on here",
                f"{len(self.unexpected_units)} of {len(self.activation) - expected}"
                + _named(self.unexpected_units, max_units),
            ),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(label) for label, _ in rows)
        return "\n".join(f"{label:<{width}}  {value}" for label, value in rows)

    def svg(self) -> str:
        """Return the explanation as SVG text: the units beside those of the class, and the hidden logits."""
        from featnorm.hidden.figure import explanation_figure

        return explanation_figure(
            self.activation.tolist(),
            self.on_rate.tolist(),
            self.hidden_logits.tolist(),
            self.norm,
            self.predicted,
            self._peers,
        )


@dataclass(frozen=True, eq=False)
class Why:
    """Why an input has its score, as far as it is known.

    Attributes
    ----------
    units : comparison of its last hidden layer with that of in-distribution inputs, or None.
    terms : expression of each term of a `Sum`, and what it adds to the score, see `Sum.term_scores`.
    nearest : most similar images among a sample of those that the scorer was fitted to, the most similar first.
    heat
        How much each position of the model's last maps adds to the score, positive or negative, (height, width),
        see `featnorm.tap.heat.heat_maps`; None if it was not requested, or there is none.
    compared
        Whether the heat map compares each position with the mean of the ``nearest`` images; otherwise with the
        mean of all positions of the input.
    no_heat : why there is no heat map, if it was requested.
    """

    units: Explanation | None = None
    terms: list[tuple[str, float]] = field(default_factory=list)
    nearest: list[Neighbor] = field(default_factory=list)
    heat: Tensor | None = None
    compared: bool = False
    no_heat: str = ""

    @property
    def reference(self) -> str:
        """What the heat map compares each position with the mean of, in words."""
        return "the most similar images" if self.compared else "the whole image"

    @property
    def sentence(self) -> str:
        """The explanation in words."""
        similar = f"Most similar in-distribution images: {'; '.join(map(str, self.nearest))}."
        score = f"Score by term: {self.score_by_term}." if self.terms else ""
        parts = ["" if self.units is None else self.units.sentence, score, similar if self.nearest else ""]
        return " ".join(filter(None, parts))

    @property
    def score_by_term(self) -> str:
        """What each term of a sum adds to the score, in words; empty for other detectors."""
        return ", ".join(f"{term} {value:+.2f}".replace(" -", " \u2212") for term, value in self.terms)

    def rows(self) -> list[tuple[str, str]]:
        """Return the explanation as a table of two columns, label and value."""
        similar = [("most similar in-distribution images", "; ".join(map(str, self.nearest)))]
        score = [("score by term", self.score_by_term)] if self.terms else []
        return [*([] if self.units is None else self.units.rows()), *score, *(similar if self.nearest else [])]


def explain(
    hidden: HiddenClassifier, statistics: ActivationStatistics, names: Sequence[str] | None = None
) -> list[Explanation]:
    """Explain each of n inputs.

    Parameters
    ----------
    hidden : hidden classifier of the n inputs.
    statistics : statistics of the same layer for in-distribution inputs, by the class that the network predicts.
    names : class names, one per logit. Default: class indices.

    Raises
    ------
    ValueError
        The statistics are empty or of another number of units, or the number of names is not that of the classes.
    """
    if names is not None and len(names) != hidden.logits.shape[1]:
        raise ValueError(f"got {len(names)} class names for {hidden.logits.shape[1]} classes")
    a = hidden.activation.cpu()
    if a.shape[1] != statistics.width:
        raise ValueError(
            f"statistics of {statistics.width} units cannot explain activations of {a.shape[1]} units: use the "
            "same layer, which must return one vector per input"
        )
    predicted = hidden.output_logits.argmax(1).tolist()
    overall, seen = statistics.on_rate, statistics.class_inputs.tolist()
    norms, counts, nans = l1_norm(a).tolist(), l0_norm(a).tolist(), negative_aware_norm(a).tolist()
    psi, confidence = hidden.logits.cpu(), hidden.confidence.tolist()

    def name(k: int) -> str:
        return f"class {k}" if names is None else names[k]

    explanations = []
    for i, k in enumerate(predicted):
        count = seen[k] if k < len(seen) else 0
        hidden_prediction = int(psi[i].argmax())
        explanations.append(
            Explanation(
                predicted=k,
                predicted_name=name(k),
                seen=count,
                hidden_prediction=hidden_prediction,
                hidden_predicted_name=name(hidden_prediction),
                hidden_confidence=confidence[i],
                hidden_logits=psi[i],
                norm=norms[i],
                active=int(counts[i]),
                nan=nans[i],
                activation=a[i],
                on_rate=statistics.class_on[k].double() / count if count else overall,
            )
        )
    return explanations


def _units(units: Tensor, limit: int) -> str:
    return ", ".join(str(unit) for unit in units[:limit].tolist())


def _named(units: Tensor, limit: int) -> str:
    if not len(units):
        return ""
    return f": {_units(units, limit)}" + (", ..." if len(units) > limit else "")
