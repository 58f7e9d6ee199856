"""What a system of one-class classification is, and how a network is asked about many images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout

SIDE = 32

_BATCH = 250

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainContext:
    """Where and how a system is trained or asked; the parameters of `OneClassModel.train`."""

    folder: Path | None = None
    fabric: Any = None
    seed: int = 0
    progress: bool | None = None

    @property
    def device(self) -> torch.device:
        """Where the networks are."""
        return torch.device("cpu") if self.fabric is None else self.fabric.device

    def autocast(self) -> Any:
        """Return the context of the precision."""
        return nullcontext() if self.fabric is None else self.fabric.autocast()

    def part(self, name: str) -> "TrainContext":
        """Return the run of one training of several, with a folder of its own."""
        return replace(self, folder=None if self.folder is None else self.folder / name)


@dataclass(frozen=True)
class OneClassModel(ABC, Generic[Model]):
    """Learns from images of one class, and says of others how far they belong to it.

    A system is a frozen dataclass of its settings; the defaults are its authors'. What it learned is a module, so
    that it can be moved and kept.
    """

    def train(
        self,
        images: Tensor,
        *,
        folder: str | Path | None = None,
        fabric: Any = None,
        seed: int = 0,
        progress: bool | None = None,
    ) -> Model:
        """Learn from images of one class.

        Parameters
        ----------
        images : (n, 3, 32, 32) uint8.
        folder
            Where the training keeps its checkpoints; a run that was broken off goes on there, to the weights of an
            unbroken one. None for nowhere.
        fabric : a `lightning_fabric.Fabric` of one process for device and precision; one CPU without.
        seed : of the initial weights, the order of the images, and all that is drawn.
        progress : show progress bars; None for where there is a terminal.

        Returns
        -------
        What was learned, in evaluation mode.

        Raises
        ------
        ValueError
            The images are of another shape or type, or fewer than a batch; a checkpoint is of another run; or the
            weights are not finite any more.
        """
        check_images(images)
        return self._train(images, TrainContext(None if folder is None else Path(folder), fabric, seed, progress))

    def scores(
        self, model: Model, images: Tensor, *, fabric: Any = None, progress: bool | None = None
    ) -> dict[str, Tensor]:
        """Score images with what `train` returned.

        Parameters
        ----------
        model : what `train` returned.
        images : (m, 3, 32, 32) uint8.
        fabric, progress : see `train`.

        Returns
        -------
        (m,) by name of the score, of which a system may have several; higher is more in-distribution.

        Raises
        ------
        ValueError
            The images are of another shape or type.
        """
        check_images(images)
        return self._scores(model, images, TrainContext(fabric=fabric, progress=progress))

    @abstractmethod
    def _train(self, images: Tensor, context: TrainContext) -> Model: ...

    @abstractmethod
    def _scores(self, model: Model, images: Tensor, context: TrainContext) -> dict[str, Tensor]: ...


def check_images(images: Tensor, least: int = 1) -> None:
    """Refuse what is not at least so many images (n, 3, 32, 32) uint8."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(
            f"images must be uint8 (n, 3, {SIDE}, {SIDE}), got {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(images) < least:
        raise ValueError(f"a batch of {least} needs as many images, and there are {len(images)}")


def as_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Return images uint8 as pixels in [0, 1] on a device, in the layout that `fast_layout` gives."""
    return fast_layout(images.to(device)).float().div_(255)


@torch.no_grad()
def predict(
    ask: Callable[[Tensor], Tensor], images: Tensor, context: TrainContext, *, batch_size: int = _BATCH
) -> Tensor:
    """Return what a network says of images, on the CPU in single precision.

    Parameters
    ----------
    ask : maps pixels (b, 3, 32, 32) in [0, 1] to (b, ...), on the device of the context and under its precision.
    images : (n, 3, 32, 32) uint8.
    context : device and precision.
    batch_size : images at once.
    """
    parts = []
    for batch in images.split(batch_size):
        with context.autocast():
            parts.append(ask(as_pixels(batch, context.device)).float().cpu())
    return torch.cat(parts)
