"""Ctrl-C at chosen moments: one line on standard error, status 130, and nothing swallows it."""

import os
import subprocess
import sys

import pytest

from featnorm.__main__ import RESUMING
from featnorm.cli.interrupt import Interruption

# Raises SIGINT when a module is looked for, as Ctrl-C in that moment would.
FINDER = """
import signal, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            sys.meta_path.remove(self)
            signal.raise_signal(signal.SIGINT)

sys.meta_path.insert(0, Finder())
"""
# A command whose work is other than its own, so that torch need not be imported.
WORK = """
import os, signal, sys, time, types

ctrl_c = lambda: signal.raise_signal(signal.SIGINT)

def hang():
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        time.sleep(0.01)
    print("not interrupted")

def work():
{work}

sys.modules["featnorm.cli.demo"] = types.ModuleType("demo")
sys.modules["featnorm.cli.demo"].demo = work
"""
MAIN = """
sys.argv = ["featnorm", *{arguments!r}]
from featnorm.__main__ import main
main()
"""


def run(code, folder):
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=folder, timeout=120)
    return done.returncode, done.stdout, done.stderr


def at_import(module, arguments):
    return FINDER.format(module=module) + MAIN.format(arguments=arguments)


def at_work(*lines):
    return WORK.format(work="\n".join(f"    {line}" for line in lines)) + MAIN.format(arguments=["demo"])


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("typer", ["fit", "photos"]),
        ("torch", ["fit", "photos"]),
        # torch takes an error here for a missing library, and goes on.
        ("torch._C", ["fit", "photos"]),
        ("numpy.linalg", ["fit", "photos"]),
        ("featnorm.cli.fit", ["--debug", "fit", "photos"]),
        ("torch", ["score", "d.featnorm", "photos", "-o", "scores.csv"]),
        ("torch", ["reproduce", "table1"]),
    ],
)
def test_while_a_module_is_imported(module, arguments, tmp_path):
    found = run(at_import(module, arguments), tmp_path)
    assert found == (130, "", "featnorm: interrupted; rerun the same command to resume\n")


@pytest.mark.parametrize(
    "arguments", [["demo"], ["inspect", "--model", "timm:resnet18"], ["score", "d.featnorm", "x"]]
)
def test_a_command_that_does_not_resume_says_no_more(arguments, tmp_path):
    assert run(at_import("torch", arguments), tmp_path) == (
        130,
        "",
        "featnorm: interrupted\n",
    )


def test_a_module_that_takes_every_exception_does_not_swallow_it(tmp_path):
    (tmp_path / "greedy.py").write_text("try:\n    import wanted\nexcept BaseException:\n    pass\n")
    code = FINDER.format(module="wanted") + at_work("import greedy", "hang()")
    assert run(code, tmp_path) == (130, "", "featnorm: interrupted\n")


@pytest.mark.parametrize(
    "work",
    [
        ("ctrl_c()", "hang()"),
        # On the way out files are closed and workers ended.
        ("try: ctrl_c()", "finally: open('cleaned', 'w').close()"),
        # A destructor, as any callback from C, cannot raise.
        ("class Held:", "    def __del__(self): ctrl_c()", "Held()", "hang()"),
        # faiss turns it into a RuntimeError, import_array of numpy into an ImportError.
        ("try: ctrl_c()", "except KeyboardInterrupt: raise RuntimeError('computation interrupted')"),
        ("try: ctrl_c()", "except BaseException: pass"),
        # Pressed again while the first is cleaned up after.
        ("try: ctrl_c()", "finally:", "    ctrl_c()", "    hang()"),
        ("raise KeyboardInterrupt",),
    ],
    ids=["work", "cleaned up", "destructor", "turned into an error", "taken", "twice", "by itself"],
)
def test_while_a_command_works(work, tmp_path, request):
    assert run(at_work(*work), tmp_path) == (130, "", "featnorm: interrupted\n")
    assert (tmp_path / "cleaned").exists() == ("cleaned up" in request.node.name)


def test_after_the_work_while_the_process_ends(tmp_path):
    assert run(at_work("import atexit", "atexit.register(ctrl_c)"), tmp_path) == (
        130,
        "",
        "featnorm: interrupted\n",
    )


def test_what_runs_in_the_background_goes_on(tmp_path):
    ignored = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    assert run(ignored + at_work("ctrl_c()", "print('done')"), tmp_path) == (0, "done\n", "")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="nothing is forked here")
def test_a_forked_worker_leaves_it_to_the_command(tmp_path):
    work = (
        "child = os.fork()",
        "if not child:",
        "    ctrl_c()",
        "    os._exit(7)",
        "print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))",
    )
    assert run(at_work(*work), tmp_path) == (0, "7\n", "")


@pytest.mark.parametrize(
    ("arguments", "resumes"),
    [
        (["fit", "photos"], True),
        (["--debug", "fit", "photos"], True),
        (["reproduce", "all"], True),
        (["score", "d.featnorm", "photos", "--out", "s.csv"], True),
        (["score", "d.featnorm", "photos", "-os.csv"], True),
        (["score", "d.featnorm", "photos", "--html=s.html"], True),
        (["score", "d.featnorm", "photos"], False),
        (["evaluate", "--model", "fit", "-o", "x"], False),
        (["demo", "--out", "fit"], False),
        ([], False),
    ],
)
def test_what_resumes(arguments, resumes, capfd):
    interruption = Interruption(arguments, RESUMING)
    interruption.say()
    interruption.say()
    line = "featnorm: interrupted; rerun the same command to resume\n" if resumes else "featnorm: interrupted\n"
    assert capfd.readouterr() == ("", line)
