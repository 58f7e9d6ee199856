"""Memory layout of networks and their inputs: decided here, for training and for scoring alike."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

_Arranged = TypeVar("_Arranged", bound=Tensor | nn.Module)

# The fault that `safe_gradients` avoids was seen with 2 to 7 input channels.
_NARROW = range(2, 8)


def fast_layout(value: _Arranged) -> _Arranged:
    """Return a network or a batch in the layout that convolutions are fastest in, channels last.

    Parameters
    ----------
    value
        A network, whose weights of four dimensions are rearranged in place, or a batch; a batch that is not
        (n, c, h, w) is returned as it is. The values stay the same.
    """
    if isinstance(value, nn.Module):
        # Not by `nn.Module.to`, which refuses the weights of a Conv3d.
        for tensor in (*value.parameters(), *value.buffers()):
            if tensor.ndim == 4:
                tensor.data = tensor.data.contiguous(memory_format=torch.channels_last)
    elif value.ndim == 4:
        return cast(_Arranged, value.contiguous(memory_format=torch.channels_last))
    return value


def safe_gradients(model: nn.Module) -> AbstractContextManager[Any]:
    """Return the context for a backward pass through a model, which is then safe for every convolution.

    oneDNN's AVX2 kernel of the backward pass writes past its buffer, and so corrupts the heap, for a float32 1x1
    convolution without padding or groups, with a stride and 2 to 7 input channels, where the input or the weight
    is channels last. Minimal case with torch 2.14.1 (``ONEDNN_MAX_CPU_ISA=AVX2`` where the processor has more)::

        c = nn.Conv2d(4, 16, 1, stride=2).to(memory_format=torch.channels_last)
        x = torch.randn(8, 4, 32, 32).contiguous(memory_format=torch.channels_last)
        c(x).sum().backward()  # five times

    In this context the backward pass of such a convolution, whoever called it, gets its tensors in the contiguous
    layout. Whoever finds the minimal case mended in every torch that featnorm supports can remove this function.

    Parameters
    ----------
    model : only if it holds a weight of that shape is anything done at all.
    """
    held = (*model.parameters(), *model.buffers())
    if not any(_is_narrow(tensor) for tensor in held):
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
        # Not by `contiguous`, to which a kernel of one pixel is in either layout.
        plain = (tensor.clone(memory_format=torch.contiguous_format) for tensor in args[:3])
        found = func(*plain, *args[3:], **(kwargs or {}))
        if not (_is_last(inputs) or _is_last(weight)):
            return found
        # In the layout that compiled code expects, as it was told before.
        return tuple(fast_layout(gradient) if isinstance(gradient, Tensor) else None for gradient in found)


def _is_narrow(weight: Tensor) -> bool:
    return weight.ndim == 4 and weight.shape[1] in _NARROW and tuple(weight.shape[2:]) == (1, 1)


def _is_last(tensor: Tensor) -> bool:
    """Whether torch takes a tensor (n, c, h, w) for channels last."""
    return tensor.stride(1) == 1 and tensor.stride(3) >= tensor.shape[1]
