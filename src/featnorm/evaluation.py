"""Comparison of detectors, which are fitted, scored and measured in one pass over each set of inputs."""

import csv
import io
import json
import re
import time
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property, partial
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import nn

from featnorm._utils.checks import shown
from featnorm._utils.extras import import_extra
from featnorm._utils.files import replacing, write_text
from featnorm._utils.progress import progress_bar
from featnorm.detectors import Detector, parse_detector, registered_detectors
from featnorm.detectors.held_out import fit_in_batches
from featnorm.engine import FeatureEngine, is_wanted, required_or_none
from featnorm.features import Features
from featnorm.inputs import ROWS, TEXTS, ItemError, Kind, Source, kind_of, source_loader, source_of
from featnorm.inputs.kinds import Inputs, OfAnySize, to_device
from featnorm.inputs.loading import named
from featnorm.inputs.rows import fit_rows
from featnorm.inputs.source import class_indices
from featnorm.inputs.tables import is_in_memory
from featnorm.metrics import Metrics, evaluate
from featnorm.models.loading import rows_model, users_forward
from featnorm.parts import sampled_parts, unit_scores
from featnorm.runtime import Runtime
from featnorm.scorer import LOWEST, Scorer
from featnorm.significance import (
    Estimate,
    bootstrap_fpr95,
    cliques,
    delong,
    from_covariance,
    from_resamples,
    placements,
)
from featnorm.tap import FeatureTap

if TYPE_CHECKING:
    import pandas

Data: TypeAlias = Features | Iterable[Any] | Source[Any] | str | PathLike[str]

# Inputs of each set whose patterns of active units are kept for the report.
_MAX_PATTERNS = 50
_FIT = "fit"
_GROUP = re.compile(r"(?:(near|far):)?(.+)", re.DOTALL)


@dataclass(frozen=True)
class Result:
    """Scores and metrics of one detector."""

    detector: str  # its expression
    id_scores: np.ndarray  # (n,)
    ood_scores: Mapping[str, np.ndarray]  # by OOD set, (m,)
    metrics: Mapping[str, Metrics]  # by OOD set
    microseconds: float  # to score one input, without the model's forward pass

    @property
    def mean(self) -> Metrics:
        """The metrics, averaged over the OOD sets."""
        return self.mean_over(list(self.metrics))

    def mean_over(self, names: Sequence[str]) -> Metrics:
        """Return the metrics, averaged over some of the OOD sets."""
        sets = [self.metrics[name] for name in names]
        fields = Metrics.__dataclass_fields__
        return Metrics(**{name: float(np.mean([getattr(m, name) for m in sets])) for name in fields})


@dataclass(frozen=True)
class Summary:
    """AUROC and FPR95 of all detectors on one OOD set, or averaged over several, with confidence intervals."""

    title: str  # "Mean", "Near" or "Far", or the name of the OOD set
    sets: tuple[str, ...]
    is_mean: bool
    auroc: Estimate
    fpr95: Estimate


