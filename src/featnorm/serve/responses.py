"""What the service returns: models of its responses, for the API's description, and `result_of`."""

import math
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from pydantic import BaseModel, Field
from torch import Tensor

from featnorm import hidden
from featnorm._utils.ranks import shown_scores
from featnorm.drift import DriftMonitor
from featnorm.inputs.kinds import IMAGES, Kind
from featnorm.records import row_of, word_of
from featnorm.report.explanation import neighbor_picture
from featnorm.verdict import ItemVerdict

_MIN_BINS, _MAX_BINS = 12, 40


class SimilarItem(BaseModel):
    """An image, text or row that the detector was fitted to, among a sample of those."""

    label: str | None = Field(description="Class of the item, if it has one.")
    similarity: float = Field(
        description="Cosine similarity of the features, at most 1; for the rows of a table, minus their distance."
    )
    thumbnail: str | None = Field(
        description="Thumbnail of at most 64 x 64 pixels as a `data:` URL. Null if the explanation has no "
        "pictures, or if the detector was fitted with `--no-thumbnails`."
    )
    text: str | None = Field(
        description="The first 200 characters of a text or row. Null for an image, or if the detector was fitted "
        "with `--no-thumbnails`."
    )


class HeatMap(BaseModel):
    """A heat map over what the model sees: orange where the image lowers the score, blue where it raises it."""

    picture: str = Field(description="Picture of at most 96 x 96 pixels as a `data:` URL.")
    reference: str = Field(description="What each position is compared with the average of.")


class Why(BaseModel):
    """Why an input has its score, as far as it is known."""

    units: list[tuple[str, str]] = Field(
        description="Comparison of the last hidden layer with in-distribution inputs: rows of a property and its "
        "value. Empty if the model has no such layer."
    )
    terms: list[tuple[str, float | None]] = Field(
        description="What each term of a sum of detectors adds to the score; null if that is infinite. Empty for "
        "other detectors."
    )
    nearest: list[SimilarItem] = Field(
        description="Most similar inputs of a sample of those that the detector was fitted to, best first."
    )
    heat: HeatMap | None = Field(description="Heat map, if the explanation has pictures.")
    no_heat: str | None = Field(description="Why a flagged image has no heat map.")


class Box(BaseModel):
    """The result for one box that a detector of objects found in an image."""

    corners: tuple[float, float, float, float] = Field(
        description="x1, y1, x2 and y2 in pixels of the image, as the model takes it."
    )
    label: str = Field(description="Class of the box, as the model has it.")
    confidence: float = Field(description="The model's own confidence.")
    score: float | None = Field(description="Score; higher is more in-distribution. Null if it is infinite.")
    p_value: float | None = Field(description="Conformal p-value; a small one means out-of-distribution.")
    verdict: Literal["ID", "OOD"] | None = Field(description="ID if the score reaches the threshold, else OOD.")


class Result(BaseModel):
    """The result for one input."""

    name: str = Field(
        description="File name of the image, or `image N`, `text N` or `row N` if the request has none."
    )
    score: float | None = Field(
        description="Score; higher is more in-distribution. Null if the input cannot be read, or if the score is "
        "infinite, which JSON cannot represent; p-value and verdict are then valid all the same."
    )
    p_value: float | None = Field(description="Conformal p-value; a small one means out-of-distribution.")
    verdict: Literal["ID", "OOD"] | None = Field(description="ID if the score reaches the threshold, else OOD.")
    predicted: str | None = Field(description="Predicted class, if the detector was fitted on labels.")
    error: str | None = Field(description="Why the input cannot be scored.")
    group: str | None = Field(description="Group whose threshold applies, if the scorer has thresholds by group.")
    flagged_share: float | None = Field(
        description="Share of the positions or boxes of the image that are flagged as OOD, if the scorer has "
        "verdicts on them."
    )
    boxes: list[Box] | None = Field(description="Boxes in the image, if the model is a detector of objects.")
    why: Why | None = Field(default=None, description="Explanation, with `explain=true`.")


class Results(BaseModel):
    """The results for the inputs of a request, in their order."""

    results: list[Result]
    digest: str = Field(description="Digest of the scorer that gave the results.")


class Problem(BaseModel):
    """Why a request is rejected as a whole."""

    error: str
    request_id: str


class Histogram(BaseModel):
    """A histogram: n counts between n + 1 edges. Values beyond an end are counted in the bin at that end."""

    edges: list[float]
    counts: list[int]


class ScorerSummary(BaseModel):
    """A scorer of the service."""

    name: str = Field(description="Name of the scorer in the addresses `/v1/{name}/score`, `/v1/{name}/detector`.")
    detector: str
    digest: str = Field(description="SHA-256 of everything that verdicts depend on.")


