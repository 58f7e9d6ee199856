"""The paper's figures, drawn from the runs of `featnorm.paper.theory`, each with a table of its numbers."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from scipy.stats import spearmanr

from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.probe import LAST
from featnorm.paper.tables import Table
from featnorm.paper.theory import MLP_LAYERS, RESNET_LAYERS

Run = Mapping[str, Any]
"""What `featnorm.paper.theory.run` returns."""

_SCORES = {"norm": "l1-norm", "nan": "NAN"}
_FOLDS = {"train": "ID, training", "test": "ID, test"}
_HIDDEN = {
    "accuracy": "accuracy",
    "entropy": "entropy, nats",
    "sign_difference": "sign difference, share of units",
    "error": "approximation error",
}


@dataclass(frozen=True)
class Figure:
    """A figure as panels in rows, with its numbers as a table."""

    panels: Sequence[Sequence[Panel]]
    table: Table

    @property
    def svg(self) -> str:
        """The figure, drawn."""
        return panel_figure(self.panels)

    def to_dict(self) -> dict[str, Any]:
        """Return all that is drawn and all of the table as plain data, numbers to four digits."""
        return {"table": asdict(self.table), "panels": [[panel.to_dict() for panel in row] for row in self.panels]}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Figure":
        """Make it again from plain data."""
        panels = [[Panel.from_dict(panel) for panel in row] for row in data["panels"]]
        return cls(panels, Table(**data["table"]))


def make_figure(name: str, runs: Sequence[Run]) -> Figure:
    """Return a figure of the paper.

    Parameters
    ----------
    name : one of `featnorm.paper.theory.FIGURES`.
    runs : of the jobs that are named there, in their order.
    """
    panels, title, headers, rows = _MAKERS[name](runs)
    return Figure(panels, Table(f"{name.replace('figure', 'Figure ')}, {title}", headers, rows, _notes(runs)))


_Parts = tuple[list[list[Panel]], str, list[str], list[list[str]]]


def series(run: Run, *path: str) -> list[float]:
    """Return a recorded quantity at every epoch, by its path below the layers."""
    values = []
    for record in run["records"]:
        value = record["layers"]
        for key in path:
            value = value[key]
        values.append(value)
    return values


def gap(run: Run, score: str) -> list[float]:
    """Return how much better a score detects against the training fold than against the test fold, by epoch."""
    folds = [series(run, LAST, "auroc", fold, score) for fold in ("train", "test")]
    return [a - b for a, b in zip(*folds, strict=True)]


def rank_correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Return Spearman's rank correlation; NaN where one of the two does not vary."""
    if min(x) == max(x) or min(y) == max(y):
        return float("nan")
    return float(spearmanr(x, y).statistic)


def _epochs(run: Run) -> list[int]:
    return [record["epoch"] for record in run["records"]]


def _scheme(run: Run) -> str:
    return str(run["made_with"]["job"]["scheme"])


def _sets(run: Run) -> list[str]:
    """The folds of ID, and after them the OOD sets by name."""
    names = {key.removeprefix("norm:") for key in run["end"] if key.startswith("norm:")}
    return sorted(names, key=lambda name: (name not in _FOLDS, name != "train", name))


def _figure1(runs: Sequence[Run]) -> _Parts:
    plain, decayed = runs
    panels = [
        Panel(
            title,
            "epoch",
            "l1-norm",
            [
                Line(_FOLDS.get(name, name), series(run, LAST, "norm", name), _epochs(run), style)
                for style, name in enumerate(name for name in _sets(run) if name != "train")
            ],
        )
        for title, run in (("without weight decay", plain), ("with weight decay", decayed))
    ]
    panels.append(
        Panel(
            "after training, with weight decay",
            "l1-norm",
            "density",
            [
                Line(_FOLDS.get(name, name), decayed["end"][f"norm:{name}"].tolist(), style=style, histogram=True)
                for style, name in enumerate(name for name in _sets(decayed) if name != "train")
            ],
        )
    )
    rows = [
        [
            title,
            f"{series(run, LAST, 'norm', 'test')[0]:.3g}",
            f"{series(run, LAST, 'norm', 'test')[-1]:.3g}",
            *(
                f"{series(run, LAST, 'norm', name)[-1]:.3g}"
                for name in _sets(run)
                if name not in ("train", "test")
            ),
            f"{series(run, LAST, 'auroc', 'test', 'norm')[-1]:.1%}",
        ]
        for title, run in (("none", plain), ("5e-4", decayed))
    ]
    others = [f"{name}, end" for name in _sets(plain) if name not in ("train", "test")]
    headers = ["Weight decay", "l1-norm of ID, first epoch", "ID, end", *others, "AUROC"]
    return [panels], "the norm over training", headers, rows


