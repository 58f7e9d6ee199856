"""Write docs/zoo-transformers.md: what `FeatureTap` finds in classifiers of transformers.

    python tools/update_zoo_transformers.py

takes half a minute and needs no network: the models are tiny, with random weights.
"""

import datetime
import platform
import sys
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from zoo_transformers import ZOO, check  # noqa: E402

INTRODUCTION = """# Classifiers of transformers

Each model is a tiny configuration of its class with random weights. Its batches are the dicts that a tokenizer or
feature extractor returns: sequences of 2, 5, 8 and 10 tokens (or 200 to 1,000 audio samples), padded, with an
attention mask and labels. Vision models, Whisper and AST take inputs of one size. The columns are:

- **last hidden layer**, **pooled**: the widths that `FeatureTap` finds; "none" without a rectified hidden layer.
- **classifier**: largest difference of `W f + b` from the logits; "none" if the classifier is not a linear map of
  the hidden layer or, in a model without one, of the pooled feature.
- **padded**: largest difference between an input alone and in a padded batch, over all features and the scores
  MSP, KNN and, where there is a last hidden layer, NAN.

Differences are relative to the largest value. In every model the logits are exactly those that it returns.
wav2vec 2.0 and HuBERT have the layer normalization of their large versions in the feature extractor
(`feat_extract_norm="layer"`): with group normalization over time, as in the base versions, the model itself gives
another output for a padded input.
"""


def main() -> None:
    """Check every model, and write the page."""
    lines = [
        INTRODUCTION,
        "| kind | model | last hidden layer | pooled | classifier | padded |",
        "|---|---|---|---|---|---|",
    ]
    for name, of in ZOO.items():
        row = check(name)
        if row["logits"] != 0:
            raise SystemExit(f"{name}: the logits differ from the model's by {row['logits']}")
        widths, classifier = row["widths"], row["classifier"]
        found = [widths.get("activation", "none"), widths.get("pooled", "none")]
        found += ["none" if classifier is None else f"{classifier:.0e}", f"{max(row['padded'].values()):.0e}"]
        lines.append(f"| {of.kind} | {name}For{of.task} | {' | '.join(map(str, found))} |")
    lines += [
        "",
        f"{datetime.date.today()}, torch {torch.__version__}, transformers {transformers.__version__}, "
        f"{platform.machine()}, {platform.system()}. Written by `python tools/update_zoo_transformers.py`.",
    ]
    (ROOT / "docs" / "zoo-transformers.md").write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
