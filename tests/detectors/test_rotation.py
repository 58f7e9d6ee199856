"""RotNet and CSI, which rotate the input: synthetic features have no inputs, so a small model makes them."""

import pytest
import torch
from torch import nn

import featnorm as fn
from fabricate import assert_close, assert_same_state, state
from featnorm.features import Features
from featnorm.paper.networks import CSIHead
from references import net

E, SIDE = 5, 8


@pytest.fixture
def rotnet():
    return net(nn.Linear(6, 4))


@pytest.fixture
def csi():
    torch.manual_seed(1)
    head = CSIHead(6, hidden=7, embedding=E)
    model = net(head)
    with torch.no_grad():  # as after training: every rotation's own logit is positive on average
        head.rotation.bias += 3
    return model


def pictures(n, seed=2):
    return torch.rand(n, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(seed))


TRAIN, TEST = pictures(30), pictures(6, seed=3)


def features(model, images, size=None):
    return list(fn.FeatureTap(model).stream(images.split(size or len(images)), progress=False))


def test_csi_streams_merges_and_forgets(csi):
    def fitted(images, size=None):
        detector = fn.CSI(augmentations=2)
        for part in features(csi, images, size):
            detector.partial_fit(part)
        return detector

    (asked,) = features(csi, TEST)
    whole = fitted(TRAIN)
    expected = whole.score(asked)
    assert_close(fitted(TRAIN, 7).score(asked), expected)
    assert_close(fitted(TRAIN[:9]).merge(fitted(TRAIN[9:])).score(asked), expected)
    order = torch.randperm(30, generator=torch.Generator().manual_seed(0))
    assert_close(fitted(TRAIN[order]).score(asked), expected)
    other = fitted(TEST)
    other.fit(features(csi, TRAIN)[0])
    assert_same_state(state(other), state(whole))
    assert_close(fn.parse_detector("CSI(augmentations=2)").fit(features(csi, TRAIN)[0]).score(asked), expected)


def test_csi_compares_with_every_training_input(csi, monkeypatch):
    (known,), (asked,) = features(csi, TRAIN), features(csi, TEST)
    detector = fn.CSI(augmentations=1).fit(known)
    expected = detector.score(asked)
    monkeypatch.setattr("featnorm.detectors.rotation._COMPARED", 4)
    assert_close(detector.score(asked), expected)


@pytest.mark.parametrize("detector", [fn.RotNet(), fn.CSI(augmentations=2)])
def test_scores_are_of_each_input_alone_and_leave_the_model(detector, csi, rotnet, tmp_path):
    model = csi if detector.needs_fit else rotnet
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kept = TEST.clone()
    model.train()
    scorer = fn.Scorer(model, detector).fit([TRAIN]).calibrate(TRAIN.split(10))
    scores = scorer(TEST).score
    assert scores.dtype == torch.float32
    alone = torch.cat([scorer(TEST[i : i + 1]).score for i in range(6)])
    torch.testing.assert_close(scores, alone, rtol=1e-5, atol=1e-6)
    with torch.inference_mode():
        torch.testing.assert_close(scorer(TEST).score, scores)
    assert scorer(TEST[:0]).score.shape == (0,)
    assert all(module.training for module in model.modules())
    assert_same_state(before, model.state_dict())
    assert torch.equal(TEST, kept)
    scorer.save(tmp_path / "d.featnorm")
    torch.testing.assert_close(fn.load(tmp_path / "d.featnorm", model=model)(TEST).score, scores)


def test_what_is_wrong_is_named(csi, rotnet):
    detector = fn.CSI(augmentations=1)
    with pytest.raises(fn.NotFittedError):
        fn.Scorer(csi, detector)(TEST)
    scorer = fn.Scorer(csi, detector).fit([TRAIN])
    before = state(detector)
    for images, message in (
        (TRAIN - 0.5, "let Normalize be its first layer"),
        (torch.rand(4, 3, SIDE, SIDE) * 255, "images .* between 0 and 1"),
    ):
        with pytest.raises(ValueError, match=message):
            scorer.fit([images])
        with pytest.raises(ValueError, match=message):
            scorer(images)
    (asked,) = features(csi, TEST)
    for bare in (asked.to("cpu"), asked[:2]):
        for use in (detector.score, detector.partial_fit):
            with pytest.raises(ValueError, match="came without their inputs"):
                use(bare)
    assert_same_state(before, state(detector))
    with pytest.raises(ValueError, match="came without their inputs"):
        fn.RotNet().score(features(rotnet, TEST)[0].to("cpu"))
    wide = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    with pytest.raises(ValueError, match=r"rotations need square images .* shape \(2, 3, 8, 6\)"):
        fn.Scorer(nn.Sequential(wide, nn.Linear(8, 4)), fn.RotNet())(torch.rand(2, 3, 8, 6))
    with pytest.raises(ValueError, match="the logits of 4 rotations, and the model returns 10"):
        fn.Scorer(nn.Sequential(wide, nn.Linear(8, 10)), fn.RotNet())(TEST)
    with pytest.raises(ValueError, match=r"reads `embedding`"):
        fn.Scorer(nn.Sequential(wide, nn.Linear(8, 4)), fn.CSI()).fit([TRAIN])
    other = net(CSIHead(6, hidden=7, embedding=E + 1))
    with pytest.raises(ValueError, match="fitted to `embedding` of width 5, got width 6"):
        detector.score(features(other, TEST)[0])
    with torch.no_grad():
        csi[1].rotation.bias[2] -= 30
    with pytest.raises(ValueError, match="mean logit of 180 degrees over the training inputs is not positive"):
        scorer.fit([TRAIN])(TEST)
    with pytest.raises(ValueError, match="CSI: augmentations must be an integer >= 1, got "):
        fn.CSI(augmentations=0)
    with pytest.raises(ValueError, match=r"CSI: scale must be a number in \(0, 1\], got "):
        fn.CSI(scale=0)
    with pytest.raises(ValueError, match="reads `logits`"):
        fn.RotNet().score(Features(activation=torch.rand(2, 3)))


@pytest.mark.parametrize("expression", ["RotNet()", "CSI()", "CSI(augmentations=4, scale=0.3)"])
def test_an_expression_is_its_own_repr(expression):
    detector = fn.parse_detector(expression)
    assert repr(detector) == expression
    assert detector.needs_model
