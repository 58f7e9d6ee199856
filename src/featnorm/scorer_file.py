"""The file of a `Scorer`: opening it, describing it, and replacing its calibration."""

import copy
import warnings
from collections.abc import Callable, Mapping
from datetime import date
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor, nn

from featnorm import archive
from featnorm._utils.checks import check_text
from featnorm._utils.errors import UserCodeError, error_text, first_line
from featnorm._utils.layout import fast_layout
from featnorm._utils.weights import load_weights
from featnorm.calibration import Calibration
from featnorm.detectors import parse_detector
from featnorm.detectors.expression import UnknownDetectorError
from featnorm.hidden.examples import Examples
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.inputs import kind_of
from featnorm.inputs.rows import rows_of
from featnorm.models import LoadedModel, ModelError, ProjectionHead, create_model
from featnorm.models.heads import head_of, with_head
from featnorm.models.loading import ROWS as ROWS_SPEC
from featnorm.models.loading import backbone_of, is_folder, is_users, recreate_model, rows_model
from featnorm.parts import PartCalibration
from featnorm.scorer import CALIBRATION, DETECTOR, EXAMPLES, MODEL, ROWS, STATISTICS, HeadKind, Scorer
from featnorm.tap import FeatureTap
from featnorm.tap.batch import BatchError

# What the tap captures and an explanation of the units needs.
_EXPLAINED = ("activation", "logits", "classifier")
# Share of the largest value; versions of libraries resize a little differently.
_TOLERANCE = 0.05


def load(
    path: str | Path,
    model: nn.Module | str | None = None,
    *,
    weights: str | Path | None = None,
    preprocess: Callable[[Any], Any] | None = None,
) -> Scorer:
    """Read a scorer that `Scorer.save` wrote. No code in the file is run, and no module it names is imported.

    Parameters
    ----------
    path : file.
    model
        The model, or the specification that makes it. Required if the file does not contain the model, or if the
        model is the user's own. If the file contains weights, these count, and the model gets them; a module whose
        weights differ is copied first.
    weights : weights file of the specification ``model``, for a file that contains no weights.
    preprocess : see `Scorer`. Default: that of the specification; none if ``model`` is a module.

    Warns
    -----
    UserWarning
        The file contains weights, and the specification ``model`` makes others.

    Raises
    ------
    FileNotFoundError
        The file does not exist.
    ArchiveError
        The file is damaged, has another format, was made for another model, or does not fit the installed
        libraries.
    ModelError
        The model is missing, or its specification does not work.

    Examples
    --------
    >>> Scorer(model, NAN()).calibrate(held_out_loader).save("detector.featnorm")
    >>> scorer = load("detector.featnorm", model)
    """
    tensors, header = archive.read(path)
    stored = _with_prefix(MODEL, tensors)
    passed = preprocess is not None
    try:
        about = header["scorer"]
        spec, head_kind, classes, facts = (about[name] for name in ("spec", "head", "classes", "facts"))
        kind = kind_of(check_text(about["kind"]))
        by = None if about["thresholds by"] is None else check_text(about["thresholds by"])
        if head_kind not in get_args(HeadKind):
            raise ValueError(f"its head is {head_kind!r}")
        spec = None if spec is None else check_text(spec)
        facts = {check_text(name): check_text(fact) for name, fact in facts.items()}
        classes = None if classes is None else [check_text(name) for name in classes]
        trained = head_kind == "train" and bool(stored)
        head = head_of(about["head settings"], _with_prefix("1.", stored)) if trained else None
        statistics = _statistics(tensors)
        examples = _examples(tensors, about["example classes"])
        rows = None if about["rows"] is None else rows_of(about["rows"], _with_prefix(ROWS, tensors))
        lowest = float(about["lowest"])
        _check_names(tensors)
    except archive.MALFORMED as error:
        raise archive.damaged(path, error) from None
    if isinstance(model, nn.Module):
        network = _given(model, stored, header, path)
        preprocess, given = preprocess or rows, f"the {type(model).__name__} passed here"
    else:
        if spec == ROWS_SPEC and rows is not None and model is None:
            loaded = rows_model(rows)
        else:
            loaded = _created(path, spec, model, weights, stored)
        if loaded.kind is not kind:
            raise archive.ArchiveError(f"{path} takes {kind.name}, and {loaded.name} takes {loaded.kind.name}")
        network = _network(loaded, head_kind, head, path)
        preprocess, given = preprocess or loaded.transform, loaded.name
        if stored:
            differ = model is not None and _differ(network, stored, head_kind)
            _fill(network, stored, path, loaded.name)
            if differ:
                warnings.warn(
                    f"{path} contains other weights than the model that {loaded.name} makes: those in the file "
                    "are used",
                    stacklevel=2,
                )
        spec = spec or loaded.name
    try:
        detector = parse_detector(header["detector"])
        detector.load_state_dict(_with_prefix(DETECTOR, tensors))
        detector.validate()
        options: dict[str, Any] = {"spec": spec, "head": head_kind, "facts": facts, "thresholds_by": by}
        options |= {"statistics": statistics, "examples": examples, "kind": kind.name}
        options |= {"per": header["tap"]["per"], "lowest": lowest}
        scorer = Scorer(network, detector, preprocess=preprocess, classes=classes, **options)
        archive.check_fingerprint(scorer.tap.model, header["model"], path)
        scorer.tap = FeatureTap.from_dict(network, header["tap"])
        scorer.keep_weights(header["model"]["sha256"])
        explained = (*(() if statistics is None else _EXPLAINED), *(() if examples is None else ("pooled",)))
        scorer.tap.require((*detector.reads, *explained))
        calibration = archive.calibration(tensors, header, path)
        if calibration is not None:
            scorer.calibration = calibration.to(scorer.tap.device)
    except archive.ArchiveError:
        raise
    except UnknownDetectorError as error:
        raise archive.ArchiveError(
            f"{path} needs the detector class {error.name}, which is not defined here: import the module that "
            "defines it, then load the file again"
        ) from None
    except archive.MALFORMED as error:
        raise archive.damaged(path, error) from None
    if preprocess is not None:
        origin = "passed here" if passed else f"of {given}"
        _check_outputs(scorer, tensors, about.get("input size"), path, origin, given)
    return scorer


