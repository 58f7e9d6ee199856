"""Fixtures that compare featnorm with references, and the file of results.

Benchmarks use the fixture `compare`. Each round times the references and then featnorm, so that a busy or hot
machine affects both; the medians are compared.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest

from featnorm._utils.memory import keep_freed_memory
from featnorm.cli.console import environment
from measuring import Row

_PEERS = ("numpy", "scikit-learn", "faiss-cpu", "pytorch-ood", "oodeel")
_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("featnorm")
    group.addoption(
        "--small", action="store_true", help="Use small sizes that take seconds, to try the benchmarks."
    )
    group.addoption("--results", type=Path, help="Folder in which to store speed.json and memory.json.")


def pytest_configure(config):
    # As in the commands.
    keep_freed_memory()
    config.stash[_ROWS] = []


def pytest_terminal_summary(terminalreporter, config):
    verdicts = {True: "met", False: "MISSED", None: "no target"}
    for row in config.stash[_ROWS]:
        target = "" if row.at_most is None else f", at most {row.at_most:.3g}"
        terminalreporter.write_line(
            f"{verdicts[row.met]:7} {row.theme}: {row.work} takes {row.ratio:.3g} of {row.reference}{target}"
        )


@pytest.fixture(scope="session")
def size(request):
    """Choose between the size for which the target is meant and one that takes seconds."""
    small = request.config.getoption("small")
    return lambda full, tiny: tiny if small else full


@pytest.fixture
def compare(request, benchmark):
    return Comparison(request, benchmark)


class Comparison:
    """Compares times and memory, and records the results as rows."""

    def __init__(self, request, benchmark):
        self._config = request.config
        self._benchmark = benchmark
        self._theme = request.module.__name__.rpartition(".")[2].removeprefix("test_")

    def time(
        self,
        work: str,
        ours: Callable[[], object],
        references: Mapping[str, tuple[Callable[[], object], float | None]],
        *,
        rounds: int,
        sizes: str,
        warm: bool = True,
    ) -> dict[str, float]:
        """Time featnorm and the references in turn, and return the medians in seconds by name; featnorm is "ours".

        Parameters
        ----------
        work : description of the work.
        ours : function that does the work.
        references : functions that do the same or less, by name, each with its target: the largest ratio of times
        allowed.
        rounds : number of rounds.
        sizes : description of the inputs.
        warm : whether to run a warm-up round first.
        """
        seconds: dict[str, list[float]] = {name: [] for name in references}

        def time_references():
            for name, (reference, _) in references.items():
                start = time.perf_counter()
                reference()
                seconds[name].append(time.perf_counter() - start)

        self._benchmark.group = f"{self._theme}: {work}"
        self._benchmark.pedantic(ours, setup=time_references, rounds=rounds, warmup_rounds=int(warm))
        if self._benchmark.stats is None:  # --benchmark-disable: each was run, nothing was measured
            return {}
        medians = {"ours": self._benchmark.stats.stats.median}
        for name, (_, at_most) in references.items():
            medians[name] = statistics.median(seconds[name][int(warm) :])
            self.record(work, medians["ours"], name, medians[name], at_most, unit="s", rounds=rounds, sizes=sizes)
        return medians

    def memory(
        self,
        work: str,
        ours: Callable[[], int],
        references: Mapping[str, tuple[Callable[[], int], float | None]],
        *,
        sizes: str,
    ) -> None:
        """Compare the numbers of bytes that the functions return, called once each; see `time`."""
        self._benchmark.group = f"{self._theme}: {work}"
        peak = self._benchmark.pedantic(ours)
        for name, (reference, at_most) in references.items():
            self.record(f"{work}, memory", peak, name, reference(), at_most, unit="B", rounds=1, sizes=sizes)

    def record(
        self,
        work: str,
        ours: float,
        reference: str,
        theirs: float,
        at_most: float | None,
        *,
        unit: str,
        rounds: int,
        sizes: str,
    ) -> None:
        """Record a row, in seconds ("s") or bytes ("B")."""
        row = Row(self._theme, work, reference, unit, ours, theirs, at_most, rounds, sizes)
        self._config.stash[_ROWS].append(row)
        folder = self._config.getoption("results")
        if folder is not None:
            # Apart from the times, as it may be measured on a busy machine.
            name = "memory" if self._theme == "memory" else "speed"
            _keep(folder / f"{name}.json", row, "small" if self._config.getoption("small") else "full")


def _keep(file: Path, row: Row, scale: str) -> None:
    """Add a row to those of the same machine, versions and scale, replacing an earlier one of the same work."""
    made_with = {
        **environment(),
        "command": "make bench",
        "peers": ", ".join(f"{name} {metadata.version(name)}" for name in _PEERS if _is_installed(name)),
    }
    content = json.loads(file.read_text("utf-8")) if file.exists() else {}
    same = {name: value for name, value in made_with.items() if name != "date"}
    if content.get("scale") != scale or not same.items() <= content.get("environment", {}).items():
        content = {"results": []}
    what = ("theme", "work", "reference", "unit")
    new = row.to_dict()
    rows = [old for old in content["results"] if any(old[name] != new[name] for name in what)]
    file.parent.mkdir(parents=True, exist_ok=True)
    content = {"scale": scale, "environment": made_with, "results": [*rows, new]}
    file.write_text(json.dumps(content, indent=1), "utf-8")


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True
