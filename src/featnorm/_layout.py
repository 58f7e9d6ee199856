"""Memory layout of networks and their inputs: decided here, for training and for scoring alike."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

_Arranged = TypeVar("_Arranged", bound=Tensor | nn.Module)

# Below this many input channels the fault that `UnitStrides` avoids was seen, on 2 to 7.
_NARROW = 8


def fast_layout(value: _Arranged) -> _Arranged:
    """Return a network or a batch in the layout that convolutions are fastest in, channels last.

    Parameters
    ----------
    value
        A network, whose weights are rearranged in place, or a batch; a batch that is not (n, c, h, w) is returned
        as it is. The values stay the same.
    """
    if isinstance(value, nn.Module) or value.ndim == 4:
        return cast(_Arranged, value.to(memory_format=torch.channels_last))
    return value


class UnitStrides(TorchFunctionMode):
    """Context in which the gradients of narrow strided 1x1 convolutions are safe on a CPU, in any layout.

    oneDNN's AVX2 kernel of the backward pass writes past its buffer, and so corrupts the heap, for a float32 1x1
    convolution without padding or groups, with a stride and 2 to 7 input channels, where the input or the weight
    is channels last. Minimal case with torch 2.14.1 (``ONEDNN_MAX_CPU_ISA=AVX2`` where the processor has more)::

        c = nn.Conv2d(4, 16, 1, stride=2).to(memory_format=torch.channels_last)
        x = torch.randn(8, 4, 32, 32).contiguous(memory_format=torch.channels_last)
        c(x).sum().backward()  # five times

    Such a convolution reads every stride-th pixel and no other, so here these are picked first and convolved with
    stride 1, which gives the same numbers. All other convolutions run as they are. Whoever finds the minimal case
    mended in every torch that featnorm supports can remove this class and its uses.
    """

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Call a function of torch, a narrow strided 1x1 convolution by way of its stride-th pixels."""
        if func is torch.conv2d:
            return _convolved(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _convolved(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: str | int | Sequence[int] = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> Tensor:
    steps = _pair(stride)
    narrow = tuple(weight.shape[2:]) == (1, 1) and weight.shape[1] < _NARROW and groups == 1
    if (
        narrow
        and steps != (1, 1)
        and (padding == "valid" or (not isinstance(padding, str) and not any(_pair(padding))))
    ):
        input, stride = input[..., :: steps[0], :: steps[1]], 1
    return torch.conv2d(input, weight, bias, stride, padding, dilation, groups)


def _pair(value: int | Sequence[int]) -> tuple[int, ...]:
    """Return a setting of both sides of a convolution's window, which may be given as one number."""
    values = (value,) if isinstance(value, int) else tuple(value)
    return 2 * values if len(values) == 1 else values