def summarize(path: str | Path) -> dict[str, Any]:
    """Return what a file that `Scorer.save` wrote holds, as plain data. The model is not needed.

    Raises
    ------
    FileNotFoundError, ArchiveError
        See `load`.
    """
    tensors, header = archive.read(path)
    calibration = archive.calibration(tensors, header, path)
    stored, statistics = _with_prefix(MODEL, tensors), _with_prefix(STATISTICS, tensors)
    try:
        about, tap, model = header["scorer"], header["tap"], header["model"]
        items = check_text(about["kind"])
        summary: dict[str, Any] = {
            "file": str(path),
            "bytes": Path(path).stat().st_size,
            "written": f"{header['written']['date']}, with featnorm {header['written']['featnorm']}",
            "detector": header["detector"],
            "model": {
                "specification": about["spec"],
                "class": model["class"],
                "weights in the file": bool(stored),
                "values": model["values"],
                "fingerprint": model["sha256"],
                "head": about["head"],
            },
            "features": {
                "activation" if i == 0 else line.partition(":")[0]: line if i == 0 else line.partition(": ")[2]
                for i, line in enumerate([tap["plan"]["verdict"], *map(": ".join, tap["plan"]["words"].items())])
            },
            "inputs": items,
            "preprocess": "known" if "preprocessed" in tensors else "not known: it takes tensors",
            **({} if about["rows"] is None else {"rows": _columns(about["rows"])}),
            "classes": about["classes"],
            "explanations": {
                "activation statistics": bool(statistics),
                f"example {items}": len(tensors.get(f"{EXAMPLES}labels", ())),
                "thumbnails of them": f"{EXAMPLES}thumbnails" in tensors,
            },
            "calibration": None
            if calibration is None
            else {
                **_counts(calibration, items),
                f"share of in-distribution {items} to accept": calibration.tpr,
                "thresholds by": about["thresholds by"],
                **_thresholds(calibration, items),
            },
            "facts": about["facts"],
            "tensors": {name: f"{tuple(t.shape)} {t.dtype}".replace("torch.", "") for name, t in tensors.items()},
        }
    except archive.MALFORMED as error:
        raise archive.damaged(path, error) from None
    return summary


def _columns(rows: Mapping[str, Any]) -> dict[str, Any]:
    """Return the columns of a `featnorm.inputs.Rows` by its settings."""
    if "vector" in rows:
        return {"vectors": f"{rows['vector']} numbers"}
    return {"numbers": rows["numbers"], "categories": [*rows["categories"]], "left out": rows["left out"]}


def _counts(calibration: Calibration | PartCalibration, items: str) -> dict[str, Any]:
    if isinstance(calibration, Calibration):
        return {items: len(calibration.scores)}
    return {"units": len(calibration.unit_scores), "parts kept": len(calibration.scores)}


