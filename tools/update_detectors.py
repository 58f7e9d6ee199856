"""Write the README's table of detectors from the registry, between its marks.

python tools/update_detectors.py
"""

import inspect
import re
from pathlib import Path

from featnorm.detectors import Detector, registered_detectors
from featnorm.detectors.base import Wrapper
from featnorm.features import FIELDS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- detectors -->", "<!-- end -->"
_LEGEND = """\
`activation` is the last hidden layer after its non-linearity, `pooled` is the input of the head or the classifier,
and `embedding` is the head's output before normalization; *d*, *D* and *e* are their widths, *C* is the number of
classes, and *n* is the number of training inputs. The cost is per input, in addition to the forward pass that
makes the features. *The model again*: scoring reruns the model on changed inputs."""


def table() -> str:
    """Return the table in Markdown, in the order in which features come out of a model, wrappers last."""
    kinds = [kind for kind in registered_detectors().values() if kind.__module__.startswith("featnorm.detectors.")]
    kinds.sort(key=lambda kind: (issubclass(kind, Wrapper), kind.needs_model, *map(FIELDS.index, kind.reads)))
    rows = [["detector", "reads", "is fitted on", "cost", "source"], ["---"] * 5, *map(_row, kinds)]
    return "".join(f"| {' | '.join(row)} |\n" for row in rows)


def render(text: str) -> str:
    """Return the README with the table in its place."""
    block = f"{START}\n\n{table()}\n{_LEGEND}\n\n{END}"
    text, count = re.subn(f"{START}.*?{END}", lambda _: block, text, flags=re.DOTALL)
    if count != 1:
        raise ValueError(f"README.md has {count} places for the table of detectors: mark one by {START} {END}")
    return text


def _row(kind: type[Detector]) -> list[str]:
    parts = ["as its parts"] if issubclass(kind, Wrapper) else []
    reads = [*parts, *map(_code, kind.reads), *(["the model again"] if kind.needs_model else [])]
    if kind.network:
        reads[-1] += f", {kind.network}"
    cells = [_code(_call(kind)), ", ".join(reads), ", ".join([*parts, *map(_code, kind.learns)])]
    return [*cells, kind.cost, kind.source]


def _call(kind: type[Detector]) -> str:
    """Return how an expression has it, with the arguments that have no default."""
    parameters = inspect.signature(kind).parameters.values()
    required = [parameter.name for parameter in parameters if parameter.default is parameter.empty]
    if kind.operator:
        several = any(parameter.kind is parameter.VAR_POSITIONAL for parameter in parameters)
        return f" {kind.operator} ".join([*required, "..."] if several else required)
    return f"{kind.__name__}({', '.join(required)})" if required else kind.__name__


def _code(text: str) -> str:
    return f"`{text}`"


if __name__ == "__main__":
    README.write_text(render(README.read_text("utf-8")), "utf-8", newline="\n")
