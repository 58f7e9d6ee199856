"""The optimizer of contrastive learning in large batches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# The source's, and that of the frameworks that are trained by it.
_TRUST = 1e-3


class LARS(torch.optim.SGD):
    """SGD with steps in proportion to the weights that they change (You et al., 2017, arXiv:1708.03888, alg. 1).

    The gradient g of each parameter w becomes ``trust (g + decay w)``, with
    ``trust = 0.001 ||w|| / (||g|| + decay ||w||)``, or 1 where w or g is zero; then momentum, as in SGD.

    Parameters
    ----------
    params : parameters.
    lr, momentum : as of SGD.
    decay : weight decay.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, momentum: float, decay: float) -> None:
        super().__init__(params, lr=lr, momentum=momentum)
        for group in self.param_groups:
            group["decay"] = decay

    def step(self, closure: Callable[[], float] | None = None) -> Any:
        """Take a step, by the gradients that there are or that the closure makes."""
        loss = None if closure is None else closure()
        with torch.no_grad():
            for group in self.param_groups:
                decay = group["decay"]
                for weight in group["params"]:
                    if weight.grad is None:
                        continue
                    size, slope = weight.norm(), weight.grad.norm()
                    trust = torch.where((size > 0) & (slope > 0), _TRUST * size / (slope + decay * size), 1.0)
                    weight.grad = trust * (weight.grad + decay * weight)
        super().step()
        return loss
