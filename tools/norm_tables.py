"""The tables and the picture of what measure_norms.py measured."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from scipy.stats import rankdata

from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.tables import Table

#: The references that a candidate must beat on B, and the two that it is compared with besides.
BEATEN = ("NAN()", "KNN(k=10)", "SSD()")
ALSO = ("KLUniform()", "KLUniform() + KNN(k=10)")
#: Candidates whose state is of the size of a covariance.
GAUSSIAN = ("SSD", "Gaussian", "Mahalanobis")
#: AUROC from which a norm is worth using.
WORKS = 80
_RESAMPLES = 2000

Content = Mapping[str, Any]


def norms(content: Content) -> dict[str, Table]:
    """Return all tables."""
    made = {
        "scores": _scores,
        "outcome": _outcome,
        "flagged": _flagged,
        "theory": _theory,
        "causes": _causes,
        "predictors": _predictors,
        "networks": _networks,
        "layers": _layers,
    }
    facts = [f"{name}: {value}" for name, value in content["environment"].items()]
    return {f"norms-{name}": make(content, facts) for name, make in made.items()}


def _settings(content: Content) -> Iterator[tuple[str, Content, dict[str, float]]]:
    """Yield the split of each setting, its result, and the mean AUROC over OOD sets and seeds by score."""
    for split in "AB":
        for found in content[f"scores {split}"]:
            values = np.mean([[run[kind] for kind in run] for run in found["auroc"]], (0, 1))
            yield split, found, dict(zip(found["scores"], values.tolist(), strict=True))


def means(content: Content, splits: str) -> dict[str, float]:
    """Return the mean AUROC over the settings of some splits, of the scores that all settings have."""
    chosen = [values for split, _, values in _settings(content) if split in splits]
    everywhere = [values for _, _, values in _settings(content)]
    names = [name for name in chosen[0] if all(name in values for values in everywhere)]
    return {name: statistics.fmean(values[name] for values in chosen) for name in names}


def winners(content: Content) -> dict[str, str]:
    """Return the best candidate on A, and the best one that needs no covariance."""
    ranked = sorted(means(content, "A").items(), key=lambda item: -item[1])
    new = [name for name, _ in ranked if "(" not in name]
    small = [name for name in new if not any(word in name for word in GAUSSIAN)]
    return {"best candidate on A": new[0], "best with a state of at most C d": small[0]}


def _scores(content: Content, facts: Sequence[str]) -> Table:
    every, of_a, of_b = (means(content, splits) for splits in ("AB", "A", "B"))
    settings = list(_settings(content))
    names = sorted(
        {name for _, _, values in settings for name in values}, key=lambda name: (-every.get(name, 0), name)
    )
    rows = [
        [
            name,
            *(f"{part[name]:.1f}" if name in part else "–" for part in (every, of_a, of_b)),
            *(f"{values[name]:.1f}" if name in values else "–" for _, _, values in settings),
        ]
        for name in names
    ]
    headers = ["Score", "mean", "A", "B", *(f"{split}: {found['setting']}" for split, found, _ in settings)]
    title = "AUROC in percent, mean over OOD sets and seeds; the library's scores have brackets"
    return Table(title, headers, rows, [f"{len(settings[0][1]['auroc'])} to 3 seeds", *facts])


def _outcome(content: Content, facts: Sequence[str]) -> Table:
    settings = [(found, values) for split, found, values in _settings(content) if split == "B"]
    rows = []
    for what, winner in winners(content).items():
        for other in (*BEATEN, *ALSO):
            differences, variances = [], []
            for found, values in settings:
                i, j = found["scores"].index(winner), found["scores"].index(other)
                covariance = np.array(found["covariance"])
                differences.append(values[winner] - values[other])
                variances.append(covariance[i, i] + covariance[j, j] - 2 * covariance[i, j])
            half = 1.96 * sum(variances) ** 0.5 / len(settings)
            cells = [f"{difference:+.1f}" for difference in differences]
            rows.append([what, winner, other, f"{statistics.fmean(differences):+.1f} ± {half:.1f}", *cells])
    headers = ["Chosen as", "Candidate", "against", "mean on B", *(found["setting"] for found, _ in settings)]
    return Table("Difference in AUROC on B, with 1.96 standard errors", headers, rows, list(facts))


def _flagged(content: Content, facts: Sequence[str]) -> Table:
    found = content["flagged"]
    detectors = list(dict.fromkeys(run["detector"] for runs in found.values() for run in runs))
    rows = []
    for detector in detectors:
        chosen = [[run for run in runs if run["detector"] == detector] for runs in found.values()]
        known = [statistics.fmean(run["flagged"]["ID"] for run in runs) for runs in chosen]
        unknown = [
            statistics.fmean(share for run in runs for kind, share in run["flagged"].items() if kind != "ID")
            for runs in chosen
        ]
        megabytes = [runs[0]["bytes"] / 1e6 for runs in chosen]
        microseconds = [statistics.median(run["microseconds"] for run in runs) for runs in chosen]
        rows.append(
            [
                detector,
                f"{statistics.fmean(unknown):.1f}",
                f"{statistics.fmean(known):.1f}",
                f"{statistics.median(megabytes):.1f}, {max(megabytes):.1f}",
                f"{statistics.median(microseconds):.0f}, {max(microseconds):.0f}",
                *(f"{a:.1f} ({b:.1f})" for a, b in zip(unknown, known, strict=True)),
            ]
        )
    headers = ["Detector", "OOD", "ID", "MB, median and most", "us of CPU per input, median and most", *found]
    title = "Percent flagged where 5 % of ID inputs may be: of OOD inputs, mean over sets and seeds (of ID inputs)"
    return Table(title, headers, rows, list(facts))


def _layers_of(content: Content) -> list[tuple[str, str, dict[str, float], Content]]:
    """Return each setting and layer, means over seeds of the AUROCs and of all measures, and its sets."""
    found = []
    for setting, runs in content["measures"].items():
        for layer in dict.fromkeys(run["layer"] for run in runs):
            chosen = [run for run in runs if run["layer"] == layer]
            names = [name for name in chosen[0]["id"] if all(name in run["id"] for run in chosen)]
            values = {name: statistics.fmean(run["id"][name] for run in chosen) for name in names}
            for norm in ("NAN", "L1Norm"):
                values[norm] = statistics.fmean(v for run in chosen for v in run["auroc"][norm].values())
            found.append((setting, layer, values, chosen[0]["sets"]))
    return found


#: Words in the name of a setting -> its backbone.
_FAMILIES = {"transformer": "own transformer", "CIFAR": "own ResNet-18", "banking77": "MiniLM"}


def _family(setting: str) -> str:
    return next((family for word, family in _FAMILIES.items() if word in setting), "EfficientNet-Lite0")


_THEORY = ("length of h'", "norm", "units on", "agreement of signs", "hidden confidence / norm")


def _theory(content: Content, facts: Sequence[str]) -> Table:
    rows, lengths, aurocs = [], [], []
    for setting, runs in content["measures"].items():
        # The first is of the hidden layer, if there is one.
        nan, sets = runs[0]["auroc"]["NAN"], runs[0]["sets"]
        for name, row in sets.items():
            rows.append([setting, name, *(f"{row[column]:.3g}" for column in _THEORY)])
            rows[-1].append(f"{nan[name]:.1f}" if name in nan else "")
            if name in nan and runs[0]["layer"] == "hidden":
                lengths.append(row[_THEORY[0]])
                aurocs.append(nan[name])
    (rho,) = _rank_correlations(np.array([lengths]), np.array([aurocs]))
    notes = [
        "length of h': mean, as a multiple of that of ID inputs; seed 0",
        f"rank correlation of it and NAN's AUROC over the {len(lengths)} OOD sets of hidden layers: {rho:.2f}",
        *facts,
    ]
    headers = ["Setting", "Inputs", *_THEORY, "AUROC of NAN"]
    return Table("What the theory speaks of, at the hidden layer, or at the pool", headers, rows, notes)


def _causes(content: Content, facts: Sequence[str]) -> Table:
    changes = list(dict.fromkeys(row["change"] for rows in content["causes"].values() for row in rows))
    found = {name: {row["change"]: row for row in rows} for name, rows in content["causes"].items()}
    rows = [
        [change, *(f"{of[change]['NAN']:.1f} / {of[change]['L1Norm']:.1f}" for of in found.values())]
        for change in changes
    ]
    title = "AUROC of NAN / of the l1-norm in percent, mean over OOD sets and 3 seeds"
    return Table(title, ["Change", *found], rows, list(facts))


def _predictors(content: Content, facts: Sequence[str]) -> Table:
    layers = _layers_of(content)
    names = list(
        dict.fromkeys(name for *_, values, _ in layers for name in values if name not in ("NAN", "L1Norm"))
    )
    rows = []
    for name in names:
        chosen = [(setting, values[name], values["NAN"]) for setting, _, values, _ in layers if name in values]
        x, y = (np.array([row[i] for row in chosen]) for i in (1, 2))
        families = np.array([_family(setting) for setting, *_ in chosen])
        rng = np.random.default_rng(0)
        drawn = np.stack([rng.integers(0, len(x), len(x)) for _ in range(_RESAMPLES)])
        low, high = np.nanpercentile(_rank_correlations(x[drawn], y[drawn]), [2.5, 97.5])
        right = [_left_out(x, y > WORKS, families == family) for family in dict.fromkeys(families)]
        hits, total = sum(hit for hit, _ in right), sum(count for _, count in right)
        (rho,) = _rank_correlations(x[None], y[None])
        rows.append([name, f"{rho:+.2f} [{low:+.2f}, {high:+.2f}]", f"{hits} of {total}", len(x)])
    rows.sort(key=lambda row: (-int(row[2].split()[0]) / row[3], -abs(float(row[1].split()[0]))))
    headers = [
        "Measure of ID inputs",
        "rank correlation with NAN's AUROC",
        "right about left-out families",
        "layers",
    ]
    fails = sum(values["NAN"] <= WORKS for *_, values, _ in layers)
    notes = [
        f"right: whether NAN's AUROC is above {WORKS}; it is not in {fails} of {len(layers)} layers",
        *facts,
    ]
    return Table("Measures of ID inputs as predictors", headers, [[*row[:3], f"{row[3]}"] for row in rows], notes)


def _rank_correlations(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return Spearman's correlation of each row of x with that of y; NaN where all of a row's values are equal."""
    x, y = (ranks - ranks.mean(1, keepdims=True) for ranks in (rankdata(x, axis=1), rankdata(y, axis=1)))
    with np.errstate(invalid="ignore"):
        return (x * y).sum(1) / np.sqrt((x**2).sum(1) * (y**2).sum(1))


