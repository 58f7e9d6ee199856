"""Loading of what was saved under another default dtype of torch, and into memory that is shared."""

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm._utils.weights import load_weights, single_precision
from featnorm.augmentation import Distortion, augment
from references import OWN

CLASSES = 4
SINGLE, DOUBLE = torch.float32, torch.float64
# One of each kind of detector that takes another detector; the others are made with default settings.
SETTINGS = {
    "ReAct": ["ReAct(NAN())", "ReAct(KNN(k=3) / NAN())"],
    "Views": ["Views(KNN(k=3))"],
    "KNN": ["KNN(k=3)", "KNN(k=3) / NAN()", "KNN(k=3) / ReAct(NAN())"],
    "SSD": ["SSD()", "SSD(clusters=2)", "SSD() / L1Norm()"],
    "CSI": ["CSI(augmentations=1)"],
}
# A jackknife is fitted to all inputs at once, which a scorer does not do.
EVERY = [
    expression
    for name, kind in OWN.items()
    if name != "Jackknife"
    for expression in SETTINGS.get(name, kind.standard or [f"{name}()"])
]


class Net(nn.Module):
    """Convolutions and heads of every kind, for images between 0 and 1; float32 whatever the default dtype is."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 12, 3, dtype=SINGLE)
        self.hidden = nn.Linear(12, 16, dtype=SINGLE)
        self.embedding = nn.Linear(16, 8, dtype=SINGLE)
        self.classifier = nn.Linear(8, CLASSES, dtype=SINGLE)
        with torch.no_grad():
            # CSI needs logits that are positive on average.
            self.classifier.bias.fill_(5)

    def forward(self, x):
        pooled = torch.relu(self.conv(x)).mean((2, 3))
        embedding = self.embedding(torch.relu(self.hidden(pooled)))
        return {"embedding": embedding, "logits": self.classifier(embedding)}


@pytest.fixture(autouse=True)
def default_type():
    """Restore the default dtype."""
    with single_precision():
        yield


def images(n, seed=0):
    return torch.rand(n, 3, 8, 8, generator=torch.Generator().manual_seed(seed), dtype=SINGLE)


def batches(seed=0):
    return [(images(32, seed + i), torch.arange(32) % CLASSES) for i in range(2)]


@pytest.fixture(scope="module")
def model():
    with single_precision():
        torch.manual_seed(0)
        return Net()


@pytest.mark.parametrize("expression", EVERY)
def test_a_file_is_the_same_under_any_default_type(model, tmp_path, expression):
    scores, files = {}, {}
    for written in (SINGLE, DOUBLE):
        torch.set_default_dtype(written)
        scorer = fn.Scorer(model, fn.parse_detector(expression)).fit(batches(), progress=False)
        scorer.calibrate(batches(5), progress=False)
        scorer.save(tmp_path / f"{written}")
        files[written] = (tmp_path / f"{written}").read_bytes()
        for read in (SINGLE, DOUBLE):
            torch.set_default_dtype(read)
            again = fn.load(tmp_path / f"{written}", model)
            verdict = again(images(7, 9))
            scores[written, read] = verdict
            assert torch.equal(verdict.score, scorer(images(7, 9)).score)
    assert files[SINGLE] == files[DOUBLE]
    for verdict in scores.values():
        for one, other in zip(verdict[:4], scores[SINGLE, SINGLE][:4], strict=True):
            assert torch.equal(one, other)


def test_views_are_drawn_alike_under_any_default_type():
    pictures = (255 * images(4)).to(torch.uint8)
    drawn = []
    for default in (SINGLE, DOUBLE):
        torch.set_default_dtype(default)
        generator = torch.Generator().manual_seed(3)
        moved = augment(pictures, generator, 6)
        drawn.append([moved, *Distortion.draw(4, (8, 8), generator)])
    for one, other in zip(*drawn, strict=True):
        assert torch.equal(one, other)


def test_a_packaged_network_is_single_precision_under_any_default_type():
    torch.set_default_dtype(DOUBLE)
    network = fn.load_model("cifar10-resnet18")
    assert {value.dtype for value in network.parameters()} == {SINGLE}
    logits = network(torch.rand(2, 3, 32, 32, dtype=SINGLE))
    assert logits.dtype == SINGLE


class Shared(nn.Module):
    """Buffers and parameters that share memory, or are not contiguous."""

    def __init__(self, fill):
        super().__init__()
        self.register_buffer("expanded", torch.full((1,), fill).expand(10))
        self.register_buffer("rows", torch.full((1, 4), fill).expand(3, 4))
        self.register_buffer("scalar", torch.tensor(fill))
        self.register_buffer("same", self.expanded)
        self.register_buffer("part", torch.full((12,), fill)[::2])
        self.turned = nn.Parameter(torch.full((2, 5), fill).T)
        self.one = nn.Linear(5, 5)
        self.other = nn.Linear(5, 5)
        self.other.weight = self.one.weight
        self.constant = nn.Parameter(torch.full((1,), fill).expand(5), requires_grad=False)
        nn.init.constant_(self.one.weight, fill)


def test_weights_are_loaded_into_any_kind_of_memory():
    saved, module = Shared(2.0).state_dict(), Shared(0.0)
    with pytest.raises(RuntimeError, match="single memory location"):
        module.load_state_dict(saved)
    module = Shared(0.0)
    load_weights(module, saved)
    for name, value in module.state_dict().items():
        assert torch.equal(value, saved[name]), name
    assert module.other.weight is module.one.weight
    assert module.same is module.expanded
