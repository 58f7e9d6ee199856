"""The entry point of ``featnorm`` and ``python -m featnorm``, and the list of commands.

This module imports as little as possible: until `featnorm.cli.entry.run` handles Ctrl-C, it ends in a traceback.
The module of a command is imported when the command runs.
"""

import sys

from featnorm.cli.entry import run

COMMANDS = {
    "demo": "featnorm.cli.demo:demo",
    "fit": "featnorm.cli.fit:fit",
    "score": "featnorm.cli.score:score",
    "calibrate": "featnorm.cli.calibrate:calibrate",
    "evaluate": "featnorm.cli.evaluate:evaluate",
    "monitor": "featnorm.cli.monitor:monitor",
    "serve": "featnorm.cli.serve:serve",
    "export": "featnorm.cli.export:export",
    "inspect": "featnorm.cli.inspect:inspect",
    "reproduce": "featnorm.paper.reproduce:reproduce",
}
"""Commands by name, as ``MODULE:FUNCTION``; see `featnorm.cli`."""

RESUMING = {"fit": (), "score": ("--out", "-o", "--html"), "reproduce": ()}
"""Commands that resume when they are run again; where options are listed, at least one of them must be given."""


def main() -> None:
    """Run the command that the process was started with, and exit with a status."""
    run(COMMANDS, RESUMING)


if __name__ == "__main__":
    sys.argv[0] = "featnorm"  # results state the command that made them
    main()
