"""Ctrl-C, from the first moment of a command to the last.

This module imports as little as possible: until the handler is installed, Ctrl-C ends in a traceback.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # true for type checkers; importing `typing` takes too long
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType
    from typing import Any

INTERRUPTED = 130
"""Exit status after Ctrl-C, as in shells: 128 plus the number of SIGINT."""

_IMPORTING = "<frozen importlib._bootstrap>"
# Seconds after which Ctrl-C is delivered again if a callback has swallowed it.
_AGAIN = 0.05


class EndAtOnce(SystemExit):
    """Exits with a status without waiting for threads."""


class Interruption:
    """Handles Ctrl-C: a command ends with one line on standard error and the status `INTERRUPTED`.

    While the command works, Ctrl-C raises a KeyboardInterrupt, so that files, workers and locks are cleaned up.
    Where an exception would be lost, the process exits at once: before and after the work, while a module is being
    imported (its code may catch the exception, or turn it into an ImportError), and when Ctrl-C is pressed again.
    A command then leaves behind what it would leave after a kill, from which all commands recover.

    Parameters
    ----------
    arguments : arguments of the command line, which determine whether the same command resumes.
    resuming : commands that resume when they are run again; where options are listed, one of them must be given.
    """

    def __init__(self, arguments: Sequence[str], resuming: Mapping[str, Sequence[str]]) -> None:
        self.caught = False
        resume = "; rerun the same command to resume" if _resumes(arguments, resuming) else ""
        self._line = f"featnorm: interrupted{resume}\n"
        self._process = os.getpid()
        self._working = False
        self._raised = False
        self._said = False

    def watch(self) -> None:
        """Handle Ctrl-C from now on, until the process ends."""
        # A shell ignores SIGINT for commands in the background: Ctrl-C is meant for another command.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        try:
            signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # only the main thread can handle signals
            return
        sys.unraisablehook = self._on_unraisable

    def __enter__(self) -> None:
        """Begin the work of the command, during which Ctrl-C raises a KeyboardInterrupt."""
        self._working = True

    def __exit__(self, *_: object) -> None:
        self._working = False

    def say(self) -> None:
        """Print the line, once."""
        if self._said:
            return
        self._said = True
        # sys.stderr may have been interrupted in the middle of a write. On a terminal the line begins below a
        # progress bar, or below the ^C.
        try:
            os.write(2, ("\n" * os.isatty(2) + self._line).encode())
        except OSError:  # the reader is gone
            return

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A forked worker is ended by the process that started it.
        if os.getpid() != self._process:
            return
        self.caught = True
        if self._raised or not self._working or _is_importing(frame):
            self.say()
            os._exit(INTERRUPTED)
        self._raised = True
        raise KeyboardInterrupt

    def _on_unraisable(self, ignored: Any) -> None:
        """Deliver Ctrl-C again after a destructor or a callback, which cannot raise, has swallowed it."""
        if not issubclass(ignored.exc_type, KeyboardInterrupt) or not self._raised:
            sys.__unraisablehook__(ignored)
            return
        import threading

        self._raised = False
        again = threading.Timer(_AGAIN, _interrupt_main)
        again.daemon = True
        again.start()


def _interrupt_main() -> None:
    import threading

    if hasattr(signal, "pthread_kill"):
        # This wakes a waiting thread; a flag would only be checked between two instructions.
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
    else:
        signal.raise_signal(signal.SIGINT)


def _is_importing(frame: FrameType | None) -> bool:
    while frame is not None:
        if frame.f_code.co_filename == _IMPORTING:
            return True
        frame = frame.f_back
    return False


def _resumes(arguments: Sequence[str], resuming: Mapping[str, Sequence[str]]) -> bool:
    """Whether the same command, run again, resumes where this run ended."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command not in resuming:
        return False
    options = resuming[command]
    return not options or any(_is_option(argument, option) for argument in arguments for option in options)


def _is_option(argument: str, option: str) -> bool:
    """Whether an argument is an option, perhaps with its value: ``--out=FILE``, ``-oFILE``."""
    return argument.startswith(option) and (option.startswith("--") or not argument.startswith("--"))
