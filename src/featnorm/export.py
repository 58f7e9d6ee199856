"""`export_onnx`: one ONNX graph from image tensor to verdict."""

import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.errors import first_line
from featnorm._utils.files import replacing
from featnorm.features import Features
from featnorm.image_scorer import ImageScorer
from featnorm.models import ProjectionHead
from featnorm.scorer import Scorer

OUTPUTS = ("logits", "score", "p_value", "is_id")
# Rows to export with: a size of 0 or 1 would become a constant of the graph.
_TRACED = 2
# Relative tolerance between the logits and scores of onnxruntime and PyTorch.
_TOLERANCE = 1e-4
# Absolute tolerance between p-values of the same score.
_P_VALUE_TOLERANCE = 1e-9


class ExportError(ValueError):
    """A detector cannot be exported to ONNX, or the exported graph does not reproduce its outputs."""


class ScoringGraph(nn.Module):
    """The whole computation of a calibrated `ImageScorer` as one module, without a tap.

    Parameters
    ----------
    scorer : calibrated image scorer.

    Raises
    ------
    ExportError
        The scorer is not calibrated, or its detector runs the model again.
    """

    scores: Tensor
    threshold: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, scorer: ImageScorer) -> None:
        super().__init__()
        inner = scorer.scorer
        if inner.detector.needs_model:
            raise ExportError(f"{inner.detector!r} cannot be exported: it runs the model again on modified inputs")
        if inner.calibration is None:
            raise ExportError("the scorer is not calibrated: without a threshold the graph has no verdict")
        model: Any = inner.model
        self.backbone: nn.Module = model[0]
        self.head: ProjectionHead = model[1]
        self.detector = inner.detector
        self.register_buffer("scores", inner.calibration.scores)
        self.register_buffer("threshold", inner.calibration.threshold)
        example = torch.zeros(1, *scorer.input_size, device=inner.tap.device, dtype=torch.float32)
        classifier = inner.tap.capture(example, classifier=True).classifier
        assert classifier is not None  # a head's logits are a linear map of its activation, up to their norm
        self.register_buffer("weight", classifier[0])
        self.register_buffer("bias", classifier[1])

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return logits (n, C), scores (n,), p-values (n,) and verdicts (n,) of images (n, c, h, w)."""
        pooled = self.backbone(images)
        activation = self.head.activation(self.head.hidden(pooled))
        embedding = self.head.embedding(activation)
        logits = self.head.classifier(embedding)
        features = Features(
            activation=activation,
            pooled=pooled,
            embedding=embedding,
            logits=logits,
            classifier=(self.weight, self.bias),
        )
        score = self.detector.score(features)
        exact = score.double()
        # What `Calibration` computes by searchsorted, which ONNX lacks.
        at_most = (self.scores[None] <= exact[:, None]).sum(1)
        p_value = (1 + at_most).double() / (len(self.scores) + 1)
        return logits, score, p_value, exact >= self.threshold


def export_onnx(scorer: ImageScorer, path: str | Path) -> float:
    """Write an ONNX graph for any batch size, and compare it with PyTorch under onnxruntime.

    The input ``images`` is (n, c, h, w) float32, as the scorer's transform makes it; the outputs are `OUTPUTS`.
    The metadata hold the class names and facts about the detector.

    Parameters
    ----------
    scorer : calibrated image scorer, on the CPU.
    path : file to write.

    Returns
    -------
    float
        Largest difference between a score and PyTorch's, relative to the largest score.

    Raises
    ------
    ExportError
        The detector cannot be exported, or the graph does not reproduce PyTorch: logits or scores differ by more
        than 1e-4 of their largest value or are NaN, or a p-value or a verdict is not that of the score.
    ImportError
        ``featnorm[onnx]`` is not installed.
    OSError
        The folder does not exist, or the file cannot be written. An earlier file of that name is kept.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"the export needs {error.name}: pip install '.[onnx]' in a checkout") from None
    graph = ScoringGraph(scorer).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_TRACED, *scorer.input_size, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        graph(images)  # what a detector derives once per fit is not part of the graph
        try:
            program = torch.onnx.export(
                graph,
                (images,),
                dynamo=True,
                input_names=["images"],
                output_names=list(OUTPUTS),
                dynamic_shapes=({0: torch.export.Dim("n", min=1)},),
                verbose=False,
            )
        # The exporter wraps every error, in messages of many lines.
        except Exception as error:
            what = f"{scorer.scorer.detector!r} on {scorer.backbone}"
            raise ExportError(f"{what} cannot be exported: {first_line(error.__cause__ or error)}") from error
    assert program is not None
    model = program.model_proto
    facts = {"detector": repr(scorer.scorer.detector), "classes": scorer.class_names, **scorer.facts}
    onnx.helper.set_model_props(model, {"featnorm": json.dumps(facts)})
    with replacing(path) as temporary:
        onnx.save(model, temporary)
        session = onnxruntime.InferenceSession(str(temporary), providers=["CPUExecutionProvider"])
        difference = 0.0
        for n in (1, 5):
            images = torch.randn(n, *scorer.input_size, generator=generator, dtype=torch.float32)
            outputs = [torch.from_numpy(value) for value in session.run(None, {"images": images.numpy()})]
            difference = max(difference, _check(dict(zip(OUTPUTS, outputs, strict=True)), scorer.scorer, images))
    return difference


def _check(found: dict[str, Tensor], scorer: Scorer, images: Tensor) -> float:
    """Compare the outputs of the graph with PyTorch's, and return the largest relative difference of scores."""
    expected = scorer(images)
    values = expected.logits, expected.score, expected.p_value, expected.is_id
    for name, value in zip(OUTPUTS, values, strict=True):
        assert value is not None  # a head has logits, and the scorer is calibrated
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, but PyTorch's has {tuple(value.shape)}"
            raise ExportError(f"the graph's {name} has shape {shapes}")
    assert expected.logits is not None
    assert scorer.calibration is not None
    gaps = {
        "logits": _relative_gap(found["logits"], expected.logits),
        "score": _relative_gap(found["score"], expected.score),
    }
    for name, gap in gaps.items():
        if not gap <= _TOLERANCE:
            how = "is NaN" if math.isnan(gap) else f"differs from PyTorch's by {gap:.1e} of its largest value"
            raise ExportError(f"the graph's {name} {how}")
    # Those of the graph's own scores: a score within rounding of a calibration score may fall on either side of
    # it.
    p_value, is_id = scorer.calibration.predict(found["score"])
    gap = float((found["p_value"] - p_value).abs().max())
    if not gap <= _P_VALUE_TOLERANCE:
        raise ExportError(f"the graph's p_value differs from that of its score by {gap:.1e}")
    if wrong := int((found["is_id"] != is_id).sum()):
        raise ExportError(f"the graph's is_id is not that of its score for {wrong} of {len(is_id)} images")
    return gaps["score"]


def _relative_gap(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the largest finite value; NaN if there is a NaN."""
    found, expected = found.double(), expected.double()
    # The difference of an infinite score, of an input without active units, from itself would be NaN.
    gaps = torch.where(found == expected, 0.0, (found - expected).abs())
    finite = expected[expected.isfinite()]
    largest = finite.abs().max() if len(finite) else torch.ones(())
    return float(gaps.max() / largest.clamp(min=1e-12))
