"""Errors of code that is not featnorm's: whose it is, where it raised, and what it said."""

import os
import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Self

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


RAISED_BY_USERS = (Exception, SystemExit)
"""What the user's own code may raise. A ``sys.exit`` in it is meant for a program of its own, not for featnorm."""


class RefusalError(Exception):
    """Base of the errors by which featnorm refuses a call, where they are no ValueError and no TypeError."""


class UserCodeError(ValueError):
    """The user's own code, a model, a transform or a function, raised an error; it is the cause of this one."""

    def on(self, inputs: str) -> Self:
        """Return the same error with the inputs named on which the code raised."""
        return type(self)(f"{self}, on {inputs}")


def said(error: BaseException) -> str:
    """Return the type of an error and the first line of what it says."""
    name = type(error).__name__
    return next((f"{name}: {line.strip()}" for line in str(error).splitlines() if line.strip()), name)


def first_line(error: BaseException) -> str:
    """Return the message of an error, cut to one line; its type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_featnorms(file: str) -> bool:
    """Whether a source file is featnorm's own."""
    return file.startswith(_PACKAGE)


def is_library(file: str) -> bool:
    """Whether a source file is of Python or of an installed library, featnorm left out."""
    return (file.startswith(("<", *_LIBRARIES))) and not is_featnorms(file)


def frames_of(error: BaseException) -> list[tuple[FrameType, int]]:
    """Return the frames that an error passed through and the line in each, the one that raised it last."""
    return list(traceback.walk_tb(error.__traceback__))


def at(error: BaseException) -> str:
    """Return where code that is not featnorm's raised an error, as ``, at module:function (file:line)``.

    That is the innermost call in code that is no installed library's; where there is none, the innermost forward
    pass of a module, or else the innermost call. Empty where the call by featnorm itself failed, or where the
    error is of another process.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f", at {_short(error.filename)}:{error.lineno}"
    frames = [part for part in frames_of(error) if not is_featnorms(part[0].f_code.co_filename)]
    if not frames:
        return ""
    theirs = [part for part in frames if not is_library(part[0].f_code.co_filename)]
    forward = [part for part in frames if part[0].f_code.co_name == "forward"]
    frame, line = (theirs or forward or frames)[-1]
    code = frame.f_code
    return f", at {frame.f_globals.get('__name__', '?')}:{code.co_qualname} ({_short(code.co_filename)}:{line})"


def _short(file: str) -> str:
    """Return a path relative to the working directory, or to the folder of the libraries, where it lies in one."""
    for folder in (os.path.join(os.getcwd(), ""), *sorted(_LIBRARIES, key=len, reverse=True)):
        if file.startswith(folder):
            return file.removeprefix(folder)
    return file
