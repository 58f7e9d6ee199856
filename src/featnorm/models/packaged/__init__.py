"""Networks that come with the package, trained by it: `load_model`."""

import json
from importlib.resources import as_file, files
from typing import Any

from safetensors import safe_open
from torch import nn

from featnorm._utils.weights import single_precision
from featnorm.models.cifar import cifar_network

_SUFFIX = ".safetensors"


def model_names() -> list[str]:
    """Return the names that `load_model` knows."""
    return sorted(place.name.removesuffix(_SUFFIX) for place in files(__name__).iterdir() if _SUFFIX in place.name)


def load_model(name: str) -> nn.Sequential:
    """Return a trained network by name, for pixels between 0 and 1, in evaluation mode.

    ``"cifar10-resnet18"`` takes images (n, 3, 32, 32) to logits (n, 10) in the order of CIFAR-10's classes; it has
    the paper's head, so that every detector works on it. How it was made, and what it reaches, is in its card,
    ``featnorm/models/packaged/cifar10-resnet18.md``.

    Parameters
    ----------
    name : one of `model_names`.

    Raises
    ------
    ValueError
        There is no model of that name.
    """
    return _read(name)[0]


def model_facts(name: str) -> dict[str, Any]:
    """Return what is known of a model: its ``network``, and the ``result`` that was published with it.

    Raises
    ------
    ValueError
        There is no model of that name.
    """
    return _read(name)[1]


def _read(name: str) -> tuple[nn.Sequential, dict[str, Any]]:
    if name not in model_names():
        raise ValueError(f"there is no model {name!r}; available: {', '.join(model_names())}")
    with as_file(files(__name__).joinpath(name + _SUFFIX)) as path, safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["featnorm"])
        weights = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    with single_precision():
        model = cifar_network(**facts["network"])
    # The weights are kept in half precision, and computed with in single.
    model.load_state_dict(
        {key: value.float() if value.is_floating_point() else value for key, value in weights.items()}
    )
    return model.eval(), facts
