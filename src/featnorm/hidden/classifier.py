"""The hidden classifier (paper sec. 3, A.1): what the binarised weights between a layer and the logits say.

Everything here is a function of two tensors, the layer's activation and its coefficients; `FeatureTap.hidden`
reads both off a model.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class HiddenClassifier:
    """The classifier hidden in a layer, for n inputs.

    Parameters
    ----------
    activation : a (n, d), the layer's output; or its pre-activation z (Prop. 6).
    coefficients : C (n, K, d), or (K, d) where they are the same for every input: ``logits = C a + offset``.
    offset : Gamma (n, K), what the biases after the layer add (eq. 40); None for none.

    Raises
    ------
    ValueError
        The shapes do not fit each other.
    """

    activation: Tensor
    coefficients: Tensor
    offset: Tensor | None = None

    def __post_init__(self) -> None:
        a, c = self.activation, self.coefficients
        if a.ndim != 2 or not a.is_floating_point():
            raise ValueError(f"the activation must be floating point (n, d), got {a.dtype} {tuple(a.shape)}")
        if c.ndim not in (2, 3) or c.shape[-1] != a.shape[1] or (c.ndim == 3 and len(c) != len(a)):
            raise ValueError(
                f"the coefficients must be (n, K, d) or (K, d) for an activation (n, d) of {tuple(a.shape)}, "
                f"got {tuple(c.shape)}"
            )
        if self.offset is not None and self.offset.shape != (len(a), c.shape[-2]):
            raise ValueError(f"the offset must be {(len(a), c.shape[-2])}, got {tuple(self.offset.shape)}")

    def __len__(self) -> int:
        return len(self.activation)

    @cached_property
    def binary(self) -> Tensor:
        """The binarised coefficients B, of the shape of C: 1 where C > 0 and -1 elsewhere (eq. 3)."""
        return _sign(self.coefficients)

    @cached_property
    def logits(self) -> Tensor:
        """The hidden classifier's logits ``psi = B a`` (n, K) (eq. 3)."""
        return _apply(self.binary, self.activation)

    @property
    def output_logits(self) -> Tensor:
        """The network's own logits (n, K), as the coefficients give them: ``C a + Gamma`` (Prop. 1, eq. 40)."""
        logits = _apply(self.coefficients, self.activation)
        return logits if self.offset is None else logits + self.offset

    @property
    def prediction(self) -> Tensor:
        """The predicted class of each input (n,)."""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """The largest logit ``max_k psi_k`` (n,), which the l1-norm converges to (Thm. 3)."""
        return self.logits.amax(1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the softmax of the logits (n,), in nats: 0 for a certain prediction (Figure 2b)."""
        log = self.logits.log_softmax(1)
        return -(log.exp() * log).sum(1)

    @cached_property
    def norm(self) -> Tensor:
        """``||a||_1`` (n,)."""
        return torch.linalg.vector_norm(self.activation, 1, dim=1)

    @cached_property
    def sign_difference(self) -> Tensor:
        """``||sign(a) - b_k||_1`` (n, K) for every class: twice the number of units whose signs differ (eq. 5)."""
        d = self.activation.shape[1]
        # Both are +-1, so a product of them is 1 where they agree and -1 where they do not.
        return d - _apply(self.binary, _sign(self.activation))

    @property
    def gap(self) -> Tensor:
        """``||a||_1 - psi_k`` (n, K), never negative (eq. 5)."""
        return self.norm[:, None] - self.logits

    @property
    def bound(self) -> Tensor:
        """``||a||_inf ||sign(a) - b_k||_1`` (n, K), which the gap never exceeds (eq. 5)."""
        return self.activation.abs().amax(1)[:, None] * self.sign_difference

    def agreement(self, classes: Tensor) -> Tensor:
        """The share of units (n,) whose sign is that of the binary weight of the given class of each input."""
        return 1 - _pick(self.sign_difference, classes) / (2 * self.activation.shape[1])

    def approximation_error(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """The gap as a share of the norm (paper A.3, Figure 8).

        Parameters
        ----------
        classes : (n,) the target class of each input.

        Returns
        -------
        Of the target (n,), and on average over the other classes (n,); NaN where the norm is 0, and for the others
        where there is one class alone.
        """
        error = self.gap / self.norm[:, None]
        target = _pick(error, classes)
        return target, (error.sum(1) - target) / (error.shape[1] - 1)

    def parts(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Activation and deactivation part of a class's logit (eq. 8).

        Parameters
        ----------
        classes : (n,) the class of each input.

        Returns
        -------
        A (n,), the sum of the units whose binary weight is 1, and D (n,), of the others: ``psi_k = A - D``.
        """
        total = self.activation.sum(1)
        logit = _pick(self.logits, classes)
        return (total + logit) / 2, (total - logit) / 2

    @property
    def slack(self) -> Tensor:
        """The slack delta (n,) of Corollary 4: the bound at the predicted class (eq. 29)."""
        return _pick(self.bound, self.prediction)


def margin(ood: HiddenClassifier, ind: HiddenClassifier) -> Tensor:
    """How far each OOD input is below the premise of Corollary 4 (eq. 28).

    Returns
    -------
    (m,) ``min_ind max_k psi_k(ind) - max_k psi_k(ood) - delta(ood)``. Where it is positive, the OOD input's
    l1-norm is below that of every ID input (eq. 30).
    """
    return ind.confidence.min() - ood.confidence - ood.slack


def _sign(x: Tensor) -> Tensor:
    """1 where x > 0 and -1 elsewhere (eq. 3), in x's type."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def _apply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Matrix (n, K, d) or (K, d) times vectors (n, d): (n, K)."""
    if matrix.ndim == 2:
        return vectors @ matrix.T
    return torch.linalg.vecdot(matrix, vectors[:, None])


def _pick(values: Tensor, classes: Tensor) -> Tensor:
    if classes.shape != values.shape[:1] or classes.is_floating_point():
        raise ValueError(f"one class an input is wanted, {len(values)} integers, got {tuple(classes.shape)}")
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < values.shape[1]:
        raise ValueError(f"the classes must be from 0 to {values.shape[1] - 1}")
    return values.gather(1, classes.long()[:, None]).squeeze(1)
