"""Commands in a process of their own, and what they import there."""

import json
import os
import subprocess
import sys

HEAVY = "torch numpy torchvision timm sklearn scipy faiss matplotlib PIL pyarrow"


def run_apart(folder, *arguments, **options):
    """Run one command in a process of its own; return what it printed. For the options see `run_all_apart`."""
    return run_all_apart(folder, [arguments], **options)[0]


def run_all_apart(folder, commands, without=HEAVY, **environment):
    """Run commands one after the other in a process of their own; return what each printed.

    Parameters
    ----------
    folder : working directory of the process.
    commands : arguments of each command, which must succeed.
    without : names of modules that must not have been imported by the end of the last command.
    environment : further variables of the environment.
    """
    code = (
        "import json, sys\n"
        "from featnorm.__main__ import main\n"
        "for command in json.loads(sys.argv.pop()):\n"
        "    sys.argv[1:] = command\n"
        "    try: main()\n"
        "    except SystemExit as end:\n"
        "        if end.code: raise\n"
        "    print(end='\\f')\n"
        f"imported = set({without!r}.split()) & set(sys.modules)\n"
        "assert not imported, imported\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, json.dumps([list(map(str, arguments)) for arguments in commands])],
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "COLUMNS": "200", **environment},
    )
    assert done.returncode == 0, done.stderr
    *printed, rest = done.stdout.split("\f")
    assert not rest
    return printed
