"""Write the pages of the detectors from the registry, and those of the commands from their options.

They stand in ``docs/reference/detectors`` and ``docs/reference/commands``, and are not committed.
"""

import inspect
import re
import tomllib
from pathlib import Path

import typer

from featnorm.__main__ import COMMANDS
from featnorm.cli.app import _Commands
from featnorm.cli.faults import STATUSES
from featnorm.detectors import Detector, registered_detectors
from featnorm.detectors.base import Wrapper
from featnorm.features import FIELDS

FAILURES: dict[str, str] = tomllib.loads(Path(__file__).with_name("failures.toml").read_text("utf-8"))

_DETECTORS = """\
# Detectors

Every detector computes one score per input, which is **higher for in-distribution inputs**; distances are negated.
[Choosing a detector](../../guide/choosing.md) says which to try first.

{table}
`activation` is the last hidden layer after its non-linearity, `pooled` is the input of the head or the classifier,
and `embedding` is the head's output before normalization; *d*, *D* and *e* are their widths, *C* is the number of
classes, and *n* is the number of training inputs. The cost is per input, in addition to the forward pass that
makes the features. *The model again*: scoring reruns the model on changed inputs.

```{{toctree}}
:hidden:

{names}
```
"""
_DETECTOR = """\
# {name}

{formula}
{facts}
**When it fails.** {failure}

```{{eval-rst}}
.. autoclass:: featnorm.{name}
   :exclude-members: cost, formula, learns, needs_model, network, operator, reads, role, settings, source, standard
```
"""
_COMMANDS = """\
# Commands

| command | what it does |
| --- | --- |
{rows}
Every command exits with one of these statuses:

| status | meaning |
| --- | --- |
{statuses}
An error in your own model, transform or function exits with status 2, and the message names the function, its file
and line number, and the images it ran on. `--debug`, before the command or at its end, shows the traceback of any
error.

```{{toctree}}
:hidden:

{names}
```
"""


def detector_pages() -> dict[str, str]:
    """Return the text of each page by its name, in the order of the fields in a model, wrappers last."""
    kinds = [kind for kind in registered_detectors().values() if kind.__module__.startswith("featnorm.detectors.")]
    kinds.sort(key=lambda kind: (issubclass(kind, Wrapper), kind.needs_model, *map(FIELDS.index, kind.reads)))
    rows = [["detector", "reads", "is fitted on", "cost", "source"], ["---"] * 5]
    rows += [[f"[{_code(_call(kind))}]({kind.__name__}.md)", *facts(kind).values()] for kind in kinds]
    pages = {kind.__name__: _page(kind) for kind in kinds}
    return {"index": _DETECTORS.format(table=_table(rows), names="\n".join(pages)), **pages}


def facts(kind: type[Detector]) -> dict[str, str]:
    """Return what the registry knows of a detector, as Markdown by its label."""
    parts = ["as its parts"] if issubclass(kind, Wrapper) else []
    reads = [*parts, *map(_code, kind.reads), *(["the model again"] if kind.needs_model else [])]
    if kind.network:
        reads[-1] += f", {kind.network}"
    learns = [*parts, *map(_code, kind.learns)]
    return {
        "Reads": ", ".join(reads),
        "Is fitted on": ", ".join(learns) or "nothing",
        "Cost per input": kind.cost,
        "Source": kind.source,
    }


def _page(kind: type[Detector]) -> str:
    known = facts(kind) | {"In expressions": _code(_call(kind))}
    if kind.standard:
        known["In the standard comparison"] = ", ".join(map(_code, kind.standard))
    rows = [["", ""], ["---"] * 2, *([f"**{label}**", text] for label, text in known.items())]
    texts = {"formula": f"$$\n{kind.formula}\n$$\n", "facts": _table(rows), "failure": FAILURES[kind.__name__]}
    return _DETECTOR.format(name=kind.__name__, **texts)


def command_pages() -> dict[str, str]:
    """Return the text of each page by its name."""
    commands = dict(_Commands(COMMANDS))
    rows = [[f"[`featnorm {name}`]({name}.md)", _summary(made)] for name, made in commands.items()]
    statuses = _table([[str(status), meaning] for status, meaning in STATUSES.items()])
    index = _COMMANDS.format(rows=_table(rows), statuses=statuses, names="\n".join(commands))
    return {"index": index, **{name: _command_page(name, made) for name, made in commands.items()}}


def _command_page(name: str, made: typer.core.TyperCommand) -> str:
    context = typer.Context(made, info_name=f"featnorm {name}")
    usage = made.get_usage(context).removeprefix("Usage: ")
    shown = [parameter for parameter in made.params if not parameter.hidden]
    rows = [["argument or option", "meaning"], ["---"] * 2, *(_option(parameter, context) for parameter in shown)]
    return f"# featnorm {name}\n\n```text\n{usage}\n```\n\n{inspect.cleandoc(made.help or '')}\n\n{_table(rows)}"


def _option(parameter: typer.core.TyperOption | typer.core.TyperArgument, context: typer.Context) -> list[str]:
    """Return the row of an option or an argument; the type of an argument says nothing."""
    names, text = parameter.get_help_record(context)
    text = re.sub(r"(`[^`]*`)|(?<![\w-])(--[a-z][a-z-]*)", lambda match: match[1] or f"`{match[2]}`", text)
    return [_code(re.sub(r" <.*", "", names) if parameter.param_type_name == "argument" else names), text]


def _summary(made: typer.core.TyperCommand) -> str:
    return " ".join(inspect.cleandoc(made.help or "").split("\n\n")[0].split())


def _table(rows: list[list[str]]) -> str:
    """Return rows in Markdown; a bar in a cell would end it."""
    return "".join(f"| {' | '.join(_bars(cell) for cell in row)} |\n" for row in rows)


def _bars(cell: str) -> str:
    return re.sub(r"(?<!\\)\|", r"\\|", " ".join(cell.split()))


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


def _write(app) -> None:
    for name, pages in {"detectors": detector_pages(), "commands": command_pages()}.items():
        folder = Path(app.srcdir, "reference", name)
        folder.mkdir(parents=True, exist_ok=True)
        for stale in {file.stem for file in folder.iterdir()} - pages.keys():
            (folder / f"{stale}.md").unlink()
        for page, text in pages.items():
            file = folder / f"{page}.md"
            if not file.is_file() or file.read_text("utf-8") != text:
                file.write_text(text, "utf-8", newline="\n")


def setup(app):
    """Write the pages before Sphinx looks for its sources."""
    app.connect("builder-inited", _write)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
