"""Detectors that read the classifier's decision boundaries and the mean of the training features."""

import math
from abc import abstractmethod

import torch
from torch import Tensor

from featnorm._utils.checks import Interval, table
from featnorm.detectors.base import Detector
from featnorm.detectors.statistics import RowMean
from featnorm.features import Features

# Elements of a block of inputs, whose float64 intermediate results fit into a cache, and its smallest number of
# rows, below which the product with W would read W too often.
_BLOCK_ELEMENTS, _MIN_BLOCK_ROWS = 1 << 18, 128
# Two rows of W count as equal if their squared distance is at most this share of their squared lengths: below it,
# rounding in float32 would decide.
_EQUAL_ROWS = 1e-6
# An input is at the mean if its distance is at most this share of the mean's length.
_AT_MEAN = 1e-12


class _Margin(Detector):
    """Base of the detectors that read the classifier and the direction of an input from the training mean."""

    reads = ("pooled", "logits", "classifier")
    learns = ("pooled", "logits", "classifier")
    cost = "O(C D)"

    def __init__(self) -> None:
        super().__init__()
        self.center = RowMean()

    def _check_fit(self, features: Features) -> None:
        super()._check_fit(features)
        name = features.last_layer
        self._require(features, (name,))
        self.center.require_width(features.tensor(name))
        if not features.classifier_reads(name):
            raise ValueError(
                f"{self!r} needs logits that are a linear map of `{name}`, and these are not (a cosine "
                "classifier, or a head in between); use a detector that does not read the classifier, such as KNN"
            )

    def _partial_fit(self, features: Features) -> None:
        self.center.update(features.tensor(features.last_layer))

    def _score(self, features: Features) -> Tensor:
        name = features.last_layer
        self._require(features, (name,))
        h, mean = features.tensor(name), self.center.mean()
        self._same_width(name, h, len(mean))
        weight, bias = features.linear()
        dtype = torch.promote_types(torch.promote_types(h.dtype, weight.dtype), torch.float32)
        weight = weight.to(h.device, dtype)
        mean = mean.to(h.device)
        blocks = _blocks(h, len(mean))
        length = torch.cat([torch.linalg.vector_norm(rows.double() - mean, dim=1) for rows in blocks])
        length = length.masked_fill(length <= _AT_MEAN * torch.linalg.vector_norm(mean), math.inf)
        # W h is the logits without their bias, so W (h - mu) needs no product of its own.
        shift = (weight @ mean.to(weight)).double()
        if bias is not None:
            shift = shift + bias.to(h.device, torch.float64)
        return self._of(h, length, features.tensor("logits"), shift, weight)

    @abstractmethod
    def _of(self, h: Tensor, length: Tensor, logits: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        """Return the scores, (n,) float64.

        Parameters
        ----------
        h : (n, D) features.
        length : (n,) float64 ``||h - mu||``; infinite for an input at the mean.
        logits : (n, C).
        shift : (C,) float64 ``W mu + b``, so that ``W (h - mu)`` is the logits minus it.
        weight : (C, D) W, of at least float32.
        """


class NCI(_Margin):
    """Neural-collapse-inspired score, ``w_y . (h - mu) / ||h - mu|| + alpha ||h||_1`` (Liu and Qin, CVPR 2025).

    h is the last hidden layer or, in a model without one, the pooled feature; mu is its mean over the training
    inputs, and ``w_y`` the classifier's weights of the predicted class. For an input at the mean the first term is
    0.

    Parameters
    ----------
    alpha
        Weight of the norm, at least 0. Default: 0. The source tunes it on OOD data; it depends on the scale of h.

    Raises
    ------
    ValueError
        ``alpha`` is negative; the logits are not a linear map of h (a cosine classifier, or a head in between).

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> NCI().fit(features).score(features).shape
    torch.Size([320])
    """

    source = "Liu and Qin, CVPR 2025"
    formula = r"\frac{w_y^\top (h - \mu)}{\lVert h - \mu \rVert} + \alpha \lVert h \rVert_1"
    standard = ("NCI()",)
    settings = table(alpha=Interval(0, math.inf, closed="left"))
    alpha: float

    def __init__(self, alpha: float = 0) -> None:
        super().__init__()
        self._set(alpha=alpha)

    def _of(self, h: Tensor, length: Tensor, logits: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        largest, top = logits.double().max(1)
        score = (largest - shift[top]) / length
        return score + self.alpha * torch.linalg.vector_norm(h, 1, 1, dtype=torch.float64) if self.alpha else score


class _Boundary(_Margin):
    """Base of the detectors that read the distances to all decision boundaries of the predicted class."""

    def _of(self, h: Tensor, length: Tensor, logits: Tensor, shift: Tensor, weight: Tensor) -> Tensor:
        # Centered rows have the same distances, and rounding affects them less.
        weight = weight - weight.mean(0)
        squares = torch.linalg.vector_norm(weight, dim=1).square()
        scores = []
        width = max(weight.shape)
        for rows, lengths in zip(_blocks(logits, width), _blocks(length, width), strict=True):
            values = rows.double()
            largest, top = values.max(1, keepdim=True)
            top = top.squeeze(1)
            both = squares[top, None] + squares
            squared = both - 2 * (weight[top] @ weight.T)
            # There is no boundary between y and itself, or a class of equal weights: it is infinitely far.
            squared = squared.masked_fill(squared <= _EQUAL_ROWS * both, math.inf).double()
            scores.append(self._combine(largest - values, squared, lengths, shift[top, None] - shift))
        return torch.cat(scores)

    @abstractmethod
    def _combine(self, margins: Tensor, squared: Tensor, length: Tensor, shifts: Tensor) -> Tensor:
        """Return the scores, (n,), of float64 tensors.

        Parameters
        ----------
        margins : (n, C) ``l_y - l_c``.
        squared : (n, C) ``||w_y - w_c||^2``, infinite where there is no boundary.
        length : (n,) ``||h - mu||``; infinite for an input at the mean.
        shifts : (n, C) ``(w_y - w_c) . mu + b_y - b_c``.
        """


class FDBD(_Boundary):
    """Mean distance to the decision boundaries, over ``||h - mu||`` (fDBD: Liu and Qin, ICML 2024).

    The distance to the boundary between the predicted class y and another class c is ``(l_y - l_c) / ||w_y -
    w_c||``, and the mean is over all c. h is the last hidden layer or, in a model without one, the pooled feature,
    and mu its mean over the training inputs. The distance counts as 0 for a class whose weights equal those of y,
    and an input at the mean scores 0.

    Raises
    ------
    ValueError
        The logits are not a linear map of h (a cosine classifier, or a head in between).

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> FDBD().fit(features).score(features).shape
    torch.Size([320])
    """

    source = "Liu and Qin, ICML 2024"
    formula = (
        r"\frac{1}{\lVert h - \mu \rVert} \cdot \frac{1}{C - 1} \sum_{c \ne y} \frac{l_y - l_c}{\lVert "
        r"w_y - w_c \rVert}"
    )
    standard = ("FDBD()",)

    def _combine(self, margins: Tensor, squared: Tensor, length: Tensor, shifts: Tensor) -> Tensor:
        return (margins / squared.sqrt()).sum(1) / ((margins.shape[1] - 1) * length)


class ORA(_Boundary):
    """Largest angle, seen from the mean, to a decision boundary (ORA: Demirel et al., NeurIPS 2025).

    The score is the maximum over the classes c of the angle between ``h - mu`` and ``z_c - mu``, in radians, where
    ``z_c`` is the point nearest to h on the boundary between the predicted class and c. h is the last hidden layer
    or, in a model without one, the pooled feature, and mu its mean over the training inputs. The angle is 0 for a
    class whose weights equal those of the predicted class, and an input at the mean scores 0.

    Raises
    ------
    ValueError
        The logits are not a linear map of h (a cosine classifier, or a head in between).

    Examples
    --------
    >>> features = FeatureTap(model).extract(train_loader)
    >>> ORA().fit(features).score(features).shape
    torch.Size([320])
    """

    source = "Demirel et al., NeurIPS 2025"
    formula = r"\max_c \angle(h - \mu,\; z_c - \mu)"
    standard = ("ORA()",)

    def _combine(self, margins: Tensor, squared: Tensor, length: Tensor, shifts: Tensor) -> Tensor:
        # z_c - mu = v - t (w_y - w_c), where v = h - mu, and (w_y - w_c) . v is the margin less its shift.
        square = length.square()[:, None]
        t = margins / squared
        inner = square - t * (margins - shifts)
        target = (2 * inner - square + t * margins).clamp_min(1e-300)
        cosine = (inner / (target * square).sqrt()).amin(1).clamp(-1, 1)
        if torch.compiler.is_compiling():  # onnxruntime has an arc cosine of float32 alone
            cosine = cosine.float()
        return cosine.acos().masked_fill(length.isinf(), 0)


def _blocks(rows: Tensor, width: int) -> tuple[Tensor, ...]:
    """Split rows into blocks for results of a width; not while tracing, where the number of rows is symbolic."""
    if torch.compiler.is_compiling():
        return (rows,)
    return rows.split(max(_BLOCK_ELEMENTS // width, _MIN_BLOCK_ROWS))
