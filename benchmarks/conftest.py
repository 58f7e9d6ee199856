"""Ours against a reference, round by round, and the file that takes what came out.

A benchmark asks for `compare`. Each of its rounds times the references and then ours, so that what a busy or a
hot machine does to one it does to the other, and the medians are compared.
"""

import json
import statistics
import time
from collections.abc import Callable, Mapping
from importlib import metadata
from pathlib import Path

import pytest

from featnorm._utils.memory import keep_freed_memory
from featnorm.cli.show import environment
from measuring import Row

_PEERS = ("numpy", "scikit-learn", "faiss-cpu", "pytorch-ood", "oodeel")
_ROWS = pytest.StashKey[list[Row]]()


def pytest_addoption(parser):
    group = parser.getgroup("featnorm")
    group.addoption("--small", action="store_true", help="Sizes that take seconds, to try the benchmarks.")
    group.addoption("--results", type=Path, help="The folder whose speed.json takes the results.")


def pytest_configure(config):
    # As the commands do.
    keep_freed_memory()
    config.stash[_ROWS] = []


def pytest_terminal_summary(terminalreporter, config):
    verdicts = {True: "met", False: "MISSED", None: "no mark"}
    for row in config.stash[_ROWS]:
        mark = "" if row.at_most is None else f", at most {row.at_most:.3g}"
        terminalreporter.write_line(
            f"{verdicts[row.met]:7} {row.theme}: {row.work} takes {row.ratio:.3g} of {row.reference}{mark}"
        )


@pytest.fixture(scope="session")
def size(request):
    """Choose between the size of the mark and one that takes seconds."""
    small = request.config.getoption("small")
    return lambda full, tiny: tiny if small else full


@pytest.fixture
def compare(request, benchmark):
    return Comparison(request, benchmark)


class Comparison:
    """Compares times and memory, and records the rows."""

    def __init__(self, request, benchmark):
        self._config = request.config
        self._benchmark = benchmark
        self._theme = request.module.__name__.removeprefix("test_")

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
        """Time ours and the references in turn, and return the medians in seconds by name; ours is "ours".

        Parameters
        ----------
        work : what ours does.
        ours : does it.
        references : by name what does the same or less, and the mark: the share of its time ours may take.
        rounds : how often.
        sizes : of what it is done.
        warm : whether a round before is left out.
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
        """Compare the bytes that are returned, once each; see `time`."""
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
        """Record a row: seconds ("s") or bytes ("B")."""
        row = Row(self._theme, work, reference, unit, ours, theirs, at_most, rounds, sizes)
        self._config.stash[_ROWS].append(row)
        folder = self._config.getoption("results")
        if folder is not None:
            _keep(folder / "speed.json", row, "small" if self._config.getoption("small") else "full")


def _keep(file: Path, row: Row, scale: str) -> None:
    """Put a row beside those of the same machine, versions and scale, in place of an earlier one of its work."""
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
