"""Measure whether a detector that is chosen from ID data alone beats a fixed sum, on OOD data it has never seen.

    python tools/measure_selection.py FOLDER --data-root DATA [--texts ENCODER] [--settings NAME ...] [--out FILE]

The rule is `select` of selection_rule.py. Features and the result of each setting and seed are kept in FOLDER:
rerun the same command to resume. ENCODER is a local folder of a sentence encoder for transformers, such as
all-MiniLM-L6-v2; without it, texts are left out.
"""

import argparse
import hashlib
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter
from selection_rule import DestroyedCopies, select
from torch import Tensor, nn

from featnorm._utils.files import replacing
from featnorm._utils.layout import fast_layout
from featnorm.calibration import Calibration
from featnorm.cli.console import environment
from featnorm.detectors import parse_detector
from featnorm.features import Features
from featnorm.fitting import backbone_features, cluster, features_behind, fit_head
from featnorm.inputs import ImageSource, SlicedSource, open_source
from featnorm.metrics import auroc
from featnorm.models import LoadedModel, create_model, cut_classifier
from featnorm.paper.scoring import cached_labels
from featnorm.runtime import Runtime
from featnorm.splitting import held_out

COPIES = 60
IMAGE_KINDS = ("blur", "noise", "darkness", "solid color", "shuffled patches")
TEXT_KINDS = ("shuffled words", "random words", "shuffled letters")
#: From the cheapest to the most costly.
CANDIDATES = (
    "KLUniform()",
    "Energy()",
    "GEN()",
    "NAN()",
    "NCI()",
    "FDBD()",
    "ORA()",
    "RAS(Energy())",
    "SCALE(Energy())",
    "ASH(Energy())",
    "KLMatching()",
    "SHE()",
    "NECO()",
    "Mahalanobis(normalize=True)",
    "SSD()",
    "SSD() / NAN()",
    "KLUniform() + Mahalanobis(normalize=True)",
    "KLUniform() + SSD() / NAN()",
    "KNN(k=10)",
    "NNGuide()",
    "KLUniform() + KNN(k=10)",
)
SEEDS = 3
NETWORK, BACKBONE = "featnorm:cifar10-resnet18", "featnorm:efficientnet-lite0"
# Classes of ImageNet-1k that are buildings or landscapes.
SCENES = (
    442, 449, 460, 483, 497, 500, 525, 536, 538, 562, 580, 624, 649, 663, 668, 682, 698, 706, 718, 727, 743, 762,
    825, 832, 839, 853, 873, 884, 888, 900, 912, 915, 970, 972, 973, 974, 975, 976, 977, 978, 979, 980,
)  # fmt: skip


class Setting(NamedTuple):
    """An ID set and its OOD sets; the values are the names of stored features, see `STORED`.

    ``mode`` is "own" for the network's own classifier, or what the head is trained on: "labels" or "clusters".
    """

    fit: str
    test: str
    ood: dict[str, str]
    mode: str


_TINY = {"other classes": "tiny-near", "textures": "textures", "digits": "mnist", "scenes": "scenes"}
SETTINGS = {
    "Tiny ImageNet, labels": Setting("tiny-fit", "tiny-test", _TINY, "labels"),
    "Tiny ImageNet, clusters": Setting("tiny-fit", "tiny-test", _TINY, "clusters"),
    "CIFAR-10's network": Setting(
        "cifar-fit",
        "cifar-test",
        {"Tiny ImageNet": "cifar-tiny", "textures": "cifar-textures", "digits": "cifar-digits"},
        "own",
    ),
    "ImageNet-1k, own classifier": Setting(
        "imagenet-fit",
        "imagenet-test",
        {"textures": "textures", "digits": "mnist", "CIFAR-10": "objects"},
        "own",
    ),
    "MNIST, labels": Setting(
        "mnist-fit",
        "mnist-test",
        {"other digits": "mnist-near", "textures": "textures", "CIFAR-10": "objects"},
        "labels",
    ),
    "scikit-learn's digits, labels": Setting(
        "digits-fit",
        "digits-test",
        {"other digits": "digits-near", "textures": "textures", "CIFAR-10": "objects"},
        "labels",
    ),
    "banking77, labels": Setting(
        "text-fit", "text-test", {"other intents": "text-near", "news": "text-news"}, "labels"
    ),
}