@dataclass(repr=False)
class Comparison:
    """The outcome of a comparison of detectors: numbers, tables, scores, and a plot.

    Confidence intervals are at 95 %, over test inputs: DeLong's for AUROC, a bootstrap's for FPR95. All detectors
    score the same inputs, so differences from the reference are paired.

    Examples
    --------
    >>> result = compare(["MSP"], model=model, id_set=held_out_loader, ood_sets={"bright": [images + 5]})
    >>> result.ood_names, result.reference
    (['bright'], 'MSP()')
    """

    id_name: str
    ood_groups: dict[str, str]  # OOD set -> "near", "far" or "" for neither
    results: list[Result] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)  # detector -> reason
    accuracy: float | None = None  # share of the labeled ID inputs that the model classifies correctly
    patterns: dict[str, np.ndarray] = field(default_factory=dict)  # set -> (k, d) bool, active units
    items: dict[str, list[str]] = field(default_factory=dict)  # set -> names of its inputs, if it has them
    rows: dict[str, list[int]] = field(default_factory=dict)  # set -> rows of its inputs in their source
    predicted: dict[str, np.ndarray] = field(default_factory=dict)  # set -> (n,) index of the largest logit
    skipped: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # set -> (file, reason)
    several: int = 0  # number of files with several frames or pages, of which the first is used
    facts: dict[str, str] = field(default_factory=dict)  # how the numbers were made
    chosen_reference: str | None = None

    @property
    def ood_names(self) -> list[str]:
        """The names of the OOD sets, in order."""
        return list(self.ood_groups)

    @property
    def ranked(self) -> list[Result]:
        """The results by mean AUROC, best first; ties keep their order."""
        return sorted(self.results, key=lambda result: -result.mean.auroc)

    @property
    def reference(self) -> str:
        """The detector from which differences are taken: the chosen one, or the best if that has no result."""
        names = [result.detector for result in self.ranked]
        return self.chosen_reference if self.chosen_reference in names else names[0]

    @cached_property
    def _inference(self) -> tuple[list[Summary], list[str]]:
        ranked = self.ranked
        ids = np.stack([result.id_scores for result in ranked])
        oods = {name: np.stack([result.ood_scores[name] for result in ranked]) for name in self.ood_groups}
        parts = {name: placements(ids, scores) for name, scores in oods.items()}
        resampled = bootstrap_fpr95(ids, list(oods.values()))
        reference = [result.detector for result in ranked].index(self.reference)

        def members(group: str) -> list[str]:
            return [name for name, of in self.ood_groups.items() if of == group]

        groups = [("Mean", self.ood_names, True)] if len(self.ood_groups) > 1 else []
        groups += [(group.title(), members(group), True) for group in ("near", "far") if len(members(group)) > 1]
        groups += [(name, [name], False) for name in self.ood_groups]
        summaries, letters = [], None
        for title, names, is_mean in groups:
            means = [result.mean_over(names) for result in ranked]
            covariance = delong([parts[name] for name in names])
            auroc = np.array([mean.auroc for mean in means])
            letters = letters or cliques(auroc, covariance)
            of_sets = resampled[:, [self.ood_names.index(name) for name in names]].mean(1)
            fpr95 = from_resamples(np.array([mean.fpr95 for mean in means]), of_sets, reference)
            estimate = from_covariance(auroc, covariance, reference)
            summaries.append(Summary(title, tuple(names), is_mean, estimate, fpr95))
        return summaries, letters or []

    @property
    def summaries(self) -> list[Summary]:
        """AUROC and FPR95 in the order of `ranked`: the mean over the OOD sets, near, far, and each set."""
        return self._inference[0]

    @property
    def cliques(self) -> list[str]:
        """Letters of each detector, in the order of `ranked`: those that share one cannot be told apart.

        Every pair is compared by DeLong's test of the mean AUROC, at a level of 5 % over all pairs (Holm).
        """
        return self._inference[1]

    def records(self) -> list[dict[str, Any]]:
        """Return one row of numbers per detector and column of the table, as shares in [0, 1].

        Every row has the measures of `Metrics`, 95 % intervals of AUROC and FPR95 (``auroc_low``, ``auroc_high``)
        and of their differences from the reference (``auroc_difference``, ``auroc_difference_low``, ...), the
        clique, and the microseconds per input.
        """
        rows = []
        for summary in self.summaries:
            for i, result in enumerate(self.ranked):
                measures = asdict(result.mean_over(summary.sets))
                row: dict[str, Any] = {"detector": result.detector, "set": summary.title}
                row["group"] = summary.title.lower() if summary.is_mean else self.ood_groups[summary.title]
                row["is_mean"] = summary.is_mean
                for name, value in measures.items():
                    row[name] = value
                    estimate = getattr(summary, name, None)
                    if estimate is not None:
                        parts = ("low", "high", "difference", "difference_low", "difference_high")
                        row |= {f"{name}_{part}": float(getattr(estimate, part)[i]) for part in parts}
                row |= {"clique": self.cliques[i], "microseconds": result.microseconds}
                rows.append(row)
        return rows

    def to_pandas(self) -> "pandas.DataFrame":
        """Return `records` as a pandas DataFrame; needs pandas."""
        import pandas

        return pandas.DataFrame(self.records())

    def to_csv(self) -> str:
        """Return `records` as CSV."""
        records, out = self.records(), io.StringIO()
        writer = csv.DictWriter(out, list(records[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(records)
        return out.getvalue()

    def to_json(self) -> str:
        """Return facts, accuracy, reference, excluded detectors and `records` as JSON; what is unknown is null."""
        records = [
            {k: None if isinstance(v, float) and not np.isfinite(v) else v for k, v in record.items()}
            for record in self.records()
        ]
        about = {
            "id": self.id_name,
            "id_inputs": len(self.results[0].id_scores),
            "ood_inputs": {name: len(scores) for name, scores in self.results[0].ood_scores.items()},
            "accuracy": self.accuracy,
            "reference": self.reference,
            "facts": self.facts,
            "excluded": self.excluded,
            "skipped": self.skipped,
        }
        return json.dumps({**about, "results": records}, indent=1) + "\n"

    def table(self) -> str:
        """Return the table as aligned text; lines below it name detectors worse than chance, and excluded ones."""
        from featnorm.report.tables import text_table

        return text_table(self)

    def __repr__(self) -> str:
        return self.table() if self.results else f"Comparison({self.id_name!r}, {self.ood_groups!r})"

    def to_markdown(self) -> str:
        """Return the table in Markdown, with the best of each column in bold."""
        from featnorm.report.tables import markdown_table

        return markdown_table(self)

    def to_latex(self) -> str:
        """Return the table in LaTeX, for the package booktabs, with the best of each column in bold."""
        from featnorm.report.tables import latex_table

        return latex_table(self)

    @property
    def scores(self) -> dict[str, np.ndarray]:
        """The scores of every input, as columns: set, group, item, row, and one per detector.

        The group is "id", "near", "far" or "ood"; the item is the name of the input, empty if it has none.
        """
        first = self.results[0]
        sets = {self.id_name: first.id_scores, **first.ood_scores}
        groups = {self.id_name: "id"} | {name: group or "ood" for name, group in self.ood_groups.items()}
        counts = {name: len(scores) for name, scores in sets.items()}
        columns = {
            "set": np.concatenate([np.full(n, name, object) for name, n in counts.items()]),
            "group": np.concatenate([np.full(n, groups[name], object) for name, n in counts.items()]),
            "item": np.concatenate([np.array(self.items.get(s, [""] * n), object) for s, n in counts.items()]),
            "row": np.concatenate([np.array(self.rows.get(s, range(n)), np.int64) for s, n in counts.items()]),
        }
        for result in self.results:
            of_sets = [result.id_scores, *(result.ood_scores[name] for name in self.ood_groups)]
            columns[result.detector] = np.concatenate(of_sets)
        return columns

    def to_parquet(self, path: str | Path) -> None:
        """Write `scores` to a parquet file; needs pyarrow."""
        pyarrow, parquet = import_extra("pyarrow"), import_extra("pyarrow.parquet")
        # File names may contain bytes that cannot be decoded.
        columns = {
            name: [text.encode(errors="backslashreplace").decode() for text in values]
            if values.dtype == object
            else values
            for name, values in self.scores.items()
        }
        with replacing(Path(path)) as temporary:
            parquet.write_table(pyarrow.table(columns), temporary)

    def plot(self, path: str | Path) -> None:
        """Draw AUROC and FPR95 of every detector with their intervals; the file's ending is the format.

        Parameters
        ----------
        path : file to write, such as ``results.pdf`` or ``results.svg``; an existing file is replaced.
        """
        from featnorm.report.ranking import plot_ranking

        plot_ranking(self, Path(path))

    def save(self, folder: str | Path) -> list[Path]:
        """Write tables, scores and plots to a folder, which is made if there is none; return the files.

        They are ``results.csv``, ``results.json``, ``results.tex``, ``scores.parquet``, ``results.svg`` and
        ``results.pdf``.
        """
        Path(folder).mkdir(parents=True, exist_ok=True)
        files = [Path(folder) / name for name in FILES]
        for file in files:
            match file.suffix:
                case ".parquet":
                    self.to_parquet(file)
                case ".svg" | ".pdf":
                    self.plot(file)
                case suffix:
                    text = {".csv": self.to_csv, ".json": self.to_json, ".tex": self.to_latex}[suffix]()
                    write_text(file, text, errors="backslashreplace")
        return files


#: Files that `Comparison.save` writes.
FILES = ("results.csv", "results.json", "results.tex", "scores.parquet", "results.svg", "results.pdf")


def standard_detectors() -> list[Detector]:
    """Return every detector, with the settings of its source, except those limited to a special kind of model."""
    kinds = registered_detectors().values()
    return [parse_detector(expression) for kind in kinds for expression in kind.standard]


def compare(
    detectors: Sequence[Detector | str] | None = None,
    *,
    id_set: tuple[str, Data] | Data,
    ood_sets: Mapping[str, Data],
    fit: Data | None = None,
    model: nn.Module | FeatureTap | Scorer | None = None,
    preprocess: Any = None,
    classes: Sequence[str] | None = None,
    spec: str = "",
    reference: Detector | str | None = None,
    runtime: Runtime | None = None,
) -> Comparison:
    """Fit detectors to one set of in-distribution inputs, then score and measure them all on others.

    Every set is read once, batch by batch, for all detectors. A detector that cannot score these features, or
    needs a fit while there is nothing to fit on, is excluded and listed with the reason. A detector that is
    fitted already stays as it is.

    A set is one of

    - `Features`, or an iterable of them, batch by batch;
    - a loader of batches as the model takes them, with or without labels, see `FeatureTap.stream`;
    - images, texts or rows as `featnorm.fit` takes them: a source, a specification such as a folder, a list of
      str, an array, a tensor or a DataFrame; `featnorm.inputs.source_of` adds labels to them. Items that cannot be
      read are skipped and listed.

    Of a tap or `Scorer` per position or box, whole images are compared, by the mean of the lowest scores of their
    parts, see `featnorm.parts.unit_scores`.

    Parameters
    ----------
    detectors
        Detectors to compare, or their expressions. Default: `standard_detectors`.
    id_set : the ID test inputs, or their name and they.
    ood_sets
        The OOD test inputs by the name of their set. Names that begin with ``near:`` or ``far:`` put the set into
        that group, over which the measures are averaged too; the rest is then its name.
    fit
        ID inputs to fit on. Default: none, which excludes the detectors that need a fit and are not fitted yet.
    model
        The model, a tap on it, or a `Scorer`, whose detector is compared too. Default: none, for sets of features
        or of rows, which are used as pooled features.
    preprocess : function from an item to what the model takes. Default: that of the `Scorer`.
    classes
        Class names of the model's logits, to which the labels of a set are matched by name. Default: those of the
        `Scorer`.
    spec : specification of the model, by which messages name it if it is the user's own.
    reference
        Detector from which differences are taken. Default: the one with the best mean AUROC.
    runtime : precision, batch size, workers and engine for sources. Default: `Runtime()`.

    Raises
    ------
    ValueError
        There is no OOD set, a set yields no inputs, every detector is excluded, the reference is not among the
        detectors, two sets have one name, or a set needs a model or a preprocess that is not given.
    TypeError
        A set is of another type.

    Examples
    --------
    >>> result = compare(
    ...     ["NAN", "KNN(k=50)"], model=model, fit=train_loader, id_set=("noise", held_out_loader),
    ...     ood_sets={"far:bright": [images + 5], "near:dim": [images / 2]},
    ... )
    >>> table = result.table()
    """
    if not ood_sets:
        raise ValueError("ood_sets is empty: pass at least one set of OOD inputs by its name")
    chosen = standard_detectors() if detectors is None else list(detectors)
    active = {repr(detector): detector for detector in map(_parsed, chosen)}
    kind = model.kind if isinstance(model, Scorer) else None
    lowest = LOWEST[model.per] if isinstance(model, FeatureTap) else 0.0
    if isinstance(model, FeatureTap) and model.per == "box" and preprocess is not None:
        preprocess = OfAnySize(preprocess)
    if isinstance(model, Scorer):
        lowest = model.lowest
        active = {repr(model.detector): model.detector} | active
        active[repr(model.detector)] = model.detector
        preprocess, spec = preprocess or model.preprocess, spec or model.spec or ""
        classes = classes or model.classes
        model = model.tap
    tap = FeatureTap(model) if isinstance(model, nn.Module) else model
    id_name, id_data = id_set if isinstance(id_set, tuple) else (None, id_set)
    id_data, fit = _opened(id_data), _opened(fit)
    id_name = getattr(id_data, "title", "ID") if id_name is None else id_name
    example = id_data if fit is None else fit
    if tap is None and isinstance(example, Source) and example.kind is ROWS:
        loaded = rows_model(fit_rows(example))
        tap, preprocess = FeatureTap(loaded.model), loaded.transform
    groups, sets = {}, {id_name: id_data}
    for given, data in ood_sets.items():
        match = _GROUP.fullmatch(given)
        group, name = match.groups() if match else (None, given)
        if name in sets:
            raise ValueError(f"two sets are called {name!r}: every set needs a name of its own")
        groups[name], sets[name] = group or "", _opened(data)
    for name, data in [*([] if fit is None else [(_FIT, fit)]), *sets.items()]:
        if isinstance(data, Source):
            _require_readable(name, data)
    result = Comparison(id_name, groups)
    if reference is not None:
        result.chosen_reference = repr(_parsed(reference))
        if result.chosen_reference not in active:
            raise ValueError(
                f"the reference {result.chosen_reference} is not among the detectors: {', '.join(active)}"
            )
    reader = _Reader(result, tap, preprocess, kind or kind_of(preprocess), classes, spec, runtime or Runtime())
    count = sum(len(data) for data in (fit, *sets.values()) if isinstance(data, Source))
    if tap is not None and count:
        reader.exports = is_wanted(reader.runtime, reader.kind, tap.device, count)

    def exclude(name: str, reason: Exception | str) -> None:
        # Errors begin with the detector's name, which is listed already, next to the reason.
        result.excluded[name] = str(reason).removeprefix(name).removeprefix(":").strip()
        del active[name]

    for name, detector in list(active.items()):
        if detector.needs_model and reader.kind is TEXTS:
            exclude(name, "it changes the input, and the tokens of a text cannot be changed gradually")
        elif fit is None and not detector.is_fitted:
            exclude(name, "it needs a fit, and no in-distribution inputs were given to fit on")
    unfitted = {detector: name for name, detector in active.items() if not detector.is_fitted}
    if fit is not None and unfitted:
        for detector, error in fit_in_batches(
            unfitted, sampled_parts(reader.stream(_FIT, fit, fitting=True))
        ).items():
            exclude(unfitted[detector], error)
    # Not one array per batch: small blocks between the large ones of each batch would keep the C library from
    # reusing their memory, which would grow by the features of every input.
    scores: dict[str, dict[str, array[float]]] = {name: {} for name in active}
    dtypes: dict[tuple[str, str], str] = {}
    seconds = dict.fromkeys(active, 0.0)
    inputs = 0
    correct = labeled = 0
    for set_name, data in sets.items():
        seen = 0
        predicted = array("q")
        for features in reader.stream(set_name, data):
            parts = features.parts
            for name, detector in list(active.items()):
                try:
                    if inputs == 0 and detector.needs_fit:
                        detector.score(features)  # so that what is computed once per fit is not timed
                    start = _now(features)
                    batch = detector.score(features)
                    seconds[name] += _now(features) - start
                except (ValueError, RuntimeError) as error:
                    exclude(name, error)
                    continue
                if parts is not None:
                    batch = unit_scores(batch, parts.owners, parts.count, lowest)
                scores[name].setdefault(set_name, array("d")).extend(batch.tolist())
                dtypes[name, set_name] = str(batch.dtype).removeprefix("torch.")
            if seen < _MAX_PATTERNS and features.activation is not None:
                on = (features.activation[: _MAX_PATTERNS - seen] > 0).cpu().numpy()
                kept = result.patterns.get(set_name)
                result.patterns[set_name] = on if kept is None else np.concatenate([kept, on])
            if features.logits is not None and parts is None:
                predicted.extend(features.logits.argmax(1).tolist())
            if set_name == id_name and features.labels is not None and features.logits is not None:
                known = (features.labels >= 0) & (features.labels < features.logits.shape[1])
                correct += int((features.logits.argmax(1) == features.labels)[known].sum())
                labeled += int(known.sum())
            count = len(features) if parts is None else parts.count
            seen += count
            inputs += count
        if seen == 0:
            raise ValueError(f"there is no usable input in {set_name}")
        if predicted:
            result.predicted[set_name] = np.array(predicted)
    result.accuracy = correct / labeled if labeled else None
    for name in active:
        joined = {set_name: np.array(found, dtypes[name, set_name]) for set_name, found in scores[name].items()}
        ood = {set_name: joined[set_name] for set_name in groups}
        metrics = {set_name: evaluate(joined[id_name], ood[set_name]) for set_name in groups}
        result.results.append(Result(name, joined[id_name], ood, metrics, 1e6 * seconds[name] / inputs))
    if not result.results:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in result.excluded.items())
        raise ValueError(f"every detector is skipped: {reasons}")
    return result


def _now(features: Features) -> float:
    device = next(features.fields())[1].device
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _parsed(detector: Detector | str) -> Detector:
    return parse_detector(detector) if isinstance(detector, str) else detector


def _require_readable(name: str, source: Source[Any]) -> None:
    """Raise a ValueError if no item of a set can be read, before hours are spent on the others."""
    first = None
    for i in range(len(source)):
        try:
            source.item(i)
        except ItemError as error:
            first = first or error
        else:
            return
    raise ValueError(
        f"there is no usable input in {name}: none of {source.kind.counted(len(source))} can be read; the first "
        f"is {first}"
    )


def _opened(data: Any) -> Any:
    """Return data as a source, unless they are features or a loader."""
    return source_of(data) if isinstance(data, (str, PathLike)) or is_in_memory(data) else data


@dataclass
class _Reader:
    """Computes the features of sets of inputs; keeps names and rows of items, and what could not be read."""

    comparison: Comparison
    tap: FeatureTap | None
    preprocess: Any
    kind: Kind
    classes: Sequence[str] | None
    spec: str
    runtime: Runtime
    exports: bool = False  # whether onnxruntime is to run the model
    engine: FeatureEngine | None = None

    def stream(self, name: str, data: Data, *, fitting: bool = False) -> Iterator[Features]:
        """Yield the features of a set, batch by batch."""
        if isinstance(data, Features):
            return iter([data])
        if isinstance(data, Source):
            return self._items(name, data, fitting)
        if not isinstance(data, Iterable):
            raise TypeError(f"{name} must be Features, a loader, a source or a path, got {shown(data)}")
        if self.tap is None or (isinstance(data, Sequence) and data and isinstance(data[0], Features)):
            return self._features(name, data)
        return self.tap.stream(data, progress=self.runtime.progress)

    def _features(self, name: str, batches: Iterable[Any]) -> Iterator[Features]:
        for i, features in enumerate(batches):
            if not isinstance(features, Features):
                raise TypeError(f"batch {i} of {name} is not Features, but {shown(features)}: pass model=")
            yield features

    def _items(self, name: str, source: Source[Any], fitting: bool) -> Iterator[Features]:
        """Yield the features of a source; items that cannot be read are skipped."""
        if self.tap is None or self.preprocess is None:
            raise ValueError(
                f"{name} holds {source.kind.name}: pass model= and preprocess=, or a Scorer that has both"
            )
        source.require(self.kind, "the model", self.preprocess)
        loader = source_loader(
            source,
            self.preprocess,
            batch_size=self.runtime.batch_of(source.kind),
            workers=self.runtime.workers,
            on_corrupt=lambda file, why: self.comparison.skipped.setdefault(name, []).append((file, why)),
        )
        rows = self.comparison.rows.setdefault(name, [])
        items = self.comparison.items.setdefault(name, [])
        classes = source.class_names
        matched = class_indices(classes, self.classes)
        # Of the model's class of each label; the last one is of items without a label.
        numbers = None if matched is None else torch.tensor([*matched, -1])
        why = None
        if classes is None and source.label(0) is None:
            why = f"the {source.kind.name} have no classes (SSD and KNN need none)"
        elif classes is not None and len(classes) == 1:
            why = f"the {source.kind.name} are of a single class, {classes[0]} (SSD and KNN need none)"
        bar = progress_bar(
            loader.parts(), total=len(loader), desc=name, unit="batch", progress=self.runtime.progress
        )
        for part in bar:
            batch = part.batch
            if batch is None:
                continue
            self.comparison.several += len(part.several)
            indices = batch.indices.tolist()
            rows.extend(indices)
            items.extend(map(source.name, indices))
            where = users_forward(self.spec, self.tap.model, named(source, indices))
            with where, self.runtime.autocast():
                features = self._computed(self.tap, batch.inputs)
            # The accuracy of the model is defined only for labels of its own classes.
            logits = features.logits
            count = None if logits is None else logits.shape[1]
            others = classes is not None and numbers is None and count != len(classes)
            if features.parts is not None:
                yield features
            elif why is None and (fitting or not others):
                labels = batch.labels if numbers is None else numbers[batch.labels]
                yield features.replace(labels=labels.to(self.tap.device))
            else:
                yield features.replace(
                    absent={**features.absent, "labels": why or "its classes are not the model's"}
                )

    @torch.no_grad()
    def _computed(self, tap: FeatureTap, inputs: Inputs) -> Features:
        """Return the features of a batch of preprocessed inputs."""
        if self.engine is not None:
            found = self.engine.features(inputs, tap.contents(), classifier=True)
            if found is not None:
                return found.replace(call=tap.call(inputs))
        features = tap(to_device(inputs, tap.device))
        if self.exports:
            # Only now, because the tap traces the model on the first batch.
            self.exports = False
            self.engine = required_or_none(self.runtime, partial(FeatureEngine, tap, self.kind, self.preprocess))
            if self.engine is not None:
                self.comparison.facts["engine"] = "onnxruntime"
        return features
