"""Detectors that read the logits, `SHE` with the pooled feature."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from featnorm._utils.checks import Integer, Interval, table
from featnorm.detectors.base import Detector, require_labels
from featnorm.detectors.statistics import Moments
from featnorm.features import Features


class _Confidence(Detector):
    reads = ("logits",)
    cost = "O(C)"

    def _score(self, features: Features) -> Tensor:
        logits = features.tensor("logits")
        exact = logits.dtype in (torch.float32, torch.float64)
        return self._of(logits if exact else logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @abstractmethod
    def _of(self, logits: Tensor) -> Tensor:
        """Return the scores (n,) of logits (n, C) of at least float32."""


class MSP(_Confidence):
    """The maximum softmax probability (Hendrycks and Gimpel, ICLR 2017).

    Examples
    --------
    >>> features = Features(logits=torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 0.5]]))
    >>> MSP().score(features)
    tensor([0.9647, 0.3837])
    """

    source = "Hendrycks and Gimpel, ICLR 2017"
    formula = r"\max_k p_k"
    standard = ("MSP()",)

    def _of(self, logits: Tensor) -> Tensor:
        return logits.softmax(1).amax(1)


class MaxLogit(_Confidence):
    """The largest logit (Hendrycks et al., ICML 2022; Vaze et al., ICLR 2022).

    Examples
    --------
    >>> features = Features(logits=torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 0.5]]))
    >>> MaxLogit().score(features)
    tensor([4., 1.])
    """

    source = "Hendrycks et al., ICML 2022; Vaze et al., ICLR 2022"
    formula = r"\max_k l_k"
    standard = ("MaxLogit()",)

    def _of(self, logits: Tensor) -> Tensor:
        return logits.amax(1)


class Energy(_Confidence):
    """The negative free energy, ``log sum_k exp(logit_k)`` (Liu et al., NeurIPS 2020).

    Examples
    --------
    >>> features = Features(logits=torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 0.5]]))
    >>> Energy().score(features)
    tensor([4.0360, 1.9580])
    """

    source = "Liu et al., NeurIPS 2020"
    formula = r"\log \sum_k \exp l_k"
    standard = ("Energy()",)

    def _of(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(1)


class KLUniform(_Confidence):
    """The divergence of the uniform distribution from the softmax, ``KL(u || p)`` ("KL" of Tables 1 and 3).

    ``KL(u || p) = logsumexp(l) - mean(l) - log C``. Its ranking is nearly that of `Energy`.

    Examples
    --------
    >>> features = Features(logits=torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 0.5]]))
    >>> KLUniform().score(features)
    tensor([1.6040, 0.0261])
    """

    source = "Park et al., ICCV 2023, Tables 1 and 3"
    formula = r"\operatorname{KL}(u \,\Vert\, p) = \log \sum_k \exp l_k - \frac{1}{C} \sum_k l_k - \log C"
    standard = ("KLUniform()",)

    def _of(self, logits: Tensor) -> Tensor:
        # Differences from the largest logit are exact even if all logits are huge and alike.
        shifted = logits - logits.amax(1, keepdim=True)
        return shifted.exp().sum(1).log() - shifted.mean(1) - math.log(logits.shape[1])


class GEN(_Confidence):
    """The generalized entropy of the softmax, negated: ``-sum p^gamma (1 - p)^gamma`` (Liu et al., CVPR 2023).

    The sum is over the largest probabilities p. It is computed from logarithms in float64: ``p^0.1`` has an
    infinite slope at 0, so the rounding of a probability near 0 or 1 would change the score.

    Parameters
    ----------
    gamma : the exponent, a positive number.
    top : number of probabilities, the largest, in the sum; all if there are fewer classes.

    Raises
    ------
    ValueError
        ``gamma`` is not positive, or ``top`` is not a positive integer.

    Examples
    --------
    >>> features = Features(logits=torch.tensor([[4.0, 0.0, 0.0], [1.0, 1.0, 0.5]]))
    >>> GEN().score(features)
    tensor([-2.0467, -2.5732])
    """

    source = "Liu et al., CVPR 2023"
    formula = r"-\sum_k p_k^\gamma (1 - p_k)^\gamma"
    cost = "O(C log C)"
    standard = ("GEN()",)
    settings = table(gamma=Interval(0, math.inf), top=Integer(1))
    gamma: float
    top: int

    def __init__(self, gamma: float = 0.1, top: int = 100) -> None:
        super().__init__()
        self._set(gamma=gamma, top=top)

    def _of(self, logits: Tensor) -> Tensor:
        logits = logits.double()
        largest, classes = logits.topk(min(self.top, logits.shape[1]))
        total = logits.logsumexp(1, keepdim=True)
        p = largest - total
        # 1 - p of the largest is the sum of the others: a difference from 1 would lose it.
        others = logits.scatter(1, classes[:, :1], -math.inf).logsumexp(1, keepdim=True) - total
        log_1_p = torch.cat([others, torch.log1p(-p[:, 1:].exp())], 1)
        return -(self.gamma * (p + log_1_p)).exp().sum(1)


class KLMatching(Detector):
    """Divergence of the softmax from that of the nearest class, negated (Hendrycks et al., ICML 2022).

    ``-min_k KL(p || q_k)``, where q_k is the mean softmax of the training inputs that the model classifies as k.
    No labels are needed. A class that the model predicts for no training input is skipped. A mean probability
    below the smallest normal float64 counts as that number, so that the score is finite.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> KLMatching().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("logits",)
    learns = ("logits",)
    source = "Hendrycks et al., ICML 2022"
    formula = r"-\min_k \operatorname{KL}(p \,\Vert\, q_k)"
    cost = "O(C^2)"
    standard = ("KLMatching()",)

    def __init__(self) -> None:
        super().__init__()
        self.softmax = Moments(gram=False)

    def _partial_fit(self, features: Features) -> None:
        logits = features.tensor("logits")
        self.softmax.update(logits.double().softmax(1), logits.argmax(1), logits.new_zeros(logits.shape[1]))

    def _finalize(self) -> Tensor:
        return self.softmax.means().clamp_min(torch.finfo(torch.float64).tiny).log()

    def _score(self, features: Features) -> Tensor:
        logits = features.tensor("logits")
        self._same_width("logits", logits, self.softmax.width)
        log_p = logits.double().log_softmax(1)
        p = log_p.exp()
        # -H(p) - sum p log q_k: a matrix product, and no tensor (n, C, C).
        cross = (p @ self._fitted_state().T).amax(1)
        return cross - (p * log_p).sum(1)


