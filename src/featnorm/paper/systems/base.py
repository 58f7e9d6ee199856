"""The base class of one-class models, and the evaluation of a network on many images."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn

from featnorm.paper.images import SIDE, as_pixels
from featnorm.runtime import Runtime

_BATCH = 250

Model = TypeVar("Model", bound=nn.Module)


@dataclass(frozen=True)
class TrainContext:
    """Where and how a model is trained; the parameters of `OneClassModel.train`."""

    folder: Path | None
    runtime: Runtime
    seed: int

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
        runtime: Runtime | None = None,
        seed: int = 0,
    ) -> Model:
        """Train on images of one class.

        Parameters
        ----------
        images : (n, 3, 32, 32) uint8.
        folder
            Folder of the checkpoints; an interrupted run is resumed there, and ends with the weights of an
            uninterrupted one. Default: no checkpoints.
        runtime : device and precision, and whether to show progress bars. Default: `Runtime()`, on the CPU.
        seed : seed of the initial weights, the order of the images, and all other random numbers.

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
        context = TrainContext(None if folder is None else Path(folder), runtime or Runtime(), seed)
        # The caller's random state is restored.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return self._train(images, context)

    def scores(self, model: Model, images: Tensor, *, runtime: Runtime | None = None) -> dict[str, Tensor]:
        """Score images.

        Parameters
        ----------
        model : fitted state that `train` returned.
        images : (m, 3, 32, 32) uint8.
        runtime : see `train`.

        Returns
        -------
        Scores (m,) by name, of which a model may have several; higher is more in-distribution.

        Raises
        ------
        ValueError
            The images have another shape or type.
        """
        check_images(images)
        return self._scores(model, images, runtime or Runtime())

    @abstractmethod
    def _train(self, images: Tensor, context: TrainContext) -> Model:
        """Train on images; torch's random numbers are seeded with the seed of the context."""

    @abstractmethod
    def _scores(self, model: Model, images: Tensor, runtime: Runtime) -> dict[str, Tensor]: ...


def check_images(images: Tensor, min_images: int = 1) -> None:
    """Raise a ValueError unless there are at least ``min_images`` images (n, 3, 32, 32) uint8."""
    if images.dtype != torch.uint8 or images.shape[1:] != (3, SIDE, SIDE):
        raise ValueError(
            f"images must be uint8 (n, 3, {SIDE}, {SIDE}), got {images.dtype} of shape {tuple(images.shape)}"
        )
    if len(images) < min_images:
        raise ValueError(f"a batch of {min_images} needs as many images, and there are {len(images)}")


@torch.no_grad()
def predict(
    network: Callable[[Tensor], Tensor], images: Tensor, runtime: Runtime, *, batch_size: int = _BATCH
) -> Tensor:
    """Return a network's outputs for images, on the CPU in single precision.

    Parameters
    ----------
    network : maps pixels (b, 3, 32, 32) in [0, 1] to (b, ...).
    images : (n, 3, 32, 32) uint8.
    runtime : device and precision; its batch size is not used.
    batch_size : number of images per batch.
    """
    parts = []
    for batch in images.split(batch_size):
        with runtime.autocast():
            parts.append(network(as_pixels(batch, runtime.torch_device)).float().cpu())
    return torch.cat(parts)