def _left_out(x: np.ndarray, works: np.ndarray, out: np.ndarray) -> tuple[int, int]:
    """Return how many rows of ``out`` a threshold of the others gets right, and how many there are."""
    values = np.unique(x[~out])
    cuts = [-np.inf, *((values[1:] + values[:-1]) / 2)]
    options = [(cut, sign) for cut in cuts for sign in (1, -1)]
    cut, sign = max(
        options, key=lambda rule: (((rule[1] * (x[~out] - rule[0]) > 0) == works[~out]).sum(), rule[1])
    )
    return int(((sign * (x[out] - cut) > 0) == works[out]).sum()), int(out.sum())


def _networks(content: Content, facts: Sequence[str]) -> Table:
    columns = [
        "NAN",
        "L1Norm",
        "destroyed copies",
        "mixed units",
        "correct against wrong",
        "agreement of signs",
        "relative gap",
        "entropy of activation",
        "units on",
        "variance between classes",
        "NormRatio",
    ]
    rows = [
        [setting, layer, *(f"{values[name]:.3g}" if name in values else "–" for name in columns)]
        for setting, layer, values, _ in sorted(_layers_of(content), key=lambda row: -row[2]["NAN"])
    ]
    title = "AUROC of the norms in percent, and measures of ID inputs; means over seeds"
    return Table(title, ["Setting", "Layer", *columns], rows, list(facts))


def _layers(content: Content, facts: Sequence[str]) -> Table:
    rows = [
        [setting, row["layer"], *(f"{row[norm]:.1f}" for norm in ("L1Norm", "NAN", "1 / l0-norm"))]
        for setting, found in content["layers"].items()
        for row in found
    ]
    headers = ["Network", "Layer", "L1Norm", "NAN", "1 / l0-norm"]
    return Table("AUROC in percent by layer, mean over OOD sets", headers, rows, list(facts))


def picture(content: Content) -> str:
    """Return NAN's AUROC over a measure of the theory and over the best predictor, as SVG."""
    panels = []
    for name in ("agreement of signs", "destroyed copies"):
        lines = []
        for style, family in enumerate(dict.fromkeys(_family(setting) for setting, *_ in _layers_of(content))):
            rows = [v for setting, _, v, _ in _layers_of(content) if _family(setting) == family and name in v]
            points = [row[name] for row in rows]
            lines.append(Line(family, [row["NAN"] for row in rows], points, style, scatter=True))
        panels.append(Panel("", f"{name}, ID inputs", "AUROC of NAN, percent", lines))
    return panel_figure([panels])
