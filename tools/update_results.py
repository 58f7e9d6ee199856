"""Put the tables of `featnorm reproduce` on the pages of results, between the marks that name them.

    python tools/update_results.py [FOLDER]

copies the results in FOLDER, such as featnorm-reproduction/laptop or what `make bench` wrote, and then writes
every table and picture from the results that the documentation keeps. Each page keeps them in a folder of its
name.
"""

import argparse
import json
import re
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import norm_tables

from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.study import Study, studies
from featnorm.paper.tables import Table

RESULTS = Path(__file__).parents[1] / "docs" / "results"
STUDIES = studies()


def shipped(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what tools/measure_shipped.py measured, as tables."""
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
    headers = ["Clients", "requests per second", "median, ms", "99th percentile, ms", "images per batch", "errors"]
    return {
        "speed": Table(
            "Images per second, single precision", ["What", "images per second", "ratio"], rows, [answers, *notes]
        ),
        "service": Table("The service, one image per request", headers, service, notes),
    }


def speed(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what `make bench` measured, one table per theme."""
    facts = [f"{name}: {value}" for name, value in content["environment"].items()]
    if content["scale"] != "full":
        facts.append("at sizes that only test the benchmarks")
    headers = ["Work", "against", "ours", "theirs", "ratio", "target", "met", "rounds", "of what"]
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


def engines(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what tools/measure_engines.py measured, as a table."""

    def shown(value: float | None, unit: str) -> str:
        if value is None:
            return "–"
        return f"{value:.3g} per second" if unit == "per second" else _quantity(value, unit)

    rows = [
        [
            row["work"],
            shown(row["before"], row["unit"]),
            shown(row["now"], row["unit"]),
            "–" if row["before"] is None else f"{row['now'] / row['before']:.2f}",
            row.get("mark") or "–",
            {True: "yes", False: "no", None: "–"}[row.get("met")],
        ]
        for row in content["rows"]
    ]
    notes = [
        f"{content['images']:,} JPEG files of 256 x 256 pixels, and {content['texts']:,} texts",
        "command: python tools/measure_engines.py",
        *(f"{name}: {value}" for name, value in content["environment"].items()),
    ]
    headers = ["Work", "before", "now", "now / before", "mark", "met"]
    return {"engines": Table("Before and now, in turn", headers, rows, notes)}


def choices(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what tools/measure_choices.py measured, as a table."""
    first: dict[str, float] = {}
    rows = [
        [
            row["work"],
            row["way"],
            _quantity(row["seconds"], "s"),
            f"{row['seconds'] / first.setdefault(row['work'], row['seconds']):.2f}",
            "–" if row["gap"] is None else f"{row['gap']:.1e}" if row["gap"] else "0",
        ]
        for row in content["rows"]
    ]
    notes = [
        "ratio: to the first way of the same work; difference: of the features, relative to the largest",
        "command: python tools/measure_choices.py",
        *(f"{name}: {value}" for name, value in content["environment"].items()),
    ]
    headers = ["Work", "way", "CPU time per item", "ratio", "difference"]
    return {"choices": Table("Engines, layouts, batches and decoders, in turn", headers, rows, notes)}


def drift(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what tools/measure_drift.py measured, as tables: shifts, other kinds of drift, and false alarms."""
    streams, after = content["streams"], content["after"]
    facts = [
        f"share of {streams} streams in which it was found within {after:,} inputs / median number of inputs",
        "command: python tools/measure_drift.py",
        *(f"{name}: {value}" for name, value in content["environment"].items()),
    ]
    found: dict[str, Table] = {}
    for name, is_shift in {"shifts": True, "kinds": False}.items():
        chosen = [row for row in content["rows"] if row["drift"].startswith(_SHIFT) is is_shift]
        methods = list(dict.fromkeys(row["method"] for row in chosen))
        rows = {(row["drift"], row["start"]): [row["drift"], f"{row['start']:,}"] for row in chosen}
        for row in chosen:
            median = row["delay"][1]
            cell = f"{100 * row['found']:.1f} % / {'–' if median is None else f'{median:,}'}"
            rows[row["drift"], row["start"]].append(cell)
        found[name] = Table("Drifts found", ["Drift", "inputs before it", *methods], list(rows.values()), facts)
    found["false-alarms"] = Table(
        "Streams without drift that raise the alarm",
        ["calibration scores", *(f"at most {100 * float(rate):g} % promised" for rate in _rates(content))],
        [
            [f"{row['calibrated']:,}", *(f"{100 * row['shares'][rate]:.1f} %" for rate in _rates(content))]
            for row in content["false_alarms"]
        ],
        [f"{streams} streams of {content['false_alarms'][0]['inputs']:,} inputs", *facts[1:]],
    )
    return found


def drift_curves(content: Mapping[str, Any]) -> str:
    """Return the share of streams in which a shift was found, over the number of inputs since it, as SVG."""
    rows = []
    for start in dict.fromkeys(row["start"] for row in content["rows"]):
        shifts = [row for row in content["rows"] if row["start"] == start and row["drift"].startswith(_SHIFT)]
        panels = []
        for name in dict.fromkeys(row["drift"] for row in shifts):
            lines = [
                Line(row["method"], row["curve"][2:], [2**i for i in range(2, len(row["curve"]))], style)
                for style, row in enumerate(row for row in shifts if row["drift"] == name)
            ]
            title = f"{name} after {start:,} inputs"
            panels.append(Panel(title, "inputs since the shift", "share of streams", lines, log2=True))
        rows += [panels[:3], panels[3:]]
    return panel_figure(rows)


_SHIFT = "a shift of"


def _rates(content: Mapping[str, Any]) -> list[str]:
    return list(content["false_alarms"][0]["shares"])


def _quantity(value: float, unit: str) -> str:
    """Return seconds ("s") or bytes ("B") with a prefix that keeps them readable."""
    prefixes = {"s": [(1, "s"), (1e-3, "ms"), (1e-6, "µs")], "B": [(1e9, "GB"), (1e6, "MB"), (1e3, "kB")]}[unit]
    scale, name = next((prefix for prefix in prefixes if abs(value) >= prefix[0]), prefixes[-1])
    return f"{value / scale:.3g} {name}"


def selection(content: Mapping[str, Any]) -> dict[str, Table]:
    """Return what tools/measure_selection.py measured: what the rule chose, and the scores of every candidate."""
    facts = [
        "AUROC in percent / percent of OOD inputs flagged where 5 % of ID inputs are; means over the OOD sets",
        f"{len(next(iter(content['settings'].values())))} seeds",
        *(f"{name}: {value}" for name, value in content["environment"].items()),
    ]
    found: dict[str, Table] = {}
    rules = []
    for name, runs in content["settings"].items():
        sizes = ", ".join(f"{size:,} {kind}" for kind, size in runs[0]["sizes"].items())
        # By detector, the mean AUROC and flagged share of each seed.
        means = {
            detector: [
                [statistics.fmean(pair) for pair in zip(*run["ood"][detector].values(), strict=True)]
                for run in runs
            ]
            for detector in runs[0]["ood"]
        }
        single = [detector for detector in means if " + " not in detector]
        best = max(single, key=lambda detector: statistics.fmean(mean[0] for mean in means[detector]))
        chosen = ", ".join(dict.fromkeys(run["chosen"] for run in runs))
        by_rule = [means[run["chosen"]][seed] for seed, run in enumerate(runs)]
        columns = [by_rule, means[_FIXED_SUM], means["KLUniform()"], means[best]]
        rules.append([name, chosen, *map(_pair, columns[:3]), f"{_pair(columns[3])} {best}"])
        rows = [
            [
                detector,
                _mean(100 * row["held_out"] for row in ranks),
                _mean(100 * row["destroyed"] for row in ranks),
                f"{sum(row['in_clique'] for row in ranks)}",
                _pair(means[detector]),
                *(_pair([run["ood"][detector][kind] for run in runs]) for kind in runs[0]["ood"][detector]),
            ]
            for detector in sorted(means, key=lambda name: -statistics.fmean(mean[0] for mean in means[name]))
            for ranks in [[row for run in runs for row in run["candidates"] if row["detector"] == detector]]
        ]
        seconds = (_mean(run["seconds"][i] for run in runs) for i in (0, 1))
        excluded = ", ".join(dict.fromkeys(detector for run in runs for detector in run["excluded"]))
        notes = [f"inputs: {sizes}", "{} s to make the classifier, {} s for the rule".format(*seconds)]
        notes += [*([f"cannot be used here: {excluded}"] if excluded else []), *facts]
        headers = ["Detector", "held-out classes", "destroyed", "times in the clique", "OOD mean"]
        headers += list(runs[0]["ood"][best])
        found[re.sub("[^a-z0-9]+", "-", name.lower())] = Table(name, headers, rows, notes)
    headers = ["Setting", "chosen by the rule", "the rule", _FIXED_SUM, "KLUniform()", "best single, in hindsight"]
    return {"rule": Table("The rule against a fixed sum", headers, rules, facts), **found}


_FIXED_SUM = "KLUniform() + KNN(k=10)"


def _pair(pairs: Sequence[Sequence[float]]) -> str:
    return " / ".join(_mean(values) for values in zip(*pairs, strict=True))


def _mean(values: Iterable[float]) -> str:
    return f"{statistics.fmean(values):.1f}"


#: Figures of networks of scale "workstation", whose results at scale "laptop" are kept too, as ``NAME-small``.
_ENLARGED = [f"figure{number}" for number in (3, 4, 5, 6, 8, 9, 10, 11)]


def _small_table(name: str) -> Callable[[Any], dict[str, Table]]:
    return lambda content: {f"{name}-small": STUDIES[name].tables(content)[name]}


def _small_picture(name: str) -> Callable[[Any], str]:
    return lambda content: STUDIES[name].pictures(content)[name]


#: Page -> results on it that are not a study's -> what makes their tables.
OTHERS: dict[str, dict[str, Callable[[Any], dict[str, Table]]]] = {
    # From smaller networks that were trained for fewer epochs.
    "cifar10": {"table3-short": lambda content: {"table3-short": STUDIES["table3"].tables(content)["table3"]}},
    "own-images": {"shipped": shipped},
    "speed": {"speed": speed, "memory": speed, "engines": engines, "choices": choices},
    "drift": {"drift": drift},
    "selection": {"selection": selection},
    "theory": {f"{name}-small": _small_table(name) for name in _ENLARGED},
    "norms": {"norms": norm_tables.norms},
}
#: Page -> pictures on it that are not a study's, named as their results -> what draws them.
PICTURES: dict[str, dict[str, Callable[[Any], str]]] = {
    "drift": {"drift": drift_curves},
    "theory": {f"{name}-small": _small_picture(name) for name in _ENLARGED},
    "norms": {"norms": norm_tables.picture},
}
PAGES = sorted({study.page for study in STUDIES.values()} | set(OTHERS))


def on_page(page: str) -> list[Study[Any, Any, Any]]:
    """Return the studies that a page publishes."""
    return [study for study in STUDIES.values() if study.page == page]


def read(page: str, *names: str) -> Any:
    """Return the first kept result of a page that is there, or None."""
    files = [RESULTS / page / f"{name}.json" for name in names]
    file = next((file for file in files if file.is_file()), None)
    return None if file is None else json.loads(file.read_text("utf-8"))


def tables(page: str) -> dict[str, Table]:
    """Return the tables of a page, by the names that mark their places."""
    found: dict[str, Table] = {}
    for study in on_page(page):
        if (content := read(page, study.name, study.shares)) is not None:
            found |= study.tables(content)
    for name, make in OTHERS.get(page, {}).items():
        if (content := read(page, name)) is not None:
            found |= make(content)
    return found


def render(page: str) -> str:
    """Return a page's text with every table replaced."""
    text = (RESULTS / f"{page}.md").read_text("utf-8")
    for name, table in tables(page).items():
        block = f"<!-- {name} -->\n\n{table.markdown()}\n<!-- end -->"
        text, count = re.subn(f"<!-- {name} -->.*?<!-- end -->", lambda _, new=block: new, text, flags=re.DOTALL)
        if count != 1:
            raise SystemExit(f"{page}.md has {count} places for {name}: mark one by <!-- {name} --> <!-- end -->")
    return text


def main() -> None:
    """Copy results, and write the tables and pictures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, nargs="?")
    folder = parser.parse_args().folder
    for page in PAGES:
        kept = RESULTS / page
        kept.mkdir(exist_ok=True)
        for name in (*(study.name for study in on_page(page)), *OTHERS.get(page, ())) if folder else ():
            if (folder / f"{name}.json").exists():
                # Paths of somebody's machine are of no use to a reader.
                text = re.sub(
                    r" --(out|data-root) (?![A-Z]+\b)[^\s\"]+", "", (folder / f"{name}.json").read_text("utf-8")
                )
                (kept / f"{name}.json").write_text(text, "utf-8")
        for name, draw in PICTURES.get(page, {}).items():
            if (content := read(page, name)) is not None:
                (kept / f"{name}.svg").write_text(draw(content), encoding="utf-8")
        for study in on_page(page):
            if (content := read(page, study.name)) is not None:
                for name, picture in study.pictures(content).items():
                    (kept / f"{name}.svg").write_text(picture, encoding="utf-8")
        (RESULTS / f"{page}.md").write_text(render(page), encoding="utf-8")


if __name__ == "__main__":
    main()
