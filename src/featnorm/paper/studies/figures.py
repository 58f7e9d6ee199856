"""Figures 1 to 14 but 7: why the norm detects, drawn from the networks of `featnorm.paper.theory`."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from scipy.stats import spearmanr
from torch import Tensor

from featnorm.paper.images import Images
from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.probe import LAST
from featnorm.paper.study import Context, Study
from featnorm.paper.tables import Result, Table, facts
from featnorm.paper.theory import (
    ACTIVATIONS,
    LOADERS,
    MLP_LAYERS,
    RESNET_LAYERS,
    SCALES,
    SCHEMES,
    Data,
    Job,
    Scale,
    train_with_probe,
    training_images,
)

_SCORES = {"norm": "l1-norm", "nan": "NAN"}
_SPLITS = {"train": "ID, training", "test": "ID, test"}
_HIDDEN = {
    "accuracy": "accuracy",
    "entropy": "entropy, nats",
    "sign_difference": "sign difference, share of units",
    "error": "approximation error",
}


_Parts = tuple[list[list[Panel]], list[str], list[list[str]]]
"""Panels in rows, and the headers and rows of the table."""


@dataclass(frozen=True, eq=False)
class Figure(Study[Scale, Images, Job]):
    """A figure, with a table of its numbers.

    Its content is the figure itself, panels and table, since what the networks recorded is large.

    Parameters
    ----------
    networks : the networks that it is made from.
    make_parts : returns the panels and the table, from the results of the networks.
    """

    networks: Sequence[Job]
    make_parts: Callable[[Sequence[Result]], _Parts]

    page: ClassVar[str] = "theory"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> Images:
        return context.once(LOADERS[self.networks[0].data])

    def jobs(self, scale: Scale, inputs: Images) -> Sequence[Job]:
        return self.networks

    def settings(self, job: Job, scale: Scale, inputs: Images) -> dict[str, Any]:
        return {
            "job": asdict(job),
            "width": job.width or scale.width,
            "recipe": job.recipe(scale).to_dict(),
            "inputs": len(training_images(job, scale, inputs)[0]),
            "images": inputs.facts,
        }

    def run(self, job: Job, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        layers: Mapping[str, str] = {LAST: "head"}
        if job.network == "mlp":
            layers = MLP_LAYERS
        elif job in _ALL_LAYERS:
            layers = RESNET_LAYERS
        return train_with_probe(job, scale, inputs, layers, folder, context)

    def collect(self, results: Sequence[Result], jobs: Sequence[Job], inputs: Images) -> dict[str, Any]:
        """See `Study`; numbers to four digits."""
        panels, headers, rows = self.make_parts(results)
        table = Table(self.title, headers, rows, _notes(results))
        return {"table": asdict(table), "panels": [[panel.to_dict() for panel in row] for row in panels]}

    def tables(self, content: Mapping[str, Any]) -> dict[str, Table]:
        return {self.name: Table(**content["table"])}

    def pictures(self, content: Mapping[str, Any]) -> dict[str, str]:
        return {self.name: panel_figure([[Panel.from_dict(panel) for panel in row] for row in content["panels"]])}


class SchemesFigure(Figure):
    """The label schemes and their variants at a scale, as far as the networks are trained."""

    grows: ClassVar[bool] = True

    def jobs(self, scale: Scale, inputs: Images) -> Sequence[Job]:
        return [*self.networks, *scale.variants]


def series(run: Result, *path: str) -> list[float]:
    """Return a recorded quantity at every epoch, by its path below the layers."""
    values = []
    for record in run["records"]:
        value = record["layers"]
        for key in path:
            value = value[key]
        values.append(value)
    return values


def gap(run: Result, score: str) -> list[float]:
    """Return how much better a score detects against the training split than against the test split, by epoch."""
    splits = [series(run, LAST, "auroc", split, score) for split in ("train", "test")]
    return [a - b for a, b in zip(*splits, strict=True)]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN where one of the two does not vary."""
    if min(x) == max(x) or min(y) == max(y):
        return float("nan")
    return float(spearmanr(x, y).statistic)


def _epochs(run: Result) -> list[int]:
    return [record["epoch"] for record in run["records"]]


def _scheme(run: Result) -> str:
    return str(run["job"]["scheme"])


def _sets(run: Result) -> list[str]:
    """The splits of ID, and after them the OOD sets by name."""
    names = {key.removeprefix("norm:") for key in run["tensors"] if key.startswith("norm:")}
    return sorted(names, key=lambda name: (name not in _SPLITS, name != "train", name))


def _test_sets(run: Result) -> dict[str, str]:
    """The test split of ID and the OOD sets, with their names in figures."""
    return {name: _SPLITS.get(name, name) for name in _sets(run) if name != "train"}


