"""Detectors on texts: intents of a bank's customers, against other intents and news; and what NAN needs there."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from featnorm.detectors import Detector, parse_detector
from featnorm.evaluation import compare, standard_detectors
from featnorm.features import Features
from featnorm.fitting import cluster, features_behind, fit_head
from featnorm.inputs import TEXTS
from featnorm.models import DEFAULT_TEXT_MODEL, ProjectionHead, create_model
from featnorm.paper.scoring import inactive, percentages
from featnorm.paper.study import Context, MissingError, Study
from featnorm.paper.tables import MEASURES, Result, Table, cell, environment, mean_and_deviation, mean_pair
from featnorm.training import Recipe, train
from featnorm.training.runs import LOG, read_log

#: Number of intents that are in-distribution; which ones depends on the seed. The others are near-OOD.
ID_INTENTS = 50
SEEDS = 3
FILES = ("banking77_train", "banking77_test", "ag_news_test")
#: One text of the news in this number is used.
NEWS = 8
#: Detectors beside the standard ones: a smaller k, and the sums that are the best on images.
_ADDED = "KNN(k=10) KLUniform+KNN(k=10) KLUniform+Mahalanobis(normalize=True)"
_TUNED = (
    "NAN L1Norm Sparsity HiddenConfidence MSP Energy KLUniform SSD Mahalanobis(normalize=True) KNN(k=10) "
    "KLUniform+KNN(k=10)"
)
_HIDDEN = 512
#: How networks are trained: heads on frozen features, and encoders from MiniLM together with their head.
RECIPES = {
    "frozen": Recipe(epochs=30, batch_size=32, optimizer="adamw", lr=1e-3, weight_decay=0.01),
    "fine-tuned": Recipe(epochs=6, batch_size=32, optimizer="adamw", lr=3e-4, weight_decay=0.01, warmup=0.1),
}
_BATCH, _CHUNK = 512, 16


@dataclass(frozen=True)
class Scale:
    """How many seeds `FineTunedStudy` has, and how many training texts of each intent; None for all of them."""

    seeds: int
    texts: int | None


@dataclass(frozen=True)
class Texts:
    """Token ids (n, L) of texts, padded, or their features (n, D); and their labels (n,)."""

    ids: Tensor
    labels: Tensor

    def of(self, classes: Tensor) -> "Texts":
        """Return the texts of some classes, whose labels are their places among these."""
        rows = torch.isin(self.labels, classes)
        return Texts(self.ids[rows], (self.labels[rows, None] == classes).int().argmax(1))

    def first(self, count: int | None) -> "Texts":
        """Return the first texts of each class; all of them for None."""
        places = nn.functional.one_hot(self.labels).cumsum(0).gather(1, self.labels[:, None])[:, 0]
        rows = places <= (len(places) if count is None else count)
        return Texts(self.ids[rows], self.labels[rows])


def load_texts(context: Context) -> dict[str, Texts]:
    """Read the texts below the data root, by the names of their files.

    Raises
    ------
    MissingError
        Files are missing.
    """
    import pyarrow.parquet as pq

    if context.root is None:
        raise MissingError([f"text/{name}.parquet: name its folder by --data-root" for name in FILES])
    paths = {name: context.root / "text" / f"{name}.parquet" for name in FILES}
    if missing := [f"{path}: texts, columns text and label" for path in paths.values() if not path.is_file()]:
        raise MissingError(missing)
    transform: Any = create_model(DEFAULT_TEXT_MODEL, pretrained=False).transform
    found = {}
    for name, path in paths.items():
        columns = pq.read_table(path).to_pydict()
        ids = TEXTS.collate([transform(text) for text in columns["text"]], transform)["input_ids"]
        step = NEWS if name == "ag_news_test" else 1
        found[name] = Texts(ids[::step], torch.tensor(columns["label"])[::step])
    return found


def frozen_features(context: Context) -> dict[str, Texts]:
    """Return the texts with MiniLM's features in the place of token ids."""
    packed = Packed(create_model(DEFAULT_TEXT_MODEL).model).to(context.runtime.torch_device)
    texts = context.once(load_texts)
    return {name: Texts(packed.features(given.ids), given.labels) for name, given in texts.items()}


