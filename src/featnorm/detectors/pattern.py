"""Which units are on: the activation pattern of the predicted class."""

from typing import NamedTuple

import torch
from torch import Tensor

from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import Moments
from featnorm.features import Features


class _Patterns(NamedTuple):
    """Linear functions of which units are on, one per class up to the last with inputs, and one for later ones."""

    weight: Tensor  # (K + 1, d) log-odds that a unit is on
    bias: Tensor  # (K + 1,) log-probability that all units are off


class ActivationPattern(Detector):
    """Log-probability of the units that are on, given the predicted class.

    NAN counts how many units are on; this score also knows which ones should be. A unit is on if its activation is
    positive (paper eq. 9). Units are taken as independent within a class: ``sum_i log p(s_i | y)``, where
    ``p(s_i = on | y)`` is the share of the training inputs predicted as y for which unit i is on. No labels are
    needed. Each class also counts one input with the rates of all inputs, so that no probability is 0; a class
    that is predicted for no training input has these rates.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> ActivationPattern().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("activation", "logits")
    learns = ("activation", "logits")
    source = "this library, docs/results/norms.md"
    formula = r"\sum_i \log p(s_i \mid y)"
    cost = "O(C d)"
    standard = ("ActivationPattern()",)

    def __init__(self) -> None:
        super().__init__()
        self.on = Moments(gram=False)

    def _partial_fit(self, features: Features) -> None:
        on = (features.tensor("activation") > 0).float()
        self.on.update(on, features.tensor("logits").argmax(1), on.new_zeros(on.shape[1]))

    def _finalize(self) -> _Patterns:
        prior = (self.on.sums.sum(0) + 0.5) / (self.on.total + 1)
        rates = prior.repeat(int(self.on.groups[-1]) + 2, 1)
        rates[self.on.groups] = (self.on.sums + prior) / (self.on.counts[:, None] + 1)
        off = (1 - rates).log()
        return _Patterns(rates.log() - off, off.sum(1))

    def _score(self, features: Features) -> Tensor:
        activation = features.tensor("activation")
        self._same_width("activation", activation, self.on.width)
        weight, bias = self._fitted_state()
        y = features.tensor("logits").argmax(1).clamp(max=len(bias) - 1)
        every = torch.addmm(bias, (activation > 0).double(), weight.T)
        return every.gather(1, y[:, None])[:, 0]
