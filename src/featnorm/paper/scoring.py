"""Training a network of the CIFAR-10 benchmark, and scoring every set of its images by every detector."""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from featnorm._utils.files import replacing
from featnorm._utils.layout import fast_layout
from featnorm.detectors import NAN, Detector, L1Norm, Sparsity
from featnorm.evaluation import Comparison, compare, standard_detectors
from featnorm.features import Features
from featnorm.inputs import CachedFeatures, ImageSource
from featnorm.paper.images import Images, as_pixels, spaced
from featnorm.paper.recipe import PaperRecipe
from featnorm.paper.study import Context
from featnorm.tap import AutocastTap, FeatureTap
from featnorm.training import train
from featnorm.training.runs import LOG, read_log

_BATCH = 250


def train_and_score(
    model: nn.Module,
    images: Images,
    detectors: Sequence[Detector],
    recipe: PaperRecipe,
    seed: int,
    folder: Path,
    context: Context,
    *,
    labels: bool = True,
    **options: Any,
) -> dict[str, Any]:
    """Train a network, or resume its training, save its weights, and score every set of images with it.

    Parameters
    ----------
    model : network with its initial weights.
    images, detectors, options : see `score`.
    labels : see `score`; without them, the network is trained without them too.
    recipe, seed : settings of the training.
    folder : folder of the run; ``checkpoint.pt``, ``log.jsonl`` and ``model.safetensors`` go there.
    context : device, precision and progress bars.

    Returns
    -------
    Last loss and accuracy of the training, its seconds, and what `score` returns.
    """
    inputs, targets = images.train
    train(model, inputs, targets if labels else None, recipe, folder=folder, runtime=context.runtime, seed=seed)
    with replacing(folder / "model.safetensors") as temporary:
        save_file({name: value.cpu().contiguous() for name, value in model.state_dict().items()}, temporary)
    log = read_log(folder / LOG)
    return {
        "train_loss": log[-1]["loss"],
        "train_accuracy": log[-1]["accuracy"],
        "train_seconds": sum(entry["seconds"] for entry in log),
        **score(model, images, detectors, context, labels=labels, **options),
    }


def score(
    model: nn.Module,
    images: Images,
    detectors: Sequence[Detector],
    context: Context,
    *,
    labels: bool = True,
    fit_images: int | None = None,
    same_precision: bool = False,
) -> dict[str, Any]:
    """Score every set of images by every detector, from one extraction of each set.

    Parameters
    ----------
    model : maps images (n, 3, 32, 32) in [0, 1] to logits or embeddings.
    images : see `featnorm.paper.images.load_images`.
    detectors : the detectors; if none of them needs a fit, the training images are not read.
    context : device, precision and progress bars.
    labels : whether to use the labels; without them the accuracy is None.
    fit_images : number of training images that the detectors are fitted on, evenly spaced. None: all.
    same_precision
        Whether the model runs in the precision of its training, for detectors that run it on many changed inputs.
        Otherwise in full precision, so that the last digits of a score do not depend on the processor.

    Returns
    -------
    ``accuracy`` in [0, 1]; ``scores`` and ``pooled``, AUROC and FPR95 in percent by detector and OOD set;
    ``excluded``, detectors that cannot be used here, and why; ``inactive``, share of the hidden layer's units that
    are off, by set; ``score_seconds``.
    """
    began = time.perf_counter()
    model = fast_layout(model.to(context.runtime.torch_device))
    tap = AutocastTap(model, context.runtime) if same_precision else FeatureTap(model)

    def stream(pixels: Tensor, targets: Tensor | None) -> Iterator[Features]:
        yield from tap.stream(_Batches(pixels, targets if labels else None), progress=context.progress)

    test = list(stream(*images.test))
    ood = {name: list(stream(pixels, None)) for name, pixels in images.ood.items()}
    needs_fit = any(detector.needs_fit for detector in detectors)
    fit = stream(*(spaced(values, fit_images) for values in images.train)) if needs_fit else None
    evaluation = compare(detectors, fit=fit, id_set=("cifar10", test), ood_sets=ood)
    pooled = compare(
        [NAN(), L1Norm(), Sparsity()],
        fit=None,
        id_set=("cifar10", _of_pooled(test)),
        ood_sets={name: _of_pooled(batches) for name, batches in ood.items()},
    )
    return {
        "accuracy": evaluation.accuracy,
        "scores": percentages(evaluation),
        "pooled": percentages(pooled),
        "excluded": evaluation.excluded,
        "inactive": {name: inactive(batches) for name, batches in {"cifar10": test, **ood}.items()},
        "score_seconds": time.perf_counter() - began,
    }


@dataclass(frozen=True)
class _Batches:
    """Images (n, 3, h, w) uint8 as batches of pixels in [0, 1], with labels or without."""

    pixels: Tensor
    labels: Tensor | None

    def __len__(self) -> int:
        return -(-len(self.pixels) // _BATCH)

    def __iter__(self) -> Iterator[Any]:
        for start in range(0, len(self.pixels), _BATCH):
            rows = slice(start, start + _BATCH)
            inputs = as_pixels(self.pixels[rows])
            yield inputs if self.labels is None else (inputs, self.labels[rows])


def _of_pooled(batches: Iterable[Features]) -> list[Features]:
    return [Features(activation=features.tensor("pooled")) for features in batches]


def inactive(batches: Iterable[Features]) -> float:
    """Return the share of the hidden layer's units that are off."""
    off = [(features.tensor("activation") <= 0).double().mean(1) for features in batches]
    return float(torch.cat(off).mean())


def compared_detectors() -> list[Detector]:
    """Return the detectors that all tables of small images have: the standard ones that do not run the model."""
    return [detector for detector in standard_detectors() if not detector.needs_model]


def cached_labels(source: ImageSource, cached: CachedFeatures) -> Tensor:
    """Return the labels (n,) of the images whose features are cached; -1 for no label."""
    return torch.tensor([-1 if (label := source.label(row)) is None else label for row in cached.rows.tolist()])


def percentages(comparison: Comparison) -> dict[str, dict[str, list[float]]]:
    """Return AUROC and FPR95 in percent, by detector and OOD set."""
    return {
        outcome.detector: {
            name: [100 * measures.auroc, 100 * measures.fpr95] for name, measures in outcome.metrics.items()
        }
        for outcome in comparison.results
    }
