"""The training loop of the one-class models whose steps are not those of `featnorm.training.train`.

That loop minimizes one objective, of a network's outputs and a class per image, with one optimizer. Here a loss
compares with the image itself (autoencoders), with a center (Deep-SVDD), or with the other transformations of an
image (GOAD); and adversarial models minimize several losses, each with an optimizer of its own. Checkpoints, logs
and resume are the same.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout, safe_gradients
from featnorm._utils.progress import progress_bar
from featnorm.paper.images import as_pixels
from featnorm.paper.systems.base import TrainContext, check_images
from featnorm.training.runs import Checkpoints, are_finite, digest, seeded

Parts = Mapping[str, Any]
Losses = Iterator[tuple[str, Tensor]]
Step = Callable[[Parts, Tensor, int], Losses]


def adam(parameters: Any, lr: float, *, beta1: float = 0.9, weight_decay: float = 0.0) -> torch.optim.Adam:
    """Return Adam with the default beta2; its weight decay is part of the gradient."""
    return torch.optim.Adam(parameters, lr=lr, betas=(beta1, 0.999), weight_decay=weight_decay)


def train_steps(
    model: nn.Module,
    images: Tensor,
    step: Step,
    optimizers: Mapping[str, torch.optim.Optimizer],
    settings: Mapping[str, Any],
    context: TrainContext,
) -> None:
    """Train a model in place, and put it in evaluation mode.

    The order of the images and the random numbers of a step depend only on the seed and the epoch, so a resumed
    run ends with the weights of an uninterrupted one.

    Parameters
    ----------
    model : model whose children are the parts that a step reads.
    images : (n, 3, 32, 32) uint8.
    step
        Takes the parts by name, pixels (b, 3, 32, 32) in [0, 1] and the epoch from 0. Yields the name of an
        optimizer and the loss that it minimizes; the optimizer's step is taken before the generator continues.
    optimizers : optimizers by the names that the step yields.
    settings
        Settings of the run; a checkpoint of a run with other settings is not resumed. ``epochs`` is the number of
        passes over the images, ``batch_size`` the number of images per step (an incomplete batch is skipped), and
        ``drop``, if given, the epoch from 0 at which the learning rates fall to a tenth.
    context : see `TrainContext`.

    Raises
    ------
    ValueError
        See `featnorm.paper.systems.OneClassModel.train`.
    """
    epochs, batch_size, drop = settings["epochs"], settings["batch_size"], settings.get("drop", math.inf)
    check_images(images, batch_size)
    fabric = context.runtime.fabric
    device = fabric.device
    if fabric.world_size > 1:
        raise ValueError(f"this training runs in one process, and fabric has {fabric.world_size}: use devices=1")
    fast_layout(model.to(device))
    # Each part by itself, since a step calls them one by one.
    parts = {name: fabric.setup_module(part) for name, part in model.named_children()}
    active = {name: fabric.setup_optimizers(optimizer) for name, optimizer in optimizers.items()}
    rates = {name: [group["lr"] for group in optimizer.param_groups] for name, optimizer in optimizers.items()}
    run: dict[str, Any] = {}
    if context.folder is not None:
        run = {"settings": dict(settings), "seed": context.seed, "data": digest(images)}
    saved = {f"optimizer of {name}": optimizer for name, optimizer in optimizers.items()}
    checkpoints = Checkpoints(context.folder, run, model=model, **saved)
    start = checkpoints.resume(device)
    steps = len(images) // batch_size
    bar = progress_bar(
        total=epochs * steps * batch_size,
        initial=start * steps * batch_size,
        unit="input",
        progress=context.runtime.progress,
    )
    with bar, torch.inference_mode(False), torch.enable_grad(), safe_gradients(model):
        for epoch in range(start, epochs):
            model.train()
            began = time.perf_counter()
            bar.set_description(f"epoch {epoch + 1}/{epochs}")
            for name, optimizer in optimizers.items():
                for group, rate in zip(optimizer.param_groups, rates[name], strict=True):
                    group["lr"] = rate / 10 if epoch >= drop else rate
            sums: dict[str, float] = {}
            with seeded(context.seed, epoch, 0, device):
                order = torch.randperm(len(images))[: steps * batch_size]
                for rows in order.split(batch_size):
                    for name, loss in step(parts, as_pixels(images[rows], device), epoch):
                        active[name].zero_grad(set_to_none=True)
                        fabric.backward(loss)
                        active[name].step()
                        sums[name] = sums.get(name, 0.0) + float(loss.detach())
                    bar.update(len(rows))
                    bar.set_postfix({name: f"{total / steps:.3g}" for name, total in sums.items()}, refresh=False)
            means = {name: total / steps for name, total in sums.items()}
            if not (are_finite(model.state_dict().values()) and all(map(math.isfinite, means.values()))):
                raise ValueError(f"losses or weights are not finite in epoch {epoch + 1}: lower the learning rate")
            seconds = time.perf_counter() - began
            checkpoints.write({"epoch": epoch + 1, "losses": means, "seconds": seconds})
    model.eval()
