"""``featnorm`` and ``python -m featnorm``: which commands there are.

Little is imported here, and each command only when it runs: until `featnorm.cli.entry.run` handles Ctrl-C, Python
ends with a traceback.
"""

import sys

from featnorm.cli.entry import run

COMMANDS = {
    "demo": "featnorm.cli.demo:demo",
    "fit": "featnorm.cli.fit:fit",
    "score": "featnorm.cli.score:score",
    "evaluate": "featnorm.cli.evaluate:evaluate",
    "monitor": "featnorm.cli.monitor:monitor",
    "serve": "featnorm.cli.serve:serve",
    "export": "featnorm.cli.export:export",
    "inspect": "featnorm.cli.inspect:inspect",
    "reproduce": "featnorm.paper.command:reproduce",
}
"""The commands by name, as ``MODULE:FUNCTION``; see `featnorm.cli`."""

RESUMING = {"fit": (), "score": ("--out", "-o", "--html"), "reproduce": ()}
"""The commands that resume when they are run again; of some options, at least one has to be given."""


def main() -> None:
    """Run the command that the process was started with, and end the process with a status."""
    run(COMMANDS, RESUMING)


if __name__ == "__main__":
    sys.argv[0] = "featnorm"  # as results state the command, and not this file
    main()
