"""The command in a process of its own, and what it imports there."""

import os
import subprocess
import sys

HEAVY = "torch numpy torchvision timm sklearn scipy faiss matplotlib PIL pyarrow"


def run_apart(folder, *arguments, without=HEAVY, **environment):
    """Run the command in a process of its own; return what it printed.

    Parameters
    ----------
    folder : working directory of the process.
    arguments : arguments of the command, which must succeed.
    without : names of modules that must not have been imported by the end of the command.
    environment : further variables of the environment.
    """
    code = (
        "import sys\n"
        "from featnorm.__main__ import main\n"
        "status = 0\n"
        "try: main()\n"
        "except SystemExit as end: status = end.code\n"
        f"imported = set({without!r}.split()) & set(sys.modules)\n"
        "assert not imported, imported\n"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **environment},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout
