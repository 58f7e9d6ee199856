"""The features that `FeatureTap` finds in small networks, compared with tensors computed in each test."""

import re
import time
from collections import namedtuple
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from featnorm import norms
from featnorm.models import ProjectionHead
from featnorm.paper.networks import CSIHead
from featnorm.tap import FeatureTap
from networks import Net, assert_absent, assert_reproduces, batch_norm, parameter, plain, same, tapped

pytestmark = pytest.mark.usefixtures("seeded")

N, IN, D, E, C = 5, 6, 8, 4, 3


@pytest.fixture
def x() -> Tensor:
    return torch.randn(N, IN)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(N, 3, 8, 8)


def is_mlp_head(net: nn.Module, x: Tensor) -> bool:
    return "hidden layer of an MLP head" in FeatureTap(net).trace(x).describe().split("NAN")[0]


# --- the non-linearity -----------------------------------------------------------------------------------


def in_place(function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda x: function(x + 0)


FUNCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "F.relu": F.relu,
    "F.relu in place": in_place(lambda x: F.relu(x, inplace=True)),
    "x.relu": lambda x: x.relu(),
    "torch.relu_": in_place(torch.relu_),
    "clamp(min=0)": lambda x: x.clamp(min=0),
    "clamp_ in place": in_place(lambda x: x.clamp_(min=0.0)),
    "clamp_min(0)": lambda x: x.clamp_min(0),
    "torch.maximum": lambda x: torch.maximum(x, torch.zeros(())),
    "torch.where": lambda x: torch.where(x > 0, x, 0.0),
    "x * sigmoid(x)": lambda x: x * torch.sigmoid(x),
    "sigmoid(x) * x": lambda x: x.sigmoid() * x,
    "mul_ in place": in_place(lambda x: x.mul_(x.sigmoid())),
    "x * relu6(x + 3) / 6": lambda x: x * F.relu6(x + 3) / 6,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "leaky": lambda x: F.leaky_relu(x, 0.1),
    "silu": F.silu,
    "silu in place": in_place(lambda x: F.silu(x, inplace=True)),
    "hardswish": F.hardswish,
    "elu": F.elu,
    "celu": F.celu,
    "selu": F.selu,
    "mish": F.mish,
    "relu6": F.relu6,
    "rrelu": F.rrelu,
}
MODULES: dict[str, Callable[[], nn.Module]] = {
    "ReLU": nn.ReLU,
    "ReLU(inplace)": lambda: nn.ReLU(inplace=True),
    "ReLU6": nn.ReLU6,
    "GELU": nn.GELU,
    "LeakyReLU": lambda: nn.LeakyReLU(0.2),
    "LeakyReLU(inplace)": lambda: nn.LeakyReLU(0.2, inplace=True),
    "PReLU": nn.PReLU,
    "PReLU(D)": lambda: nn.PReLU(D),
    "SiLU": nn.SiLU,
    "SiLU(inplace)": lambda: nn.SiLU(inplace=True),
    "Hardswish": nn.Hardswish,
    "Hardswish(inplace)": lambda: nn.Hardswish(inplace=True),
    "ELU": nn.ELU,
    "Mish": nn.Mish,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functional_non_linearity_between_two_linear_layers(name: str, x: Tensor) -> None:
    act = FUNCTIONS[name]
    net = Net(lambda m, x: m.fc(act(m.first(x))), first=nn.Linear(IN, D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, act(net.first(x)))
    same(f.logits, net(x))
    same(f.classifier[0], net.fc.weight)
    same(f.classifier[1], net.fc.bias)
    assert_reproduces(f, "activation")
    assert_absent(f, "embedding")
    assert is_mlp_head(net, x)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_functional_non_linearity_that_no_module_boundary_sees(name: str, x: Tensor) -> None:
    act = FUNCTIONS[name]
    net = Net(
        lambda m, x: act(act(x @ m.V + m.c) @ m.U.T) @ m.W + m.b,
        V=parameter(IN, D), c=parameter(D), U=parameter(E, D), W=parameter(E, C), b=parameter(C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, act(act(x @ net.V + net.c) @ net.U.T))
    same(f.logits, net(x))
    same(f.classifier[0], net.W.T)
    same(f.classifier[1], net.b)


@pytest.mark.parametrize("name", MODULES)
def test_a_module_non_linearity(name: str, x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), MODULES[name](), nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, net[1](net[0](x)))
    assert_reproduces(f, "activation", net(x))


@pytest.mark.parametrize(
    "act",
    [
        torch.tanh,
        torch.sigmoid,
        F.softsign,
        lambda x: x.clamp(-1, 1),
        torch.sin,
        torch.abs,
        lambda x: x.softmax(1),
    ],
)
def test_without_a_rectifier_nan_does_not_apply_and_the_tap_says_so(
    act: Callable[[Tensor], Tensor], x: Tensor
) -> None:
    # The earlier ReLU is not the last hidden layer.
    net = Net(
        lambda m, x: m.fc(act(m.second(F.relu(m.first(x))))),
        first=nn.Linear(IN, D), second=nn.Linear(D, D), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.logits, net(x))
    assert_absent(f, "activation")
    words = FeatureTap(net).trace(x).describe()
    assert all(part in words for part in ("NAN", "do not apply", "layer="))
    same(f.pooled, act(net.second(F.relu(net.first(x)))))
    assert_reproduces(f, "pooled")


def test_one_relu_module_used_twice(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(m.relu(m.second(m.relu(m.first(x))))),
        first=nn.Linear(IN, D), second=nn.Linear(D, D), fc=nn.Linear(D, C), relu=nn.ReLU(),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.second(F.relu(net.first(x)))))
    assert_reproduces(f, "activation", net(x))


def test_one_relu_module_used_twice_the_second_time_after_the_hidden_layer(x: Tensor) -> None:
    # Its second call is on a branch that does not lead to the logits.
    net = Net(
        lambda m, x: (lambda h: {"logits": m.fc(h), "aux": m.relu(m.aux(h))})(m.relu(m.first(x))),
        relu=nn.ReLU(inplace=True), first=nn.Linear(IN, D), aux=nn.Linear(D, D), fc=nn.Linear(D, C),
    )  # fmt: skip
    same(tapped(net, x).activation, F.relu(net.first(x)))


# --- what may stand between the hidden layer and the classifier --------------------------------------------


@pytest.mark.parametrize("drop", [nn.Dropout(0.5), nn.Dropout(0.5, inplace=True), nn.Identity(), nn.Flatten()])
def test_dropout_after_the_non_linearity(drop: nn.Module, x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), drop, nn.Linear(D, C))
    net.train()
    f = FeatureTap(net)(x)
    net.eval()
    same(f.activation, F.relu(net[0](x)))
    assert_reproduces(f, "activation", net(x))


def test_batch_norm_before_the_non_linearity(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), batch_norm(D), nn.ReLU(), nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net[1](net[0](x))))
    assert_reproduces(f, "activation", net(x))
    assert is_mlp_head(net, x)


def test_a_layer_norm_after_the_non_linearity_leaves_no_classifier(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.LayerNorm(D), nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net[0](x)))
    same(f.logits, net(x))
    assert_absent(f, "classifier")
    assert "normali" in f.absent["classifier"]


@pytest.mark.parametrize("affine", [True, False])
def test_a_batch_norm_after_the_non_linearity_is_part_of_the_classifier(affine: bool, x: Tensor) -> None:
    norm = batch_norm(D) if affine else nn.BatchNorm1d(D, affine=False)
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), norm, nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net[0](x)))
    same(f.logits, net(x))
    assert_reproduces(f, "activation")


@pytest.mark.parametrize("norm", [batch_norm(D), nn.LayerNorm(D)])
def test_a_norm_after_the_hidden_layer_is_named(norm: nn.Module, x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), norm, nn.Linear(D, C))
    words = FeatureTap(net).trace(x).describe()
    assert "norm in `2` rescales it before the classifier" in words
    assert "recommends" not in words


def test_a_scaling_of_the_units_leaves_no_classifier(x: Tensor) -> None:
    net = Net(lambda m, x: m.fc(F.relu(m.a(x)) * m.s), a=nn.Linear(IN, D), s=parameter(D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net.a(x)))
    assert_absent(f, "classifier")


