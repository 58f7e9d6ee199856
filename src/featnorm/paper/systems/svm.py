"""One-class SVMs on pixels and on the features of an autoencoder (Schölkopf et al., NeurIPS 1999)."""

from dataclasses import asdict, dataclass

from torch import Tensor, nn

from featnorm.detectors import OneClassSVM
from featnorm.features import Features
from featnorm.paper.systems.base import OneClassModel, TrainContext, predict
from featnorm.paper.systems.lenet import train_autoencoder
from featnorm.runtime import Runtime

_PIXELS = "OC-SVM on pixels"
_CODE = "OC-SVM on an autoencoder"


class Boundaries(nn.Module):
    """The boundary of the training images' pixels, and the boundary of their codes."""

    def __init__(self, encoder: nn.Module, nu: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.of_pixels = OneClassSVM(nu)
        self.of_code = OneClassSVM(nu)


@dataclass(frozen=True)
class SVM(OneClassModel[Boundaries]):
    """The decision functions of two `featnorm.OneClassSVM`, one on pixels and one on an autoencoder's codes.

    The published numbers (Golan and El-Yaniv, NeurIPS 2018) have the kernel width and nu that are best on the test
    images; here both are set without them. The autoencoder is Deep-SVDD's.

    Parameters
    ----------
    nu : see `featnorm.OneClassSVM`.
    width, autoencoder_epochs, autoencoder_drop, batch_size, lr, weight_decay
        Settings of the autoencoder, see `DeepSVDD`.
    """

    nu: float = 0.1
    width: int = 128
    autoencoder_epochs: int = 350
    autoencoder_drop: int = 250
    batch_size: int = 200
    lr: float = 1e-4
    weight_decay: float = 0.5e-6

    def _train(self, images: Tensor, context: TrainContext) -> Boundaries:
        encoder = train_autoencoder(images, asdict(self), context)
        model = Boundaries(encoder, self.nu)
        model.of_pixels.fit(_pixels(images))
        model.of_code.fit(Features(pooled=predict(encoder, images, context.runtime)))
        return model.eval()

    def _scores(self, model: Boundaries, images: Tensor, runtime: Runtime) -> dict[str, Tensor]:
        return {
            _PIXELS: model.of_pixels.score(_pixels(images)),
            _CODE: model.of_code.score(Features(pooled=predict(model.encoder, images, runtime))),
        }


def _pixels(images: Tensor) -> Features:
    return Features(pooled=images.flatten(1).float() / 255)
