"""`Study`: a result of the reproduction, from the networks that it trains to its tables; and their store."""

import hashlib
import pkgutil
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar, Generic, Protocol, TypeVar

from safetensors.torch import load_file, save_file

from featnorm._utils.files import replacing
from featnorm._utils.sealed import read_sealed, write_sealed
from featnorm.inputs import DataError
from featnorm.paper.tables import Result, Table
from featnorm.runtime import Runtime


class MissingError(DataError):
    """Data sets and checkpoints are missing.

    Parameters
    ----------
    lines : one line for each: where it is looked for, and how to get it.
    """

    def __init__(self, lines: Sequence[str]) -> None:
        super().__init__("; ".join(lines))
        self.lines = list(lines)


class HasFolder(Protocol):
    """What a study's job must have: the name of its folder. Studies that need the same run name it alike."""

    @property
    def folder(self) -> str:
        """Name of the folder."""


_Loaded = TypeVar("_Loaded")


@dataclass(frozen=True, eq=False)
class Context:
    """Where and how a command runs its studies.

    Parameters
    ----------
    scale : name of the scale.
    root : the data root. None: each data set's default place.
    weights : folder of the authors' checkpoints, or None.
    out : folder of the runs, one folder for each.
    runtime : device and precision, and whether to show progress bars.
    environment : versions, machine and date, kept with each result.
    note : called with a line for the user about what runs now or what was left out.
    """

    scale: str
    root: Path | None
    weights: Path | None
    out: Path
    runtime: Runtime
    environment: Mapping[str, str]
    note: Callable[[str], None] = lambda line: None
    _loaded: dict[Callable[["Context"], Any], Any] = field(default_factory=dict, repr=False)

    @property
    def progress(self) -> bool | None:
        """Whether to show progress bars; see `Runtime`."""
        return self.runtime.progress

    def once(self, load: Callable[["Context"], _Loaded]) -> _Loaded:
        """Return what a function loads in this context; it is called once, however many studies need it."""
        if load not in self._loaded:
            self._loaded[load] = load(self)
        loaded: _Loaded = self._loaded[load]
        return loaded


Scale = TypeVar("Scale")
Inputs = TypeVar("Inputs")
Job = TypeVar("Job", bound=HasFolder)

_STUDIES: "dict[str, Study[Any, Any, Any]]" = {}


@dataclass(frozen=True, eq=False)
class Study(ABC, Generic[Scale, Inputs, Job]):
    """A table or figure of the reproduction; an instance registers itself under its name.

    A module of `featnorm.paper.studies` defines a subclass and its instances; nothing else has to name them. The
    paper's numbers beside ours are in ``numbers.json``.

    Parameters
    ----------
    name : name on the command line, and of the file of its result, such as "table3".
    title : what it shows, in a few words.
    duration : roughly how long it took on one CPU core at scale "laptop"; "" if unknown.
    shares : name of a study whose result at scale "laptop" has all runs of this one, or "".
    """

    name: str
    title: str
    duration: str = field(default="", kw_only=True)
    shares: str = field(default="", kw_only=True)

    #: The page of ``docs/results`` that publishes it, and the folder beside the page that keeps its result.
    page: ClassVar[str]
    #: Settings by name of the scale: "laptop", for two CPU cores, and "paper", the paper's protocol. Some have
    #: more: "workstation", for hours on two CPU cores, and "gpu", for ten minutes of a current GPU.
    scales: ClassVar[Mapping[str, Any]]
    #: Whether tables can be made from some of the results, and are rewritten after every run.
    grows: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.name in _STUDIES:
            raise ValueError(f"there are two studies named {self.name!r}")
        _STUDIES[self.name] = self

    @abstractmethod
    def load(self, scale: Scale, context: Context) -> Inputs:
        """Return what all jobs read, usually decoded images.

        Raises
        ------
        DataError
            A data set is missing or cannot be read; `MissingError` if there are several to name.
        """

    @abstractmethod
    def jobs(self, scale: Scale, inputs: Inputs) -> Sequence[Job]:
        """Return what to run, one network each."""

    @abstractmethod
    def settings(self, job: Job, scale: Scale, inputs: Inputs) -> dict[str, Any]:
        """Return all that a result depends on, as JSON; a stored result with other settings is not reused."""

    @abstractmethod
    def run(self, job: Job, scale: Scale, inputs: Inputs, folder: Path, context: Context) -> dict[str, Any]:
        """Train a network, or resume its training, and return what was measured.

        Parameters
        ----------
        job, scale, inputs : what to run.
        folder : folder of this run, which exists; checkpoints and logs go there.
        context : device, data root and progress bars.

        Returns
        -------
        JSON; a mapping of tensors may stand under the key "tensors".
        """

    def collect(self, results: Sequence[Result], jobs: Sequence[Job], inputs: Inputs) -> Any:
        """Return the content of the study's file, as JSON: by default the list of the results of its jobs."""
        return list(results)

    @abstractmethod
    def tables(self, content: Any) -> dict[str, Table]:
        """Return the tables by name, from the content that `collect` returned; the first is the main one."""

    def pictures(self, content: Any) -> dict[str, str]:
        """Return the figures as SVG text, by name of the file."""
        return {}

    def make(self, context: Context) -> Iterator[Any]:
        """Run every job that has no stored result yet, and yield the content of the study's file.

        It is yielded once, at the end, or after every run if the study `grows`.

        Raises
        ------
        DataError
            See `load`.
        ValueError
            The study has no such scale, or the folder of a job holds a run with other settings, or a damaged one.
        """
        if context.scale not in self.scales:
            raise ValueError(f"{self.name} has no scale {context.scale!r}: use {', '.join(self.scales)}")
        scale: Scale = self.scales[context.scale]
        inputs = self.load(scale, context)
        jobs = self.jobs(scale, inputs)
        results: list[Result] = []
        for i, job in enumerate(jobs):
            context.note(f"network {i + 1} of {len(jobs)}: {job.folder}")
            results.append(self.result(job, scale, inputs, context))
            if self.grows or i == len(jobs) - 1:
                yield self.collect(results, jobs, inputs)

    def result(self, job: Job, scale: Scale, inputs: Inputs, context: Context) -> Result:
        """Return the stored result of a job; run it if there is none."""
        folder = context.out / job.folder
        made_with = {"scale": context.scale, **self.settings(job, scale, inputs)}
        if not (folder / _RESULT).exists():
            folder.mkdir(parents=True, exist_ok=True)
            outcome = self.run(job, scale, inputs, folder, context)
            _keep(folder, {**made_with, **outcome, "environment": dict(context.environment)})
        return _kept(folder, made_with)


