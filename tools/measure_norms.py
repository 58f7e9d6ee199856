"""Measure where norms detect, why they fail elsewhere, what predicts it, and scores that are as cheap.

    python tools/measure_norms.py FOLDER --data-root DATA --texts ENCODER [--transformer FILE] [--part PART ...]

FOLDER and ENCODER are those of measure_selection.py, whose stored features are used. FILE is the
``model.safetensors`` of ``featnorm reproduce transformer``; without it, the transformer is left out. Heads and the
result of each part, setting and seed are kept in FOLDER/norms: rerun the same command to resume.
"""

import argparse
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
import torch
from measure_selection import IMAGES, NETWORK, SETTINGS, Setting, Store
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr
from torch import Tensor, nn

from featnorm._utils.files import replacing, write_text
from featnorm.calibration import threshold_at_tpr
from featnorm.cli.console import environment
from featnorm.detectors import parse_detector
from featnorm.features import Features
from featnorm.fitting import TEMPERATURE, cluster, features_behind, fit_head
from featnorm.hidden import ActivationStatistics, HiddenClassifier
from featnorm.inputs import SlicedSource, open_source
from featnorm.inputs.loading import source_loader
from featnorm.metrics import auroc
from featnorm.models import CosineClassifier, LoadedModel, ProjectionHead, create_model
from featnorm.norms import l0_norm, l1_norm, lp_norm, negative_aware_norm
from featnorm.paper.heads import FROZEN
from featnorm.paper.studies import text, transformer
from featnorm.runtime import Runtime
from featnorm.significance import delong, placements
from featnorm.tap import FeatureTap
from featnorm.training import train

SEEDS = 3
# Temperature of the cosine logits of the pooled feature (paper C.1).
_COSINE = 0.1
_CIFAR = SETTINGS["CIFAR-10's network"]
_OOD32 = {"Tiny ImageNet": "vit-tiny", "textures": "vit-textures", "digits": "vit-digits"}
_NEWS = {"other intents": "text-near", "news": "text-news"}
#: The settings to choose on, and those to report on. A mode is what the head is trained on ("labels", "clusters"),
#: "own" for the network's own, or "cosine" for cosine logits of the pooled feature.
SPLIT = {
    "A": {
        "CIFAR-10, packaged network": _CIFAR,
        "CIFAR-10, no head": _CIFAR._replace(mode="cosine"),
        "Tiny ImageNet, labels": SETTINGS["Tiny ImageNet, labels"],
        "Tiny ImageNet, clusters": SETTINGS["Tiny ImageNet, clusters"],
        "MNIST, labels": SETTINGS["MNIST, labels"],
    },
    "B": {
        "ImageNet-1k": SETTINGS["ImageNet-1k, own classifier"],
        "banking77, labels": SETTINGS["banking77, labels"],
        "banking77, clusters": SETTINGS["banking77, labels"]._replace(mode="clusters"),
        "scikit-learn's digits, labels": SETTINGS["scikit-learn's digits, labels"],
        "CIFAR-10, transformer": Setting("vit-fit", "vit-test", _OOD32, "own"),
    },
}
IMAGES |= {f"vit{name[5:]}": images for name, images in IMAGES.items() if name.startswith("cifar-")}
REFERENCES = (
    "NAN()",
    "L1Norm()",
    "HiddenConfidence()",
    "KLUniform()",
    "SSD()",
    "KNN(k=10)",
    "KLUniform() + KNN(k=10)",
)


class Networks(Store):
    """The stored features, and those of the transformer."""

    def __init__(self, folder: Path, root: Path, texts: Path | None, weights: Path | None) -> None:
        super().__init__(folder, root, texts)
        self.heads = folder / "norms" / "heads"
        self.heads.mkdir(parents=True, exist_ok=True)
        self.transformer = transformer.SCALES["laptop"].build(0) if weights else None
        if weights is not None and self.transformer is not None:
            self.transformer.load_state_dict(load_file(weights))

    def network(self, name: str) -> tuple[LoadedModel, nn.Module]:
        """Return the network of a set; see `Store.network`."""
        if not name.startswith("vit-"):
            return super().network(name)
        assert self.transformer is not None
        return replace(create_model(NETWORK), model=self.transformer), self.transformer[:-1]

    def own_head(self, name: str) -> nn.Module:
        """Return what a set's network computes from its pooled features."""
        model: Any = self.network(name)[0].model
        return model.get_classifier() if hasattr(model, "get_classifier") else model[-1]

    def head(self, setting: Setting, seed: int) -> nn.Module:
        """Return the head of a setting; trained once, on the inputs that are not held out."""
        if setting.mode == "own":
            return self.own_head(setting.fit)
        file = self.heads / f"{setting.fit}-{setting.mode}-{seed}.safetensors"
        if not file.exists():
            self._train(setting, seed, file)
        weights = load_file(file)
        if setting.mode == "cosine":
            classes, width = weights["weight"].shape
            head: nn.Module = CosineClassifier(width, classes, _COSINE)
        else:
            width, classes = weights["hidden.weight"].shape[1], len(weights["classifier.weight"])
            head = ProjectionHead(width, classes, temperature=TEMPERATURE)
        head.load_state_dict(weights)
        return head.eval()

    def _train(self, setting: Setting, seed: int, file: Path) -> None:
        print(f"training {file.stem}", flush=True)
        part = self.get(setting.fit)
        values = part.values[~part.held_out]
        targets = part.labels[~part.held_out].unique(return_inverse=True)[1]
        if setting.mode == "cosine":
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                head: nn.Module = CosineClassifier(values.shape[1], int(targets.max()) + 1, _COSINE)
            train(head, values, targets, FROZEN, runtime=Runtime(progress=False), seed=seed)
        else:
            targets = cluster(values, seed) if setting.mode == "clusters" else targets
            head = fit_head(values, targets, seed=seed, progress=False)
        with replacing(file) as temporary:
            save_file({name: value.contiguous() for name, value in head.state_dict().items()}, temporary)


def behind(head: nn.Module, values: Tensor) -> Features:
    """Return the features behind a head, see `features_behind`; of cosine logits, too."""
    if isinstance(head, CosineClassifier):
        weight = nn.functional.normalize(head.weight.detach()) / head.temperature
        with torch.no_grad():
            logits = head(values)
        return Features(activation=values, pooled=values, logits=logits, classifier=(weight, None))
    return features_behind(head, values)


class Statistics:
    """What a candidate needs of the training inputs: moments, and those of the inputs of each predicted class."""

    def __init__(self, fit: Features) -> None:
        h, a, logits = (fit.tensor(name) for name in ("pooled", "activation", "logits"))
        self.mean, deviation = h.mean(0), h.std(0)
        self.deviation = deviation.clamp(min=1e-3 * float(deviation.mean()))
        self.weight = fit.linear()[0]
        self.classes = logits.argmax(1)
        self.count = torch.bincount(self.classes, minlength=logits.shape[1])
        self.nan = self.of_classes(negative_aware_norm(a)[:, None])[:, 0]
        on = (a > 0).double()
        self.rate = (on.sum(0) + 0.5) / (len(on) + 1)
        self.center = a.double().mean(0)
        self.centers = self.of_classes(a.double()) - self.center

    def of_classes(self, values: Tensor) -> Tensor:
        """Return the mean of each predicted class (C, ...), shrunk to all inputs' by one pseudo-input."""
        sums = values.new_zeros(len(self.count), values.shape[1]).index_add(0, self.classes, values)
        return (sums + values.mean(0)) / (self.count[:, None] + 1)

    def length(self, x: Features) -> Tensor:
        """Return ||h'||."""
        return lp_norm((x.tensor("pooled") - self.mean) / self.deviation, 2)

    def confidence(self, x: Features) -> Tensor:
        """Return the hidden classifier's confidence."""
        return HiddenClassifier(x.tensor("activation"), self.weight).confidence

    def excess(self, x: Features) -> Tensor:
        """Return NAN minus its mean in the predicted class."""
        return negative_aware_norm(x.tensor("activation")) - self.nan[x.tensor("logits").argmax(1)]

    def pattern_of_all(self, x: Features) -> Tensor:
        """Return the log-probability of the units that are on, by the rates of all inputs."""
        on = (x.tensor("activation") > 0).double()
        return on @ (self.rate.log() - (1 - self.rate).log()) + (1 - self.rate).log().sum()

    def direction(self, x: Features) -> Tensor:
        """Return the largest cosine to a class mean."""
        rows = nn.functional.normalize(x.tensor("activation").double() - self.center)
        return (rows @ nn.functional.normalize(self.centers).T).amax(1)


