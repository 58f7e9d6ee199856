"""Which operations keep the signs of rectified units, so that what the classifier reads is a last hidden layer."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featnorm.tap import FeatureTap
from networks import Net, assert_absent, assert_reproduces, same, tapped

pytestmark = pytest.mark.usefixtures("seeded")

N, D, C, T = 5, 8, 3, 7


def gem(h: Tensor, p: float | Tensor = 3.0) -> Tensor:
    return F.avg_pool2d(h.clamp(min=1e-6).pow(p), h.shape[2:]).pow(1 / p).flatten(1)


MAPS: dict[str, Callable[[Tensor], Tensor]] = {
    "GeM": gem,
    "GeM with a learned power": lambda h: gem(h, nn.Parameter(torch.tensor([2.5]))),
    "a clamped pool": lambda h: h.mean((2, 3)).clamp(max=0.4),
    "clamp_max": lambda h: h.mean((2, 3)).clamp_max(0.4),
    "upsampled": lambda h: F.interpolate(h, scale_factor=2).mean((2, 3)),
    "upsampled bilinearly": lambda h: F.interpolate(h, size=(9, 9), mode="bilinear").mean((2, 3)),
    "padded": lambda h: F.pad(h, (1, 1)).mean((2, 3)),
    "flipped": lambda h: h.flip(3).mean((2, 3)),
    "squared": lambda h: h.square().mean((2, 3)),
    "squared by hand": lambda h: (h * h).mean((2, 3)),
    "square root": lambda h: h.mean((2, 3)).sqrt(),
    "with an epsilon": lambda h: (h + 1e-6).mean((2, 3)),
    "the largest three": lambda h: h.flatten(2).topk(3).values.mean(2),
    "power p": lambda h: h.pow(3).mean((2, 3)).pow(1 / 3),
}


@pytest.mark.parametrize("name", MAPS)
def test_pools_of_rectified_maps(name: str) -> None:
    pool = MAPS[name]
    images = torch.randn(N, 3, 6, 6)
    net = Net(lambda m, x: m.fc(pool(F.relu(m.conv(x)))), conv=nn.Conv2d(3, D, 3), fc=nn.Linear(D, C))
    f = tapped(net, images)
    same(f.activation, pool(F.relu(net.conv(images))))
    same(f.pooled, pool(F.relu(net.conv(images))))
    assert_reproduces(f, "activation", net(images))


def mask(x: Tensor) -> Tensor:
    return torch.arange(T)[None] < (x[:, 0, 0].abs() * 3).long()[:, None].clamp(1, T)


def weighted(h: Tensor, weights: Tensor) -> Tensor:
    return (h * weights).sum(1) / weights.sum(1)


TOKENS: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "a masked mean": lambda x, h: weighted(h, mask(x)[:, :, None].float()),
    "a masked mean with a floor": lambda x, h: (
        (h * mask(x)[:, :, None].float()).sum(1) / mask(x)[:, :, None].float().sum(1).clamp(min=1e-9)
    ),
    "filled with zeros": lambda x, h: h.masked_fill(~mask(x)[:, :, None], 0.0).sum(1),
    "a masked maximum": lambda x, h: h.masked_fill(~mask(x)[:, :, None], float("-inf")).amax(1),
    "where": lambda x, h: torch.where(mask(x)[:, :, None], h, 0.0).mean(1),
    "a token by index": lambda x, h: h[torch.arange(len(h)), mask(x).sum(1) - 1],
    "a gathered token": lambda x, h: h.gather(1, (mask(x).sum(1) - 1)[:, None, None].expand(-1, 1, D))[:, 0],
    "attention": lambda x, h: (x.sum(2, keepdim=True).softmax(1) * h).sum(1),
    "attention, the other way round": lambda x, h: (h * x.sum(2, keepdim=True).softmax(1)).sum(1),
    "attention by matrices": lambda x, h: (x.sum(2)[:, None].softmax(2) @ h)[:, 0],
    "attention by einsum": lambda x, h: torch.einsum("nt,ntd->nd", x.sum(2).softmax(1), h),
    "a sigmoid gate": lambda x, h: (h * x.sum(2, keepdim=True).sigmoid()).mean(1),
}


@pytest.mark.parametrize("name", TOKENS)
def test_pools_of_rectified_tokens(name: str) -> None:
    pool = TOKENS[name]
    tokens = torch.randn(N, T, D)
    net = Net(lambda m, x: m.fc(pool(x, F.relu(m.first(x)))), first=nn.Linear(D, D), fc=nn.Linear(D, C))
    tap = FeatureTap(net.eval()).trace(tokens)
    f = tap(tokens)
    same(f.activation, pool(tokens, F.relu(net.first(tokens))))
    assert_reproduces(f, "activation", net(tokens))


@pytest.mark.parametrize("square", [torch.square, lambda h: h * h, lambda h: h**2])
def test_a_squared_relu_is_a_hidden_layer(square: Callable[[Tensor], Tensor]) -> None:
    # MetaFormer, Primer.
    x = torch.randn(N, 6)
    net = Net(lambda m, x: m.fc(square(F.relu(m.first(x)))), first=nn.Linear(6, D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, square(F.relu(net.first(x))))
    assert_reproduces(f, "activation", net(x))
    assert "hidden layer of an MLP head" in FeatureTap(net).trace(x).describe()


NOT_KEPT: dict[str, tuple[Callable[[Tensor, Tensor], Tensor], str]] = {
    "a shift": (lambda x, h: (h + 0.5).mean(1), "add in the model's forward"),
    "a negative shift": (lambda x, h: (h - 0.5).mean(1), "sub in the model's forward"),
    "a floor": (lambda x, h: h.clamp(min=0.2).mean(1), "clamp in the model's forward"),
    "a square of GELU": (lambda x, h: F.gelu(x).square().mean(1), "pow in the model's forward"),
    "a fill with ones": (lambda x, h: h.masked_fill(~mask(x)[:, :, None], 1.0).mean(1), "masked_fill in"),
    "a signed gate": (lambda x, h: (h * x.sum(2, keepdim=True)).mean(1), "mul in the model's forward"),
    "attention that is no softmax": (lambda x, h: (x.sum(2)[:, None] @ h)[:, 0], "bmm in the model's forward"),
    "the logarithm of a sum": (
        lambda x, h: h.logsumexp(1),
        "logsumexp in the model's forward, which is not known",
    ),
    "a quantile": (lambda x, h: h.cumsum(1)[:, -1] - h.mean(1), "sub in the model's forward"),
    "unknown": (lambda x, h: torch.erf(h).mean(1), "erf in the model's forward, which is not known to keep signs"),
}


@pytest.mark.parametrize("name", NOT_KEPT)
def test_operations_that_do_not_keep_signs_are_named(name: str) -> None:
    pool, words = NOT_KEPT[name]
    tokens = torch.randn(N, T, D)
    net = Net(lambda m, x: m.fc(pool(x, F.relu(m.first(x)))), first=nn.Linear(D, D), fc=nn.Linear(D, C))
    f = tapped(net, tokens)
    same(f.pooled, pool(tokens, F.relu(net.first(tokens))))
    assert_absent(f, "activation")
    assert words in FeatureTap(net).trace(tokens).describe()
    assert_reproduces(f, "pooled", net(tokens))


KEPT = {
    "mask": lambda m, h: h * m.mask,
    "boolean mask": lambda m, h: (m.mask > 0) * h,
    "quotient": lambda m, h: h / m.positive,
}
HELD = {
    "mask": (torch.arange(D) % 3 > 0).float(),
    "positive": torch.arange(D) + 0.5,
    "mixed": torch.arange(D) - 3.0,
}


@pytest.mark.parametrize("name", KEPT)
def test_constants_that_are_not_negative_keep_a_hidden_layer(name: str) -> None:
    x = torch.randn(N, 6)
    net = Net(
        lambda m, x: m.fc(KEPT[name](m, F.relu(m.hidden(x)))), hidden=nn.Linear(6, D), fc=nn.Linear(D, C), **HELD
    )
    f = tapped(net, x)
    same(f.activation, KEPT[name](net, F.relu(net.hidden(x))))
    assert_reproduces(f, "activation", net(x))
    assert "hidden layer of an MLP head" in FeatureTap(net).trace(x).describe()


@pytest.mark.parametrize("name", KEPT)
@pytest.mark.parametrize("first", [True, False])
def test_constants_that_are_not_negative_keep_a_pool_of_maps(name: str, first: bool) -> None:
    def read(m, x):
        maps = F.relu(m.conv(x))
        return KEPT[name](m, maps.movedim(1, 3)).mean((1, 2)) if first else KEPT[name](m, maps.mean((2, 3)))

    images = torch.randn(N, 3, 6, 6)
    net = Net(lambda m, x: m.fc(read(m, x)), conv=nn.Conv2d(3, D, 3), fc=nn.Linear(D, C), **HELD)
    f = tapped(net, images)
    same(f.activation, read(net, images))
    assert_reproduces(f, "activation", net(images))


@pytest.mark.parametrize(
    "follow",
    [
        lambda m, h: h.abs(),
        lambda m, h: m.dropout(h),
        lambda m, h: F.dropout2d(h, 0.5, m.training),
        lambda m, h: m.dropout(h / 2.0).abs(),
        lambda m, h: h / torch.tensor(2.0),
    ],
)
def test_absolute_values_dropout_and_numbers_keep_signs(follow: Callable[[Net, Tensor], Tensor]) -> None:
    images, parts = torch.randn(N, 3, 6, 6), {"dropout": nn.Dropout(), "fc": nn.Linear(D, C)}
    net = Net(lambda m, x: m.fc(follow(m, F.relu(m.conv(x))).mean((2, 3))), conv=nn.Conv2d(3, D, 3), **parts)
    f = tapped(net, images)
    same(f.activation, follow(net, F.relu(net.conv(images))).mean((2, 3)))
    assert_reproduces(f, "activation", net(images))
    x = torch.randn(N, 6)
    net = Net(lambda m, x: m.fc(F.relu(m.hidden(x)).abs()), hidden=nn.Linear(6, D), **parts)
    f = tapped(net, x)
    same(f.activation, F.relu(net.hidden(x)))
    assert_reproduces(f, "activation", net(x))


@pytest.mark.parametrize(
    "follow", [lambda m, h: h * m.mixed, lambda m, h: h * m.scale, lambda m, h: m.positive / (h + 1)]
)
def test_constants_of_both_signs_and_weights_are_not_followed(follow: Callable[[Net, Tensor], Tensor]) -> None:
    net = Net(
        lambda m, x: m.fc(follow(m, F.relu(m.conv(x)).movedim(1, 3)).mean((1, 2))),
        conv=nn.Conv2d(3, D, 3), fc=nn.Linear(D, C), scale=nn.Parameter(torch.ones(D)), **HELD,
    )  # fmt: skip
    assert_absent(tapped(net, torch.randn(N, 3, 6, 6)), "activation")