def _thresholds(calibration: Calibration | PartCalibration, items: str) -> dict[str, Any]:
    if isinstance(calibration, PartCalibration):
        return {
            "threshold": float(calibration.threshold),
            "threshold of units": float(calibration.units.threshold),
        }
    if not calibration.group_names:
        return {"threshold": float(calibration.threshold)}
    sizes = calibration.group_sizes()
    return {
        f"threshold of {name}": f"{value:.6g}, from {sizes[name]} {items}"
        + ("" if len(calibration.pool(name)) == 1 else " and those of other small groups")
        for name, value in zip(calibration.group_names, calibration.threshold.tolist(), strict=True)
    }


def replace_calibration(
    path: str | Path,
    out: str | Path,
    calibration: Calibration | PartCalibration,
    *,
    source: str | None = None,
    added: bool = False,
    facts: Mapping[str, str] | None = None,
) -> None:
    """Write a scorer's file again with another calibration. The model is not needed.

    Parameters
    ----------
    path : file that `Scorer.save` wrote.
    out : file to write, which may be the same.
    calibration : the calibration.
    source : name of the data that the calibration scores are from. Default: those of the file.
    added : whether they were added to those of the file.

    Raises
    ------
    FileNotFoundError, ArchiveError
        See `load`.
    OSError
        The file cannot be written.
    """
    tensors, header = archive.read(path)
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith(CALIBRATION)}
    made = {f"{CALIBRATION}{name}": value for name, value in calibration.fitted_tensors().items()}
    about = header["scorer"]
    if source is not None:
        items = about["kind"]
        earlier = f"{about['facts'].get('calibration', f'held-out {items}')}, then " if added else ""
        counts = [f"{count} {name}" for name, count in _counts(calibration, items).items()]
        fact = f"{earlier}{source}, {date.today().isoformat()}: {', '.join(counts)}"
        about["facts"] = {**about["facts"], **(facts or {}), "calibration": fact}
    archive.write(out, {**kept, **made}, {**header, "lowest": None, **calibration.to_dict()})


def _given(
    model: nn.Module, stored: Mapping[str, Tensor], header: Mapping[str, Any], path: str | Path
) -> nn.Module:
    """Return the model that the caller passed, with the weights in the file if there are any."""
    inner = FeatureTap(model).model
    if not stored or archive.fingerprint(inner)["sha256"] == header["model"].get("sha256"):
        return model
    network = copy.deepcopy(inner)
    _fill(network, stored, path, type(inner).__name__)
    return network


def _differ(network: nn.Module, stored: Mapping[str, Tensor], kind: HeadKind) -> bool:
    """Return whether a model's own weights, without those of a trained head, are not those in the file."""
    pairs = [
        (value, stored.get(name))
        for name, value in network.state_dict().items()
        if kind != "train" or name[0] == "0"
    ]
    # The extra state of a module need not be a tensor.
    return any(
        b is not None and not (isinstance(a, Tensor) and a.dtype == b.dtype and torch.equal(a.cpu(), b))
        for a, b in pairs
    )


def _fill(network: nn.Module, stored: Mapping[str, Tensor], path: str | Path, name: str) -> None:
    try:
        load_weights(network, stored)
    except RuntimeError as error:
        # The extra state of a module need not be a tensor.
        both = stored, {key: value for key, value in network.state_dict().items() if isinstance(value, Tensor)}
        a, b = ({key: tuple(value.shape) for key, value in state.items()} for state in both)
        why = error_text(error).rstrip(".")
        if (first := next((key for key in (*a, *b) if a.get(key) != b.get(key)), None)) is not None:
            theirs, ours = (f"of shape {state[first]}" if first in state else "missing" for state in (a, b))
            why = f"{first} is {theirs} in the file and {ours} in the model"
        raise archive.ArchiveError(
            f"{path} does not fit {name}: {why}; pass the model that the detector was fitted on"
        ) from None


def _created(
    path: str | Path,
    spec: str | None,
    model: str | None,
    weights: str | Path | None,
    stored: Mapping[str, Tensor],
) -> LoadedModel:
    """Return the model of a specification; imports only what the caller has named."""
    if stored and weights is not None:
        raise ModelError(f"{path} contains the weights of its model: omit {weights}")
    if model is not None:
        moved = spec is not None and is_folder(spec) and is_folder(model)
        if stored and spec is not None and not is_users(spec) and not moved:
            raise ModelError(f"{path} was fitted on {spec}, not on your own model: omit the model")
        return create_model(model, weights=weights)
    if not stored:
        raise ModelError(
            f"{path} does not contain its model: pass the model, or a specification of it and its weights "
            "(--model, --weights)"
        )
    if spec is None or is_users(spec):
        own = "your own model" if spec is None else f"your own model {spec}"
        raise ModelError(
            f"{path} was fitted on {own}, and opening a file imports nothing: pass it again (--model)"
        )
    try:
        return recreate_model(spec, stored)
    except ModelError as error:
        raise archive.ArchiveError(f"{path} does not fit what is installed here: {error}") from None


