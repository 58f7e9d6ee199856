"""The detector file: safetensors with a JSON header. Reading one never runs code.

Importing this module does not import torch, which takes seconds: `read_calibration` does without.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, deserialize, safe_open

import featnorm
from featnorm._utils.checks import as_score_array, check_type, is_tensor, threshold_rank
from featnorm._utils.files import replacing
from featnorm._utils.groups import GroupRanks, check_groups, members_of_groups, names_of_groups

if TYPE_CHECKING:
    from torch import Tensor, nn

    from featnorm.calibration import Calibration
    from featnorm.parts import PartCalibration

_Made = TypeVar("_Made")

FORMAT = 5
#: Names of the tensors of calibration scores, and of the groups or the units of these scores.
CALIBRATION, MEMBERS = "calibration.scores", "calibration.members"
OWNERS, UNIT_SCORES = "calibration.owners", "calibration.unit_scores"
#: Errors raised when objects are made from invalid file content.
MALFORMED = (LookupError, TypeError, ValueError, RuntimeError, AttributeError, ArithmeticError)


_TORCH_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


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
    import torch
    from safetensors.torch import save_file

    path = _path(path)
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided:
            raise ValueError(
                f"{name} is a tensor of layout {tensor.layout}, which a detector file cannot store: make it dense"
            )
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}
    written = {"featnorm": featnorm.__version__, "date": date.today().isoformat()}
    content = {"format": FORMAT, **header, "written": written}
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
    with _reading(path):
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if os.name == "nt":
                # The tensors are views of the file, which Windows lets nobody replace while it is mapped.
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
        header = _header(path, metadata, tensors)
    return tensors, header


class StoredCalibration:
    """The calibration of a detector file as arrays; it agrees with the `featnorm.Calibration` of that file.

    Parameters
    ----------
    scores : calibration scores (n,).
    tpr : share of new ID inputs to accept, in (0, 1).
    members : (n,) index in ``group_names`` of the group of each score. Default: no groups.
    group_names : names of the groups.

    Attributes
    ----------
    scores : ndarray
        (n,) float64, the calibration scores in ascending order.
    threshold : ndarray
        See `featnorm.Calibration`: 0-d float64; with groups, (G,).
    tpr, group_names
        As given; without groups, the names are empty.
    noun : str
        What a single input is called: "image", "text" or "row", or "input" if that is not known.

    Raises
    ------
    TypeError, ValueError
        As `featnorm.Calibration`.
    """

    def __init__(
        self,
        scores: npt.ArrayLike,
        tpr: float,
        members: npt.ArrayLike | None = None,
        group_names: Sequence[str] | None = None,
    ) -> None:
        scores = as_score_array(scores, "id_scores").astype(np.float64)
        order = np.argsort(scores, kind="stable")
        self.scores = scores[order]
        self.tpr = tpr
        self.noun = "input"
        self.group_names: tuple[str, ...] = ()
        self._groups: GroupRanks | None = None
        if members is None:
            self.threshold = self.scores[..., threshold_rank(len(self.scores), tpr) - 1]
        else:
            self.group_names = names_of_groups(members, group_names)
            numbers = members_of_groups(members, self.group_names, len(scores))[order]
            self._groups = GroupRanks.of(numbers, len(self.group_names), tpr)
            self.threshold = self.scores[self._groups.thresholds]

    def p_value(
        self, scores: npt.NDArray[np.float64], groups: Sequence[str] | None = None
    ) -> npt.NDArray[np.float64]:
        """Conformal p-values (m,) of scores (m,), small for OOD; see `featnorm.Calibration.predict`."""
        check_groups(groups, self.group_names)
        at_most, n = np.searchsorted(self.scores, scores, "right"), len(self.scores)
        if self._groups is None:
            return (1 + at_most) / (n + 1)
        reference = self._groups.reference[members_of_groups(groups, self.group_names, len(scores))]
        at_most = (
            np.searchsorted(self._groups.keys, reference * (n + 1) + at_most) - self._groups.starts[reference]
        )
        return (1 + at_most) / (self._groups.sizes[reference] + 1)


def read_calibration(path: str | Path) -> StoredCalibration | None:
    """Read the calibration of a detector file without torch, and check the whole file as `read` does.

    Returns
    -------
    StoredCalibration or None
        None if the detector is not calibrated.

    Raises
    ------
    TypeError, FileNotFoundError, ArchiveError
        As `read`; an ArchiveError too if the calibration is damaged.
    """
    path = _path(path)
    with _reading(path):
        content = path.read_bytes()
        entries = {name: _Entry(**entry) for name, entry in deserialize(content)}  # type: ignore[no-untyped-call]
        # The library checks this header, but returns only the part that describes the tensors.
        end = 8 + int.from_bytes(content[:8], "little")
        header = _header(path, json.loads(content[8:end]).get("__metadata__", {}), entries)

    if header.get("lowest") is not None:
        raise ArchiveError(
            f"{path} is calibrated on parts of images or clips, which depend on each other: it has no threshold "
            "for independent scores"
        )

    def make(*args: Any) -> StoredCalibration:
        scores, tpr, members, names = args
        made = StoredCalibration(scores.array(), tpr, None if members is None else members.array(), names)
        made.noun = header.get("scorer", {}).get("kind", "inputs").removesuffix("s")
        return made

    return _calibration(make, entries, header, path)


def calibration(
    tensors: Mapping[str, Tensor], header: Mapping[str, Any], path: str | Path
) -> Calibration | PartCalibration | None:
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
    from featnorm.calibration import Calibration
    from featnorm.parts import PartCalibration

    if header.get("lowest") is None:
        return _calibration(Calibration, tensors, header, path)
    try:
        scores, owners, of_units = (tensors[name] for name in (CALIBRATION, OWNERS, UNIT_SCORES))
        return PartCalibration.from_state(scores, owners, of_units, header["tpr"], header["lowest"])
    except MALFORMED as error:
        raise damaged(path, error) from None


def damaged(path: str | Path, error: Exception) -> ArchiveError:
    """Return a one-line error for a file with invalid content."""
    why = f"it has no {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
    return ArchiveError(f"{path} is damaged: {why}")


def _path(path: object) -> Path:
    check_type(path, (str, os.PathLike), "the path", "a str or a Path")
    return Path(path)  # type: ignore[arg-type]


@dataclass(frozen=True)
class _Entry:
    """A tensor in a file, as safetensors reads it without torch."""

    dtype: str
    shape: list[int]
    data: bytes

    @property
    def torch_dtype(self) -> str:
        """Name of the type in torch."""
        return _TORCH_DTYPES[self.dtype]

    def array(self) -> npt.NDArray[Any]:
        """Return the values; a TypeError if numpy has no such type."""
        return np.frombuffer(self.data, self.torch_dtype).reshape(self.shape)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn the errors of reading a file into those that `read` raises."""
    if not path.is_file():
        raise FileNotFoundError(f"cannot find the detector file {path}: check the path")
    try:
        yield
    except ArchiveError:
        raise
    except (SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
        raise ArchiveError(f"{path} is not a featnorm detector file, or is damaged ({error})") from None


def _header(path: Path, metadata: Mapping[str, str], tensors: Mapping[str, Any]) -> dict[str, Any]:
    """Return the header in a file's metadata; an error if its format is another or its content was changed."""
    header: dict[str, Any] = json.loads(metadata["featnorm"])
    version = header["format"]
    if type(version) is not int or version < 1:
        raise ValueError(f"its format is {version!r}")
    if not isinstance(header["model"], dict):
        raise ValueError("it has no model fingerprint")
    if version < FORMAT:
        raise ArchiveError(f"{path} has format {version}, of an older featnorm: save it again with this version")
    if version > FORMAT:
        raise ArchiveError(
            f"{path} has format {version}, but this featnorm reads up to {FORMAT}: install a newer featnorm"
        )
    if header.pop("sha256") != digest(tensors, header):
        raise ValueError("its checksum is wrong")
    return header


def _calibration(
    make: Callable[..., _Made], tensors: Mapping[str, Any], header: Mapping[str, Any], path: str | Path
) -> _Made | None:
    """Return what is made of the scores, the share, and the groups in a file, or None if it has no calibration."""
    scores, tpr, members = tensors.get(CALIBRATION), header.get("tpr"), tensors.get(MEMBERS)
    names = header.get("groups")
    if scores is None and tpr is None and members is None and names is None:
        return None
    try:
        if scores is None or tpr is None:
            raise ValueError("it has only one of calibration scores and tpr")
        if (members is None) != (names is None):
            raise ValueError("it has only one of the groups of calibration scores and their names")
        return make(scores, tpr, members, names)
    except (TypeError, ValueError, OverflowError) as error:
        raise damaged(path, error) from None


def digest(tensors: Mapping[str, Any], header: Mapping[str, Any]) -> str:
    """Return the SHA-256 of tensors and header, which detects damage, but not intent."""
    hashed = hashlib.sha256(json.dumps(header, sort_keys=True).encode())
    _hash_tensors(hashed, tensors)
    return hashed.hexdigest()


def _hash_tensors(hashed: Any, tensors: Mapping[str, Any]) -> None:
    """Hash names, types, shapes and values of tensors, or of the entries of a file."""
    for name, tensor in sorted(tensors.items()):
        if isinstance(tensor, _Entry):
            hashed.update(f"{name} torch.{tensor.torch_dtype} {tuple(tensor.shape)};".encode())
            hashed.update(tensor.data)
        elif is_tensor(tensor):
            import torch

            hashed.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            for part in _dense_parts(name, tensor.detach().cpu()):
                hashed.update(part.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def _dense_parts(name: str, tensor: Tensor) -> tuple[Tensor, ...]:
    """Return a tensor as dense tensors: of a sparse one its indices and values."""
    import torch

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
    count = sum(tensor.numel() for tensor in state.values() if is_tensor(tensor))
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
