"""`rank_layers` against the formulas of Yu et al. (CVPR 2023), and `pooling="norm"`, which makes use of it."""

import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import featnorm as fn
from featnorm.augmentation import jigsaw
from featnorm.tap import FeatureTap
from networks import Net, same

pytestmark = pytest.mark.usefixtures("seeded")

N, C = 7, 4


class Block(nn.Module):
    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, out, 3, padding=1)
        self.norm = nn.BatchNorm2d(out)
        self.skip = nn.Conv2d(width, out, 1)

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.norm(self.conv(x)) + self.skip(x))


def network() -> nn.Module:
    stages = nn.Sequential(Block(3, 5), nn.Sequential(Block(5, 6), Block(6, 8)))
    return Net(
        lambda m, x: m.fc(m.stages(m.stem(x)).mean((2, 3))),
        stem=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ReLU(inplace=True)), stages=stages,
        fc=nn.Linear(8, C),
    ).eval()  # fmt: skip


def feature_norm(maps: Tensor) -> Tensor:
    return maps.clamp(min=0).double().square().sum((2, 3)).sqrt().mean(1)


def outputs(net: nn.Module, layer: str, x: Tensor) -> Tensor:
    seen: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda m, a, y: seen.append(y.clone()))
    with torch.no_grad():
        net(x)
    handle.remove()
    return seen[-1]


def test_the_ratios_are_those_of_the_paper() -> None:
    net, x = network(), torch.randn(N, 3, 12, 12)
    ranking = FeatureTap(net).rank_layers([x[:3], x[3:]], seed=3)
    pieces = jigsaw(x, torch.Generator().manual_seed(3))
    names = ["stem", "stages.0", "stages.1.0", "stages"]  # the outermost module that returns a value
    assert sorted(layer.name for layer in ranking.layers) == sorted(names)
    for name, ratio, deviation in ranking.layers:
        each = feature_norm(outputs(net, name, x)) / feature_norm(outputs(net, name, pieces))
        assert ratio == pytest.approx(float(each.mean()), rel=1e-5)
        assert deviation == pytest.approx(float(each.std(correction=0)), rel=1e-3)
    ratios = [layer.ratio for layer in ranking.layers]
    assert ratios == sorted(ratios, reverse=True)
    assert ranking.best == ranking.layers[0].name
    assert ranking.images == N
    lines = repr(ranking).splitlines()
    assert lines[0].split() == ["layer", "NormRatio", "deviation"]
    assert lines[1].split() == [
        ranking.best,
        f"{ranking.layers[0].ratio:.3f}",
        f"{ranking.layers[0].deviation:.3f}",
    ]


def test_the_ranking_depends_on_the_seed_alone() -> None:
    net, x = network(), torch.randn(N, 3, 12, 12)
    rank = FeatureTap(net).rank_layers
    whole = rank([x]).layers
    for layer, other in zip(whole, rank([(x[:2], torch.zeros(2).long()), x[2:]]).layers, strict=True):
        assert layer.name == other.name
        assert layer[1:] == pytest.approx(other[1:], rel=1e-5)
    assert whole != rank([x], seed=1).layers


def test_the_best_layer_makes_a_scorer(tmp_path: Any) -> None:
    net, x = network(), torch.randn(N, 3, 12, 12)
    ranking = FeatureTap(net).rank_layers([x])
    scorer = fn.Scorer(net, fn.L1Norm(), ranking.best, pooling="norm").fit([x]).calibrate([x], tpr=0.5)
    maps = outputs(net, ranking.best, x)
    same(scorer(x).score, feature_norm(maps).float() * maps.shape[1])
    scorer.save(tmp_path / "d.featnorm")
    same(fn.load(tmp_path / "d.featnorm", model=net)(x).score, scorer(x).score)
    assert "norm over positions" in scorer.tap.describe()


def test_the_classifier_reads_the_averages() -> None:
    net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, C)).eval()
    x = torch.randn(N, 3, 9, 9)
    assert FeatureTap(net, "1")(x).classifier is not None
    assert FeatureTap(net, "1", pooling="norm")(x).classifier is None


def test_tokens() -> None:
    net = Net(
        lambda m, x: m.fc(m.block(m.patch(x).flatten(2).transpose(1, 2)).mean(1)),
        patch=nn.Conv2d(3, 8, 4, 4), block=nn.TransformerEncoderLayer(8, 2, 16, batch_first=True),
        fc=nn.Linear(8, C),
    ).eval()  # fmt: skip
    x = torch.randn(N, 3, 12, 12)
    ranking = FeatureTap(net).rank_layers([x])
    pieces = jigsaw(x, torch.Generator().manual_seed(0))
    (block,) = ranking.layers  # the hidden layer of its MLP
    assert block.name == "block.dropout"
    norms = [feature_norm(outputs(net, block.name, y).transpose(1, 2)[..., None]) for y in (x, pieces)]
    assert block.ratio == pytest.approx(float((norms[0] / norms[1]).mean()), rel=1e-4)


def test_a_value_of_an_operation_beside_a_pooled_layer() -> None:
    # Pooling runs operations of its own, which must not be counted as the model's.
    net = Net(
        lambda m, x: F.relu(m.act(m.conv(x)).mean((2, 3)) @ m.w) @ m.v,
        conv=nn.Conv2d(3, 6, 3), act=nn.ReLU(), w=nn.Parameter(torch.randn(6, 5)),
        v=nn.Parameter(torch.randn(5, C)),
    ).eval()  # fmt: skip
    x = torch.randn(N, 3, 9, 9)
    for pooling in ("mean", "norm"):
        f = FeatureTap(net, "act", pooling=pooling)(x)
        maps = outputs(net, "act", x).flatten(2)
        same(f.activation, maps.mean(2) if pooling == "mean" else maps.norm(dim=2))
        same(f.pooled, outputs(net, "act", x).mean((2, 3)))


def test_layers_without_a_ratio_are_listed() -> None:
    net = network()
    with torch.no_grad():
        net.stages[0].norm.weight.zero_()
        net.stages[0].norm.bias.fill_(-9.0)
        net.stages[0].skip.weight.zero_()
    ranking = FeatureTap(net).rank_layers([torch.randn(N, 3, 12, 12)])
    assert ranking.excluded == {"stages.0": "norm 0 or not finite for 7 of 7 images or jigsaws"}
    assert "stages.0, norm 0" in repr(ranking)
    assert "stages.0" not in [layer.name for layer in ranking.layers]


def test_the_model_is_left_as_it_was_also_when_it_raises() -> None:
    net = network().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    FeatureTap(net).rank_layers([torch.randn(N, 3, 12, 12)])

    def refuse(x: Tensor) -> Tensor:
        raise RuntimeError("no jigsaws")

    passes: list[int] = []
    handle = net.fc.register_forward_pre_hook(
        lambda m, a: passes.append(1) or (refuse(a[0]) if len(passes) > 2 else None)
    )
    with pytest.raises(RuntimeError, match="no jigsaws") as error:
        FeatureTap(net).rank_layers([torch.randn(N, 3, 12, 12)])
    assert "batch 0 of the loader" in error.value.__notes__[0]
    handle.remove()
    for module in net.modules():
        assert module.training
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


@pytest.mark.parametrize(
    ("net", "batches", "words"),
    [
        (network(), [torch.randn(2, 8)], "must hold one (n, c, h, w), and it holds torch.float32 (2, 8)"),
        (network(), [torch.randn(2, 3, 2, 9)], "(n, c, h, w) of at least 3 x 3 pixels, got (2, 3, 2, 9)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(48, C)), [torch.randn(2, 3, 4, 4)], "has no layers to rank"),
        (network(), [], "the loader yielded no batch"),
    ],
)  # fmt: skip
def test_what_cannot_be_ranked(net: nn.Module, batches: list[Tensor], words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)):
        FeatureTap(net).rank_layers(batches)


def test_poolings_that_are_refused() -> None:
    with pytest.raises(ValueError, match="pooling must be one of 'mean', 'norm', got 'max'"):
        FeatureTap(network(), "stem", pooling="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pass layer= too"):
        FeatureTap(network(), pooling="norm")
    with pytest.raises(ValueError, match=r"layer 'fc' returns a tensor of shape \(2, 4\), without positions"):
        FeatureTap(network(), "fc", pooling="norm").trace(torch.randn(2, 3, 12, 12))
