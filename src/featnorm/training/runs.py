"""What every training loop keeps of a run: which it is, its checkpoint, its log, and its random numbers."""

import hashlib
import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from featnorm._utils.files import refuse_folder, replacing, write_text
from featnorm._utils.sealed import seal, unseal

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
# Behind what torch.save writes, which torch.load does not mind.
_SEAL = "\nsha256 %s\n"
_SEAL_BYTES = len(_SEAL % (64 * "0"))


@contextmanager
def seeded(seed: int, epoch: int, rank: int, device: torch.device) -> Iterator[None]:
    """Draw random numbers by the seed, and give the caller's state back."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        number = (seed * 1_000_003 + epoch) * 1_009 + rank
        if device.type == "cpu":
            # Before CUDA is used, `torch.manual_seed` formats the stack, and keeps it, at every call.
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)
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
        The checkpoint is damaged, a folder, of an earlier version that wrote no SHA-256, or of another run.
    """
    refuse_folder(path)
    content = path.read_bytes()
    state, sealed = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    if sealed != _seal_of(state):
        raise ValueError(
            f"{path} is damaged, or no checkpoint of this version: delete it to train from the beginning"
        )
    saved: dict[str, Any] = torch.load(io.BytesIO(state), map_location=device, weights_only=True)
    if saved["run"] != run:
        other = [key for key in run if saved["run"].get(key) != run[key]]
        raise ValueError(f"{path} is of another run: its {' and '.join(other)} differ; train in another folder")
    return saved


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, whose key "run" says which it is; a run killed here keeps the one before.

    Its SHA-256 follows what `torch.save` writes, so that a damaged file is never resumed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not into the file: torch hides what the system says of a full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.write(_seal_of(content))


def _seal_of(content: bytes | memoryview) -> bytes:
    return (_SEAL % hashlib.sha256(content).hexdigest()).encode()


def log(path: Path, entry: dict[str, Any]) -> None:
    """Write the epoch's line, in place of one that a killed run left after its last checkpoint.

    A run that is killed here keeps the lines before it.

    Raises
    ------
    ValueError
        As `read_log`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read_log(path) if line["epoch"] < entry["epoch"]] if path.exists() else []
    write_text(path, "".join(f"{seal(line)}\n" for line in (*kept, entry)))


def check_log(path: Path, epochs: int) -> None:
    """See that the log beside a checkpoint has a line for each epoch of it, before another one is trained.

    Parameters
    ----------
    path : the log; where nothing was trained yet there need be none.
    epochs : how many the checkpoint has.

    Raises
    ------
    ValueError
        An epoch is missing, or as `read_log`.
    """
    logged = {entry["epoch"] for entry in read_log(path)} if path.exists() else set()
    missing = next((epoch for epoch in range(1, epochs + 1) if epoch not in logged), None)
    if missing is not None:
        raise ValueError(
            f"{path} has no line of epoch {missing}, and {CHECKPOINT} beside it is of epoch {epochs}: restore the "
            f"log, or delete the folder {path.parent} to train from the beginning"
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries that `log` wrote.

    Raises
    ------
    ValueError
        A line is damaged, or of an earlier version that wrote no SHA-256; or the log is a folder.
    """
    refuse_folder(path)
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entries.append(unseal(line))
        except ValueError:
            raise ValueError(
                f"line {number} of {path} is damaged, or of an earlier version: delete the folder {path.parent} "
                "to train from the beginning"
            ) from None
    return entries


def hide_bar(progress: bool | None, rank: int = 0) -> bool | None:
    """Return whether tqdm shows no bar, where None asks it to hide without a terminal."""
    if rank != 0:
        return True
    return None if progress is None else not progress
