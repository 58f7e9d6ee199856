"""The page of scored images: lowest scores first, each beside the calibration scores and with an explanation."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from featnorm._utils.ranks import are_ranks, shown_scores
from featnorm.report import plots
from featnorm.report.html import Key, Picture, number, percent, render, thumbnail, write
from featnorm.verdict import ItemVerdict

Array = npt.NDArray[np.float64]

# Size of the small histogram beside an image, in SVG units, and its number of bins.
_WIDTH, _HEIGHT, _BINS = 160.0, 30.0, 20


@dataclass(frozen=True)
class ScoredImage:
    """An image on the page, and its verdict; the image is None if it can no longer be read."""

    verdict: ItemVerdict
    image: Image.Image | None


@dataclass(frozen=True)
class _Card:
    name: str
    word: str
    flagged: bool
    predicted: str | None
    score: str
    p_value: str
    share: str
    x: str
    picture: Picture | None
    sentence: str
    rows: list[tuple[str, str]]


def write_scores_page(
    path: Path,
    *,
    title: str,
    summary: str,
    facts: Mapping[str, str],
    calibration_scores: Array,
    scores: Array,
    threshold: float,
    shown: Iterable[ScoredImage],
    unread: Sequence[tuple[str, str]],
    unread_count: int,
) -> None:
    """Write the page of scored images as one HTML file that works offline.

    Parameters
    ----------
    path : file to write, in an existing folder; an existing file is replaced.
    title, summary, facts : heading of the page, a sentence under it, and provenance, as label -> text.
    calibration_scores : scores of the calibration images (n,), ascending; or the fixed ones of a `Jackknife`.
    scores : scores of the images (m,); may be empty.
    threshold : score at or above which an image is ID.
    shown : the images to show, in order; consumed one at a time.
    unread, unread_count : names and reasons of the first unreadable images, and the number of all of them.
    """
    counted = are_ranks(calibration_scores)
    calibration_scores = shown_scores(np.sort(calibration_scores))
    samples = [calibration_scores, scores] if len(scores) else [calibration_scores]
    names = ["calibration images", "these images"][: len(samples)]
    low, high = plots.span(samples)
    histogram, outside = plots.histogram(
        samples,
        threshold,
        prefix="h",
        label="Score histograms. Median scores: "
        + "; ".join(f"{name} {number(float(np.median(x)))}" for name, x in zip(names, samples, strict=True)),
    )
    cards = [_card(i, one, calibration_scores, low, high) for i, one in enumerate(shown)]
    html = render(
        "scores.html",
        title=title,
        summary=summary,
        facts=dict(facts),
        histogram=histogram,
        keys=[Key(name, *plots.series(i)) for i, name in enumerate(names)],
        outside=[
            f"{percent(out.below)} of {name} below, {percent(out.above)} above"
            for name, out in zip(names, outside, strict=True)
            if out.below or out.above
        ],
        threshold=number(threshold),
        cards=cards,
        counted=counted,
        scored=len(scores),
        pictures=[card.picture for card in cards if card.picture is not None],
        strip=_strip(calibration_scores, low, high),
        width=_WIDTH,
        height=_HEIGHT,
        limit=_place(threshold, low, high),
        unread=unread,
        unread_count=unread_count,
    )
    write(path, html)


def _card(i: int, one: ScoredImage, calibration_scores: Array, low: float, high: float) -> _Card:
    verdict = one.verdict
    assert verdict.score is not None
    above = float(np.mean(calibration_scores > verdict.score))
    return _Card(
        name=verdict.item,
        word={True: "ID", False: "OOD", None: ""}[verdict.is_id],
        flagged=verdict.is_id is False,
        predicted=verdict.predicted,
        score=number(verdict.score),
        p_value="" if verdict.p_value is None else f"{verdict.p_value:.4f}",
        share=percent(above),
        x=_place(verdict.score, low, high),
        picture=None if one.image is None else thumbnail(one.image, f"t{i}"),
        sentence="" if verdict.why is None else verdict.why.sentence,
        rows=[] if verdict.why is None else verdict.why.rows(),
    )


def _place(score: float, low: float, high: float) -> str:
    """Return the position of a score in the small histogram, clipped to its ends."""
    return f"{_WIDTH * float(np.clip((score - low) / (high - low), 0, 1)):.1f}"


def _strip(calibration_scores: Array, low: float, high: float) -> Markup:
    """Return the outline of the calibration scores' histogram as SVG path data."""
    counts = np.histogram(calibration_scores, np.linspace(low, high, _BINS + 1))[0]
    tops = _HEIGHT * (1 - counts / max(1, counts.max()))
    step = _WIDTH / _BINS
    steps = " ".join(f"V{top:.1f}H{(i + 1) * step:.0f}" for i, top in enumerate(tops))
    return Markup(f"M0 {_HEIGHT:.0f}{steps}V{_HEIGHT:.0f}Z")
