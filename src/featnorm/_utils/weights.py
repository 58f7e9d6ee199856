"""Weights and buffers, independent of the memory of the module and of torch's default dtype."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Self

import torch
from torch import Tensor, nn


@contextmanager
def single_precision() -> Iterator[None]:
    """Set torch's default dtype to float32, and restore it at the end."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def load_weights(module: nn.Module, weights: Mapping[str, Any], *, strict: bool = True) -> None:
    """Load a state dict, also into expanded tensors, whose elements share memory.

    Parameters
    ----------
    module, weights, strict
        See `torch.nn.Module.load_state_dict`.

    Raises
    ------
    RuntimeError
        If the weights do not fit the module.
    """
    for tensor in module.state_dict(keep_vars=True).values():
        if isinstance(tensor, Tensor) and any(
            size > 1 and stride == 0 for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
        ):
            tensor.data = tensor.data.contiguous()
    module.load_state_dict(weights, strict=strict)


class ExactModule(nn.Module):
    """Module whose parameters and buffers keep their type if it, or a module around it, is cast to another one."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        def move_only(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move_only, recurse)  # type: ignore[no-untyped-call]
        return self