class SHE(Detector):
    """Inner product with the pattern of the predicted class (Zhang et al., ICLR 2023).

    The pattern of a class is the mean pooled feature of its correctly classified training inputs. The source
    leaves a class without such inputs undefined: here its pattern is the mean of all inputs with its label, or 0
    if there are none, which makes the score 0.

    Raises
    ------
    ValueError
        An input of the fit has no label, or a label that is not the index of a logit.

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> SHE().fit(features).score(features).shape
    torch.Size([320])
    """

    reads = ("pooled", "logits")
    learns = ("pooled", "logits", "labels")
    source = "Zhang et al., ICLR 2023"
    formula = r"\langle h, m_y \rangle"
    cost = "O(C + D)"
    standard = ("SHE()",)

    def __init__(self) -> None:
        super().__init__()
        # The groups are 2 c for the misclassified inputs of class c, and 2 c + 1 for the others.
        self.moments = Moments(gram=False)

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        require_labels(self, features.tensor("labels"), features.tensor("logits").shape[1])

    def _partial_fit(self, features: Features) -> None:
        labels = features.tensor("labels").long()
        correct = features.tensor("logits").argmax(1).to(labels.device) == labels
        self.moments.update(features.tensor("pooled"), 2 * labels + correct)

    def _finalize(self) -> Tensor:
        means, groups = self.moments.means(), self.moments.groups
        patterns = means.new_zeros(int(groups[-1]) // 2 + 1, means.shape[1])
        # In ascending order, the correctly classified inputs of a class replace the others.
        for group, mean in zip(groups.tolist(), means, strict=True):
            patterns[group // 2] = mean
        return patterns

    def _score(self, features: Features) -> Tensor:
        pooled = features.tensor("pooled")
        self._same_width("pooled", pooled, self.moments.width)
        patterns: Tensor = self._fitted_state()
        predicted = features.tensor("logits").argmax(1)
        inner = (pooled.double() * patterns[predicted.clamp(max=len(patterns) - 1)]).sum(1)
        return inner.where(predicted < len(patterns), 0.0)
