"""`run_command`: the command group, and the options that belong to no command."""

import io
import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from importlib import import_module
from typing import Annotated, Any

import typer

import featnorm
from featnorm._utils.errors import is_featnorms
from featnorm._utils.memory import keep_freed_memory
from featnorm.cli.faults import STATUSES

PROGRAM = "featnorm"
_STYLE: dict[str, Any] = {"rich_markup_mode": "markdown", "pretty_exceptions_enable": False}
_EPILOG = "Exit status: " + ", ".join(f"{status} {meaning}" for status, meaning in STATUSES.items()) + "."


class _Commands(Mapping[str, Any]):
    """Commands by name. Looking up a command imports its module.

    Parameters
    ----------
    places : functions of the commands by name, as ``MODULE:FUNCTION``.
    """

    def __init__(self, places: Mapping[str, str]) -> None:
        self._places = places

    def __getitem__(self, name: str) -> Any:
        module, _, function = self._places[name].partition(":")
        alone = typer.Typer(add_completion=False, **_STYLE)
        alone.command(name)(getattr(import_module(module), function))
        return typer.main.get_command(alone)

    def __iter__(self) -> Iterator[str]:
        return iter(self._places)

    def __len__(self) -> int:
        return len(self._places)


def run_command(arguments: Sequence[str], commands: Mapping[str, str]) -> None:
    """Run the command that the arguments name. Errors of the command are raised as they are.

    Parameters
    ----------
    arguments : arguments of the command line.
    commands : commands by name, as ``MODULE:FUNCTION``; see `featnorm.cli`.

    Raises
    ------
    SystemExit
        The command exited with a status, or printed its help.
    """
    keep_freed_memory()
    # Where a warning of Pillow matters, there is an error that names the file.
    warnings.filterwarnings("ignore", module="PIL")
    warnings.formatwarning = _format_warning
    # A terminal that cannot show some character must not make the command fail.
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app = typer.Typer(
        name=PROGRAM,
        help="Does your PyTorch model know this input? Out-of-distribution detection by the negative-aware norm.",
        epilog=_EPILOG,
        **_STYLE,
    )
    app.callback()(_before_commands)
    group: Any = typer.main.get_command(app)
    group.commands = _Commands(commands)
    if f"_{PROGRAM.upper()}_COMPLETE" in os.environ:
        group.main(prog_name=PROGRAM)  # prints the completions and exits
    # `group.main` would handle errors and Ctrl-C in its own way.
    try:
        with group.make_context(PROGRAM, list(arguments) or ["--help"]) as context:
            group.invoke(context)
    except typer.Exit as end:
        raise SystemExit(end.exit_code) from None


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """Return a warning of featnorm as one line, and others with the place where they come from."""
    if is_featnorms(filename):
        return f"{PROGRAM}: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"{PROGRAM} {featnorm.__version__}")
        raise typer.Exit


def _before_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
    # Handled by `featnorm.cli.entry`, wherever it stands in the command.
    debug: Annotated[
        bool,
        typer.Option(
            "--debug", help="Show the traceback of any error. Can also be given at the end of a command."
        ),
    ] = False,
) -> None:
    """Declare the options that belong to no command."""