def test_a_shift_of_the_units_leaves_no_classifier(x: Tensor) -> None:
    net = Net(lambda m, x: m.fc(F.relu(m.a(x)) + m.s), a=nn.Linear(IN, D), s=parameter(D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net.a(x)))
    assert_absent(f, "classifier")


@pytest.mark.parametrize(
    "after",
    [
        lambda m, z: z + m.offset,
        lambda m, z: z - m.offset,
        lambda m, z: z / 4.0,
        lambda m, z: z * m.scale,
        lambda m, z: m.scale.exp() * z,
        lambda m, z: -z,
        lambda m, z: z * m.offset,
        lambda m, z: z + 1.0,
        lambda m, z: 1.0 - z,
    ],
    ids=["plus prior", "minus prior", "over T", "times scale", "exp scale", "negated", "by class", "+1", "1-z"],
)
def test_arithmetic_on_the_logits_is_in_the_classifier_or_there_is_none(
    after: Callable[[Any, Tensor], Tensor], x: Tensor
) -> None:
    net = Net(
        lambda m, x: after(m, m.fc(F.relu(m.first(x)))),
        first=nn.Linear(IN, D), fc=nn.Linear(D, C), offset=parameter(C), scale=nn.Parameter(torch.tensor(2.5)),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    same(f.logits, net(x))
    if f.classifier is None:
        assert f.absent["classifier"]
    else:
        assert_reproduces(f, "activation")


def test_a_scalar_between_hidden_layer_and_classifier(x: Tensor) -> None:
    net = Net(lambda m, x: m.fc(F.relu(m.first(x)) * 3.0), first=nn.Linear(IN, D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    if f.classifier is not None:
        assert_reproduces(f, "activation", net(x))


# --- embeddings and cosine heads ----------------------------------------------------------------------------


def test_two_linear_layers_multiply_into_the_classifier(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, E), nn.Linear(E, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net[0](x)))
    same(f.embedding, net[2](F.relu(net[0](x))))
    same(f.classifier[0], net[3].weight @ net[2].weight)
    same(f.classifier[1], net[3].weight @ net[2].bias + net[3].bias)
    assert_reproduces(f, "activation", net(x))


COSINES: dict[str, tuple[Callable[[Any, Tensor], Tensor], Callable[[], Any]]] = {
    "nn.Linear": (
        lambda m, g: F.linear(F.normalize(g), F.normalize(m.P.weight)) / 0.1,
        lambda: nn.Linear(E, C, bias=False),
    ),
    "parameter (C, e)": (lambda m, g: F.normalize(g) @ F.normalize(m.P, dim=1).T / 0.1, lambda: parameter(C, E)),
    "parameter (e, C)": (lambda m, g: F.normalize(g) @ F.normalize(m.P, dim=0) * 10, lambda: parameter(E, C)),
    "by hand": (
        lambda m, g: (
            (g / g.norm(dim=1, keepdim=True)).mm((m.P / m.P.norm(dim=1, keepdim=True)).t()) * m.scale.exp()
        ),
        lambda: parameter(C, E),
    ),
    "by hand, clamped": (
        lambda m, g: (
            F.linear(g / g.norm(dim=-1, keepdim=True).clamp(min=1e-6), F.normalize(m.P)) * torch.tensor(5.0)
        ),
        lambda: parameter(C, E),
    ),
    "by hand, square root": (
        lambda m, g: F.linear(g * (g.pow(2).sum(1, keepdim=True) + 1e-8).rsqrt(), F.normalize(m.P)),
        lambda: parameter(C, E),
    ),
}


@pytest.mark.parametrize("through", ["module", "parameter"])
@pytest.mark.parametrize("name", COSINES)
def test_a_cosine_head(name: str, through: str, x: Tensor) -> None:
    head, prototypes = COSINES[name]
    project = {"U": nn.Linear(D, E)} if through == "module" else {"U": parameter(E, D), "u": parameter(E)}

    def embed(m: Any, h: Tensor) -> Tensor:
        return m.U(h) if through == "module" else h @ m.U.T + m.u

    net = Net(
        lambda m, x: head(m, embed(m, F.relu(m.first(x)))),
        first=nn.Linear(IN, D), P=prototypes(), scale=nn.Parameter(torch.tensor(2.0)), **project,
    )  # fmt: skip
    f = tapped(net, x)
    hidden = F.relu(net.first(x))
    same(f.activation, hidden)
    same(f.embedding, embed(net, hidden))
    same(f.logits, net(x))
    rows = net.P.weight if name == "nn.Linear" else net.P.T if name == "parameter (e, C)" else net.P
    u = net.U.weight if through == "module" else net.U
    b = net.U.bias if through == "module" else net.u
    same(f.classifier[0], F.normalize(rows) @ u)
    same(f.classifier[1], F.normalize(rows) @ b)
    assert is_mlp_head(net, x)


def test_a_cosine_classifier_right_on_the_hidden_layer(x: Tensor) -> None:
    net = Net(
        lambda m, x: F.linear(F.normalize(F.relu(m.first(x))), F.normalize(m.P)) / 0.1,
        first=nn.Linear(IN, D), P=parameter(C, D),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    same(f.embedding, F.relu(net.first(x)))
    same(f.pooled, F.relu(net.first(x)))
    same(f.classifier[0], F.normalize(net.P))
    assert f.classifier[1] is None


def test_prototypes_of_unit_length_when_traced_are_still_normalised_afterwards(x: Tensor) -> None:
    net = Net(
        lambda m, x: F.normalize(m.U(F.relu(m.first(x)))) @ F.normalize(m.P, dim=1).T,
        first=nn.Linear(IN, D), U=nn.Linear(D, E, bias=False), P=nn.Parameter(F.normalize(torch.randn(C, E))),
    )  # fmt: skip
    tap = FeatureTap(net.eval())
    tap(x)
    with torch.no_grad():
        net.P.mul_(torch.tensor([[2.0], [3.0], [0.5]]))
    same(tap(x).classifier[0], F.normalize(net.P) @ net.U.weight)


def test_prototypes_that_are_kept_at_unit_length_elsewhere(x: Tensor) -> None:
    net = Net(
        lambda m, x: F.normalize(m.U(F.relu(m.first(x)))) @ m.P.T,
        first=nn.Linear(IN, D), U=nn.Linear(D, E, bias=False), P=F.normalize(torch.randn(C, E)),
    )  # fmt: skip
    same(tapped(net, x).classifier[0], net.P @ net.U.weight)


@pytest.mark.parametrize("last", ["weight_norm", "spectral_norm", "old_weight_norm"])
def test_a_parametrised_last_layer(last: str, x: Tensor) -> None:
    wrap = {
        "weight_norm": parametrizations.weight_norm,
        "spectral_norm": parametrizations.spectral_norm,
        "old_weight_norm": torch.nn.utils.weight_norm,
    }[last]
    with pytest.warns(FutureWarning) if last == "old_weight_norm" else _no_warning():
        net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), wrap(nn.Linear(D, C)))
    with torch.no_grad():
        net[2](torch.randn(4, D))
    net.eval()
    tap = FeatureTap(net)
    f = tap(x)
    same(f.activation, F.relu(net[0](x)))
    same(f.classifier[0], net[2].weight)
    assert_reproduces(f, "activation", net(x))
    with torch.no_grad():
        next(iter(net[2].parameters())).add_(1.0)
        for p in net[2].parameters():
            p.mul_(1.5)
    assert_reproduces(tap(x), "activation", net(x))


class _no_warning:
    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


# --- the last layer, functional -----------------------------------------------------------------------------


LAST: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "x @ W + b": lambda m, h: h @ m.W.T + m.b,
    "b + x @ W": lambda m, h: m.b + h @ m.W.T,
    "F.linear": lambda m, h: F.linear(h, m.W, m.b),
    "F.linear + b": lambda m, h: F.linear(h, m.W) + m.b,
    "addmm": lambda m, h: torch.addmm(m.b, h, m.W.t()),
    "einsum": lambda m, h: torch.einsum("nd,cd->nc", h, m.W) + m.b,
    "matmul": lambda m, h: torch.matmul(h, m.W.T).add_(m.b),
    "b unsqueezed": lambda m, h: h @ m.W.T + m.b[None, :],
    "baddbmm": lambda m, h: torch.matmul(h[:, None], m.W.T)[:, 0] + m.b,
    "W @ x": lambda m, h: (m.W @ h.T).T + m.b,
}


