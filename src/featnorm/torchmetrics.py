"""The measures of `featnorm.metrics` as metrics of torchmetrics: exact, rank-based, and synchronized under DDP.

They are updated batch by batch with scores, higher for more in-distribution, and with a mark of each input: True
or 1 if it is ID, False or 0 if it is OOD. All scores are kept, in double precision, because a rank needs them all.
Metrics in one `torchmetrics.MetricCollection` share them.

>>> from torchmetrics import MetricCollection
>>> metrics = MetricCollection([AUROC(), FPRAtTPR(tpr=0.9)])
>>> for scores, is_id in [([3.0, 1.5], [1, 0]), ([2.0, 1.0, 0.5], [1, 1, 0])]:
...     metrics.update(torch.tensor(scores), torch.tensor(is_id))
>>> {name: round(float(value), 3) for name, value in metrics.compute().items()}
{'AUROC': 0.833, 'FPRAtTPR': 0.5}
"""

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from featnorm import metrics
from featnorm._utils.checks import ScoreLike, as_score_tensor, check_share
from featnorm._utils.extras import import_extra

__all__ = ["AUROC", "AUPRIn", "AUPROut", "DetectionAccuracy", "FPRAtTPR", "FPRAtTPROODPositive"]

_dim_zero_cat: Any = import_extra("torchmetrics").utilities.dim_zero_cat


class _Measure(import_extra("torchmetrics").Metric):  # type: ignore[misc]
    """A measure of ID against OOD scores.

    Parameters
    ----------
    options : arguments of every metric of torchmetrics, such as ``sync_on_compute`` and ``process_group``.
    """

    is_differentiable = False
    higher_is_better = True
    full_state_update = False
    plot_lower_bound = 0.0
    plot_upper_bound = 1.0
    _measure: Callable[[Tensor, Tensor], float]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("id_scores", [], dist_reduce_fx="cat")
        self.add_state("ood_scores", [], dist_reduce_fx="cat")
        # A process without scores sends an empty tensor of the metric's type, which must be that of the others.
        self.set_dtype(torch.float64)

    def update(self, scores: ScoreLike, is_id: Tensor) -> None:
        """Add the scores of a batch.

        Parameters
        ----------
        scores : (n,) scores, higher for more in-distribution; n = 0 is valid, and so are infinite scores.
        is_id : (n,) bools, or integers 1 for ID and 0 for OOD.

        Raises
        ------
        TypeError
            The scores are not real numbers.
        ValueError
            The scores are not 1-D or hold a NaN, or ``is_id`` is not one bool or one of 0 and 1 per score.
        """
        kept = as_score_tensor(scores, "scores", allow_empty=True)
        mark = torch.as_tensor(is_id, device=kept.device)
        # An empty list becomes an empty float32 tensor.
        of_floats = mark.numel() > 0 and (mark.is_floating_point() or mark.is_complex())
        if mark.shape != kept.shape or of_floats or not ((mark == 0) | (mark == 1)).all():
            shown = mark.numel() > 0 and not mark.is_complex()  # complex numbers have no order
            values = f" with values from {mark.min()} to {mark.max()}" if shown else ""
            raise ValueError(
                f"is_id must hold True or 1 for each ID input and False or 0 for each OOD input, {len(kept)} "
                f"values in all, got {mark.dtype} of shape {tuple(mark.shape)}{values}"
            )
        kept = kept.to(self.device, _exact(self.device))
        mark = mark.to(self.device).bool()
        self.id_scores.append(kept[mark])
        self.ood_scores.append(kept[~mark])

    def compute(self) -> Tensor:
        """Return the measure of all scores so far, a float64 scalar.

        Without ID or without OOD scores it is NaN, with a warning.
        """
        both = {"ID": self.id_scores, "OOD": self.ood_scores}
        found = {name: _dim_zero_cat(state) if len(state) else torch.empty(0) for name, state in both.items()}
        absent = [name for name, scores in found.items() if not len(scores)]
        if absent:
            warnings.warn(
                f"{type(self).__name__} is NaN, because there are no {' and no '.join(absent)} scores: call "
                "update with both before compute",
                stacklevel=2,
            )
        value = float("nan") if absent else self._measure(*found.values())
        return torch.tensor(value, dtype=_exact(self.device), device=self.device)

    def plot(self, val: Any = None, ax: Any = None) -> Any:
        """Plot the value, or values that `forward` or `compute` returned, as every metric of torchmetrics does."""
        return self._plot(val, ax)


