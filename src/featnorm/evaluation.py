"""Comparison of detectors, which are fitted, scored and measured in one pass over each set of inputs."""

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from featnorm.detectors import Detector, parse_detector, registered_detectors
from featnorm.features import Features
from featnorm.metrics import Metrics, evaluate

# Inputs of each set whose patterns of active units are kept for the report.
_MAX_PATTERNS = 50


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
        sets = list(self.metrics.values())
        names = Metrics.__dataclass_fields__
        return Metrics(**{name: float(np.mean([getattr(m, name) for m in sets])) for name in names})


@dataclass
class Evaluation:
    """The outcome of a comparison, for a table and a page."""

    id_name: str
    ood_names: list[str]
    results: list[Result] = field(default_factory=list)
    excluded: dict[str, str] = field(default_factory=dict)  # detector -> reason
    accuracy: float | None = None  # share of the labeled ID inputs that the model classifies correctly
    patterns: dict[str, np.ndarray] = field(default_factory=dict)  # set -> (k, d) bool, active units
    skipped: dict[str, list[tuple[str, str]]] = field(default_factory=dict)  # set -> (file, reason)
    facts: dict[str, str] = field(default_factory=dict)  # how the numbers were made


def standard_detectors() -> list[Detector]:
    """Return every detector, with the settings of its source, except those limited to a special kind of model."""
    kinds = registered_detectors().values()
    return [parse_detector(expression) for kind in kinds for expression in kind.standard]


def compare(
    detectors: Sequence[Detector],
    *,
    fit: Iterable[Features] | None,
    id_set: tuple[str, Iterable[Features]],
    ood_sets: Mapping[str, Iterable[Features]],
) -> Evaluation:
    """Fit detectors to one stream of features, then score them all on others.

    Every stream is read once, batch by batch, for all detectors. A detector that cannot score these features, or
    needs a fit while there are no features to fit on, is excluded and listed with the reason. A detector that is
    fitted already stays as it is.

    Parameters
    ----------
    detectors : detectors to compare.
    fit : ID features to fit on. None excludes the detectors that need a fit and are not fitted yet.
    id_set : name and features of the ID test inputs.
    ood_sets : features of the OOD test inputs, by name of the set.

    Raises
    ------
    ValueError
        A set yields no features, or every detector is excluded.
    """
    id_name, id_features = id_set
    result = Evaluation(id_name, list(ood_sets))
    active = {repr(detector): detector for detector in detectors}

    def exclude(name: str, reason: Exception | str) -> None:
        # Errors begin with the detector's name, which is listed already, next to the reason.
        result.excluded[name] = str(reason).removeprefix(name).removeprefix(":").strip()
        del active[name]

    for name, detector in list(active.items()):
        if fit is None and not detector.is_fitted:
            exclude(name, "it needs a fit, and no in-distribution inputs were given to fit on")
    fitted = {name for name, detector in active.items() if detector.needs_fit and detector.is_fitted}
    if fit is not None:
        for features in fit:
            for name, detector in list(active.items()):
                if name in fitted:
                    continue
                try:
                    detector.partial_fit(features)
                except ValueError as error:
                    exclude(name, error)
    scores: dict[str, dict[str, list[np.ndarray]]] = {name: {} for name in active}
    seconds = dict.fromkeys(active, 0.0)
    inputs = 0
    correct = labeled = 0
    for set_name, stream in ((id_name, id_features), *ood_sets.items()):
        seen = 0
        for features in stream:
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
                scores[name].setdefault(set_name, []).append(batch.detach().cpu().numpy())
            if seen < _MAX_PATTERNS and features.activation is not None:
                on = (features.activation[: _MAX_PATTERNS - seen] > 0).cpu().numpy()
                kept = result.patterns.get(set_name)
                result.patterns[set_name] = on if kept is None else np.concatenate([kept, on])
            if set_name == id_name and features.labels is not None and features.logits is not None:
                known = (features.labels >= 0) & (features.labels < features.logits.shape[1])
                correct += int((features.logits.argmax(1) == features.labels)[known].sum())
                labeled += int(known.sum())
            seen += len(features)
            inputs += len(features)
        if seen == 0:
            raise ValueError(f"there is no usable input in {set_name}")
    result.accuracy = correct / labeled if labeled else None
    for name in active:
        joined = {set_name: np.concatenate(parts) for set_name, parts in scores[name].items()}
        ood = {set_name: joined[set_name] for set_name in ood_sets}
        metrics = {set_name: evaluate(joined[id_name], ood[set_name]) for set_name in ood_sets}
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