@pytest.mark.parametrize("name", LAST)
def test_a_functional_last_layer(name: str, x: Tensor) -> None:
    last = LAST[name]
    net = Net(lambda m, x: last(m, F.relu(m.first(x))), first=nn.Linear(IN, D), W=parameter(C, D), b=parameter(C))
    f = tapped(net, x)
    same(f.logits, net(x))
    if name in ("einsum", "W @ x") and f.activation is None:  # not understood, and said so: good enough
        assert_absent(f, "activation", "classifier")
        return
    same(f.activation, F.relu(net.first(x)))
    assert_reproduces(f, "activation")


def test_equal_weights_are_told_apart_by_which_of_them_ran(x: Tensor) -> None:
    # A copy of the weights, as for a moving average, has the same values when the network is traced.
    w = torch.randn(C, D)
    net = Net(
        lambda m, x: F.relu(x @ m.V + m.a) @ m.live.T + m.b,
        average=w.clone(), live=nn.Parameter(w.clone()), V=parameter(IN, D), a=parameter(D), b=parameter(C),
    )  # fmt: skip
    tap = FeatureTap(net)
    tap(x)
    with torch.no_grad():
        net.live.add_(1.0)
    assert_reproduces(tap(x), "activation", net(x))


def test_biases_that_start_at_zero_are_told_apart(x: Tensor) -> None:
    net = Net(
        lambda m, x: F.relu(x @ m.V + m.a) @ m.W + m.b,
        V=parameter(IN, C), a=nn.Parameter(torch.zeros(C)), W=parameter(C, C), b=nn.Parameter(torch.zeros(C)),
    )  # fmt: skip
    tap = FeatureTap(net)
    tap(x)
    with torch.no_grad():
        net.a.add_(1.0)
        net.b.add_(2.0)
    f = tap(x)
    same(f.classifier[1], net.b)
    assert_reproduces(f, "activation", net(x))


def test_the_classifier_is_read_anew_after_training(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
    tap = FeatureTap(net.eval())
    before = tap(x)
    old = before.classifier[0].clone()
    with torch.no_grad():
        net[2].weight.add_(1.0)
    assert_reproduces(tap(x), "activation", net(x))
    # Features extracted before are still consistent.
    torch.testing.assert_close(before.classifier[0], old)
    assert_reproduces(before, "activation")


# --- convolutional nets --------------------------------------------------------------------------------------


class SqueezeExcite(nn.Module):
    def __init__(self, width: int, gate: type[nn.Module] = nn.Sigmoid, conv: bool = True) -> None:
        super().__init__()
        self.conv = conv
        self.reduce = nn.Conv2d(width, 2, 1) if conv else nn.Linear(width, 2)
        self.relu = nn.ReLU(inplace=True)
        self.expand = nn.Conv2d(2, width, 1) if conv else nn.Linear(2, width)
        self.gate = gate()

    def forward(self, x: Tensor) -> Tensor:
        s = x.mean((2, 3), keepdim=True)
        s = s if self.conv else s.flatten(1)
        s = self.gate(self.expand(self.relu(self.reduce(s))))
        return x * (s if self.conv else s[:, :, None, None])


@pytest.mark.parametrize("conv", [True, False])
def test_the_relu_of_squeeze_excite_is_not_the_hidden_layer(conv: bool, images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(F.relu(m.last(m.se(F.relu(m.stem(x))))).mean((2, 3))),
        stem=nn.Conv2d(3, D, 3), se=SqueezeExcite(D, conv=conv), last=nn.Conv2d(D, D, 1), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.activation, F.relu(net.last(net.se(F.relu(net.stem(images))))).mean((2, 3)))
    assert_reproduces(f, "activation", net(images))
    assert "Table 6" in FeatureTap(net).trace(images).describe()


@pytest.mark.parametrize("gate", [nn.Sigmoid, nn.Hardsigmoid])
@pytest.mark.parametrize("conv", [True, False])
def test_squeeze_excite_right_before_the_pool(gate: type[nn.Module], conv: bool, images: Tensor) -> None:
    # A rectified map times a positive gate is a rectified map: a unit is off if and only if it was.
    net = Net(
        lambda m, x: m.fc(m.se(F.relu(m.stem(x))).mean((2, 3))),
        stem=nn.Conv2d(3, D, 3), se=SqueezeExcite(D, gate, conv), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.pooled, net.se(F.relu(net.stem(images))).mean((2, 3)))
    assert_reproduces(f, "pooled", net(images))
    same(f.activation, net.se(F.relu(net.stem(images))).mean((2, 3)))


POOLS: dict[str, Callable[[Tensor], Tensor]] = {
    "adaptive": lambda x: nn.AdaptiveAvgPool2d(1)(x).flatten(1),
    "adaptive squeeze": lambda x: F.adaptive_avg_pool2d(x, (1, 1)).squeeze(-1).squeeze(-1),
    "adaptive index": lambda x: F.adaptive_avg_pool2d(x, 1)[:, :, 0, 0],
    "avg_pool2d": lambda x: F.avg_pool2d(x, x.shape[-1]).view(len(x), -1),
    "mean": lambda x: x.mean((2, 3)),
    "mean twice": lambda x: x.mean(3).mean(2),
    "mean of flat": lambda x: x.flatten(2).mean(-1),
    "sum": lambda x: x.sum((-1, -2)),
    "max": lambda x: F.adaptive_max_pool2d(x, 1).flatten(1),
    "max_pool2d": lambda x: F.max_pool2d(x, x.shape[-1]).reshape(len(x), -1),
    "amax": lambda x: x.amax((2, 3)),
    "max over flat": lambda x: x.flatten(2).max(2).values,
    "channels last": lambda x: x.permute(0, 2, 3, 1).reshape(len(x), -1, x.shape[1]).mean(1),
    "avg + max": lambda x: 0.5 * (x.mean((2, 3)) + x.amax((2, 3))),
    "avg, max joined": lambda x: torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1),
    "power mean": lambda x: F.adaptive_avg_pool2d(x.clamp(min=1e-6).pow(3.0), 1).pow(1 / 3).flatten(1),
    "flatten": lambda x: x.flatten(1),
    "avg 2x2, flatten": lambda x: F.adaptive_avg_pool2d(x, 2).flatten(1),
}


@pytest.mark.parametrize("name", POOLS)
def test_a_pool_of_rectified_maps(name: str, images: Tensor) -> None:
    pool = POOLS[name]
    width = {"avg, max joined": 2 * D, "flatten": 36 * D, "avg 2x2, flatten": 4 * D}.get(name, D)
    net = Net(
        lambda m, x: m.fc(pool(F.relu(m.norm(m.conv(x)), inplace=True))),
        conv=nn.Conv2d(3, D, 3), norm=nn.BatchNorm2d(D), fc=nn.Linear(width, C),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.pooled, pool(F.relu(net.norm(net.conv(images)))))
    if name == "power mean":  # a floor above zero: no unit is ever off
        return
    same(f.activation, f.pooled)
    assert_absent(f, "embedding")
    assert_reproduces(f, "pooled", net(images))
    assert "Table 6" in FeatureTap(net).trace(images).describe()


def test_a_pool_of_rectified_maps_times_a_constant(images: Tensor) -> None:
    # As in NFNet.
    net = Net(
        lambda m, x: m.fc((F.gelu(m.conv(x)) * 1.7015).mean((2, 3))), conv=nn.Conv2d(3, D, 3), fc=nn.Linear(D, C)
    )
    f = tapped(net, images)
    same(f.activation, (F.gelu(net.conv(images)) * 1.7015).mean((2, 3)))
    assert_reproduces(f, "activation", net(images))


