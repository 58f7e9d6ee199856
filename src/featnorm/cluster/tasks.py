"""Tasks of an actor: scoring items, and extracting their features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.inputs import Extracted, Source, extract_features
from featnorm.inputs.kinds import Inputs, run, to_device
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.verdict import ItemVerdict


class Task(Protocol):
    """A task that is sent to every actor once."""

    @property
    def runtime(self) -> Runtime:
        """Precision and batch size."""
        ...

    def start(self, device: str, workers: int) -> Callable[[Source[Any]], Iterator[Any]]:
        """Return a function that yields one result per batch of items, in order.

        Parameters
        ----------
        device : device to compute on.
        workers : number of threads that decode items; 0 for the calling thread.
        """


@dataclass(frozen=True)
class Scoring:
    """Scoring of items.

    Parameters
    ----------
    scorer : scorer with a preprocess.
    runtime : precision and batch size.
    """

    scorer: Scorer
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[Source[Any]], Iterator[list[ItemVerdict]]]:
        """See `Task`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        self.scorer.to(runtime.torch_device)
        return partial(self.scorer.stream, runtime=runtime)


@dataclass(frozen=True)
class Extraction:
    """Extraction of the features of a frozen backbone.

    Parameters
    ----------
    backbone : module from transformed items to features (n, D).
    transform : transform of an item.
    runtime : precision and batch size.
    """

    backbone: nn.Module
    transform: Callable[[Any], Any]
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[Source[Any]], Iterator[Extracted]]:
        """See `Task`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        backbone = fast_layout(self.backbone.to(runtime.torch_device).eval())

        @torch.no_grad()
        def extract_batch(inputs: Inputs) -> Tensor:
            with runtime.autocast():
                return run(backbone, to_device(inputs, runtime.torch_device))

        def extract(source: Source[Any]) -> Iterator[Extracted]:
            return extract_features(
                source, self.transform, extract_batch, batch_size=runtime.batch_size, workers=workers
            )

        return extract
