"""`export_onnx`: one ONNX graph from preprocessed inputs to verdict."""

import copy
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.errors import first_line
from featnorm._utils.extras import import_extra
from featnorm._utils.files import replacing
from featnorm.engine import SEVERAL_SIZES, TOLERANCE, exported, named_inputs, relative_gap, several_sizes
from featnorm.features import Features
from featnorm.inputs.kinds import IMAGES, TEXTS, Inputs
from featnorm.inputs.rows import Rows
from featnorm.parts import PartCalibration

if TYPE_CHECKING:
    from featnorm.scorer import Scorer

OUTPUTS = ("logits", "score", "p_value", "is_id")
# Rows to export with.
_TRACED = 2
# Absolute tolerance between p-values of the same score.
_P_VALUE_TOLERANCE = 1e-9
# Largest difference between the pixels of an image of one color.
_FLAT = 1e-4
_NO_FREE_SIZE = (
    f"{SEVERAL_SIZES}, and there is no graph for all of them: if the model fits one size only, add a resize or "
    "crop to one size. The error was: "
)


class ExportError(ValueError):
    """A detector cannot be exported to ONNX, or the exported graph does not reproduce its outputs."""


class ScoringGraph(nn.Module):
    """The whole computation of a calibrated `Scorer` as one module.

    Parameters
    ----------
    scorer : calibrated scorer with a preprocess.

    Raises
    ------
    ExportError
        The scorer is not calibrated, its thresholds are by groups that inputs do not show, or its detector runs
        the model again.
    """

    scores: Tensor
    ranks: Tensor
    compared: Tensor
    weight: Tensor | None
    bias: Tensor | None

    def __init__(self, scorer: "Scorer") -> None:
        super().__init__()
        if scorer.detector.needs_model:
            raise ExportError(
                f"{scorer.detector!r} cannot be exported: it runs the model again on modified inputs"
            )
        if scorer.calibration is None:
            raise ExportError("the scorer is not calibrated: without a threshold the graph has no verdict")
        if isinstance(scorer.calibration, PartCalibration):
            raise ExportError(
                "the scorer is calibrated on parts of images or clips, which a graph does not score yet"
            )
        by = scorer.thresholds_by
        if by is not None and by != "class":
            raise ExportError(
                f"the scorer has thresholds by {by!r}, and {scorer.kind.one} does not show its group"
            )
        self.tap = copy.deepcopy(scorer.tap)
        self.model = self.tap.model.eval()
        self.detector = scorer.detector
        self.by_class = bool(scorer.calibration.group_names)
        compared, ranks = scorer.calibration.compared()
        self.register_buffer("scores", scorer.calibration.scores)
        self.register_buffer("compared", compared)
        self.register_buffer("ranks", ranks)
        features = scorer.tap.capture(scorer.reference_inputs(), classifier=True)
        weight, bias = features.classifier or (None, None)
        self.register_buffer("weight", weight)
        self.register_buffer("bias", bias)
        self.outputs = OUTPUTS if features.logits is not None else OUTPUTS[1:]

    def forward(self, inputs: Inputs) -> tuple[Tensor, ...]:
        """Return logits (n, C), scores (n,), p-values (n,) and verdicts (n,) of a batch.

        The logits are left out for a model without a classifier.
        """
        return self.verdicts(self.tap.traced(inputs))

    def score(self, features: Features) -> Tensor:
        """Return the scores (n,) for features that the tap captured."""
        classifier = None if self.weight is None else (self.weight, self.bias)
        return self.detector.score(features.replace(classifier=classifier))

    def verdicts(self, features: Features) -> tuple[Tensor, ...]:
        """Return what `forward` does, for features that the tap captured."""
        score = self.score(features)
        exact = score.double()
        # What `Calibration` computes by searchsorted, which ONNX lacks.
        at_most = self.scores[None] <= exact[:, None]
        group: Any = features.tensor("logits").argmax(1) if self.by_class else 0
        compared = self.compared[group]
        count = (at_most & compared).sum(1)
        verdict = (score, (1 + count).double() / (compared.sum(-1) + 1), count >= self.ranks[group])
        return verdict if features.logits is None else (features.logits, *verdict)


