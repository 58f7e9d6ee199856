"""``featnorm demo``: detectors compared and calibrated on data that come with scikit-learn."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from featnorm.cli.console import console, environment, prepare_folder, print_table
from featnorm.cli.options import OutFolder, Seed

if TYPE_CHECKING:
    from collections.abc import Iterator

    from PIL import Image
    from torch import Tensor

    from featnorm.features import Features
    from featnorm.tap import FeatureTap

_BATCH = 256
_TPR = 0.95


def demo(out: OutFolder = Path("featnorm-demo"), seed: Seed = 0) -> None:
    """Train a small network on handwritten digits, and compare detectors on inputs unlike them.

    Takes about a minute and downloads nothing: the data comes with scikit-learn.
    """
    from featnorm import demo as digits
    from featnorm.detectors import NAN
    from featnorm.evaluation import compare, standard_detectors
    from featnorm.report.comparison import write_page
    from featnorm.scorer import Scorer
    from featnorm.tap import FeatureTap

    started = time.perf_counter()
    page = out / "index.html"
    prepare_folder(out, [page])
    data = digits.load(seed)
    console.print(f"Training a small network on {len(data.train[0])} handwritten digits, 0 to 6 ...", style="dim")
    model = digits.train(data.train, seed)
    trained = time.perf_counter()

    tap = FeatureTap(model).trace(data.test[0])
    console.print(tap.describe().splitlines()[0], soft_wrap=True)
    console.print()
    comparison = compare(
        standard_detectors(),
        fit=_stream(tap, *data.train),
        id_set=("digits 0 to 6", _stream(tap, *data.test)),
        ood_sets={name: _stream(tap, images) for name, images in data.ood.items()},
    )
    comparison.facts = {
        "model": f"three convolutions and a head, {digits.RECIPE.epochs} epochs in {trained - started:.0f} s",
        "in-distribution": f"{len(data.test[0])} digits 0 to 6 that the network was not trained on",
        **{name: f"{len(images)} inputs" for name, images in data.ood.items()},
        "fit": f"the {len(data.train[0])} training digits, for the detectors that are fitted",
        "seed": str(seed),
        **environment(),
    }
    print_table(comparison)

    inputs = {comparison.id_name: data.test[0], **data.ood}
    scorer = Scorer(model, NAN()).calibrate(data.calibrate[0].split(_BATCH), tpr=_TPR, progress=False)
    flagged = {name: float(1 - scorer(images).is_id.double().mean()) for name, images in inputs.items()}
    verdicts = ", ".join(f"{100 * share:.1f} % of {name}" for name, share in flagged.items())
    # Standard error of the first share, due to the random choice of calibration and test digits.
    deviation = ((1 - _TPR) * _TPR * (1 / len(data.calibrate[0]) + 1 / len(data.test[0]))) ** 0.5
    console.print()
    console.print(
        f"NAN, calibrated on {len(data.calibrate[0])} other digits to flag {100 * (1 - _TPR):.0f} % of "
        f"in-distribution inputs as OOD, flags {verdicts} (the standard error of the first is "
        f"{100 * deviation:.1f} %).",
        soft_wrap=True,
    )
    write_page(
        comparison,
        page,
        title="Does the model know this digit?",
        summary=(
            "A small network learned the handwritten digits 0 to 6. Which detectors notice that 7, 8 and 9, and "
            "patches of photographs, are something else?"
        ),
        image=lambda name, index: _picture(inputs[name][index]),
    )
    console.print(f"Wrote {page} in {time.perf_counter() - started:.0f} s: open it in a browser.")


def _stream(tap: FeatureTap, images: Tensor, labels: Tensor | None = None) -> Iterator[Features]:
    parts = [part.split(_BATCH) for part in (images, labels) if part is not None]
    return tap.stream(list(zip(*parts, strict=True)), progress=False)


def _picture(image: Tensor) -> Image.Image:
    from PIL import Image

    return Image.fromarray(image[0].mul(255).round().byte().numpy())
