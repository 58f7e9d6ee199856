"""Networks that are trained without labels and scored by detectors: MoCo-v2 (paper 6.4) and CSI (Tack et al.)."""

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout
from featnorm.augmentation import rotations
from featnorm.detectors import CSI as CSIScore
from featnorm.detectors import KNN, NAN, SSD, Detector, Views
from featnorm.models import cifar_network, cifar_network_with
from featnorm.paper.networks import CSIHead
from featnorm.paper.recipe import PRESETS, PaperRecipe
from featnorm.paper.systems.system import OneClassModel, TrainContext, as_pixels
from featnorm.tap import AutocastTap, FeatureTap
from featnorm.training import train

#: The paper's, of whose epochs each is a quarter here, see `MoCo`.
MOCO = replace(PRESETS["MoCo-v2"], epochs=PRESETS["MoCo-v2"].epochs // 4)
# Images at once; detectors ask the network about up to forty views of each.
_BATCH = 100


def moco_detectors(k: int = 50) -> list[Detector]:
    """Return the detectors of the paper's MoCo-v2 networks (C.1), KNN with a k.

    NAN is averaged over nine views there; one view beside it shows what they are worth.
    """
    nan, views = NAN(), Views(NAN())
    return [KNN(k), SSD(), views, KNN(k) / views, SSD() / views, nan, KNN(k) / nan, SSD() / nan]


class Scored(nn.Module):
    """A network, and detectors that learned from its features of the known images."""

    def __init__(self, network: nn.Module, detectors: list[Detector]) -> None:
        super().__init__()
        self.network = network
        self._detectors = nn.ModuleList(detectors)

    @property
    def detectors(self) -> list[Detector]:
        """The detectors."""
        return cast(list[Detector], list(self._detectors))


@dataclass(frozen=True)
class _Framework(OneClassModel[Scored]):
    width: int
    recipe: PaperRecipe

    def _train(self, images: Tensor, context: TrainContext) -> Scored:
        network = self.network(context.seed)
        train(
            network,
            self.inputs(images),
            None,
            self.recipe,
            folder=context.folder,
            fabric=context.fabric,
            seed=context.seed,
            progress=context.progress,
        )
        return self.fit(network, images, self.detectors(), fabric=context.fabric)

    def fit(self, network: nn.Module, images: Tensor, detectors: list[Detector], *, fabric: Any = None) -> Scored:
        """Return a network, trained as far as it is, with detectors that learned from its features.

        Parameters
        ----------
        network : from `network`; it is put in evaluation mode.
        images : (n, 3, 32, 32) uint8, of the class.
        detectors : not yet fitted.
        fabric : see `train`.
        """
        context = TrainContext(fabric=fabric)
        model = Scored(network, detectors).eval()
        tap = _tap(model, context)
        for batch in images.split(_BATCH):
            features = tap(as_pixels(batch, context.device))
            for detector in model.detectors:
                if detector.needs_fit:
                    detector.partial_fit(features)
        return model

    def _scores(self, model: Scored, images: Tensor, context: TrainContext) -> dict[str, Tensor]:
        tap = _tap(model, context)
        parts: dict[str, list[Tensor]] = {repr(detector): [] for detector in model.detectors}
        for batch in images.split(_BATCH):
            features = tap(as_pixels(batch, context.device))
            for detector in model.detectors:
                parts[repr(detector)].append(detector.score(features).cpu())
        return {name: torch.cat(scores) for name, scores in parts.items()}

    def inputs(self, images: Tensor) -> Tensor:
        """Return what the network is trained on, of images (n, 3, 32, 32)."""
        return images

    @abstractmethod
    def network(self, seed: int) -> nn.Module:
        """Return the network with the initial weights of a seed."""

    @abstractmethod
    def detectors(self) -> list[Detector]:
        """Return the detectors that it is scored by, not yet fitted."""


@dataclass(frozen=True)
class MoCo(_Framework):
    """The paper's own system (6.4, C.1): NAN, SSD, KNN and their fusions on a MoCo-v2 network.

    "The train dataset is augmented randomly with 90-degree rotations": each of the four turns of an image is an
    input of its own, so an epoch here is four of the paper's. Images are turned in training alone.

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    recipe : of its training; the paper's is that of its label-free CIFAR-10 networks.
    k : of KNN.
    """

    width: int = 64
    recipe: PaperRecipe = MOCO
    k: int = 50

    def inputs(self, images: Tensor) -> Tensor:
        """Return every image in its four turns, (4 n, 3, 32, 32)."""
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
    recipe : of its training.
    """

    width: int = 64
    recipe: PaperRecipe = PRESETS["CSI"]

    def network(self, seed: int) -> nn.Module:
        """Return the ResNet-18 with CSI's two heads."""
        return cifar_network_with(CSIHead, self.width, seed=seed)

    def detectors(self) -> list[Detector]:
        """Return CSI's score."""
        return [CSIScore()]


def _tap(model: Scored, context: TrainContext) -> FeatureTap:
    fast_layout(model.to(context.device))
    return FeatureTap(model.network) if context.fabric is None else AutocastTap(model.network, context.fabric)
