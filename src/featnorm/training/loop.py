"""The training loop, for a tensor of images, features or token ids; it augments, and resumes at any epoch."""

import math
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.layout import fast_layout, safe_gradients
from featnorm._utils.progress import progress_bar
from featnorm.runtime import Runtime
from featnorm.training.objectives import Batch, Objective, Step
from featnorm.training.recipe import Recipe
from featnorm.training.runs import Checkpoints, are_finite, digest, seeded

Callback = Callable[[dict[str, Any], nn.Module], None]


def train(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor | None,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    runtime: Runtime | None = None,
    seed: int = 0,
    on_epoch: Callback | None = None,
) -> nn.Module:
    """Train a model on images, on extracted features, or on texts.

    The order of the inputs and their augmentation depend only on the seed and the epoch, so a resumed run gives
    the same weights as an uninterrupted one.

    Parameters
    ----------
    model
        Module that maps pixels (n, c, h, w) in [0, 1] (use `Normalize` as its first layer), features (n, D) or
        token ids (n, L) to the inputs of the recipe's objective: logits (n, classes), embeddings (n, e), or both;
        or images to maps of logits (n, classes, h, w).
    inputs : images (n, c, h, w) uint8, floating-point features (n, D), or token ids (n, L) int64, padded.
    targets
        Classes (n,), see `scheme_labels`; None for an objective that needs none. For maps of logits, masks
        (n, h, w) of classes, which cannot be augmented.
    recipe : settings of the run.
    folder
        Folder in which ``checkpoint.pt`` and ``log.jsonl`` are written after every epoch. An existing checkpoint
        is resumed if its recipe, seed and data are the same. Default: no checkpoint and no log.
    runtime
        Device, precision and processes, and whether to show a progress bar. Default: `Runtime()`, on the CPU.
    seed : seed of the order and the augmentation; the initial weights are those of the model.
    on_epoch
        Function called after every epoch with its log entry and the model, before the checkpoint is written; see
        `Probe`.

    Returns
    -------
    The model, which is trained in place, in evaluation mode.

    Raises
    ------
    ValueError
        Inputs, targets and recipe do not match; the checkpoint is damaged or from another run; the log is damaged
        or lacks an epoch; or the loss is not finite, in which case the last checkpoint stays.
    """
    objective = recipe.make_objective().train()
    targets = _check(inputs, targets, recipe, objective)
    runtime = runtime or Runtime()
    fabric = runtime.fabric
    world, rank, device = fabric.world_size, fabric.global_rank, fabric.device
    optimizer = recipe.make_optimizer(model.parameters())
    steps = len(inputs) // recipe.batch_size
    schedule = _schedule(optimizer, recipe, recipe.epochs * steps)
    module, optimizer = fabric.setup(model, optimizer)
    run: dict[str, Any] = {}
    if folder is not None:
        run = {"recipe": recipe.to_dict(), "seed": seed, "world": world, "data": digest(inputs, targets)}
    checkpoints = Checkpoints(
        folder, run, model=model, objective=objective, optimizer=optimizer, schedule=schedule
    )
    # State that lasts over steps must not be inference tensors, so the caller's inference mode is turned off.
    with torch.inference_mode(False), torch.no_grad():
        fast_layout(model)
        objective.begin(model, inputs, targets, seed, fabric)
        start = checkpoints.resume(device)
    gradients = safe_gradients(model)
    targets = targets.to(device)
    if device.type == "cuda" and inputs.nbytes < torch.cuda.mem_get_info(device)[0] / 4:
        # A GPU cuts a batch of views in less time than the CPU takes to send it.
        inputs = inputs.to(device)
    bar = progress_bar(
        total=recipe.epochs * steps * recipe.batch_size,
        initial=start * steps * recipe.batch_size,
        unit="input",
        progress=runtime.progress if rank == 0 else False,
    )
    with bar, torch.inference_mode(False), torch.enable_grad():
        for epoch in range(start, recipe.epochs):
            module.train()
            generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
            order = torch.randperm(len(inputs), generator=generator)[: steps * recipe.batch_size]
            meter = _Meter()
            bar.set_description(f"epoch {epoch + 1}/{recipe.epochs}")
            # Random numbers drawn by the network, for example by dropout, depend on the seed and the epoch too.
            with seeded(seed, epoch, rank, device):
                for step, rows in enumerate(order.split(recipe.batch_size)):
                    mine = slice(rank * len(rows) // world, (rank + 1) * len(rows) // world)
                    done = epoch * steps + step
                    whole = recipe.crop is None or done >= recipe.crop_share * recipe.epochs * steps
                    crop = None if whole else recipe.crop
                    views = objective.make_views(inputs[rows], mine, generator, crop, device)
                    views = fast_layout(views)
                    if views.dtype == torch.uint8:
                        views = views.float().div_(255)
                    indices = torch.arange(mine.start, mine.stop, device=device)
                    optimizer.zero_grad(set_to_none=True)
                    found: Step = objective(module, Batch(views, targets[rows[mine]], indices), fabric)
                    with gradients:
                        fabric.backward(found.loss)
                    optimizer.step()
                    schedule.step()
                    meter.update(found)
                    bar.set_postfix(meter.shown(), refresh=False)
                    bar.update(len(rows))
            entry = {"epoch": epoch + 1, **meter.means(fabric, device), "lr": schedule.get_last_lr()[0]}
            entry["seconds"] = meter.seconds
            entry["images_per_second"] = len(order) / meter.seconds
            if not (math.isfinite(entry["loss"]) and are_finite(model.parameters())):
                what = "the weights are" if math.isfinite(entry["loss"]) else "the loss is"
                raise ValueError(f"{what} not finite in epoch {epoch + 1}: lower the learning rate {recipe.lr}")
            # Before the checkpoint, so that a resumed run calls it again and never misses it.
            if on_epoch is not None:
                on_epoch(entry, model)
            if rank == 0:
                checkpoints.write(entry)
    return model.eval()


def train_head(
    model: nn.Sequential,
    loader: Iterable[tuple[Tensor, Tensor]],
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    runtime: Runtime | None = None,
    seed: int = 0,
) -> nn.Sequential:
    """Train the head alone, on features that the frozen backbone computes once (paper D.4).

    Parameters
    ----------
    model : ``Sequential(backbone, head)``, as returned by `attach_head`.
    loader
        Iterable of inputs of the backbone and labels (n,). To resume a run, the order must be the same every time.
    recipe : settings of the run, such as ``PRESETS["D.4"]``.
    folder, runtime, seed : see `train`.

    Returns
    -------
    The model, with the weights of the backbone unchanged.

    Raises
    ------
    ValueError
        The model does not have two parts, the loader is empty, or see `train`.
    """
    if len(model) != 2:
        raise ValueError(
            f"the model must be a backbone and a head, as returned by attach_head, not {len(model)} parts"
        )
    backbone, head = model
    runtime = runtime or Runtime()
    device = runtime.fabric.device
    backbone.to(device).eval()
    features, targets = [], []
    with torch.no_grad():
        for inputs, labels in progress_bar(loader, desc="features", progress=runtime.progress):
            features.append(backbone(inputs.to(device)).float().cpu())
            targets.append(labels.cpu())
    if not features:
        raise ValueError("the loader yielded no batch")
    train(head, torch.cat(features), torch.cat(targets), recipe, folder=folder, runtime=runtime, seed=seed)
    head.to(device)
    return model.eval()


class _Meter:
    """The mean loss and accuracy of an epoch so far, and its duration."""

    def __init__(self) -> None:
        self.sums = [0.0, 0.0]
        self.steps = 0
        self.began = time.perf_counter()
        self.classifies = False

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self.began

    def update(self, step: Step) -> None:
        self.classifies = step.accuracy is not None
        self.sums[0] += float(step.loss.detach())
        if step.accuracy is not None:
            self.sums[1] += float(step.accuracy)
        self.steps += 1

    def shown(self) -> dict[str, str]:
        text = {"loss": f"{self.sums[0] / self.steps:.3f}"}
        return text | ({"accuracy": f"{self.sums[1] / self.steps:.1%}"} if self.classifies else {})

    def means(self, fabric: Any, device: torch.device) -> dict[str, Any]:
        means = fabric.all_reduce(torch.tensor(self.sums, device=device) / self.steps, reduce_op="mean")
        return {"loss": float(means[0]), "accuracy": float(means[1]) if self.classifies else None}


def _schedule(
    optimizer: torch.optim.Optimizer, recipe: Recipe, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    warm = round(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < warm:
            return (step + 1) / (warm + 1)
        return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, factor)


def _check(inputs: Tensor, targets: Tensor | None, recipe: Recipe, objective: Objective) -> Tensor:
    """Raise a ValueError for invalid inputs, and return the targets as integers; zeros if there are none."""
    images = inputs.dtype == torch.uint8 and inputs.ndim == 4
    if not images and not ((inputs.is_floating_point() or inputs.dtype == torch.int64) and inputs.ndim == 2):
        raise ValueError(
            "inputs must be images, uint8 (n, c, h, w), features, floating point (n, D), or token ids, int64 "
            f"(n, L), got {inputs.dtype} of shape {tuple(inputs.shape)}"
        )
    if recipe.augment and not images:
        raise ValueError("features cannot be augmented: set augment=False, or train on the images")
    if objective.rotates and not (images and inputs.shape[2] == inputs.shape[3]):
        raise ValueError(
            f"{type(objective).__name__} rotates square images, but the inputs have shape {tuple(inputs.shape)}"
        )
    if targets is None and objective.needs_targets:
        raise ValueError(f"{type(objective).__name__} needs targets: pass classes")
    if targets is None:
        targets = torch.zeros(len(inputs), dtype=torch.int64)
    # Random crops and flips of images would have to move their masks too.
    masks = images and targets.ndim == 3 and len(targets) == len(inputs) and not recipe.augment
    if (targets.shape != inputs.shape[:1] and not masks) or targets.is_floating_point():
        raise ValueError(f"targets must be {len(inputs)} integers, got {targets.dtype} {tuple(targets.shape)}")
    if len(targets) and int(targets.min()) < 0:
        raise ValueError(
            f"input {int((targets < 0).nonzero()[0])} has the target {int(targets.min())}: give it a class"
        )
    if len(inputs) < recipe.batch_size:
        raise ValueError(f"a batch of {recipe.batch_size} needs as many inputs, but there are only {len(inputs)}")
    return targets.long()
