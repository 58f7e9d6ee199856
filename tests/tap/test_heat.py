"""Where a score comes from: exact for a linear score, in the right place for an odd patch, refused by name."""

import pytest
import torch
from torch import nn

import featnorm as fn
from featnorm.tap.heat import NoHeatError, heat_maps


class Net(nn.Module):
    """Maps that are rectified colors of 4 x 4 pixels, averaged in one of several ways, and a linear classifier."""

    def __init__(self, pool="module"):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 4, 4)
        self.squeeze, self.last, self.beside = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, (3, 4)), nn.Conv2d(8, 8, 1, 4)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.norm = nn.LayerNorm(8)
        self.head = nn.Linear(8, 5)
        self.kind = pool

    def forward(self, x):
        maps = self.conv(x)
        if self.kind == "squeeze":
            maps = maps * self.squeeze(maps.mean((2, 3), keepdim=True)).sigmoid()
        maps = maps.relu_() if self.kind == "in place" else torch.relu(maps)
        if self.kind == "function":
            return self.head(maps.mean((2, 3)))
        if self.kind == "channels last":
            return self.head(maps.permute(0, 2, 3, 1).mean((1, 2)))
        if self.kind == "norm":
            return self.head(self.norm(self.pool(maps).flatten(1)))
        if self.kind in ("max", "small"):
            return self.after(maps)
        if self.kind == "two":
            return self.head(maps.amax((2, 3)) + self.conv(x).mean((2, 3)))
        if self.kind == "fixed batch":
            return self.head(self.pool(maps).view(len(x), 8))
        return self.head(self.pool(maps).flatten(1))

    def after(self, maps):
        if self.kind == "max":
            return self.head(maps.amax((2, 3)))
        # As in a residual network, on images that are smaller than those it was made for.
        small = torch.relu(self.last(maps))
        return self.head(self.pool(small + self.beside(maps)).flatten(1))


def tap_of(kind="module", layout=torch.contiguous_format):
    tap = fn.FeatureTap(Net(kind).eval().to(memory_format=layout))
    tap.trace(torch.rand(2, 3, 12, 16))
    return tap


def images(n=3, seed=0):
    return torch.rand(n, 3, 12, 16, generator=torch.Generator().manual_seed(seed))


def first_logit(features):
    return features.logits[:, 0]


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("kind", ["module", "function", "in place", "channels last", "squeeze"])
def test_the_heat_of_a_linear_score_is_exact(kind, layout):
    """Position by position it is w (a - r) / P, which sums to the difference of the scores."""
    tap = tap_of(kind, layout)
    x = images().to(memory_format=layout)
    reference = torch.rand(3, 8)
    heat, compared = heat_maps(tap, x, first_logit, reference)
    assert compared
    assert heat.shape == (3, 3, 4)
    model = tap.model
    scores = model(x)[:, 0]
    at_reference = model.head(reference)[:, 0]
    torch.testing.assert_close(heat.sum((1, 2)), scores - at_reference, rtol=1e-4, atol=1e-5)
    if kind != "squeeze":
        maps = torch.relu(model.conv(x))
        weight = model.head.weight[0][None, :, None, None]
        expected = (weight * (maps - reference[:, :, None, None])).sum(1) / 12
        torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-5)
    alone = torch.cat([heat_maps(tap, x[i : i + 1], first_logit, reference[i : i + 1])[0] for i in range(3)])
    torch.testing.assert_close(alone, heat, rtol=1e-4, atol=1e-6)


def test_without_a_reference_an_image_is_compared_with_itself():
    tap = tap_of()
    heat, compared = heat_maps(tap, images(), first_logit)
    assert not compared
    torch.testing.assert_close(heat.sum((1, 2)), torch.zeros(3), rtol=0, atol=1e-5)
    assert heat.abs().max() > 1e-3
    # The pooled features are normalized, so that means cannot be compared with them.
    normalized = tap_of("norm")
    own, other = (heat_maps(normalized, images(), first_logit, r) for r in (None, torch.rand(3, 8)))
    assert torch.equal(own[0], other[0])
    assert not other[1]


@pytest.mark.parametrize("detector", ["KNN(k=1)", "NAN()", "SSD()", "Energy()", "KNN(k=2) / NAN()"])
def test_an_odd_patch_is_where_the_score_is_lost(detector):
    """For any detector, with or without gradients: all images but the patch of one are alike."""
    model = Net().eval()
    with torch.no_grad():
        # Each unit sees the colors in its place, and each logit is a unit.
        model.conv.weight.copy_(torch.rand(8, 3, 1, 1) + 0.1)
        model.conv.bias.zero_()
        model.head.weight.copy_(torch.eye(5, 8))
    known = 0.5 + 0.1 * images(60)
    scorer = fn.Scorer(model, fn.parse_detector(detector)).fit(known.split(20))
    x = known[:1].clone()
    x[:, :2, 8:, 12:] = 0  # blue
    reference = scorer.tap(known).pooled.mean(0, keepdim=True)
    ((heat,), _) = heat_maps(scorer.tap, x, scorer.detector.score, reference)
    assert int(heat.argmin()) == heat.numel() - 1
    assert heat[2, 3] < 0
    others = heat.flatten()[:-1]
    assert heat[2, 3] < -3 * others.abs().max()


@pytest.mark.parametrize("kind", ["max", "small"])
def test_maps_that_are_not_averaged_are_changed_themselves(kind):
    """The last maps but those of one position, and those that are pooled otherwise."""
    tap = tap_of(kind)
    x = images()
    heat, compared = heat_maps(tap, x, first_logit, torch.rand(3, 8))
    assert not compared
    model = tap.model
    maps = torch.relu(model.conv(x))
    expected = torch.zeros(3, 3, 4)
    for i in range(3):
        for j in range(4):
            changed = maps.clone()
            changed[:, :, i, j] = maps.mean((2, 3))
            expected[:, i, j] = (model.after(maps) - model.after(changed))[:, 0].detach()
    torch.testing.assert_close(heat, expected, rtol=1e-4, atol=1e-6)
    assert heat.abs().max() > 1e-3


def test_the_model_is_left_as_it_was():
    tap = tap_of("in place")
    before = tap(images()).logits
    heat_maps(tap, images(), first_logit)
    assert torch.equal(tap(images()).logits, before)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in tap.model.modules())


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("two", "no maps that all of its last layers depend on"),
        ("fixed batch", "do not take another number of inputs"),
    ],
)
def test_no_heat_is_named(kind, why):
    with pytest.raises(NoHeatError, match=why):
        heat_maps(tap_of(kind), images(), first_logit)


def test_tokens_and_scores_without_heat_are_named():
    tap = fn.FeatureTap(nn.Sequential(nn.Flatten(), nn.Linear(576, 8), nn.ReLU(), nn.Linear(8, 5)).eval())
    with pytest.raises(NoHeatError, match="no maps that all of its last layers depend on"):
        heat_maps(tap, images(), first_logit)
    with pytest.raises(NoHeatError, match="not finite"):
        heat_maps(tap_of(), images(), lambda features: features.logits[:, 0] / 0)


def test_a_lack_of_memory_is_not_a_lack_of_heat():
    def score(features):
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        heat_maps(tap_of(), images(), score)