def _by_set(run: Result, *path: str) -> list[Line]:
    """Return a line per set of what is recorded of the last hidden layer."""
    return [
        Line(label, series(run, LAST, *path, name), _epochs(run), style)
        for style, (name, label) in enumerate(_test_sets(run).items())
    ]


def _by_layer(run: Result, layers: Mapping[str, str], *path: str) -> list[Line]:
    return [
        Line(label, series(run, layer, *path), _epochs(run), style)
        for style, (layer, label) in enumerate(layers.items())
    ]


def _by_scheme(runs: Sequence[Result], *path: str) -> list[Line]:
    return [Line(_scheme(run), series(run, *path), _epochs(run), style) for style, run in enumerate(runs)]


def _histograms(run: Result, values: Callable[[str], Tensor]) -> list[Line]:
    """Return a histogram per set, of the values of a set by its name."""
    return [
        Line(label, values(name).tolist(), style=style, histogram=True)
        for style, (name, label) in enumerate(_test_sets(run).items())
    ]


def _first_and_last(values: Sequence[float], form: str) -> str:
    return f"{values[0]:{form}} → {values[-1]:{form}}"


def _figure1(runs: Sequence[Result]) -> _Parts:
    plain, decayed = runs
    panels = [
        Panel(f"{title} weight decay", "epoch", "l1-norm", _by_set(run, "norm"))
        for title, run in (("without", plain), ("with", decayed))
    ]
    densities = _histograms(decayed, lambda name: decayed["tensors"][f"norm:{name}"])
    panels.append(Panel("after training, with weight decay", "l1-norm", "density", densities))
    ood = [name for name in _test_sets(plain) if name != "test"]
    rows = []
    for title, run in (("none", plain), ("5e-4", decayed)):
        ends = [f"{series(run, LAST, 'norm', name)[-1]:.3g}" for name in ("test", *ood)]
        auroc = series(run, LAST, "auroc", "test", "norm")[-1]
        rows.append([title, f"{series(run, LAST, 'norm', 'test')[0]:.3g}", *ends, f"{auroc:.1%}"])
    headers = ["Weight decay", "l1-norm of ID, first epoch", "ID, end", *(f"{name}, end" for name in ood), "AUROC"]
    return [panels], headers, rows


def _hidden_rows(runs: Sequence[Result]) -> _Parts:
    """A row of panels per network, a line per layer: the hidden classifiers over training."""
    grid, rows = [], []
    for run in runs:
        activation = run["job"]["activation"]
        grid.append(
            [
                Panel(f"{activation}: {label}", "epoch", "", _by_layer(run, MLP_LAYERS, "hidden", "train", key))
                for key, label in _HIDDEN.items()
            ]
        )
        for layer, label in MLP_LAYERS.items():
            ends = [_first_and_last(series(run, layer, "hidden", "train", key), ".3g") for key in _HIDDEN]
            rows.append([f"{activation}, {label}", *ends])
    return grid, ["Layer", *(f"{label}, first → last epoch" for label in _HIDDEN.values())], rows


def _figure3(runs: Sequence[Result]) -> _Parts:
    aurocs = _by_scheme(runs, LAST, "auroc", "train", "norm")
    entropies = _by_scheme(runs, LAST, "entropy", "train")
    panels = [
        Panel("detection against the training split", "epoch", "AUROC", aurocs),
        Panel("entropy of activation", "epoch", "nats", entropies),
    ]
    rows = [
        [
            _scheme(run),
            *(f"{auroc.y[i]:.1%}" for i in (0, -1)),
            *(f"{entropy.y[i]:.3f}" for i in (0, -1)),
            f"{run['records'][-1]['loss']:.3g}",
        ]
        for run, auroc, entropy in zip(runs, aurocs, entropies, strict=True)
    ]
    headers = ["Scheme", "AUROC, first epoch", "last", "entropy, first epoch", "last", "training loss, last"]
    return [panels], headers, rows


def _gaps(score: str) -> Callable[[Sequence[Result]], _Parts]:
    def make(runs: Sequence[Result]) -> _Parts:
        lines = [
            _by_scheme(runs, LAST, "auroc", "train", score),
            _by_scheme(runs, LAST, "auroc", "test", score),
            [Line(_scheme(run), gap(run, score), _epochs(run), style) for style, run in enumerate(runs)],
        ]
        named = [("training split", "AUROC"), ("test split", "AUROC"), ("gap", "AUROC, training − test")]
        panels = [Panel(title, "epoch", unit, y) for (title, unit), y in zip(named, lines, strict=True)]
        rows = [
            [train.name, f"{train.y[-1]:.1%}", f"{test.y[-1]:.1%}", f"{difference.y[-1]:+.1%}"]
            for train, test, difference in zip(*lines, strict=True)
        ]
        return [panels], ["Scheme", "AUROC, training split", "test split", "gap"], rows

    return make