def split_intents(texts: Mapping[str, Texts], seed: int) -> tuple[Texts, Texts, dict[str, Texts]]:
    """Return the training and test texts of the intents that a seed makes ID, and the OOD texts by set."""
    train_texts, test, news = (texts[name] for name in FILES)
    order = torch.randperm(int(train_texts.labels.max()) + 1, generator=torch.Generator().manual_seed(seed))
    known, others = order[:ID_INTENTS], order[ID_INTENTS:]
    return train_texts.of(known), test.of(known), {"other intents": test.of(others), "news": news}


class Packed(nn.Module):
    """An encoder that takes padded token ids (n, L), as the training loop passes them.

    Texts of similar length are encoded together, so that little padding is computed.

    Parameters
    ----------
    encoder : a `featnorm.models.text.TextEncoder` whose padding has the id 0.
    """

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, ids: Tensor) -> Tensor:
        """Return the features (n, D)."""
        lengths = (ids != 0).sum(1)
        order = lengths.argsort()
        parts = [ids[rows, : int(lengths[rows[-1]])] for rows in order.split(_CHUNK)]
        return torch.cat([self.encoder(part, (part != 0).long()) for part in parts])[order.argsort()]

    @torch.no_grad()
    def features(self, ids: Tensor) -> Tensor:
        """Return the features (n, D) of any number of texts, on the CPU, in single precision."""
        device = next(self.parameters()).device
        return torch.cat([self(part.to(device)).float().cpu() for part in ids.split(_BATCH)])


def _measured(
    detectors: Sequence[Detector], head: nn.Module, fit: Features, test: Features, ood: Mapping[str, Tensor]
) -> dict[str, Any]:
    """Compare detectors on pooled features behind a head; the labels of ``fit`` are classes or clusters."""

    def behind(features: Features) -> Features:
        return features_behind(head, features.tensor("pooled")).replace(labels=features.labels)

    found = compare(
        detectors,
        fit=[behind(fit)],
        id_set=("in-distribution", [behind(test)]),
        ood_sets={name: [features_behind(head, values)] for name, values in ood.items()},
    )
    return {"scores": percentages(found), "accuracy": found.accuracy, "excluded": found.excluded}


def _of(features: Tensor, labels: Tensor | None) -> Features:
    return Features(pooled=features, labels=labels)


