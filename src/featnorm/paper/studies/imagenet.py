"""The ImageNet-1k benchmark: Tables 1, 2, 6, 9 and 12, from one pass of the backbone over each set of images.

At scale "paper" its networks are those of the paper, from the authors' checkpoints. At scale "laptop" it is the
same path on what comes with featnorm: EfficientNet-Lite0 as it is, and with a head on its frozen backbone.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from featnorm._utils.extras import import_extra
from featnorm._utils.layout import fast_layout
from featnorm.detectors import (
    KNN,
    MSP,
    NAN,
    SSD,
    Detector,
    EmbeddingMagnitude,
    Energy,
    KLUniform,
    L1Norm,
    Mahalanobis,
    MaxLogit,
    Residual,
    Sparsity,
    ViM,
)
from featnorm.detectors.base import Wrapper, joined
from featnorm.detectors.held_out import fit_in_batches
from featnorm.detectors.statistics import FloatHistogram, single_unit_rows
from featnorm.evaluation import compare
from featnorm.features import Features
from featnorm.fitting import backbone_features, cluster, features_behind, fit_head
from featnorm.inputs import CachedFeatures, ImageSource
from featnorm.models import DEFAULT_MODEL, LoadedModel, create_model, cut_classifier
from featnorm.paper.checkpoints import load_contrastive
from featnorm.paper.imagenet_data import DATA, LINEAR, WEIGHTS, Data, Shrunk, missing_weights
from featnorm.paper.numbers import numbers
from featnorm.paper.scoring import cached_labels, percentages
from featnorm.paper.study import Context, MissingError, Study
from featnorm.paper.tables import MEASURES, Result, Table, cell, compared, environment, mean_pair, printed

Reader = Callable[[Tensor], Features]
"""Computes all features of a network from its pooled features (n, D)."""

HEADED = "efficientnet-lite0 with a head"
AS_IT_IS = "efficientnet-lite0"
_ROWS = 4096


@dataclass(frozen=True)
class Scale:
    """What a scale runs.

    Parameters
    ----------
    networks : names of the networks of each table.
    data : data sets that each network is tested on. None: those of the table.
    k : number of nearest neighbors in the whole bank; in a share of the bank that share of k, as in the source.
    seeds : number of heads trained, where the network needs one.
    """

    networks: Mapping[str, Sequence[str]]
    data: Sequence[str] | None
    k: int
    seeds: int


_PAPER = {
    "table1": ("supcon", "moco"),
    "table2": ("supcon",),
    "table6-imagenet": ("resnet50", "supcon"),
    "table9": ("vit",),
    "table12": ("supcon",),
}
_LAPTOP = {
    "table1": (AS_IT_IS, HEADED),
    "table2": (HEADED,),
    "table6-imagenet": (AS_IT_IS, HEADED),
    "table9": (HEADED,),
    "table12": (HEADED,),
}
SCALES = {
    "laptop": Scale(_LAPTOP, ("imagenet1k_sample", "tiny_imagenet"), 50, 3),
    "paper": Scale(_PAPER, None, 1000, 1),
}
#: Shares of the training images in a bank.
SHARES = (1.0, 0.1, 0.01)


@dataclass(frozen=True)
class Job:
    """A network, and the images that it runs on.

    Parameters
    ----------
    network : one of `WEIGHTS`, or EfficientNet-Lite0 with a head or without.
    data : one of `featnorm.paper.imagenet_data.DATA`.
    seed : seed of the head, if one is trained.
    """

    network: str
    data: str
    seed: int = 0

    @property
    def folder(self) -> str:
        """Name of its folder; tables that need the same scores share it."""
        return f"{self.network}, {self.data} seed{self.seed}".replace(", ", "-").replace(" ", "-")


class PooledReAct(Wrapper, registered=False):
    """ReAct at the feature that the head reads: it is clipped, and the head computes all features from it.

    That is where the paper clips: in its Table 12 ``1/l0`` changes with ReAct, whereas a unit of the hidden layer
    that is clipped stays on. The inner detector is fitted to unclipped features (Sun et al., NeurIPS 2021).

    Parameters
    ----------
    detector : any detector.
    read : function that computes all features from the pooled ones.
    percentile : percentile at which the pooled features are clipped, over all units and training inputs.
    """

    def __init__(self, detector: Detector, read: Reader, percentile: float = 90) -> None:
        super().__init__()
        self._wrap(detector=detector)
        self.detector: Detector
        self.read = read
        self.percentile = percentile
        self.reads = ("pooled",)
        self.learns = joined(detector.learns, ("pooled",))
        self.role = detector.role
        self.numbers = FloatHistogram()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.detector!r})"

    def _check_fit(self, features: Features) -> None:
        self._require(features, self.learns)
        super()._check_fit(features)

    def _partial_fit(self, features: Features) -> None:
        super()._partial_fit(features)
        self.numbers.update(features.tensor("pooled"))

    def _finalize(self) -> float:
        return self.numbers.percentile(self.percentile)

    def _score(self, features: Features) -> Tensor:
        return self.detector.score(self.read(features.tensor("pooled").clamp(max=self._fitted_state())))


@dataclass(frozen=True)
class _Network:
    """A backbone with its transform, and the reader of its pooled features; None if a head has to be trained."""

    backbone: LoadedModel
    read: Reader | None


def _load(name: str, weights: Path | None) -> _Network:
    if name in (AS_IT_IS, HEADED):
        whole = create_model(DEFAULT_MODEL)
        classifier: nn.Module = whole.model.get_classifier()  # type: ignore[operator]
        read = partial(features_behind, classifier) if name == AS_IT_IS else None
        return _Network(_cut(whole), read)
    assert weights is not None
    file = weights / WEIGHTS[name].file
    if name == "vit":
        return _Network(_cut(create_model("torchvision:vit_b_16", weights=file)), None)
    # The transform of torchvision's default, its second set of weights, differs.
    transform = import_extra("torchvision.models").ResNet50_Weights.IMAGENET1K_V1.transforms()
    if name == "resnet50":
        whole = replace(create_model("torchvision:resnet50", weights=file), transform=transform)
        last: nn.Module = whole.model.fc  # type: ignore[assignment]
        return _Network(_cut(whole), partial(features_behind, last))
    linear = weights / LINEAR if name == "supcon" and (weights / LINEAR).is_file() else None
    network = load_contrastive(file, name, classifier=linear)
    return _Network(LoadedModel(network.backbone, transform, (3, 224, 224), f"{name}:resnet50"), network.features)


def _cut(whole: LoadedModel) -> LoadedModel:
    return replace(whole, model=cut_classifier(whole.model)[0])


def _stream(read: Reader, cached: CachedFeatures, labels: Tensor | None = None) -> Iterator[Features]:
    start = 0
    for values in cached.batches(_ROWS):
        features = read(values)
        yield features if labels is None else features.replace(labels=labels[start : start + len(values)])
        start += len(values)


def _fitted(
    read: Reader, train: CachedFeatures, labels: Tensor, scale: Scale, folder: Path
) -> tuple[list[Detector], dict[str, str], dict[str, float]]:
    """Fit the detectors in one pass, and write each bank to a file in the folder.

    Returns
    -------
    The detectors; those that cannot be fitted here, and why; the share of the training images in each bank.
    """
    banks = {share: KNN(max(1, round(scale.k * share))) for share in SHARES}
    shares = {repr(knn): share for share, knn in banks.items()}
    whole = banks[1.0]
    fitting: list[Detector] = [Mahalanobis(), SSD(), Residual(), ViM()]
    norms: list[Detector] = [NAN(), L1Norm(), Sparsity(), EmbeddingMagnitude()]
    clipped = [PooledReAct(inner, read) for inner in (NAN(), L1Norm(), Sparsity(), Residual())]
    fitting += clipped
    failed = fit_in_batches(fitting, _stream(read, train, labels))
    fitting = [detector for detector in fitting if detector not in failed]
    excluded = {
        repr(detector): str(error).removeprefix(repr(detector)).removeprefix(":").strip()
        for detector, error in failed.items()
    }
    for share, knn in banks.items():
        count = max(1, round(share * len(train.stored_rows)))
        if count < knn.k:
            excluded[repr(knn)] = f"there are only {count} training images in its bank"
            continue
        knn.use_bank(_bank(train, count, folder / f"{knn.k}.f32"))
    fitted = [MSP(), MaxLogit(), Energy(), KLUniform(), *norms, *fitting, *banks.values()]
    distances: list[Detector] = [whole, *(d for d in fitting if isinstance(d, SSD))]
    fitted += [distance / norm for distance in distances for norm in (norms[0], clipped[0])]
    return [detector for detector in fitted if detector.is_fitted], excluded, shares


def _bank(train: CachedFeatures, count: int, file: Path) -> Tensor:
    """Write training features, at unit length, to a file, and map it; a smaller bank is part of a larger one."""
    order = torch.randperm(len(train.stored_rows), generator=torch.Generator().manual_seed(0))
    chosen = torch.zeros(len(order), dtype=torch.bool)
    chosen[order[:count]] = True
    with file.open("wb") as opened:
        for values, rows in zip(train.batches(_ROWS), chosen.split(_ROWS), strict=True):
            opened.write(single_unit_rows(values[rows]).numpy().tobytes())
    width = train.stored.shape[1]
    return torch.from_file(str(file), size=count * width).reshape(count, width)


# Expression of the paper's nearest neighbors in the rows below and in its numbers.
_KNN = repr(KNN(1000))
_NORMS = ("L1Norm()", "NAN()")


@dataclass(frozen=True, eq=False)
class ImageNetStudy(Study[Scale, Mapping[str, Data], Job]):
    """A table of the benchmark.

    Features stay in their files: the training set is read from its file batch by batch, and so are the banks of
    the nearest neighbors. For ImageNet-1k the files take 8 kB per image and ResNet-50.

    A result has ``scores``, AUROC and FPR95 in percent by detector and OOD set; ``microseconds`` per input, by
    detector; ``excluded``, detectors that cannot be used here, and why; ``accuracy`` in [0, 1] or None; ``shares``
    of the training images in the bank, by detector; ``seconds`` of each step; and ``computed``, the number of
    images that the backbone ran on.

    Parameters
    ----------
    detectors : expressions of the detectors, in the paper's order.
    stands_for : network of the paper whose numbers stand beside a network's at scale "laptop".
    means_only : whether the table has only means over the OOD sets, as the paper's.
    shares_of_bank : whether it shows nearest neighbors in shares of the bank too.
    data : data at scale "paper".
    """

    detectors: Sequence[str]
    stands_for: Mapping[str, str]
    means_only: bool = False
    shares_of_bank: bool = False
    data: str = "four OOD sets"

    page: ClassVar[str] = "imagenet"
    scales: ClassVar[Mapping[str, Scale]] = SCALES

    def load(self, scale: Scale, context: Context) -> dict[str, Data]:
        """Open the data sets; all that is missing of them and of the checkpoints is named at once."""
        jobs = self.jobs(scale, {})
        lines = [line for job in jobs for line in missing_weights(job.network, context.weights)]
        opened: dict[str, Data] = {}
        for name in dict.fromkeys(job.data for job in jobs):
            try:
                opened[name] = DATA[name](context.root)
            except MissingError as error:
                lines += error.lines
        if lines:
            raise MissingError(list(dict.fromkeys(lines)))
        return opened

    def jobs(self, scale: Scale, inputs: Mapping[str, Data]) -> list[Job]:
        return [
            Job(network, data, seed)
            for data in scale.data or (self.data,)
            for network in scale.networks[self.name]
            for seed in range(scale.seeds if network == HEADED else 1)
        ]

    def settings(self, job: Job, scale: Scale, inputs: Mapping[str, Data]) -> dict[str, Any]:
        return {
            "network": job.network,
            "data": job.data,
            "seed": job.seed,
            "k": scale.k,
            "images": inputs[job.data].facts,
        }

    def run(
        self, job: Job, scale: Scale, inputs: Mapping[str, Data], folder: Path, context: Context
    ) -> dict[str, Any]:
        """See `Study`; the backbone runs once on every image, and its features serve every detector.

        Raises
        ------
        ModelError
            A checkpoint cannot be read or does not fit.
        """
        data = inputs[job.data]
        network = _load(job.network, context.weights)
        backbone = fast_layout(network.backbone.model.to(context.runtime.torch_device))
        loaded = network.backbone
        if data.side is not None:
            loaded = replace(loaded, transform=Shrunk(loaded.transform, data.side))
        began = time.perf_counter()

        def extract(source: ImageSource) -> CachedFeatures:
            return backbone_features(
                source,
                loaded,
                backbone,
                cache=context.out / "features",
                runtime=context.runtime,
            )

        train, test = extract(data.train), extract(data.test)
        ood = {name: extract(source) for name, source in data.ood.items()}
        extracted = time.perf_counter()
        labels = cached_labels(data.train, train)
        read = network.read
        logit_of: Tensor | None = data.classes
        if read is None:
            # With one image per class there is no class to learn: clusters of the features stand in for them.
            several = len(labels.unique()) < len(labels)
            targets = labels if several else cluster(train.values, job.seed)
            head = fit_head(train.values, targets, seed=job.seed, progress=context.progress)
            read = partial(features_behind, head)
            logit_of = torch.arange(len(data.classes)) if several else None
        headed = time.perf_counter()
        target_logits: Tensor | None = None
        if logit_of is not None:
            test_labels = cached_labels(data.test, test)
            target_logits = torch.where(test_labels < 0, -1, logit_of[test_labels.clamp(min=0)])
        with tempfile.TemporaryDirectory(dir=folder) as banks:
            fitted, excluded, shares = _fitted(read, train, labels, scale, Path(banks))
            evaluation = compare(
                fitted,
                fit=None,
                id_set=("in-distribution", _stream(read, test, target_logits)),
                ood_sets={name: _stream(read, values) for name, values in ood.items()},
            )
        sets = {"training images": train, "in-distribution": test, **ood}
        return {
            "accuracy": evaluation.accuracy,
            "scores": percentages(evaluation),
            "microseconds": {outcome.detector: outcome.microseconds for outcome in evaluation.results},
            "excluded": {**excluded, **evaluation.excluded},
            "shares": shares,
            "unread": {name: len(cached.corrupt) for name, cached in sets.items() if cached.corrupt},
            "computed": sum(cached.computed for cached in sets.values()),
            "seconds": {
                "features": extracted - began,
                "head": headed - extracted if network.read is None else None,
                "detectors": time.perf_counter() - headed,
            },
        }

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        """See `Study`; one per network and data set, or one of means. Runs of other networks are left out."""
        wanted = {(job.network, job.data) for job in self.jobs(self.scales[content[0]["scale"]], {})}
        blocks: dict[str, list[Result]] = {}
        for result in content:
            if (result["network"], result["data"]) in wanted:
                blocks.setdefault(f"{result['network']}, {result['data']}", []).append(result)
        if self.means_only:
            return {self.name: self._means(list(blocks.values()))}
        if len(blocks) == 1:
            return {self.name: self._detailed(*blocks.values())}
        return {
            f"{self.name}, {block}".replace(", ", "-").replace(" ", "-"): self._detailed(runs)
            for block, runs in blocks.items()
        }

    def _detailed(self, runs: Sequence[Result]) -> Table:
        """Return a table with one row per detector and one column per OOD set."""
        first = runs[0]
        paper = self._paper(first["network"])
        sets = list(next(iter(first["scores"].values())))
        wanted = {_ours(expected, first): expected for expected in self.detectors}
        shown = [(ours, ours) for ours in wanted]
        if self.shares_of_bank:
            shares = first["shares"].items()
            shown += [(f"{ours}, {share:.0%} of the bank", ours) for ours, share in shares if share != 1]
        rows = []
        for label, ours in shown:
            if all(ours in run["scores"] for run in runs):
                microseconds = statistics.fmean(run["microseconds"][ours] for run in runs)
                theirs = paper.get(wanted.get(ours, ""), {})
                rows.append([label, *compared(runs, ours, theirs, sets), f"{microseconds:.1f}"])
        excluded = [f"left out {ours}: {why}" for ours, why in first["excluded"].items() if ours in wanted]
        headers = ["Detector", "Mean, ours", "Average, paper", *sets, "µs / input"]
        title = f"{self.title}: {first['network']} on {first['data']}, {MEASURES}"
        return Table(title, headers, rows, [*self._notes([runs]), *excluded])

    def _means(self, blocks: Sequence[Sequence[Result]]) -> Table:
        """Return a table with one row per detector and two columns per network: ours and the paper's."""
        headers = ["Detector"]
        for runs in blocks:
            name = f"{runs[0]['network']}, {runs[0]['data']}"
            headers += [f"{name}: ours", "paper"]
        rows = []
        for expected in self.detectors:
            row = [expected if _KNN not in expected else _ours(expected, blocks[0][0])]
            for runs in blocks:
                ours = _ours(expected, runs[0])
                complete = all(ours in run["scores"] for run in runs)
                row.append(cell([mean_pair(run, ours) for run in runs]) if complete else "–")
                row.append(printed(self._paper(runs[0]["network"]).get(expected, {}).get("Average")))
            rows.append(row)
        return Table(f"{self.title}: mean of the OOD sets, {MEASURES}", headers, rows, self._notes(blocks))

    def _paper(self, network: str) -> Mapping[str, Mapping[str, Sequence[float]]]:
        """Return the paper's rows of a network, or of the one that ours stands for."""
        rows: Mapping[str, Mapping[str, Mapping[str, Sequence[float]]]] = numbers("imagenet")[self.name]["rows"]
        return rows.get(self.stands_for.get(network, network), {})

    def _notes(self, blocks: Sequence[Sequence[Result]]) -> list[str]:
        notes = [f"the paper's numbers are of {numbers('imagenet')[self.name]['where']}"]
        for runs in blocks:
            first = runs[0]
            name = f"{first['network']} on {first['data']}"
            several = f"; {len(runs)} heads, mean ± standard deviation" if len(runs) > 1 else ""
            notes.append(f"{name}: {self._accuracy(runs)}{several}")
            heads = [run["seconds"]["head"] for run in runs if run["seconds"]["head"] is not None]
            if heads:
                notes.append(f"{name}: {statistics.fmean(heads):.0f} s to train a head")
            notes += [f"{name}, {what}: {value}" for what, value in first["images"].items()]
            notes += [
                f"{name}, {count} images of {what} cannot be read" for what, count in first["unread"].items()
            ]
        return [*notes, *environment([run for runs in blocks for run in runs])]

    def _accuracy(self, runs: Sequence[Result]) -> str:
        found = [100 * run["accuracy"] for run in runs if run["accuracy"] is not None]
        theirs = numbers("imagenet")[self.name].get("accuracy", {}).get(runs[0]["network"])
        ours = "no accuracy, as it has no logits of these classes"
        if found:
            ours = f"accuracy on ID {statistics.fmean(found):.1f} %"
        return ours + ("" if theirs is None else f", the paper's is {theirs} %")


