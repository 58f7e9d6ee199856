"""The page of scored images or texts: lowest scores first, each with its place, similar images and a heat map."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from featnorm._utils.ranks import are_ranks, shown_scores
from featnorm.hidden.examples import Neighbor
from featnorm.inputs import Kind
from featnorm.report import plots
from featnorm.report.explanation import heat_map, neighbor_picture
from featnorm.report.html import THUMBNAIL, Key, Picture, number, percent, render, thumbnail, write
from featnorm.report.maps import draw_map
from featnorm.verdict import ItemVerdict, Verdict

Array = npt.NDArray[np.float64]

# Size of the small histogram beside an image, in SVG units, and its number of bins.
_WIDTH, _HEIGHT, _BINS = 160.0, 30.0, 20
_MAP_SIDE = 2 * THUMBNAIL
# Characters of a text that are shown.
_MAX_TEXT = 500
# Folders in the table.
_MAX_FOLDERS = 200


@dataclass(frozen=True)
class ScoredItem:
    """An image or text on the page.

    Attributes
    ----------
    verdict : its verdict, with the explanation.
    folder : folder of the item.
    item : the image or text, or None if it can no longer be read.
    model_input : what the model sees of it as gray values in [0, 1], (height, width), for the heat map; or None.
    positions : verdicts on its positions, for the map; or None.
    """

    verdict: ItemVerdict
    folder: str
    item: Image.Image | str | None
    model_input: npt.NDArray[np.float32] | None
    positions: Verdict | None = None


@dataclass(frozen=True)
class _Folder:
    name: str
    scored: int
    flagged: int
    p_value: str = ""
    word: str = ""

    @property
    def share(self) -> str:
        return percent(self.flagged / self.scored)


@dataclass(frozen=True)
class _Similar:
    label: str
    similarity: str
    picture: Picture | None
    text: str = ""


@dataclass(frozen=True)
class _Card:
    name: str
    folder: str
    word: str
    flagged: bool
    predicted: str | None
    group: str | None
    score: str
    terms: str
    sum_of: str
    p_value: str
    share: str
    x: str
    picture: Picture | None
    text: str
    heat: Picture | None
    map: Picture | None
    reference: str
    no_heat: str
    similar: list[_Similar]
    sentence: str
    rows: list[tuple[str, str]]


def write_scores_page(
    path: Path,
    *,
    kind: Kind,
    title: str,
    summary: str,
    detail: str = "",
    facts: Mapping[str, str],
    calibration_scores: Array,
    scores: Array,
    threshold: float,
    flagged: int,
    folders: Mapping[str, Sequence[int]],
    clips: Mapping[str, tuple[float | None, str]] | None = None,
    shown: Iterable[ScoredItem],
    unread: Sequence[tuple[str, str]],
    unread_count: int,
) -> None:
    """Write the page of scored items as one HTML file that works offline, and without JavaScript.

    Parameters
    ----------
    path : file to write, in an existing folder; an existing file is replaced.
    kind : what was scored.
    title, summary, detail, facts
        Heading of the page, sentences in plain words and in terms of the calibration under it, and provenance, as
        label -> text.
    calibration_scores : scores of the calibration items (n,), ascending; or the fixed ones of a `Jackknife`.
    scores : scores of the items (m,); may be empty.
    threshold : score at or above which an item is ID.
    flagged : number of flagged items.
    folders : number of items scored, and of items flagged, by folder or clip.
    clips : p-value of each clip, and its verdict in a word, for frames; None for other items.
    shown : the items to show, lowest score first; consumed one at a time.
    unread, unread_count : names and reasons of the first unreadable items, and the number of all of them.
    """
    counted = are_ranks(calibration_scores)
    calibration_scores = shown_scores(np.sort(calibration_scores))
    samples = [calibration_scores, scores] if len(scores) else [calibration_scores]
    names = [f"calibration {kind.name}", f"these {kind.name}"][: len(samples)]
    low, high = plots.span(samples)
    histogram, outside = plots.histogram(
        samples,
        threshold,
        prefix="h",
        label="Score histograms. Median scores: "
        + "; ".join(f"{name} {number(float(np.median(x)))}" for name, x in zip(names, samples, strict=True)),
    )
    examples: dict[int, Picture | None] = {}
    cards = [_card(i, one, calibration_scores, low, high, examples) for i, one in enumerate(shown)]
    counts = []
    for name, (count, flagged_in) in folders.items():
        p_value, word = (clips or {}).get(name, (None, ""))
        shown_p = "" if p_value is None else f"{p_value:.4f}"
        counts.append(_Folder(name, count, flagged_in, shown_p, word))
    counts.sort(key=lambda folder: (-folder.flagged / folder.scored, -folder.scored, folder.name))
    pictures = [picture for card in cards for picture in (card.picture, card.heat, card.map)]
    html = render(
        "scores.html",
        items=kind.name,
        noun=kind.noun,
        title=title,
        summary=summary,
        detail=detail,
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
        flagged=flagged,
        folders=counts[:_MAX_FOLDERS],
        place="folder" if clips is None else "clip",
        judged=bool(clips),
        folder_count=len(counts),
        predicted=sorted({card.predicted for card in cards if card.predicted is not None}),
        pictures=[picture for picture in (*pictures, *examples.values()) if picture is not None],
        strip=_strip(calibration_scores, low, high),
        width=_WIDTH,
        height=_HEIGHT,
        limit=_place(threshold, low, high),
        unread=unread,
        unread_count=unread_count,
    )
    write(path, html)


def _card(
    i: int,
    one: ScoredItem,
    calibration_scores: Array,
    low: float,
    high: float,
    examples: dict[int, Picture | None],
) -> _Card:
    """Return the card of an item; add the pictures of similar images to ``examples``."""
    verdict, why = one.verdict, one.verdict.why
    assert verdict.score is not None
    terms = [] if why is None else why.terms
    heat = None
    if why is not None and why.heat is not None and one.model_input is not None:
        heat = thumbnail(heat_map(why.heat, one.model_input), f"m{i}")
    above = float(np.mean(calibration_scores > verdict.score))
    return _Card(
        name=verdict.item,
        folder=one.folder,
        word={True: "ID", False: "OOD", None: ""}[verdict.is_id],
        flagged=verdict.is_id is False,
        predicted=verdict.predicted,
        group=verdict.group,
        score=number(verdict.score),
        terms=" ".join(f"{value:+.2f}".replace("-", "−") for _, value in terms),
        sum_of=" and ".join(term for term, _ in terms),
        p_value="" if verdict.p_value is None else f"{verdict.p_value:.4f}",
        share=percent(above),
        x=_place(verdict.score, low, high),
        picture=thumbnail(one.item, f"t{i}") if isinstance(one.item, Image.Image) else None,
        text=_shortened(one.item) if isinstance(one.item, str) else "",
        heat=heat,
        map=None if one.positions is None else thumbnail(draw_map(one.positions, _map_size(one)), f"p{i}"),
        reference="" if why is None else why.reference,
        no_heat="" if why is None or isinstance(one.item, str) else why.no_heat,
        similar=[] if why is None else [_similar(neighbor, one, examples) for neighbor in why.nearest],
        sentence="" if why is None or why.units is None else why.units.sentence,
        rows=[] if why is None or why.units is None else why.units.rows(),
    )


def _map_size(one: ScoredItem) -> tuple[int, int]:
    """Return the size in pixels at which a map is drawn, before it becomes a thumbnail."""
    width, height = one.item.size if isinstance(one.item, Image.Image) else (1, 1)
    return round(_MAP_SIDE * width / max(width, height)), round(_MAP_SIDE * height / max(width, height))


def _shortened(text: str) -> str:
    return text if len(text) <= _MAX_TEXT else f"{text[:_MAX_TEXT]}…"


def _similar(neighbor: Neighbor, one: ScoredItem, examples: dict[int, Picture | None]) -> _Similar:
    label, similarity = neighbor.label or "", f"{neighbor.similarity:.2f}"
    if isinstance(one.item, str):
        return _Similar(label, similarity, None, neighbor.text() or "")
    if neighbor.index not in examples:
        examples[neighbor.index] = neighbor_picture(neighbor, f"e{neighbor.index}")
    return _Similar(label, similarity, examples[neighbor.index])


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