Score = Callable[[Features], Tensor]


def once(score: Score) -> Score:
    """Return the score, computed once for the same features."""
    known: dict[int, tuple[Features, Tensor]] = {}

    def cached(x: Features) -> Tensor:
        if id(x) not in known:
            known[id(x)] = x, score(x)
        return known[id(x)][1]

    return cached


def candidates(fit: Features, constants: Features, kl: Score, ssd: Score) -> dict[str, Score]:
    """Return the candidates, fitted; KLUniform and SSD are given."""
    of = Statistics(fit)

    def tiny(values: Tensor) -> Tensor:
        return values.clamp(min=torch.finfo(values.dtype).tiny)

    def standardized(score: Score) -> Score:
        known = score(constants).double()
        return lambda x: (score(x).double() - known.mean()) / known.std()

    def total(*scores: Score) -> Score:
        terms = [standardized(score) for score in scores]
        return lambda x: torch.stack([term(x) for term in terms]).sum(0)

    def whitened(*scores: Score) -> Score:
        terms = [standardized(score) for score in scores]
        weights = torch.linalg.solve(
            torch.stack([term(constants) for term in terms]).cov(), torch.ones(len(terms)).double()
        )
        return lambda x: weights @ torch.stack([term(x) for term in terms])

    rows = fit.tensor("activation")
    gaussian = parse_detector("SSD()").fit(Features(pooled=rows))
    gaussian_of_a = once(lambda x: gaussian.score(Features(pooled=x.tensor("activation"))))

    def relative_nan(x: Features) -> Tensor:
        return negative_aware_norm(x.tensor("activation")) / tiny(of.length(x))

    def over_l2(x: Features) -> Tensor:
        return of.confidence(x) / tiny(lp_norm(x.tensor("activation"), 2))

    predicted = once(parse_detector("PredictedMahalanobis()").fit(fit).score)
    pattern = once(parse_detector("ActivationPattern()").fit(fit).score)
    return {
        "class NAN": of.excess,
        "typical NAN": lambda x: -of.excess(x).abs(),
        "relative NAN": relative_nan,
        "hidden confidence / l2-norm": over_l2,
        "hidden confidence / l1-norm": lambda x: of.confidence(x) / tiny(l1_norm(x.tensor("activation"))),
        "relative hidden confidence": lambda x: of.confidence(x) / tiny(of.length(x)),
        "pattern": pattern,
        "pattern ratio": lambda x: pattern(x) - of.pattern_of_all(x),
        "class direction": of.direction,
        "relative KLUniform": lambda x: kl(x) / tiny(of.length(x)),
        "Gaussian of a": gaussian_of_a,
        "KLUniform + pattern": total(kl, pattern),
        "KLUniform + SSD": total(kl, ssd),
        "KLUniform + Gaussian of a": total(kl, gaussian_of_a),
        "hidden confidence / l2-norm + SSD": total(over_l2, ssd),
        "KLUniform + relative NAN + SSD": total(kl, relative_nan, ssd),
        "KLUniform and SSD, whitened": whitened(kl, ssd),
        "KLUniform + Mahalanobis of predicted classes": total(kl, predicted),
        # Added after A was scored, and before B.
        "Mahalanobis of predicted classes": predicted,
        "KLUniform + pattern + SSD": total(kl, pattern, ssd),
        "KLUniform + pattern + Mahalanobis of predicted classes": total(kl, pattern, predicted),
    }


