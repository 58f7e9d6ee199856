"""The features that `FeatureTap` finds in recurrent networks whose class scores are made at every position."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from featnorm.tap import FeatureTap
from networks import Net, assert_reproduces, same

pytestmark = pytest.mark.usefixtures("seeded")

IN, D, C = 5, 6, 3
KINDS = [nn.LSTM, nn.GRU, nn.RNN]


def last(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Return an index of the last position of every input, if inputs come first."""
    return torch.arange(len(scores)), torch.full((len(scores),), scores.shape[1] - 1)


# Whether the network is batch first, and how the scores of the classes become logits.
PICKED: dict[str, tuple[bool, Callable[[Tensor], Tensor]]] = {
    "the last": (True, lambda scores: scores[:, -1]),
    "the first": (True, lambda scores: scores[:, 0]),
    "an index": (True, lambda scores: scores[last(scores)]),
    "the mean": (True, lambda scores: scores.mean(1)),
    "the last, positions first": (False, lambda scores: scores[-1]),
    "the first, positions first": (False, lambda scores: scores[0]),
    "a slice, positions first": (False, lambda scores: scores[-1:].squeeze(0)),
    "an index, positions first": (False, lambda scores: scores[last(scores.transpose(0, 1))[::-1]]),
    "the mean, positions first": (False, lambda scores: scores.mean(0)),
    "the last, transposed": (False, lambda scores: scores.transpose(0, 1)[:, -1]),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("picked", PICKED)
@pytest.mark.parametrize("shape", [(4, 7), (6, 6), (9, 3)])
def test_scores_that_are_picked(kind: Any, picked: str, shape: tuple[int, int]) -> None:
    batch_first, pick = PICKED[picked]
    net = Net(
        lambda m, x: pick(m.fc(m.rnn(x if batch_first else x.transpose(0, 1))[0])),
        rnn=kind(IN, D, batch_first=batch_first), fc=nn.Linear(D, C),
    )  # fmt: skip
    tap = FeatureTap(net.eval()).trace(torch.randn(*shape, IN))
    for x in (torch.randn(*shape, IN), torch.randn(shape[0] + 1, shape[1] + 2, IN)):
        features = tap(x)
        assert_reproduces(features, "pooled", net(x))
        read = net.rnn(x if batch_first else x.transpose(0, 1))[0]
        same(features.pooled, pick(read))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [2, 5])
def test_a_batch_of_sequences_that_lie_along_the_first_axis(kind: Any, length: int) -> None:
    net = Net(lambda m, x: m.fc(m.rnn(x)[0])[-1], rnn=kind(IN, D, 2, bidirectional=True), fc=nn.Linear(2 * D, C))
    x = torch.randn(length, 4, IN)
    features = FeatureTap(net.eval())(x)
    same(features.pooled, net.rnn(x)[0][-1])
    assert_reproduces(features, "pooled", net(x))


@pytest.mark.parametrize("batch_first", [True, False])
def test_scores_at_the_ends_of_packed_sequences(batch_first: bool) -> None:
    class Packed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.fc = nn.GRU(IN, D, batch_first=batch_first), nn.Linear(D, C)

        def read(self, x: Tensor, lengths: Tensor) -> Tensor:
            packed = pack_padded_sequence(x, lengths, batch_first, enforce_sorted=False)
            return pad_packed_sequence(self.rnn(packed)[0], batch_first)[0]

        def ends(self, values: Tensor, lengths: Tensor) -> Tensor:
            at = torch.arange(len(lengths)), lengths - 1
            return values[at if batch_first else at[::-1]]

        def forward(self, x: Tensor, lengths: Tensor) -> Tensor:
            return self.ends(self.fc(self.read(x, lengths)), lengths)

    net, lengths = Packed().eval(), torch.tensor([3, 7, 1, 5])
    x = torch.randn((4, 7, IN) if batch_first else (7, 4, IN))
    features = FeatureTap(net)((x, lengths))
    same(features.pooled, net.ends(net.read(x, lengths), lengths))
    assert_reproduces(features, "pooled", net(x, lengths))


def test_the_largest_scores_of_positions_that_come_first() -> None:
    net = Net(lambda m, x: m.fc(m.rnn(x)[0]).amax(0), rnn=nn.LSTM(IN, D), fc=nn.Linear(D, C)).eval()
    x = torch.randn(7, 4, IN)
    features = FeatureTap(net)(x)
    same(features.pooled, net.rnn(x)[0].mean(0))
    assert features.classifier is None
    assert "`amax`" in features.absent["classifier"]
    same(features.logits, net(x))


def test_gathered_scores_are_no_features() -> None:
    net = Net(
        lambda m, x: m.fc(m.rnn(x)[0]).gather(1, torch.full((len(x), 1, C), x.shape[1] - 1)).squeeze(1),
        rnn=nn.LSTM(IN, D, batch_first=True), fc=nn.Linear(D, C),
    ).eval()  # fmt: skip
    x = torch.randn(4, 7, IN)
    features = FeatureTap(net)(x)
    same(features.logits, net(x))
    same(features.pooled, net.rnn(x)[0].mean(1))


def test_one_input_or_position_is_not_taken_for_the_other() -> None:
    net = Net(lambda m, x: m.fc(m.rnn(x)[0])[-1], rnn=nn.LSTM(IN, D), fc=nn.Linear(D, C)).eval()
    with pytest.raises(RuntimeError, match=r"taken for each other.*at least two inputs with several positions"):
        FeatureTap(net)(torch.randn(7, 1, IN))
    for picked in (lambda m, x: m.fc(m.rnn(x)[0])[:, -1], lambda m, x: m.fc(m.rnn(x)[0]).mean(1)):
        net = Net(picked, rnn=nn.LSTM(IN, D, batch_first=True), fc=nn.Linear(D, C)).eval()
        tap = FeatureTap(net).trace(torch.randn(3, 1, IN))
        with pytest.raises(RuntimeError, match="taken for each other"):
            tap(torch.randn(3, 7, IN))
