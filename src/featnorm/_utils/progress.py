"""Progress of long work: a bar on a terminal, and a line every now and then in a log."""

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

# Between two lines of a log.
_SECONDS = 30.0


class _ProgressLines(tqdm):  # type: ignore[misc]
    """A progress bar of whole lines, for where there is no terminal that could draw over a line."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        """Write the line; an empty one, by which tqdm would remove the bar, is left out."""
        if msg == "":
            return False
        print(str(self) if msg is None else msg, file=self.fp, flush=True)
        return True


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Return tqdm's progress bar, which disappears at its end, for standard error.

    Where that is no terminal, a line is written about every 30 seconds: done and total, time and time left, rate.

    Parameters
    ----------
    iterable : what to iterate over. Default: the bar is moved by its ``update``.
    options : other arguments of tqdm, such as ``total``, ``desc`` and ``unit``.
    """
    if sys.stderr.isatty():
        return tqdm(iterable, leave=False, **options)
    lines = {"mininterval": _SECONDS, "delay": _SECONDS, "miniters": 1, "ncols": 0}
    return _ProgressLines(iterable, leave=False, **lines, **options)
