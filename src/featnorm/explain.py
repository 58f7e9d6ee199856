"""Why an input scores as it does: which units carry its norm, which are missing, what is predicted in them."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.activation import ActivationStatistics
from featnorm.norms import l0_norm, l1_norm, negative_aware_norm
from featnorm.tap import FeatureTap

# A unit belongs to a class where it is on for at least this share of the class's inputs.
_OWN = 0.5


@dataclass(frozen=True, eq=False)
class Explanation:
    """What there is to say of one input.

    Attributes
    ----------
    predicted : the class that the network predicts.
    hidden_prediction, hidden_confidence : of the classifier hidden in the last hidden layer (paper eq. 3).
    hidden_logits : psi (K,).
    norm, active, nan : ``||a||_1``, the number of units on, and the negative-aware norm.
    activation : a (d,).
    on_rate : (d,) how often each unit is on for in-distribution inputs of the predicted class.
    """

    predicted: int
    hidden_prediction: int
    hidden_confidence: float
    hidden_logits: Tensor
    norm: float
    active: int
    nan: float
    activation: Tensor
    on_rate: Tensor

    @property
    def carriers(self) -> Tensor:
        """The units that are not 0, by their share of the norm, largest first."""
        size = self.activation.abs()
        return size.argsort(descending=True, stable=True)[: int((size > 0).sum())]

    @property
    def missing(self) -> Tensor:
        """The units that are off here and on for most inputs of the class, the most usual first."""
        usual = torch.where((self.activation <= 0) & (self.on_rate >= _OWN), self.on_rate, -1.0)
        return usual.argsort(descending=True, stable=True)[: int((usual >= 0).sum())]

    @property
    def strange(self) -> Tensor:
        """The units that are on here and off for most inputs of the class, the largest first."""
        odd = torch.where((self.activation > 0) & (self.on_rate < _OWN), self.activation, -1.0)
        return odd.argsort(descending=True, stable=True)[: int((odd >= 0).sum())]

    def rows(self, most: int = 8) -> list[tuple[str, str]]:
        """The explanation as a table of two columns: what, and how it is.

        Parameters
        ----------
        most : units that are named a row.
        """
        expected = int((self.on_rate >= _OWN).sum())
        carried = self.activation.abs()[self.carriers[:most]].sum() / max(self.norm, 1e-30)
        return [
            ("the network predicts", f"class {self.predicted}"),
            (
                "the hidden classifier predicts",
                f"class {self.hidden_prediction}, with a confidence of {self.hidden_confidence:.4g} "
                f"({self.hidden_confidence / max(self.norm, 1e-30):.0%} of the norm)",
            ),
            (
                "l1-norm; units on; NAN",
                f"{self.norm:.4g}; {self.active} of {len(self.activation)}; {self.nan:.4g}",
            ),
            ("units that carry the norm", f"{_units(self.carriers, most)} ({float(carried):.0%} of it)"),
            (
                f"on for most of class {self.predicted}, off here",
                f"{len(self.missing)} of {expected}" + _named(self.missing, most),
            ),
            (
                f"off for most of class {self.predicted}, on here",
                f"{len(self.strange)} of {len(self.activation) - expected}" + _named(self.strange, most),
            ),
        ]

    def __str__(self) -> str:
        rows = self.rows()
        width = max(len(what) for what, _ in rows)
        return "\n".join(f"{what:<{width}}  {how}" for what, how in rows)

    def svg(self) -> str:
        """The explanation as a picture, SVG text: the units beside those of the class, and the hidden logits."""
        from featnorm.report.figures import explanation_figure

        return explanation_figure(
            self.activation.tolist(), self.on_rate.tolist(), self.hidden_logits.tolist(), self.norm, self.predicted
        )


class Explainer:
    """Explains inputs by what a model's last hidden layer does for in-distribution inputs of the same class.

    Parameters
    ----------
    model : a model that `FeatureTap` finds a last hidden layer and logits in.
    layer : see `FeatureTap`.
    """

    def __init__(self, model: nn.Module, layer: str | nn.Module | None = None) -> None:
        self.tap = FeatureTap(model, layer)
        self.statistics = ActivationStatistics()

    def fit(self, loader: Iterable[Any], *, progress: bool | None = None) -> "Explainer":
        """Count which units are on for in-distribution inputs, by the class that the model predicts for them.

        Labels are not needed. A second fit begins anew.
        """
        self.statistics = ActivationStatistics()
        for features in self.tap.stream(loader, progress=progress):
            self.statistics.add(features.tensor("activation").cpu(), features.tensor("logits").argmax(1).cpu())
        if self.statistics.is_empty:
            raise ValueError("the loader yielded no batch")
        return self

    def __call__(self, inputs: Tensor) -> list[Explanation]:
        """Explain each input of a batch.

        Raises
        ------
        ValueError
            The explainer was not fitted, no in-distribution input of a predicted class was seen, or the model has
            no hidden classifier that can be read off, see `FeatureTap.hidden`.
        """
        if self.statistics.is_empty:
            raise ValueError("the explainer knows no in-distribution inputs yet: call fit with a loader of them")
        hidden = self.tap.hidden(inputs)
        a = hidden.activation.cpu()
        if a.shape[1] != self.statistics.width:
            raise ValueError("the layer puts out maps: an explanation names single units, of a layer of vectors")
        predicted = hidden.output_logits.argmax(1).tolist()
        rates = self.statistics.class_on_rate
        norms, counts, nans = l1_norm(a).tolist(), l0_norm(a).tolist(), negative_aware_norm(a).tolist()
        psi, confidence = hidden.logits.cpu(), hidden.confidence.tolist()
        explanations = []
        for i, k in enumerate(predicted):
            if k >= len(rates) or not int(self.statistics.class_inputs[k]):
                raise ValueError(f"input {i} is taken for class {k}, of which no in-distribution input was seen")
            explanations.append(
                Explanation(
                    predicted=k,
                    hidden_prediction=int(psi[i].argmax()),
                    hidden_confidence=confidence[i],
                    hidden_logits=psi[i],
                    norm=norms[i],
                    active=int(counts[i]),
                    nan=nans[i],
                    activation=a[i],
                    on_rate=rates[k],
                )
            )
        return explanations


def _units(units: Tensor, most: int) -> str:
    return ", ".join(str(unit) for unit in units[:most].tolist())


def _named(units: Tensor, most: int) -> str:
    if not len(units):
        return ""
    return f": {_units(units, most)}" + (", ..." if len(units) > most else "")
