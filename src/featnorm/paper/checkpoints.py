"""The checkpoints of other authors, whose networks are a ResNet with a projection head, read into one layout."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from featnorm._utils.extras import vision_module
from featnorm.features import Features
from featnorm.models import ModelError, cut_classifier
from featnorm.models.loading import read_weights

CLASSES = 1000
EMBEDDING = 128
# Names that a message lists before it says how many more there are.
_NAMED = 3


@dataclass(frozen=True)
class Layout:
    """How authors name the tensors of a `ContrastiveNetwork`, once ``module.`` of a wrapper is taken out.

    Parameters
    ----------
    renamed : how names begin in the file, and in the network instead; the first that fits holds.
    ignored : how the names begin of what plays no part after training.
    """

    renamed: Mapping[str, str]
    ignored: tuple[str, ...] = ()


LAYOUTS = {
    # Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", and SupContrast, whose layout it is.
    "supcon": Layout(
        {"encoder.": "backbone.", "head.0.": "hidden.", "head.2.": "embedding.", "fc.": "classifier."}
    ),
    # MoCo-v2: the encoder of the queries is the network; that of the keys and their queue served its training.
    "moco": Layout(
        {"encoder_q.fc.0.": "hidden.", "encoder_q.fc.2.": "embedding.", "encoder_q.": "backbone."},
        ignored=("encoder_k.", "queue"),
    ),
}


class ContrastiveNetwork(nn.Module):
    """A ResNet with the projection head of MoCo-v2 and SupCon, and perhaps a linear classifier beside it.

    The head is a hidden layer as wide as the pooled feature, a ReLU and an embedding of 128. The classifier,
    learned on the frozen backbone (paper 6.1), reads the pooled feature as the head does.

    Parameters
    ----------
    architecture : torchvision's name of the ResNet.
    classifies : whether there is a classifier.
    """

    def __init__(self, architecture: str = "resnet50", *, classifies: bool = True) -> None:
        super().__init__()
        whole = vision_module("torchvision.models").get_model(architecture, weights=None)
        self.backbone, width = cut_classifier(whole)
        self.hidden = nn.Linear(width, width)
        self.embedding = nn.Linear(width, EMBEDDING)
        self.classifier = nn.Linear(width, CLASSES) if classifies else None

    @torch.no_grad()
    def features(self, pooled: Tensor) -> Features:
        """Return what the network says of inputs whose pooled features (n, D) are known."""
        activation = self.hidden(pooled).relu()
        said = Features(activation=activation, pooled=pooled, embedding=self.embedding(activation))
        if self.classifier is None:
            why = "the network was trained without labels, or its file has no classifier"
            return said.replace(absent={"logits": why, "classifier": why})
        linear = self.classifier
        return said.replace(logits=linear(pooled), classifier=(linear.weight.detach(), linear.bias.detach()))


def load_contrastive(
    path: str | Path, layout: str, *, classifier: str | Path | None = None, architecture: str = "resnet50"
) -> ContrastiveNetwork:
    """Read a checkpoint of the authors of SupCon, of KNN, or of MoCo-v2. No code in it is run.

    Parameters
    ----------
    path : the file.
    layout : "supcon" or "moco", see `LAYOUTS`.
    classifier
        A file with ``fc.weight`` and ``fc.bias`` alone, as SupContrast's ``main_linear.py`` saves them, where the
        checkpoint has no classifier; without it such a network has no logits.
    architecture : torchvision's name of the ResNet.

    Returns
    -------
    The network, in eval mode, on the CPU.

    Raises
    ------
    ModelError
        The file cannot be read, would run code, or does not fit; all that does not fit is named as the file does.
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
    wrong += [f"it has {_some(unknown)}, of which nothing is known"] if unknown else []
    wrong += [_some(shapes)] if shapes else []
    if wrong:
        raise ModelError(
            f"{path} is no {architecture} with a projection head in the layout of {layout}: {'; '.join(wrong)}"
        )
    # Not strict, as the counters of batch normalisation are left out.
    network.load_state_dict({ours: state[name] for ours, name in found.items()}, strict=False)
    return network.eval()


def _plain(path: Path) -> dict[str, Tensor]:
    """Read a state dict, without what wrappers for several devices put into its names, wherever they stand."""
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
    more = len(names) - _NAMED
    return ", ".join(names[:_NAMED]) + (f" and {more} more" if more > 0 else "")
