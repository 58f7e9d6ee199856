"""Checkpoints of other authors, of ResNets with a projection head, read into one layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from featnorm._utils.extras import import_extra
from featnorm.features import Features
from featnorm.models import ModelError, cut_classifier
from featnorm.models.loading import read_weights

CLASSES = 1000
EMBEDDING = 128
# Names that a message lists; it counts the rest.
_MAX_NAMES = 3


@dataclass(frozen=True)
class Layout:
    """How authors name the tensors of a `ContrastiveNetwork`, after ``module.`` of a wrapper is removed.

    Parameters
    ----------
    renamed : prefix of names in the file -> prefix in the network; the first match counts.
    ignored : prefixes of tensors that are not used after training.
    """

    renamed: Mapping[str, str]
    ignored: tuple[str, ...] = ()


LAYOUTS = {
    # Of Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", and SupContrast before them.
    "supcon": Layout(
        {"encoder.": "backbone.", "head.0.": "hidden.", "head.2.": "embedding.", "fc.": "classifier."}
    ),
    # Of MoCo-v2: the query encoder is the network; the key encoder and the queue are for training.
    "moco": Layout(
        {"encoder_q.fc.0.": "hidden.", "encoder_q.fc.2.": "embedding.", "encoder_q.": "backbone."},
        ignored=("encoder_k.", "queue"),
    ),
}


class ContrastiveNetwork(nn.Module):
    """A ResNet with the projection head of MoCo-v2 and SupCon, and optionally a linear classifier beside it.

    The head is a hidden layer as wide as the pooled feature, a ReLU and an embedding of 128. The classifier,
    trained on the frozen backbone (paper 6.1), reads the pooled feature as the head does.

    Parameters
    ----------
    architecture : torchvision's name of the ResNet.
    classifies : whether it has a classifier.
    """

    def __init__(self, architecture: str = "resnet50", *, classifies: bool = True) -> None:
        super().__init__()
        whole = import_extra("torchvision.models").get_model(architecture, weights=None)
        self.backbone, width = cut_classifier(whole)
        self.hidden = nn.Linear(width, width)
        self.embedding = nn.Linear(width, EMBEDDING)
        self.classifier = nn.Linear(width, CLASSES) if classifies else None

    @torch.no_grad()
    def features(self, pooled: Tensor) -> Features:
        """Return all features of inputs, from their pooled features (n, D)."""
        activation = self.hidden(pooled).relu()
        features = Features(activation=activation, pooled=pooled, embedding=self.embedding(activation))
        if self.classifier is None:
            why = "the network was trained without labels, or its file has no classifier"
            return features.replace(absent={"logits": why, "classifier": why})
        linear = self.classifier
        return features.replace(logits=linear(pooled), classifier=(linear.weight.detach(), linear.bias.detach()))


def load_contrastive(
    path: str | Path, layout: str, *, classifier: str | Path | None = None, architecture: str = "resnet50"
) -> ContrastiveNetwork:
    """Read a checkpoint of the authors of SupCon, of KNN, or of MoCo-v2, without running code in it.

    Parameters
    ----------
    path : file of the checkpoint.
    layout : "supcon" or "moco", see `LAYOUTS`.
    classifier
        File with ``fc.weight`` and ``fc.bias``, as SupContrast's ``main_linear.py`` saves them, for a checkpoint
        that has no classifier. Default: such a network has no logits.
    architecture : torchvision's name of the ResNet.

    Returns
    -------
    The network, in eval mode, on the CPU.

    Raises
    ------
    ModelError
        The file cannot be read, would run code, or does not fit; every mismatch is named as in the file.
    """
    path = Path(path)
    rules = LAYOUTS[layout]
    state = _plain(path)
    if classifier is not None and not any(name.startswith("fc.") for name in state):
        state |= _plain(Path(classifier))
    named = {name: _renamed(name, rules) for name in state if not name.startswith(rules.ignored)}
    unknown = [name for name, ours in named.items() if ours is None]
    found = {ours: name for name, ours in named.items() if ours is not None}
    network = ContrastiveNetwork(architecture, classifies=any(ours.startswith("classifier.") for ours in found))
    wanted = {n: v for n, v in network.state_dict().items() if not n.endswith("num_batches_tracked")}
    unknown += [name for ours, name in found.items() if ours not in wanted]
    theirs = {ours: begins for begins, ours in reversed(list(rules.renamed.items()))}
    lacking = [_original(ours, theirs) for ours in wanted if ours not in found]
    shapes = [
        f"{found[ours]} is {tuple(state[found[ours]].shape)} where {tuple(value.shape)} is expected"
        for ours, value in wanted.items()
        if ours in found and state[found[ours]].shape != value.shape
    ]
    wrong = [f"it lacks {_some(lacking)}"] if lacking else []
    wrong += [f"it has {_some(unknown)}, which are unknown"] if unknown else []
    wrong += [_some(shapes)] if shapes else []
    if wrong:
        raise ModelError(
            f"{path} is not a {architecture} with a projection head in the layout of {layout}: {'; '.join(wrong)}"
        )
    # Not strict, since the counters of batch normalization are left out.
    network.load_state_dict({ours: state[name] for ours, name in found.items()}, strict=False)
    return network.eval()


def _plain(path: Path) -> dict[str, Tensor]:
    """Read a state dict, and remove ``module``, which wrappers for several devices add, from its names."""
    state = read_weights(path)
    return {".".join(part for part in name.split(".") if part != "module"): v for name, v in state.items()}


def _renamed(name: str, layout: Layout) -> str | None:
    for begins, ours in layout.renamed.items():
        if name.startswith(begins):
            return ours + name.removeprefix(begins)
    return None


def _original(ours: str, theirs: Mapping[str, str]) -> str:
    part, dot, rest = ours.partition(".")
    return theirs.get(part + dot, part + dot) + rest


def _some(names: list[str]) -> str:
    more = len(names) - _MAX_NAMES
    return ", ".join(names[:_MAX_NAMES]) + (f" and {more} more" if more > 0 else "")
