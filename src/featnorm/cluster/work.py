"""What an actor does with images: judge them, or ask a backbone about them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.image_scorer import ImageScorer, ImageVerdict
from featnorm.inputs import Extracted, ImageSource, extract_images
from featnorm.runtime import Runtime


class Work(Protocol):
    """What is sent to every actor, once."""

    @property
    def runtime(self) -> Runtime:
        """Precision and batch size."""
        ...

    def start(self, device: str, workers: int) -> Callable[[ImageSource], Iterator[Any]]:
        """Return what gives a result for each batch of images, in their order.

        Parameters
        ----------
        device : where to compute.
        workers : threads that read images beside this one; 0 for this one.
        """


@dataclass(frozen=True)
class Scoring:
    """The verdicts of a scorer.

    Parameters
    ----------
    scorer : with its calibration.
    runtime : precision and batch size.
    """

    scorer: ImageScorer
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[ImageSource], Iterator[list[ImageVerdict]]]:
        """See `Work`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        self.scorer.scorer.to(runtime.torch_device)
        return partial(self.scorer.stream, runtime=runtime)


@dataclass(frozen=True)
class Extracting:
    """The features of a frozen backbone.

    Parameters
    ----------
    backbone : from transformed images (n, 3, H, W) to features (n, D).
    transform : from a PIL image in RGB to what the backbone takes.
    runtime : see `Scoring`.
    """

    backbone: nn.Module
    transform: Callable[[Image.Image], Tensor]
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[ImageSource], Iterator[Extracted]]:
        """See `Work`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        backbone = fast_layout(self.backbone.to(runtime.torch_device).eval())

        @torch.no_grad()
        def ask(images: Tensor) -> Tensor:
            with runtime.autocast():
                return backbone(fast_layout(images.to(runtime.torch_device)))

        def extract(images: ImageSource) -> Iterator[Extracted]:
            return extract_images(images, self.transform, ask, batch_size=runtime.batch_size, workers=workers)

        return extract
