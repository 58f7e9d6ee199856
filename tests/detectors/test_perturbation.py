"""ODIN and Views: detectors that run the model again."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import featnorm as fn
from references import odin, views

C = 4


class Net(nn.Module):
    """A small convolutional net with everything that tempts: batch norm, dropout, an in-place rectifier."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.hidden = nn.Sequential(nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Dropout(0.5))
        self.head = nn.Linear(16, C)

    def forward(self, x):
        return self.head(self.hidden(self.body(x).mean((2, 3))))


@pytest.fixture
def model():
    torch.manual_seed(0)
    net = Net()
    net(torch.randn(64, 3, 8, 8))  # running statistics that are not the initial ones
    return net


@pytest.fixture
def images():
    return torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("temperature", [1, 1000])
@pytest.mark.parametrize("std", [None, (0.25, 0.5, 0.2)])
def test_odin_is_its_definition(model, images, temperature, std):
    detector = fn.ODIN(temperature=temperature, eps=0.05, std=std)
    got = fn.Scorer(model, detector)(images).score
    exact = copy.deepcopy(model).eval().double()
    expected = odin(exact, images, temperature, 0.05, std or (1, 1, 1))
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-6)


def test_odin_without_a_step_at_temperature_one_is_msp(model, images):
    odin = fn.Scorer(model, fn.ODIN(temperature=1, eps=0))(images).score
    torch.testing.assert_close(odin, fn.Scorer(model, fn.MSP())(images).score)


def test_views_is_the_mean_over_nine_translations(model, images):
    scorer = fn.Scorer(model, fn.NAN())
    tall = torch.nn.functional.interpolate(images, (16, 8))
    got = fn.Scorer(model, fn.Views(fn.NAN()))(tall).score
    expected = views(lambda view: scorer(view).score, tall, 2, 1)
    np.testing.assert_allclose(got.numpy(), expected, rtol=1e-5, atol=1e-6)


def test_views_of_a_detector_that_learns(model, images):
    loader = [torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(2))]
    scorer = fn.Scorer(model, fn.Views(fn.KNN(k=3) / fn.NAN())).fit(loader).calibrate(loader)
    assert scorer(images).p_value.shape == (6,)
    assert fn.parse_detector(repr(scorer.detector)).detector.distance.k == 3


@pytest.mark.parametrize("detector", [fn.ODIN(std=(1, 2, 3)), fn.Views(fn.NAN()), fn.Views(fn.ODIN())])
def test_model_and_inputs_are_left_as_they_were(model, images, detector):
    model.train()
    model.head.weight.grad = torch.ones_like(model.head.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = images.clone()
    with torch.inference_mode():
        inside = fn.Scorer(model, detector)(images).score
    outside = fn.Scorer(model, detector)(images).score
    torch.testing.assert_close(inside, outside)
    assert not outside.requires_grad
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model.head.weight.grad, torch.ones_like(model.head.weight))
    assert model.hidden[0].weight.grad is None
    assert torch.equal(images, kept)
    assert not images.requires_grad


@pytest.mark.parametrize("detector", [fn.ODIN(), fn.Views(fn.NAN())])
def test_a_score_does_not_depend_on_its_batch(model, images, detector):
    scorer = fn.Scorer(model, detector)
    alone = torch.cat([scorer(images[i : i + 1]).score for i in range(6)])
    torch.testing.assert_close(scorer(images).score, alone, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("detector", [fn.ODIN(), fn.Views(fn.NAN())])
def test_features_without_their_inputs_are_refused(model, images, detector):
    tap = fn.FeatureTap(model)
    for features in (tap.extract([images], progress=False), tap(images)[:3], tap(images).to("cpu")):
        with pytest.raises(ValueError, match=r"came without their inputs: use a Scorer"):
            detector.score(features)


def test_saved_and_loaded(model, images, tmp_path):
    scorer = fn.Scorer(model, fn.Views(fn.ODIN(std=(0.2, 0.3, 0.4)))).calibrate([torch.randn(32, 3, 8, 8)])
    scorer.save(tmp_path / "d.featnorm")
    again = fn.load(tmp_path / "d.featnorm", model=model)
    assert again.detector.detector.std == (0.2, 0.3, 0.4)
    torch.testing.assert_close(again(images).score, scorer(images).score)


def test_what_is_wrong_is_named(model, images):
    with pytest.raises(ValueError, match=r"temperature must be a number in \(0, inf\), got 0"):
        fn.ODIN(temperature=0)
    with pytest.raises(ValueError, match=r"eps must be a number in \[0, inf\), got -1"):
        fn.ODIN(eps=-1)
    with pytest.raises(ValueError, match=r"std must be a sequence .* or None, got \(1, 0, 1\)"):
        fn.ODIN(std=(1, 0, 1))
    with pytest.raises(ValueError, match="has 2 deviations, one per channel"):
        fn.Scorer(model, fn.ODIN(std=(1, 1)))(images)
    with pytest.raises(ValueError, match=r"shift must be a number in \(0, 1\), got 1"):
        fn.Views(fn.NAN(), shift=1)
    with pytest.raises(TypeError, match=r"Views takes a detector such as NAN\(\), got 3"):
        fn.Views(3)
    flat = nn.Sequential(nn.Linear(12, 8), nn.ReLU(), nn.Linear(8, 3))
    with pytest.raises(ValueError, match=r"moves images .* the inputs have shape \(6, 12\)"):
        fn.Scorer(flat, fn.Views(fn.NAN()))(torch.randn(6, 12))
    with pytest.raises(ValueError, match="cannot move images of 1 x 8"):
        fn.Scorer(model, fn.Views(fn.NAN()))(images[:, :, :1])
