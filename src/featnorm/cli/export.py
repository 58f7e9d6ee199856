"""``featnorm export``: a fitted detector as one ONNX graph."""

from pathlib import Path
from typing import Any

from featnorm.cli.console import console, require_file_place
from featnorm.cli.options import OutFile, OwnModel, OwnWeights, ScorerFile, Tpr


def export(
    scorer_file: ScorerFile,
    out: OutFile = Path("detector.onnx"),
    model: OwnModel = None,
    weights: OwnWeights = None,
    tpr: Tpr = None,
) -> None:
    """Export the detector as one ONNX graph (input tensors to logits, score, p-value, verdict), and check it."""
    require_file_place(out, [scorer_file])
    from featnorm.export import OUTPUTS, input_size
    from featnorm.inputs import TEXTS
    from featnorm.scorer_file import load

    scorer = load(scorer_file, model, weights=weights)
    if tpr is not None:
        scorer.set_tpr(tpr)
    difference = scorer.export(out)
    console.print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB).", soft_wrap=True)
    if scorer.kind is not TEXTS:
        free = ("channels", "height", "width")
        sizes = (name if size is None else f"{size}" for name, size in zip(free, input_size(scorer), strict=False))
        taken = f"{scorer.kind.name} (n, {', '.join(sizes)}) float32"
    else:
        inputs: Any = scorer.reference_inputs()
        taken = f"{', '.join(inputs)} (n, length) int64"
    console.print(f"  in:  {taken}, as returned by the preprocess of {scorer.spec}")
    outputs = OUTPUTS if "logits" in scorer.tap.captured else OUTPUTS[1:]
    console.print(f"  out: {', '.join(outputs)}")
    console.print(
        f"The scores of onnxruntime and PyTorch differ by at most {difference:.1e} relative to their size."
    )
