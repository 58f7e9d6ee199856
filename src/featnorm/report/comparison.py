"""The page that compares detectors: one HTML file that needs no network, no server and no script."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePath
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
from markupsafe import Markup
from PIL import Image

from featnorm._utils.checks import count_for_share
from featnorm.report import plots
from featnorm.report.html import Key, Picture, data_uri, number, percent, render, thumbnail, write
from featnorm.report.tables import by_reason, chance_warning, columns, note

if TYPE_CHECKING:
    from featnorm.evaluation import Comparison, Result

__all__ = ["write_page"]

ImageOf = Callable[[str, int], Image.Image]

_TPR = 0.95
_MAX_MISTAKES = 12
# Size in pixels that pictures of activation patterns are enlarged to, by integer factors.
_PATTERN_HEIGHT = 512
_PATTERN_WIDTH = 200


@dataclass(frozen=True)
class _Mistake:
    """An input that a detector gets wrong."""

    name: str  # its file, or its number if it has no name
    full_name: str
    score: str
    picture: Picture | None


@dataclass(frozen=True)
class _Mistakes:
    """The inputs of one set that a detector gets wrong, and the worst of them with their scores."""

    key: Key
    is_id: bool
    wrong: int
    total: int
    shown: list[_Mistake]

    @property
    def share(self) -> str:
        return percent(self.wrong / self.total)


@dataclass(frozen=True)
class _Panel:
    """The content of the page on one detector."""

    name: str
    summary: str
    threshold: str
    threshold_note: str
    histogram: Markup
    roc: Markup
    keys: list[Key]
    outside: list[str]
    mistakes: list[_Mistakes]


@dataclass(frozen=True)
class _Pattern:
    """The activation pattern of some inputs of a set."""

    key: Key
    uri: str
    inputs: int
    units: int
    width: int
    height: int
    active: str


@dataclass
class _Pictures:
    """The images of a page; each is read and embedded once, however many detectors get it wrong."""

    image: ImageOf | None
    seen: dict[tuple[str, int], Picture | None] = field(default_factory=dict)

    def get(self, set_name: str, index: int) -> Picture | None:
        """Return a thumbnail, or None if there are no images or this one can no longer be read."""
        if self.image is None:
            return None
        if (set_name, index) not in self.seen:
            try:
                picture = thumbnail(self.image(set_name, index), f"t{len(self.seen)}")
            except (OSError, ValueError):  # a moved or broken file only loses its thumbnail
                picture = None
            self.seen[set_name, index] = picture
        return self.seen[set_name, index]

    def all(self) -> list[Picture]:
        return [picture for picture in self.seen.values() if picture is not None]


def write_page(comparison: Comparison, path: Path, *, title: str, summary: str, image: ImageOf | None) -> None:
    """Write a comparison of detectors as one HTML file that works offline.

    Parameters
    ----------
    comparison : result of `featnorm.compare`.
    path : file to write, in an existing directory; an existing file is replaced.
    title, summary : heading of the page, and a sentence under it.
    image
        Function that maps the name of a set and an index into its scores to the image, for thumbnails of mistakes.
        It may raise `OSError` or `ValueError` if the image cannot be read. None for no thumbnails.
    """
    keys = [
        Key(name, *plots.series(index)) for index, name in enumerate([comparison.id_name, *comparison.ood_names])
    ]
    pictures = _Pictures(image)
    panels = [
        _panel(result, keys, pictures, comparison.items, f"d{i}") for i, result in enumerate(comparison.ranked)
    ]
    table = columns(comparison)
    share = comparison.accuracy
    accuracy = {} if share is None else {f"accuracy on {comparison.id_name}": percent(share)}
    html = render(
        "comparison.html",
        title=title,
        summary=summary,
        comparison=comparison,
        facts=accuracy | comparison.facts,
        groups=[(group, len(list(members))) for group, members in groupby(column.group for column in table)],
        columns=table,
        note=note(comparison),
        warning=chance_warning(comparison),
        excluded=by_reason(comparison.excluded),
        panels=panels,
        pictures=pictures.all(),
        has_images=image is not None,
        patterns=_patterns(comparison, keys),
        pattern_height=_PATTERN_HEIGHT,
    )
    write(path, html)


def _panel(
    result: Result, sets: Sequence[Key], pictures: _Pictures, items: Mapping[str, Sequence[str]], prefix: str
) -> _Panel:
    id_key, *ood_keys = sets
    id_scores = np.asarray(result.id_scores, np.float64)
    ood_scores = [np.asarray(result.ood_scores[key.name], np.float64) for key in ood_keys]
    samples = [id_scores, *ood_scores]
    # The largest score that accepts this share of ID: the threshold at which FPR95 is measured.
    threshold = float(np.sort(id_scores)[::-1][count_for_share(_TPR, len(id_scores)) - 1])
    tpr = float(np.mean(id_scores >= threshold))
    aurocs = [percent(result.metrics[key.name].auroc) for key in ood_keys]

    picture, outside = plots.histogram(
        samples,
        threshold,
        prefix=f"{prefix}h",
        label="Score histograms. Median scores: "
        + "; ".join(f"{key.name} {number(_median(x))}" for key, x in zip(sets, samples, strict=True)),
    )
    curves = plots.roc(
        id_scores,
        ood_scores,
        [(float(np.mean(scores >= threshold)), tpr) for scores in ood_scores],
        prefix=f"{prefix}r",
        label="ROC curves. AUROC: "
        + "; ".join(f"{key.name} {auroc}" for key, auroc in zip(ood_keys, aurocs, strict=True)),
    )
    low, high = plots.span(samples)
    mistakes = [_mistakes(id_key, id_scores, id_scores < threshold, pictures, items, is_id=True)]
    mistakes += [
        _mistakes(key, scores, scores >= threshold, pictures, items, is_id=False)
        for key, scores in zip(ood_keys, ood_scores, strict=True)
    ]
    return _Panel(
        name=result.detector,
        summary=f"{'Mean ' if len(ood_keys) > 1 else ''}AUROC {percent(result.mean.auroc)}, "
        f"FPR95 {percent(result.mean.fpr95)}",
        threshold=number(threshold),
        threshold_note="" if low <= threshold <= high else "outside the plot",
        histogram=picture,
        roc=curves,
        keys=[id_key, *(Key(k.name, k.color, k.dash, a) for k, a in zip(ood_keys, aurocs, strict=True))],
        outside=[_beyond(key, out) for key, out in zip(sets, outside, strict=True) if out.below or out.above],
        mistakes=mistakes,
    )


def _mistakes(
    key: Key,
    scores: npt.NDArray[np.float64],
    wrong: npt.NDArray[np.bool_],
    pictures: _Pictures,
    items: Mapping[str, Sequence[str]],
    *,
    is_id: bool,
) -> _Mistakes:
    indices = np.flatnonzero(wrong)
    worst = indices[np.argsort(scores[indices] if is_id else -scores[indices], kind="stable")][:_MAX_MISTAKES]
    shown = []
    for i in map(int, worst):
        full = items[key.name][i] if key.name in items else f"input {i}"
        shown.append(_Mistake(PurePath(full).name, full, number(float(scores[i])), pictures.get(key.name, i)))
    return _Mistakes(key, is_id, len(indices), len(scores), shown)


def _beyond(key: Key, out: plots.Outside) -> str:
    def side(share: float, infinite: float, word: str, symbol: str) -> Iterable[str]:
        if share:
            yield f"{percent(share)} {word}" + (f" ({percent(infinite)} at {symbol})" if infinite else "")

    parts = [
        *side(out.below, out.minus_infinity, "below", "−∞"),
        *side(out.above, out.plus_infinity, "above", "∞"),
    ]
    return f"{key.name}: {', '.join(parts)}"


def _patterns(comparison: Comparison, keys: Sequence[Key]) -> list[_Pattern]:
    """Draw activation patterns: one column per input, one row per unit, one pixel each."""
    present = [(key, comparison.patterns[key.name]) for key in keys if key.name in comparison.patterns]
    if not present:
        return []
    # All sets use the order of the ID set, so that a row is the same unit in every picture.
    order = np.argsort(-present[0][1].mean(0), kind="stable")
    result = []
    for key, pattern in present:
        inputs, units = pattern.shape
        image = Image.fromarray(np.where(pattern[:, order].T, np.uint8(1), np.uint8(0)), "P")
        image.putpalette([0, 0, 0, 70, 138, 200])
        result.append(
            _Pattern(
                key,
                data_uri(image, "PNG", optimize=True, bits=1, transparency=0),
                inputs,
                units,
                inputs * int(np.clip(_PATTERN_WIDTH // inputs, 1, 24)),
                units * max(1, _PATTERN_HEIGHT // units),
                percent(float(pattern.mean())),
            )
        )
    return result


def _median(scores: npt.NDArray[np.float64]) -> float:
    # The upper of the two middle scores, as the mean of two infinities may be undefined.
    return float(np.sort(scores)[len(scores) // 2])
