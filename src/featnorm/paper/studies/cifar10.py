"""CIFAR-10 with labels: Table 3, and the ablations that need trained networks (paper 6.3, C.1, D).

Networks are trained by variant and seed; one extraction of each set of images then serves every detector.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import nn

from featnorm.detectors import Detector, parse_detector
from featnorm.models import cifar_network
from featnorm.models.heads import Activation
from featnorm.paper.heads import FROZEN, NETWORK, fit_and_score, pooled_features
from featnorm.paper.images import CLASSES, Images, cifar10_images
from featnorm.paper.numbers import numbers
from featnorm.paper.panels import Line, Panel, panel_figure
from featnorm.paper.recipe import PRESETS, PaperRecipe
from featnorm.paper.scoring import compared_detectors, train_and_score
from featnorm.paper.study import Context, Study
from featnorm.paper.tables import MEASURES, Pair, Result, Table, cell, facts, left_out, mean_pair, printed, ranked


@dataclass(frozen=True)
class Scale:
    """How large the networks are, and how long they are trained.

    Parameters
    ----------
    width : channels of the first stage of the ResNet-18.
    recipe : settings of the main networks, and of Table 6.
    ablation : settings of the ablations of the head, Table 7 and Figure 7.
    frozen : whether the ablations train only heads, on a frozen backbone (`featnorm.paper.heads`).
    seeds : runs of the main network; an ablation is one run.
    """

    width: int
    recipe: PaperRecipe
    ablation: PaperRecipe
    frozen: bool
    seeds: int


# The paper's optimizer and schedule, with a learning rate for few epochs. The paper's 800 epochs have no weight
# decay; so few epochs reach a higher accuracy with it.
_LAPTOP = PaperRecipe(
    epochs=42,
    batch_size=128,
    optimizer="sgd",
    lr=0.1,
    nesterov=True,
    weight_decay=5e-4,
    warmup=0.2,
    augment=True,
    crop=24,
)
SCALES = {
    "laptop": Scale(32, _LAPTOP, FROZEN, frozen=True, seeds=3),
    "gpu": Scale(64, replace(_LAPTOP, epochs=100, batch_size=512, lr=0.4), FROZEN, frozen=True, seeds=1),
    "paper": Scale(64, PRESETS["C.1"], PRESETS["C.1"], frozen=False, seeds=3),
}


@dataclass(frozen=True)
class Variant:
    """A network of the benchmark.

    Parameters
    ----------
    hidden : width d_L of the head's hidden layer. None: no head, cosine logits of the pooled feature.
    activation : activation of the hidden layer.
    """

    hidden: int | None = 512
    activation: Activation = "relu"

    @property
    def name(self) -> str:
        """Name in folders."""
        return "headless" if self.hidden is None else f"{self.activation}-{self.hidden}"

    def build(self, width: int, seed: int) -> nn.Sequential:
        """Return the network, for pixels in [0, 1], with the initial weights of a seed."""
        return cifar_network(width, len(CLASSES), hidden=self.hidden, activation=self.activation, seed=seed)


MAIN = Variant()
#: Widths of the hidden layer in Figure 7.
WIDTHS: Sequence[int] = [2**k for k in range(5, 13)]


@dataclass(frozen=True)
class Job:
    """A network to train, or only its head if the backbone is frozen."""

    variant: Variant
    recipe: PaperRecipe
    seed: int
    frozen: bool = False

    @property
    def folder(self) -> str:
        """Name of its folder; tables that need the same network share it."""
        kind = "-frozen" if self.frozen else ""
        return f"{self.variant.name}{kind}-{self.recipe.epochs}epochs-seed{self.seed}"


def detectors(variant: Variant = MAIN) -> list[Detector]:
    """Return the detectors of Table 3 and some more, each with the settings of its source.

    For the networks of an ablation: those that need no fit and do not run the model again.
    """
    if variant != MAIN:
        return quick_detectors()
    others = ("ODIN", "Views(NAN)", "KNN / ReAct(NAN)", "SSD / ReAct(NAN)")
    return [*compared_detectors(), *map(parse_detector, others)]


def quick_detectors() -> list[Detector]:
    """Return the detectors without a fit, which take a minute on all sets."""
    return [detector for detector in compared_detectors() if not detector.needs_fit]


_Make = Callable[["Cifar10Study", Sequence[Result]], Table]


@dataclass(frozen=True, eq=False)
class Cifar10Study(Study[Scale, Images, Job]):
    """A table of some networks of the benchmark.

    Parameters
    ----------
    plan : returns the networks at a scale.
    make_table : returns the table, from the study and the results of its networks.
    draw : returns a figure as SVG text, from the results. None: there is no figure.
    """

    plan: Callable[[Scale], list[Job]]
    make_table: _Make
    draw: Callable[[Sequence[Result]], str] | None = None

    page: ClassVar[str] = "cifar10"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> Images:
        return context.once(cifar10_images)

    def jobs(self, scale: Scale, inputs: Images) -> list[Job]:
        return self.plan(scale)

    def settings(self, job: Job, scale: Scale, inputs: Images) -> dict[str, Any]:
        return {
            **({"backbone": NETWORK} if job.frozen else {"width": scale.width}),
            "variant": asdict(job.variant),
            "recipe": job.recipe.to_dict(),
            "seed": job.seed,
            "images": inputs.facts,
        }

    def run(self, job: Job, scale: Scale, inputs: Images, folder: Path, context: Context) -> dict[str, Any]:
        if job.frozen:
            return fit_and_score(
                context.once(pooled_features),
                job.recipe,
                quick_detectors(),
                hidden=job.variant.hidden,
                activation=job.variant.activation,
                seed=job.seed,
                progress=context.progress,
            )
        model = job.variant.build(scale.width, job.seed)
        return train_and_score(model, inputs, detectors(job.variant), job.recipe, job.seed, folder, context)

    def tables(self, content: Any) -> dict[str, Table]:
        return {self.name: self.make_table(self, content)}

    def pictures(self, content: Any) -> dict[str, str]:
        return {} if self.draw is None else {self.name: self.draw(content)}


def _seeds(scale: Scale) -> list[Job]:
    return [Job(MAIN, scale.recipe, seed) for seed in range(scale.seeds)]


def _ablation(variants: Iterable[Variant], scale: Scale) -> list[Job]:
    return [Job(variant, scale.ablation, 0, scale.frozen) for variant in variants]


# The two norms, and their names in tables.
_NORMS = ("L1Norm()", "NAN()")
_LABELS = {
    "L1Norm()": "NAN without the sparsity term (l1-norm)",
    "NAN()": "NAN",
    "EmbeddingMagnitude()": "embedding magnitude",
    "HiddenConfidence()": "confidence of the hidden classifier",
}


def _make_table3(study: Cifar10Study, results: Sequence[Result]) -> Table:
    paper = numbers("cifar10")["table3"]
    headers, rows = ranked(results, paper["rows"])
    shared = any(set_name in row for row in paper["rows"].values() for set_name in headers[3:])
    notes = _notes(results)
    notes.append(
        f"the paper's accuracy is {paper['accuracy']} %; its OOD sets are LSUN-fix, ImageNet-fix, CIFAR-100, "
        "SVHN and Places365" + (", its number is in brackets where the set is the same" if shared else "")
    )
    notes += left_out(results[0])
    title = f"Table 3, {paper['where'].partition(', ')[2]}: {MEASURES}"
    return Table(title, headers, rows, notes)


def _table_of(*chosen: str) -> _Make:
    """Return a function that makes a table of the means of some detectors."""

    def make(study: Cifar10Study, results: Sequence[Result]) -> Table:
        rows = []
        for detector in chosen:
            theirs = numbers("cifar10")[study.name]["rows"].get(detector)
            theirs = theirs.get("Average") if isinstance(theirs, dict) else theirs
            ours = cell([mean_pair(result, detector) for result in results])
            rows.append([_LABELS[detector], ours, printed(theirs)])
        return Table(f"{study.title}: {MEASURES}", ["Score", "Ours", "Paper"], rows, _notes(results))

    return make


def _make_table6(study: Cifar10Study, results: Sequence[Result]) -> Table:
    with_head, headless = results
    theirs = numbers("cifar10")["table6"]["rows"]
    pool, hidden = "average pool", "hidden layer of the projection head"
    rows = [
        ["ResNet-18 without a head", pool, *_norm_cells(headless, "scores", theirs[pool])],
        ["ResNet-18 + projection head", pool, *_norm_cells(with_head, "pooled", {})],
        ["ResNet-18 + projection head", hidden, *_norm_cells(with_head, "scores", theirs[hidden])],
    ]
    return _norm_table(study, ["Network", "Layer"], rows, results)


def _make_table7(study: Cifar10Study, results: Sequence[Result]) -> Table:
    theirs = numbers("cifar10")["table7"]["rows"]
    named = {result["variant"]["activation"]: result for result in results}
    rows = [[name, *_norm_cells(result, "scores", theirs[name])] for name, result in named.items()]
    return _norm_table(study, ["Activation"], rows, results)


def _make_figure7(study: Cifar10Study, results: Sequence[Result]) -> Table:
    rows = [
        [
            str(result["variant"]["hidden"]),
            *_norm_cells(result, "scores", {}),
            f"{result['inactive']['cifar10']:.0%}",
        ]
        for result in results
    ]
    table = _norm_table(study, ["d_L"], rows, results)
    table.headers.append("units off, ID")
    table.notes.append(numbers("cifar10")["figure7"]["where"])
    return table


def _draw_figure7(results: Sequence[Result]) -> str:
    """Draw AUROC and FPR95 of NAN and the l1-norm over the width of the hidden layer."""
    widths = [result["variant"]["hidden"] for result in results]
    panels = [
        Panel(
            xlabel="width of the last hidden layer",
            ylabel=f"{measure} in percent",
            log2=True,
            lines=[
                Line(name, [mean_pair(result, detector)[i] for result in results], widths, style)
                for style, (name, detector) in enumerate([("NAN", "NAN()"), ("l1-norm", "L1Norm()")])
            ],
        )
        for i, measure in enumerate(["AUROC", "FPR95"])
    ]
    return panel_figure([panels])


def _norm_table(study: Cifar10Study, first: list[str], rows: list[list[str]], results: Sequence[Result]) -> Table:
    headers = [*first, "l1-norm, ours", "l1-norm, paper", "NAN, ours", "NAN, paper"]
    return Table(f"{study.title}: {MEASURES}", headers, rows, _notes(results))


def _norm_cells(result: Result, part: str, theirs: Mapping[str, Pair]) -> list[str]:
    cells = []
    for detector in _NORMS:
        cells += [cell([mean_pair(result, detector, part)]), printed(theirs.get(detector))]
    return cells


def _notes(results: Sequence[Result]) -> list[str]:
    """Return notes on what the runs of a table have in common, and how long they took."""
    first = results[0]
    recipe = first["recipe"]
    seeds = [result["seed"] for result in results] if len({r["variant"]["hidden"] for r in results}) == 1 else []
    several = len(set(seeds)) > 1
    test_accuracy = _range([100 * result["accuracy"] for result in results], 1)
    train_accuracy = _range([100 * result["train_accuracy"] for result in results], 1)
    optimizer = "SGD" if recipe["optimizer"] == "sgd" else "AdamW"
    training = (
        f"{recipe['epochs']} epochs of {optimizer}, batch {recipe['batch_size']}, learning rate {recipe['lr']}, "
        f"weight decay {recipe['weight_decay']}"
    )
    if recipe["crop"] is not None:
        training += f", crops of {recipe['crop']} for the first {recipe['crop_share']:.0%}"
    if "backbone" in first:
        network = f"heads alone on the frozen backbone of {first['backbone']}, on images that are not augmented"
    else:
        network = f"ResNet-18 of width {first['width']}"
    return [
        f"scale {first['scale']}: {network}, {training}",
        (f"{len(results)} seeds, mean ± standard deviation" if several else f"one seed, {first['seed']}")
        + f"; accuracy on ID {test_accuracy} %, on the training images {train_accuracy} %",
        f"training took {_range([result['train_seconds'] / 60 for result in results])} minutes each",
        *facts(results),
    ]


def _range(values: Sequence[float], digits: int = 0) -> str:
    low, high = f"{min(values):.{digits}f}", f"{max(values):.{digits}f}"
    return low if low == high else f"{low} to {high}"


Cifar10Study("table3", "Table 3, CIFAR-10 with labels", _seeds, _make_table3, duration="6 h")
Cifar10Study("table5", "Table 5, the sparsity term", _seeds, _table_of(*_NORMS), shares="table3")
Cifar10Study(
    "table6",
    "Table 6, the projection head",
    lambda scale: [Job(variant, scale.recipe, 0) for variant in (MAIN, Variant(hidden=None))],
    _make_table6,
    duration="4 h",
)
Cifar10Study(
    "table7",
    "Table 7, activation functions",
    lambda scale: _ablation([MAIN, Variant(activation="leaky_relu"), Variant(activation="gelu")], scale),
    _make_table7,
    duration="2 min",
)
Cifar10Study(
    "table8",
    "Table 8, the embedding magnitude",
    _seeds,
    _table_of("EmbeddingMagnitude()", *_NORMS),
    shares="table3",
)
Cifar10Study(
    "table10",
    "Table 10, the hidden classifier",
    _seeds,
    _table_of("HiddenConfidence()", "NAN()"),
    shares="table3",
)
Cifar10Study(
    "figure7",
    "Figure 7, the width of the last hidden layer",
    lambda scale: _ablation([Variant(hidden=width) for width in WIDTHS], scale),
    _make_figure7,
    _draw_figure7,
    duration="6 min",
)