def _correlations(*scores: str) -> Callable[[Sequence[Result]], _Parts]:
    def make(runs: Sequence[Result]) -> _Parts:
        grid, rows = [], []
        for score in scores:
            panels = []
            for style, run in enumerate(runs):
                entropy = series(run, LAST, "entropy", "train")
                auroc = series(run, LAST, "auroc", "train", score)
                r = rank_correlation(entropy, auroc)
                line = Line(_scheme(run), auroc, entropy, style, scatter=True)
                panels.append(
                    Panel(f"{_scheme(run)}, {_SCORES[score]}: ρ = {r:.2f}", "entropy, nats", "AUROC", [line])
                )
                spread = f"{min(entropy):.3f} to {max(entropy):.3f}"
                rows.append([_scheme(run), _SCORES[score], f"{r:.2f}", spread])
            grid.append(panels)
        return grid, ["Scheme", "Score", "rank correlation over epochs", "entropy"], rows

    return make


def _figure6(runs: Sequence[Result]) -> _Parts:
    (run,) = runs
    sets = _test_sets(run)
    densities = _histograms(run, lambda name: 1 / run["tensors"][f"l0:{name}"].clamp_min(1))
    panels = [
        Panel("sparsity of the last hidden layer", "1 / units on", "density", densities),
        Panel("entropy of activation", "epoch", "nats", _by_layer(run, RESNET_LAYERS, "entropy", "train")),
        Panel(
            "detection by the l1-norm", "epoch", "AUROC", _by_layer(run, RESNET_LAYERS, "auroc", "test", "norm")
        ),
    ]
    rows = [
        [
            label,
            _first_and_last(series(run, layer, "entropy", "train"), ".3f"),
            *(f"{series(run, layer, 'auroc', 'test', score)[-1]:.1%}" for score in _SCORES),
            *(f"{series(run, layer, 'sparsity', name)[-1]:.3g}" for name in sets),
        ]
        for layer, label in RESNET_LAYERS.items()
    ]
    headers = ["Layer", "entropy, first → last epoch", *(f"AUROC of {name}" for name in _SCORES.values())]
    return [panels], [*headers, *(f"1/l0, {label}" for label in sets.values())], rows


def _figure8(runs: Sequence[Result]) -> _Parts:
    grid, rows = [], []
    for prefix, when in (("", "after the rectifier"), ("pre_", "before the rectifier")):
        panels = []
        for run in runs:
            lines = [
                Line(name, series(run, LAST, "hidden", "train", prefix + key), _epochs(run), style)
                for style, (name, key) in enumerate([("target", "error"), ("other classes", "other_error")])
            ]
            panels.append(Panel(f"{_scheme(run)}, {when}", "epoch", "approximation error", lines))
            accuracy = series(run, LAST, "hidden", "train", "accuracy")[-1]
            ends = [_first_and_last(line.y, ".3f") for line in lines]
            rows.append([f"{_scheme(run)}, {when}", *ends, f"{accuracy:.1%}"])
        grid.append(panels)
    headers = ["Scheme", "error on the target, first → last epoch", "on other classes", "accuracy, last"]
    return grid, headers, rows


def _figure11(runs: Sequence[Result]) -> _Parts:
    panels, rows = [], []
    for run in runs:
        pattern = run["tensors"]["pattern:train"].numpy().astype(bool)
        panels.append(Panel(_scheme(run), "inputs", "units", image=pattern.T))
        distinct = len(np.unique(pattern, axis=0))
        constant = float((pattern.all(0) | ~pattern.any(0)).mean())
        rows.append([_scheme(run), f"{distinct} of {len(pattern)}", f"{pattern.mean():.1%}", f"{constant:.1%}"])
    headers = ["Scheme", "distinct patterns", "units on", "units that never change"]
    return [panels], headers, rows


def _schemes(runs: Sequence[Result]) -> _Parts:
    panels = []
    for score, label in _SCORES.items():
        lines = [
            Line(_network(run), series(run, LAST, "auroc", "test", score), _epochs(run), style)
            for style, run in enumerate(runs)
        ]
        panels.append(Panel(f"{label}, against the test split", "epoch", "AUROC", lines))
    rows = [
        [
            _network(run),
            f"{run['inputs']:,}",
            f"{run['accuracy']['train']:.1%}",
            f"{run['accuracy']['test']:.1%}" if "test" in run["accuracy"] else "–",
            *(
                f"{series(run, LAST, 'auroc', split, score)[-1]:.1%}"
                for score in _SCORES
                for split in ("train", "test")
            ),
            _first_and_last(series(run, LAST, "entropy", "train"), ".3f"),
            _first_and_last(series(run, LAST, "hidden", "train", "error"), ".3f"),
        ]
        for run in runs
    ]
    aurocs = [f"{label}, {split} split" for label in _SCORES.values() for split in ("training", "test")]
    headers = ["Scheme", "training images", "accuracy on them", "on new images", *aurocs]
    return [panels], [*headers, "entropy of activation, first → last epoch", "error on the target"], rows


