"""The quantities that the paper's figures follow over training, recorded at every epoch."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.hidden.classifier import HiddenClassifier
from featnorm.hidden.statistics import ActivationStatistics
from featnorm.metrics import auroc
from featnorm.norms import l0_norm, l1_norm, negative_aware_norm
from featnorm.paper.images import spaced
from featnorm.tap import FeatureTap, LayerTap
from featnorm.training.runs import log, read_log

Split = tuple[Tensor, Tensor | None]

LAST = "last"
"""Name of the last hidden layer, as `FeatureTap` finds it, among the layers of a probe."""

_BATCH = 250


class Probe:
    """A callback of `featnorm.training.train` that records norms, detection, entropy and hidden classifiers.

    Parameters
    ----------
    splits
        In-distribution inputs and their targets by name, such as "train" and "test"; uint8 images or features. If
        targets are None, hidden classifiers are not recorded for the split.
    ood : out-of-distribution inputs by name.
    layers : modules to record besides the last hidden layer; all numbers of a map count.
    hidden
        Layers whose hidden classifiers are recorded too. The coefficients of the last hidden layer are the weights
        of the classifier; those of another layer take a backward pass for each class.
    pre_activation
        Module whose output passes through a ReLU to become the last hidden layer; its hidden classifier is
        recorded too (Prop. 6). Default: none.
    max_inputs : number of inputs of each set that are used, evenly spaced over it.
    file : file of the records, one line per epoch; an existing file is continued. Default: none.

    Attributes
    ----------
    records : one per epoch: ``epoch``, ``loss``, and under ``layers``, by layer, what `measure` returns.
    """

    def __init__(
        self,
        splits: Mapping[str, Split],
        ood: Mapping[str, Tensor],
        *,
        layers: Sequence[str] = (),
        hidden: Sequence[str] = (LAST,),
        pre_activation: str | None = None,
        max_inputs: int = 500,
        file: str | Path | None = None,
    ) -> None:
        if shared := set(splits) & set(ood):
            raise ValueError(f"a split and an OOD set are both named {sorted(shared)[0]}: rename one")
        if LAST in layers:
            raise ValueError(f"{LAST!r} is the last hidden layer, which is always recorded: remove it from layers")
        if unknown := [layer for layer in hidden if layer not in (LAST, *layers)]:
            raise ValueError(f"hidden names {unknown[0]!r}, which is not among layers: add it there")
        self.splits: dict[str, Split] = {
            name: (spaced(inputs, max_inputs), None if targets is None else spaced(targets, max_inputs))
            for name, (inputs, targets) in splits.items()
        }
        self.ood = {name: spaced(inputs, max_inputs) for name, inputs in ood.items()}
        self.layers = tuple(layers)
        self.hidden = tuple(hidden)
        self.pre_activation = pre_activation
        self.file = None if file is None else Path(file)
        self.records: list[dict[str, Any]] = []
        if self.file is not None and self.file.exists():
            self.records = read_log(self.file)

    def __call__(self, entry: Mapping[str, Any], model: nn.Module) -> None:
        """Record an epoch, given its log entry and the model."""
        # A run killed between the probe and its checkpoint repeats the epoch.
        self.records = [record for record in self.records if record["epoch"] < entry["epoch"]]
        self.records.append({"epoch": entry["epoch"], "loss": entry["loss"], "layers": self.measure(model)})
        if self.file is not None:
            log(self.file, self.records[-1])

    def measure(self, model: nn.Module) -> dict[str, dict[str, Any]]:
        """Return the quantities of every layer for the model as it is.

        Returns
        -------
        By layer: ``norm``, ``nan`` and ``sparsity``, means by set; ``entropy`` of activation by split; ``auroc``
        by split, of "norm" and "nan", averaged over the OOD sets; and ``hidden`` by split, the hidden classifier's
        ``accuracy``, ``entropy``, ``sign_difference`` (share of units whose sign differs from that of the target's
        binary weight), ``error`` and ``other_error`` (for the target and the other classes, see
        `HiddenClassifier.approximation_error`), and with ``pre_activation`` set ``pre_error`` and
        ``pre_other_error``.
        """
        sets = {name: split[0] for name, split in self.splits.items()} | self.ood
        shown = _pixels(next(iter(sets.values()))[:2])
        before = () if self.pre_activation is None else (self.pre_activation,)
        # One pass over each set serves all of its quantities.
        layers = LayerTap(model, shown, (*self.layers, *before), last=LAST)
        inner = [layer for layer in self.hidden if layer != LAST]
        others = LayerTap(model, shown, inner) if inner else None
        # After the last hidden layer the coefficients are the same for all inputs, up to a positive factor.
        weight = FeatureTap(model)(shown).linear()[0] if LAST in self.hidden else None
        if weight is not None and len(weight) == 2 and torch.equal(weight[0], -weight[1]):
            # The single class of the label scheme "O", which `Features` reads as two.
            weight = weight[1:]
        counts: dict[tuple[str, str], ActivationStatistics] = {}
        scores: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
        hidden: dict[tuple[str, str], dict[str, list[Tensor]]] = {}
        for name, images in sets.items():
            targets = self.splits[name][1] if name in self.splits else None
            for i, batch in enumerate(images.split(_BATCH)):
                pixels = _pixels(batch)
                activations = layers(pixels)
                for layer in (LAST, *self.layers):
                    a = activations[layer]
                    counts.setdefault((layer, name), ActivationStatistics()).update(a.cpu())
                    part = scores.setdefault((layer, name), {"norm": [], "nan": [], "sparsity": []})
                    part["norm"].append(l1_norm(a).cpu())
                    part["nan"].append(negative_aware_norm(a).cpu())
                    part["sparsity"].append(l0_norm(a).clamp_min(1).reciprocal().cpu())
                if targets is None:
                    continue
                found = others.hidden(pixels) if others else {}
                if weight is not None:
                    found[LAST] = HiddenClassifier(activations[LAST], weight)
                for layer, classifier in found.items():
                    z = activations[self.pre_activation] if self.pre_activation and layer == LAST else None
                    wanted = targets[i * _BATCH : (i + 1) * _BATCH]
                    for key, value in self._of_hidden(classifier, wanted, z).items():
                        hidden.setdefault((layer, name), {}).setdefault(key, []).append(value.cpu())
        joined = {key: {what: torch.cat(values) for what, values in part.items()} for key, part in scores.items()}
        result: dict[str, dict[str, Any]] = {}
        for layer in (LAST, *self.layers):
            mine = {name: joined[layer, name] for name in sets}
            result[layer] = {
                what: {name: float(values[what].mean()) for name, values in mine.items()}
                for what in ("norm", "nan", "sparsity")
            }
            result[layer]["entropy"] = {name: counts[layer, name].mean_entropy for name in self.splits}
            result[layer]["auroc"] = {
                split: {
                    what: sum(auroc(mine[split][what], mine[name][what]) for name in self.ood) / len(self.ood)
                    for what in ("norm", "nan")
                }
                for split in (self.splits if self.ood else ())
            }
        for (layer, split), parts in hidden.items():
            # An input with all units off has no relative error, and a single class no others.
            result[layer].setdefault("hidden", {})[split] = {
                key: float(torch.cat(values).nanmean().nan_to_num(0.0)) for key, values in parts.items()
            }
        return result

    def _of_hidden(self, hidden: HiddenClassifier, targets: Tensor, z: Tensor | None) -> dict[str, Tensor]:
        """Return the quantities of a batch's hidden classifier; ``z`` is its layer before the ReLU, or None."""
        classes = targets.to(hidden.activation.device)
        error, other_error = hidden.approximation_error(classes)
        values = {
            "accuracy": (hidden.prediction == classes).float(),
            "entropy": hidden.entropy,
            "sign_difference": 1 - hidden.agreement(classes),
            "error": error,
            "other_error": other_error,
        }
        if z is not None:
            # Units that are off have coefficient 0, so binary weight -1: they add their size to the norm and the
            # logit.
            if z.shape != hidden.activation.shape or not torch.equal(z.relu(), hidden.activation):
                raise ValueError(f"the last hidden layer is not the ReLU of the output of {self.pre_activation!r}")
            size = torch.linalg.vector_norm(z, 1, dim=1)
            values["pre_error"] = error * hidden.norm / size
            values["pre_other_error"] = other_error * hidden.norm / size
        return values


def _pixels(batch: Tensor) -> Tensor:
    return batch.float().div(255) if batch.dtype == torch.uint8 else batch
