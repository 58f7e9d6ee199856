"""Detectors that read the logits."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from featnorm.detectors.base import Detector
from featnorm.features import Features


class _Confidence(Detector):
    reads = ("logits",)
    cost = "O(C)"

    def _score(self, features: Features) -> Tensor:
        logits = features.tensor("logits")
        return self._of(logits.to(torch.promote_types(logits.dtype, torch.float32)))

    @abstractmethod
    def _of(self, logits: Tensor) -> Tensor:
        """Return the scores (n,) of logits (n, C) of at least float32."""


class MSP(_Confidence):
    """The maximum softmax probability (Hendrycks and Gimpel, ICLR 2017)."""

    source = "Hendrycks and Gimpel, ICLR 2017"
    standard = ("MSP()",)

    def _of(self, logits: Tensor) -> Tensor:
        return logits.softmax(1).amax(1)


class MaxLogit(_Confidence):
    """The largest logit (Hendrycks et al., ICML 2022; Vaze et al., ICLR 2022)."""

    source = "Hendrycks et al., ICML 2022; Vaze et al., ICLR 2022"
    standard = ("MaxLogit()",)

    def _of(self, logits: Tensor) -> Tensor:
        return logits.amax(1)


class Energy(_Confidence):
    """The negative free energy, ``log sum_k exp(logit_k)`` (Liu et al., NeurIPS 2020)."""

    source = "Liu et al., NeurIPS 2020"
    standard = ("Energy()",)

    def _of(self, logits: Tensor) -> Tensor:
        return logits.logsumexp(1)


class KLUniform(_Confidence):
    """The divergence of the uniform distribution from the softmax, ``KL(u || p)`` ("KL" of Tables 1 and 3).

    ``KL(u || p) = logsumexp(l) - mean(l) - log C``. Its ranking is nearly that of `Energy`.
    """

    source = "Park et al., ICCV 2023, Tables 1 and 3"
    standard = ("KLUniform()",)

    def _of(self, logits: Tensor) -> Tensor:
        # Differences from the largest logit are exact even if all logits are huge and alike.
        shifted = logits - logits.amax(1, keepdim=True)
        return shifted.logsumexp(1) - shifted.mean(1) - math.log(logits.shape[1])
