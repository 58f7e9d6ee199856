"""`Explainer`, which explains the scores of a model's inputs."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import Tensor, nn

from featnorm.hidden import ActivationStatistics, Explanation, explain
from featnorm.tap import FeatureTap


class Explainer:
    """Explains inputs by comparing their last hidden layer with that of in-distribution inputs of the same class.

    Parameters
    ----------
    model : model in which `FeatureTap` finds a last hidden layer and logits.
    layer : see `FeatureTap`.
    class_names : class names, one per logit. Default: class indices.

    Examples
    --------
    >>> explainer = Explainer(model).fit(train_loader)
    >>> print(explainer(images)[0])
    the network predicts ...
    ...
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
        """Count which units are on for in-distribution inputs, by the class that the model predicts.

        Labels are not needed. Fitting again starts from scratch.
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
            The explainer is not fitted, the model has no hidden classifier (see `FeatureTap.hidden`), or the
            number of class names is not that of the logits.
        """
        if self.statistics.is_empty:
            raise ValueError("the explainer is not fitted: call fit with a loader of in-distribution inputs")
        return explain(self.tap.hidden(inputs), self.statistics, self.class_names)
