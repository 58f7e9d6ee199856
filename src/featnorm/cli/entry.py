"""`run`: runs the command line, from the first moment of the process to its exit status."""

import io
import os
import sys

from featnorm.cli.interrupt import INTERRUPTED, EndAtOnce, Interruption

TYPE_CHECKING = False  # `typing` is not imported, see `featnorm.cli.interrupt`
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DEBUG = "--debug"
# As in shells for a process that SIGPIPE ended: 128 plus the number of the signal.
_UNREAD = 141


def run(commands: "Mapping[str, str]", resuming: "Mapping[str, Sequence[str]]") -> None:
    """Run the command that the process was started with, and exit with a status of `featnorm.cli.faults`.

    Parameters
    ----------
    commands : the commands by name, as ``MODULE:FUNCTION``; see `featnorm.cli`.
    resuming : commands that resume when they are run again; of some options, at least one has to be given.
    """
    arguments = sys.argv[1:]
    interruption = Interruption(arguments, resuming)
    interruption.watch()
    # Output that Windows redirects is in a code page, which may lack the minus sign of a table.
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="replace")
    # Imported here, because it takes a while, and Ctrl-C has to be handled from the start.
    from featnorm.cli.app import run_command
    from featnorm.cli.faults import report

    # After an error, people rerun the command with the option at its end.
    end_of_options = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end_of_options] if argument != _DEBUG]
    debug = len(options) < end_of_options
    status: int | str | None = 0
    at_once = False
    try:
        with interruption:
            run_command([*([_DEBUG] if debug else []), *options, *arguments[end_of_options:]], commands)
    except SystemExit as end:
        # rich exits with 1 when nobody reads the output anymore, as in `featnorm ... | head`.
        status = _UNREAD if isinstance(end.__context__, BrokenPipeError) else end.code
        at_once = isinstance(end, EndAtOnce)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = _UNREAD
    except BaseException as error:
        # After Ctrl-C it does not matter which error the interruption turned into.
        status = INTERRUPTED if interruption.caught else report(error, debug=debug)
    if interruption.caught or status == INTERRUPTED:
        interruption.say()
        status = INTERRUPTED
    if status == _UNREAD:
        _discard_output()
    if at_once:
        assert isinstance(status, int)
        os._exit(status)
    sys.exit(status)


def _discard_output() -> None:
    """Discard what is still buffered, which Python would fail to write at exit."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
