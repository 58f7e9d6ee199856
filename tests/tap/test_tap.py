"""What models return, and models that a tap does not take."""

import json
import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featnorm as fn
from featnorm.evaluation import standard_detectors
from featnorm.tap import FeatureTap

pytestmark = pytest.mark.usefixtures("seeded")

N, IN, D, C = 6, 5, 8, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, IN)


def dense(classes: int = C) -> nn.Sequential:
    return nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, classes)).eval()


@dataclass
class Output:
    hidden: Tensor
    logits: Tensor


class Heads(nn.Module):
    """Two heads on one hidden layer; `form` makes the output of them."""

    def __init__(self, form: Any) -> None:
        super().__init__()
        self.first, self.fine, self.coarse = nn.Linear(IN, D), nn.Linear(D, C), nn.Linear(D, 2)
        self.form = form

    def forward(self, x: Tensor) -> Any:
        h = F.relu(self.first(x))
        return self.form(self.fine(h), self.coarse(h), h)


FORMS = {
    "tuple": (lambda fine, coarse, h: (fine, coarse), "0", 1),
    "dict": (lambda fine, coarse, h: {"fine": fine, "coarse": coarse}, "fine", "coarse"),
    "nested": (lambda fine, coarse, h: {"heads": [fine, {"coarse": coarse}]}, "heads.0", "heads.1"),
    "dataclass": (lambda fine, coarse, h: Output(coarse, fine), "logits", "hidden"),
    "object": (lambda fine, coarse, h: SimpleNamespace(a=fine, b=SimpleNamespace(c=coarse)), "a", "b.c"),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_head_is_chosen_by_key_index_attribute_or_path(form: str, x: Tensor) -> None:
    make, fine, coarse = FORMS[form]
    model = Heads(make).eval()
    hidden = F.relu(model.first(x)).detach()
    for output, head in ((None, model.fine), (fine, model.fine), (coarse, model.coarse)):
        tap = FeatureTap(model, output=output).trace(x)
        again = FeatureTap.from_dict(model, json.loads(json.dumps(tap.to_dict())))
        assert again.output == output
        for features in (tap(x), again(x)):
            assert torch.equal(features.logits, head(hidden).detach())
            assert torch.equal(features.activation, hidden)
            assert torch.equal(features.linear()[0], head.weight.detach())


@pytest.mark.parametrize("form", ["dict", "dataclass", "object"])
def test_what_is_named_logits_is_the_logits(form: str, x: Tensor) -> None:
    make = {
        "dict": lambda fine, coarse, h: {"a": coarse, "logits": fine},
        "dataclass": lambda fine, coarse, h: Output(coarse, fine),
        "object": lambda fine, coarse, h: SimpleNamespace(a=coarse, logits=fine),
    }[form]
    model = Heads(make).eval()
    assert torch.equal(FeatureTap(model)(x).logits, model.fine(F.relu(model.first(x))).detach())


def test_an_output_that_does_not_exist_is_named(x: Tensor) -> None:
    model = Heads(FORMS["nested"][0])
    with pytest.raises(
        ValueError, match=r"output 'aux' is none of the model's outputs: 'heads.0', 'heads.1.coarse'"
    ):
        FeatureTap(model, output="aux").trace(x)
    with pytest.raises(TypeError, match="output must be a key, an index or a path, got float"):
        FeatureTap(model, output=1.0)


class Shaped(nn.Module):
    def __init__(self, classes: int, shape: Any) -> None:
        super().__init__()
        self.net, self.shape = dense(classes), shape

    def forward(self, x: Tensor) -> Tensor:
        return self.shape(self.net(x))


SHAPES = {
    "(n, 1)": lambda z: z,
    "(n,)": lambda z: z.squeeze(-1),
    "flat": torch.ravel,
    "(n, 1, 1)": lambda z: z[:, None],
}


@pytest.mark.parametrize("shape", SHAPES)
def test_one_logit_is_two_classes(shape: str, x: Tensor) -> None:
    model = Shaped(1, SHAPES[shape]).eval()
    z = model.net(x).detach()[:, 0]
    tap = FeatureTap(model)
    features = tap(x)
    assert torch.equal(features.logits, torch.stack([-z / 2, z / 2], 1))
    weight, bias = features.linear()
    torch.testing.assert_close(features.activation @ weight.T + bias, features.logits)
    assert features.classifier_reads("activation")
    assert "logits: 1 wide, from addmm in `net.2`, read as two classes (-z / 2, z / 2)" in tap.describe()
    verdict = fn.Scorer(model, fn.MSP())(x)
    torch.testing.assert_close(verdict.score, torch.sigmoid(z.abs()))
    assert torch.equal(verdict.logits.argmax(1), (z > 0).long())
    found = tap.hidden(x)
    torch.testing.assert_close(found.output_logits, features.logits)
    assert torch.equal(found.confidence, found.logits.abs()[:, 0])
    train = torch.randn(60, IN)
    labels = (model.net(train)[:, 0] > 0).long()
    logits_or_weights = [d for d in standard_detectors() if {"logits", "classifier"} & set(d.reads + d.learns)]
    assert len(logits_or_weights) >= 6
    for detector in logits_or_weights:
        scorer = fn.Scorer(model, detector).fit([(train, labels)])
        assert scorer(x).score.unique().numel() > 1, detector


def test_one_logit_given_as_features() -> None:
    z = torch.tensor([[3.0], [-2.0]])
    features = fn.Features(logits=z, activation=torch.rand(2, D), classifier=(torch.ones(1, D), None))
    assert features.logits.tolist() == [[-1.5, 1.5], [1, -1]]
    assert features.linear()[0].tolist() == [[-0.5] * D, [0.5] * D]
    assert features[:1].logits.tolist() == [[-1.5, 1.5]]
    assert fn.MSP().score(features).tolist() == pytest.approx([1 / (1 + math.exp(-3)), 1 / (1 + math.exp(-2))])


def test_logits_with_an_axis_too_many(x: Tensor) -> None:
    model = Shaped(C, lambda z: z[:, None]).eval()
    features = FeatureTap(model)(x)
    assert torch.equal(features.logits, model.net(x).detach())
    assert features.linear()[0].shape == (C, D)
    found = FeatureTap(model).hidden(x)
    torch.testing.assert_close(found.output_logits, features.logits)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_through_a_scorer(dtype: torch.dtype, x: Tensor) -> None:
    model = dense().to(dtype)
    train = torch.randn(200, IN).to(dtype)
    for detector in (
        fn.NAN(),
        fn.MSP(),
        fn.KNN(k=3),
        fn.Mahalanobis(),
        fn.ViM(),
        fn.parse_detector("SSD() / NAN()"),
    ):
        scorer = fn.Scorer(model, detector).fit([(train, torch.arange(200) % C)]).calibrate([train])
        verdict = scorer(x.to(dtype))
        assert verdict.score.dtype == torch.float32
        assert verdict.score.isfinite().all()


@pytest.mark.parametrize("dynamic", [True, False])
def test_an_exported_program(dynamic: bool, x: Tensor) -> None:
    model = dense()
    expected = FeatureTap(model)(x)
    shapes = ({0: torch.export.Dim.AUTO},) if dynamic else None
    program = torch.export.export(model, (x,), dynamic_shapes=shapes)
    features = FeatureTap(program.module())(x)
    for name, value in expected.fields():
        torch.testing.assert_close(getattr(features, name), value)
    assert torch.equal(features.linear()[0], expected.linear()[0])
    with pytest.raises(TypeError, match=r"got an ExportedProgram: pass its module\(\)"):
        FeatureTap(program)


@pytest.mark.filterwarnings("ignore:.*is deprecated:FutureWarning")
def test_models_that_cannot_be_traced_are_named(x: Tensor) -> None:
    with pytest.raises(
        ValueError, match="the model is a TorchScript module, which takes no hooks: pass the model"
    ):
        FeatureTap(torch.jit.script(dense()))
    with pytest.raises(ValueError, match="'0' in the model is a TorchScript module"):
        FeatureTap(nn.Sequential(torch.jit.trace(dense(), x), nn.ReLU()))
    with pytest.raises(
        TypeError, match=r"the model must be a torch.nn.Module, got function: pass the module that"
    ):
        FeatureTap(lambda x: x)
    with pytest.raises(ValueError, match="weights are on the meta device and have no values"):
        FeatureTap(dense().to("meta")).trace(x)


def test_batch_normalization_without_running_statistics_is_named(x: Tensor) -> None:
    def make(unused: bool) -> nn.Module:
        norm = nn.BatchNorm1d(D, track_running_stats=unused)
        net = nn.Sequential(nn.Linear(IN, D), norm, nn.ReLU(), nn.Linear(D, C))
        net.spare = nn.BatchNorm1d(D, track_running_stats=False)
        net.forward = lambda x: net[3](net[2](net[1](net[0](x))))
        return net

    FeatureTap(make(True)).trace(x)
    with pytest.raises(
        ValueError, match=r"`1` \(BatchNorm1d\) has no running statistics, so that a score would depend"
    ):
        FeatureTap(make(False)).trace(x)
    # An instance normalization has none either, and needs none.
    maps = nn.Sequential(
        nn.Conv1d(IN, D, 1), nn.InstanceNorm1d(D), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten()
    )
    FeatureTap(nn.Sequential(maps, nn.Linear(D, C))).trace(torch.randn(N, IN, 7))


def test_either_class_of_one_logit_is_in_distribution() -> None:
    # Of (0, z), the energy and the largest logit would rank every input of class 0 below the OOD inputs.
    model = nn.Sequential(nn.Linear(1, 2, bias=False), nn.ReLU(), nn.Linear(2, 1, bias=False)).eval()
    with torch.no_grad():
        model[0].weight.copy_(torch.tensor([[1.0], [-1.0]]))
        model[2].weight.copy_(torch.tensor([[1.0, -1.0]]))
    confident, uncertain = torch.tensor([[5.0], [-5.0], [4.0], [-4.0]]), torch.tensor([[0.1], [-0.2], [0.3]])
    for detector in (fn.MSP(), fn.KLUniform(), fn.Energy(), fn.MaxLogit(), fn.HiddenConfidence(), fn.NAN()):
        scorer = fn.Scorer(model, detector)
        assert fn.auroc(scorer(confident).score, scorer(uncertain).score) == 1, detector


def test_other_heads_are_described(x: Tensor) -> None:
    model = Heads(FORMS["nested"][0])
    assert "other heads: 'heads.1.coarse'; choose one with output=" in FeatureTap(model).trace(x).describe()
    for output in ("heads.0", "heads.1"):
        assert "other heads" not in FeatureTap(model, output=output).trace(x).describe()
    # What the logits are made of is no head.
    model.form = lambda fine, coarse, h: {"logits": fine, "hidden": h}
    assert "other heads" not in FeatureTap(model).trace(x).describe()
