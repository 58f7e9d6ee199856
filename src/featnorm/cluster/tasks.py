"""Tasks of an actor: scoring items, and extracting their features."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.engine import network_engine
from featnorm.inputs import Extracted, Source, extract_features
from featnorm.inputs.kinds import Inputs, Kind, run, to_device
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer
from featnorm.verdict import ItemVerdict


class Task(Protocol):
    """A task that is sent to every actor once."""

    @property
    def runtime(self) -> Runtime:
        """Precision, batch size and engine, "torch" or "onnx"."""
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
    runtime : precision, batch size and engine.
    """

    scorer: Scorer
    runtime: Runtime

    def start(self, device: str, workers: int) -> Callable[[Source[Any]], Iterator[list[ItemVerdict]]]:
        """See `Task`."""
        runtime = replace(self.runtime, device=device, workers=workers)
        self.scorer.to(runtime.torch_device)
        return partial(self.scorer.stream, runtime=runtime, engine=self.scorer.engine(runtime, 0))


@dataclass(frozen=True)
class Extraction:
    """Extraction of the features of a frozen backbone.

    Parameters
    ----------
    backbone : module from transformed items to features (n, D).
    kind, transform : what the items are, and the transform of one.
    runtime : precision, batch size and engine.
    """

    backbone: nn.Module
    kind: Kind
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

        features: Callable[[Inputs], Tensor] = extract_batch
        if runtime.engine == "onnx":
            features = network_engine(backbone, self.kind, self.transform).features(extract_batch)
        size = runtime.batch_of(self.kind)

        def extract(source: Source[Any]) -> Iterator[Extracted]:
            return extract_features(source, self.transform, features, batch_size=size, workers=workers)

        return extract
