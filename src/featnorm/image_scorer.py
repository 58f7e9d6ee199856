"""`ImageScorer`: a scorer with all that it needs to judge image files, in one file."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from featnorm import archive
from featnorm._utils.checks import check_text
from featnorm._utils.errors import error_site, error_text, first_line
from featnorm._utils.layout import fast_layout
from featnorm._utils.memory import in_parts
from featnorm._utils.weights import load_weights, single_precision
from featnorm.features import Features
from featnorm.hidden.classifier import HiddenClassifier
from featnorm.hidden.explanation import Explanation, explain
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.inputs import ImageSource, image_loader
from featnorm.inputs.loading import named
from featnorm.models import DEFAULT_MODEL, LoadedModel, ModelError, ProjectionHead, create_model, cut_classifier
from featnorm.models.loading import is_users, users_forward, users_transform
from featnorm.scorer import Scorer

_BLOCKS = 8
# As a share of the largest value; libraries resize a little differently over the years.
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
    several : bool
        Whether the image is the first of several frames or pages of its file.
    why : Explanation or None
        Why it scores as it does, where that was asked.
    """

    name: str
    score: float | None
    p_value: float | None
    is_id: bool | None
    predicted: str | None
    error: str | None
    several: bool = False
    why: Explanation | None = None


@dataclass
class ImageScorer:
    """Judges images: a frozen backbone, the head that was trained on it, a detector, a calibration.

    `featnorm.fit_images` makes one.

    Parameters
    ----------
    backbone : the specification that `featnorm.models.loading.create_model` made the backbone by.
    scorer : of ``Sequential(backbone, head)``, calibrated.
    transform : from a PIL image in RGB to what the backbone takes; several threads may call it at the same time.
    class_names : what the head's logits are of; None where it was not trained on labels.
    statistics : of the head's hidden layer, over the images that were learned from; None for no explanations.
    facts : what a reader of its verdicts should know, by short names.
    """

    backbone: str
    scorer: Scorer
    transform: Callable[[Image.Image], Tensor]
    class_names: list[str] | None = None
    statistics: ActivationStatistics | None = None
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

        Where the device has not the memory for a batch, parts of it are judged.

        Parameters
        ----------
        source : the images.
        batch_size, workers : of `featnorm.inputs.image_loader`.
        fabric : a `lightning_fabric.Fabric` for precision; the scorer stays on the device where it is.

        Raises
        ------
        DataError
            The transform fails on an image.
        ValueError
            The model gives a value that is not finite.
        """

        def ask(images: Tensor) -> list[ImageVerdict]:
            return self._judge(images, [""] * len(images), fabric=fabric)

        for part in image_loader(source, self.transform, batch_size=batch_size, workers=workers).parts():
            verdicts = {
                row: ImageVerdict(source.name(row), None, None, None, None, why)
                for row, why in part.unread.items()
            }
            if part.batch is not None:
                with self._users_forward(named(source, part.batch.indices.tolist())):
                    judged = chain(*in_parts(ask, part.batch.images))
                for row, verdict in zip(part.batch.indices.tolist(), judged, strict=True):
                    verdicts[row] = verdict._replace(name=source.name(row), several=row in part.several)
            yield [verdicts[row] for row in part.rows]

    @torch.no_grad()
    def judge(
        self, images: Tensor, names: Sequence[str], *, explain: Sequence[int] = (), fabric: Any = None
    ) -> list[ImageVerdict]:
        """Return the verdicts of images that the transform has made ready, (n, c, h, w).

        Parameters
        ----------
        images : the batch, on any device.
        names : what to call each of them.
        explain : the rows of the images to explain, too.
        fabric : see `stream`.

        Raises
        ------
        ValueError
            The model gives a value that is not finite; or images are to be explained, and there are no statistics
            to do so by.
        UserModelError
            The backbone is the user's own and raised an error.
        """
        with self._users_forward(f"a batch of {len(images)} images, {names[0]} to {names[-1]}" if names else ""):
            return self._judge(images, names, explain=explain, fabric=fabric)

    def _users_forward(self, inputs: str) -> AbstractContextManager[None]:
        model = self.scorer.model
        return users_forward(self.backbone, model[0] if isinstance(model, nn.Sequential) else model, inputs)

    def _judge(
        self, images: Tensor, names: Sequence[str], *, explain: Sequence[int] = (), fabric: Any = None
    ) -> list[ImageVerdict]:
        images = fast_layout(images.to(self.scorer.tap.device))
        reads_classifier = bool(explain) or "classifier" in self.scorer.detector.reads
        with nullcontext() if fabric is None else fabric.autocast():
            features = self.scorer.tap.capture(images, classifier=reads_classifier)
            verdict = self.scorer.judge(features)
        nothing = [None] * len(images)
        p_values, is_id = (nothing if v is None else v.tolist() for v in (verdict.p_value, verdict.is_id))
        predicted: list[Any] = nothing
        if self.class_names is not None and verdict.logits is not None:
            predicted = [self.class_names[i] for i in verdict.logits.argmax(1).tolist()]
        columns = (names, verdict.score.tolist(), p_values, is_id, predicted)
        verdicts = [ImageVerdict(*row, None) for row in zip(*columns, strict=True)]
        for row, why in zip(explain, self._explained(features, explain), strict=True):
            verdicts[row] = verdicts[row]._replace(why=why)
        return verdicts

    def _explained(self, features: Features, rows: Sequence[int]) -> list[Explanation]:
        """Explain some of the inputs that the features, with the classifier, are of."""
        if not rows:
            return []
        if self.statistics is None:
            raise ValueError("this scorer holds no statistics of the images that it learned from: fit again")
        # A head's logits are linear in its activation, but for a length, so that there is a classifier.
        assert features.classifier is not None
        weight, bias = features.classifier
        hidden = HiddenClassifier(
            features.tensor("activation")[list(rows)].float(),
            weight.float(),
            None if bias is None else bias.float().expand(len(rows), -1),
        )
        return explain(hidden, self.statistics, self.class_names or [f"cluster {k}" for k in range(len(weight))])

    def save(self, path: str | Path) -> None:
        """Write everything to one file, weights included: safetensors with a JSON header, no pickle.

        Raises
        ------
        NotFittedError
            The detector learns and has not been fitted.
        TypeError
            The scorer is of another kind of model.
        OSError
            The file cannot be written; an earlier one of that name stays.
        """
        tensors, header = self.scorer.content()
        model = self.scorer.model
        if not (isinstance(model, nn.Sequential) and len(model) == 2 and isinstance(model[1], ProjectionHead)):
            raise TypeError("an ImageScorer holds Sequential(backbone, head), as featnorm.fit_images makes it")
        tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors["transform"], tensors["response"] = _impression(self.backbone, self.transform, model[0])
        if self.statistics is not None:
            tensors |= {f"statistics.{name}": value for name, value in self.statistics.state_dict().items()}
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
            weights, statistics = _under("model.", tensors), _statistics(tensors)
            spec, head = check_text(kept["backbone"]), _head(kept["head"], weights)
            classes, facts = kept["classes"], kept["facts"]
            kept_impression = tensors["transform"].float(), tensors["response"].float()
            facts = {check_text(name): check_text(fact) for name, fact in facts.items()}
            if classes is not None:
                classes = [check_text(name) for name in classes]
                if len(classes) != kept["head"]["classes"]:
                    raise ValueError(f"it names {len(classes)} classes for {kept['head']['classes']} logits")
        except archive.MALFORMED as error:
            raise archive.damaged(path, error) from None
        loaded = _architecture(spec, model, path)
        network = fast_layout(nn.Sequential(backbone_of(loaded)[0], head))
        try:
            load_weights(network, weights)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise archive.ArchiveError(f"{path} does not fit {loaded.name}: {why}") from None
        own = {
            name: value
            for name, value in tensors.items()
            if name.startswith("detector.") or name == archive.CALIBRATION
        }
        scorer = Scorer.from_content(own, header, network.eval(), path)
        made = _impression(loaded.name, loaded.transform, network[0])
        for what, new, old in zip(("transform", "model"), made, kept_impression, strict=True):
            # Not the other way round, where a NaN would pass.
            alike = new.shape == old.shape and bool(
                (new - old).abs().max() <= _TOLERANCE * old.abs().max().clamp(min=1e-6)
            )
            if not alike:
                raise archive.ArchiveError(
                    f"{path} was made with another {what} of {spec} than is installed here: fit again"
                )
        made_of = cls(spec, scorer, loaded.transform, classes, statistics, facts)
        try:
            # What a head has, and verdicts and explanations read.
            scorer.tap.require(("activation", "logits", "classifier"))
            image = loaded.transform(_picture()).float()[None]
            made_of.judge(image, [""], explain=() if statistics is None else [0])
        except archive.MALFORMED as error:
            raise archive.ArchiveError(
                f"{path} is damaged: it cannot score an image ({first_line(error)})"
            ) from None
        return made_of


def backbone_of(loaded: LoadedModel) -> tuple[nn.Module, bool]:
    """Return a copy of a model without its classifier, and whether it had one.

    A user's own model that has none is taken to return features.

    Raises
    ------
    ModelError
        The classifier of a model of a library is not found, or a model of the user's own cannot be copied.
    """
    try:
        return cut_classifier(loaded.model)[0], True
    except ValueError as error:
        if is_users(loaded.name):
            return copy.deepcopy(loaded.model), False
        what = str(error).partition(":")[0]
        raise ModelError(
            f"{what}: write a function that returns the model without its last layers, and its transform, and "
            "name it by MODULE:FUNCTION"
        ) from None
    except Exception as error:
        if not is_users(loaded.name):
            raise
        raise ModelError(
            f"the model of {loaded.name} cannot be copied without its classifier "
            f"({error_text(error)}{error_site(error)})"
        ) from error


def _statistics(tensors: Mapping[str, Tensor]) -> ActivationStatistics | None:
    """Return what a file knows of the images that were learned from.

    Raises
    ------
    RuntimeError, ValueError
        It is none that `ActivationStatistics` could have saved.
    """
    kept = _under("statistics.", tensors)
    if not kept:
        return None
    statistics = ActivationStatistics()
    statistics.load_state_dict(kept)
    statistics.validate()
    return statistics


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


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


def _head(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ProjectionHead:
    """Return a head of the settings in a file, whose sizes must be those of its weights.

    Raises
    ------
    LookupError, TypeError, ValueError
        They are not, or are no settings of a head.
    """
    hidden, embedding, classifier = (weights[f"1.{name}.weight"] for name in ("hidden", "embedding", "classifier"))
    sizes = {
        "inputs": hidden.shape[1],
        "classes": classifier.shape[0],
        "hidden": hidden.shape[0],
        "embedding": embedding.shape[0],
    }
    # Before a head is made that may be larger than the memory.
    if {name: settings[name] for name in sizes} != sizes:
        raise ValueError(f"its weights are of a head of {sizes}, and it names {dict(settings)}")
    with single_precision():
        return ProjectionHead(**settings)


def _architecture(spec: str, model: str | None, path: str | Path) -> LoadedModel:
    """Return a backbone without the weights that matter; only what the caller names is imported."""
    if is_users(spec):
        if model is None:
            raise ModelError(
                f"{path} was fitted on a model of yours, {spec}: opening a file imports nothing, so name it again "
                "(--model)"
            )
        return create_model(model)
    if model is not None:
        raise ModelError(f"{path} was fitted on {spec}, which needs no model to be named")
    try:
        own = spec.startswith("featnorm:") and spec != DEFAULT_MODEL
        return create_model(spec) if own else create_model(spec, pretrained=False)
    except ModelError as error:
        raise archive.ArchiveError(f"{path} does not fit what is installed here: {error}") from None


def _picture() -> Image.Image:
    ramp = np.arange(256, dtype=np.uint8)
    red, green = np.meshgrid(ramp, ramp[::-1][:192])
    return Image.fromarray(np.stack([red, green, red // 2 + green // 4], 2))


@torch.no_grad()
def _impression(
    spec: str, transform: Callable[[Image.Image], Tensor], backbone: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return what a transform makes of a picture, coarsely (c, 8, 8), and a backbone of that (D,)."""
    with users_transform(spec, "a picture of two ramps"):
        made = transform(_picture()).float()
    parameter = next(backbone.parameters(), None)
    with users_forward(spec, backbone, "a picture of two ramps"):
        features = backbone(made[None].to("cpu" if parameter is None else parameter.device))
    return nn.functional.adaptive_avg_pool2d(made, _BLOCKS), features[0].float().cpu()
