"""Verdicts: of a batch as tensors, and of one item. This module does not import torch, which takes seconds."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from torch import Tensor

    from featnorm.features import Parts
    from featnorm.hidden.explanation import Why


class Verdict(NamedTuple):
    """Predictions of a `Scorer` for n inputs, or for the n parts of its inputs.

    Attributes
    ----------
    score : Tensor
        Scores (n,), higher for more in-distribution.
    p_value : Tensor or None
        Conformal p-values (n,), small for OOD; None before calibration.
    is_id : Tensor or None
        Whether each score is at or above the threshold (n,); None before calibration.
    logits : Tensor or None
        Logits (n, C); None for a model without a classifier.
    parts : Parts or None
        Which input each row is of, and where in it, for a scorer of positions or boxes.
    units : Verdict or None
        Predictions for the inputs, one row each, for a scorer of positions or boxes that is calibrated.

    Examples
    --------
    >>> scorer = Scorer(model, NAN()).calibrate(held_out_loader)
    >>> verdict = scorer(images)
    >>> verdict.score.shape, verdict.p_value.shape, verdict.is_id.shape, verdict.logits.shape
    (torch.Size([8]), torch.Size([8]), torch.Size([8]), torch.Size([8, 3]))
    """

    score: Tensor
    p_value: Tensor | None
    is_id: Tensor | None
    logits: Tensor | None
    parts: Parts | None = None
    units: Verdict | None = None

    def __repr__(self) -> str:
        flagged = "not calibrated" if self.is_id is None else f"{int((~self.is_id).sum()):,} flagged as OOD"
        shown = {name: value for name in ("score", "p_value") if (value := getattr(self, name)) is not None}
        first = ", ".join(
            f"{name}=[{', '.join(f'{x:.4g}' for x in value[:3].tolist())}{', ...' if len(value) > 3 else ''}]"
            for name, value in shown.items()
        )
        return f"Verdict({len(self.score):,} {'inputs' if self.parts is None else 'parts'}, {flagged}; {first})"


class BoxVerdict(NamedTuple):
    """Prediction of a `Scorer` for one box that an object detector found.

    Attributes
    ----------
    corners : tuple of float
        x1, y1, x2 and y2 in pixels of the image as the model takes it.
    label : str
        Class of the box, as the model has it.
    confidence : float
        The model's own confidence, in [0, 1].
    score : float
        Score, higher for more in-distribution.
    p_value : float or None
        Conformal p-value, small for OOD.
    is_id : bool or None
        Whether the score is at or above the threshold.
    """

    corners: tuple[float, float, float, float]
    label: str
    confidence: float
    score: float
    p_value: float | None
    is_id: bool | None


class ItemVerdict(NamedTuple):
    """Prediction of a `Scorer` for one item.

    Attributes
    ----------
    item : str
        Path of the item, its row in a table, or its position, such as ``"item 3"``.
    score : float or None
        Score, higher for more in-distribution; None if the item cannot be read.
    p_value : float or None
        Conformal p-value, small for OOD.
    is_id : bool or None
        Whether the score is at or above the threshold.
    predicted : str or None
        Predicted class, if the scorer knows the class names.
    error : str or None
        Why the item cannot be read.
    group : str or None
        Group whose threshold applies, if the scorer has thresholds by group.
    first_of_several : bool
        Whether the item is the first of several frames or pages of its file.
    flagged_share : float or None
        Share of the item's positions or boxes that are flagged as OOD; None for a scorer of inputs, or before
        calibration.
    boxes : tuple of BoxVerdict or None
        Verdicts on the boxes that an object detector found in the item; None for other models.
    why : Why or None
        Explanation of the score, if it was requested.
    time : float or None
        Time of a frame in its clip or stream, in seconds.
    parts : Verdict or None
        Verdicts on the positions or boxes of the item, on the CPU.

    Examples
    --------
    >>> scorer = Scorer(model, NAN(), preprocess=lambda image: torch.zeros(3, 8, 8)).calibrate(held_out_loader)
    >>> verdict = scorer.predict([np.zeros((8, 8, 3), np.uint8)])[0]
    >>> verdict.item, verdict.error
    ('item 0', None)
    """

    item: str
    score: float | None
    p_value: float | None
    is_id: bool | None
    predicted: str | None
    error: str | None
    group: str | None = None
    first_of_several: bool = False
    flagged_share: float | None = None
    boxes: tuple[BoxVerdict, ...] | None = None
    why: Why | None = None
    time: float | None = None
    parts: Verdict | None = None

    def __repr__(self) -> str:
        default = self._field_defaults
        known = self._replace(parts=None)._asdict().items()
        shown = [f"{name}={value!r}" for name, value in known if name not in default or value is not default[name]]
        if self.parts is not None:
            shown.append(f"parts=<{len(self.parts.score)} verdicts>")
        return f"ItemVerdict({', '.join(shown)})"


def unreadable(item: str, reason: str) -> ItemVerdict:
    """Return the verdict on an item that has no score."""
    return ItemVerdict(item, None, None, None, None, reason)
