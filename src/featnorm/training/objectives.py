"""What a step of training lowers: cross entropy on logits, or the supervised contrastive loss on embeddings."""

from typing import Any

from torch import Tensor, nn


def cross_entropy(outputs: Tensor, targets: Tensor, temperature: float, fabric: Any) -> Tensor:
    """Return the mean cross entropy of logits (n, classes); their temperature is in the model."""
    return nn.functional.cross_entropy(outputs.float(), targets)


def supcon(outputs: Tensor, targets: Tensor, temperature: float, fabric: Any) -> Tensor:
    """Return the supervised contrastive loss of embeddings (n, e) (Khosla et al., NeurIPS 2020, eq. 2).

    Over several processes every input is contrasted with those of all of them.
    """
    try:
        from pytorch_metric_learning.losses import SupConLoss
    except ImportError:
        raise ImportError("the supcon objective needs: pip install '.[vision]' in a checkout") from None
    if fabric is not None and fabric.world_size > 1:
        # With gradients: what each process then finds for its own inputs is summed over the processes by this,
        # and averaged over them again by the data-parallel wrapper.
        outputs = fabric.all_gather(outputs, sync_grads=True).flatten(0, 1)
        targets = fabric.all_gather(targets).flatten()
    return SupConLoss(temperature=temperature)(outputs.float(), targets)


OBJECTIVES = {"cross_entropy": cross_entropy, "supcon": supcon}
