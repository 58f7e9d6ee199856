"""Memory layout of networks and their inputs, for training and scoring alike."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_TensorOrModule = TypeVar("_TensorOrModule", bound=Tensor | nn.Module)

# Numbers of input channels for which the bug that `safe_gradients` avoids was seen.
_NARROW = range(2, 8)


def fast_layout(value: _TensorOrModule) -> _TensorOrModule:
    """Return a network or a batch in the channels-last layout, in which convolutions are fastest.

    Parameters
    ----------
    value : Tensor or nn.Module
        A network, whose four-dimensional weights are rearranged in place, or a batch. A batch that is not
        (n, c, h, w) is returned as it is. The values stay the same.
    """
    if isinstance(value, nn.Module):
        # Not `nn.Module.to`, which raises an error for the weights of a Conv3d.
        for tensor in (*value.parameters(), *value.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    elif value.ndim == 4:
        return cast(_TensorOrModule, value.contiguous(memory_format=torch.channels_last))
    return value


def safe_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """Return a context in which the backward pass through a model is safe for every convolution.

    oneDNN's AVX2 kernel of the backward pass writes past its buffer and corrupts the heap for a float32 1x1
    convolution without padding or groups, with a stride and 2 to 7 input channels, if the input or the weight is
    channels last. Minimal example with torch 2.14.1 (``ONEDNN_MAX_CPU_ISA=AVX2`` on a CPU with newer extensions)::

        c = nn.Conv2d(4, 16, 1, stride=2).to(memory_format=torch.channels_last)
        x = torch.randn(8, 4, 32, 32).contiguous(memory_format=torch.channels_last)
        c(x).sum().backward()  # five times

    In this context, the backward pass of such a convolution gets its tensors in the contiguous layout. This
    function can be removed once the minimal example works in every torch version that featnorm supports.

    Parameters
    ----------
    model : nn.Module
        The model. If it has no weight of that shape, the context does nothing.
    """
    tensors = (*model.parameters(), *model.buffers())
    if not any(_is_narrow(tensor) for tensor in tensors):
        return nullcontext()
    return _ContiguousWhereNarrow()  # type: ignore[no-untyped-call]


class _ContiguousWhereNarrow(TorchDispatchMode):
    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is not torch.ops.aten.convolution_backward.default:
            return func(*args, **(kwargs or {}))
        inputs, weight, stride, groups = args[1], args[2], args[4], args[9]
        if not (_is_narrow(weight) and max(stride) > 1 and groups == 1):
            return func(*args, **(kwargs or {}))
        # Not `contiguous`, which returns a 1x1 kernel as it is: it is in both layouts.
        plain = (tensor.clone(memory_format=torch.contiguous_format) for tensor in args[:3])
        gradients = func(*plain, *args[3:], **(kwargs or {}))
        if not (_is_last(inputs) or _is_last(weight)):
            return gradients
        # Compiled code expects the layout that it was traced with.
        return tuple(fast_layout(gradient) if isinstance(gradient, Tensor) else None for gradient in gradients)


def _is_narrow(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.shape[1] in _NARROW and tuple(weight.shape[2:]) == (1, 1)


def _is_last(tensor: Tensor) -> bool:
    """Whether torch treats a tensor (n, c, h, w) as channels last."""
    return tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]