def export_onnx(scorer: "Scorer", path: str | Path) -> float:
    """Write an ONNX graph for any batch size, and compare it with PyTorch under onnxruntime.

    The input ``images`` (n, c, h, w) or ``rows`` (n, D) is float32, as the scorer's preprocess makes it; height
    and width are free if it returns images of different sizes. For texts, the inputs are the tensors (n, L) that
    the preprocess returns, by name; the tokenizer is not in the graph. The outputs are `OUTPUTS`, without the
    logits for a model without a classifier. The metadata hold, as JSON under "featnorm", the detector, the class
    names, the threshold, the share of in-distribution inputs to accept, facts about the scorer, and the size of an
    image or row (null for a free height or width); for images, also the mean and deviation by which the preprocess
    normalizes channels, if it does, and for tables the columns with what encodes them.

    Parameters
    ----------
    scorer : calibrated scorer with a preprocess, on the CPU.
    path : file to write.

    Returns
    -------
    float
        Largest difference between a score and PyTorch's, relative to the largest score.

    Raises
    ------
    ExportError
        The scorer cannot be exported, or the graph does not reproduce PyTorch: logits or scores differ by more
        than 1e-4 of their largest value or are NaN, or a p-value or a verdict is not that of the score. If the
        preprocess returns images of different sizes, the graph must reproduce PyTorch at each of several sizes.
    ValueError
        The scorer has no preprocess.
    ImportError
        ``featnorm[onnx]`` is not installed.
    OSError
        The folder does not exist, or the file cannot be written. An earlier file of that name is kept.
    """
    onnx, onnxruntime, _ = map(import_extra, ("onnx", "onnxruntime", "onnxscript"))
    graph = ScoringGraph(scorer).eval()
    generator = torch.Generator().manual_seed(0)
    shapes = _shapes(scorer)
    any_size = len(shapes) > 1
    inputs: Any = _example(scorer, _TRACED, generator, shapes[0])
    with torch.no_grad():
        graph(inputs)  # what a detector derives once per fit is not part of the graph
        try:
            model = exported(graph, inputs, scorer.kind, graph.outputs, any_size=any_size)
        # The exporter wraps every error, in messages of many lines.
        except Exception as error:
            reason = first_line(error.__cause__ or error)
            if any_size:
                raise ExportError(_NO_FREE_SIZE + reason) from error
            what = f"{scorer.detector!r} on {scorer.spec or type(scorer.model).__name__}"
            raise ExportError(f"{what} cannot be exported: {reason}") from error
    onnx.helper.set_model_props(model, {"featnorm": json.dumps(_metadata(scorer))})
    with replacing(path) as temporary:
        onnx.save(model, temporary)
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4  # what fails is raised
        session = onnxruntime.InferenceSession(str(temporary), options, providers=["CPUExecutionProvider"])
        difference = 0.0
        for n, shape in [(1, shapes[0]), *((5, shape) for shape in shapes[1:] or shapes)]:
            inputs = _example(scorer, n, generator, shape)
            given = named_inputs(inputs, scorer.kind.name)
            try:
                found = session.run(None, {name: value.numpy() for name, value in given.items()})
                outputs = dict(zip(graph.outputs, map(torch.from_numpy, found), strict=True))
                difference = max(difference, _check(outputs, scorer, inputs))
            except Exception as error:  # onnxruntime's own classes, a graph's wrong outputs, the model's errors
                if any_size:
                    raise ExportError(_NO_FREE_SIZE + first_line(error.__cause__ or error)) from error
                raise
    return difference


def input_size(scorer: "Scorer") -> tuple[int | None, ...]:
    """Return the shape of a preprocessed image or row, with None for height and width if images differ in them."""
    first, *others = _shapes(scorer)
    return (first[0], None, None) if others else first


def _shapes(scorer: "Scorer") -> list[tuple[int, ...]]:
    """Return the shapes of preprocessed images or rows: the reference's, and others' if images differ in size."""
    if scorer.kind is TEXTS:
        return [()]
    preprocess = scorer.require_preprocess()
    items = [*scorer.kind.probes(preprocess)]
    if scorer.kind is IMAGES:  # also square, wide and tall images: a pool may fit some aspect ratios only
        items += [items[0].crop((0, 0, *size)) for size in ((240, 240), (320, 180), (320, 120))]
        items += [item.transpose(Image.Transpose.TRANSPOSE) for item in items]
    prepared = [preprocess(item) for item in items]
    others = [tuple(one.shape) for one in prepared] if several_sizes(prepared) else []
    return list(dict.fromkeys([scorer.input_size, *others]))


