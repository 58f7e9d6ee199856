"""Tasks of an actor: scoring images, and extracting their features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from PIL import Image
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.inputs import Extracted, ImageSource, extract_images
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.verdict import ItemVerdict


class Task(Protocol):
    """A task that is sent to every actor once."""

    @property
    def runtime(self) -> Runtime:
        """Precision and batch size."""
        ...

    def start(self, device: str, workers: int) -> Callable[[ImageSource], Iterator[Any]]:
        """Return a function that yields one result per batch of images, in order.

        Parameters
        ----------
        device : device to compute on.
        workers : number of threads that decode images; 0 for the calling thread.
        """


@dataclass(frozen=True)
class Scoring:
    """Scoring of images.

    Parameters
    ----------
    scorer : scorer with a preprocess.
    runtime : precision and batch size.
    """

    scorer: Scorer
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[ImageSource], Iterator[list[ItemVerdict]]]:
        """See `Task`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        self.scorer.to(runtime.torch_device)
        return partial(self.scorer.stream, runtime=runtime)


@dataclass(frozen=True)
class Extraction:
    """Extraction of the features of a frozen backbone.

    Parameters
    ----------
    backbone : module from transformed images (n, 3, H, W) to features (n, D).
    transform : transform from an RGB PIL image to a tensor.
    runtime : precision and batch size.
    """

    backbone: nn.Module
    transform: Callable[[Image.Image], Tensor]
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[ImageSource], Iterator[Extracted]]:
        """See `Task`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        backbone = fast_layout(self.backbone.to(runtime.torch_device).eval())

        @torch.no_grad()
        def extract_batch(images: Tensor) -> Tensor:
            with runtime.autocast():
                return backbone(fast_layout(images.to(runtime.torch_device)))

        def extract(images: ImageSource) -> Iterator[Extracted]:
            return extract_images(
                images, self.transform, extract_batch, batch_size=runtime.batch_size, workers=workers
            )

        return extract