@dataclass(frozen=True)
class Network:
    """A setting with the head of a seed."""

    setting: Setting
    store: Networks
    seed: int

    @cached_property
    def head(self) -> nn.Module:
        """The head."""
        return self.store.head(self.setting, self.seed)

    def features(self, name: str) -> Features:
        """Return the features of a stored set."""
        return behind(self.head, self.store.get(name).values)

    @cached_property
    def fit(self) -> Features:
        """The training inputs."""
        part = self.store.get(self.setting.fit)
        return behind(self.head, part.values[~part.held_out])

    def _held_out(self, share: slice) -> Features:
        part = self.store.get(self.setting.fit)
        rows = part.held_out.nonzero()[:, 0]
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(self.seed))
        quarter = len(rows) // 4
        return behind(
            self.head, part.values[rows[order[quarter * share.start : share.stop and quarter * share.stop]]]
        )

    @cached_property
    def constants(self) -> Features:
        """A quarter of the held-out inputs, drawn by the seed, as in measure_selection.py."""
        return self._held_out(slice(0, 1))

    @cached_property
    def calibration(self) -> Features:
        """The other held-out inputs."""
        return self._held_out(slice(1, None))

    def sets(self) -> dict[str, Features]:
        """Return the OOD sets."""
        return {name: self.features(stored) for name, stored in self.setting.ood.items()}


def score_setting(name: str, setting: Setting, store: Networks) -> dict[str, Any]:
    """Score the OOD sets of a setting by all references and candidates: AUROC by seed, and their covariance."""
    by_seed = []
    of_pool: dict[str, Any] = {}
    for seed in range(1 if setting.mode == "own" and setting.fit != "vit-fit" else SEEDS):
        network = Network(setting, store, seed)
        scores: dict[str, Score] = {}
        for expression in REFERENCES:
            detector = of_pool.get(expression) or parse_detector(expression).fit(network.fit, network.constants)
            if detector.learns == ("pooled",):
                of_pool[expression] = detector
            scores[expression] = once(detector.score)
        scores |= candidates(network.fit, network.constants, scores["KLUniform()"], scores["SSD()"])
        test = network.features(setting.test)
        known = np.stack([score(test).double().numpy() for score in scores.values()])
        by_seed.append(
            {
                kind: placements(known, np.stack([score(x).double().numpy() for score in scores.values()]))
                for kind, x in network.sets().items()
            }
        )
    # Seeds share the inputs, so the mean over seeds of an input's placement has the variance of the mean AUROC.
    parts = [tuple(np.mean([run[kind][side] for run in by_seed], 0) for side in (0, 1)) for kind in by_seed[0]]
    return {
        "setting": name,
        "scores": list(scores),
        "auroc": [{kind: (100 * pair[0].mean(1)).tolist() for kind, pair in run.items()} for run in by_seed],
        "covariance": (1e4 * delong(parts)).tolist(),  # type: ignore[arg-type]
        "sizes": {"test": known.shape[1], **{kind: pair[1].shape[1] for kind, pair in by_seed[0].items()}},
    }


#: The default of ``featnorm fit``, its terms, and the two outcomes of the comparison, as the library has them.
DEFAULT = "KLUniform() + KNN(k=10)"
VERDICTS = (
    DEFAULT,
    "KLUniform() + ActivationPattern() + PredictedMahalanobis()",
    "KLUniform() + ActivationPattern()",
    "KNN(k=10)",
    "KLUniform()",
    "NAN()",
)
_FALSE_ALARMS = 0.05
_ROWS = 64


