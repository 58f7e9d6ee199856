"""``featnorm export``: a fitted detector as one ONNX graph."""

from pathlib import Path

from featnorm.cli.console import console, require_file_place
from featnorm.export import OUTPUTS, export_onnx
from featnorm.image_scorer import ImageScorer


def run(detector: Path, out: Path, model: str | None) -> None:
    """Write the graph, and say what goes in and comes out."""
    require_file_place(out, [detector])
    scorer = ImageScorer.load(detector, model=model)
    difference = export_onnx(scorer, out)
    shape = ", ".join(map(str, scorer.input_size))
    console.print(f"Wrote {out} ({out.stat().st_size / 1e6:.1f} MB).", soft_wrap=True)
    console.print(f"  in:  images (n, {shape}) float32, as the transform of {scorer.backbone} makes them")
    console.print(f"  out: {', '.join(OUTPUTS)}")
    console.print(f"Under onnxruntime scores differ from PyTorch's by {difference:.1e} of their size at most.")