def _hidden_rows(runs: Sequence[Run], title: str) -> _Parts:
    """A row of panels for each network, a line for each layer: the hidden classifiers over training."""
    grid, rows = [], []
    for run in runs:
        activation = run["made_with"]["job"]["activation"]
        grid.append(
            [
                Panel(
                    f"{activation}: {label}",
                    "epoch",
                    "",
                    [
                        Line(called, series(run, layer, "hidden", "train", key), _epochs(run), style)
                        for style, (layer, called) in enumerate(MLP_LAYERS.items())
                    ],
                )
                for key, label in _HIDDEN.items()
            ]
        )
        for layer, called in MLP_LAYERS.items():
            ends = [
                f"{values[0]:.3g} → {values[-1]:.3g}"
                for key in _HIDDEN
                for values in [series(run, layer, "hidden", "train", key)]
            ]
            rows.append([f"{activation}, {called}", *ends])
    return grid, title, ["Layer", *(f"{label}, first → last epoch" for label in _HIDDEN.values())], rows


def _by_scheme(runs: Sequence[Run], *path: str) -> list[Line]:
    return [Line(_scheme(run), series(run, *path), _epochs(run), style) for style, run in enumerate(runs)]


def _figure3(runs: Sequence[Run]) -> _Parts:
    panels = [
        Panel(
            "detection against the training fold",
            "epoch",
            "AUROC",
            _by_scheme(runs, LAST, "auroc", "train", "norm"),
        ),
        Panel("entropy of activation", "epoch", "nats", _by_scheme(runs, LAST, "entropy", "train")),
    ]
    rows = []
    for run in runs:
        aurocs = series(run, LAST, "auroc", "train", "norm")
        entropies = series(run, LAST, "entropy", "train")
        rows.append(
            [
                _scheme(run),
                *(f"{value:.1%}" for value in (aurocs[0], aurocs[-1])),
                *(f"{value:.3f}" for value in (entropies[0], entropies[-1])),
                f"{run['records'][-1]['loss']:.3g}",
            ]
        )
    headers = ["Scheme", "AUROC, first epoch", "last", "entropy, first epoch", "last", "training loss, last"]
    return [panels], "detection and entropy by the scheme of the labels, l1-norm", headers, rows


def _gaps(score: str, title: str) -> Callable[[Sequence[Run]], _Parts]:
    def make(runs: Sequence[Run]) -> _Parts:
        lines = [Line(_scheme(run), gap(run, score), _epochs(run), style) for style, run in enumerate(runs)]
        panels = [
            Panel("training fold", "epoch", "AUROC", _by_scheme(runs, LAST, "auroc", "train", score)),
            Panel("test fold", "epoch", "AUROC", _by_scheme(runs, LAST, "auroc", "test", score)),
            Panel("gap", "epoch", "AUROC, training − test", lines),
        ]
        rows = [
            [
                _scheme(run),
                *(f"{series(run, LAST, 'auroc', fold, score)[-1]:.1%}" for fold in ("train", "test")),
                f"{gap(run, score)[-1]:+.1%}",
            ]
            for run in runs
        ]
        return [panels], title, ["Scheme", "AUROC, training fold", "test fold", "gap"], rows

    return make


def _correlations(scores: Sequence[str], title: str) -> Callable[[Sequence[Run]], _Parts]:
    def make(runs: Sequence[Run]) -> _Parts:
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
        return grid, title, ["Scheme", "Score", "rank correlation over epochs", "entropy"], rows

    return make


