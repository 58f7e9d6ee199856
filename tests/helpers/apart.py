"""Commands and functions in a process of their own, and what commands import there."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time

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


def start(function, *arguments, out, error=os.devnull):
    """Start a function in a copy of this process, where nothing is imported again; returns the process.

    Where copies of processes are not sound it is a new one, without what tests have patched.

    Parameters
    ----------
    function, arguments : a function of a module, and what it is given.
    out, error : files to which the process writes.
    """
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    process = context.Process(target=_write_to, args=(str(out), str(error), function, arguments))
    process.start()
    return process


def first_lines_of(out, process, count=1):
    """Return what a process writes to a file until that are so many lines."""
    while (said := out.read_text("utf-8") if out.exists() else "").count("\n") < count:
        assert process.is_alive(), "it ended before"
        time.sleep(0.01)
    return said


def command(*arguments):
    """Run the command to the end of the process."""
    from featnorm.__main__ import main

    sys.argv = ["featnorm", *map(str, arguments)]
    main()


def _write_to(out, error, function, arguments):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    # A copy has none of the threads of its parent, and would wait for them for ever.
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    with open(out, "w", 1, "utf-8") as sys.stdout, open(error, "w", 1, "utf-8") as sys.stderr:
        os.dup2(sys.stdout.fileno(), 1)
        os.dup2(sys.stderr.fileno(), 2)
        function(*arguments)
