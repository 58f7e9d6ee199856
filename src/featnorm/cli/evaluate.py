"""``featnorm evaluate``: detectors side by side on the user's model and images."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from tqdm import tqdm

from featnorm.cli.show import console, environment, print_table
from featnorm.data import DataError, ImageSource, image_loader, open_images
from featnorm.detectors import parse_detector
from featnorm.evaluation import compare, standard_detectors
from featnorm.features import Features
from featnorm.models import create_model
from featnorm.report import markdown_page, write_page
from featnorm.tap import FeatureTap


@dataclass(frozen=True)
class Options:
    """The command's options."""

    model: str
    weights: Path | None
    id_data: str
    ood: list[str]
    fit: str | None
    detectors: list[str] | None
    layer: str | None
    out: Path
    data_root: Path | None
    device: str
    precision: str
    batch_size: int
    workers: int | None


class _Reader:
    """The features of a set of images, batch by batch, and which images they are."""

    def __init__(self, tap: FeatureTap, transform: Any, fabric: Any, options: Options) -> None:
        self.tap = tap
        self.transform = transform
        self.fabric = fabric
        self.options = options
        self.skipped: dict[str, list[tuple[str, str]]] = {}
        self.rows: dict[str, list[int]] = {}

    def stream(self, name: str, source: ImageSource) -> Iterator[Features]:
        """Yield the features of a source, skipping what cannot be read."""
        loader = image_loader(
            source,
            self.transform,
            batch_size=self.options.batch_size,
            workers=self.options.workers,
            on_corrupt=lambda file, why: self.skipped.setdefault(name, []).append((file, why)),
        )
        rows = self.rows.setdefault(name, [])
        classes = source.class_names
        why = None
        if classes is None and source.label(0) is None:
            why = "the images have no classes (SSD and KNN need none)"
        elif classes is not None and len(classes) == 1:
            why = f"the images are of a single class, {classes[0]} (SSD and KNN need none)"
        for batch in tqdm(loader, desc=name, unit="batch", disable=None, leave=False):
            rows.extend(batch.indices.tolist())
            images = batch.images.contiguous(memory_format=torch.channels_last)
            with self.fabric.autocast():
                features = self.tap(images)
            if why is None:
                yield features.replace(labels=batch.labels.to(self.tap.device))
            else:
                yield features.replace(absent={**features.absent, "labels": why})


def run(options: Options) -> None:
    """Compare detectors; print a table, write a page and a Markdown table."""
    detectors = (
        [parse_detector(expression) for expression in options.detectors]
        if options.detectors
        else standard_detectors()
    )
    names = _set_names(options)
    sources = {name: open_images(spec, root=options.data_root) for name, spec in names.items()}
    loaded = create_model(options.model, weights=options.weights)
    fabric = _fabric(options)
    # Convolutions read channels last: three times as fast on a CPU, and faster on a GPU.
    model = fabric.to_device(loaded.model).to(memory_format=torch.channels_last)
    tap = FeatureTap(model, options.layer)
    reader = _Reader(tap, loaded.transform, fabric, options)

    id_name, *ood_names = [name for name in names if name != "fit"]
    evaluation = compare(
        detectors,
        fit=reader.stream("fit", sources["fit"]) if "fit" in sources else None,
        id_set=(id_name, reader.stream(id_name, sources[id_name])),
        ood_sets={name: reader.stream(name, sources[name]) for name in ood_names},
    )
    evaluation.skipped = reader.skipped
    evaluation.facts = {
        "model": loaded.name + "".join(f"; {note}" for note in loaded.notes),
        "last hidden layer": tap.describe().splitlines()[0].removeprefix("Last hidden layer: "),
        "in-distribution": f"{names[id_name]}, {len(reader.rows[id_name])} inputs",
        **{f"OOD, {name}": f"{names[name]}, {len(reader.rows[name])} inputs" for name in ood_names},
        "fit": f"{names['fit']}, {len(reader.rows['fit'])} inputs" if "fit" in names else "nothing",
        **environment(),
    }
    print_table(evaluation)
    if evaluation.accuracy is not None:
        console.print(f"The model classifies {evaluation.accuracy:.1%} of {id_name} correctly.")
    for name, files in evaluation.skipped.items():
        console.print(f"[yellow]skipped[/yellow] {len(files)} unreadable image(s) in {name}:")
        for file, why in files[:10]:
            console.print(f"  {file}: {why}", soft_wrap=True)
        if len(files) > 10:
            console.print(f"  ... and {len(files) - 10} more, listed on the page")

    options.out.mkdir(parents=True, exist_ok=True)

    def image(name: str, index: int) -> Image.Image:
        return sources[name].image(reader.rows[name][index])

    page = options.out / "index.html"
    title = f"What does {options.model} know?"
    summary = f"Which detectors tell {', '.join(ood_names)} from {id_name}?"
    write_page(evaluation, page, title=title, summary=summary, image=image)
    document = options.out / "results.md"
    document.write_text(markdown_page(evaluation, title=title, summary=summary), encoding="utf-8")
    console.print(f"Wrote [bold]{page}[/bold] and {document}.", soft_wrap=True)


def _set_names(options: Options) -> dict[str, str]:
    """Return the specification of each set by a name that no two sets share."""
    specs = {"fit": options.fit} if options.fit is not None else {}
    for spec in (options.id_data, *options.ood):
        name = spec
        short = Path(spec.split("[")[0].split(":")[0]).stem
        if short and short not in specs:
            name = short
        if spec in specs.values():
            raise DataError(f"{spec} is given twice: fit, --id and every --ood must be different inputs")
        specs[name] = spec
    return specs


def _fabric(options: Options) -> Any:
    from lightning_fabric import Fabric

    try:
        return Fabric(accelerator=options.device, devices=1, precision=options.precision)  # type: ignore[arg-type]
    except (ValueError, RuntimeError) as error:
        raise ValueError(f"--device {options.device} --precision {options.precision}: {error}") from None
    except ImportError:
        raise ImportError("featnorm evaluate needs: pip install 'featnorm[vision]'") from None