def test_an_mlp_head_on_a_pool(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.head(F.relu(m.conv(x)).mean((2, 3))),
        conv=nn.Conv2d(3, D, 3),
        head=nn.Sequential(nn.Linear(D, 7), nn.BatchNorm1d(7), nn.ReLU(), nn.Dropout(), nn.Linear(7, C)),
    )
    f = tapped(net, images)
    pooled = F.relu(net.conv(images)).mean((2, 3))
    same(f.pooled, pooled)
    same(f.activation, F.relu(net.head[1](net.head[0](pooled))))
    assert_reproduces(f, "activation", net(images))
    assert is_mlp_head(net, images)


@pytest.mark.parametrize("norm", [nn.LayerNorm(D), batch_norm(D)])
def test_a_norm_between_pool_and_classifier(norm: nn.Module, images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(m.norm(F.relu(m.conv(x)).mean((2, 3)))),
        conv=nn.Conv2d(3, D, 3), norm=norm, fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, images)
    pooled = F.relu(net.conv(images)).mean((2, 3))
    if isinstance(norm, nn.LayerNorm):
        same(f.pooled, net.norm(pooled))
        assert_absent(f, "activation")
        assert "normalization" in FeatureTap(net).trace(images).describe()
    else:  # which is part of the classifier
        same(f.pooled, pooled)
        same(f.activation, pooled)
    assert_reproduces(f, "pooled", net(images))


def test_a_residual_sum_that_is_rectified_before_the_pool(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc((lambda h: F.relu(h + m.b(h)))(F.relu(m.a(x))).mean((2, 3))),
        a=nn.Conv2d(3, D, 3), b=nn.Conv2d(D, D, 3, padding=1), fc=nn.Linear(D, C),
    )  # fmt: skip
    h = F.relu(net.a(images))
    f = tapped(net, images)
    same(f.activation, F.relu(h + net.b(h)).mean((2, 3)))
    assert_reproduces(f, "activation", net(images))


def test_a_residual_sum_of_rectified_maps(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc((lambda h: h + F.relu(m.b(h)))(F.relu(m.a(x))).mean((2, 3))),
        a=nn.Conv2d(3, D, 3), b=nn.Conv2d(D, D, 3, padding=1), fc=nn.Linear(D, C),
    )  # fmt: skip
    h = F.relu(net.a(images))
    same(tapped(net, images).activation, (h + F.relu(net.b(h))).mean((2, 3)))


def test_a_residual_sum_that_is_not_rectified(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc((lambda h: h + m.b(h))(F.relu(m.a(x))).mean((2, 3))),
        a=nn.Conv2d(3, D, 3), b=nn.Conv2d(D, D, 3, padding=1), fc=nn.Linear(D, C),
    )  # fmt: skip
    h = F.relu(net.a(images))
    f = tapped(net, images)
    assert_absent(f, "activation")
    same(f.pooled, (h + net.b(h)).mean((2, 3)))
    assert_reproduces(f, "pooled", net(images))


def test_a_deep_sum_of_sums_is_found_quickly(images: Tensor) -> None:
    # 2^18 ways lead back from the pool to the ReLU, over 37 operations.
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(m.conv(x))
        for _ in range(18):
            h = F.avg_pool2d(h, 1) + F.max_pool2d(h, 1)
        return m.fc(h.mean((2, 3)))

    net = Net(run, conv=nn.Conv2d(3, D, 7), fc=nn.Linear(D, C))
    start = time.process_time()
    f = tapped(net, images)
    assert time.process_time() - start < 1
    same(f.pooled, F.relu(net.conv(images)).mean((2, 3)) * 2**18)


def test_the_concatenation_of_rectified_maps(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(torch.cat([F.relu(m.a(x)), F.silu(m.b(x))], 1).mean((2, 3))),
        a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(3, 3, 3), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.activation, torch.cat([F.relu(net.a(images)), F.silu(net.b(images))], 1).mean((2, 3)))
    assert_reproduces(f, "activation", net(images))


def test_a_concatenation_of_which_a_part_is_not_rectified(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(torch.cat([F.relu(m.a(x)), m.b(x)], 1).mean((2, 3))),
        a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(3, 3, 3), fc=nn.Linear(D, C),
    )  # fmt: skip
    assert_absent(tapped(net, images), "activation")


def test_the_concatenation_of_two_hidden_vectors(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(torch.cat([F.relu(m.a(x)), F.relu(m.b(x))], 1)),
        a=nn.Linear(IN, 5), b=nn.Linear(IN, 3), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, torch.cat([F.relu(net.a(x)), F.relu(net.b(x))], 1))
    assert_reproduces(f, "activation", net(x))


def test_a_vector_that_is_filled_in_part_by_part(x: Tensor) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = x.new_empty(len(x), D)
        h[:, :5] = F.relu(m.a(x))
        h[:, 5:] = F.relu(m.b(x))
        return m.fc(h)

    net = Net(run, a=nn.Linear(IN, 5), b=nn.Linear(IN, 3), fc=nn.Linear(D, C))
    f = tapped(net, x)
    whole = torch.cat([F.relu(net.a(x)), F.relu(net.b(x))], 1)
    same(f.logits, net(x))
    same(f.pooled, whole)
    if f.activation is not None:
        same(f.activation, whole)


def test_a_convolution_as_classifier(images: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(F.relu(m.conv(x)).mean((2, 3), keepdim=True)).flatten(1),
        conv=nn.Conv2d(3, D, 3), fc=nn.Conv2d(D, C, 1),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.activation, F.relu(net.conv(images)).mean((2, 3)))
    same(f.classifier[0], net.fc.weight.flatten(1))
    assert_reproduces(f, "activation", net(images))


def test_a_hidden_convolution_after_the_pool(images: Tensor) -> None:
    # MobileNetV3 of timm: pool, 1x1 convolution, Hardswish, flatten, linear.
    net = Net(
        lambda m, x: m.fc(F.hardswish(m.head(F.relu(m.conv(x)).mean((2, 3), keepdim=True))).flatten(1)),
        conv=nn.Conv2d(3, D, 3), head=nn.Conv2d(D, 7, 1), fc=nn.Linear(7, C),
    )  # fmt: skip
    f = tapped(net, images)
    pooled = F.relu(net.conv(images)).mean((2, 3))
    same(f.pooled, pooled)
    same(f.activation, F.hardswish(net.head(pooled[:, :, None, None])).flatten(1))
    assert is_mlp_head(net, images)


def test_a_convolution_as_classifier_before_the_pool(images: Tensor) -> None:
    # SqueezeNet, NiN: the model returns the mean of class maps, which are logits and not features.
    net = Net(lambda m, x: m.fc(F.relu(m.conv(x))).mean((2, 3)), conv=nn.Conv2d(3, D, 3), fc=nn.Conv2d(D, C, 1))
    f = tapped(net, images)
    same(f.logits, net(images))
    if f.classifier is not None:
        assert_reproduces(f, "pooled")


# --- what the model returns ----------------------------------------------------------------------------------


def mlp(run: Callable[[Any, Tensor, Tensor], Any], **more: Any) -> Net:
    """A network whose `run` gets the hidden layer and the logits."""

    def forward(m: Any, x: Tensor) -> Any:
        h = F.relu(m.first(x))
        return run(m, h, m.fc(h))

    return Net(forward, first=nn.Linear(IN, D), fc=nn.Linear(D, C), **more)


OUTPUTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "softmax": lambda m, h, z: z.softmax(1),
    "log_softmax": lambda m, h, z: F.log_softmax(z, dim=-1),
    "softmax of float": lambda m, h, z: F.softmax(z.double(), dim=1),
    "sigmoid": lambda m, h, z: z.sigmoid(),
    "dict": lambda m, h, z: {"logits": z},
    "dict with more": lambda m, h, z: {"loss": h.mean(), "features": h, "logits": z, "probs": z.softmax(1)},
    "dict, probabilities last": lambda m, h, z: {"features": h, "scores": z, "probs": z.softmax(1)},
    "dict by another name": lambda m, h, z: {"out": z},
    "nested": lambda m, h, z: {"heads": {"main": z}, "n": 3},
    "(features, logits)": lambda m, h, z: (h, z),
    "(logits, features)": lambda m, h, z: (z, h),
    "(logits, aux)": lambda m, h, z: (z, m.aux(m.first(h[:, :IN]))),
    "(logits, None)": lambda m, h, z: (z, None),
    "[logits]": lambda m, h, z: [z],
    "(logits, probs)": lambda m, h, z: (z, z.softmax(1)),
    "(logits, argmax)": lambda m, h, z: (z, z.argmax(1)),
    "(copy of features, logits)": lambda m, h, z: (h.clone(), z),
    "(normalised features, logits)": lambda m, h, z: (F.normalize(h), z),
    "(normalised projection, logits)": lambda m, h, z: (F.normalize(m.aux(h)), z),
    "named tuple": lambda m, h, z: namedtuple("Out", "features logits")(h, z),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_the_logits_among_what_the_model_returns(name: str, x: Tensor) -> None:
    net = mlp(OUTPUTS[name], aux=nn.Linear(D, 2))
    h = F.relu(net.first(x))
    f = tapped(net, x)
    assert f.logits is not None, f.absent
    same(f.logits.float(), net.fc(h))
    same(f.activation, h)
    same(f.classifier[0], net.fc.weight)
    assert_absent(f, "embedding")


def test_a_model_without_classifier(images: Tensor) -> None:
    net = Net(lambda m, x: F.relu(m.conv(x)).mean((2, 3)), conv=nn.Conv2d(3, D, 3))
    f = tapped(net, images)
    same(f.activation, net(images))
    same(f.pooled, net(images))
    assert_absent(f, "logits", "classifier", "embedding")


class RMSNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.rand(D))

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * self.weight


@pytest.mark.parametrize("norm", [RMSNorm, lambda: nn.RMSNorm(D), lambda: nn.LayerNorm(D)])
@pytest.mark.parametrize("where", ["tokens", "pool"])
@pytest.mark.parametrize("head", [True, False])
def test_a_norm_before_the_head_or_the_end(norm: Callable[[], nn.Module], where: str, head: bool) -> None:
    def features(m: Any, x: Tensor) -> Tensor:
        return m.norm(x).mean(1) if where == "tokens" else m.norm(x.mean(1))

    tokens = torch.randn(N, 7, D)
    net = Net(lambda m, x: m.fc(features(m, x)), norm=norm(), fc=nn.Linear(D, C) if head else nn.Identity())
    f = tapped(net, tokens)
    same(f.pooled, features(net, tokens))
    assert_absent(f, "embedding", "activation")
    assert "a layer normalization (`norm`) before the head cancels the norm" in f.absent["activation"]
    if head:
        assert_reproduces(f, "pooled", net(tokens))
    else:
        assert_absent(f, "logits")


def test_the_mean_of_two_tokens_is_the_feature_that_is_returned() -> None:
    # A distilled DeiT without its heads.
    tokens = torch.randn(N, 7, D)
    net = Net(lambda m, x: (lambda h: (h[:, 0] + h[:, 1]) / 2)(m.norm(x)), norm=nn.LayerNorm(D))
    f = tapped(net, tokens)
    same(f.pooled, net(tokens))
    assert_absent(f, "logits", "classifier")


def test_a_model_that_returns_its_hidden_vector(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU())
    f = tapped(net, x)
    same(f.activation, net(x))
    assert_absent(f, "logits", "classifier")


@pytest.mark.parametrize("bare", ["F.normalize", "by hand"])
def test_a_contrastive_model_that_returns_normalised_embeddings(bare: str, images: Tensor) -> None:
    def unit(g: Tensor) -> Tensor:
        return F.normalize(g, dim=1) if bare == "F.normalize" else g / g.norm(dim=1, keepdim=True)

    net = Net(
        lambda m, x: unit(m.head(F.relu(m.conv(x)).mean((2, 3)))),
        conv=nn.Conv2d(3, D, 3), head=nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, E)),
    )  # fmt: skip
    f = tapped(net, images)
    pooled = F.relu(net.conv(images)).mean((2, 3))
    same(f.pooled, pooled)
    same(f.activation, F.relu(net.head[0](pooled)))
    same(f.embedding, net.head(pooled))
    assert_absent(f, "logits", "classifier")
    assert is_mlp_head(net, images)


def test_auxiliary_heads_in_evaluation(images: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: {"aux": m.aux(h.mean((2, 3))), "logits": m.fc(F.relu(m.b(h)).mean((2, 3)))})(
            F.relu(m.a(x))
        ),
        a=nn.Conv2d(3, 5, 3), b=nn.Conv2d(5, D, 3), fc=nn.Linear(D, C),
        aux=nn.Sequential(nn.Linear(5, 9), nn.ReLU(), nn.Linear(9, C)),
    )  # fmt: skip
    f = tapped(net, images)
    same(f.activation, F.relu(net.b(F.relu(net.a(images)))).mean((2, 3)))
    assert_reproduces(f, "activation", net(images)["logits"])


def test_a_model_that_returns_only_maps_is_refused(images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"logits or features.*\(2, 8, 6, 6\)"):
        tapped(nn.Conv2d(3, D, 3), images)


# --- registration order, functions, sharing, loops ------------------------------------------------------------


def test_a_module_registered_last_that_never_runs(x: Tensor) -> None:
    net = mlp(lambda m, h, z: z, unused=nn.Sequential(nn.Linear(D, 9), nn.ReLU(), nn.Linear(9, C)))
    same(tapped(net, x).activation, F.relu(net.first(x)))


def test_a_module_registered_last_that_runs_first(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(m.act(m.b(m.a(x)))),
        fc=nn.Linear(D, C), b=nn.Linear(7, D), act=nn.ReLU(), a=nn.Sequential(nn.Linear(IN, 7), nn.ReLU()),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.b(net.a(x))))
    assert_reproduces(f, "activation", net(x))


@pytest.mark.parametrize("when", ["before", "after"])
def test_an_unrelated_module_that_runs(when: str, x: Tensor) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        if when == "before":
            m.other(x)
        z = m.fc(F.relu(m.first(x)))
        if when == "after":
            m.other(x)
        return z

    other = nn.Sequential(nn.Linear(IN, 9), nn.ReLU(), nn.Linear(9, C))
    net = Net(run, first=nn.Linear(IN, D), fc=nn.Linear(D, C), other=other)
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    assert_reproduces(f, "activation", net(x))


@pytest.mark.parametrize(
    "spoil", [lambda h: h.zero_(), lambda h: h.add_(1), lambda h: h.view(-1).fill_(7), lambda h: h[:, :2].mul_(0)]
)
@pytest.mark.parametrize("functional", [True, False])
def test_the_captured_tensor_is_overwritten_afterwards(
    spoil: Callable[[Tensor], Tensor], functional: bool, x: Tensor
) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = F.relu(x @ m.V) if functional else m.act(m.first(x))
        z = h @ m.W if functional else m.fc(h)
        spoil(h)
        out = z.clone()
        spoil(z)
        return out

    net = Net(
        run, V=parameter(IN, D), W=parameter(D, C), first=nn.Linear(IN, D), fc=nn.Linear(D, C), act=nn.ReLU()
    )
    f = tapped(net, x)
    same(f.activation, F.relu(x @ net.V) if functional else F.relu(net.first(x)))
    same(f.logits, net(x))


def test_the_hidden_layer_is_rectified_in_place_after_it_was_read_elsewhere(x: Tensor) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        h = m.first(x)
        m.other(h)  # sees it before the ReLU
        F.relu_(h)
        return m.fc(h)

    net = Net(run, first=nn.Linear(IN, D), other=nn.Identity(), fc=nn.Linear(D, C))
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    assert_reproduces(f, "activation", net(x))


def test_a_buffer_that_every_batch_writes_anew(x: Tensor) -> None:
    def run(m: Any, x: Tensor) -> Tensor:
        m.cache.copy_(F.relu(m.first(x)))
        return m.fc(m.cache)

    net = Net(run, first=nn.Linear(IN, D), fc=nn.Linear(D, C), cache=torch.zeros(2, D))
    f = FeatureTap(net.eval()).extract([x[:2], x[2:4]])
    hidden = F.relu(net.first(x[:4]))
    same(f.logits, net.fc(hidden))
    same(f.pooled, hidden)


