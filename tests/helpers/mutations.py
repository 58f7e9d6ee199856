"""A file's header with each of its fields as it should not be, one at a time."""

import copy
from collections.abc import Iterator
from typing import Any

VALUES = (None, True, -1, 10**400, float("nan"), "x", {"x": {}})


def places(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the way to each part of plain data, the whole first."""
    yield place
    if isinstance(value, dict):
        for key, part in value.items():
            yield from places(part, (*place, key))
    elif isinstance(value, list):
        for i, part in enumerate(value):
            yield from places(part, (*place, i))


def mutated(header: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what was changed, and the header with that change: a part gone, one more, or another value.

    The headers share the parts that are the same: copies of the whole take long.
    """
    for place in places(header):
        if not place:
            yield "one more", {**header, "x": 1}
            continue
        name = ".".join(map(str, place))
        changed, part = _copied(header, place[:-1])
        before = part[place[-1]]
        del part[place[-1]]
        yield f"{name}: gone", changed
        for value in VALUES:
            if before != value or type(before) is not type(value):
                changed, part = _copied(header, place[:-1])
                part[place[-1]] = value
                yield f"{name}: {repr(value)[:40]}", changed
        changed, part = _copied(header, place)
        if isinstance(part, dict):
            part["x"] = 1
            yield f"{name}: one more", changed
        elif isinstance(part, list) and part:
            part.append(part[0])
            yield f"{name}: the first twice", changed


def _copied(value: Any, place: tuple[Any, ...]) -> tuple[Any, Any]:
    """Return plain data, and the part at a place: copies of the parts on the way there, and of that one."""
    copied = part = copy.copy(value)
    for key in place:
        part[key] = copy.copy(part[key])
        part = part[key]
    return copied, part
