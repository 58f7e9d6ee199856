"""The run of the tests itself: what it prints, and that it ends when a process of it dies."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import running

CONFTEST = """
from xdist.workermanage import NodeManager

import running

def pytest_configure(config):
    running.register(config)
    # Ten seconds by default.
    NodeManager.EXIT_TIMEOUT = 0.5
"""
DIES = """
import os, signal

def test_before(): pass
def test_that_is_killed(): os.kill(os.getpid(), getattr(signal, "SIGKILL", signal.SIGTERM))
def test_after(): pass
"""
# Longer than the run may take, so that it is ended and not waited for.
WAITS = "import time\n\ndef test_long(): time.sleep(300)\n"
PASSES = """
import pytest

def test_one(): pass
def test_two(): pass
@pytest.mark.skip(reason="never")
def test_three(): pass
"""


@pytest.fixture
def run(tmp_path):
    """Run files of tests as `make test` does; returns the finished process."""

    def run(**files):
        (tmp_path / "conftest.py").write_text(CONFTEST)
        (tmp_path / "pytest.ini").write_text("[pytest]\naddopts = -q -p no:cacheprovider\n")
        (tmp_path / "running.py").write_text(Path(running.__file__).read_text("utf-8"))
        for name, content in files.items():
            (tmp_path / f"{name}.py").write_text(content)
        command = [sys.executable, "-m", "pytest", "-p", "xdist", "-n", "2", "--dist", "loadfile"]
        # Other plug-ins of this environment take seconds to import.
        environment = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        return subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)

    return run


def test_a_worker_that_dies_ends_the_run_and_names_the_test(run):
    done = run(test_dies=DIES, test_waits=WAITS)
    assert done.returncode == 1
    assert "crashed while running 'test_dies.py::test_that_is_killed'" in done.stdout
    assert "1 failed" in done.stdout


def test_one_line_per_file(run):
    done = run(test_some=PASSES, test_others="def test_fails(): assert not 'this'\n")
    assert done.returncode == 1
    lines = [line.split() for line in done.stdout.splitlines() if " s  " in line]
    assert [[line[0], *line[3:]] for line in sorted(lines)] == [
        ["test_others.py", "1", "failed"],
        ["test_some.py", "2", "passed,", "1", "skipped"],
    ]
    assert "assert not 'this'" in done.stdout, "a failure is shown whole"