def flag(setting: Setting, store: Networks) -> list[dict[str, Any]]:
    """Return by seed and detector the share of each set that is flagged at 5 % false alarms, and the costs.

    The threshold is that of the held-out inputs which did not standardize the terms of sums, as in `featnorm.fit`.
    ``bytes`` are those of what the detector has learned, and ``microseconds`` the CPU time per input in batches of
    64, without the network.
    """
    runs = []
    for seed in range(1 if setting.mode == "own" and setting.fit != "vit-fit" else SEEDS):
        network = Network(setting, store, seed)
        test, sets = network.features(setting.test), network.sets()
        for expression in VERDICTS:
            detector = parse_detector(expression).fit(network.fit, network.constants)
            threshold = threshold_at_tpr(detector.score(network.calibration), 1 - _FALSE_ALARMS)
            batches = [test[i : i + _ROWS] for i in range(0, min(len(test), 16 * _ROWS), _ROWS)]
            began = process_time()
            for batch in batches:
                detector.score(batch)
            seconds = process_time() - began
            flagged = {
                kind: 100 * float((detector.score(x).double() < threshold).double().mean())
                for kind, x in {"ID": test, **sets}.items()
            }
            state = {value.data_ptr(): value.nbytes for value in detector.state_dict().values()}
            runs.append(
                {
                    "seed": seed,
                    "detector": expression,
                    "flagged": flagged,
                    "bytes": sum(state.values()),
                    "microseconds": 1e6 * seconds / sum(map(len, batches)),
                }
            )
    return runs


def unit_mix(values: Tensor, seed: int) -> Tensor:
    """Return features each of whose units is that of another input, drawn independently."""
    generator = torch.Generator().manual_seed(seed)
    columns = [values[torch.randperm(len(values), generator=generator), i] for i in range(values.shape[1])]
    return torch.stack(columns, 1)


def rank_correlation(x: Tensor, y: Tensor) -> float:
    """Return Spearman's correlation."""
    return float(spearmanr(x, y).statistic)


def measure(network: Network, layer: str) -> dict[str, Any]:
    """Return measures of ID inputs, of a hidden layer or the pool, and the AUROC of norms there."""
    setting, store = network.setting, network.store

    def of(x: Features) -> Features:
        return x if layer == "hidden" else x.replace(activation=x.tensor("pooled"))

    def nan(x: Features) -> Tensor:
        return negative_aware_norm(of(x).tensor("activation"))

    part = store.get(setting.test)
    test = network.features(setting.test)
    # ID measures are of one half of the test inputs, AUROCs of the other.
    known, other = test[::2], test[1::2]
    h, a, logits = known.tensor("pooled"), of(known).tensor("activation"), known.tensor("logits")
    y, on, norms = logits.argmax(1), a > 0, nan(known)
    statistics = Statistics(network.fit)
    kl = parse_detector("KLUniform()").score(known)
    found: dict[str, float] = {
        "rank correlation of NAN and KLUniform": rank_correlation(norms, kl),
        "rank correlation of NAN and the length of h'": rank_correlation(norms, statistics.length(known)),
        "units on": float(on.double().mean()),
        "units never on": float((~on).all(0).double().mean()),
        "units always on": float(on.all(0).double().mean()),
        "variation of NAN": float(norms.std() / norms.mean().abs()),
        "entropy of activation": ActivationStatistics().update(a).mean_entropy,
        "variance between classes": between(h, y, statistics),
        "mixed units": 100 * auroc(norms, nan(behind(network.head, unit_mix(h, network.seed)))),
    }
    weight = known.linear()[0]
    if weight.shape[1] == a.shape[1] and (layer == "hidden" or setting.mode == "cosine"):
        hidden = HiddenClassifier(a, weight)
        found |= {
            "agreement of signs": float(hidden.agreement(y).mean()),
            "relative gap": float(1 - (hidden.confidence / hidden.norm.clamp(min=1e-12)).mean()),
            "hidden classifier predicts as the network": float((hidden.prediction == y).double().mean()),
        }
    if setting.mode != "clusters":
        classes = (
            store.get(setting.fit).labels.unique() if setting.mode != "own" else torch.arange(logits.shape[1])
        )
        correct = classes[y] == part.labels[::2]
        if not correct.all():
            found["correct against wrong"] = 100 * auroc(norms[correct], norms[~correct])
    copied = behind(network.head, store.get(setting.fit).values[store.copied(setting.fit)])
    kinds = {kind: behind(network.head, values) for kind, values in store.destroyed(setting.fit).items()}
    found["destroyed copies"] = 100 * float(np.mean([auroc(norms, nan(x)) for x in kinds.values()]))
    if "shuffled patches" in kinds:
        jigsaw = of(kinds["shuffled patches"]).tensor("activation")
        ratio = l1_norm(of(copied).tensor("activation")) / l1_norm(jigsaw).clamp(min=1e-12)
        found["NormRatio"] = float(ratio.mean())
    sets = network.sets()
    outcome = {
        "NAN": {name: 100 * auroc(nan(other), nan(x)) for name, x in sets.items()},
        "L1Norm": {
            name: 100 * auroc(l1_norm(of(other).tensor("activation")), l1_norm(of(x).tensor("activation")))
            for name, x in sets.items()
        },
    }
    return {"id": found, "auroc": outcome, "sets": _described({"ID": known, **sets}, of, statistics)}


