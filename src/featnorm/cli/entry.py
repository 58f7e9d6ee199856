"""`run`: from the first moment of a command to its exit status."""

import os
import sys

from featnorm.cli.interrupt import INTERRUPTED, EndAtOnce, Interruption

TYPE_CHECKING = False  # `typing` is not imported, see `featnorm.cli.interrupt`
if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_DEBUG = "--debug"
# As shells have it for a process that SIGPIPE ended: 128 and its number.
_UNREAD = 141


def run(commands: "Mapping[str, str]", resuming: "Mapping[str, Sequence[str]]") -> None:
    """Run the command line of the process, and end the process with a status; see `featnorm.cli.faults`.

    Parameters
    ----------
    commands : the commands by name, as ``MODULE:FUNCTION``; see `featnorm.cli`.
    resuming : the commands that resume when they are run again, with the options of which one has to be given.
    """
    arguments = sys.argv[1:]
    interruption = Interruption(arguments, resuming)
    interruption.watch()
    # Not above: what takes a while to import is imported once Ctrl-C is handled.
    from featnorm.cli.app import run_command
    from featnorm.cli.faults import report

    # A person whose command was refused types it again, with the option at its end.
    end_of_options = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end_of_options] if argument != _DEBUG]
    debug = len(options) < end_of_options
    status: int | str | None = 0
    at_once = False
    try:
        with interruption:
            run_command([*([_DEBUG] if debug else []), *options, *arguments[end_of_options:]], commands)
    except SystemExit as end:
        # rich ends with a 1 where nobody reads the output any more, as in `featnorm ... | head`.
        status = _UNREAD if isinstance(end.__context__, BrokenPipeError) else end.code
        at_once = isinstance(end, EndAtOnce)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BrokenPipeError:
        status = _UNREAD
    except BaseException as error:
        # What Ctrl-C turned into on its way here is not looked at.
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
    """Let what is still buffered go nowhere: Python would fail to write it as it ends."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        os.dup2(nowhere, stream.fileno())