class Destroyed:
    """A transform of a copy whose content is destroyed, the same for the same image."""

    def __init__(self, transform: Callable[[Image.Image], Tensor], kind: str) -> None:
        self.transform, self.kind = transform, kind

    def __call__(self, image: Image.Image) -> Tensor:
        """Return the transformed copy."""
        image = image.convert("RGB")
        pixels = np.asarray(image)
        rng = np.random.default_rng(int.from_bytes(hashlib.sha256(pixels.tobytes()).digest()[:8], "big"))
        if self.kind == "blur":
            image = image.filter(ImageFilter.GaussianBlur(min(image.size) / 8))
        elif self.kind == "noise":
            image = Image.fromarray(rng.integers(0, 256, pixels.shape, dtype=np.uint8))
        elif self.kind == "darkness":
            image = Image.fromarray((pixels * 0.05).astype(np.uint8))
        elif self.kind == "solid color":
            image = Image.new("RGB", image.size, tuple(int(v) for v in pixels.reshape(-1, 3).mean(0)))
        else:
            width, height = (side // 4 for side in image.size)
            corners = [(x * width, y * height) for x in range(4) for y in range(4)]
            shuffled = image.copy()
            for corner, i in zip(corners, rng.permutation(16), strict=True):
                left, top = corners[i]
                shuffled.paste(image.crop((left, top, left + width, top + height)), corner)
            image = shuffled
        return self.transform(image)


class Part(NamedTuple):
    """Stored features: values (n, D), labels (n,), and which rows `featnorm.fit` would hold out."""

    values: Tensor
    labels: Tensor
    held_out: Tensor

    def of(self, rows: Tensor) -> "Part":
        """Return some rows."""
        return Part(self.values[rows], self.labels[rows], self.held_out[rows])


class Store:
    """Features of the sets, computed once and kept in a folder."""

    def __init__(self, folder: Path, root: Path, texts: Path | None) -> None:
        self.folder, self.root, self.texts = folder, root, texts

    def get(self, name: str) -> Part:
        """Return the features of a set: one of `IMAGES` or of the texts, or "NAME.KIND" of destroyed copies."""
        file = self.folder / f"{name}.npz"
        if not file.exists():
            print(f"computing the features of {name}", flush=True)
            part = self._texts(name) if name.startswith("text-") else self._images(*name.partition(".")[::2])
            with replacing(file) as temporary, open(temporary, "wb") as stream:
                np.savez(stream, **{field: value.numpy() for field, value in part._asdict().items()})
        arrays = np.load(file)
        return Part(*(torch.from_numpy(arrays[field]) for field in Part._fields))

    def copied(self, name: str) -> Tensor:
        """Return the rows of a set that are copied to destroy their content."""
        fitted = (~self.get(name).held_out).nonzero()[:, 0].numpy()
        return torch.from_numpy(np.sort(np.random.default_rng(0).permutation(fitted)[:COPIES]))

    def destroyed(self, name: str) -> dict[str, Tensor]:
        """Return the features of the destroyed copies, by kind."""
        kinds = TEXT_KINDS if name.startswith("text-") else IMAGE_KINDS
        return {kind: self.get(f"{name}.{kind}").values for kind in kinds}

    def _images(self, name: str, kind: str) -> Part:
        spec, classes, step = IMAGES[name]
        source = self._digits() if spec == "digits" else open_source(spec, root=self.root)
        rows = [i for i in range(len(source)) if classes is None or source.label(i) in classes][step]
        source = SlicedSource(source, rows, source.title)
        loaded, model = self.network(name)
        if kind:
            source = SlicedSource(source, self.copied(name).tolist(), source.title)
            loaded = replace(loaded, transform=Destroyed(loaded.transform, kind))
        runtime = Runtime(batch_size=32, progress=False)
        cached = backbone_features(
            source, loaded, fast_layout(model.eval()), cache=self.folder / "cache", runtime=runtime
        )
        return Part(cached.values.clone(), cached_labels(source, cached), held_out(cached.digests))

    def network(self, name: str) -> tuple[LoadedModel, nn.Module]:
        """Return the network whose features a set of images has, and the part that computes them."""
        loaded = create_model(NETWORK if name.startswith("cifar") else BACKBONE)
        body = loaded.model[:-1] if name.startswith("cifar") else cut_classifier(loaded.model)[0]  # type: ignore
        return loaded, body

    def _digits(self) -> ImageSource:
        from sklearn.datasets import load_digits

        digits = load_digits()
        for i, (image, label) in enumerate(zip(digits.images, digits.target, strict=True)):
            file = self.folder / "digits" / str(label) / f"{i:04}.png"
            if not file.exists():
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray((image * 15.9).astype(np.uint8)).save(file)
        return open_source(str(self.folder / "digits"))

    def _texts(self, name: str) -> Part:
        import pyarrow.parquet as pq
        from transformers import AutoModel, AutoTokenizer

        file, classes, step = TEXTS[name.partition(".")[0]]
        table = pq.read_table(self.root / "text" / file).to_pydict()
        rows = [i for i, label in enumerate(table["label"]) if classes is None or label in classes][step]
        texts, labels = [table["text"][i] for i in rows], [table["label"][i] for i in rows]
        if kind := name.partition(".")[2]:
            fit = self.get("text-fit")
            words = sorted({word for i in (~fit.held_out).nonzero()[:, 0].tolist() for word in texts[i].split()})
            copied = self.copied("text-fit").tolist()
            rng = np.random.default_rng(0)
            texts, labels = [texts[i] for i in copied], [labels[i] for i in copied]
            if kind == "shuffled words":
                texts = [" ".join(rng.permutation(text.split())) for text in texts]
            elif kind == "random words":
                texts = [" ".join(rng.choice(words, len(text.split()))) for text in texts]
            else:
                texts = ["".join(rng.permutation(list(text))) for text in texts]
        tokenizer, encoder = (kind.from_pretrained(self.texts) for kind in (AutoTokenizer, AutoModel))
        values = []
        with torch.no_grad():
            for start in range(0, len(texts), 64):
                batch = tokenizer(
                    texts[start : start + 64], padding=True, truncation=True, max_length=64, return_tensors="pt"
                )
                hidden, mask = encoder(**batch).last_hidden_state, batch["attention_mask"][..., None]
                values.append((hidden * mask).sum(1) / mask.sum(1))
        apart = held_out([hashlib.sha256(text.encode()).digest() for text in texts])
        return Part(torch.cat(values), torch.tensor(labels), apart)


_ALL = slice(None)
#: Name -> specification of the images, classes (None: all), and slice of the images of these classes.
IMAGES: dict[str, tuple[str, Sequence[int] | None, slice]] = {
    "tiny-fit": ("tiny_imagenet:train", range(100), _ALL),
    "tiny-test": ("tiny_imagenet:val", range(100), slice(0, None, 3)),
    "tiny-near": ("tiny_imagenet:val", range(100, 200), slice(0, None, 3)),
    "textures": ("ood224/textures", None, _ALL),
    "scenes": ("imagenet1k_sample:test", SCENES, _ALL),
    "objects": ("cifar10:test[::10]", None, _ALL),
    "mnist": ("mnist:test[::10]", None, _ALL),
    "mnist-fit": ("mnist:train", range(8), slice(0, None, 14)),
    "mnist-test": ("mnist:test[::10]", range(8), _ALL),
    "mnist-near": ("mnist:test[::10]", range(8, 10), _ALL),
    "digits-fit": ("digits", range(7), slice(1, None, 2)),
    "digits-test": ("digits", range(7), slice(0, None, 2)),
    "digits-near": ("digits", range(7, 10), _ALL),
    "imagenet-fit": ("imagenet1k_sample:test", range(0, 1000, 2), _ALL),
    "imagenet-test": ("imagenet1k_sample:test", range(1, 1000, 2), _ALL),
    "cifar-fit": ("cifar10:train", None, slice(0, None, 9)),
    "cifar-test": ("cifar10:test", None, slice(0, None, 4)),
    "cifar-textures": ("ood32/textures", None, _ALL),
    "cifar-tiny": ("ood32/tiny_imagenet", None, slice(0, None, 6)),
    "cifar-digits": ("ood32/mnist", None, slice(0, None, 6)),
}
#: Name -> file of the texts, classes and slice.
TEXTS: dict[str, tuple[str, Sequence[int] | None, slice]] = {
    "text-fit": ("banking77_train.parquet", range(60), slice(0, None, 2)),
    "text-test": ("banking77_test.parquet", range(60), slice(0, None, 2)),
    "text-near": ("banking77_test.parquet", range(60, 77), _ALL),
    "text-news": ("ag_news_test.parquet", None, slice(0, None, 15)),
}


def run(name: str, seed: int, store: Store) -> dict[str, Any]:
    """Choose a detector by the rule, then score the OOD sets with every candidate."""
    setting = SETTINGS[name]
    part, copied = store.get(setting.fit), store.copied(setting.fit)
    fitted = part.of(~part.held_out)
    copied = ((~part.held_out).cumsum(0) - 1)[copied]
    labels = None if setting.mode == "clusters" else fitted.labels.unique(return_inverse=True)[1]

    def trained(features: Features) -> Callable[[Features], Features]:
        values, given = features.tensor("pooled"), features.labels
        targets = cluster(values, seed) if given is None else given.unique(return_inverse=True)[1]
        head = fit_head(values, targets, seed=seed, progress=False)
        return lambda other: features_behind(head, other.tensor("pooled")).replace(labels=other.labels)

    began = time.perf_counter()
    if setting.mode == "own":
        head: nn.Module = (
            create_model(NETWORK).model[-1]  # type: ignore[index]
            if setting.fit == "cifar-fit"
            else create_model(BACKBONE).model.get_classifier()  # type: ignore[operator]
        )

        def of(features: Features) -> Features:
            return features_behind(head, features.tensor("pooled")).replace(labels=features.labels)

    else:
        of = trained(Features(pooled=fitted.values, labels=labels))
    fit_seconds = time.perf_counter() - began
    began = time.perf_counter()
    own = setting.mode == "own"
    features = Features(pooled=fitted.values, labels=labels)
    copies = {kind: Features(pooled=values) for kind, values in store.destroyed(setting.fit).items()}
    if own:
        features, copies = of(features), {kind: of(values) for kind, values in copies.items()}
    selection = select(
        features,
        CANDIDATES,
        destroyed=DestroyedCopies(copied, copies),
        retrain=None if own else trained,
        seed=seed,
    )
    select_seconds = time.perf_counter() - began
    # Of the held-out rows, one in four sets the constants of sums.
    rows = part.held_out.nonzero()[:, 0]
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))]
    apart, calibration = part.of(rows[: len(rows) // 4]), part.of(rows[len(rows) // 4 :])
    constants = of(Features(pooled=apart.values, labels=None if labels is None else apart.labels))
    sets = {kind: of(Features(pooled=store.get(stored).values)) for kind, stored in setting.ood.items()}
    inside = of(Features(pooled=store.get(setting.test).values))
    behind = of(Features(pooled=fitted.values, labels=labels))
    ood: dict[str, dict[str, list[float]]] = {}
    for candidate in selection.candidates:
        detector = parse_detector(candidate.detector).fit(behind, constants)
        threshold = Calibration(detector.score(of(Features(pooled=calibration.values))), 0.95)
        scores = detector.score(inside)
        for kind, outside in sets.items():
            given = detector.score(outside)
            flagged = float((~threshold.is_id(given)).double().mean())
            ood.setdefault(candidate.detector, {})[kind] = [100 * auroc(scores, given), 100 * flagged]
    return {
        "chosen": selection.detector,
        "candidates": [candidate.__dict__ for candidate in selection.candidates],
        "excluded": selection.excluded,
        "ood": ood,
        "seconds": [fit_seconds, select_seconds],
        "sizes": {"fit": len(fitted.values), "test": len(inside), **{k: len(v) for k, v in sets.items()}},
    }


def main() -> None:
    """Run every setting with every seed that has no result yet, and write all results to one file."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data-root", type=Path, required=True)
    parser.add_argument("--texts", type=Path)
    parser.add_argument("--settings", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--out", type=Path, default=Path("selection.json"))
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    store = Store(arguments.folder, arguments.data_root, arguments.texts)
    found: dict[str, list[dict[str, Any]]] = {}
    for name in arguments.settings:
        if SETTINGS[name].fit.startswith("text-") and arguments.texts is None:
            continue
        for seed in range(SEEDS):
            file = arguments.folder / f"{name}-{seed}.json"
            if not file.exists():
                print(f"{name}, seed {seed}", flush=True)
                with replacing(file) as temporary:
                    Path(temporary).write_text(json.dumps(run(name, seed, store)), "utf-8")
            found.setdefault(name, []).append(json.loads(file.read_text("utf-8")))
    command = "python tools/measure_selection.py FOLDER --data-root DATA --texts ENCODER"
    facts = environment() | {"command": command}
    arguments.out.write_text(json.dumps({"settings": found, "environment": facts}, indent=1), "utf-8")


if __name__ == "__main__":
    main()