@dataclass(frozen=True)
class Whole:
    """The job of a study that is one run."""

    folder: str


@dataclass(frozen=True)
class Seeded:
    """The job of a study that trains one network per seed."""

    study: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the folder of the run."""
        return f"{self.study}-seed{self.seed}"


class SingleRun(Study[None, Inputs, Whole]):
    """A study that is one run, the same at every scale; its file is the result of the run."""

    scales: ClassVar[Mapping[str, None]] = {"laptop": None, "paper": None}

    def jobs(self, scale: None, inputs: Inputs) -> list[Whole]:
        """Return one job, named after the study."""
        return [Whole(self.name)]

    def collect(self, results: Sequence[Result], jobs: Sequence[Whole], inputs: Inputs) -> Result:
        """Return the result of the run."""
        return results[0]


def studies() -> dict[str, Study[Any, Any, Any]]:
    """Return every study by name, figures and tables in the order of their numbers."""
    package = import_module("featnorm.paper.studies")
    for module in pkgutil.iter_modules(package.__path__, f"{package.__name__}."):
        import_module(module.name)
    return dict(sorted(_STUDIES.items(), key=lambda item: _numbered(item[0])))


def _numbered(name: str) -> list[str | int]:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]


_RESULT = "result.json"
_TENSORS = "tensors.safetensors"


def _keep(folder: Path, result: dict[str, Any]) -> None:
    if "tensors" in result:
        with replacing(folder / _TENSORS) as temporary:
            save_file(result["tensors"], temporary)
        result = {**result, "tensors": _digest_of(folder / _TENSORS)}
    write_sealed(folder / _RESULT, result)


def _kept(folder: Path, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """Return the result in a folder.

    Raises
    ------
    ValueError
        It was made with other settings, or is damaged.
    """
    file = folder / _RESULT
    result = read_sealed(file)
    if other := [key for key, value in made_with.items() if result.get(key) != value]:
        raise ValueError(f"{file} holds a run with other {' and '.join(other)}: choose another folder with --out")
    if "tensors" in result:
        tensors = folder / _TENSORS
        if result["tensors"] != _digest_of(tensors):
            raise ValueError(f"{tensors} is damaged: delete {file}, and rerun the same command to make it again")
        result["tensors"] = load_file(tensors)
    return result


def _digest_of(file: Path) -> str | None:
    """Return the SHA-256 of a file, or None if there is none."""
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").hexdigest()
