"""Runs the code of a page in Markdown, block by block, in a folder of its own.

A block of ``python`` is executed; all blocks of a page share their names. If its first line is a comment with a
file name, it is written to that file instead. A block of ``console`` runs the commands after each ``$``: those of
featnorm in this process (with ``&``, in one that ends with the page), ``python FILE``, ``curl`` and ``echo $?``,
without which an exit status that is not 0 fails. Lines below a command, and a block of ``text`` right after one of
``python``, are the expected output, in which ``...`` stands for anything. A block after
``<!-- not run: REASON -->`` is not run.
"""

import doctest
import hashlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
from contextlib import chdir, redirect_stdout
from pathlib import Path
from typing import NamedTuple

import filelock
import torch

from apart import command, first_lines_of, start

_FENCE = re.compile(
    r"^(?:<!-- (?P<mark>.+?) -->\n+)?```(?P<language>\w+)\n(?P<code>.*?)^```$", re.DOTALL | re.MULTILINE
)
_FILE = re.compile(r"# (\S+\.\w+)\n")
_COMMAND = re.compile(r"\$ (?P<command>(?:.*\\\n)*.*)\n(?P<output>(?:(?!\$ ).*\n)*)")
_STARTED = []  # processes
_FLAGS = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE


class Block(NamedTuple):
    """A block of code: its line in the page, and the output of ``python`` if the page has it."""

    line: int
    language: str
    code: str
    output: str
    skipped: str


def blocks(text):
    """Return the blocks of a page that a reader would run."""
    found, previous = [], None
    for match in _FENCE.finditer(text):
        line, code = text.count("\n", 0, match.start("code")) + 1, match["code"]
        adjacent = previous is not None and not text[previous.end() : match.start()].strip()
        if match["language"] == "text" and adjacent and found and found[-1].language == "python":
            found[-1] = found[-1]._replace(output=code)
        elif match["language"] in ("python", "console"):
            mark = match["mark"] or ""
            found.append(
                Block(
                    line,
                    match["language"],
                    code,
                    "",
                    mark.removeprefix("not run: ") if "not run: " in mark else "",
                )
            )
        previous = match
    return found


def run_page(page, featnorm, capsys, shared, names=None):
    """Run the blocks of a page; a failure names the line of the block.

    Parameters
    ----------
    page : path of the page.
    featnorm : the fixture that runs the command.
    capsys : pytest's fixture.
    shared : folder for what programs write; see `run_once`.
    names : what the blocks of ``python`` find defined.
    """
    names = {"__name__": "__main__", **(names or {})}
    try:
        _run_blocks(page, featnorm, capsys, shared, names)
    finally:
        while _STARTED:
            process = _STARTED.pop()
            process.terminate()
            process.join(30)


def _run_blocks(page, featnorm, capsys, shared, names):
    for block in blocks(page.read_text("utf-8")):
        if block.skipped:
            continue
        place = f"{page.name}:{block.line}"
        try:
            if block.language == "console":
                _run_console(block, place, featnorm, shared)
            elif file := _FILE.match(block.code):
                Path(file[1]).write_text(block.code, "utf-8")
            else:
                exec(compile("\n" * (block.line - 1) + block.code, str(page), "exec"), names)
                _compare(block.output, capsys.readouterr().out, place)
        except Exception as error:
            error.add_note(f"in {place}")
            raise


def _run_console(block, place, featnorm, shared):
    status, error = 0, ""
    for found in _COMMAND.finditer(block.code):
        text = found["command"].replace("\\\n", " ").removesuffix("&")
        program, *arguments = shlex.split(text, comments=True)
        assert status == 0 or program == "echo", f"{place}: exit status {status} before {text}: {error}"
        if program == "echo":
            printed, status = f"{status}\n", 0
        elif program == "featnorm" and found["command"].endswith("&"):
            printed = _start(arguments)
        elif program == "featnorm":
            status, printed, error = featnorm(*arguments)
        elif program == "python":
            printed, wrote = run_once(Path(arguments[0]), shared)
            shutil.copytree(wrote, ".", dirs_exist_ok=True)
        elif program == "curl":
            printed = subprocess.run(
                [program, "-sS", *arguments], capture_output=True, text=True, check=True
            ).stdout
        else:
            raise AssertionError(f"{place}: {program} is not run here; mark the block as not run, with the reason")
        _compare(found["output"], printed, place)
    assert status == 0, f"{place}: exit status {status}: {error}"


def run_once(program, shared):
    """Run a program of Python in an empty folder, once for all processes that share a folder.

    Returns what it printed, and the folder of what it wrote.
    """
    place = shared / hashlib.sha256(program.read_bytes()).hexdigest()
    said, wrote = place / "said", place / "wrote"
    with filelock.FileLock(f"{place}.lock"):
        if not said.exists():
            wrote.mkdir(parents=True)
            shutil.copy(program, wrote)
            with chdir(wrote), torch.random.fork_rng(), redirect_stdout(io.StringIO()) as printed:
                runpy.run_path(program.name, run_name="__main__")
            said.write_text(printed.getvalue(), "utf-8")
    return said.read_text("utf-8"), wrote


def _start(arguments):
    """Start featnorm in the background, to the end of the page; returns the first line that it prints."""
    _STARTED.append(start(command, *arguments, out=Path("printed in the background")))
    return first_lines_of(Path("printed in the background"), _STARTED[-1])


def _compare(expected, printed, place):
    if expected.strip():
        example = doctest.Example("", expected)
        checker = doctest.OutputChecker()
        assert checker.check_output(expected, printed, _FLAGS), (
            f"{place}: {checker.output_difference(example, printed, _FLAGS)}"
        )
