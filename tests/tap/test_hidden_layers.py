"""`FeatureTap.hidden`: C(x) a + Gamma(x) is the network, with C and Gamma also computed otherwise (Prop. 1, 6)."""

import copy
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

import featnorm as fn
from featnorm.models import CifarResNet18, ProjectionHead
from featnorm.paper.networks import MLP

RECTIFIERS = {
    "relu": nn.ReLU(),
    "inplace relu": nn.ReLU(inplace=True),
    "leaky relu": nn.LeakyReLU(0.1),
    "inplace leaky relu": nn.LeakyReLU(0.1, inplace=True),
    "prelu": nn.PReLU(),
    "gelu": nn.GELU(),
    "silu": nn.SiLU(),
    "mish": nn.Mish(),
    "hardswish": nn.Hardswish(),
    "elu": nn.ELU(),
    "relu6": nn.ReLU6(),
}


@given(
    st.sampled_from(list(RECTIFIERS)),
    st.lists(st.integers(1, 6), min_size=2, max_size=4),
    st.integers(1, 4),
    st.integers(0, 2**31),
)
@settings(max_examples=60)
def test_the_mlp_is_the_product_of_its_matrices(name, widths, classes, seed):
    """Equations 2, 35 and 40, multiplied out."""
    torch.manual_seed(seed)
    sizes = [3, *widths, classes]
    linears = [nn.Linear(a, b).double() for a, b in pairwise(sizes)]
    rectifier = RECTIFIERS[name].double()
    parts = [part for linear in linears[:-1] for part in (linear, copy.deepcopy(rectifier))]
    model = nn.Sequential(*parts, linears[-1])
    x = torch.randn(4, 3, dtype=torch.float64)
    x[0] = 0
    with torch.no_grad():
        z, a = [], [x]
        for linear in linears[:-1]:
            z.append(linear(a[-1]))
            a.append(rectifier(z[-1].clone()))
        factors = [torch.where(before == 0, 0.0, after / before) for before, after in zip(z, a[1:], strict=True)]
        for layer in range(len(widths)):
            c = linears[-1].weight.expand(4, -1, -1)
            gamma = linears[-1].bias.expand(4, -1)
            for k in range(len(widths) - 1, layer, -1):
                c = c * factors[k][:, None]
                gamma = gamma + c @ linears[k].bias
                c = c @ linears[k].weight
            if classes == 1:  # of two classes, (-z / 2, z / 2)
                c, gamma = torch.cat([-c, c], 1) / 2, torch.cat([-gamma, gamma], 1) / 2
            hidden = fn.FeatureTap(model, str(2 * layer + 1)).hidden(x)
            torch.testing.assert_close(hidden.activation, a[layer + 1])
            torch.testing.assert_close(hidden.coefficients, c)
            torch.testing.assert_close(hidden.offset, gamma)


class Net(nn.Module):
    """A residual convolutional network with batch normalization, whose gates can be held fixed as a reference."""

    def __init__(self, activation):
        super().__init__()
        self.activation = activation
        self.stem = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.body = nn.Conv2d(6, 6, 3, padding=1)
        self.norm2 = nn.BatchNorm2d(6)
        self.hidden = nn.Linear(6, 7)
        self.mark = nn.Identity()
        self.out = nn.Linear(7, 4)
        for norm in (self.norm, self.norm2):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
            nn.init.normal_(norm.weight)
            nn.init.normal_(norm.bias)

    def rectify(self, z, factors, at):
        return self.activation(z) if factors is None else z * factors[at]

    def first(self, x):
        return self.norm(self.stem(x))

    def rest(self, a, factors=None):
        """Run the network from the output of the first rectifier on."""
        a = F.max_pool2d(a, 2) if factors is None else a.gather(2, factors["pool"])
        if factors is not None:
            a = a.reshape(*a.shape[:2], *factors["shape"])
        b = self.rectify(a + self.norm2(self.body(a)), factors, 1)
        return self.out(self.rectify(self.hidden(b.mean((2, 3))), factors, 2))

    def forward(self, x):
        return self.rest(self.mark(self.activation(self.first(x))))