def _network(run: Result) -> str:
    job = run["job"]
    return _variant(run) + (f", seed {job['seed']}" if job["seed"] else "")


def _variant(run: Result) -> str:
    job = run["job"]
    changes = [
        *(["with weight decay"] if job["decay"] else []),
        *([] if job["augment"] else ["not augmented"]),
        *([f"width {job['width']}"] if job["width"] else []),
    ]
    return ", ".join([_scheme(run), *changes])


def _notes(runs: Sequence[Result]) -> list[str]:
    first = runs[0]
    recipe = first["recipe"]
    lengths: dict[str, list[str]] = {}
    for run in runs:
        lengths.setdefault(_length(run), []).append(_variant(run))
    shown = [
        length if len(lengths) == 1 else f"{'; '.join(dict.fromkeys(variants))}: {length}"
        for length, variants in lengths.items()
    ]
    seeds = sorted({run["job"]["seed"] for run in runs})
    widths = " and ".join(map(str, sorted({run["width"] for run in runs})))
    network = "MLP of 5 layers of 512" if first["job"]["network"] == "mlp" else f"ResNet-18 of width {widths}"
    return [
        f"scale {first['scale']}: {network}, {recipe['optimizer']}, batch {recipe['batch_size']}, "
        f"learning rate {recipe['lr']}; {'one seed' if len(seeds) == 1 else f'seeds {seeds}'}",
        *shown,
        *facts(runs[:1]),
    ]


def _length(run: Result) -> str:
    recipe = run["recipe"]
    length = f"{run['inputs']} training images, {recipe['epochs']} epochs"
    if recipe["augment"]:
        length += ", augmented"
    if recipe["crop"]:
        length += f", crops of {recipe['crop']} pixels for the first {recipe['crop_share']:.0%}"
    return length


def _mlps(data: Data) -> list[Job]:
    return [Job("mlp", data, activation) for activation in ACTIVATIONS]


_RESNETS = [Job("resnet", scheme=scheme) for scheme in SCHEMES]
#: The networks of which every stage is probed, for Figure 6: maps are most of what a probe costs.
_ALL_LAYERS = [_RESNETS[0]]

Figure("figure1", "Figure 1, the norm over training", [_RESNETS[0], Job("resnet", decay=True)], _figure1)
Figure("figure2", "Figure 2, hidden classifiers of the MLP on CIFAR-10", [Job("mlp")], _hidden_rows)
Figure("figure3", "Figure 3, detection and entropy by the scheme of the labels, l1-norm", _RESNETS, _figure3)
Figure("figure4", "Figure 4, the generalization gap of the l1-norm", _RESNETS, _gaps("norm"))
Figure(
    "figure5",
    "Figure 5, detection by the l1-norm against the entropy of activation",
    _RESNETS,
    _correlations("norm"),
)
Figure("figure6", "Figure 6, sparsity, entropy and detection by layer", [_RESNETS[0]], _figure6)
Figure(
    "figure8",
    "Figure 8, the convolutional network's hidden classifier",
    [job for job in _RESNETS if job.scheme in ("I", "S", "R")],
    _figure8,
)
Figure("figure9", "Figure 9, detection by NAN, and its generalization gap", _RESNETS, _gaps("nan"))
Figure(
    "figure10",
    "Figure 10, detection against the entropy of activation",
    _RESNETS,
    _correlations("norm", "nan"),
)
SchemesFigure(
    "schemes",
    "The label schemes: accuracy, and detection against both splits",
    # The networks of instances take several times as long as the others.
    sorted(_RESNETS, key=lambda job: job.scheme.startswith("I")),
    _schemes,
)
Figure("figure11", "Figure 11, activation patterns of training inputs", _RESNETS, _figure11)
_DATA: list[tuple[int, Data, str]] = [(12, "cifar10", "CIFAR-10"), (13, "svhn", "SVHN"), (14, "mnist", "MNIST")]
for _number, _data, _called in _DATA:
    Figure(
        f"figure{_number}",
        f"Figure {_number}, hidden classifiers of the MLP on {_called}, by activation",
        _mlps(_data),
        _hidden_rows,
    )
