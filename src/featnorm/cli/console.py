"""What the commands share: printing, checks of where they write, and facts about the machine."""

from __future__ import annotations

import platform
import shlex
import sys
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

import featnorm
from featnorm._utils.files import check_folder_writable, check_writable

if TYPE_CHECKING:
    from collections.abc import Sequence

    from featnorm.calibration import Calibration
    from featnorm.evaluation import Comparison
    from featnorm.inputs import Kind, Source
    from featnorm.inputs.formats import PassedOver
    from featnorm.parts import PartCalibration

MAX_SKIPPED_SHOWN = 10
MAX_COLUMNS_SHOWN = 6
# A file or a pipe has no terminal whose width could fold a table. There is no markup: a file may be called [red].
console = Console(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 160)


def print_table(comparison: Comparison) -> None:
    """Print the metrics of the detectors, and remarks on them."""
    from featnorm.report.tables import table_rows

    headers, rows = table_rows(comparison)
    table = Table(box=None, pad_edge=False, header_style="bold")
    for i, header in enumerate(headers):
        table.add_column(header, justify="left" if i < 2 else "right", no_wrap=i == 0)
    for name, clique, *cells in rows:
        # An interval below its number leaves room for more columns.
        table.add_row(name, clique, *(cell.replace(" [", "\n[") for cell in cells))
    console.print(table)
    print_remarks(comparison)


def print_remarks(comparison: Comparison) -> None:
    """Print which detectors are worse than chance, and which were skipped and why."""
    from featnorm.report.tables import remarks

    for line in remarks(comparison):
        console.print(line, soft_wrap=True)


def printable(name: str) -> str:
    """Return a file name with those characters escaped that would control a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in name)


def counted(count: int, noun: str, plural: str = "") -> str:
    """Return a number with its noun: "1 group", "1,200 groups"."""
    return f"{count:,} {noun if count == 1 else plural or noun + 's'}"


def print_skipped(name: str, kind: Kind, files: Sequence[tuple[str, str]], count: int | None = None) -> None:
    """Print how many items of a set could not be read, and the first of them with the reasons.

    Parameters
    ----------
    name : name of the set.
    kind : what its items are.
    files : names and reasons of the items, or of the first of them.
    count : number of all items that could not be read. Default: the number of ``files``.
    """
    count = len(files) if count is None else count
    if not count:
        return
    console.print(f"skipped {counted(count, f'unreadable {kind.noun}')} in {name}:")
    for file, why in files[:MAX_SKIPPED_SHOWN]:
        console.print(f"  {printable(file)}: {why}", soft_wrap=True)
    if count > MAX_SKIPPED_SHOWN:
        console.print(f"  ... and {count - MAX_SKIPPED_SHOWN} more")


def print_reading(kind: Kind, read: int, unreadable: int, several: int, passed_over: PassedOver) -> None:
    """Print in one line how many items were read and unreadable, and how many other files were ignored.

    Parameters
    ----------
    kind : Kind
        What the items are.
    read, unreadable, several : int
        Number of items that were read, that could not be read, and that are the first of several frames.
    passed_over : PassedOver
        Files beside the items.
    """
    said = [f"read {kind.counted(read)}", str(passed_over)]
    if unreadable:
        said.append(f"{unreadable:,} unreadable")
    if several:
        said.append(f"{several:,} {'has' if several == 1 else 'have'} several frames or pages: the first is used")
    console.print("; ".join(filter(None, said)), soft_wrap=True)


def rate_words(calibration: Calibration | PartCalibration, items: str) -> str:
    """Return for which groups the rate holds or, without groups, its range for this calibration set."""
    from featnorm.parts import PartCalibration

    if isinstance(calibration, PartCalibration):  # the range depends on how alike the parts of a unit are
        rate = f"{100 * (1 - calibration.tpr):.1f} %"
        return f" in a new clip, and at most {rate} of new clips" if items == "frames" else ""
    groups = calibration.group_names
    if not groups:
        low, high = calibration.false_alarm_range()
        return f"; with this one, between {100 * low:.1f} % and {100 * high:.1f} % (90 % confidence)"
    own = sum(len(calibration.pool(group)) == 1 for group in groups)
    if own == 0:
        return f" in all {len(groups)} groups together: each has too few {items} for a threshold of its own"
    if own == len(groups):
        return f" in each of {counted(own, 'group')}"
    return (
        f" in each of {counted(own, 'group')}, and in the other {len(groups) - own} together, which have too few "
        f"{items} for thresholds of their own"
    )


def print_label_columns(source: Source[Any], consequence: str) -> None:
    """Print which columns of an unlabeled table could hold its labels, and the consequence of having no labels."""
    if not source.label_columns:
        return
    shown = ", ".join(map(printable, source.label_columns[:MAX_COLUMNS_SHOWN]))
    more = ", ..." if source.label_columns[MAX_COLUMNS_SHOWN:] else ""
    console.print(
        f"{source.title} has no column 'label', so {consequence}. Its columns {shown}{more} could hold labels: "
        "choose one with --label-column.",
        soft_wrap=True,
    )


def prepare_folder(out: Path, files: Sequence[Path]) -> None:
    """Create the output folder and check that files can be written to it, before the work starts.

    Raises
    ------
    ValueError
        The folder cannot be created or written to, or one of the files cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        check_folder_writable(out)
    except OSError as error:
        raise ValueError(f"cannot write to the folder --out {out}: {error.strerror}") from None
    for file in files:
        check_writable(file)


def require_file_place(out: Path, inputs: Sequence[Path]) -> None:
    """Check that a file can be written and overwrites no input, before the work starts.

    Raises
    ------
    ValueError
        It cannot be written, or it is an input, or it lies in an input folder.
    """
    check_writable(out)
    place = out.resolve()
    for path in inputs:
        if path.exists() and (path.resolve() == place or (path.is_dir() and place.is_relative_to(path.resolve()))):
            raise ValueError(f"{out} would overwrite the input {path}, or lie in it: choose another path")


def environment() -> dict[str, str]:
    """Return the facts that results are stated with: command, date, versions and machine."""
    command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
    versions, machine = [f"featnorm {featnorm.__version__}"], _processor()
    # A command that does not need torch does not import it.
    torch = sys.modules.get("torch")
    if torch is not None:
        versions.append(f"torch {torch.__version__}")
        machine += f", {counted(torch.get_num_threads(), 'thread')}"
    return {
        "command": command,
        "date": date.today().isoformat(),
        "versions": ", ".join([*versions, f"Python {platform.python_version()}"]),
        "machine": machine,
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
