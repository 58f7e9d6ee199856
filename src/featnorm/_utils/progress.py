"""Progress of long work: a bar on a terminal, and a line every 30 seconds in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Between two lines of a log.
_SECONDS = 30.0


class _ProgressLines(tqdm):  # type: ignore[misc]
    """A progress bar of whole lines, for where there is no terminal that could draw over a line."""

    def set_description(self, desc: str | None = None, refresh: bool = True) -> None:
        """Set the text before the numbers, without writing another line."""
        super().set_description(desc, refresh=False)

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line. An empty one, with which tqdm removes a bar, is ignored."""
        if msg == "":
            return False
        print(str(self) if msg is None else msg, file=self.fp, flush=True)
        return True


def progress_bar(iterable: Iterable[Any] | None = None, *, progress: bool | None = None, **options: Any) -> Any:
    """Return a progress bar for standard error, as tqdm's; it disappears when it is closed.

    Parameters
    ----------
    iterable : iterable whose items are counted. Default: the bar's ``update`` is called.
    progress
        Whether to show the bar. Default: on a terminal; elsewhere write a line about every 30 seconds (percentage,
        done and total, time taken, time left, rate).
    options : other arguments of tqdm, such as ``total``, ``desc`` and ``unit``.
    """
    if progress is not None or sys.stderr.isatty():
        return tqdm(iterable, leave=False, disable=progress is False, **options)
    lines = {"mininterval": _SECONDS, "delay": _SECONDS, "miniters": 1, "ncols": 0}
    return _ProgressLines(iterable, leave=False, **lines, **options)