def _network(loaded: LoadedModel, kind: HeadKind, head: ProjectionHead | None, path: str | Path) -> nn.Module:
    """Return the scorer's model, made from the specification's."""
    if kind == "keep":
        return fast_layout(loaded.model.eval())
    backbone = backbone_of(loaded)[0]
    if kind == "none":
        return fast_layout(backbone.eval())
    if head is None:
        raise ModelError(f"{path} contains no weights, and its head was trained by featnorm: save it with weights")
    return fast_layout(with_head(backbone, head, loaded.kind).eval())


def _check_outputs(
    scorer: Scorer, tensors: Mapping[str, Tensor], size: Any, path: str | Path, origin: str, model: str
) -> None:
    """Check that preprocess and model give what they gave when the file was written, and that verdicts work.

    Parameters
    ----------
    size : shape of the preprocessed image when the file was written; None for other kinds of inputs.
    origin, model : where the preprocess is from, and what the model is called, in errors.
    """
    if ("preprocessed" in tensors) != ("response" in tensors):
        raise archive.damaged(path, ValueError("it has only one of preprocessed and response"))
    try:
        outputs = scorer.reference_outputs()
        known = None if scorer.calibration is None else scorer.calibration.group_names[:1] or None
        groups = None if scorer.thresholds_by == "class" else known
        scorer.predict_batch(
            scorer.reference_inputs(), [""], groups=groups, explain=[0] if scorer.explains else ()
        )
    except UserCodeError:
        raise
    except BatchError as error:
        raise archive.ArchiveError(f"the preprocess {origin} does not fit {path}: {error}") from None
    except archive.MALFORMED as error:
        raise archive.ArchiveError(
            f"{path} is damaged: it cannot score {scorer.kind.one} ({first_line(error)})"
        ) from None
    for what, new in zip(("preprocessed", "response"), outputs, strict=True):
        old = tensors[what].float() if what in tensors else new
        # Not "differ", which a NaN would pass.
        alike = new.shape == old.shape and bool(
            (new - old).abs().max() <= _TOLERANCE * old.abs().max().clamp(min=1e-6)
        )
        if alike:
            continue
        # The fingerprint of an image hardly depends on its size, and the weights are those of the file.
        found = None if size is None else list(scorer.input_size)
        if what == "preprocessed" or found != size:
            sizes = "" if found == size else f", which makes images of {_size(found)} instead of {_size(size)}"
            raise archive.ArchiveError(
                f"{path} was made with another preprocess than that {origin}{sizes}: use the same, or fit again"
            )
        raise archive.ArchiveError(
            f"{path} was made with another model or preprocess than {model}: the weights are the same, but a "
            f"fixed {scorer.kind.noun} gives other features; use the same code, or fit again"
        )


def _size(shape: Any) -> str:
    return " x ".join(map(str, shape))


def _statistics(tensors: Mapping[str, Tensor]) -> ActivationStatistics | None:
    """Return the activation statistics in a file, if any; a RuntimeError or ValueError if they are damaged."""
    state = _with_prefix(STATISTICS, tensors)
    if not state:
        return None
    statistics = ActivationStatistics()
    statistics.load_state_dict(state)
    statistics.validate()
    return statistics


def _examples(tensors: Mapping[str, Tensor], classes: Any) -> Examples | None:
    """Return the examples in a file, if any; a LookupError, TypeError or ValueError if they are damaged."""
    state = _with_prefix(EXAMPLES, tensors)
    if not state and classes is None:
        return None
    if not isinstance(classes, list):
        raise ValueError("its example classes are not a list")
    return Examples.from_tensors(state, classes)


def _check_names(tensors: Mapping[str, Tensor]) -> None:
    known = (MODEL, DETECTOR, STATISTICS, EXAMPLES, ROWS)
    others = {archive.CALIBRATION, archive.MEMBERS, archive.OWNERS, archive.UNIT_SCORES}
    others |= {"preprocessed", "response"}
    if unknown := [name for name in tensors if not name.startswith(known) and name not in others]:
        raise ValueError(f"it has an unknown tensor {unknown[0]!r}")


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}