class AUROC(_Measure):
    """Area under the ROC curve, ties counted one half; see `featnorm.auroc`.

    Examples
    --------
    >>> AUROC()(torch.tensor([3.0, 2.0, 1.0, 1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0]))
    tensor(0.8333, dtype=torch.float64)
    """

    _measure = staticmethod(metrics.auroc)


class AUPRIn(_Measure):
    """Average precision with ID as the positive class; see `featnorm.aupr_in`.

    Examples
    --------
    >>> AUPRIn()(torch.tensor([3.0, 2.0, 1.0, 1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0]))
    tensor(0.9167, dtype=torch.float64)
    """

    _measure = staticmethod(metrics.aupr_in)


class AUPROut(_Measure):
    """Average precision with OOD as the positive class; see `featnorm.aupr_out`.

    Examples
    --------
    >>> AUPROut()(torch.tensor([3.0, 2.0, 1.0, 1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0]))
    tensor(0.8333, dtype=torch.float64)
    """

    _measure = staticmethod(metrics.aupr_out)


class DetectionAccuracy(_Measure):
    """Best accuracy of any threshold if ID and OOD are equally likely; see `featnorm.detection_accuracy`.

    Examples
    --------
    >>> DetectionAccuracy()(torch.tensor([3.0, 2.0, 1.0, 1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0]))
    tensor(0.8333, dtype=torch.float64)
    """

    _measure = staticmethod(metrics.detection_accuracy)


class FPRAtTPR(_Measure):
    """Share of OOD accepted when at least ``tpr`` of ID is accepted; see `featnorm.fpr_at_tpr`.

    Parameters
    ----------
    tpr : share of ID to accept, in (0, 1].
    options : arguments of every metric of torchmetrics.

    Raises
    ------
    ValueError
        ``tpr`` is outside (0, 1].

    Examples
    --------
    >>> FPRAtTPR(tpr=0.5)(torch.tensor([3.0, 2.0, 1.0, 1.5, 0.5]), torch.tensor([1, 1, 1, 0, 0]))
    tensor(0., dtype=torch.float64)
    """

    higher_is_better = False
    _at_tpr = staticmethod(metrics.fpr_at_tpr)

    def __init__(self, tpr: float = 0.95, **options: Any) -> None:
        super().__init__(**options)
        check_share(tpr, "tpr", one_allowed=True)
        self.tpr = tpr
        self._measure = partial(self._at_tpr, tpr=tpr)

    def extra_repr(self) -> str:
        """Return the constructor's arguments, for `repr`."""
        return f"tpr={self.tpr}"


class FPRAtTPROODPositive(FPRAtTPR):
    """Share of ID flagged when at least ``tpr`` of OOD is flagged; see `featnorm.fpr_at_tpr_ood_positive`.

    Some benchmarks call this FPR95; it is not comparable with `FPRAtTPR`, the paper's definition.

    Parameters
    ----------
    tpr : share of OOD to flag, in (0, 1].
    options : arguments of every metric of torchmetrics.

    Raises
    ------
    ValueError
        ``tpr`` is outside (0, 1].

    Examples
    --------
    >>> FPRAtTPROODPositive()(torch.tensor([4.0, 3.0, 2.0, 1.0, 1.5, 0.5]), torch.tensor([1, 1, 1, 1, 0, 0]))
    tensor(0.2500, dtype=torch.float64)
    """

    _at_tpr = staticmethod(metrics.fpr_at_tpr_ood_positive)


def _exact(device: torch.device) -> torch.dtype:
    """Return the type in which scores are kept on a device: Apple's GPUs have no float64."""
    return torch.float32 if device.type == "mps" else torch.float64
