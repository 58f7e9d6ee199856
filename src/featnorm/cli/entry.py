"""`main`: from the first moment of a command to its exit status."""

import os
import sys

from featnorm.cli.interrupt import INTERRUPTED, EndAtOnce, Interruption

_DEBUG = "--debug"
# As shells have it for a process that SIGPIPE ended: 128 and its number.
_UNREAD = 141


def main() -> None:
    """Run the command line, and end the process with a status; see `featnorm.cli.faults`."""
    arguments = sys.argv[1:]
    interruption = Interruption(arguments)
    interruption.watch()
    # Not above: what takes a while to import is imported once Ctrl-C is handled.
    from featnorm.cli.app import run
    from featnorm.cli.faults import report

    # A person whose command was refused types it again, with the option at its end.
    end_of_options = arguments.index("--") if "--" in arguments else len(arguments)
    options = [argument for argument in arguments[:end_of_options] if argument != _DEBUG]
    debug = len(options) < end_of_options
    status: int | str | None = 0
    at_once = False
    try:
        with interruption:
            run([*([_DEBUG] if debug else []), *options, *arguments[end_of_options:]])
    except SystemExit as end:
        # typer and rich end with a 1 where nobody reads the output any more, as in `featnorm ... | head`.
        status = _UNREAD if isinstance(end.__context__, BrokenPipeError) else end.code
        at_once = isinstance(end, EndAtOnce)
    except KeyboardInterrupt:
        status = INTERRUPTED
    except BaseException as error:
        # What Ctrl-C turned into on its way here is not looked at.
        status = INTERRUPTED if interruption.caught else report(error, debug=debug)
    if interruption.caught or status == INTERRUPTED:
        interruption.say()
        status = INTERRUPTED
    if at_once:
        assert isinstance(status, int)
        os._exit(status)
    sys.exit(status)
