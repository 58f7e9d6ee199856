"""`ImageScorer`: a scorer with all that it needs to judge image files, in one file."""

import copy
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from featnorm import archive
from featnorm.data import ImageSource, image_loader
from featnorm.models import LoadedModel, ModelError, create_model, is_users
from featnorm.scorer import Scorer
from featnorm.training import ProjectionHead, cut_classifier

_BLOCKS = 8
# Of a value that was divided by a channel's deviation; libraries resize a little differently over the years.
_TOLERANCE = 0.05


class ImageVerdict(NamedTuple):
    """What an `ImageScorer` says of one image.

    Attributes
    ----------
    name : str
        The image's file, or its row.
    score : float or None
        Higher is more in-distribution; None where the image cannot be read.
    p_value : float or None
        Conformal; small is OOD.
    is_id : bool or None
        Whether the score reaches the threshold.
    predicted : str or None
        The class, where the head was trained on labels.
    error : str or None
        Why the image cannot be read.
    """

    name: str
    score: float | None
    p_value: float | None
    is_id: bool | None
    predicted: str | None
    error: str | None


@dataclass
class ImageScorer:
    """Judges images: a frozen backbone, the head that was trained on it, a detector, a calibration.

    `featnorm.fit_images` makes one.

    Parameters
    ----------
    backbone : the specification that `featnorm.models.create_model` made the backbone by.
    scorer : of ``Sequential(backbone, head)``, calibrated.
    transform : from a PIL image in RGB to what the backbone takes.
    class_names : what the head's logits are of; None where it was not trained on labels.
    facts : what a reader of its verdicts should know, by short names.
    """

    backbone: str
    scorer: Scorer
    transform: Callable[[Image.Image], Tensor]
    class_names: list[str] | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Channels, height and width of what the transform makes of a photograph."""
        return tuple(self.transform(Image.new("RGB", (256, 256))).shape)

    def stream(
        self,
        source: ImageSource,
        *,
        batch_size: int = 64,
        workers: int | None = None,
        fabric: Any = None,
    ) -> Iterator[list[ImageVerdict]]:
        """Yield the verdicts of a source's images batch by batch, in its order, those that cannot be read as well.

        Parameters
        ----------
        source : the images.
        batch_size, workers : of `featnorm.data.image_loader`.
        fabric : a `lightning_fabric.Fabric` for precision; the scorer stays on the device where it is.

        Raises
        ------
        DataError
            The transform fails on an image.
        ValueError
            The model gives a value that is not finite.
        """
        reasons: list[str] = []
        loader = image_loader(
            source,
            self.transform,
            batch_size=batch_size,
            workers=workers,
            on_corrupt=lambda _, why: reasons.append(why),
        )
        done = 0
        for batch in loader:
            end = min((int(batch.indices[0]) // batch_size + 1) * batch_size, len(source))
            images = batch.images.contiguous(memory_format=torch.channels_last)
            with nullcontext() if fabric is None else fabric.autocast():
                verdict = self.scorer(images.to(self.scorer.tap.device))
            columns = zip(*(self._column(values, batch.images) for values in verdict[:3]), strict=True)
            predicted = self._predicted(verdict.logits, len(batch.images))
            judged = {
                i: ImageVerdict(source.name(i), score, p, is_id, name, None)
                for i, (score, p, is_id), name in zip(batch.indices.tolist(), columns, predicted, strict=True)
            }
            yield [judged.get(i) or _unread(source.name(i), reasons.pop(0)) for i in range(done, end)]
            done = end
        if done < len(source):
            yield [_unread(source.name(i), reasons.pop(0)) for i in range(done, len(source))]

    @staticmethod
    def _column(values: Tensor | None, images: Tensor) -> list[Any]:
        return [None] * len(images) if values is None else values.tolist()

    def _predicted(self, logits: Tensor | None, count: int) -> list[str | None]:
        if self.class_names is None or logits is None:
            return [None] * count
        return [self.class_names[i] for i in logits.argmax(1).tolist()]

    def save(self, path: str | Path) -> None:
        """Write everything to one file, weights included: safetensors with a JSON header, no pickle.

        Raises
        ------
        NotFittedError
            The detector learns and has not been fitted.
        TypeError
            The scorer is of another kind of model.
        """
        tensors, header = self.scorer.content()
        model = self.scorer.model
        if not (isinstance(model, nn.Sequential) and len(model) == 2 and isinstance(model[1], ProjectionHead)):
            raise TypeError("an ImageScorer holds Sequential(backbone, head), as featnorm.fit_images makes it")
        tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors["transform"] = _impression(self.transform)
        header["images"] = {
            "backbone": self.backbone,
            "head": _settings(model[1]),
            "classes": self.class_names,
            "facts": self.facts,
        }
        archive.write(path, tensors, header)

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> Self:
        """Read what `save` wrote. Nothing in the file is ever run, and no module that it names is imported.

        Parameters
        ----------
        path : the file.
        model
            ``MODULE:FUNCTION``, for a file whose backbone is the user's own; it is called for the backbone, whose
            weights are then the file's.

        Raises
        ------
        FileNotFoundError
            There is no such file.
        ArchiveError
            The file is damaged, of a later format, holds no image scorer, or does not fit what is installed here.
        ModelError
            The file's backbone is the user's own, and `model` is not given, or does not work.
        """
        tensors, header = archive.read(path)
        kept = header.get("images")
        if kept is None:
            raise archive.ArchiveError(
                f"{path} holds a detector without its model: read it by featnorm.Scorer.load(path, model)"
            )
        try:
            spec, head = kept["backbone"], ProjectionHead(**kept["head"])
            classes, facts = kept["classes"], kept["facts"]
            weights = {name.removeprefix("model."): t for name, t in tensors.items() if name.startswith("model.")}
            impression = tensors["transform"]
            if classes is not None and len(classes) != kept["head"]["classes"]:
                raise ValueError(f"it names {len(classes)} classes for {kept['head']['classes']} logits")
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise archive.ArchiveError(f"{path} is damaged: {error}") from None
        loaded = _architecture(spec, model, path)
        network = nn.Sequential(backbone_of(loaded), head).to(memory_format=torch.channels_last)
        try:
            network.load_state_dict(weights)
        except RuntimeError as error:
            raise archive.ArchiveError(f"{path} does not fit {loaded.name}: {error}") from None
        rest = {name: value for name, value in tensors.items() if name != "transform"}
        scorer = Scorer.from_content(rest, header, network.eval(), path)
        made = _impression(loaded.transform)
        if made.shape != impression.shape or (made - impression).abs().max() > _TOLERANCE:
            raise archive.ArchiveError(
                f"{path} was made with another transform of {spec} than is installed here: fit again"
            )
        return cls(spec, scorer, loaded.transform, classes, facts)


def backbone_of(loaded: LoadedModel) -> nn.Module:
    """Return a copy of a model without its classifier; a user's own that has none is taken to return features."""
    try:
        return cut_classifier(loaded.model)[0]
    except ValueError:
        if is_users(loaded.name):
            return copy.deepcopy(loaded.model)
        raise


