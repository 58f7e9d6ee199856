"""Errors of the user's code: where they were raised, and their messages."""

import os
import sysconfig
import traceback
from pathlib import Path
from types import FrameType
from typing import Self

_PACKAGE = str(Path(__file__).parents[1]) + os.sep
_LIBRARIES = tuple({sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")})


RAISED_BY_USERS = (Exception, SystemExit)
"""Exceptions that the user's code may raise. A ``sys.exit`` in it must not end featnorm."""


class RefusalError(Exception):
    """Base of the errors for a call that featnorm does not support, if they are not a ValueError or TypeError."""


class NotFiniteError(ValueError):
    """Features, weights or scores hold a NaN, or an infinity where none is valid."""


class UserCodeError(ValueError):
    """An error raised by the user's code: a model, a transform or a function. The original is its cause."""

    def on(self, inputs: str) -> Self:
        """Return the same error with the inputs on which it was raised added to its message."""
        return type(self)(f"{self}, on {inputs}")


def error_text(error: BaseException) -> str:
    """Return the type of an error and the first line of its message, with the next one if it ends in a colon."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # torch names the module that a state dict does not fit in the first line, and the tensors in the others.
    shown = " ".join(lines[:2] if lines and lines[0].endswith(":") else lines[:1])
    return f"{type(error).__name__}: {shown}" if shown else type(error).__name__


def first_line(error: BaseException) -> str:
    """Return the message of an error, cut to one line; its type if it has no message."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def is_featnorms(file: str) -> bool:
    """Whether a source file is part of featnorm."""
    return file.startswith(_PACKAGE)


def is_library(file: str) -> bool:
    """Whether a source file is part of Python or of an installed library other than featnorm."""
    return (file.startswith(("<", *_LIBRARIES))) and not is_featnorms(file)


def frames_of(error: BaseException) -> list[tuple[FrameType, int]]:
    """Return the frames of an error's traceback and the line in each; the frame that raised it is the last."""
    return list(traceback.walk_tb(error.__traceback__))


def error_site(error: BaseException) -> str:
    """Return where code outside featnorm raised an error, as ``, at module:function (file:line)``.

    The site is the innermost call outside installed libraries; if there is none, the innermost forward pass of a
    module, or else the innermost call. It is empty if featnorm's own call failed, or if the error comes from
    another process.
    """
    if isinstance(error, SyntaxError) and error.filename:
        return f", at {_short(error.filename)}:{error.lineno}"
    frames = [part for part in frames_of(error) if not is_featnorms(part[0].f_code.co_filename)]
    if not frames:
        return ""
    users = [part for part in frames if not is_library(part[0].f_code.co_filename)]
    forward = [part for part in frames if part[0].f_code.co_name == "forward"]
    frame, line = (users or forward or frames)[-1]
    code = frame.f_code
    return f", at {frame.f_globals.get('__name__', '?')}:{code.co_qualname} ({_short(code.co_filename)}:{line})"


def _short(file: str) -> str:
    """Return a path relative to the working directory or to a folder of libraries, if it is in one."""
    for folder in (os.path.join(os.getcwd(), ""), *sorted(_LIBRARIES, key=len, reverse=True)):
        if file.startswith(folder):
            return file.removeprefix(folder)
    return file
