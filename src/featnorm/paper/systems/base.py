"""The base class of one-class models, and the evaluation of a network on many images."""

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
    """Where and how a model is trained or evaluated; the parameters of `OneClassModel.train`."""

    folder: Path | None = None
    fabric: Any = None
    seed: int = 0
    progress: bool | None = None

    @property
    def device(self) -> torch.device:
        """Device of the networks."""
        return torch.device("cpu") if self.fabric is None else self.fabric.device

    def autocast(self) -> Any:
        """Return the autocast context of the precision."""
        return nullcontext() if self.fabric is None else self.fabric.autocast()

    def part(self, name: str) -> "TrainContext":
        """Return the context of one training of several, with a folder of its own."""
        return replace(self, folder=None if self.folder is None else self.folder / name)


@dataclass(frozen=True)
class OneClassModel(ABC, Generic[Model]):
    """A model that is trained on images of one class, and scores how in-distribution others are.

    An instance holds the settings, whose defaults are the authors'. Its fitted state is a module, which can be
    moved and saved.
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
        """Train on images of one class.

        Parameters
        ----------
        images : (n, 3, 32, 32) uint8.
        folder
            Folder of the checkpoints; an interrupted run is resumed there, and ends with the weights of an
            uninterrupted one. Default: no checkpoints.
        fabric : a `lightning_fabric.Fabric` of one process, for device and precision. Default: the CPU.
        seed : seed of the initial weights, the order of the images, and all other random numbers.
        progress : whether to show progress bars. Default: yes.

        Returns
        -------
        The fitted state, in evaluation mode.

        Raises
        ------
        ValueError
            The images have another shape or type, or are fewer than a batch; a checkpoint is from another run; or
            the weights are no longer finite.
        """
        check_images(images)
        return self._train(images, TrainContext(None if folder is None else Path(folder), fabric, seed, progress))

    def scores(
        self, model: Model, images: Tensor, *, fabric: Any = None, progress: bool | None = None
    ) -> dict[str, Tensor]:
        """Score images.

        Parameters
        ----------
        model : fitted state that `train` returned.
        images : (m, 3, 32, 32) uint8.
        fabric, progress : see `train`.

        Returns
        -------
        Scores (m,) by name, of which a model may have several; higher is more in-distribution.

        Raises
        ------
        ValueError
            The images have another shape or type.
        """
        check_images(images)
        return self._scores(model, images, TrainContext(fabric=fabric, progress=progress))

    @abstractmethod
    def _train(self, images: Tensor, context: TrainContext) -> Model: ...

    @abstractmethod
    def _scores(self, model: Model, images: Tensor, context: TrainContext) -> dict[str, Tensor]: ...


def check_images(images: Tensor, min_images: int = 1) -> None:
    """Raise a ValueError unless there are at least ``min_images`` images (n, 3, 32, 32) uint8."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(
            f"images must be uint8 (n, 3, {SIDE}, {SIDE}), got {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(images) < min_images:
        raise ValueError(f"a batch of {min_images} needs as many images, and there are {len(images)}")


def as_pixels(images: Tensor, device: torch.device) -> Tensor:
    """Return uint8 images as pixels in [0, 1] on a device, in the layout of `fast_layout`."""
    return fast_layout(images.to(device)).float().div_(255)


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor], images: Tensor, context: TrainContext, *, batch_size: int = _BATCH
) -> Tensor:
    """Return a network's outputs for images, on the CPU in single precision.

    Parameters
    ----------
    network : maps pixels (b, 3, 32, 32) in [0, 1] to (b, ...), on the device and in the precision of the context.
    images : (n, 3, 32, 32) uint8.
    context : device and precision.
    batch_size : number of images per batch.
    """
    parts = []
    for batch in images.split(batch_size):
        with context.autocast():
            parts.append(network(as_pixels(batch, context.device)).float().cpu())
    return torch.cat(parts)