@dataclass(frozen=True)
class Draw:
    """A job of `TextStudy`: what is ID, "intents" (`ID_INTENTS` of them) or "all" of them, and a seed."""

    setting: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the folder of the run."""
        return f"text-{self.setting}-seed{self.seed}"


@dataclass(frozen=True, eq=False)
class TextStudy(Study[None, dict[str, Texts], Draw]):
    """Every detector on MiniLM's features and heads on them, with labels and with clusters in their place.

    Its result has one entry per `Draw`: ``sizes`` of the sets, and ``heads``, by what they were trained on
    ("labels", "clusters"): ``scores`` (AUROC and FPR95 in percent, by detector and OOD set), ``accuracy`` and
    ``excluded``.
    """

    page: ClassVar[str] = "text"
    scales: ClassVar[Mapping[str, None]] = {"laptop": None, "paper": None}
    grows: ClassVar[bool] = True

    def load(self, scale: None, context: Context) -> dict[str, Texts]:
        return context.once(load_texts)

    def jobs(self, scale: None, inputs: Mapping[str, Texts]) -> list[Draw]:
        return [Draw(setting, seed) for setting in _SETTINGS for seed in range(SEEDS)]

    def settings(self, job: Draw, scale: None, inputs: Mapping[str, Texts]) -> dict[str, Any]:
        return {"draw": asdict(job), "id_intents": ID_INTENTS, "texts": _sizes(inputs)}

    def run(
        self, job: Draw, scale: None, inputs: dict[str, Texts], folder: Path, context: Context
    ) -> dict[str, Any]:
        texts = context.once(frozen_features)
        if job.setting == "intents":
            fit, test, ood = split_intents(texts, job.seed)
        else:
            fit, test, ood = texts[FILES[0]], texts[FILES[1]], {"news": texts[FILES[2]]}
        heads = {}
        for kind in ("labels", "clusters"):
            targets = fit.labels if kind == "labels" else cluster(fit.ids, job.seed)
            head = fit_head(fit.ids, targets, seed=job.seed, progress=context.progress)
            detectors = [detector for detector in standard_detectors() if not detector.needs_model]
            detectors += map(parse_detector, _ADDED.split())
            known = _of(test.ids, test.labels if kind == "labels" else None)
            values = {name: part.ids for name, part in ood.items()}
            heads[kind] = _measured(detectors, head, _of(fit.ids, targets), known, values)
        return {"heads": heads, "sizes": _sizes({"training": fit, "ID test": test, **ood})}

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        """See `Study`; one table per setting and targets, such as "intents-labels"."""
        found = {}
        for setting, title in _SETTINGS.items():
            results = [result for result in content if result["draw"]["setting"] == setting]
            for kind in ("labels", "clusters") if results else ():
                runs = [result["heads"][kind] for result in results]
                notes = [
                    f"mean ± standard deviation over {len(runs)} seeds",
                    *(
                        f"{name}: {_range([r['sizes'][name] for r in results])} texts"
                        for name in results[0]["sizes"]
                    ),
                    *environment(results),
                    *_excluded(runs[0]["excluded"]),
                ]
                if kind == "labels":
                    accuracy = mean_and_deviation([100 * run["accuracy"] for run in runs])
                    notes.insert(0, f"accuracy on ID {accuracy} %")
                found[f"{setting}-{kind}"] = Table(f"{title}, heads on {kind}: {MEASURES}", *_ranked(runs), notes)
        return found


_SETTINGS = {"intents": f"{ID_INTENTS} intents against the others and news", "all": "All intents against news"}


def _sizes(texts: Mapping[str, Texts]) -> dict[str, int]:
    return {name: len(part.ids) for name, part in texts.items()}


def _excluded(reasons: Mapping[str, str]) -> list[str]:
    """Return one note per reason why detectors cannot be used."""
    names: dict[str, list[str]] = {}
    for name, why in reasons.items():
        names.setdefault(why, []).append(name)
    return [f"left out {', '.join(those)}: {why}" for why, those in names.items()]


def _range(values: Sequence[int]) -> str:
    return f"{min(values):,}" if min(values) == max(values) else f"{min(values):,} to {max(values):,}"


def _ranked(runs: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Return headers and rows of the detectors that all runs have, the best mean AUROC first."""
    names = [name for name in runs[0]["scores"] if all(name in run["scores"] for run in runs)]
    names.sort(key=lambda name: -sum(mean_pair(run, name)[0] for run in runs))
    sets = list(runs[0]["scores"][names[0]])
    means = len(sets) > 1
    rows = [
        [
            name,
            *([cell([mean_pair(run, name) for run in runs])] if means else []),
            *(cell([run["scores"][name][ood] for run in runs]) for ood in sets),
        ]
        for name in names
    ]
    return ["Detector", *(["Mean"] if means else []), *sets], rows


