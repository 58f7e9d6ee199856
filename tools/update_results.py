"""Put the tables of `featnorm reproduce` on the page of results, between the marks that name them.

    python tools/update_results.py [FOLDER]

takes over the results in FOLDER, such as featnorm-reproduction/laptop or what `make bench` wrote, and then
writes every table anew from the results that the documentation keeps.
"""

import argparse
import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from featnorm.paper import explanations, heads, imagenet, label_free, moco_length, one_class, own_images
from featnorm.paper.figures import Figure
from featnorm.paper.imagenet_tables import make_tables
from featnorm.paper.tables import Table, make_table, width_figure
from featnorm.paper.theory import FIGURES

RESULTS = Path(__file__).parents[1] / "docs" / "results"
#: The results that each page shows; they lie in a folder of its name.
PAGES = {
    "cifar10": ("table3", "table6", "table7", "figure7", "head-study"),
    "own-images": ("own-images", "shipped"),
    "imagenet": ("table1",),
    "theory": (*FIGURES, "explanation"),
    "label-free": tuple(label_free.TABLES),
    "one-class": (*one_class.TABLES, moco_length.NAME),
    "speed": ("speed",),
}
#: How the pictures are drawn anew from the numbers that are kept.
DRAWN: dict[str, Callable[[Any], str]] = {
    **dict.fromkeys(FIGURES, lambda content: Figure.from_dict(content).svg),
    "figure7": width_figure,
    moco_length.NAME: moco_length.picture,
}
#: Tables that are read off the networks of Table 3.
READ_OFF = ("table3", "table5", "table8", "table10")


def tables(file: Path) -> dict[str, Table]:
    """Return the tables of a file of results, by the names that mark their places."""
    content = json.loads(file.read_text("utf-8"))
    if file.stem in FIGURES:
        return {file.stem: Figure.from_dict(content).table}
    match file.stem:
        case "own-images":
            return own_images.tables(content)
        case "shipped":
            return shipped(content)
        case "speed":
            return speed(content)
        case "explanation":
            return explanations.tables(content)
        case "head-study":
            return heads.tables(content)
        case "table1":
            return large_scale(content)
        case "table4":
            return one_class.tables(content)
        case moco_length.NAME:
            return moco_length.tables(content)
        case "table3":
            return {name: make_table(name, content) for name in READ_OFF}
        case "table3-short":
            # Kept from when these networks were smaller and trained for fewer epochs.
            return {file.stem: make_table("table3", content)}
    return {file.stem: make_table(file.stem, content)}


def large_scale(content: Sequence[Mapping[str, Any]]) -> dict[str, Table]:
    """Return all tables of the ImageNet-1k benchmark, as Table 1 has the networks of the others too."""
    found = {}
    for name in imagenet.TABLES:
        wanted = {job.block for job in imagenet.jobs(name, imagenet.SCALES[content[0]["scale"]])}
        runs = [run for run in content if f"{run['network']}, {run['data']}" in wanted]
        found.update(make_tables(name, runs))
    return found


def shipped(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what tools/measure_shipped.py found, as tables."""
    notes = [
        f"{content['detector']} on {content['images']}",
        "command: python tools/measure_shipped.py",
        *(f"{name}: {value}" for name, value in content["environment"].items()),
    ]
    speed = content["per_second"]
    alone = next(iter(speed.values()))
    rows = [[way, f"{value:.1f}", f"{value / alone:.2f}"] for way, value in speed.items()]
    differences = "; ".join(f"{name} {value:.1g}" for name, value in content["difference"].items())
    answers = (
        f"ONNX against PyTorch, largest differences: {differences}; other verdicts: {content['other_verdicts']}"
    )
    service = [
        [
            f"{row['clients']}",
            f"{row['per_second']:.1f}",
            f"{row['p50_ms']:.0f}",
            f"{row['p99_ms']:.0f}",
            f"{row['images_a_batch']:.1f}",
            ", ".join(f"{count} x {what}" for what, count in row["errors"].items()) or "none",
        ]
        for row in content["service"]
    ]
    headers = ["Clients", "requests a second", "median, ms", "99th percentile, ms", "images a batch", "errors"]
    return {
        "speed": Table(
            "Images a second, single precision", ["What", "images a second", "ratio"], rows, [answers, *notes]
        ),
        "service": Table("The service, one image a request", headers, service, notes),
    }


def speed(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what `make bench` measured, a table a theme."""
    facts = [f"{name}: {value}" for name, value in content["environment"].items()]
    if content["scale"] != "full":
        facts.append("at sizes that only try the benchmarks")
    headers = ["Work", "against", "ours", "theirs", "ratio", "mark", "met", "rounds", "of what"]
    found = {}
    for theme in dict.fromkeys(row["theme"] for row in content["results"]):
        rows = [
            [
                row["work"],
                row["reference"],
                _quantity(row["ours"], row["unit"]),
                _quantity(row["theirs"], row["unit"]),
                f"{row['ratio']:.3g}",
                "–" if row["at_most"] is None else f"≤ {row['at_most']:.3g}",
                {True: "yes", False: "no", None: "–"}[row["met"]],
                f"{row['rounds']}",
                row["sizes"],
            ]
            for row in content["results"]
            if row["theme"] == theme
        ]
        found[theme] = Table(f"{theme.capitalize()}, medians", headers, rows, facts)
    return found


def _quantity(value: float, unit: str) -> str:
    """Return seconds ("s") or bytes ("B") with a prefix that keeps them readable."""
    prefixes = {"s": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")], "B": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]}[unit]
    scale, name = next((prefix for prefix in prefixes if abs(value) >= prefix[0]), prefixes[-1])
    return f"{value / scale:.3g} {name}"


def render(page: str) -> str:
    """Return a page's text with every table anew."""
    text = (RESULTS / f"{page}.md").read_text("utf-8")
    for file in sorted((RESULTS / page).glob("*.json")):
        for name, table in tables(file).items():
            block = f"<!-- {name} -->\n\n{table.markdown()}\n<!-- end -->"
            text, count = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _: block, text, flags=re.DOTALL)  # noqa: B023
            if count != 1:
                raise SystemExit(
                    f"{page}.md has {count} places for {name}: mark one by <!-- {name} --> <!-- end -->"
                )
    return text


def main() -> None:
    """Take over results, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    for page, names in PAGES.items():
        kept = RESULTS / page
        kept.mkdir(exist_ok=True)
        for name in names if folder else ():
            if (folder / f"{name}.json").exists():
                # Where it read and wrote are places on somebody's machine.
                text = re.sub(r" --(out|data-root) [^\s\"]+", "", (folder / f"{name}.json").read_text("utf-8"))
                (kept / f"{name}.json").write_text(text, "utf-8")
        for file in kept.glob("*.json"):
            if file.stem in DRAWN:
                content = json.loads(file.read_text("utf-8"))
                file.with_suffix(".svg").write_text(DRAWN[file.stem](content), encoding="utf-8")
        if (kept / "explanation.json").exists():
            content = json.loads((kept / "explanation.json").read_text("utf-8"))
            for name, drawn in explanations.pictures(content).items():
                (kept / f"explanation-{name}.svg").write_text(drawn, encoding="utf-8")
        (RESULTS / f"{page}.md").write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    main()