def _figure6(runs: Sequence[Run]) -> _Parts:
    (run,) = runs
    others = [name for name in _sets(run) if name != "train"]
    panels = [
        Panel(
            "sparsity of the last hidden layer",
            "1 / units on",
            "density",
            [
                Line(
                    _FOLDS.get(name, name),
                    (1 / run["end"][f"l0:{name}"].clamp_min(1)).tolist(),
                    style=style,
                    histogram=True,
                )
                for style, name in enumerate(others)
            ],
        )
    ]
    for title, unit, path in (
        ("entropy of activation", "nats", ("entropy", "train")),
        ("detection by the l1-norm", "AUROC", ("auroc", "test", "norm")),
    ):
        lines = [
            Line(called, series(run, layer, *path), _epochs(run), style)
            for style, (layer, called) in enumerate(RESNET_LAYERS.items())
        ]
        panels.append(Panel(title, "epoch", unit, lines))
    rows = []
    for layer, called in RESNET_LAYERS.items():
        entropies = series(run, layer, "entropy", "train")
        rows.append(
            [
                called,
                f"{entropies[0]:.3f} → {entropies[-1]:.3f}",
                *(f"{series(run, layer, 'auroc', 'test', score)[-1]:.1%}" for score in _SCORES),
                *(f"{series(run, layer, 'sparsity', name)[-1]:.3g}" for name in others),
            ]
        )
    headers = ["Layer", "entropy, first → last epoch", *(f"AUROC of {name}" for name in _SCORES.values())]
    return (
        [panels],
        "sparsity, entropy and detection by layer",
        [*headers, *(f"1/l0, {_FOLDS.get(n, n)}" for n in others)],
        rows,
    )


def _figure8(runs: Sequence[Run]) -> _Parts:
    grid, rows = [], []
    for prefix, when in (("", "after the rectifier"), ("pre_", "before the rectifier")):
        panels = []
        for run in runs:
            pairs = {
                name: series(run, LAST, "hidden", "train", prefix + key)
                for name, key in (("target", "error"), ("other classes", "other_error"))
            }
            lines = [Line(name, y, _epochs(run), style) for style, (name, y) in enumerate(pairs.items())]
            panels.append(Panel(f"{_scheme(run)}, {when}", "epoch", "approximation error", lines))
            accuracy = series(run, LAST, "hidden", "train", "accuracy")[-1]
            ends = [f"{y[0]:.3f} → {y[-1]:.3f}" for y in pairs.values()]
            rows.append([f"{_scheme(run)}, {when}", *ends, f"{accuracy:.1%}"])
        grid.append(panels)
    headers = ["Scheme", "error on the target, first → last epoch", "on other classes", "accuracy, last"]
    return grid, "the convolutional network's hidden classifier", headers, rows


def _figure11(runs: Sequence[Run]) -> _Parts:
    panels, rows = [], []
    for run in runs:
        pattern = run["end"]["pattern:train"].numpy().astype(bool)
        panels.append(Panel(_scheme(run), "inputs", "units", image=pattern.T))
        distinct = len(np.unique(pattern, axis=0))
        constant = float((pattern.all(0) | ~pattern.any(0)).mean())
        rows.append([_scheme(run), f"{distinct} of {len(pattern)}", f"{pattern.mean():.1%}", f"{constant:.1%}"])
    headers = ["Scheme", "distinct patterns", "units on", "units that never change"]
    return [panels], "activation patterns of training inputs", headers, rows


_MAKERS: dict[str, Callable[[Sequence[Run]], _Parts]] = {
    "figure1": _figure1,
    "figure2": lambda runs: _hidden_rows(runs, "hidden classifiers of the MLP on CIFAR-10"),
    "figure3": _figure3,
    "figure4": _gaps("norm", "the generalisation gap of the l1-norm"),
    "figure5": _correlations(["norm"], "detection by the l1-norm against the entropy of activation"),
    "figure6": _figure6,
    "figure8": _figure8,
    "figure9": _gaps("nan", "detection by NAN, and its generalisation gap"),
    "figure10": _correlations(["norm", "nan"], "detection against the entropy of activation"),
    "figure11": _figure11,
    "figure12": lambda runs: _hidden_rows(runs, "hidden classifiers of the MLP on CIFAR-10, by activation"),
    "figure13": lambda runs: _hidden_rows(runs, "hidden classifiers of the MLP on SVHN, by activation"),
    "figure14": lambda runs: _hidden_rows(runs, "hidden classifiers of the MLP on MNIST, by activation"),
}


def _notes(runs: Sequence[Run]) -> list[str]:
    first = runs[0]
    made, recipe = first["made_with"], first["made_with"]["recipe"]
    network = (
        "MLP of 5 layers of 512" if made["job"]["network"] == "mlp" else f"ResNet-18 of width {made['width']}"
    )
    return [
        f"scale {made['scale']}: {network}, {made['inputs']} training images, {recipe['epochs']} epochs, "
        f"{recipe['optimizer']}, batch {recipe['batch_size']}, learning rate {recipe['lr']}; one seed",
        *(f"{name}: {value}" for name, value in made["images"].items()),
        *(f"{name}: {value}" for name, value in first["environment"].items()),
    ]
