"""Groups of items (cameras, clips, patients), by their folders, a column of their table, or a pattern."""

import os
import re
from typing import Any

from featnorm.inputs.errors import DataError
from featnorm.inputs.source import Source


def group_items(source: Source[Any], by: str) -> list[str]:
    r"""Return the group of each item of a source.

    Parameters
    ----------
    source : the items.
    by
        How to find the group of an item:

        - ``folder``: it is the name of the folder that holds the item's file;
        - the name of a column: it is the item's value there, as a string; null is not allowed;
        - a regular expression with one pair of parentheses: it is what they match in the item's `Source.name`,
          such as ``clip_(\d+)``. The expression may match anywhere in the name.

        A name of a column is taken for a column, even if it is "folder" or has parentheses.

    Raises
    ------
    DataError
        There is no such column, the expression is invalid or has another number of groups, or an item has no
        group.
    """
    columns = source.columns
    if by in columns:
        values = source.column(by)
        if None in values:
            raise DataError(
                f"{source.name(values.index(None))} has no value in the column {by!r}, and so no group"
            )
        return [str(value) for value in values]
    if by == "folder":
        pattern, what = re.compile(r"([^\\/]+)[\\/][^\\/]*$" if os.sep == "\\" else r"([^/]+)/[^/]*$"), "folder"
    elif (pattern := _compiled(by)).groups or "(" in by:
        what = f"match of {by!r}"
        if pattern.groups != 1:
            raise DataError(
                f"cannot group by {by!r}: it has {pattern.groups} groups, but the group of an item is what one "
                "pair of parentheses matches; write (?:...) for the others"
            )
    else:
        has = f"its columns are {', '.join(columns)}" if columns else "it is not a table"
        raise DataError(
            f"{source.title} has no column {by!r} to group by ({has}): name a column, write folder, or give a "
            "regular expression with one pair of parentheses"
        )
    groups = []
    for i in range(len(source)):
        name = source.name(i)
        match = pattern.search(name)
        if match is None or match[1] is None:
            raise DataError(f"{name} has no {what}, and so no group: every item needs one")
        groups.append(match[1])
    return groups


def _compiled(by: str) -> re.Pattern[str]:
    try:
        return re.compile(by)
    except re.error as error:
        raise DataError(
            f"cannot group by {by!r}: it is neither a column nor a regular expression ({error})"
        ) from None
