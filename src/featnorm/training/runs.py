"""The state of a training run: its identity, checkpoint, log and random numbers."""

import hashlib
import io
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.files import replacing, require_no_folder, write_text
from featnorm._utils.sealed import seal, unseal
from featnorm._utils.weights import load_weights

CHECKPOINT = "checkpoint.pt"
LOG = "log.jsonl"
# Appended to the output of torch.save; torch.load ignores it.
_SEAL = "\nsha256 %s\n"
_SEAL_BYTES = len(_SEAL % (64 * "0"))


@contextmanager
def seeded(seed: int, epoch: int, rank: int, device: torch.device) -> Iterator[None]:
    """Seed the random numbers in a block, and restore the caller's state afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        number = (seed * 1_000_003 + epoch) * 1_009 + rank
        if device.type == "cpu":
            # Before CUDA is used, `torch.manual_seed` formats the stack, and keeps it, at every call.
            torch.default_generator.manual_seed(number)
        else:
            torch.manual_seed(number)
        yield


def digest(*data: Tensor) -> str:
    """Return a hash that identifies the data of a run."""
    found = hashlib.sha256()
    for values in data:
        found.update(f"{values.dtype} {tuple(values.shape)};".encode())
        found.update(values.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def are_finite(tensors: Iterable[Tensor]) -> bool:
    """Whether every value of every tensor is finite."""
    # A sum reads each value once, without a temporary; only if it is not finite, each value is looked at.
    return all(
        math.isfinite(tensor.detach().sum().item()) or bool(torch.isfinite(tensor).all()) for tensor in tensors
    )


def read_checkpoint(path: Path, run: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """Read a checkpoint written by `write_checkpoint`.

    Raises
    ------
    ValueError
        The checkpoint is damaged, a folder, from a version that wrote no SHA-256, or from another run.
    """
    require_no_folder(path)
    content = path.read_bytes()
    state, sealed = content[:-_SEAL_BYTES], content[-_SEAL_BYTES:]
    if sealed != _seal_of(state):
        raise ValueError(
            f"{path} is damaged, or not a checkpoint of this version: delete it to train from the beginning"
        )
    saved: dict[str, Any] = torch.load(io.BytesIO(state), map_location=device, weights_only=True)
    if saved["run"] != run:
        other = [key for key in run if saved["run"].get(key) != run[key]]
        raise ValueError(f"{path} is from another run (different {' and '.join(other)}): use another folder")
    return saved


def write_checkpoint(path: Path, state: dict[str, Any]) -> None:
    """Write the state of a run, whose key "run" identifies it; if interrupted, the previous checkpoint stays.

    The SHA-256 is appended to the output of `torch.save`, so that a damaged file is never resumed.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not directly to the file, because torch hides the error of a full disk.
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getbuffer()
    with replacing(path) as temporary, temporary.open("wb") as file:
        file.write(content)
        file.write(_seal_of(content))


class Checkpoints:
    """The checkpoint and the log of a run, in a folder; without a folder, nothing is written.

    Parameters
    ----------
    folder : folder of both files, or None.
    run : settings that identify the run; a checkpoint of another run is refused.
    parts : objects whose state dicts a checkpoint holds, by name.
    """

    def __init__(self, folder: str | Path | None, run: dict[str, Any], **parts: Any) -> None:
        self.folder = None if folder is None else Path(folder)
        self.run = run
        self.parts = parts

    def resume(self, device: torch.device) -> int:
        """Load the checkpoint, if there is one, and return the number of finished epochs.

        Raises
        ------
        ValueError
            See `read_checkpoint` and `check_log`.
        """
        epoch = 0
        if self.folder is None:
            return epoch
        if (self.folder / CHECKPOINT).exists():
            saved = read_checkpoint(self.folder / CHECKPOINT, self.run, device)
            for name, part in self.parts.items():
                if isinstance(part, nn.Module):
                    load_weights(part, saved[name])
                else:
                    part.load_state_dict(saved[name])
            epoch = saved["epoch"]
        check_log(self.folder / LOG, epoch)
        return epoch

    def write(self, entry: dict[str, Any]) -> None:
        """Write the log entry of an epoch, and then its checkpoint.

        If interrupted in between, the resumed run writes the line of this epoch again.
        """
        if self.folder is not None:
            log(self.folder / LOG, entry)
            states = {name: part.state_dict() for name, part in self.parts.items()}
            write_checkpoint(self.folder / CHECKPOINT, {"run": self.run, "epoch": entry["epoch"], **states})


def _seal_of(content: bytes | memoryview) -> bytes:
    return (_SEAL % hashlib.sha256(content).hexdigest()).encode()


def log(path: Path, entry: dict[str, Any]) -> None:
    """Write the line of an epoch, replacing lines of this or later epochs left by an interrupted run.

    If interrupted, the log keeps its previous content.

    Raises
    ------
    ValueError
        See `read_log`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    kept = [line for line in read_log(path) if line["epoch"] < entry["epoch"]] if path.exists() else []
    write_text(path, "".join(f"{seal(line)}\n" for line in (*kept, entry)))


def check_log(path: Path, epochs: int) -> None:
    """Check that the log next to a checkpoint has a line for each of its epochs.

    Parameters
    ----------
    path : path of the log, which need not exist if ``epochs`` is 0.
    epochs : number of epochs of the checkpoint.

    Raises
    ------
    ValueError
        An epoch is missing, or see `read_log`.
    """
    logged = {entry["epoch"] for entry in read_log(path)} if path.exists() else set()
    missing = next((epoch for epoch in range(1, epochs + 1) if epoch not in logged), None)
    if missing is not None:
        raise ValueError(
            f"{path} has no line for epoch {missing}, but {CHECKPOINT} next to it is of epoch {epochs}: restore "
            f"the log, or delete the folder {path.parent} to train from the beginning"
        )


def read_log(path: Path) -> list[dict[str, Any]]:
    """Return the entries written by `log`.

    Raises
    ------
    ValueError
        A line is damaged, or from a version that wrote no SHA-256; or the log is a folder.
    """
    require_no_folder(path)
    entries = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        try:
            entries.append(unseal(line))
        except ValueError:
            raise ValueError(
                f"line {number} of {path} is damaged, or from an earlier version: delete the folder {path.parent} "
                "to train from the beginning"
            ) from None
    return entries
