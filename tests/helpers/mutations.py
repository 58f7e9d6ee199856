"""A file's header with each of its fields as it should not be, one at a time."""

import copy
from collections.abc import Iterator
from typing import Any

VALUES = (None, True, -1, 10**400, float("nan"), "x", {"x": {}})
GONE = object()


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
    """Yield what was changed, and the header with that change: a part gone, one more, or another value."""
    for place in places(header):
        if not place:
            yield "one more", {**header, "x": 1}
            continue
        for value in (GONE, *VALUES):
            changed = copy.deepcopy(header)
            part = changed
            for key in place[:-1]:
                part = part[key]
            if value is GONE:
                del part[place[-1]]
            elif part[place[-1]] == value and type(part[place[-1]]) is type(value):
                continue
            else:
                part[place[-1]] = value
            yield f"{'.'.join(map(str, place))}: {'gone' if value is GONE else repr(value)[:40]}", changed
        if isinstance(value := _at(header, place), dict):
            changed = copy.deepcopy(header)
            _at(changed, place)["x"] = 1
            yield f"{'.'.join(map(str, place))}: one more", changed
        elif isinstance(value, list) and value:
            changed = copy.deepcopy(header)
            _at(changed, place).append(copy.deepcopy(value[0]))
            yield f"{'.'.join(map(str, place))}: the first twice", changed


def _at(value: Any, place: tuple[Any, ...]) -> Any:
    for key in place:
        value = value[key]
    return value
