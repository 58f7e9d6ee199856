"""The hidden classifier (paper sec. 3, A.1), which applies binarized weights to the activation of a layer.

Everything here is a function of two tensors, the activation and the coefficients of a layer. `FeatureTap.hidden`
extracts both from a model.
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
    activation : output a (n, d) of the layer, or its pre-activation z (Prop. 6).
    coefficients : C (n, K, d), or (K, d) if they are the same for every input: ``logits = C a + offset``.
    offset : Gamma (n, K), the contribution of the biases after the layer (eq. 40). Default: zero.

    Raises
    ------
    ValueError
        The shapes do not match.

    Examples
    --------
    >>> hidden = FeatureTap(model).hidden(images)
    >>> bool((hidden.gap <= hidden.bound + 1e-5).all())
    True
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
        """Binarized coefficients B, with the shape of C: 1 where C > 0 and -1 elsewhere (eq. 3)."""
        return _sign(self.coefficients)

    @cached_property
    def logits(self) -> Tensor:
        """Logits of the hidden classifier, ``psi = B a`` (n, K) (eq. 3)."""
        return _apply(self.binary, self.activation)

    @property
    def output_logits(self) -> Tensor:
        """Logits of the network (n, K), computed from the coefficients: ``C a + Gamma`` (Prop. 1, eq. 40)."""
        logits = _apply(self.coefficients, self.activation)
        return logits if self.offset is None else logits + self.offset

    @property
    def prediction(self) -> Tensor:
        """Class (n,) that the hidden classifier predicts."""
        return self.logits.argmax(1)

    @property
    def confidence(self) -> Tensor:
        """Largest logit ``max_k psi_k`` (n,), to which the l1-norm converges (Thm. 3)."""
        return self.logits.amax(1)

    @property
    def entropy(self) -> Tensor:
        """Entropy of the softmax of the logits (n,), in nats; 0 if the prediction is certain (Figure 2b)."""
        log = self.logits.log_softmax(1)
        return -(log.exp() * log).sum(1)

    @cached_property
    def norm(self) -> Tensor:
        """``||a||_1`` (n,)."""
        return torch.linalg.vector_norm(self.activation, 1, dim=1)

    @cached_property
    def sign_difference(self) -> Tensor:
        """``||sign(a) - b_k||_1`` (n, K) per class, twice the number of units whose signs differ (eq. 5)."""
        d = self.activation.shape[1]
        # Both are +-1, so their product is 1 where they agree and -1 where they differ.
        return d - _apply(self.binary, _sign(self.activation))

    @property
    def gap(self) -> Tensor:
        """``||a||_1 - psi_k`` (n, K), never negative (eq. 5)."""
        return self.norm[:, None] - self.logits

    @property
    def bound(self) -> Tensor:
        """``||a||_inf ||sign(a) - b_k||_1`` (n, K), the upper bound of the gap (eq. 5)."""
        return self.activation.abs().amax(1)[:, None] * self.sign_difference

    def agreement(self, classes: Tensor) -> Tensor:
        """Return the share of units (n,) whose sign equals that of the binary weight of each input's class."""
        return 1 - _pick(self.sign_difference, classes) / (2 * self.activation.shape[1])

    def approximation_error(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gap as a share of the norm (paper A.3, Figure 8).

        Parameters
        ----------
        classes : target class of each input, (n,).

        Returns
        -------
        The error of the target class (n,), and the mean error of the other classes (n,). Both are NaN where the
        norm is 0; the second is NaN if there is only one class.
        """
        error = self.gap / self.norm[:, None]
        target = _pick(error, classes)
        return target, (error.sum(1) - target) / (error.shape[1] - 1)

    def parts(self, classes: Tensor) -> tuple[Tensor, Tensor]:
        """Return the activation and deactivation part of a class's logit (eq. 8).

        Parameters
        ----------
        classes : class of each input, (n,).

        Returns
        -------
        A (n,), the sum of the units whose binary weight is 1, and D (n,), the sum of the others: ``psi_k = A -
        D``.
        """
        total = self.activation.sum(1)
        logit = _pick(self.logits, classes)
        return (total + logit) / 2, (total - logit) / 2

    @property
    def slack(self) -> Tensor:
        """Slack delta (n,) of Corollary 4: the bound for the predicted class (eq. 29)."""
        return _pick(self.bound, self.prediction)


def margin(ood: HiddenClassifier, ind: HiddenClassifier) -> Tensor:
    """Return the margin by which each OOD input satisfies the premise of Corollary 4 (eq. 28).

    Returns
    -------
    (m,) ``min_ind max_k psi_k(ind) - max_k psi_k(ood) - delta(ood)``. If it is positive, the l1-norm of the OOD
    input is below that of every ID input (eq. 30).
    """
    return ind.confidence.min() - ood.confidence - ood.slack


def _sign(x: Tensor) -> Tensor:
    """Return 1 where x > 0 and -1 elsewhere (eq. 3), in the type of x."""
    return torch.where(x > 0, 1.0, -1.0).to(x.dtype)


def _apply(matrix: Tensor, vectors: Tensor) -> Tensor:
    """Multiply a matrix (n, K, d) or (K, d) with vectors (n, d); return (n, K)."""
    if matrix.ndim == 2:
        return vectors @ matrix.T
    return torch.linalg.vecdot(matrix, vectors[:, None])


def _pick(values: Tensor, classes: Tensor) -> Tensor:
    if classes.shape != values.shape[:1] or classes.is_floating_point():
        raise ValueError(f"expected one class per input, {len(values)} integers, got shape {tuple(classes.shape)}")
    if len(classes) and not 0 <= int(classes.min()) <= int(classes.max()) < values.shape[1]:
        raise ValueError(f"the classes must be from 0 to {values.shape[1] - 1}")
    return values.gather(1, classes.long()[:, None]).squeeze(1)
