"""`Explainer`: why a model's inputs score as they do."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from featnorm.hidden import ActivationStatistics, Explanation, explain
from featnorm.tap import FeatureTap


class Explainer:
    """Explains inputs by what a model's last hidden layer does for in-distribution inputs of the same class.

    Parameters
    ----------
    model : a model that `FeatureTap` finds a last hidden layer and logits in.
    layer : see `FeatureTap`.
    class_names : what the model's logits are of, one name each; without, classes are called by number.
    """

    def __init__(
        self,
        model: nn.Module,
        layer: str | nn.Module | None = None,
        *,
        class_names: Sequence[str] | None = None,
    ) -> None:
        self.tap = FeatureTap(model, layer)
        self.class_names = class_names
        self.statistics = ActivationStatistics()

    def fit(self, loader: Iterable[Any], *, progress: bool | None = None) -> "Explainer":
        """Count which units are on for in-distribution inputs, by the class that the model predicts for them.

        Labels are not needed. A second fit begins anew.
        """
        self.statistics = ActivationStatistics()
        for features in self.tap.stream(loader, progress=progress):
            self.statistics.update(features.tensor("activation").cpu(), features.tensor("logits").argmax(1).cpu())
        if self.statistics.is_empty:
            raise ValueError("the loader yielded no batch")
        return self

    def __call__(self, inputs: Tensor) -> list[Explanation]:
        """Explain each input of a batch.

        Raises
        ------
        ValueError
            The explainer was not fitted, the model has no hidden classifier that can be read off, see
            `FeatureTap.hidden`, or there is not a name for each of its classes.
        """
        if self.statistics.is_empty:
            raise ValueError("the explainer knows no in-distribution inputs yet: call fit with a loader of them")
        return explain(self.tap.hidden(inputs), self.statistics, self.class_names)
