"""What an actor does with images: judge them, or ask a backbone about them."""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.inputs import Extracted, ImageSource, extract_images


class Work(Protocol):
    """What is sent to every actor, once."""

    def start(self, device: torch.device, workers: int) -> Callable[[ImageSource], Iterator[Any]]:
        """Return what gives a result for each batch of images, in their order.

        Parameters
        ----------
        device : where to compute.
        workers : threads that read images beside this one; 0 for this one.
        """


@dataclass(frozen=True)
class Judging:
    """The verdicts of a scorer.

    Parameters
    ----------
    scorer : with its calibration.
    precision : as Fabric names it.
    batch_size : images a batch.
    """

    scorer: ImageScorer
    precision: str
    batch_size: int

    def start(self, device: torch.device, workers: int) -> Callable[[ImageSource], Iterator[list[ImageVerdict]]]:
        """See `Work`."""
        self.scorer.scorer.to(device)
        fabric = _fabric(device, self.precision)

        def judge(images: ImageSource) -> Iterator[list[ImageVerdict]]:
            return self.scorer.stream(images, batch_size=self.batch_size, workers=workers, fabric=fabric)

        return judge


@dataclass(frozen=True)
class Extracting:
    """The features of a frozen backbone.

    Parameters
    ----------
    backbone : from transformed images (n, 3, H, W) to features (n, D).
    transform : from a PIL image in RGB to what the backbone takes.
    precision, batch_size : see `Judging`.
    """

    backbone: nn.Module
    transform: Callable[[Image.Image], Tensor]
    precision: str
    batch_size: int

    def start(self, device: torch.device, workers: int) -> Callable[[ImageSource], Iterator[Extracted]]:
        """See `Work`."""
        backbone = fast_layout(self.backbone.to(device).eval())
        fabric = _fabric(device, self.precision)

        @torch.no_grad()
        def ask(images: Tensor) -> Tensor:
            with nullcontext() if fabric is None else fabric.autocast():
                return backbone(fast_layout(images.to(device)))

        def extract(images: ImageSource) -> Iterator[Extracted]:
            return extract_images(images, self.transform, ask, batch_size=self.batch_size, workers=workers)

        return extract


def _fabric(device: torch.device, precision: str) -> Any:
    """Return Fabric where the precision needs it: its import takes as long as torch's, in every actor."""
    if precision == "32-true":
        return None
    from lightning_fabric import Fabric

    return Fabric(accelerator=device.type, devices=1, precision=precision)  # type: ignore[arg-type]
