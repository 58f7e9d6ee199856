"""Heads that are no single linear layer: sums, adapters, class scores over positions, quantized layers.

The pooled feature is what the heads read, never the logits or a part of them.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featnorm.tap import FeatureTap
from networks import Net, assert_absent, assert_reproduces, batch_norm, parameter, plain, same, tapped

pytestmark = pytest.mark.usefixtures("seeded")

N, IN, D, E, C, T = 5, 6, 8, 4, 3, 7


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, IN)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randn(N, T, D)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(N, 3, 8, 8)


# --- several heads whose outputs are added up -------------------------------------------------------------------

SUMS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sum": lambda a, b: a + b,
    "mean": lambda a, b: (a + b) / 2,
    "weighted": lambda a, b: 0.3 * a + 0.7 * b,
    "alpha": lambda a, b: torch.add(a, b, alpha=0.4),
    "difference with alpha": lambda a, b: torch.sub(a, b, alpha=3),
    "difference": lambda a, b: a - b,
    "stack, mean": lambda a, b: torch.stack([a, b]).mean(0),
    "stack, sum over the last axis": lambda a, b: torch.stack([a, b], -1).sum(-1),
    "python's sum": lambda a, b: sum([a, b]),
    "in place": lambda a, b: a.add_(b),
}


@pytest.mark.parametrize("name", SUMS)
def test_heads_that_read_one_vector_are_one_classifier(name: str, tokens: Tensor) -> None:
    join = SUMS[name]
    net = Net(
        lambda m, x: (lambda h: join(m.a(h), m.b(h)))(m.norm(x).mean(1)),
        norm=nn.LayerNorm(D), a=nn.Linear(D, C), b=nn.Linear(D, C, bias=False),
    )  # fmt: skip
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens).mean(1))
    same(f.logits, net(tokens))
    assert_reproduces(f, "pooled", net(tokens))


@pytest.mark.parametrize("name", SUMS)
def test_heads_that_read_different_vectors_read_their_concatenation(name: str, tokens: Tensor) -> None:
    # Distilled DeiT and PiT.
    join = SUMS[name]
    net = Net(
        lambda m, x: (lambda h: join(m.a(h[:, 0]), m.b(h[:, 1])))(m.norm(x)),
        norm=nn.LayerNorm(D), a=nn.Linear(D, C), b=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens)[:, :2].flatten(1))
    same(f.logits, net(tokens))
    assert_reproduces(f, "pooled", net(tokens))
    assert_absent(f, "activation", "embedding")
    words = FeatureTap(net).trace(tokens).describe()
    assert "pooled: 8 + 8 wide" in words
    assert "2 heads" in words


def test_heads_of_three_widths(tokens: Tensor) -> None:
    net = Net(
        lambda m, x: (m.a(x[:, 0]) + m.b(x[:, 1, :5]) + m.c(x[:, 2, 2:])) / 3,
        a=nn.Linear(D, C), b=nn.Linear(5, C), c=nn.Linear(6, C),
    )  # fmt: skip
    f = tapped(net, tokens)
    same(f.pooled, torch.cat([tokens[:, 0], tokens[:, 1, :5], tokens[:, 2, 2:]], 1))
    assert_reproduces(f, "pooled", net(tokens))


def test_two_rectified_hidden_layers(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.a(F.relu(m.f(x))) + m.b(F.relu(m.g(x))),
        f=nn.Linear(IN, D), g=nn.Linear(IN, E), a=nn.Linear(D, C), b=nn.Linear(E, C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, torch.cat([F.relu(net.f(x)), F.relu(net.g(x))], 1))
    assert_reproduces(f, "activation", net(x))
    with pytest.raises(ValueError, match="2 parts, one per head: choose one with layer="):
        FeatureTap(net).hidden(x)


def test_a_linear_layer_beside_a_hidden_layer_has_no_activation(x: Tensor) -> None:
    # Wide and deep.
    net = Net(
        lambda m, x: m.wide(x) + m.fc(F.relu(m.deep(x))),
        wide=nn.Linear(IN, C), deep=nn.Linear(IN, D), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.pooled, torch.cat([x, F.relu(net.deep(x))], 1))
    assert_absent(f, "activation")
    assert_reproduces(f, "pooled", net(x))


def test_a_head_beside_something_unknown(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(F.relu(m.first(x))) + torch.sin(m.other(x)),
        first=nn.Linear(IN, D), fc=nn.Linear(D, C), other=nn.Linear(IN, C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.pooled, F.relu(net.first(x)))
    same(f.logits, net(x))
    assert_absent(f, "classifier")


@pytest.mark.parametrize("count", [1, 2])
def test_batch_norms_inside_the_heads(count: int, images: Tensor) -> None:
    # LeViT, RepViT.
    net = Net(
        lambda m, x: (lambda h: sum(head(h) for head in m.heads) / len(m.heads))(m.conv(x).mean((2, 3))),
        conv=nn.Conv2d(3, D, 3),
        heads=nn.ModuleList(nn.Sequential(batch_norm(D), nn.Linear(D, C)) for _ in range(count)),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.pooled, net.conv(images).mean((2, 3)))
    assert_reproduces(f, "pooled", net(images))
    with torch.no_grad():
        net.heads[0][0].running_mean.add_(1)
        net.heads[0][0].weight.mul_(3)
    assert_reproduces(FeatureTap(net).trace(images)(images), "pooled", net(images))


def test_heads_over_parts_of_the_classes(x: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: torch.cat([m.a(h), m.b(h) / 2], 1))(F.relu(m.first(x))),
        first=nn.Linear(IN, D), a=nn.Linear(D, C), b=nn.Linear(D, 2, bias=False),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    same(f.logits, net(x))
    assert_reproduces(f, "activation", net(x))


def test_the_classifier_of_a_sum_follows_the_weights(tokens: Tensor) -> None:
    net = Net(lambda m, x: (m.a(x[:, 0]) + m.b(x[:, 1])) / 2, a=nn.Linear(D, C), b=nn.Linear(D, C))
    tap = FeatureTap(net.eval()).trace(tokens)
    with torch.no_grad():
        net.a.weight.mul_(3)
        net.b.bias.add_(1)
    assert_reproduces(tap(tokens), "pooled", net(tokens))
    again = FeatureTap.from_dict(net, tap.to_dict())
    assert_reproduces(again(tokens), "pooled", net(tokens))


def test_a_residual_stream_is_no_sum_of_heads(tokens: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: h + m.b(h))(m.a(x)).mean(1),
        a=nn.Linear(D, D), b=nn.Linear(D, D),
    )  # fmt: skip
    f = tapped(net, tokens)
    assert_absent(f, "logits", "classifier")
    same(f.pooled, net(tokens))


# --- adapters ---------------------------------------------------------------------------------------------------


class Adapted(nn.Module):
    """A linear layer with a low-rank adapter, as in peft."""

    def __init__(self, width: int, out: int) -> None:
        super().__init__()
        self.base = nn.Linear(width, out)
        self.down, self.up = nn.Linear(width, 2, bias=False), nn.Linear(2, out, bias=False)
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + self.up(self.down(self.drop(x))) * 1.5


def test_an_adapted_classifier(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), Adapted(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net[0](x)))
    same(f.logits, net(x))
    assert_absent(f, "embedding")
    assert_reproduces(f, "activation", net(x))


def test_every_layer_of_a_head_is_adapted(images: Tensor) -> None:
    net = nn.Sequential(
        nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        Adapted(D, 9), nn.ReLU(), Adapted(9, E), Adapted(E, C),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.pooled, net[:4](images))
    same(f.activation, net[:6](images))
    same(f.embedding, net[:7](images))
    assert_reproduces(f, "activation", net(images))


def test_an_adapted_layer_at_every_token(tokens: Tensor) -> None:
    net = Net(lambda m, x: m.head(m.norm(x)).mean(1), norm=nn.LayerNorm(D), head=Adapted(D, C))
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens).mean(1))
    assert_reproduces(f, "pooled", net(tokens))


def test_an_adapter_that_scales_the_layer_too(x: Tensor) -> None:
    # DoRA adds a multiple of the layer's own output.
    def run(m: Net, x: Tensor) -> Tensor:
        hidden = F.relu(m.first(x))
        scores = m.fc(hidden)
        return scores + (m.scale * (scores - m.fc.bias) + m.up(m.down(hidden)))

    net = Net(
        run,
        first=nn.Linear(IN, D),
        fc=nn.Linear(D, C),
        scale=parameter(1, C),
        down=nn.Linear(D, 2),
        up=nn.Linear(2, C),
    )
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    same(f.logits, net(x))
    assert_absent(f, "classifier")


@pytest.mark.parametrize("numbers", [{"alpha": 2.0}, {"beta": 0.5}])
def test_a_layer_that_is_scaled_within_its_operation(numbers: dict[str, float], x: Tensor) -> None:
    net = Net(
        lambda m, x: torch.addmm(m.b, F.relu(m.first(x)), m.W.T, **numbers),
        first=nn.Linear(IN, D), W=parameter(C, D), b=parameter(C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    assert_absent(f, "classifier")


def test_where_a_model_without_a_classifier_ends_is_named(tokens: Tensor) -> None:
    net = Net(lambda m, x: m.norm(x)[:, 0], norm=nn.LayerNorm(D))
    words = FeatureTap(net).trace(tokens).describe()
    assert "logits: the model returns features without a classifier (native_layer_norm in `norm`" in words


# --- class scores over positions --------------------------------------------------------------------------------

LENGTHS = torch.tensor([3, 7, 1, 5, 2])


def mask(x: Tensor) -> Tensor:
    """Return the mask of the tokens that are not padding, which differs from sequence to sequence."""
    return torch.arange(T)[None] < (x[:, 0, 0].abs() * 3).long()[:, None].clamp(1, T)


def masked_mean(x: Tensor, scores: Tensor) -> Tensor:
    weights = mask(x)[:, :, None].float()
    return (scores * weights).sum(1) / weights.sum(1)


REDUCTIONS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "mean": lambda x, z: z.mean(1),
    "mean of the transposed": lambda x, z: z.transpose(1, 2).mean(-1),
    "adaptive pool": lambda x, z: F.adaptive_avg_pool1d(z.transpose(1, 2), 1).squeeze(-1),
    "sum over a number": lambda x, z: z.sum(1) / T,
    "first": lambda x, z: z[:, 0],
    "last": lambda x, z: z[:, -1],
    "mean without the first": lambda x, z: z[:, 1:].mean(1),
    "[arange, last]": lambda x, z: z[torch.arange(len(z)), mask(x).sum(1) - 1],
    "gathered": lambda x, z: z[range(len(z)), mask(x).sum(1) - 1],
    "masked mean": masked_mean,
}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_class_scores_of_tokens(name: str, bias: bool, tokens: Tensor) -> None:
    # The input of the head is reduced as the scores are: GPT-2 picks the last token.
    reduce = REDUCTIONS[name]
    net = Net(
        lambda m, x: reduce(x, m.score(m.norm(x))), norm=nn.LayerNorm(D), score=nn.Linear(D, C, bias=bias)
    )  # fmt: skip
    tap = FeatureTap(net.eval()).trace(tokens[:2])
    for batch in (tokens, tokens[2:4], tokens[1:2]):
        f = tap(batch)
        same(f.pooled, reduce(batch, net.norm(batch)))
        same(f.logits, net(batch))
        assert_reproduces(f, "pooled", net(batch))
    assert_absent(f, "activation", "embedding")
    assert "normalization" in f.absent["activation"]
    assert "pooled: 8 wide" in tap.describe()
    again = FeatureTap.from_dict(net, tap.to_dict())
    same(again(tokens).pooled, reduce(tokens, net.norm(tokens)))


def test_class_scores_of_two_tokens(tokens: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda z: (z[:, 0] + z[:, 1]) / 2)(m.score(m.norm(x))),
        norm=nn.LayerNorm(D), score=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens)[:, :2].flatten(1))
    same(f.logits, net(tokens))
    assert "a sum over positions" in f.absent["classifier"]


def test_two_heads_behind_projections_of_every_token(tokens: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: (m.a(m.p(h)) + m.b(m.q(h))).mean(1))(m.norm(x)),
        norm=nn.LayerNorm(D), p=nn.Linear(D, E), q=nn.Linear(D, 5), a=nn.Linear(E, C), b=nn.Linear(5, C),
    )  # fmt: skip
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens).mean(1))
    assert_reproduces(f, "pooled", net(tokens))


@pytest.mark.parametrize(
    "reduce",
    [lambda z: z[..., :2].mean(1), lambda z: z[..., torch.tensor([0, 2])].mean(1), lambda z: z[:, :, 1:].amax(1)],
)
def test_some_classes_of_class_scores(reduce: Callable[[Tensor], Tensor], tokens: Tensor) -> None:
    net = Net(lambda m, x: reduce(m.score(m.norm(x))), norm=nn.LayerNorm(D), score=nn.Linear(D, C))
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens).mean(1))
    same(f.logits, net(tokens))
    assert_absent(f, "classifier")


def test_weights_that_do_not_add_up_to_one(tokens: Tensor) -> None:
    net = Net(
        lambda m, x: (m.score(m.norm(x)) * x[:, :, :1].sigmoid()).mean(1),
        norm=nn.LayerNorm(D),
        score=nn.Linear(D, C),
    )
    f = tapped(net, tokens)
    same(f.pooled, (net.norm(tokens) * tokens[:, :, :1].sigmoid()).mean(1))
    same(f.logits, net(tokens))
    assert_absent(f, "classifier")


def test_rectified_tokens_under_a_head(tokens: Tensor) -> None:
    net = Net(
        lambda m, x: masked_mean(x, m.score(F.relu(m.first(x)))), first=nn.Linear(D, 9), score=nn.Linear(9, C)
    )
    f = tapped(net, tokens)
    same(f.activation, masked_mean(tokens, F.relu(net.first(tokens))))
    assert_reproduces(f, "activation", net(tokens))


def test_the_maximum_of_class_scores_is_not_linear(tokens: Tensor) -> None:
    net = Net(lambda m, x: m.score(m.norm(x)).amax(1), norm=nn.LayerNorm(D), score=nn.Linear(D, C))
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens).mean(1))
    same(f.logits, net(tokens))
    assert "`amax`" in f.absent["classifier"]


def test_scores_of_tokens_beside_the_head_are_left_out(tokens: Tensor) -> None:
    # VOLO.
    net = Net(
        lambda m, x: (lambda h: m.head(h[:, 0]) + 0.5 * m.aux(h[:, 1:]).max(1)[0])(m.norm(x)),
        norm=nn.LayerNorm(D), head=nn.Linear(D, C), aux=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, tokens)
    same(f.pooled, net.norm(tokens)[:, 0])
    same(f.logits, net(tokens))
    assert "`max`" in f.absent["classifier"]


@pytest.mark.parametrize("pool", [
    lambda z: z.mean((2, 3)),
    lambda z: F.adaptive_avg_pool2d(z, 1).flatten(1),
    lambda z: F.avg_pool2d(z, z.shape[-1]).flatten(1),
    lambda z: z.flatten(2).mean(-1),
])  # fmt: skip
def test_a_convolution_as_classifier_is_the_classifier_of_the_averaged_maps(
    pool: Callable[[Tensor], Tensor], images: Tensor
) -> None:
    net = Net(lambda m, x: pool(m.fc(F.relu(m.conv(x)))), conv=nn.Conv2d(3, D, 3), fc=nn.Conv2d(D, C, 1))
    f = tapped(net, images)
    same(f.pooled, F.relu(net.conv(images)).mean((2, 3)))
    same(f.activation, F.relu(net.conv(images)).mean((2, 3)))
    same(f.logits, net(images))
    assert_reproduces(f, "activation", net(images))


def test_class_maps_that_are_rectified(images: Tensor) -> None:
    # SqueezeNet.
    net = Net(
        lambda m, x: F.relu(m.fc(F.relu(m.conv(x)))).mean((2, 3)), conv=nn.Conv2d(3, D, 3), fc=nn.Conv2d(D, C, 1)
    )
    net.num_classes = C
    f = tapped(net, images)
    same(f.activation, F.relu(net.conv(images)).mean((2, 3)))
    same(f.pooled, F.relu(net.conv(images)).mean((2, 3)))
    same(f.logits, net(images))
    assert "`relu`" in f.absent["classifier"]


# --- logits by name ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "last", [torch.tanh, lambda z: 30 * torch.tanh(z / 30), F.relu, F.softplus, lambda z: z.clamp(-5, 5)]
)
def test_a_key_named_logits_is_logits(last: Callable[[Tensor], Tensor], x: Tensor) -> None:
    net = Net(lambda m, x: {"logits": last(m.fc(F.relu(m.first(x))))}, first=nn.Linear(IN, D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.logits, net(x)["logits"])
    same(f.activation, F.relu(net.first(x)))
    assert_absent(f, "classifier")


def test_logits_of_an_unknown_operation_are_not_passed_off_as_features(x: Tensor) -> None:
    net = Net(
        lambda m, x: {"logits": -torch.cdist(F.relu(m.first(x)), m.P)}, first=nn.Linear(IN, D), P=parameter(C, D)
    )
    f = tapped(net, x)
    same(f.logits, net(x)["logits"])
    assert_absent(f, "activation", "pooled", "classifier", "embedding")
    words = FeatureTap(net).trace(x).describe()
    assert "stopped at _cdist_forward" in words


@pytest.mark.parametrize("distance", [
    lambda h, p: -torch.cdist(h, p),
    lambda h, p: -(h[:, None] - p).pow(2).sum(-1),
    lambda h, p: -(h[:, None] - p[None]).norm(dim=-1) / 0.1,
    lambda h, p: -(p - h[:, None]).square().mean(2),
])  # fmt: skip
def test_distances_from_prototypes_are_logits(distance: Callable[[Tensor, Tensor], Tensor], x: Tensor) -> None:
    net = Net(lambda m, x: distance(F.relu(m.first(x)), m.P), first=nn.Linear(IN, D), P=parameter(C, D))
    f = tapped(net, x)
    same(f.logits, net(x))
    assert_absent(f, "pooled", "activation", "classifier")


@pytest.mark.parametrize("change", [
    lambda z: z[:, :2],
    lambda z: z[:, torch.tensor([2, 0])],
    lambda z: z.masked_fill(torch.tensor([True, False, False]), -1e4),
    lambda z: z / (1 + z.detach().std(1, keepdim=True)),
])  # fmt: skip
def test_logits_that_are_selected_masked_or_scaled_per_input(
    change: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    net = Net(lambda m, x: change(m.fc(F.relu(m.first(x)))), first=nn.Linear(IN, D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.logits, net(x))
    same(f.activation, F.relu(net.first(x)))
    same(f.pooled, F.relu(net.first(x)))
    assert_absent(f, "classifier")


# --- quantized layers -------------------------------------------------------------------------------------------


quantizes = pytest.mark.skipif(torch.backends.quantized.engine == "none", reason="torch cannot quantize here")


@quantizes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:torch.quantize_per_tensor")
@pytest.mark.parametrize("bias", [True, False])
def test_dynamically_quantized_layers(bias: bool, x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C, bias=bias)).eval()
    quantized = torch.ao.quantization.quantize_dynamic(net, {nn.Linear})
    f = tapped(quantized, x)
    same(f.activation, plain(quantized[:2], x))
    same(f.logits, plain(quantized, x))
    assert f.classifier_reads("activation")
    torch.testing.assert_close(f.classifier[0], net[2].weight.detach(), rtol=0.02, atol=0.01)


@quantizes
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:Please use quant_min")
def test_statically_quantized_layers(x: Tensor) -> None:
    quantization = torch.ao.quantization
    net = quantization.QuantWrapper(nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))).eval()
    net.qconfig = quantization.get_default_qconfig(torch.backends.quantized.engine)
    prepared = quantization.prepare(net)
    prepared(torch.randn(99, IN))
    quantized = quantization.convert(prepared)
    f = tapped(quantized, x)
    inner = quantized.module[:2](quantized.quant(x)).dequantize()
    same(f.activation, inner)
    same(f.logits, plain(quantized, x))
    assert f.classifier_reads("activation")