class Loop(nn.Module):
    """A network that runs `act` a number of times that depends on the data."""

    def __init__(self, functional: bool) -> None:
        super().__init__()
        self.step, self.fc, self.act = nn.Linear(IN, IN), nn.Linear(IN, C), nn.ReLU()
        self.functional = functional

    def hidden(self, x: Tensor) -> Tensor:
        h = x
        for _ in range(int(x[0, 0].abs())):
            h = F.relu(self.step(h)) if self.functional else self.act(self.step(h))
        return h

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.hidden(x))


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize(("first", "then"), [(2.0, 4.0), (4.0, 2.0), (3.0, 3.0)])
def test_call_counts_that_depend_on_the_data(functional: bool, first: float, then: float, x: Tensor) -> None:
    net = Loop(functional).eval()
    one, two = x.clone(), x.clone()
    one[0, 0], two[0, 0] = first, then
    tap = FeatureTap(net)
    same(tap(one).activation, net.hidden(one))
    f = tap(two)
    same(f.activation, net.hidden(two))
    assert_reproduces(f, "activation", net(two))


@pytest.mark.parametrize(("first", "then"), [(2.0, 4.0), (4.0, 2.0)])
def test_where_the_pass_cannot_be_followed_the_tap_refuses_and_never_errs(
    first: float, then: float, x: Tensor
) -> None:
    # The forward pass consists of operations only, without modules.
    def run(m: Any, x: Tensor) -> Tensor:
        h = x
        for _ in range(int(x[0, 0].abs())):
            h = F.relu(h @ m.V)
        return h @ m.W

    net = Net(run, V=parameter(IN, IN), W=parameter(IN, C)).eval()
    one, two = x.clone(), x.clone()
    one[0, 0], two[0, 0] = first, then
    tap = FeatureTap(net)
    tap(one)
    try:
        f = tap(two)
    except RuntimeError as error:
        assert "traced" in str(error)  # noqa: PT017
    else:
        assert_reproduces(f, "activation", net(two))


def test_shared_weights(x: Tensor) -> None:
    layer = nn.Linear(IN, IN)
    net = Net(lambda m, x: m.fc(F.relu(m.b(F.relu(m.a(x))))), a=layer, b=layer, fc=nn.Linear(IN, C))
    f = tapped(net, x)
    same(f.activation, F.relu(layer(F.relu(layer(x)))))
    assert_reproduces(f, "activation", net(x))


def test_a_module_that_is_registered_under_two_names_answers_to_both(x: Tensor) -> None:
    act = nn.ReLU()
    net = Net(
        lambda m, x: m.fc(m.alias(m.first(x))), act=act, alias=act, first=nn.Linear(IN, D), fc=nn.Linear(D, C)
    )
    for layer in ("act", "alias", act):
        same(tapped(net, x, layer).activation, F.relu(net.first(x)))


def test_a_tied_classifier(x: Tensor) -> None:
    # An autoencoder's decoder or a language model's head: the weight of the first layer, transposed.
    net = Net(
        lambda m, x: F.linear(F.relu(m.mid(F.relu(m.first(x)))), m.first.weight.T, m.b),
        first=nn.Linear(IN, D), mid=nn.Linear(D, D), b=parameter(IN),
    )  # fmt: skip
    f = tapped(net, x)
    assert_reproduces(f, "activation", net(x))
    same(f.classifier[0], net.first.weight.T)


# --- other kinds of nets --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_a_recurrent_classifier(kind: Any) -> None:
    sequences = torch.randn(N, 7, IN)
    net = Net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=kind(IN, D, batch_first=True), fc=nn.Linear(D, C))
    f = tapped(net, sequences)
    same(f.pooled, net.rnn(sequences)[0][:, -1])
    assert_reproduces(f, "pooled", net(sequences))
    assert_absent(f, "activation")


def test_the_final_state_of_a_recurrent_net_with_an_mlp_head() -> None:
    sequences = torch.randn(N, 7, IN)
    net = Net(
        lambda m, x: m.fc(F.relu(m.hidden(m.rnn(x)[1][0][-1]))),
        rnn=nn.LSTM(IN, D, batch_first=True), hidden=nn.Linear(D, 9), fc=nn.Linear(9, C),
    )  # fmt: skip
    f = tapped(net, sequences)
    same(f.activation, F.relu(net.hidden(net.rnn(sequences)[1][0][-1])))
    assert_reproduces(f, "activation", net(sequences))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.n1, self.n2 = nn.LayerNorm(D), nn.LayerNorm(D)
        self.attn = nn.MultiheadAttention(D, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(D, 16), nn.GELU(), nn.Linear(16, D))

    def forward(self, x: Tensor) -> Tensor:
        y = self.n1(x)
        x = x + self.attn(y, y, y, need_weights=False)[0]
        return x + self.mlp(self.n2(x))


@pytest.mark.parametrize("pool", ["token", "mean"])
@pytest.mark.parametrize("norm", [True, False])
def test_a_transformer(pool: str, norm: bool) -> None:
    tokens = torch.randn(N, 7, D)

    def trunk(m: Any, x: Tensor) -> Tensor:
        x = m.norm(m.blocks(x))
        return x[:, 0] if pool == "token" else x.mean(1)

    net = Net(
        lambda m, x: m.fc(trunk(m, x)),
        blocks=nn.Sequential(Block(), Block()), norm=nn.LayerNorm(D) if norm else nn.Identity(),
        fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, tokens)
    assert_absent(f, "activation")
    same(f.pooled, trunk(net, tokens))
    assert_reproduces(f, "pooled", net(tokens))
    words = FeatureTap(net).trace(tokens).describe()
    assert "do not apply" in words
    assert ("normalization" in words) == norm


@pytest.mark.parametrize("functional", [True, False])
@pytest.mark.parametrize("activation", ["relu", "gelu"])
def test_a_transformer_of_torch_with_an_mlp_head(functional: bool, activation: str) -> None:
    # In evaluation torch takes a fast path through its encoder, but not where a hook listens to one of its
    # modules: the operations that a tap counts are not the same.
    tokens = torch.randn(N, 7, D)
    layer = nn.TransformerEncoderLayer(D, 2, 16, activation=activation, batch_first=True)
    net = Net(
        lambda m, x: (
            F.relu(m.encoder(x)[:, 0] @ m.V) @ m.W
            if functional
            else m.head(m.encoder(x)[:, 0])
        ),
        encoder=nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), V=parameter(D, D), W=parameter(D, C),
        head=nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, C)),
    )  # fmt: skip
    f = tapped(net, tokens)
    cls = plain(net.encoder, tokens)[:, 0]
    hidden = F.relu(cls @ net.V) if functional else F.relu(net.head[0](cls))
    same(f.activation, hidden)
    same(f.pooled, cls)
    assert_reproduces(f, "activation", plain(net, tokens))


@pytest.mark.parametrize(
    "glu",
    [
        lambda m, x: F.glu(m.up(x)),
        lambda m, x: (lambda a, b: a * F.gelu(b))(*m.up(x).chunk(2, 1)),
        lambda m, x: (lambda a, b: F.silu(a) * b)(*m.up(x).chunk(2, 1)),
        lambda m, x: (lambda a, b: a * b.sigmoid())(*m.up(x).chunk(2, 1)),
    ],
    ids=["glu", "geglu", "swiglu", "by hand"],
)
def test_a_gated_linear_unit_is_no_rectifier(glu: Callable[[Any, Tensor], Tensor], x: Tensor) -> None:
    net = Net(lambda m, x: m.fc(glu(m, x)), up=nn.Linear(IN, 2 * D), fc=nn.Linear(D, C))
    f = tapped(net, x)
    assert_absent(f, "activation")
    same(f.pooled, glu(net, x))
    assert_reproduces(f, "pooled", net(x))


def test_a_positive_gate_on_the_hidden_vector_is_in_what_the_classifier_reads(x: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: m.fc(h * m.gate(h).sigmoid()))(F.relu(m.first(x))),
        first=nn.Linear(IN, D), gate=nn.Linear(D, D), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, x)
    h = F.relu(net.first(x))
    same(f.pooled, h * net.gate(h).sigmoid())
    assert_reproduces(f, "pooled", net(x))