def _ours(expected: str, result: Result) -> str:
    """Return the expression in a result of one of the paper's detectors, with the k of its scale."""
    return expected.replace(_KNN, repr(KNN(result["k"])))


_TABLE2 = tuple(
    f"{distance}{norm}" for norm in ("NAN()", "PooledReAct(NAN())") for distance in ("", f"{_KNN} / ", "SSD() / ")
)
_TABLE12 = tuple(
    form.format(norm)
    for form in ("{}", "PooledReAct({})")
    for norm in ("L1Norm()", "Sparsity()", "Residual()", "NAN()")
)

ImageNetStudy(
    "table1",
    "Table 1, the large-scale benchmark",
    ("MSP()", "Energy()", "MaxLogit()", "KLUniform()", "Mahalanobis()", "ViM()", "SSD()", _KNN, "NAN()"),
    {HEADED: "supcon"},
    shares_of_bank=True,
    duration="40 min",
)
ImageNetStudy(
    "table2", "Table 2, distances over NAN", _TABLE2, {HEADED: "supcon"}, means_only=True, shares="table1"
)
ImageNetStudy(
    "table6-imagenet",
    "Table 6, the projection head on ImageNet-1k",
    _NORMS,
    {AS_IT_IS: "resnet50", HEADED: "supcon"},
    means_only=True,
    shares="table1",
)
ImageNetStudy(
    "table9",
    "Table 9, a head on a frozen backbone",
    ("MSP()", "Energy()", "Mahalanobis()", _KNN, "EmbeddingMagnitude()", *_NORMS),
    {HEADED: "vit"},
    shares="table1",
)
ImageNetStudy("table12", "Table 12, norms", _TABLE12, {HEADED: "supcon"}, data="seven OOD sets", shares="table1")