@dataclass(frozen=True)
class Network:
    """A job of `FineTunedStudy`: an encoder, trained as one of `RECIPES`, and its head, "MLP" or "projection"."""

    encoder: str
    head: str
    seed: int

    @property
    def folder(self) -> str:
        """Name of the folder of the run."""
        return f"text-{self.encoder}-{self.head}-seed{self.seed}".replace(" ", "-")

    def make_head(self, width: int) -> nn.Module:
        """Return the head with its initial weights, for features of some width; its hidden layer is rectified."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            if self.head == "projection":
                return ProjectionHead(width, ID_INTENTS, hidden=_HIDDEN)
            return nn.Sequential(nn.Linear(width, _HIDDEN), nn.ReLU(), nn.Linear(_HIDDEN, ID_INTENTS))


@dataclass(frozen=True, eq=False)
class FineTunedStudy(Study[Scale, dict[str, Texts], Network]):
    """What NAN needs on texts: the same heads on MiniLM as it is, and trained together with it.

    Its result has one entry per network: ``scores``, ``accuracy``, ``excluded``, ``train_accuracy``,
    ``train_seconds``, and ``inactive``, the share of the hidden layer's units that are off, by set.
    """

    page: ClassVar[str] = "text"
    scales: ClassVar[Mapping[str, Scale]] = {"laptop": Scale(seeds=2, texts=30), "paper": Scale(SEEDS, None)}
    grows: ClassVar[bool] = True

    def load(self, scale: Scale, context: Context) -> dict[str, Texts]:
        return context.once(load_texts)

    def jobs(self, scale: Scale, inputs: Mapping[str, Texts]) -> list[Network]:
        frozen = [Network("frozen", head, seed) for head in ("MLP", "projection") for seed in range(scale.seeds)]
        tuned = [
            Network("fine-tuned", head, seed) for seed in range(scale.seeds) for head in ("MLP", "projection")
        ]
        return [*frozen, *tuned]

    def settings(self, job: Network, scale: Scale, inputs: Mapping[str, Texts]) -> dict[str, Any]:
        return {
            "network": asdict(job),
            "recipe": RECIPES[job.encoder].to_dict(),
            "id_intents": ID_INTENTS,
            "training_texts": scale.texts,
            "hidden": _HIDDEN,
            "texts": _sizes(inputs),
        }

    def run(
        self, job: Network, scale: Scale, inputs: dict[str, Texts], folder: Path, context: Context
    ) -> dict[str, Any]:
        fit, test, ood = split_intents(
            context.once(frozen_features) if job.encoder == "frozen" else inputs, job.seed
        )
        fit = fit.first(scale.texts)
        sets = {"fit": fit, "ID": test, **ood}
        options: dict[str, Any] = {"folder": folder, "runtime": context.runtime, "seed": job.seed}
        recipe = RECIPES[job.encoder]
        if job.encoder == "frozen":
            head = train(job.make_head(fit.ids.shape[1]), fit.ids, fit.labels, recipe, **options)
            values = {name: part.ids for name, part in sets.items()}
        else:
            packed = Packed(create_model(DEFAULT_TEXT_MODEL).model)
            words: Any = packed.encoder.get_submodule("encoder.embeddings.word_embeddings")
            # Half of all weights, most of which no training text uses.
            words.requires_grad_(False)
            head = job.make_head(words.embedding_dim)
            train(nn.Sequential(packed, head), fit.ids, fit.labels, recipe, **options)
            values = {name: packed.features(part.ids) for name, part in sets.items()}
        log = read_log(folder / LOG)
        head.cpu()
        found = _measured(
            [parse_detector(expression) for expression in _TUNED.split()],
            head,
            _of(values["fit"], fit.labels),
            _of(values["ID"], test.labels),
            {name: values[name] for name in ood},
        )
        off = {name: inactive([features_behind(head, values[name])]) for name in ("ID", *ood)}
        seconds = sum(entry["seconds"] for entry in log)
        return {
            **found,
            "fit_texts": len(fit.ids),
            "train_accuracy": log[-1]["accuracy"],
            "train_seconds": seconds,
            "inactive": off,
        }

    def tables(self, content: Sequence[Result]) -> dict[str, Table]:
        """See `Study`; one table per OOD set, with one column per kind of network."""
        networks: dict[str, list[Result]] = {}
        for result in content:
            kind = "{encoder}, {head}".format(**result["network"])
            networks.setdefault(kind, []).append(result)
        notes = [
            f"{content[0]['fit_texts']:,} training texts; mean ± standard deviation, seeds of each column: "
            + ", ".join(f"{len(runs)}" for runs in networks.values()),
            *environment(content),
        ]

        kinds = networks.values()
        accuracy = [
            "accuracy, %",
            *(mean_and_deviation([100 * run["accuracy"] for run in runs]) for runs in kinds),
        ]
        found = {}
        for ood in ("other intents", "news"):
            on = [
                [f"units on, %, {name}"]
                + [mean_and_deviation([100 * (1 - run["inactive"][name]) for run in runs]) for runs in kinds]
                for name in ("ID", ood)
            ]
            scores = [
                [name, *(cell([run["scores"][name][ood] for run in runs]) for runs in kinds)]
                for name in content[0]["scores"]
            ]
            title = f"{self.title}, against {ood}: {MEASURES}"
            found[f"fine-tuned-{ood.replace(' ', '-')}"] = Table(
                title, ["", *networks], [accuracy, *on, *scores], notes
            )
        return found


TextStudy("text", "Detectors on texts")
FineTunedStudy("text-fine-tuned", "Heads on MiniLM, frozen and fine-tuned")
