"""What the commands print, and what they say of the machine."""

import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

import featnorm
from featnorm._utils.files import try_folder, try_place
from featnorm.evaluation import Evaluation
from featnorm.inputs import ImageSource
from featnorm.inputs.formats import PassedOver
from featnorm.report.tables import table_rows

# Into a file or a pipe a table is as wide as it needs, and is not folded to a terminal that is not there.
# No markup either: a file may be called [red].
SKIPPED_SHOWN = 10
COLUMNS_SHOWN = 6
console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)


def print_table(evaluation: Evaluation) -> None:
    """Print the detectors' measures, and who was left out and why."""
    headers, rows = table_rows(evaluation)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i == 0 else "right", no_wrap=i == 0)
    for row in rows:
        table.add_row(*row)
    console.print(table)
    for name, reason in evaluation.excluded.items():
        console.print(f"left out {name}: {reason}", soft_wrap=True)


def printable(name: str) -> str:
    """Return a file's name as a terminal may have it: characters that would command it are written out."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number of things in words: "1 image", "1,200 images"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def print_skipped(name: str, files: Sequence[tuple[str, str]], count: int | None = None) -> None:
    """Print the first of the images of a set that could not be read, and why; ``count`` is of all of them."""
    count = len(files) if count is None else count
    if not count:
        return
    console.print(f"skipped {counted(count, 'unreadable image')} in {name}:")
    for file, why in files[:SKIPPED_SHOWN]:
        console.print(f"  {printable(file)}: {why}", soft_wrap=True)
    if count > SKIPPED_SHOWN:
        console.print(f"  ... and {count - SKIPPED_SHOWN} more")


def print_reading(read: int, unreadable: int, several: int, passed_over: PassedOver) -> None:
    """Print in one line what became of the images: read, passed over, unreadable.

    Parameters
    ----------
    read, unreadable, several : int
        Numbers of images: of those that were read, that could not be, and that are the first of several frames.
    passed_over : PassedOver
        What was found beside the images.
    """
    said = [f"read {counted(read, 'image')}", str(passed_over)]
    if unreadable:
        said.append(f"{unreadable:,} unreadable")
    if several:
        said.append(f"{several:,} {'has' if several == 1 else 'have'} several frames or pages: the first is used")
    console.print("; ".join(filter(None, said)), soft_wrap=True)


def print_label_columns(source: ImageSource, consequence: str) -> None:
    """Print which columns of an unlabelled table could hold its labels, and what comes of there being none."""
    if not source.label_columns:
        return
    shown = ", ".join(map(printable, source.label_columns[:COLUMNS_SHOWN]))
    more = ", ..." if source.label_columns[COLUMNS_SHOWN:] else ""
    console.print(
        f"{source.title} has no column 'label', so {consequence}. Its columns {shown}{more} could hold labels: "
        "name one by --label-column.",
        soft_wrap=True,
    )


def prepare_folder(out: Path, files: Sequence[Path]) -> None:
    """Make the folder for the results, before the work and not after it, and see that files can be written to it.

    Raises
    ------
    ValueError
        The folder cannot be made or written to, or one of the files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        try_folder(out)
    except OSError as error:
        raise ValueError(f"--out {out} is no folder that can be written to: {error.strerror}") from None
    for file in files:
        try_place(file)


def require_file_place(out: Path, inputs: Sequence[Path]) -> None:
    """See that a file can be written, before the work and not after it, and is none of what is read.

    Raises
    ------
    ValueError
        It cannot, or it is an input, or lies in a folder of them.
    """
    try_place(out)
    place = out.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == place or (path.is_dir() and place.is_relative_to(path.resolve()))):
            raise ValueError(f"{out} would lie over or in what is read, {path}: choose another place")


def environment() -> dict[str, str]:
    """Return the facts that a figure is read with: versions, machine, date and command."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    return {
        "command": command,
        "date": date.today().isoformat(),
        "versions": f"featnorm {featnorm.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        "machine": f"{_processor()}, {torch.get_num_threads()} threads",
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
