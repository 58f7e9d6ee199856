"""What of the head's training moves NAN: its length, temperature, weight decay and width, on one frozen backbone.

    python tools/study_head.py featnorm-reproduction/laptop/relu-512-16epochs-seed0

The backbone of a run of the CIFAR-10 benchmark is asked once for every image; heads are then trained on its
features alone, so that a hundred epochs take a minute. One setting is changed at a time. Nothing is chosen by the
OOD sets.
"""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from featnorm.cli.show import environment
from featnorm.detectors import KNN, MSP, NAN, Energy, HiddenConfidence, L1Norm, Sparsity
from featnorm.evaluation import compare
from featnorm.protocols import cifar10
from featnorm.protocols.tables import Table
from featnorm.tap import FeatureTap
from featnorm.training import ProjectionHead, Recipe, train

BASE = Recipe(epochs=50, batch_size=256, optimiser="sgd", lr=0.06)
# What is changed -> temperature, hidden width, recipe.
SETTINGS = {
    "50 epochs, T = 0.1, width 512, no weight decay": (0.1, 512, BASE),
    **{f"{n} epochs": (0.1, 512, replace(BASE, epochs=n)) for n in (5, 15, 150, 400)},
    **{f"T = {t}": (t, 512, BASE) for t in (0.05, 0.2, 0.5, 1.0)},
    **{f"weight decay {w:g}": (0.1, 512, replace(BASE, weight_decay=w)) for w in (5e-4, 5e-3)},
    **{f"width {d}": (0.1, d, BASE) for d in (64, 2048)},
}
DETECTORS = (NAN, L1Norm, Sparsity, HiddenConfidence, MSP, Energy, KNN)


@torch.no_grad()
def pooled(backbone: nn.Module, images: Tensor) -> Tensor:
    """Return the backbone's features of images (n, 3, 32, 32) uint8."""
    return torch.cat([backbone(batch.float().div(255)) for batch in images.split(250)])


def main() -> None:
    """Extract once, train every head, write the numbers and the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the folder of the run")
    parser.add_argument("--data-root", type=Path, default=os.environ.get("FEATNORM_DATA"))
    parser.add_argument("--out", type=Path, default=Path("head-study"), help="a folder for head.json and head.md")
    arguments = parser.parse_args()
    result = json.loads((arguments.run / "result.json").read_text("utf-8"))
    network = cifar10.Variant(**result["variant"]).build(result["width"], 0)
    network.load_state_dict(load_file(arguments.run / "model.safetensors"))
    backbone = network.eval()[:2]
    images = cifar10.load_images(arguments.data_root and Path(arguments.data_root))
    fit, test = pooled(backbone, images.train[0]), pooled(backbone, images.test[0])
    ood = {name: pooled(backbone, pixels) for name, pixels in images.ood.items()}
    rows = []
    for name, (temperature, width, recipe) in SETTINGS.items():
        torch.manual_seed(0)
        head = ProjectionHead(fit.shape[1], cifar10.CLASSES, hidden=width, temperature=temperature)
        log: list[dict[str, float]] = []
        train(head, fit, images.train[1], recipe, on_epoch=lambda entry, _, log=log: log.append(entry))
        tap = FeatureTap(head)
        evaluation = compare(
            [make() for make in DETECTORS],
            fit=[tap(fit)],
            id_set=("cifar10", [tap(test).replace(labels=images.test[1])]),
            ood_sets={key: [tap(values)] for key, values in ood.items()},
        )
        rows.append(
            {
                "setting": name,
                "loss": log[-1]["loss"],
                "accuracy": evaluation.accuracy,
                "units on": float((tap(test).tensor("activation") > 0).float().mean()),
                "auroc": {outcome.detector: 100 * outcome.mean.auroc for outcome in evaluation.outcomes},
            }
        )
        print(json.dumps(rows[-1]))
    arguments.out.mkdir(parents=True, exist_ok=True)
    facts = {"run": arguments.run.name, **environment(), "images": images.facts, "rows": rows}
    (arguments.out / "head.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    (arguments.out / "head.md").write_text(table(facts).markdown(), encoding="utf-8")


def table(facts: dict) -> Table:
    """Return the study as a table."""
    names = list(facts["rows"][0]["auroc"])
    rows = [
        [
            row["setting"],
            f"{row['loss']:.3f}",
            f"{row['accuracy']:.1%}",
            f"{row['units on']:.0%}",
            *(f"{row['auroc'][name]:.1f}" for name in names),
        ]
        for row in facts["rows"]
    ]
    sets = len([key for key in facts["images"] if key.startswith("OOD")])
    notes = [
        f"head alone, on the backbone of {facts['run']}; the first row is what the others change one setting of"
    ]
    notes += [
        f"AUROC in percent, mean over {sets} OOD sets; one seed",
        f"date: {facts['date']}",
        f"machine: {facts['machine']}",
    ]
    headers = ["Head", "training loss", "accuracy", "units on, ID", *names]
    return Table("What of the head's training moves the scores", headers, rows, notes)


if __name__ == "__main__":
    main()
