"""`Contents`: the modules and tensors of a model, which are listed again only when they have changed."""

from collections.abc import Callable, Iterator
from itertools import chain, repeat
from operator import attrgetter, is_, itemgetter
from typing import Any

import torch
from torch import Tensor, nn

# These run once per module or tensor and call, without a line of Python for each. After a forward pass, most of
# their time goes into fetching memory again, so they read as little of it as possible.
_PARTS: Callable[[dict[str, Any]], Any] = itemgetter("_modules", "_parameters", "_buffers")
_VERSION: Callable[[Tensor], int] = attrgetter("_version")


class Contents:
    """The modules and the tensors of a model, at the time when the object is made.

    Parameters
    ----------
    model : the model.

    Attributes
    ----------
    modules : list of Module
        Every module, once.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [*model.modules()]
        self._attributes = [*map(vars, self.modules)]
        self._parts = [*self._present()]
        self._filled = [part for part in self._parts if part]
        self._empty = [part for part in self._parts if not part]
        self._values = [*chain.from_iterable(map(dict.values, self._filled))]
        persistent = {
            id(tensor)
            for module in self.modules
            for tensors in (module._parameters, module._buffers)
            for name, tensor in tensors.items()
            if name not in module._non_persistent_buffers_set
        }
        self._tensors = [value for value in self._values if isinstance(value, Tensor) and id(value) in persistent]
        self._ids = [*map(id, self._tensors)]
        self._first = next(model.parameters(), None)
        self._wraps = any("_orig_mod" in module._modules for module in self.modules)

    def _present(self) -> Iterator[dict[str, Any]]:
        return chain.from_iterable(map(_PARTS, self._attributes))

    def is_current(self) -> bool:
        """Whether the modules still have the same parts: modules, parameters and buffers."""
        if any(self._empty) or not all(map(is_, self._present(), self._parts)):
            return False
        values = [*chain.from_iterable(map(dict.values, self._filled))]
        return len(values) == len(self._values) and all(map(is_, values, self._values))

    def training(self) -> list[nn.Module]:
        """Return the modules that are in training mode."""
        # A module without the attribute, as `torch.compile` wraps others, has the mode of a module inside it.
        if not any(map(dict.get, self._attributes, repeat("training"))):
            return []
        return [module for module in self.modules if module.training]

    def is_compiled(self) -> bool:
        """Whether `torch.compile` compiled a part of the model."""
        return self._wraps or any(map(dict.get, self._attributes, repeat("_compiled_call_impl")))

    @property
    def device(self) -> torch.device:
        """Device of the first parameter; the CPU if there is none."""
        return torch.device("cpu") if self._first is None else self._first.device

    def versions(self) -> tuple[list[int], list[int], list[int]]:
        """Return the identity, the number of writes and the address of each tensor in the state of the model."""
        try:
            return self._ids, [*map(_VERSION, self._tensors)], [*map(Tensor.data_ptr, self._tensors)]
        except (
            RuntimeError
        ):  # an inference tensor has no version; a sparse tensor, or one of a subclass, no address
            writes = [0 if tensor.is_inference() else tensor._version for tensor in self._tensors]
            return self._ids, writes, [*map(_address, self._tensors)]


def _address(tensor: Tensor) -> int:
    try:
        return tensor.data_ptr()
    except RuntimeError:
        return 0
