"""The training loop: one uint8 tensor of images, augmented by the batch; resumable at every epoch."""

import json
import math
import os
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from featnorm.training.recipe import Recipe

Callback = Callable[[dict[str, Any], nn.Module], None]

_CHECKPOINT = "checkpoint.pt"
_LOG = "log.jsonl"


def train(
    model: nn.Module,
    images: Tensor,
    targets: Tensor,
    recipe: Recipe,
    *,
    folder: str | Path | None = None,
    fabric: Any = None,
    seed: int = 0,
    mean: tuple[float, ...] = (0.0,),
    std: tuple[float, ...] = (1.0,),
    progress: bool | None = None,
    on_epoch: Callback | None = None,
) -> nn.Module:
    """Train a classifier by cross entropy on its logits.

    The order of the inputs and their augmentation depend on the seed and the epoch alone, so a run that is
    resumed gives the weights of an unbroken one.

    Parameters
    ----------
    model : maps normalised images (n, c, h, w) to logits (n, classes).
    images : (n, c, h, w) uint8.
    targets : (n,) classes, see `scheme_labels`.
    recipe : the settings.
    folder
        Where ``checkpoint.pt`` and ``log.jsonl`` are written at every epoch; a checkpoint that is there is resumed
        if it is of the same recipe, seed and data. None for neither.
    fabric
        A launched `lightning_fabric.Fabric` for device, precision and processes; one CPU process without.
    seed : of the order and the augmentation; the initial weights are the model's.
    mean, std : by which pixels, between 0 and 1, are normalised; one number or one a channel.
    progress : show a progress bar; None for where there is a terminal.
    on_epoch : called after every epoch with its log entry and the model.

    Returns
    -------
    The model, trained in place, in evaluation mode.

    Raises
    ------
    ValueError
        Images and targets do not fit each other or the recipe, the checkpoint is of another run, or the loss is
        not finite; the last good checkpoint stays.
    """
    _check(images, targets, recipe)
    world, rank = (1, 0) if fabric is None else (fabric.world_size, fabric.global_rank)
    device = torch.device("cpu") if fabric is None else fabric.device
    optimiser = _optimiser(model, recipe)
    steps = len(images) // recipe.batch_size
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, recipe.epochs * steps)
    if fabric is None:
        module: Any = model
    else:
        module, optimiser = fabric.setup(model, optimiser)
    run = {"recipe": asdict(recipe), "seed": seed, "images": list(images.shape), "world": world}
    checkpoint = None if folder is None else Path(folder) / _CHECKPOINT
    start = 0
    if checkpoint is not None and checkpoint.exists():
        start = _resume(checkpoint, run, model, optimiser, schedule, device)
    normalise = _Normalise(mean, std, device, _memory_format(model))
    targets = targets.to(device)
    for epoch in range(start, recipe.epochs):
        module.train()
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(len(images), generator=generator)[: steps * recipe.batch_size]
        batches = order.split(recipe.batch_size)
        total = correct = 0.0
        began = time.perf_counter()
        bar = tqdm(batches, desc=f"epoch {epoch + 1}/{recipe.epochs}", disable=_hide(progress, rank), leave=False)
        for rows in bar:
            batch = augment(images[rows], generator) if recipe.augment else images[rows]
            mine = slice(rank * len(rows) // world, (rank + 1) * len(rows) // world)
            inputs = normalise(batch[mine].to(device))
            logits = module(inputs)
            loss = nn.functional.cross_entropy(logits.float(), targets[rows[mine]])
            optimiser.zero_grad(set_to_none=True)
            if fabric is None:
                loss.backward()
            else:
                fabric.backward(loss)
            optimiser.step()
            schedule.step()
            total += float(loss.detach())
            correct += float((logits.argmax(1) == targets[rows[mine]]).float().mean())
            bar.set_postfix(loss=f"{total / (bar.n + 1):.3f}", refresh=False)
        means = torch.tensor([total, correct], device=device) / steps
        if fabric is not None:
            means = fabric.all_reduce(means, reduce_op="mean")
        entry = {
            "epoch": epoch + 1,
            "loss": float(means[0]),
            "accuracy": float(means[1]),
            "lr": schedule.get_last_lr()[0],
            "seconds": time.perf_counter() - began,
            "images_per_second": steps * recipe.batch_size / (time.perf_counter() - began),
        }
        if not math.isfinite(entry["loss"]):
            raise ValueError(f"the loss is not finite in epoch {epoch + 1}: lower the learning rate {recipe.lr}")
        if rank == 0 and checkpoint is not None:
            _save(checkpoint, run, epoch + 1, model, optimiser, schedule)
            _log(checkpoint.with_name(_LOG), entry)
        if on_epoch is not None:
            on_epoch(entry, model)
    return model.eval()


def augment(images: Tensor, generator: torch.Generator) -> Tensor:
    """Move each image by up to an eighth of its side, mirrored at the border, and flip half of them.

    Parameters
    ----------
    images : (n, c, h, w), any type.
    generator : of the moves and flips.

    Returns
    -------
    A new tensor of the same shape and type.
    """
    n, channels, height, width = images.shape
    pad = max(1, height // 8), max(1, width // 8)
    top, left = (torch.randint(0, 2 * p + 1, (n,), generator=generator) for p in pad)
    flip = torch.rand(n, generator=generator) < 0.5
    # Indices do what padding, cropping and flipping would, in one gather; -1 is mirrored to 1.
    rows = _mirror(torch.arange(height) - pad[0] + top[:, None], height)
    columns = torch.arange(width).expand(n, width)
    columns = torch.where(flip[:, None], columns.flip(1), columns)
    columns = _mirror(columns - pad[1] + left[:, None], width)
    return images[
        torch.arange(n)[:, None, None, None],
        torch.arange(channels)[None, :, None, None],
        rows[:, None, :, None],
        columns[:, None, None, :],
    ]


def _mirror(index: Tensor, size: int) -> Tensor:
    index = index.abs()
    return torch.where(index >= size, 2 * (size - 1) - index, index)


class _Normalise:
    """From uint8 pixels to the floating-point inputs of a model."""

    def __init__(
        self,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        device: torch.device,
        memory_format: torch.memory_format,
    ) -> None:
        self.memory_format = memory_format
        self.mean = torch.tensor(mean, device=device).reshape(1, -1, 1, 1)
        self.std = torch.tensor(std, device=device).reshape(1, -1, 1, 1)

    def __call__(self, images: Tensor) -> Tensor:
        scaled = images.contiguous(memory_format=self.memory_format).float().div_(255)
        return scaled.sub_(self.mean).div_(self.std)


def _memory_format(model: nn.Module) -> torch.memory_format:
    """Return channels last, which convolutions are fastest in, where they can be trained in it.

    On a CPU, torch 2.14's backward pass through a channels-last convolution with fewer than 8 output channels
    writes past its memory and ends the process.
    """
    narrow = any(isinstance(module, nn.Conv2d) and module.out_channels < 8 for module in model.modules())
    return torch.contiguous_format if narrow else torch.channels_last


def _optimiser(model: nn.Module, recipe: Recipe) -> torch.optim.Optimizer:
    if recipe.optimiser == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(), lr=recipe.lr, momentum=recipe.momentum, weight_decay=recipe.weight_decay
    )


def _check(images: Tensor, targets: Tensor, recipe: Recipe) -> None:
    if images.dtype != torch.uint8 or images.ndim != 4:
        raise ValueError(f"images must be uint8 (n, c, h, w), got {images.dtype} of shape {tuple(images.shape)}")
    if targets.shape != images.shape[:1] or targets.is_floating_point():
        raise ValueError(f"targets must be {len(images)} integers, got {targets.dtype} {tuple(targets.shape)}")
    if len(images) < recipe.batch_size:
        raise ValueError(f"a batch of {recipe.batch_size} needs as many images, and there are {len(images)}")


def _resume(
    path: Path, run: dict[str, Any], model: nn.Module, optimiser: Any, schedule: Any, device: torch.device
) -> int:
    saved = torch.load(path, map_location=device, weights_only=True)
    if saved["run"] != run:
        other = [key for key in run if saved["run"].get(key) != run[key]]
        raise ValueError(f"{path} is of another run: its {' and '.join(other)} differ; train in another folder")
    model.load_state_dict(saved["model"])
    optimiser.load_state_dict(saved["optimiser"])
    schedule.load_state_dict(saved["schedule"])
    return int(saved["epoch"])


def _save(path: Path, run: dict[str, Any], epoch: int, model: nn.Module, optimiser: Any, schedule: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "run": run,
        "epoch": epoch,
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "schedule": schedule.state_dict(),
    }
    # A run killed while it writes keeps the checkpoint before.
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".checkpoint.")
    os.close(handle)
    torch.save(state, temporary)
    os.replace(temporary, path)


def _log(path: Path, entry: dict[str, Any]) -> None:
    """Write the epoch's line, in place of one that a killed run left after its last checkpoint."""
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.startswith("{") and json.loads(line)["epoch"] < entry["epoch"]]
    path.write_text("".join(f"{line}\n" for line in (*kept, json.dumps(entry))), encoding="utf-8")


def _hide(progress: bool | None, rank: int) -> bool | None:
    if rank != 0:
        return True
    # tqdm's own None: no bar where standard error is not a terminal.
    return None if progress is None else not progress