class Scorers(BaseModel):
    """The scorers of the service."""

    scorers: list[ScorerSummary]


class Drift(BaseModel):
    """Whether the inputs scored since the file was loaded have drifted from the calibration set as a whole."""

    inputs: int = Field(description="Number of inputs scored so far.")
    log10_evidence: float = Field(description="Evidence for drift, as a base-10 logarithm; 0 at the start.")
    highest: float = Field(description="Maximum of `log10_evidence` so far.")
    alarm_level: float = Field(description="The evidence at which the alarm is raised.")
    alarmed_at: int | None = Field(description="Number of the input at which it was, from 1; null before.")

    @classmethod
    def of(cls, monitor: DriftMonitor | None) -> Self | None:
        """Return the state of a monitor, if there is one."""
        return (
            None
            if monitor is None
            else cls(
                inputs=monitor.count,
                log10_evidence=monitor.log10_evidence,
                highest=monitor.highest,
                alarm_level=monitor.alarm_level,
                alarmed_at=None if monitor.alarmed_at is None else monitor.alarmed_at + 1,
            )
        )


class Detector(ScorerSummary):
    """A scorer in detail."""

    inputs: str = Field(description="What it scores: `images`, `texts` or `rows`.")
    model: str | None = Field(description="Specification of the model; null if it is not known.")
    facts: dict[str, str]
    classes: list[str] | None
    threshold: float | None = Field(
        description="Scores at or above this are ID; null if it is infinite, or if there are thresholds by group."
    )
    thresholds_by: str | None = Field(
        description="What inputs are grouped by, if there are thresholds by group. `class` is the predicted "
        "class; otherwise a request for a score needs the parameter `group`."
    )
    thresholds: dict[str, float | None] | None = Field(description="Thresholds by group, if there are groups.")
    tpr: float = Field(description="Minimum share of in-distribution inputs that are accepted.")
    calibration: Histogram = Field(description="Scores of the held-out inputs on which p-values are based.")
    explains: bool = Field(description="Whether it can explain its verdicts.")
    limits: dict[str, int | float]
    drift: Drift | None = Field(
        description="Null if the detector was calibrated by leaving inputs out of its fit in turn, so that there "
        "are no calibration scores to compare others with, or on parts of images or clips, whose scores depend on "
        "each other."
    )


def result_of(verdict: ItemVerdict) -> dict[str, Any]:
    """Return a verdict as the fields of a `Result`, without ``why``."""
    row = row_of(verdict)
    boxes = None
    if verdict.boxes is not None:
        boxes = [
            {**box._asdict(), "score": finite(box.score), "verdict": word_of(box.is_id)} for box in verdict.boxes
        ]
    of_parts = {"flagged_share": verdict.flagged_share, "boxes": boxes}
    return {"name": row.pop("path"), **row, "score": finite(row["score"]), **of_parts}


def why_of(why: hidden.Why, kind: Kind, *, thumbnails: bool = False) -> Why:
    """Return an explanation without a heat map, with or without thumbnails of similar images."""
    nearest = []
    for neighbor in why.nearest:
        picture = neighbor_picture(neighbor, "") if thumbnails and kind is IMAGES else None
        uri = None if picture is None else picture.uri
        text = None if kind is IMAGES else neighbor.text()
        nearest.append(SimilarItem(label=neighbor.label, similarity=neighbor.similarity, thumbnail=uri, text=text))
    units = [] if why.units is None else why.units.rows()
    terms = [(term, finite(value)) for term, value in why.terms]
    return Why(units=units, terms=terms, nearest=nearest, heat=None, no_heat=why.no_heat or None)


def finite(value: float | None) -> float | None:
    """Return a number as JSON can represent it: None if it is infinite."""
    return None if value is None or math.isinf(value) else value


def histogram(scores: Tensor, thresholds: Sequence[float]) -> Histogram:
    """Return the histogram of calibration scores (n,), over the middle 99 % of them and the thresholds."""
    values = shown_scores(scores.cpu().numpy())
    finite = values[np.isfinite(values)]
    if not len(finite):
        finite = np.zeros(1)
    low = float(np.quantile(finite, 0.005, method="lower"))
    high = float(np.quantile(finite, 0.995, method="higher"))
    within = [low, high, *filter(math.isfinite, thresholds)]
    low, high = min(within), max(within)
    if high - low <= 1e-9 * max(abs(low), abs(high), 1e-9):
        pad = 0.05 * abs(low) or 0.5
        low, high = low - pad, high + pad
    edges = np.linspace(low, high, int(np.clip(math.sqrt(len(values)), _MIN_BINS, _MAX_BINS)) + 1)
    counts, _ = np.histogram(np.clip(values, low, high), edges)
    return Histogram(edges=edges.tolist(), counts=counts.tolist())
