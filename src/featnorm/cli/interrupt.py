"""Ctrl-C, from the first moment of a command to its last.

As little as possible is imported here: until the handler stands, Ctrl-C ends in Python's own traceback.
"""

from __future__ import annotations

import os
import signal
import sys

TYPE_CHECKING = False  # which type checkers take for true; `typing` itself is not imported
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from types import FrameType
    from typing import Any

INTERRUPTED = 130
"""The exit status after Ctrl-C, as shells have it: 128 and the number of SIGINT."""

_IMPORTING = "<frozen importlib._bootstrap>"
# Seconds after which Ctrl-C is delivered again where a callback has swallowed it.
_AGAIN = 0.05


class EndAtOnce(SystemExit):
    """Ends the process with a status, without waiting for its threads."""


class Interruption:
    """What a command does about Ctrl-C: it ends with one line and `INTERRUPTED`.

    While the command works, Ctrl-C is a KeyboardInterrupt, so that files, workers and locks are cleaned up on the
    way out. Where an exception would be lost, the process ends at once: before and after the work, where a module
    is being imported (whose code may catch it, or turn it into an ImportError), and when Ctrl-C is pressed again.
    Whatever a command leaves behind then is what it would after a kill, which all of them survive.

    Parameters
    ----------
    arguments : the arguments of the command line, which tell whether the same command resumes.
    resuming : the commands that resume when they are run again, with the options of which one has to be given.
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
        # As a shell has it for what runs in the background: Ctrl-C is meant for something else.
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
            return
        try:
            signal.signal(signal.SIGINT, self._handle)
        except ValueError:  # only the main thread is interrupted
            return
        sys.unraisablehook = self._on_unraisable

    def __enter__(self) -> None:
        """Let Ctrl-C be a KeyboardInterrupt in the block, which is the command's work."""
        self._working = True

    def __exit__(self, *_: object) -> None:
        self._working = False

    def say(self) -> None:
        """Print the line, once."""
        if self._said:
            return
        self._said = True
        # Not by sys.stderr, which the handler may have interrupted in the middle of a write. On a terminal the
        # line begins below a progress bar, or below the ^C.
        try:
            os.write(2, ("\n" * os.isatty(2) + self._line).encode())
        except OSError:  # nobody is there to read it
            return

    def _handle(self, number: int, frame: FrameType | None) -> None:
        # A worker that was forked off: the process that started it ends it.
        if os.getpid() != self._process:
            return
        self.caught = True
        if self._raised or not self._working or _is_importing(frame):
            self.say()
            os._exit(INTERRUPTED)
        self._raised = True
        raise KeyboardInterrupt

    def _on_unraisable(self, ignored: Any) -> None:
        """Deliver Ctrl-C again where a destructor or a callback, which cannot raise, has swallowed it."""
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
        # Unlike a flag that is looked at between two instructions, it wakes a thread that waits.
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
    """Whether the same command, run again, resumes from what this run has done."""
    command = next((argument for argument in arguments if not argument.startswith("-")), "")
    if command not in resuming:
        return False
    options = resuming[command]
    return not options or any(_is_option(argument, option) for argument in arguments for option in options)


def _is_option(argument: str, option: str) -> bool:
    """Whether an argument is an option, perhaps with its value: ``--out=FILE``, ``-oFILE``."""
    return argument.startswith(option) and (option.startswith("--") or not argument.startswith("--"))
