"""What every training loop keeps of a run: which it is, its checkpoint, its log, and its random numbers."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featnorm._files import replacing

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"


@contextmanager
def seeded(seed: int, epoch: int, rank: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers by the seed, and give the caller's state back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed((seed * 1_000_003 + epoch) * 1_009 + rank)
        yield


def digest(*data: Tensor) -> str:
    """A hash that tells the data of a run from other data."""
    found = hashlib.sha256()
    for values in data:
        found.update(f"{values.dtype} {tuple(values.shape)};".encode())
        found.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def read_checkpoint(path: Path, run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Return what `write_checkpoint` kept.

    Raises
    ------
    ValueError
        It is of another run.
    """
    saved: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
    if saved["run"] != run:
        other = [key for key in run if saved["run"].get(key) != run[key]]
        raise ValueError(f"{path} is of another run: its {' and '.join(other)} differ; train in another folder")
    return saved


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, whose key "run" says which it is; a run killed here keeps the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        torch.save(state, temporary)


def log(path: Path, entry: dict[str, Any]) -> None:
    """Write the epoch's line, in place of one that a killed run left after its last checkpoint.

    A run that is killed here keeps the lines before it.
    """
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if line.startswith("{") and json.loads(line)["epoch"] < entry["epoch"]]
    with replacing(path) as temporary:
        temporary.write_text("".join(f"{line}\n" for line in (*kept, json.dumps(entry))), encoding="utf-8")


def hide_bar(progress: bool | None, rank: int = 0) -> bool | None:
    """Return whether tqdm shows no bar, where None asks it to hide without a terminal."""
    if rank != 0:
        return True
    return None if progress is None else not progress
