"""`ImageScorer`: a scorer with everything needed to score image files, saved in one file."""

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
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
from featnorm.runtime import Runtime
from featnorm.scorer import Scorer

_BLOCKS = 8
# Share of the largest value; versions of libraries resize a little differently.
_TOLERANCE = 0.05


class ImageVerdict(NamedTuple):
    """Prediction of an `ImageScorer` for one image.

    Attributes
    ----------
    name : str
        File of the image, or its row in a table.
    score : float or None
        Score, higher for more in-distribution; None if the image cannot be read.
    p_value : float or None
        Conformal p-value, small for OOD.
    is_id : bool or None
        Whether the score is at or above the threshold.
    predicted : str or None
        Predicted class, if the head was trained on labels.
    error : str or None
        Why the image cannot be read.
    several : bool
        Whether the image is the first of several frames or pages of its file.
    why : Explanation or None
        Explanation of the score, if it was requested.
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
    """Scores images with a frozen backbone, the head that was trained on it, a detector and a calibration.

    `featnorm.fit_images` makes one.

    Parameters
    ----------
    backbone : specification from which `featnorm.models.loading.create_model` made the backbone.
    scorer : calibrated scorer of ``Sequential(backbone, head)``.
    transform : transform from an RGB PIL image to a tensor; several threads may call it at the same time.
    class_names : one name per logit. None if the head was not trained on labels.
    statistics : activation statistics of the head over the training images. Default: no explanations.
    facts : provenance shown with results, as label -> text.
    """

    backbone: str
    scorer: Scorer
    transform: Callable[[Image.Image], Tensor]
    class_names: list[str] | None = None
    statistics: ActivationStatistics | None = None
    facts: dict[str, str] = field(default_factory=dict)

    @property
    def input_size(self) -> tuple[int, ...]:
        """Channels, height and width of a transformed image."""
        return tuple(self.transform(Image.new("RGB", (256, 256))).shape)

    def stream(
        self,
        source: ImageSource,
        *,
        runtime: Runtime | None = None,
    ) -> Iterator[list[ImageVerdict]]:
        """Yield the verdicts on a source's images, including unreadable ones, batch by batch in its order.

        A batch that does not fit in the device's memory is scored in parts.

        Parameters
        ----------
        source : images to score.
        runtime
            Precision, batch size and workers. Default: `Runtime()`. The scorer stays on the device where it is.

        Raises
        ------
        DataError
            The transform fails on an image.
        ValueError
            An output of the model is not finite.
        """
        runtime = runtime or Runtime()

        def predict(images: Tensor) -> list[ImageVerdict]:
            return self._predict(images, [""] * len(images), runtime=runtime)

        size, workers = runtime.batch_size, runtime.workers
        for part in image_loader(source, self.transform, batch_size=size, workers=workers).parts():
            verdicts = {
                row: ImageVerdict(source.name(row), None, None, None, None, why)
                for row, why in part.unread.items()
            }
            if part.batch is not None:
                with self._users_forward(named(source, part.batch.indices.tolist())):
                    found = chain(*in_parts(predict, part.batch.images))
                for row, verdict in zip(part.batch.indices.tolist(), found, strict=True):
                    verdicts[row] = verdict._replace(name=source.name(row), several=row in part.several)
            yield [verdicts[row] for row in part.rows]

    @torch.no_grad()
    def predict_batch(
        self, images: Tensor, names: Sequence[str], *, explain: Sequence[int] = (), runtime: Runtime | None = None
    ) -> list[ImageVerdict]:
        """Return the verdicts on a batch of transformed images.

        Parameters
        ----------
        images : transformed images (n, c, h, w), on any device.
        names : one name per image.
        explain : rows of the images to explain.
        runtime : see `stream`.

        Raises
        ------
        ValueError
            An output of the model is not finite, or images are to be explained and there are no statistics.
        UserModelError
            The backbone is the user's own and raised an error.
        """
        with self._users_forward(f"a batch of {len(images)} images, {names[0]} to {names[-1]}" if names else ""):
            return self._predict(images, names, explain=explain, runtime=runtime)

    def _users_forward(self, inputs: str) -> AbstractContextManager[None]:
        model = self.scorer.model
        return users_forward(self.backbone, model[0] if isinstance(model, nn.Sequential) else model, inputs)

    def _predict(
        self, images: Tensor, names: Sequence[str], *, explain: Sequence[int] = (), runtime: Runtime | None = None
    ) -> list[ImageVerdict]:
        images = fast_layout(images.to(self.scorer.tap.device))
        reads_classifier = bool(explain) or "classifier" in self.scorer.detector.reads
        with (runtime or Runtime()).autocast():
            features = self.scorer.tap.capture(images, classifier=reads_classifier)
            verdict = self.scorer.predict_features(features)
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
        """Explain some rows of features that include the classifier."""
        if not rows:
            return []
        if self.statistics is None:
            raise ValueError("this scorer has no activation statistics of its training images: fit again")
        # A head's logits are linear in its activation up to a norm, so there is a classifier.
        assert features.classifier is not None
        weight, bias = features.classifier
        hidden = HiddenClassifier(
            features.tensor("activation")[list(rows)].float(),
            weight.float(),
            None if bias is None else bias.float().expand(len(rows), -1),
        )
        return explain(hidden, self.statistics, self.class_names or [f"cluster {k}" for k in range(len(weight))])

    def save(self, path: str | Path) -> None:
        """Write everything, including the weights, to one file: safetensors with a JSON header, no pickle.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        TypeError
            The model is not ``Sequential(backbone, head)``.
        OSError
            The file cannot be written. An earlier file of that name is kept.
        """
        tensors, header = self.scorer.fitted_tensors(), self.scorer.to_dict()
        model = self.scorer.model
        if not (isinstance(model, nn.Sequential) and len(model) == 2 and isinstance(model[1], ProjectionHead)):
            raise TypeError("an ImageScorer needs Sequential(backbone, head), as featnorm.fit_images makes it")
        tensors |= {f"model.{name}": value for name, value in model.state_dict().items()}
        tensors["transform"], tensors["response"] = _reference_outputs(self.backbone, self.transform, model[0])
        if self.statistics is not None:
            tensors |= {f"statistics.{name}": value for name, value in self.statistics.state_dict().items()}
        header["images"] = {
            "backbone": self.backbone,
            "head": _head_settings(model[1]),
            "classes": self.class_names,
            "facts": self.facts,
        }
        archive.write(path, tensors, header)

    def digest(self) -> str:
        """Return the SHA-256 of everything that verdicts depend on: weights, detector, calibration and classes.

        Raises
        ------
        NotFittedError
            The detector needs a fit and has none.
        """
        tensors, header = self.scorer.fitted_tensors(), self.scorer.to_dict()
        return archive.digest(tensors, {**header, "backbone": self.backbone, "classes": self.class_names})

    @classmethod
    def load(cls, path: str | Path, *, model: str | None = None) -> Self:
        """Read an image scorer that `save` wrote. No code in the file is run, and no module it names is imported.

        Parameters
        ----------
        path : file.
        model
            ``MODULE:FUNCTION`` that makes the backbone. Required if the backbone is the user's own; the weights
            are those of the file.

        Raises
        ------
        FileNotFoundError
            The file does not exist.
        ArchiveError
            The file is damaged, has a later format, is no image scorer, or does not fit the installed libraries.
        ModelError
            The backbone is the user's own, and `model` is missing or does not work.
        """
        tensors, header = archive.read(path)
        images = header.get("images")
        if images is None:
            raise archive.ArchiveError(
                f"{path} is a detector without its model: load it with featnorm.Scorer.load(path, model)"
            )
        try:
            weights, statistics = _with_prefix("model.", tensors), _statistics(tensors)
            spec, head = check_text(images["backbone"]), _head(images["head"], weights)
            classes, facts = images["classes"], images["facts"]
            saved_outputs = tensors["transform"].float(), tensors["response"].float()
            facts = {check_text(name): check_text(fact) for name, fact in facts.items()}
            if classes is not None:
                classes = [check_text(name) for name in classes]
                if len(classes) != images["head"]["classes"]:
                    raise ValueError(f"it names {len(classes)} classes for {images['head']['classes']} logits")
        except archive.MALFORMED as error:
            raise archive.damaged(path, error) from None
        loaded = _create_backbone(spec, model, path)
        network = fast_layout(nn.Sequential(backbone_of(loaded)[0], head))
        try:
            load_weights(network, weights)
        except RuntimeError as error:
            why = " ".join(str(error).split())
            raise archive.ArchiveError(f"{path} does not fit {loaded.name}: {why}") from None
        fit = {
            name: value
            for name, value in tensors.items()
            if name.startswith("detector.") or name == archive.CALIBRATION
        }
        scorer = Scorer.from_dict(header, fit, network.eval(), path)
        outputs = _reference_outputs(loaded.name, loaded.transform, network[0])
        for what, new, old in zip(("transform", "model"), outputs, saved_outputs, strict=True):
            # Not "differ", which a NaN would pass.
            alike = new.shape == old.shape and bool(
                (new - old).abs().max() <= _TOLERANCE * old.abs().max().clamp(min=1e-6)
            )
            if not alike:
                raise archive.ArchiveError(
                    f"{path} was made with another {what} of {spec} than the installed one: fit again"
                )
        image_scorer = cls(spec, scorer, loaded.transform, classes, statistics, facts)
        try:
            # What a head has, and what verdicts and explanations need.
            scorer.tap.require(("activation", "logits", "classifier"))
            image = loaded.transform(_reference_image()).float()[None]
            image_scorer.predict_batch(image, [""], explain=() if statistics is None else [0])
        except archive.MALFORMED as error:
            raise archive.ArchiveError(
                f"{path} is damaged: it cannot score an image ({first_line(error)})"
            ) from None
        return image_scorer


def backbone_of(loaded: LoadedModel) -> tuple[nn.Module, bool]:
    """Return a copy of a model without its classifier, and whether it had one.

    A user's own model without a classifier is assumed to return features.

    Raises
    ------
    ModelError
        The classifier of a library's model is not found, or the user's own model cannot be copied.
    """
    try:
        return cut_classifier(loaded.model)[0], True
    except ValueError as error:
        if is_users(loaded.name):
            return copy.deepcopy(loaded.model), False
        what = str(error).partition(":")[0]
        raise ModelError(
            f"{what}: write a function that returns the model without its last layers, and its transform, and "
            "pass it as MODULE:FUNCTION"
        ) from None
    except Exception as error:
        if not is_users(loaded.name):
            raise
        raise ModelError(
            f"the model of {loaded.name} cannot be copied without its classifier "
            f"({error_text(error)}{error_site(error)})"
        ) from error


def _statistics(tensors: Mapping[str, Tensor]) -> ActivationStatistics | None:
    """Return the activation statistics in a file, if any.

    Raises
    ------
    RuntimeError, ValueError
        They are not a state of `ActivationStatistics`.
    """
    state = _with_prefix("statistics.", tensors)
    if not state:
        return None
    statistics = ActivationStatistics()
    statistics.load_state_dict(state)
    statistics.validate()
    return statistics


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def _head_settings(head: ProjectionHead) -> dict[str, Any]:
    """Return the constructor arguments of a head."""
    classifier: Any = head.classifier
    return {
        "inputs": head.hidden.in_features,
        "classes": len(classifier.weight),
        "hidden": head.hidden.out_features,
        "embedding": head.embedding.out_features,
        "temperature": classifier.temperature,
    }


def _head(settings: Mapping[str, Any], weights: Mapping[str, Tensor]) -> ProjectionHead:
    """Return a head with the settings in a file, whose sizes must be those of the weights.

    Raises
    ------
    LookupError, TypeError, ValueError
        The sizes differ, or the settings are not those of a head.
    """
    hidden, embedding, classifier = (weights[f"1.{name}.weight"] for name in ("hidden", "embedding", "classifier"))
    sizes = {
        "inputs": hidden.shape[1],
        "classes": classifier.shape[0],
        "hidden": hidden.shape[0],
        "embedding": embedding.shape[0],
    }
    # Checked before a head is made that may not fit in memory.
    if {name: settings[name] for name in sizes} != sizes:
        raise ValueError(f"its weights are those of a head with {sizes}, but its settings are {dict(settings)}")
    with single_precision():
        return ProjectionHead(**settings)


def _create_backbone(spec: str, model: str | None, path: str | Path) -> LoadedModel:
    """Return the backbone, with weights that are to be replaced; imports only what the caller has named."""
    if is_users(spec):
        if model is None:
            raise ModelError(
                f"{path} was fitted on your own model {spec}, and opening a file imports nothing: pass it again "
                "(--model)"
            )
        return create_model(model)
    if model is not None:
        raise ModelError(f"{path} was fitted on {spec}, not on your own model: omit the model")
    try:
        own = spec.startswith("featnorm:") and spec != DEFAULT_MODEL
        return create_model(spec) if own else create_model(spec, pretrained=False)
    except ModelError as error:
        raise archive.ArchiveError(f"{path} does not fit what is installed here: {error}") from None


def _reference_image() -> Image.Image:
    ramp = np.arange(256, dtype=np.uint8)
    red, green = np.meshgrid(ramp, ramp[::-1][:192])
    return Image.fromarray(np.stack([red, green, red // 2 + green // 4], 2))


@torch.no_grad()
def _reference_outputs(
    spec: str, transform: Callable[[Image.Image], Tensor], backbone: nn.Module
) -> tuple[Tensor, Tensor]:
    """Return the outputs of transform, pooled to (c, 8, 8), and backbone, (D,), for a fixed image."""
    with users_transform(spec, "an image of two ramps"):
        transformed = transform(_reference_image()).float()
    parameter = next(backbone.parameters(), None)
    with users_forward(spec, backbone, "an image of two ramps"):
        features = backbone(transformed[None].to("cpu" if parameter is None else parameter.device))
    return nn.functional.adaptive_avg_pool2d(transformed, _BLOCKS), features[0].float().cpu()
