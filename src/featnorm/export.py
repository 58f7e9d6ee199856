"""One ONNX graph from image tensor to verdict: `export_onnx`."""

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
# Rows to trace with: a size of 0 or 1 would be taken for a constant.
_TRACED = 2
# How far onnxruntime's logits and scores may be from PyTorch's, as a share of their size.
_TOLERANCE = 1e-4
# And p-values that are computed of the same score.
_P_VALUE_TOLERANCE = 1e-9


class ExportError(ValueError):
    """A detector that no ONNX graph can hold, or a graph that does not score as the detector does."""


class ScoringGraph(nn.Module):
    """All that a calibrated `ImageScorer` computes, as one plain computation without a tap.

    Parameters
    ----------
    scorer : a calibrated image scorer.

    Raises
    ------
    ExportError
        It is not calibrated, or its detector asks the model again.
    """

    scores: Tensor
    threshold: Tensor
    weight: Tensor
    bias: Tensor | None

    def __init__(self, scorer: ImageScorer) -> None:
        super().__init__()
        inner = scorer.scorer
        if inner.detector.needs_model:
            raise ExportError(
                f"{inner.detector!r} cannot be exported: it asks the model again about changed inputs"
            )
        if inner.calibration is None:
            raise ExportError("the scorer is not calibrated: a graph without a threshold gives no verdict")
        model: Any = inner.model
        self.backbone: nn.Module = model[0]
        self.head: ProjectionHead = model[1]
        self.detector = inner.detector
        self.register_buffer("scores", inner.calibration.scores)
        self.register_buffer("threshold", inner.calibration.threshold)
        example = torch.zeros(1, *scorer.input_size, device=inner.tap.device, dtype=torch.float32)
        classifier = inner.tap.capture(example, classifier=True).classifier
        assert classifier is not None  # a head's logits are a linear map of its activation, but for their length
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
        # As `Calibration` has it, without its search, which ONNX has no operation for.
        at_most = (self.scores[None] <= exact[:, None]).sum(1)
        p_value = (1 + at_most).double() / (len(self.scores) + 1)
        return logits, score, p_value, exact >= self.threshold


def export_onnx(scorer: ImageScorer, path: str | Path) -> float:
    """Write an ONNX graph, any batch size, and check it against PyTorch under onnxruntime.

    Its input ``images`` is (n, c, h, w) float32, as the scorer's transform makes it; its outputs are `OUTPUTS`.
    The names of the classes and what else is known of the detector are in its metadata.

    Parameters
    ----------
    scorer : a calibrated image scorer, on the CPU.
    path : the file.

    Returns
    -------
    The largest difference of a score from PyTorch's, as a share of the scores' size.

    Raises
    ------
    ExportError
        The detector cannot be exported, or an output of the graph is not PyTorch's: logits or scores differ by
        more than 1e-4 of their size or are NaN, or a p-value or a verdict is not that of the score.
    ImportError
        ``featnorm[onnx]`` is not installed.
    OSError
        There is no such folder, or the file cannot be written; an earlier one of that name stays.
    """
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise ImportError(f"{error.name} is needed here: pip install '.[onnx]' in a checkout") from None
    graph = ScoringGraph(scorer).eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(_TRACED, *scorer.input_size, generator=generator, dtype=torch.float32)
    with torch.no_grad():
        graph(images)  # what a detector works out once a fit is no part of the graph
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
        # The exporter wraps whatever fails on its way, and writes pages.
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
    """Compare what the graph says of images to what PyTorch does, and return how far scores are apart."""
    wanted = scorer(images)
    for name, value in zip(OUTPUTS, (wanted.logits, wanted.score, wanted.p_value, wanted.is_id), strict=True):
        assert value is not None  # a head has logits, and the scorer is calibrated
        if found[name].shape != value.shape:
            shapes = f"{tuple(found[name].shape)}, and PyTorch's {tuple(value.shape)}"
            raise ExportError(f"the graph's {name} is of shape {shapes}")
    assert wanted.logits is not None
    assert scorer.calibration is not None
    gaps = {
        "logits": _relative_gap(found["logits"], wanted.logits),
        "score": _relative_gap(found["score"], wanted.score),
    }
    for name, gap in gaps.items():
        if not gap <= _TOLERANCE:
            how = "is NaN" if math.isnan(gap) else f"differs from PyTorch's by {gap:.1e} of its size"
            raise ExportError(f"the graph's {name} {how}")
    # Of the graph's own scores, as one within rounding of a calibration score may fall on its other side.
    p_value, is_id = scorer.calibration.judge(found["score"])
    gap = float((found["p_value"] - p_value).abs().max())
    if not gap <= _P_VALUE_TOLERANCE:
        raise ExportError(f"the graph's p_value differs from that of its score by {gap:.1e}")
    if others := int((found["is_id"] != is_id).sum()):
        raise ExportError(f"the graph's is_id is not that of its score for {others} of {len(is_id)} images")
    return gaps["score"]


def _relative_gap(found: Tensor, wanted: Tensor) -> float:
    """Return the largest difference as a share of the largest finite value; NaN where there is one."""
    found, wanted = found.double(), wanted.double()
    # An infinite score, of an input without any unit on, differs from itself by NaN.
    gaps = torch.where(found == wanted, 0.0, (found - wanted).abs())
    size = wanted[wanted.isfinite()].abs().max() if bool(wanted.isfinite().any()) else torch.ones(())
    return float(gaps.max() / size.clamp(min=1e-12))
