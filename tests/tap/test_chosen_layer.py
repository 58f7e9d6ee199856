"""`layer=`: vectors, tokens and maps in either layout, averaged over positions and never over units."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featnorm.tap import FeatureTap
from networks import Net, same, tapped

pytestmark = pytest.mark.usefixtures("seeded")

N, D, C = 4, 6, 3


class Mark(nn.Module):
    """A module that changes nothing, and whose type says nothing of the axis of the units."""

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("layer", ["conv", "norm", "act", "pool", "mark", "last"])
def test_maps_of_any_dimension(dims: int, layer: str) -> None:
    # As many positions along each axis as there are units, which no length tells apart.
    conv, norm, pool = [
        (nn.Conv1d, nn.BatchNorm1d, nn.MaxPool1d),
        (nn.Conv2d, nn.BatchNorm2d, nn.MaxPool2d),
        (nn.Conv3d, nn.BatchNorm3d, nn.AvgPool3d),
    ][dims - 1]
    net = Net(
        lambda m, x: m.fc(m.last(m.mark(m.pool(m.act(m.norm(m.conv(x)))))).flatten(2).mean(2)),
        conv=conv(3, D, 3), norm=norm(D), act=nn.Tanh(), pool=pool(1), mark=Mark(), last=conv(D, D, 1),
        fc=nn.Linear(D, C),
    )  # fmt: skip
    x = torch.randn(N, 3, *[D + 2] * dims)
    seen: list[Tensor] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda m, a, y: seen.append(y))
    f = tapped(net, x, layer)
    handle.remove()
    same(f.activation, seen[-1].flatten(2).mean(2))
    assert "6 units" in FeatureTap(net, layer).trace(x).describe()


@pytest.mark.parametrize("layer", ["embed", "norm", "attention", "mlp", "mlp.1", "mark"])
def test_tokens(layer: str) -> None:
    net = Net(
        lambda m, x: (lambda h: m.fc(m.mark(h + m.mlp(h)).mean(1)))(
            (lambda e: e + m.attention(m.norm(e), m.norm(e), m.norm(e), need_weights=False)[0])(m.embed(x))
        ),
        embed=nn.Embedding(9, D), norm=nn.LayerNorm(D), attention=nn.MultiheadAttention(D, 2, batch_first=True),
        mlp=nn.Sequential(nn.Linear(D, 2 * D), nn.GELU(), nn.Linear(2 * D, D)), mark=Mark(), fc=nn.Linear(D, C),
    )  # fmt: skip
    tokens = torch.randint(9, (N, D))
    seen: list[Any] = []
    handle = net.get_submodule(layer).register_forward_hook(lambda m, a, y: seen.append(y))
    f = tapped(net, tokens, layer)
    handle.remove()
    out = seen[-1][0] if isinstance(seen[-1], tuple) else seen[-1]
    same(f.activation, out.mean(1))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU])
def test_the_states_of_a_recurrent_network(kind: Any) -> None:
    net = Net(lambda m, x: m.fc(m.rnn(x)[0][:, -1]), rnn=kind(5, D, batch_first=True), fc=nn.Linear(D, C))
    x = torch.randn(N, D, 5)
    tap = FeatureTap(net.eval(), "rnn")
    same(tap(x).activation, net.rnn(x)[0].mean(1))


@pytest.mark.parametrize("layer", ["norm", "mlp", "act", "mark"])
def test_maps_with_the_channels_last(layer: str) -> None:
    # ConvNeXt, Swin: 4-d tensors (n, height, width, d).
    net = Net(
        lambda m, x: m.fc(m.mark(m.act(m.mlp(m.norm(m.conv(x).permute(0, 2, 3, 1))))).mean((1, 2))),
        conv=nn.Conv2d(3, D, 3), norm=nn.LayerNorm(D), mlp=nn.Linear(D, 7), act=nn.Softsign(), mark=Mark(),
        fc=nn.Linear(7, C),
    )  # fmt: skip
    images = torch.randn(N, 3, D + 2, D + 2)
    h = net.norm(net.conv(images).permute(0, 2, 3, 1))
    out = {"norm": h, "mlp": net.mlp(h)}.get(layer, F.softsign(net.mlp(h)))
    same(tapped(net, images, layer).activation, out.mean((1, 2)))


def test_channels_last_and_back_again() -> None:
    net = Net(
        lambda m, x: m.fc(m.mark(m.norm(m.conv(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)).mean((2, 3))),
        conv=nn.Conv2d(3, D, 3), norm=nn.LayerNorm(D), mark=Mark(), fc=nn.Linear(D, C),
    )  # fmt: skip
    images = torch.randn(N, 3, D + 2, D + 2)
    h = net.norm(net.conv(images).permute(0, 2, 3, 1))
    same(tapped(net, images, "mark").activation, h.mean((1, 2)))


def test_maps_of_one_pixel_and_then_of_more() -> None:
    net = Net(
        lambda m, x: m.fc(m.act(m.conv(x)).mean((2, 3))), conv=nn.Conv2d(3, D, 3), act=Mark(), fc=nn.Linear(D, C)
    )
    tap = FeatureTap(net.eval(), "act").trace(torch.randn(N, 3, 3, 3))
    images = torch.randn(N, 3, 7, 7)
    same(tap(images).activation, net.conv(images).mean((2, 3)))


def test_maps_that_become_tokens() -> None:
    net = Net(
        lambda m, x: m.fc(m.mark(m.conv(x).flatten(2).transpose(1, 2)).mean(1)),
        conv=nn.Conv2d(3, D, 3), mark=Mark(), fc=nn.Linear(D, C),
    )  # fmt: skip
    images = torch.randn(N, 3, D + 2, D + 2)
    same(tapped(net, images, "mark").activation, net.conv(images).mean((2, 3)))


@pytest.fixture
def unknown() -> Net:
    """A network in which nothing says which axis of `mark` holds the units."""
    return Net(lambda m, x: m.fc(m.mark(torch.sin(x)).mean(1)), mark=Mark(), fc=nn.Linear(D, C))


def test_an_axis_that_is_not_known_is_asked_for(unknown: Net) -> None:
    x = torch.randn(N, 9, D)
    with pytest.raises(ValueError, match=r"'mark' returns a tensor of shape \(2, 9, 6\).*pass channel_axis=1"):
        tapped(unknown, x, "mark")
    for axis, expected in ((-1, torch.sin(x).mean(1)), (2, torch.sin(x).mean(1)), (1, torch.sin(x).mean(2))):
        tap = FeatureTap(unknown.eval(), "mark", channel_axis=axis)
        same(tap(x).activation, expected)
        same(FeatureTap.from_dict(unknown, tap.to_dict())(x).activation, expected)


def test_an_axis_that_is_given_wins() -> None:
    net = Net(lambda m, x: m.fc(m.conv(x).mean(2)), conv=nn.Conv1d(3, D, 1), fc=nn.Linear(D, C))
    x = torch.randn(N, 3, 9)
    same(FeatureTap(net.eval(), "conv", channel_axis=2)(x).activation, net.conv(x).mean(1))


@pytest.mark.parametrize("axis", [0, 3, -3])
def test_an_axis_that_there_is_not_is_refused(axis: int, unknown: Net) -> None:
    with pytest.raises(ValueError, match=f"channel_axis is {axis}, and layer 'mark' returns a tensor of shape"):
        FeatureTap(unknown.eval(), "mark", channel_axis=axis)(torch.randn(N, 9, D))


def test_an_axis_without_a_layer_is_refused(unknown: Net) -> None:
    with pytest.raises(ValueError, match="channel_axis is an axis of the output of a layer: pass layer= too"):
        FeatureTap(unknown, channel_axis=1)


def test_a_layer_that_does_not_begin_with_the_batch_is_refused() -> None:
    net = Net(lambda m, x: m.fc(m.rnn(x.transpose(0, 1))[0][-1]), rnn=nn.LSTM(5, D), fc=nn.Linear(D, C))
    with pytest.raises(ValueError, match=r"'rnn' returns a tensor of shape \(7, 2, 6\).*one vector per input"):
        tapped(net, torch.randn(N, 7, 5), "rnn")