def _described(
    sets: Mapping[str, Features], of: Callable[[Features], Features], statistics: Statistics
) -> dict[str, dict[str, float]]:
    """Return what the paper's theory speaks of, for ID and OOD inputs."""
    length = statistics.length(sets["ID"]).mean()
    rows = {}
    for name, x in sets.items():
        a, logits = of(x).tensor("activation"), x.tensor("logits")
        rows[name] = {
            "norm": float(l1_norm(a).mean()),
            "units on": float((a > 0).double().mean()),
            "units never on": float((a <= 0).all(0).double().mean()),
            "entropy of activation": ActivationStatistics().update(a).mean_entropy,
            "length of h'": float(statistics.length(x).mean() / length),
            "variance between classes": between(x.tensor("pooled"), logits.argmax(1), statistics),
        }
        if statistics.weight.shape[1] == a.shape[1]:
            hidden = HiddenClassifier(a, statistics.weight)
            rows[name] |= {
                "agreement of signs": float(hidden.agreement(logits.argmax(1)).mean()),
                "hidden confidence / norm": float((hidden.confidence / hidden.norm.clamp(min=1e-12)).mean()),
            }
    return rows


def between(h: Tensor, y: Tensor, statistics: Statistics) -> float:
    """Return the share of the squared length of h' that the mean of h' of the predicted class explains."""
    rows = (h - statistics.mean) / statistics.deviation
    count = torch.bincount(y)
    means = rows.new_zeros(len(count), rows.shape[1]).index_add(0, y, rows) / count.clamp(min=1)[:, None]
    # Without the share that a random partition into as many classes would explain.
    share = 1 - float((rows - means[y]).square().sum() / rows.square().sum())
    chance = int((count > 0).sum()) / len(rows)
    return (share - chance) / (1 - chance)


def measure_setting(setting: Setting, store: Networks) -> list[dict[str, Any]]:
    """Return the measures of a setting's layers, by seed."""
    seeds = range(1 if setting.mode == "own" else SEEDS)
    layers = ["hidden", "pool"]
    if not isinstance(store.head(setting, 0), ProjectionHead):
        layers = ["pool"]
    elif setting.mode == "clusters" or setting == _CIFAR:
        layers = ["hidden"]  # another setting has the same pool
    return [
        {"layer": layer, "seed": seed, **measure(Network(setting, store, seed), layer)}
        for layer in layers
        for seed in (seeds if layer == "hidden" else seeds[:1])
    ]


#: Settings in which the cause is looked for, one for each way in which NAN turned out.
CAUSES = ("CIFAR-10, packaged network", "Tiny ImageNet, labels", "MNIST, labels", "banking77, labels")


