"""What a step of training lowers: cross entropy on logits, or the supervised contrastive loss on embeddings."""

from typing import Any

import torch
from torch import Tensor, nn


def cross_entropy(outputs: Tensor, targets: Tensor, temperature: float, fabric: Any) -> Tensor:
    """Return the mean cross entropy of logits (n, classes); their temperature is in the model."""
    return nn.functional.cross_entropy(outputs.float(), targets)


def supcon(outputs: Tensor, targets: Tensor, temperature: float, fabric: Any) -> Tensor:
    """Return the supervised contrastive loss of embeddings (n, e) (Khosla et al., NeurIPS 2020, eq. 2).

    Averaged over the inputs that share their class with another one; the embeddings are normalised here. Over
    several processes every input is contrasted with those of all of them.
    """
    if fabric is not None and fabric.world_size > 1:
        # With gradients: what each process then finds for its own inputs is summed over the processes by this,
        # and averaged over them again by the data-parallel wrapper.
        outputs = fabric.all_gather(outputs, sync_grads=True).flatten(0, 1)
        targets = fabric.all_gather(targets).flatten()
    unit = nn.functional.normalize(outputs.float())
    itself = torch.eye(len(unit), dtype=torch.bool, device=unit.device)
    log_share = (unit @ unit.T / temperature).masked_fill(itself, -torch.inf).log_softmax(1)
    positive = (targets[:, None] == targets) & ~itself
    counts = positive.sum(1)
    mean = log_share.masked_fill(~positive, 0.0).sum(1) / counts.clamp_min(1)
    return -mean.sum() / (counts > 0).sum().clamp_min(1)


OBJECTIVES = {"cross_entropy": cross_entropy, "supcon": supcon}
