"""Draw the pictures of the documentation: docs/images/verdicts.svg, scores.png and those of tutorials.

python tools/draw_pictures.py               # needs Chromium for a screenshot
python tools/draw_pictures.py maps.md ...   # the pictures of these tutorials only

The digits are those of scikit-learn's `load_digits` (UCI), the patches are cut from its two photographs (CC BY).
"""

import contextlib
import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

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
#: The file that the code of a tutorial makes, and its name among the pictures.
TUTORIALS = {
    "hidden-classifier.md": ("hidden-classifier.svg", "hidden-classifier.svg"),
    "maps.md": ("pictures/000001-2001.png", "maps.png"),
    "boxes.md": ("pictures/000001-2001.png", "boxes.png"),
    "videos.md": ("videos.svg", "videos.svg"),
}


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


def draw_tutorial(page: str, made: str, picture: str) -> None:
    """Run a tutorial in a folder of its own, and keep the picture that it makes."""
    from snippets import run_page

    def run_command(*arguments: str) -> tuple[int, str, str]:
        done = subprocess.run([sys.executable, "-m", "featnorm", *arguments], capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),
        contextlib.redirect_stdout(io.StringIO()) as printed,
    ):

        def readouterr() -> SimpleNamespace:
            text = printed.getvalue()
            printed.seek(0)
            printed.truncate()
            return SimpleNamespace(out=text)

        sys.path.insert(0, folder)
        run_page(ROOT / "docs" / "tutorials" / page, run_command, SimpleNamespace(readouterr=readouterr))
        sys.path.remove(folder)
        shutil.copy(made, IMAGES / picture)


if __name__ == "__main__":
    sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "tests" / "helpers")]
    matplotlib.use("agg")
    matplotlib.rcParams.update({"svg.hashsalt": "featnorm", "font.size": 11, "font.family": "DejaVu Sans"})
    if len(sys.argv) == 1:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            draw_verdicts()
            draw_scores()
    for tutorial, picture in TUTORIALS.items():
        if not sys.argv[1:] or tutorial in sys.argv[1:]:
            draw_tutorial(tutorial, *picture)
