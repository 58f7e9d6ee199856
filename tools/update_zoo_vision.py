"""Write docs/zoo.md: what `FeatureTap` finds in classifiers of timm and torchvision, beside what these say.

    python tools/update_zoo_vision.py [--rows FILE]

It takes about ten minutes, and 8 GiB of memory. With ``--rows``, the rows are kept in a file of JSON lines, and
a rerun checks only the models that are not in it.
"""

import argparse
import dataclasses
import json
import platform
import sys
from datetime import UTC, datetime
from pathlib import Path

import timm
import torch
import torchvision

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "helpers"))

from zoo_vision import TIMM, TOLERANCE, TORCHVISION, Row, check  # noqa: E402


def main() -> int:
    """Run the command, and return its exit status: 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=Path, help="File that keeps the rows. Default: not kept.")
    file = parser.parse_args().rows
    rows: dict[tuple[str, str], Row] = {}
    if file is not None and file.exists():
        for line in file.read_text(encoding="utf-8").splitlines():
            library, row = json.loads(line)
            rows[library, row["name"]] = Row(**row)
    for library, names in (("timm", TIMM), ("torchvision", TORCHVISION)):
        for name in names:
            if (library, name) not in rows:
                row = rows[library, name] = check(library, name)
                print(f"{library} {name}: {row.seconds:.1f} s {'; '.join(row.problems())}", flush=True)
                if file is not None:
                    with file.open("a", encoding="utf-8") as kept:
                        kept.write(json.dumps([library, dataclasses.asdict(row)]) + "\n")
    (ROOT / "docs" / "zoo.md").write_text("\n".join(page(rows)) + "\n", encoding="utf-8")
    wrong = {name: problems for name, row in rows.items() if (problems := row.problems())}
    for (library, name), problems in wrong.items():
        print(f"{library} {name}: {'; '.join(problems)}", file=sys.stderr)
    return 1 if wrong else 0


def page(rows: dict[tuple[str, str], Row]) -> list[str]:
    """Return the lines of the page."""
    same = sum(library == "timm" and not row.reason for (library, _), row in rows.items())
    differ = sum(library == "timm" and bool(row.reason) for (library, _), row in rows.items())
    lines = [
        "# Image classifiers",
        "",
        f"What `FeatureTap` finds in {same + differ} models of timm, at least one per family, and all "
        f"{len(rows) - same - differ} classifiers of torchvision, with random weights. The logits are the model's "
        f"output, bit for bit. In {same} models of timm, `pooled` is `forward_head(forward_features(x), "
        f"pre_logits=True)` within {TOLERANCE:.0e} of its largest value; in {differ} it differs for the "
        "reason given. In torchvision's, it is the input of the head. *Hidden* is the number of units of the last "
        "hidden layer, which NAN reads; it is missing where nothing rectified stands before the classifier. "
        "*Classifier* is the error of `W f + b`, or what stands between.",
        "",
        f"{datetime.now(UTC):%Y-%m-%d}, timm {timm.__version__}, torchvision {torchvision.__version__}, "
        f"torch {torch.__version__}, {platform.machine()}, {platform.system()}. "
        "Written by `python tools/update_zoo_vision.py`.",
    ]
    for library in ("timm", "torchvision"):
        lines += [
            "",
            f"## {library}",
            "",
            "| model | parameters | image | pooled | hidden | error of pooled | classifier |",
            "|---|---:|---:|---:|---:|---|---|",
        ]
        notes: list[str] = []
        for (owner, name), row in sorted(rows.items()):
            if owner != library:
                continue
            note = ""
            if row.reason:
                notes += [row.reason] if row.reason not in notes else []
                note = f" ({notes.index(row.reason) + 1})"
            between = row.absent.get("classifier", "").removeprefix("there is ").partition(" between ")[0]
            lines.append(
                f"| {name} | {row.parameters / 1e6:.1f} M | {row.size} | {row.width} | {row.activation or ''} "
                f"| {_error(row.pooled)}{note} | {between if row.classifier is None else _error(row.classifier)} |"
            )
        lines += ["", *(f"{i}. {reason}." for i, reason in enumerate(notes, 1))] if notes else []
    return lines


def _error(value: float) -> str:
    return f"{value:.0e}" if value else "0"


if __name__ == "__main__":
    sys.exit(main())
