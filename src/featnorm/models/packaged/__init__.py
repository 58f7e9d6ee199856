"""Networks that are included in the package and were trained with it: `load_model`."""

import json
from importlib.resources import as_file, files
from typing import Any

from safetensors import safe_open
from torch import nn

from featnorm._utils.weights import single_precision
from featnorm.models.cifar import cifar_network

_SUFFIX = ".safetensors"


def model_names() -> list[str]:
    """Return the names of the networks that `load_model` can load.

    Examples
    --------
    >>> model_names()
    ['cifar10-resnet18']
    """
    return sorted(place.name.removesuffix(_SUFFIX) for place in files(__name__).iterdir() if _SUFFIX in place.name)


def load_model(name: str) -> nn.Sequential:
    """Return a trained network by name, for pixels in [0, 1], in evaluation mode.

    ``"cifar10-resnet18"`` maps images (n, 3, 32, 32) to logits (n, 10), in the order of CIFAR-10's classes. It has
    the paper's head, so that every detector works on it. Its model card,
    ``featnorm/models/packaged/cifar10-resnet18.md``, describes its training and accuracy.

    Parameters
    ----------
    name : one of `model_names`.

    Raises
    ------
    ValueError
        There is no network of that name.

    Examples
    --------
    >>> cifar = load_model("cifar10-resnet18")
    >>> cifar(torch.rand(2, 3, 32, 32)).shape
    torch.Size([2, 10])
    """
    return _read(name)[0]


def model_facts(name: str) -> dict[str, Any]:
    """Return the facts about a network: its settings, ``network``, and its published results, ``result``.

    Raises
    ------
    ValueError
        There is no network of that name.
    """
    return _read(name)[1]


def _read(name: str) -> tuple[nn.Sequential, dict[str, Any]]:
    if name not in model_names():
        raise ValueError(f"unknown model {name!r}; available: {', '.join(model_names())}")
    with as_file(files(__name__).joinpath(name + _SUFFIX)) as path, safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["featnorm"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with single_precision():
        model = cifar_network(**facts["network"])
    # Weights are stored in half precision, but used in single precision.
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    )
    return model.eval(), facts