@pytest.mark.parametrize("name", ["gelu", "silu", "relu", "elu"])
def test_a_residual_network_with_its_factors_held_fixed(name):
    torch.manual_seed(1)
    activation = RECTIFIERS[name]
    net = Net(activation).double().eval()
    x = torch.randn(2, 3, 6, 6, dtype=torch.float64)
    hidden = fn.FeatureTap(net, "mark").hidden(x)
    d = 6 * 6 * 6
    assert hidden.coefficients.shape == (2, 4, d)
    with torch.no_grad():
        for i in range(2):
            a = activation(net.first(x[i : i + 1]))
            pooled, places = F.max_pool2d(a, 2, return_indices=True)
            z1 = pooled + net.norm2(net.body(pooled))
            z2 = net.hidden(activation(z1).mean((2, 3)))
            ratio = [None, activation(z1) / z1, activation(z2) / z2]
            held = {1: ratio[1], 2: ratio[2], "pool": places.flatten(2), "shape": pooled.shape[2:]}

            def fixed(vector, held=held):
                return net.rest(vector.reshape(1, 6, 36), held)[0]

            gamma = fixed(torch.zeros(d, dtype=torch.float64))
            columns = torch.stack([fixed(unit) - gamma for unit in torch.eye(d, dtype=torch.float64)], 1)
            torch.testing.assert_close(hidden.coefficients[i], columns)
            torch.testing.assert_close(hidden.offset[i], gamma)
            torch.testing.assert_close(hidden.output_logits[i], net(x[i : i + 1])[0])


@pytest.mark.parametrize("name", ["relu", "inplace relu", "leaky relu", "gelu"])
def test_the_pre_activation_gives_the_same_logits(name):
    torch.manual_seed(2)
    model = nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.Linear(8, 9), RECTIFIERS[name], nn.Linear(9, 3)).double()
    x = torch.randn(6, 5, dtype=torch.float64)
    tap = fn.FeatureTap(model, "3")
    after, before = tap.hidden(x), tap.hidden(x, pre_activation=True)
    with torch.no_grad():
        z = model[2](model[1](model[0](x)))
        torch.testing.assert_close(before.activation, z)
        torch.testing.assert_close(before.coefficients, after.coefficients * (model[3](z.clone()) / z)[:, None])
        torch.testing.assert_close(before.output_logits, model(x))
    assert (before.gap >= -1e-9).all()
    assert (before.gap <= before.bound + 1e-9).all()


class Functional(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(4, 6), nn.Linear(6, 5), nn.Linear(5, 3, bias=False)

    def forward(self, x):
        x = torch.relu(self.a(x))
        return F.linear(F.normalize(self.b(x)), F.normalize(self.c.weight)) / 0.1


def test_a_functional_rectifier_before_a_cosine_classifier():
    """The length of the embedding is a constant factor too, so cosine logits are exact (A.2.4)."""
    torch.manual_seed(3)
    model = Functional().double().eval()
    x = torch.randn(5, 4, dtype=torch.float64)
    hidden = fn.FeatureTap(model).hidden(x)
    with torch.no_grad():
        embedding = model.b(torch.relu(model.a(x)))
        unit = model.c.weight / model.c.weight.norm(dim=1, keepdim=True)
        expected = (unit @ model.b.weight) / 0.1 / embedding.norm(dim=1)[:, None, None]
        torch.testing.assert_close(hidden.coefficients, expected)
        torch.testing.assert_close(hidden.output_logits, model(x))
    confidence = fn.HiddenConfidence().score(fn.FeatureTap(model)(x))
    torch.testing.assert_close(hidden.confidence, confidence, check_dtype=False)


@pytest.mark.parametrize(
    "make",
    [
        lambda: (nn.Sequential(CifarResNet18(4), ProjectionHead(32, 10, embedding=8)), (3, 32, 32), None),
        lambda: (
            nn.Sequential(CifarResNet18(4), ProjectionHead(32, 10, activation="gelu")),
            (3, 32, 32),
            "0.stages.6",
        ),
        lambda: (MLP(12, 3, hidden=16, embedding=8), (12,), "body.4"),
    ],
)
def test_the_papers_networks_are_exact_in_single_precision(make):
    torch.manual_seed(4)
    model, shape, layer = make()
    x = torch.rand(3, *shape)
    model.eval()
    state = {key: value.clone() for key, value in model.state_dict().items()}
    hidden = fn.FeatureTap(model, layer).hidden(x)
    with torch.no_grad():
        torch.testing.assert_close(hidden.output_logits, model(x), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_what_is_not_linear_is_named():
    normed = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.LayerNorm(5), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"not linear.*layer_norm"):
        fn.FeatureTap(normed, "1").hidden(torch.randn(2, 4))
    squeezed = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 5), nn.Sigmoid(), nn.Linear(5, 3))
    with pytest.raises(ValueError, match=r"not linear.*sigmoid"):
        fn.FeatureTap(squeezed, "1").hidden(torch.randn(2, 4))
    plus = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 3, bias=False), nn.Softplus(), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"not linear.*softplus"):
        fn.FeatureTap(plus, "1").hidden(torch.randn(2, 4))
    with pytest.raises(ValueError, match="no hidden classifier without logits"):
        fn.FeatureTap(nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())).hidden(
            torch.randn(2, 3, 8, 8)
        )


def test_a_layer_that_is_no_rectifier_has_no_pre_activation():
    model = nn.Sequential(nn.Linear(4, 5), nn.ReLU(), nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 2))
    with pytest.raises(ValueError, match="not the output of a rectifier"):
        fn.FeatureTap(model, "2").hidden(torch.randn(2, 4), pre_activation=True)


