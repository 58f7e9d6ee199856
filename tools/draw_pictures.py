"""Draw the pictures of the documentation: docs/images/verdicts.svg, scores.png and hidden-classifier.svg.

python tools/draw_pictures.py    # needs Chromium for the screenshot

The digits are those of scikit-learn's `load_digits` (UCI), the patches are cut from its two photographs (CC BY).
"""

import os
import shutil
import sys
import tempfile
from pathlib import Path

import matplotlib
import matplotlib.pyplot as plt
import torch
from PIL import Image
from playwright.sync_api import sync_playwright
from torchvision.transforms import v2

import featnorm as fn

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
PATCHES = 3  # those that the network is the most sure of
GREEN, RED = "#1a7f37", "#cf222e"


def draw_verdicts() -> None:
    """Train the example network in the current folder, fit a detector, and draw its verdicts."""
    import own_model

    own_model.write_images()
    # At four times the pixels, for which the tests of the example have no time.
    transform = own_model.transform.transforms
    small, transform[0] = transform[0], v2.Resize((32, 32))
    own_model.train(epochs=4)
    scorer = fn.fit("digits/new[1::2]", "own_model:make", cache="cache")
    model, _ = own_model.make()
    model.eval()

    def confidence(path: str) -> float:
        with torch.no_grad():
            logits = model(own_model.transform(Image.open(path).convert("RGB"))[None])
        return float(logits.softmax(1).amax())

    # Neither the network nor the detector has seen these digits.
    digits = [sorted(map(str, Path(f"digits/new/{digit}").glob("*.png")))[2] for digit in (0, 3, 6)]
    patches = sorted(map(str, Path("patches").glob("*.png")), key=confidence)[-PATCHES:]
    paths = [*digits, *patches]
    figure, axes = plt.subplots(1, len(paths), figsize=(11, 3.1), layout="constrained", facecolor="white")
    for axis, path, verdict in zip(axes, paths, scorer.predict(paths), strict=True):
        axis.imshow(Image.open(path).convert("RGB"), interpolation="nearest")
        axis.set(xticks=[], yticks=[], title=f"“{verdict.predicted}”, {confidence(path):.0%} sure")
        color, word = (GREEN, "accepted") if verdict.is_id else (RED, "flagged")
        axis.set_xlabel(
            f"{word}\nscore {verdict.score:.1f}, p = {verdict.p_value:.2f}", color=color, weight="bold"
        )
        for spine in axis.spines.values():
            spine.set(color=color, linewidth=3)
    figure.savefig(IMAGES / "verdicts.svg", metadata={"Date": None})
    transform[0] = small
    own_model.train()


def draw_scores() -> None:
    """Take a screenshot of the page that `featnorm score` writes in the tutorial on your own classifier."""
    from featnorm.__main__ import COMMANDS
    from featnorm.cli.app import run_command

    for command in (
        "fit digits/new --detector KNN(k=5)/NAN -o digits.featnorm --cache cache",
        "score digits.featnorm patches -o scores.csv --html scores.html",
    ):
        run_command([*command.split(), "--model", "own_model:make"], COMMANDS)
    with sync_playwright() as driver:
        chromium = shutil.which("chromium") or shutil.which("google-chrome")
        page = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"]).new_page(
            viewport={"width": 900, "height": 1100}
        )
        page.goto(Path("scores.html").absolute().as_uri())
        page.screenshot(path=IMAGES / "scores.png")


def draw_hidden_classifier() -> None:
    """Run the tutorial of the hidden classifier, which draws its picture."""
    from snippets import blocks

    names: dict[str, object] = {}
    for block in blocks((ROOT / "docs" / "tutorials" / "hidden-classifier.md").read_text("utf-8")):
        exec(block.code, names)
    shutil.copy("hidden-classifier.svg", IMAGES)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "helpers")]
    matplotlib.rcParams.update({"svg.hashsalt": "featnorm", "font.size": 11, "font.family": "DejaVu Sans"})
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        draw_verdicts()
        draw_scores()
        draw_hidden_classifier()
