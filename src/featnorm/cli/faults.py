"""How errors are reported: one line or a traceback on standard error, and the exit status."""

import dis
import platform
import sys
import traceback
from typing import Any

from typer.exceptions import TyperException

from featnorm import __version__
from featnorm._utils.errors import RefusalError, UserCodeError, is_library

INTERNAL = 1
INVALID = 2
STATUSES = {
    0: "success",
    INTERNAL: "internal error in featnorm (please report the traceback)",
    INVALID: "wrong usage or input (explained in one line)",
    3: "drift (`monitor`)",
    130: "interrupted by Ctrl-C",
}
"""Exit statuses and their meaning."""

_HINT = " (rerun with --debug for the traceback)"
_LESS_MEMORY = "lower --batch-size, or free memory"
# Part of the message of torch's allocator, which does not raise a MemoryError.
_NO_MEMORY = "can't allocate memory"


def report(error: BaseException, *, debug: bool) -> int:
    """Print an error and return the exit status.

    Parameters
    ----------
    error : error that a command raised.
    debug : whether to print the traceback of every error, and not of internal ones alone.
    """
    message = _message(error)
    if message is None or debug:
        traceback.print_exception(error)
    if message is None:
        torch = sys.modules.get("torch")
        versions = [f"featnorm {__version__}", f"Python {platform.python_version()}", platform.platform()]
        versions += [f"torch {torch.__version__}"] if torch is not None else []
        print(
            f"featnorm: internal error, {type(error).__name__}. Please report it to the maintainers with the "
            f"command, this traceback and the versions: {', '.join(versions)}.",
            file=sys.stderr,
        )
        return INTERNAL
    hint = _HINT if isinstance(error, UserCodeError) and not debug else ""
    print(f"featnorm: {' '.join(message.split())}{hint}", file=sys.stderr)
    return INVALID


def _message(error: BaseException) -> str | None:
    """Return the message of an error that the call, the input or the machine caused; None for any other error."""
    ray = sys.modules.get("ray")
    if ray is not None and isinstance(error, ray.exceptions.RayTaskError):
        error = error.cause
    if isinstance(error, TyperException):
        return _wrong_call(error)
    said = str(error) or type(error).__name__
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return f"out of memory ({said}): {_LESS_MEMORY}"
    if isinstance(error, RuntimeError) and not isinstance(error, RefusalError):
        return f"{said}: {_LESS_MEMORY}" if _NO_MEMORY in said else None
    if isinstance(error, ImportError):
        return None if (error.name or "").partition(".")[0] == "featnorm" else said
    if isinstance(error, (OSError, RefusalError)):
        return said
    return said if isinstance(error, (ValueError, TypeError)) and _is_deliberate(error) else None


def _wrong_call(error: Any) -> str:
    """Return the message of an error that typer raised, with the command that prints the options."""
    said = error.format_message().replace("Value error, ", "")
    context = getattr(error, "ctx", None)
    command = "featnorm" if context is None else context.command_path
    return f"{said[:1].lower()}{said[1:]}{'' if said.endswith(('.', '?')) else '.'} See {command} --help"


def _is_deliberate(error: BaseException) -> bool:
    """Whether a ``raise`` statement outside the libraries raised it, and not a bug such as a failed unpacking."""
    last = error.__traceback__
    while last is not None and last.tb_next is not None:
        last = last.tb_next
    # Another process raised it, where the traceback stayed.
    if last is None:
        return True
    code = last.tb_frame.f_code
    return not is_library(code.co_filename) and dis.opname[code.co_code[last.tb_lasti]] == "RAISE_VARARGS"
