"""The detector file: safetensors with a JSON header. Reading one never runs code."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from featnorm._utils.checks import check_type
from featnorm._utils.files import replacing
from featnorm.calibration import Calibration

FORMAT = 2
#: Name of the tensor of calibration scores.
CALIBRATION = "calibration.scores"
#: Errors raised when objects are made from invalid file content.
MALFORMED = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)


class ArchiveError(ValueError):
    """A file is not a detector file, is damaged, or was made for another model or version."""


def write(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a detector file. An earlier file of that name is kept until the new one is complete.

    Raises
    ------
    TypeError
        The path is not a path.
    OSError
        The file cannot be written.
    ValueError
        A tensor is sparse, which safetensors cannot store.
    """
    path = _path(path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is a tensor of layout {tensor.layout}, which a detector file cannot store: make it dense"
            )
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    content = {"format": FORMAT, **header}
    metadata = {"featnorm": json.dumps({**content, "sha256": digest(own, content)})}
    with replacing(path) as temporary:
        save_file(own, temporary, metadata)


def read(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header of a detector file.

    Raises
    ------
    TypeError
        The path is not a path.
    FileNotFoundError
        The file does not exist.
    ArchiveError
        The file is not a detector file, is damaged, or has a format that this version cannot read.
    """
    path = _path(path)
    if not path.is_file():
        raise FileNotFoundError(f"there is no detector file {path}")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        header = json.loads(metadata["featnorm"])
        version = header["format"]
        if type(version) is not int or version < 1:
            raise ValueError(f"its format is {version!r}")
        if not isinstance(header["model"], dict):
            raise ValueError("it has no model fingerprint")
        if version == FORMAT and header.pop("sha256") != digest(tensors, header):
            raise ValueError("its checksum is wrong")
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{path} is not a featnorm detector file, or is damaged ({error})") from None
    if version < FORMAT:
        raise ArchiveError(f"{path} has format {version}, of an older featnorm: save it again with this version")
    if version > FORMAT:
        raise ArchiveError(
            f"{path} has format {version}, but this featnorm reads up to {FORMAT}: install a newer featnorm"
        )
    return tensors, header


def calibration(tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str | Path) -> Calibration | None:
    """Return the calibration in a detector file, or None if the detector was not calibrated.

    Parameters
    ----------
    tensors, header : results of `read`.
    path : file, for errors.

    Raises
    ------
    ArchiveError
        The file is damaged.
    """
    scores, tpr = tensors.get(CALIBRATION), header.get("tpr")
    if tpr is None and scores is None:
        return None
    try:
        if tpr is None or scores is None:
            raise ValueError("it has only one of calibration scores and tpr")
        return Calibration(scores, tpr)
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(path, error) from None


def damaged(path: str | Path, error: Exception) -> ArchiveError:
    """Return a one-line error for a file with invalid content."""
    why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return ArchiveError(f"{path} is damaged: {why}")


def _path(path: object) -> Path:
    check_type(path, (str, os.PathLike), "the path", "a str or a Path")
    return Path(path)  # type: ignore[arg-type]


def digest(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of tensors and header, which detects damage, but not intent."""
    hashed = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    _hash_tensors(hashed, tensors)
    return hashed.hexdigest()


def _hash_tensors(hashed: Any, tensors: Mapping[str, Any]) -> None:
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, Tensor):
            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            for part in _dense_parts(name, tensor.detach().cpu()):
                hashed.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _dense_parts(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor as dense tensors: of a sparse one its indices and values."""
    if tensor.layout == torch.strided:
        return (tensor,)
    try:
        entries = tensor.to_sparse_coo().coalesce()
    except RuntimeError:
        raise ValueError(
            f"the model's {name} is a tensor of layout {tensor.layout}, which has no fingerprint: make it dense"
        ) from None
    return entries.indices(), entries.values()


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies a model: its class, its size, and the SHA-256 of all weights and buffers."""
    hashed = hashlib.sha256()
    state = model.state_dict()
    _hash_tensors(hashed, state)
    count = sum(tensor.numel() for tensor in state.values() if isinstance(tensor, Tensor))
    return {"class": type(model).__qualname__, "values": count, "sha256": hashed.hexdigest()}


def check_fingerprint(model: nn.Module, expected: Mapping[str, Any], path: str | Path) -> None:
    """Raise an ArchiveError if the model is not the one a file was made for, with the difference."""
    found = fingerprint(model)
    if found["sha256"] == expected.get("sha256"):
        return
    if found["class"] != expected.get("class") or found["values"] != expected.get("values"):
        difference = (
            f"a {expected.get('class')} with {expected.get('values')} values, "
            f"but this is a {found['class']} with {found['values']}"
        )
    else:
        difference = f"a {found['class']} with other weights, or in another precision"
    raise ArchiveError(f"{path} was made for another model: {difference}. Load that model, or fit again")