def test_a_logistic_regression(x: Tensor) -> None:
    f = tapped(nn.Linear(IN, C), x)
    assert_absent(f, "activation", "embedding")
    same(f.pooled, x)
    assert f.classifier is not None


def test_an_mlp_on_flat_images(images: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, D), nn.ReLU(), nn.Linear(D, C))
    f = tapped(net, images)
    same(f.activation, F.relu(net[1](images.flatten(1))))
    assert_reproduces(f, "activation", net(images))


def test_a_vector_residual_block(x: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: m.fc(h + m.b(F.relu(m.a(h)))))(F.relu(m.first(x))),
        first=nn.Linear(IN, D), a=nn.Linear(D, 5), b=nn.Linear(5, D), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, x)
    h = F.relu(net.first(x))
    same(f.pooled, h + net.b(F.relu(net.a(h))))
    assert_absent(f, "activation")
    assert_reproduces(f, "pooled", net(x))


def test_a_sum_of_two_heads(x: Tensor) -> None:
    net = Net(
        lambda m, x: (lambda h: (m.a(h) + m.b(h)) / 2)(F.relu(m.first(x))),
        first=nn.Linear(IN, D), a=nn.Linear(D, C), b=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.logits, net(x))
    if f.classifier is not None:
        assert_reproduces(f, "activation")


def test_a_net_with_a_sparse_buffer(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(F.relu(m.first(torch.sparse.mm(m.graph, x.T).T))),
        first=nn.Linear(IN, D), fc=nn.Linear(D, C), graph=torch.eye(IN).to_sparse(),
    )  # fmt: skip
    f = tapped(net, x)
    same(f.activation, F.relu(net.first(x)))
    assert_reproduces(f, "activation", net(x))


# --- batch size, precision, wrappers -------------------------------------------------------------------------


@pytest.mark.parametrize("first", [1, N])
def test_one_input(first: int, x: Tensor, images: Tensor) -> None:
    dense = nn.Sequential(nn.Linear(IN, D), batch_norm(D), nn.ReLU(), nn.Linear(D, C)).eval()
    conv = nn.Sequential(
        nn.Conv2d(3, D, 3), nn.BatchNorm2d(D), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C)
    ).eval()
    for net, inputs, upto in ((dense, x, 3), (conv, images, 5)):
        tap = FeatureTap(net.train())
        tap(inputs[:first])
        for i in range(N):
            f = tap(inputs[i : i + 1])
            net.eval()
            same(f.activation, net[:upto](inputs[i : i + 1]))
            assert_reproduces(f, "activation", net(inputs[i : i + 1]))
            net.train()


def test_a_width_of_one(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, 1), nn.ReLU(), nn.Linear(1, 1))
    f = tapped(net, x)
    same(f.activation, F.relu(net[0](x)))
    assert_reproduces(f, "activation", torch.cat([-net(x), net(x)], 1) / 2)


def test_gray_images_of_one_pixel_row() -> None:
    images = torch.randn(1, 1, 1, 9)
    net = nn.Sequential(nn.Conv2d(1, D, (1, 3)), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C))
    f = tapped(net, images)
    same(f.activation, net[:4](images))
    assert_reproduces(f, "activation", net(images))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["dense", "conv", "functional"])
def test_other_precisions(dtype: torch.dtype, kind: str, x: Tensor, images: Tensor) -> None:
    nets = {
        "dense": (nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)), x, 2),
        "conv": (
            nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(D, C)),
            images,
            4,
        ),
        "functional": (
            Net(lambda m, x: F.relu(x @ m.V) @ m.W + m.b, V=parameter(IN, D), W=parameter(D, C), b=parameter(C)),
            x,
            0,
        ),
    }
    net, inputs, upto = nets[kind]
    net, inputs = net.to(dtype).eval(), inputs.to(dtype)
    f = tapped(net, inputs)
    expected = F.relu(inputs @ net.V) if kind == "functional" else plain(net[:upto], inputs)
    assert f.activation.dtype == f.logits.dtype == f.classifier[0].dtype == dtype
    assert torch.equal(f.activation, expected)
    assert torch.equal(f.logits, plain(net, inputs))
    out = f.activation.double() @ f.classifier[0].T.double() + f.classifier[1].double()
    torch.testing.assert_close(out, f.logits.double(), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_describing_a_net_of_another_precision_before_any_input(dtype: torch.dtype) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).to(dtype)
    assert "Last hidden layer: 8 units" in FeatureTap(net).describe()


def test_under_autocast(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).eval()
    tap = FeatureTap(net)
    with torch.autocast("cpu", torch.bfloat16):
        f = tap(x)
        same(f.activation, plain(net[:2], x))
    same(f.classifier[0], net[2].weight)
    same(tap(x).activation, plain(net[:2], x))


@pytest.mark.parametrize("traced_in", [True, False])
@pytest.mark.parametrize("functional", [True, False])
def test_inference_mode_inside_and_outside(traced_in: bool, functional: bool, x: Tensor) -> None:
    net = (
        Net(
            lambda m, x: F.linear(F.relu(F.linear(x, m.V)), m.W, m.b),
            V=parameter(D, IN), W=parameter(C, D), b=parameter(C),
        )
        if functional
        else nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C))
    )  # fmt: skip
    hidden = F.relu(x @ net.V.T) if functional else F.relu(net[0](x))
    tap = FeatureTap(net.eval())
    for inside in (traced_in, not traced_in):
        with torch.inference_mode(inside):
            f = tap(x)
            same(f.activation, hidden)
            assert_reproduces(f, "activation", plain(net, x))


WRAPPERS: dict[str, Callable[[nn.Module], nn.Module]] = {
    "DataParallel": nn.DataParallel,
    "compile": lambda m: torch.compile(m, backend="eager"),
    "compiled DataParallel": lambda m: torch.compile(nn.DataParallel(m), backend="eager"),
    "fx": torch.fx.symbolic_trace,
    "Sequential": nn.Sequential,
}


@pytest.mark.parametrize("name", WRAPPERS)
@pytest.mark.parametrize("functional", [True, False])
def test_a_wrapped_model(name: str, functional: bool, x: Tensor) -> None:
    if functional:
        net = Net(lambda m, x: F.relu(x @ m.V) @ m.W, V=parameter(IN, D), W=parameter(D, C)).eval()
        if name == "fx":
            pytest.skip("a function kept as an attribute is traced as itself")
        hidden = F.relu(x @ net.V)
    else:
        net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).eval()
        hidden = net[:2](x)
    wrapped = WRAPPERS[name](net).eval()
    expected = plain(wrapped, x)
    f = tapped(wrapped, x)
    same(f.activation, hidden)
    same(f.logits, expected)
    assert_reproduces(f, "activation")
    torch.testing.assert_close(plain(wrapped, x), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_model_compiled_in_place(when: str, x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).eval()
    hidden, logits = plain(net[:2], x), plain(net, x)
    net.compile(backend="eager")
    if when == "after":
        plain(net, x)
    f = tapped(net, x)
    same(f.activation, hidden)
    same(f.logits, logits)
    torch.testing.assert_close(plain(net, x), logits)


@pytest.mark.parametrize("ran", [True, False])
def test_a_part_that_is_compiled(ran: bool, x: Tensor) -> None:
    trunk = nn.Sequential(nn.Linear(IN, D), nn.ReLU())
    net = nn.Sequential(torch.compile(trunk, backend="eager"), nn.Linear(D, C)).eval()
    if ran:
        plain(net, x)
    f = tapped(net, x)
    same(f.activation, trunk(x))
    assert_reproduces(f, "activation", plain(net, x))


# --- layer= ---------------------------------------------------------------------------------------------------


@pytest.fixture
def cnn() -> nn.Module:
    return Net(
        lambda m, x: m.head(m.pool(m.trunk(x)).flatten(1)),
        trunk=nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU()), pool=nn.AdaptiveAvgPool2d(1),
        head=nn.Sequential(nn.Linear(5, D), nn.ReLU(), nn.Linear(D, C)), unused=nn.Linear(2, 2),
        stranger_to_vectors=nn.Identity(),
    ).eval()  # fmt: skip


