"""Prepare featnorm's docstrings for napoleon, which takes what follows a parameter's colon for its type.

In featnorm the annotation is the type, and the text says what the value is. Where the text is below, a type
is after the colon.
"""

import re

from featnorm._utils.checks import ScoreLike

_DASHES = re.compile(r"-{3,}$")
_PARAMETER = re.compile(r"(\*{0,2}\w+(?:, \*{0,2}\w+)*) : (.+)")


def described(lines):
    """Return the lines with a parameter's text below its name, and that of what is returned below its type."""
    result, section, indent = [], "", ""
    for i, line in enumerate(lines):
        if line and _DASHES.match("".join(lines[i + 1 : i + 2])):
            section, indent = line, ""
        parameter = _PARAMETER.match(line)
        typed = "".join(lines[i + 1 : i + 2]).startswith("    ")
        if section in ("Parameters", "Attributes") and parameter and not typed:
            result += [parameter[1], "    " + parameter[2]]
            continue
        result.append(indent + line)
        if (
            section in ("Returns", "Yields")
            and _DASHES.match(line)
            and not "".join(lines[i + 2 : i + 3]).startswith(" ")
        ):
            result.append(":")  # neither a name nor a type
            indent = "    "
    return result


class ArrayLike:
    """What stands for a type that would fill three lines."""


ArrayLike.__module__ = "builtins"


def _shorten_types(app, obj, bound_method):
    annotations = getattr(obj, "__annotations__", {})
    annotations.update({name: ArrayLike for name, value in annotations.items() if value == ScoreLike})


def _process(app, what, name, obj, options, lines):
    lines[:] = described(lines)


def setup(app):
    """Connect before napoleon, whose priority is 500."""
    app.connect("autodoc-before-process-signature", _shorten_types)
    app.connect("autodoc-process-docstring", _process, priority=400)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
