"""Networks that are trained without labels and scored by detectors: MoCo-v2 (paper 6.4) and CSI (Tack et al.)."""

from abc import abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.augmentation import rotations
from featnorm.detectors import CSI as CSIScore
from featnorm.detectors import KNN, NAN, SSD, Detector, Views
from featnorm.detectors.held_out import fit_in_batches
from featnorm.features import Features
from featnorm.models import cifar_network, cifar_network_with
from featnorm.paper.images import as_pixels
from featnorm.paper.networks import CSIHead
from featnorm.paper.recipe import PRESETS, PaperRecipe
from featnorm.paper.systems.base import OneClassModel, TrainContext
from featnorm.runtime import Runtime
from featnorm.tap import AutocastTap
from featnorm.training import train

#: The paper's settings; an epoch here is four of the paper's, see `MoCo`.
MOCO = replace(PRESETS["MoCo-v2"], epochs=PRESETS["MoCo-v2"].epochs // 4)
# Images per batch; some detectors run the network on forty views of each.
_BATCH = 100


def moco_detectors(k: int = 50) -> list[Detector]:
    """Return the detectors of the paper's MoCo-v2 networks (C.1), with ``k`` nearest neighbors.

    The paper averages NAN over nine views; NAN of one view shows what they are worth.
    """
    nan, views = NAN(), Views(NAN())
    return [KNN(k), SSD(), views, KNN(k) / views, SSD() / views, nan, KNN(k) / nan, SSD() / nan]


class Scored(nn.Module):
    """A network, and detectors fitted to its features of the training images."""

    def __init__(self, network: nn.Module, detectors: list[Detector]) -> None:
        super().__init__()
        self.network = network
        self._detectors = nn.ModuleList(detectors)

    @property
    def detectors(self) -> list[Detector]:
        """The detectors."""
        return cast(list[Detector], list(self._detectors))

    def stream(self, images: Tensor, runtime: Runtime) -> Iterator[Features]:
        """Yield the network's features of images (n, 3, 32, 32) uint8, batch by batch."""
        fast_layout(self.to(runtime.torch_device))
        tap = AutocastTap(self.network, runtime)
        for batch in images.split(_BATCH):
            yield tap(as_pixels(batch, runtime.torch_device))


@dataclass(frozen=True)
class _Framework(OneClassModel[Scored]):
    width: int
    recipe: PaperRecipe

    def _train(self, images: Tensor, context: TrainContext) -> Scored:
        network = self.network(context.seed)
        inputs, runtime = self.inputs(images), context.runtime
        train(network, inputs, None, self.recipe, folder=context.folder, runtime=runtime, seed=context.seed)
        return self.fit(network, images, self.detectors(), runtime)

    def fit(self, network: nn.Module, images: Tensor, detectors: list[Detector], runtime: Runtime) -> Scored:
        """Fit detectors to the features of a network, at any point of its training.

        Parameters
        ----------
        network : network made by `network`; it is put in evaluation mode.
        images : images of the class, (n, 3, 32, 32) uint8.
        detectors : detectors to fit.
        runtime : device and precision.
        """
        model = Scored(network, detectors).eval()
        for error in fit_in_batches(detectors, model.stream(images, runtime)).values():
            raise error
        return model

    def _scores(self, model: Scored, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        parts: dict[str, list[Tensor]] = {repr(detector): [] for detector in model.detectors}
        for features in model.stream(images, runtime):
            for detector in model.detectors:
                parts[repr(detector)].append(detector.score(features).cpu())
        return {name: torch.cat(scores) for name, scores in parts.items()}

    def inputs(self, images: Tensor) -> Tensor:
        """Return the inputs of the training, from images (n, 3, 32, 32)."""
        return images

    @abstractmethod
    def network(self, seed: int) -> nn.Module:
        """Return the network with the initial weights of a seed."""

    @abstractmethod
    def detectors(self) -> list[Detector]:
        """Return the detectors that score it, not yet fitted."""


@dataclass(frozen=True)
class MoCo(_Framework):
    """The paper's own models (6.4, C.1): NAN, SSD, KNN and their fusions on a MoCo-v2 network.

    "The train dataset is augmented randomly with 90-degree rotations": each of the four rotations of an image is
    an input of its own, so an epoch here is four of the paper's. Images are rotated only in training.

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    recipe : settings of its training; the paper uses those of its label-free CIFAR-10 networks.
    k : number of nearest neighbors.
    """

    width: int = 64
    recipe: PaperRecipe = MOCO
    k: int = 50

    def inputs(self, images: Tensor) -> Tensor:
        """Return every image in its four rotations, (4 n, 3, 32, 32)."""
        return torch.cat(rotations(images))

    def network(self, seed: int) -> nn.Module:
        """Return the ResNet-18 with MoCo's projection head."""
        return cifar_network(self.width, None, seed=seed)

    def detectors(self) -> list[Detector]:
        """Return NAN, SSD, KNN and the fusions."""
        return moco_detectors(self.k)


@dataclass(frozen=True)
class CSI(_Framework):
    """CSI: contrast of rotated inputs, scored by `featnorm.CSI` (Tack et al., NeurIPS 2020).

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    recipe : settings of its training.
    """

    width: int = 64
    recipe: PaperRecipe = PRESETS["CSI"]

    def network(self, seed: int) -> nn.Module:
        """Return the ResNet-18 with CSI's two heads."""
        return cifar_network_with(CSIHead, self.width, seed=seed)

    def detectors(self) -> list[Detector]:
        """Return CSI's score."""
        return [CSIScore()]