def _settings(head: ProjectionHead) -> dict[str, Any]:
    """Return the arguments that make a head like this one."""
    classifier: Any = head.classifier
    return {
        "inputs": head.hidden.in_features,
        "classes": len(classifier.weight),
        "hidden": head.hidden.out_features,
        "embedding": head.embedding.out_features,
        "temperature": classifier.temperature,
    }


def _architecture(spec: str, model: str | None, path: str | Path) -> LoadedModel:
    """Return a backbone without the weights that matter; only what the caller names is imported."""
    if is_users(spec):
        if model is None:
            raise ModelError(
                f"{path} was fitted on a model of yours, {spec}: name it again, as opening a file imports nothing"
            )
        return create_model(model)
    if model is not None:
        raise ModelError(f"{path} was fitted on {spec}, which needs no model to be named")
    try:
        return create_model(spec, pretrained=False)
    except ModelError as error:
        raise archive.ArchiveError(f"{path} does not fit what is installed here: {error}") from None


def _impression(transform: Callable[[Image.Image], Tensor]) -> Tensor:
    """Return what a transform makes of a picture, coarsely, to know it by: (c, 8, 8)."""
    ramp = np.arange(256, dtype=np.uint8)
    red, green = np.meshgrid(ramp, ramp[::-1][:192])
    picture = Image.fromarray(np.stack([red, green, red // 2 + green // 4], 2))
    return nn.functional.adaptive_avg_pool2d(transform(picture).float(), _BLOCKS)


def _unread(name: str, why: str) -> ImageVerdict:
    return ImageVerdict(name, None, None, None, None, why)