def interventions(setting: Setting, store: Networks) -> list[dict[str, Any]]:
    """Return the AUROC of NAN and the l1-norm after changes of the features, or of the head; means over seeds."""
    part = store.get(setting.fit)
    fit, targets = part.values[~part.held_out], part.labels[~part.held_out].unique(return_inverse=True)[1]
    mean, deviation = fit.mean(0), fit.std(0)
    deviation = deviation.clamp(min=1e-3 * float(deviation.mean()))

    def standard(values: Tensor) -> Tensor:
        return (values - mean) / deviation

    sets = {name: standard(store.get(stored).values) for name, stored in setting.ood.items()}
    test = standard(store.get(setting.test).values)
    lengths = test.norm(dim=1)
    classes = targets.unique()
    means = torch.stack([standard(fit[targets == c]).mean(0) for c in classes])
    basis = torch.linalg.qr(means.T).Q

    def scaled(rows: Tensor, to: Tensor) -> Tensor:
        return rows / rows.norm(dim=1, keepdim=True) * to[:, None]

    def lent(rows: Tensor, seed: int) -> Tensor:
        drawn = torch.randint(len(test), (len(rows),), generator=torch.Generator().manual_seed(seed))
        return scaled(rows, lengths[drawn])

    def untrained(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return ProjectionHead(fit.shape[1], len(classes), temperature=TEMPERATURE)

    def mlp(seed: int) -> nn.Module:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            layers = [nn.Linear(fit.shape[1], 512), nn.ReLU(), nn.Linear(512, len(classes))]
        recipe, quiet = text.RECIPES["frozen"], Runtime(progress=False)
        return train(nn.Sequential(*layers), standard(fit), targets, recipe, runtime=quiet, seed=seed)

    def again(seed: int) -> nn.Module:
        return store.head(setting._replace(mode="labels"), seed)

    raw = lambda rows: rows * deviation + mean  # noqa: E731
    plain = lambda rows, seed: rows  # noqa: E731
    Change = Callable[[Tensor, int], Tensor]
    changes: dict[str, tuple[Callable[[int], nn.Module], Callable[[Tensor], Tensor], Change, Change]] = {
        "none": (lambda seed: store.head(setting, seed), raw, plain, plain),
        "OOD features get the lengths of ID features": (lambda s: store.head(setting, s), raw, plain, lent),
        "features keep only the span of the class means": (
            lambda seed: store.head(setting, seed),
            raw,
            *2 * [lambda rows, seed: rows @ basis @ basis.T],
        ),
        "the same, of the lengths of the whole features": (
            lambda seed: store.head(setting, seed),
            raw,
            *2 * [lambda rows, seed: scaled(rows @ basis @ basis.T, rows.norm(dim=1))],
        ),
        "no head: the norm of h' itself": (lambda seed: nn.Identity(), lambda rows: rows, plain, plain),
        "head not trained": (untrained, lambda rows: rows, plain, plain),
        "projection head trained on the frozen features": (again, raw, plain, plain),
        "MLP head trained on the frozen features": (mlp, lambda rows: rows, plain, plain),
    }
    rows = []
    for name, (make, back, of_id, of_ood) in changes.items():
        found: list[list[float]] = []
        for seed in range(SEEDS):
            head = make(seed)

            def activation(values: Tensor, head: nn.Module = head, back: Any = back) -> Tensor:
                if isinstance(head, nn.Identity):
                    return values
                return features_behind(head, back(values)).tensor("activation")

            known = activation(of_id(test, seed))
            others = [activation(of_ood(x, seed)) for x in sets.values()]
            found.append(
                [100 * float(np.mean([auroc(norm(known), norm(x)) for x in others])) for norm in _NORMS.values()]
            )
        rows.append({"change": name, **dict(zip(_NORMS, np.mean(found, 0).tolist(), strict=True))})
    return rows


_NORMS: dict[str, Callable[[Tensor], Tensor]] = {
    "NAN": negative_aware_norm,
    "L1Norm": l1_norm,
    "1 / l0-norm": lambda a: l0_norm(a).clamp(min=1).reciprocal(),
}


#: Networks whose layers are compared, by the setting whose images they read, and number of images of each set.
LAYERS = ("CIFAR-10, packaged network", "ImageNet-1k", "Tiny ImageNet, labels")
LAYER_IMAGES = 100


def compare_layers(setting: Setting, store: Networks) -> list[dict[str, Any]]:
    """Return the AUROC of norms at the layer with the largest NormRatio, at the pool, and at the hidden layer."""
    loaded, body = store.network(setting.fit)
    model = nn.Sequential(body, store.head(setting, 0)).eval()

    def batches(name: str) -> Iterable[Tensor]:
        spec, classes, step = IMAGES[name]
        source = open_source(spec, root=store.root)
        rows = [i for i in range(len(source)) if classes is None or source.label(i) in classes][step]
        chosen = rows[:: max(1, len(rows) // LAYER_IMAGES)][:LAYER_IMAGES]
        source = SlicedSource(source, chosen, source.title)
        return [batch.inputs for batch in source_loader(source, loaded.transform, batch_size=25)]

    ranking = FeatureTap(model).rank_layers(batches(setting.fit), progress=False)
    known, sets = batches(setting.test), {name: batches(stored) for name, stored in setting.ood.items()}

    def aurocs(tap: FeatureTap, read: Callable[[Features], Tensor]) -> dict[str, float]:
        inside, *outside = (
            torch.cat([read(tap(batch)) for batch in inputs]) for inputs in (known, *sets.values())
        )
        return {
            name: 100 * float(np.mean([auroc(norm(inside), norm(x)) for x in outside]))
            for name, norm in _NORMS.items()
        }

    def activation(features: Features) -> Tensor:
        return features.tensor("activation")

    best = FeatureTap(model, ranking.best, pooling="norm")
    whole = FeatureTap(model)
    rows = [
        {"layer": f"largest NormRatio, `{ranking.best}`", **aurocs(best, activation)},
        {"layer": "average pool", **aurocs(whole, lambda features: features.tensor("pooled"))},
    ]
    if isinstance(model[-1], ProjectionHead):
        rows.append({"layer": "hidden layer of the head", **aurocs(whole, activation)})
    return rows


def kept(file: Path, make: Callable[[], Any]) -> Any:
    """Return the JSON in a file, made if there is none."""
    if not file.exists():
        print(file.stem, flush=True)
        write_text(file, json.dumps(make()))
    return json.loads(file.read_text("utf-8"))


def main() -> None:
    """Run every part that has no result yet, and write all results to one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--transformer", type=Path)
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("norms.json"))
    arguments = parser.parse_args()
    store = Networks(arguments.folder, arguments.data_root, arguments.texts, arguments.transformer)
    found: dict[str, Any] = {}
    for name in arguments.part:
        found[name] = PARTS[name](store)
    facts = environment() | {"command": "python tools/measure_norms.py FOLDER --data-root DATA --texts ENCODER"}
    # Five digits are enough for every table.
    short = json.loads(json.dumps(found), parse_float=lambda digits: float(f"{float(digits):.5g}"))
    write_text(arguments.out, json.dumps({**short, "environment": facts}, separators=(",", ":")) + "\n")


def _scored(split: str) -> Callable[[Networks], list[Any]]:
    def run(store: Networks) -> list[Any]:
        return [
            kept(store.folder / "norms" / f"scores-{name}.json", lambda: score_setting(name, setting, store))  # noqa: B023
            for name, setting in SPLIT[split].items()
            if setting.fit != "vit-fit" or store.transformer is not None
        ]

    return run


def _per_setting(
    what: str, make: Callable[[Setting, Networks], Any], names: Sequence[str] | None = None
) -> Callable[[Networks], dict[str, Any]]:
    def run(store: Networks) -> dict[str, Any]:
        return {
            name: kept(store.folder / "norms" / f"{what}-{name}.json", lambda: make(setting, store))  # noqa: B023
            for settings in SPLIT.values()
            for name, setting in settings.items()
            if (names is None or name in names) and (setting.fit != "vit-fit" or store.transformer is not None)
        }

    return run


PARTS: Mapping[str, Callable[[Networks], Any]] = {
    "scores A": _scored("A"),
    "scores B": _scored("B"),
    "measures": _per_setting("measures", measure_setting),
    "layers": _per_setting("layers", compare_layers, LAYERS),
    "causes": _per_setting("causes", interventions, CAUSES),
    "flagged": _per_setting("flagged", flag),
}

if __name__ == "__main__":
    main()