def _metadata(scorer: "Scorer") -> dict[str, Any]:
    calibration = scorer.calibration
    assert calibration is not None
    return {
        **scorer.facts,
        "detector": repr(scorer.detector),
        "classes": scorer.classes,
        "threshold": calibration.threshold.tolist(),
        "thresholds by": scorer.thresholds_by,
        "tpr": calibration.tpr,
        "inputs": scorer.kind.name,
        **_preprocessing(scorer),
    }


def _example(scorer: "Scorer", n: int, generator: torch.Generator, shape: tuple[int, ...]) -> Inputs:
    """Return a batch of n different inputs: images or rows of noise, or parts of the fixed texts."""
    if scorer.kind is not TEXTS:
        return torch.randn(n, *shape, generator=generator, dtype=torch.float32)
    preprocess = scorer.require_preprocess()
    texts = [text[: len(text) // (1 + i // 2)] for i in range(n) for text in scorer.kind.probes()][:n]
    return scorer.kind.collate(list(map(preprocess, texts)), preprocess)


def _preprocessing(scorer: "Scorer") -> dict[str, Any]:
    """Return what is known of the preprocess of images and rows."""
    if scorer.kind is TEXTS:
        return {}
    preprocess = scorer.require_preprocess()
    about: dict[str, Any] = {"input size": input_size(scorer)}
    if scorer.kind is IMAGES:
        return about | _normalization(preprocess)
    if not isinstance(preprocess, Rows):
        return about
    settings, fitted = preprocess.state()
    return about | {"rows": settings | {name: value.tolist() for name, value in fitted.items()}}


def _normalization(preprocess: Callable[[Image.Image], Tensor]) -> dict[str, list[float]]:
    """Return mean and deviation per channel by which images are normalized, from those of black and of white."""
    black, white = (preprocess(Image.new("RGB", (256, 256), color)).flatten(1) for color in ("black", "white"))
    if any(bool((image - image[:, :1]).abs().max() > _FLAT) for image in (black, white)):
        return {}
    deviation = 1 / (white - black)[:, 0].double()
    if not bool((deviation.isfinite() & (deviation > 0)).all()):
        return {}
    return {"mean": (-black[:, 0] * deviation).tolist(), "deviation": deviation.tolist()}


def _check(found: dict[str, Tensor], scorer: "Scorer", inputs: Inputs) -> float:
    """Compare the outputs of the graph with PyTorch's, and return the largest relative difference of scores."""
    expected = scorer(inputs)
    for name in found:
        value = getattr(expected, name)
        assert value is not None  # the scorer is calibrated
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, but PyTorch's has {tuple(value.shape)}"
            raise ExportError(f"the graph's {name} has shape {shapes}")
    assert scorer.calibration is not None
    gaps = {
        name: relative_gap(found[name], getattr(expected, name)) for name in ("logits", "score") if name in found
    }
    for name, gap in gaps.items():
        if not gap <= TOLERANCE:
            how = "is NaN" if math.isnan(gap) else f"differs from PyTorch's by {gap:.1e} of its largest value"
            raise ExportError(f"the graph's {name} {how}")
    # Those of the graph's own scores: a score within rounding of a calibration score may fall on either side of
    # it.
    groups = found["logits"].argmax(1) if scorer.calibration.group_names else None
    p_value, is_id = scorer.calibration.predict(found["score"], groups)
    gap = float((found["p_value"] - p_value).abs().max())
    if not gap <= _P_VALUE_TOLERANCE:
        raise ExportError(f"the graph's p_value differs from that of its score by {gap:.1e}")
    if wrong := int((found["is_id"] != is_id).sum()):
        raise ExportError(
            f"the graph's is_id is not that of its score for {wrong} of {len(is_id)} {scorer.kind.name}"
        )
    return gaps["score"]