class After(nn.Module):
    """A layer, and a function after it."""

    def __init__(self, behind):
        super().__init__()
        torch.manual_seed(0)
        self.first = nn.Sequential(nn.Linear(4, 6), nn.ReLU())
        self.b, self.c = nn.Linear(6, 3), nn.Linear(6, 3)
        self.norm = nn.LayerNorm(6)
        self.scale = nn.Parameter(torch.zeros(()))
        self.out = nn.Linear(3, 3)
        self.behind = behind

    def forward(self, x):
        return self.rest(self.first(x))

    def rest(self, h):
        return self.out(self.behind(self, h))


def detached(m, h):
    return m.b(h) + m.c(h.detach())


def without_gradients(m, h):
    with torch.no_grad():
        y = m.c(h)
    return m.b(h) + y


def mixing(m, h):
    return m.b(h - h.mean(0))


@pytest.mark.parametrize(
    ("behind", "message"),
    [
        (detached, "gradients of the model after the layer do not predict"),
        (without_gradients, "gradients of the model after the layer do not predict"),
        (mixing, "gradients of the model after the layer do not predict"),
        (lambda m, h: m.b(m.norm(h * 1e5)), "contains layer_norm"),
        (lambda m, h: m.b(h) * m.c(h).sigmoid(), "product of two.* and sigmoid"),
        (lambda m, h: m.b(torch.maximum(h, m.c(h).mean(1, keepdim=True))), "contains maximum"),
        (lambda m, h: m.b(h) / (1 + h.sum(1, keepdim=True)), "product of two"),
        (lambda m, h: m.b(h.sign()), "contains sign"),
        (lambda m, h: m.b(torch.zeros_like(h)), "do not depend on"),
    ],
)
def test_models_that_are_not_linear_after_the_layer_raise_errors(behind, message):
    with pytest.raises(ValueError, match=message):
        fn.FeatureTap(After(behind).eval(), "first.1").hidden(torch.randn(3, 4, generator=torch.Generator()))


def added_in_place(m, h):
    y = h
    y += 1
    return m.b(y)


@pytest.mark.parametrize(
    "behind",
    [
        lambda m, h: m.b(h.mul_(2)),
        added_in_place,
        lambda m, h: m.b(h) / m.scale.clamp(min=0.5),
        lambda m, h: m.b(F.relu(h - 0.1, True)),
        lambda m, h: m.b(F.relu_(h.add_(0.2))),
        lambda m, h: m.b(torch.cat([h[:, :3], h[:, 3:].clone()], 1)),
        lambda m, h: m.b(F.max_pool1d(h[:, None], 1)[:, 0]),
    ],
)
def test_what_is_linear_is_exact(behind):
    model = After(behind).double().eval()
    x = torch.randn(3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    hidden = fn.FeatureTap(model, "first.1").hidden(x)
    with torch.no_grad():
        a = model.first(x)
        torch.testing.assert_close(hidden.activation, a)
        for i in range(6):
            moved = a.clone()
            moved[:, i] += 1e-6
            slope = (model.rest(moved) - model.rest(a.clone())) / 1e-6
            torch.testing.assert_close(hidden.coefficients[:, :, i], slope, rtol=1e-5, atol=1e-6)


def test_inputs_of_any_kind_and_frozen_backbones():
    class Begins(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone = nn.Linear(4, 5).requires_grad_(False)
            self.head = nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3))

        def forward(self, x):
            x = x.sub_(1)
            with torch.no_grad():
                y = self.backbone(x.float())
            return self.head(y)

    model = Begins().eval()
    x = torch.randint(0, 9, (5, 4))
    before = x.clone()
    hidden = fn.FeatureTap(model).hidden(x)
    assert torch.equal(x, before)
    assert torch.equal(hidden.coefficients, model.head[2].weight.expand(5, 3, 6))
    assert [p.requires_grad for p in model.parameters()] == [False] * 2 + [True] * 4
    with pytest.raises(ValueError, match="no input in the batch"):
        fn.FeatureTap(model).trace(x).hidden(x[:0])


def test_a_view_is_what_the_module_puts_out():
    class Permute(nn.Module):
        def forward(self, t):
            return t.permute(0, 3, 1, 2)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.l = nn.Linear(3, 5)
            self.act = nn.Sequential(nn.ReLU(), Permute())
            self.o = nn.Linear(20, 3)

        def forward(self, x):
            return self.o(self.act(self.l(x)).flatten(1))

    model = Net().eval()
    tap = fn.FeatureTap(model, "act")
    hidden = tap.hidden(torch.randn(2, 2, 2, 3))
    assert torch.equal(hidden.coefficients[0], model.o.weight)
    with pytest.raises(ValueError, match="not the output of a rectifier"):
        tap.hidden(torch.randn(2, 2, 2, 3), pre_activation=True)