@pytest.mark.parametrize("by_module", [True, False])
def test_a_layer_that_is_chosen(by_module: bool, cnn: Any, images: Tensor) -> None:
    pooled = cnn.pool(cnn.trunk(images)).flatten(1)
    for name, expected in {"head.1": cnn.head[:2](pooled), "pool": pooled, "head.0": cnn.head[0](pooled)}.items():
        f = tapped(cnn, images, cnn.get_submodule(name) if by_module else name)
        same(f.activation, expected)
        same(f.logits, cnn(images))
        if name == "head.1":
            assert_reproduces(f, "activation")
        else:
            assert_absent(f, "classifier")
        assert "8 units" in FeatureTap(cnn, name).trace(images).describe() or name == "pool"


def test_a_layer_of_maps_is_averaged(cnn: Any, images: Tensor) -> None:
    same(tapped(cnn, images, "trunk.1").activation, cnn.trunk(images).mean((2, 3)))
    same(tapped(cnn, images, "trunk").activation, cnn.trunk(images).mean((2, 3)))


def test_a_layer_of_tokens_is_averaged() -> None:
    net = Net(lambda m, x: m.fc(m.block(x).mean(1)), block=Block(), fc=nn.Linear(D, C))
    tokens = torch.randn(N, 7, D)
    same(tapped(net, tokens, "block").activation, net.block(tokens).mean(1))


def test_a_layer_that_does_not_run_is_refused(cnn: Any, images: Tensor) -> None:
    with pytest.raises(ValueError, match=r"'unused' did not run"):
        tapped(cnn, images, "unused")


def test_a_stranger_is_refused(cnn: Any) -> None:
    with pytest.raises(ValueError, match=r"'fc7' is not in the model.*head"):
        FeatureTap(cnn, "fc7")
    with pytest.raises(ValueError, match=r"ReLU.*is not in the model"):
        FeatureTap(cnn, nn.ReLU())


def test_a_chosen_layer_that_runs_twice_gives_its_last_output(x: Tensor) -> None:
    net = Net(
        lambda m, x: m.fc(m.relu(m.b(m.relu(m.a(x))))),
        a=nn.Linear(IN, D), b=nn.Linear(D, D), fc=nn.Linear(D, C), relu=nn.ReLU(),
    )  # fmt: skip
    same(tapped(net, x, "relu").activation, F.relu(net.b(F.relu(net.a(x)))))


def test_a_chosen_layer_behind_a_wrapper(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).eval()
    for wrapped in (nn.DataParallel(net), torch.compile(net, backend="eager")):
        for layer in ("1", net[1]):
            same(tapped(wrapped, x, layer).activation, net[:2](x))


def test_a_chosen_layer_whose_output_is_changed_in_place_afterwards(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(inplace=True), nn.Linear(D, C)).eval()
    same(tapped(net, x, "0").activation, net[0](x))


def test_choosing_a_layer_where_nothing_is_rectified_is_what_the_advice_says() -> None:
    tokens = torch.randn(N, 7, D)
    net = Net(
        lambda m, x: m.fc(m.norm(m.pre(m.block(x)[:, 0]))),
        block=Block(), pre=nn.ReLU(), norm=nn.LayerNorm(D), fc=nn.Linear(D, C),
    )  # fmt: skip
    f = tapped(net, tokens, "pre")
    same(f.activation, net.pre(net.block(tokens)[:, 0]))
    assert_absent(f, "classifier")


# --- words ------------------------------------------------------------------------------------------------------


def test_describe_names_layer_width_and_the_share_of_units_that_are_off(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.ReLU(), nn.Linear(D, C)).eval()
    with torch.no_grad():
        net[0].weight.zero_()
        net[0].bias.copy_(torch.tensor([1.0, 1, -1, -1, -1, -1, -1, -1]))
    words = FeatureTap(net).trace(x).describe()
    assert all(part in words for part in ("8 units", "relu in `1`", "75%", "5 inputs"))
    assert "noise" not in words
    assert "noise" in FeatureTap(net).describe()


def test_share_of_units_that_are_off_agrees_with_the_norm(x: Tensor) -> None:
    net = nn.Sequential(nn.Linear(IN, D), nn.GELU(), nn.Linear(D, C)).eval()
    tap = FeatureTap(net).trace(x)
    on = float(norms.l0_norm(tap(x).activation).sum())
    share = int(re.findall(r"(\d+)%", tap.describe())[0]) / 100
    assert share == pytest.approx(1 - on / (N * D), abs=0.0051)


@pytest.mark.parametrize(
    "net",
    [
        nn.Sequential(nn.Conv1d(2, D, 3), nn.ReLU(), nn.AdaptiveAvgPool1d(1), nn.Flatten(), nn.Linear(D, C)),
        nn.Sequential(nn.Embedding(20, IN), nn.Flatten(), nn.Linear(7 * IN, D), nn.ReLU(), nn.Linear(D, C)),
        nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36 * D, C)),
        nn.Sequential(nn.ReLU()),
    ],
    ids=["1d", "embedding", "small images", "no weights"],
)
def test_describe_asks_for_a_batch_where_the_input_cannot_be_guessed(net: nn.Module) -> None:
    with pytest.raises(ValueError, match="trace"):
        FeatureTap(net).describe()


def test_an_embedding_beside_logits_of_another_head(images):
    body = nn.Sequential(nn.Conv2d(3, D, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = nn.Sequential(body, CSIHead(D, hidden=7, embedding=E))
    tap = FeatureTap(model)
    features = tap(images)
    pooled = body(images)
    head = model[1].projection
    torch.testing.assert_close(features.pooled, pooled)
    torch.testing.assert_close(features.activation, torch.relu(head.hidden(pooled)))
    torch.testing.assert_close(features.embedding, head(pooled))
    torch.testing.assert_close(features.logits, model[1].rotation(pooled))
    assert "hidden layer of an MLP head" in tap.describe()
    assert "if the network was trained on the in-distribution data" in tap.describe()
    with pytest.raises(ValueError, match="the logits come from another head"):
        features.linear()


def test_an_embedding_from_which_the_logits_are_made_is_found(x):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.embedding, self.classifier = nn.Linear(IN, D), nn.Linear(D, E), nn.Linear(E, C)

        def forward(self, x):
            embedding = self.embedding(self.hidden(x).relu())
            return {"embedding": embedding, "logits": self.classifier(embedding)}

    model = Both()
    features = FeatureTap(model)(x)
    torch.testing.assert_close(features.embedding, model(x)["embedding"])
    torch.testing.assert_close(features.linear()[0], model.classifier.weight @ model.embedding.weight)


class Alternating(nn.Module):
    """A network with two classifiers, which take turns."""

    def __init__(self):
        super().__init__()
        self.classifiers = nn.ParameterList([torch.randn(C, IN), torch.randn(C, IN)])
        self.calls = 0

    def forward(self, x):
        self.calls += 1
        return F.linear(x.relu(), self.classifiers[self.calls % 2])


def test_features_that_do_not_make_the_logits_are_refused(x):
    with pytest.raises(ValueError, match="do not make the model's logits"):
        FeatureTap(Alternating())(x)


def test_logits_near_zero_are_made_by_their_classifier(x):
    model = nn.Sequential(nn.Linear(IN, 8), nn.ReLU(), nn.Linear(8, C))
    with torch.no_grad():
        model[2].weight.mul_(1e-10)
        model[2].bias.zero_()
    features = FeatureTap(model)(x)
    torch.testing.assert_close(features.activation, model[:2](x))


def test_a_projection_head_reads_a_pooled_feature_that_may_be_the_models_input():
    head, rows = ProjectionHead(6, 3, hidden=6), torch.rand(4, 6)
    for model in (head, nn.Sequential(nn.Identity(), head)):
        torch.testing.assert_close(FeatureTap(model)(rows).tensor("pooled"), rows)
    behind = nn.Sequential(nn.Linear(5, 6), nn.ReLU())
    features = FeatureTap(nn.Sequential(*behind, head))(rows[:, :5])
    torch.testing.assert_close(features.tensor("pooled"), behind(rows[:, :5]).detach())
    # The input of another MLP is not a feature.
    plain = nn.Sequential(nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 3))
    features = FeatureTap(plain)(rows)
    torch.testing.assert_close(features.tensor("pooled"), features.tensor("activation"))
