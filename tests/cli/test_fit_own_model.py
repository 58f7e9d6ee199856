"""`fit` and the commands after it, with small models of the user's own that return or take something unusual."""

import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featnorm as fn

MODULE = """
import torch
from torch import nn
from torchvision.transforms import v2

to_tensor = v2.Compose([v2.ToImage(), v2.ToDtype(torch.float32, scale=True)])


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 8, 3)
        self.animal, self.color = nn.Linear(8, 4), nn.Linear(8, 5)

    def read(self, x):
        return self.second(self.conv(x).relu()).relu().mean((2, 3))

    def forward(self, x):
        return self.animal(self.read(x))


class Heads(Net):
    def forward(self, x):
        features = self.read(x)
        return {"animal": self.animal(features), "color": self.color(features)}


class OfMapping(Net):
    def forward(self, batch):
        return super().forward(batch["image"])


class Transposed(nn.Module):
    def forward(self, x):
        return x.mT.contiguous().repeat(1, 1, 2)


class Tokens(Net):
    def __init__(self):
        super().__init__()
        self.token = Transposed()

    def forward(self, x):
        tokens = self.token(self.conv(x).relu().flatten(2))
        return self.animal(tokens.mean(1)[:, :8])


class Maps(Net):
    def forward(self, x):
        features = self.second(self.conv(x).relu()).relu()
        return self.animal(features.movedim(1, -1)).movedim(-1, 1)


def make():
    return Net().eval(), to_tensor


def maps():
    return Maps().eval(), to_tensor


def other():
    net = Net().eval()
    nn.init.constant_(net.conv.bias, 0.5)
    return net, to_tensor


def gray():
    return Net().eval(), v2.Compose([v2.Grayscale(), to_tensor])


def heads():
    return Heads().eval(), to_tensor


def of_mapping():
    return OfMapping().eval(), to_tensor


def tokens():
    return Tokens().eval(), to_tensor
"""


@pytest.fixture
def own(tmp_path, monkeypatch, featnorm):
    """The command, in a folder with the module and 24 images in `photos`."""
    (tmp_path / "own.py").write_text(MODULE)
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    random = np.random.default_rng(0)
    (tmp_path / "photos").mkdir()
    for i in range(24):
        pixels = random.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "photos" / f"{i:02}.png")

    def fit(model, *options):
        given = ("--model", f"own:{model}", "--detector", "KNN(k=1)", "--cache", "cache", "--workers", 0)
        return featnorm("fit", "photos", *given, *options)

    yield fit
    sys.modules.pop("own", None)


def test_the_head_that_was_chosen_of_several_is_named(own):
    status, printed, _ = own("heads")
    assert status == 0
    note = (
        "Note: the model has several heads: logits: 4 wide, from addmm in `animal`, the model's output 'animal'; "
        "other heads: 'color'; choose one with output= (--output).\n"
    )
    assert note in printed
    scorer = fn.load("detector.featnorm", "own:heads")
    assert "the model's output 'animal'" in scorer.tap.describe()
    images = torch.rand(3, 3, 8, 8)
    torch.testing.assert_close(scorer(images).logits, scorer.model(images)["animal"].detach())
    status, printed, _ = own("heads", "--output", "color")
    assert (status, "several heads" in printed) == (0, False)
    assert fn.load("detector.featnorm", "own:heads")(images).logits.shape == (3, 5)
    with pytest.warns(UserWarning, match="^the model has several heads: .* other heads: 'color'"):
        fn.fit("photos", "own:heads", detector="KNN(k=1)", cache="cache")


def test_a_model_that_takes_a_mapping_is_fitted_by_a_wrapper(own):
    status, _, error = own("of_mapping")
    assert status == 2
    assert error == (
        "featnorm: the model takes a mapping, and the batch is a tensor: pass a mapping; for images, wrap the "
        "model in a module whose forward(x) calls it with the mapping, such as model({'image': x}) (IndexError: "
        "too many indices for tensor of dimension 4)\n"
    )


def test_the_layer_and_how_its_positions_are_pooled_are_in_the_file(own, featnorm):
    images = torch.rand(3, 3, 8, 8)
    assert own("make", "--layer", "conv", "--pooling", "norm", "--detector", "L1Norm")[0] == 0
    scorer = fn.load("detector.featnorm", "own:make")
    norms = scorer.model.conv(images).relu().flatten(2).norm(dim=2).detach()
    torch.testing.assert_close(scorer.tap(images).activation, norms)
    torch.testing.assert_close(scorer(images).score, fn.l1_norm(norms))
    widths = {}
    for axis, layer in (("1", "conv"), ("-1", "token"), ("1", "token")):
        status, _, error = own("tokens", "--layer", layer, "--channel-axis", axis)
        assert status == 0, error
        tap = fn.load("detector.featnorm", "own:tokens").tap
        widths[layer, axis] = tap(images).activation.shape[1]
    assert widths == {("conv", "1"): 6, ("token", "-1"): 12, ("token", "1"): 36}
    chosen = ("--model", "own:tokens", "--layer", "token")
    assert "Last hidden layer: 12 units" in featnorm("inspect", *chosen, "--channel-axis", "-1")[1]
    assert "the norm over positions" in featnorm("inspect", *chosen, "--channel-axis", 2, "--pooling", "norm")[1]
    status, _, error = own("make", "--pooling", "norm")
    assert (status, "pass layer= too" in error) == (2, True)
    status, _, error = own("make", "--head", "none", "--pooling", "norm")
    assert (status, "only for a model whose classifier is kept" in error) == (2, True)
    assert "are for --model, not for a file" in featnorm("inspect", "detector.featnorm", "--pooling", "norm")[2]


def test_which_weights_count_is_said_when_they_differ(own, featnorm):
    assert own("make")[0] == 0
    score = ("score", "detector.featnorm", "photos")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert featnorm(*score, "--model", "own:make", "-o", "make.csv")[0] == 0
    with pytest.warns(UserWarning, match="other weights than the model that own:other makes") as found:
        assert featnorm(*score, "--model", "own:other", "-o", "other.csv")[0] == 0
    (one,) = found
    assert warnings.formatwarning(one.message, one.category, one.filename, one.lineno) == (
        "featnorm: detector.featnorm contains other weights than the model that own:other makes: those in the "
        "file are used\n"
    )
    assert Path("make.csv").read_bytes() == Path("other.csv").read_bytes()
    with pytest.warns(UserWarning, match="contains other weights than the model that own:other makes"):
        fn.load("detector.featnorm", "own:other")


def test_a_batch_of_other_channels_is_named(own, featnorm):
    wanted = "and the model takes 3 channels, not 1: preprocess it as the model's training images were"
    status, _, error = own("gray")
    assert status == 2
    assert f"featnorm: the batch has shape (8, 1, 8, 8), {wanted} (RuntimeError: Given groups=1" in error
    assert own("make")[0] == 0
    scorer = fn.load("detector.featnorm", "own:make")
    with pytest.raises(ValueError, match=rf"the batch has shape \(2, 1, 8, 8\), {wanted}"):
        scorer(torch.rand(2, 1, 8, 8))
    status, _, error = featnorm("score", "detector.featnorm", "photos", "--model", "own:gray")
    assert status == 2
    assert error.startswith(
        "featnorm: the preprocess of own:gray does not fit detector.featnorm: the batch has shape"
    )
    with pytest.raises(ValueError, match=r"\(2, 5\), and the model takes vectors of 8 numbers"):
        fn.FeatureTap(torch.nn.Linear(8, 2))(torch.rand(2, 5))


def test_positions_of_maps_have_verdicts(own, featnorm, tmp_path):
    status, printed, _ = own("maps", "--per", "position", "--detector", "NAN")
    assert status == 0
    assert "it flags at most 5.0 % of images like these; with this one, between" in printed
    assert "It flags at most 5.0 % of the positions of such images, averaged over" in printed
    scorer = fn.load("detector.featnorm", "own:maps")
    assert (scorer.per, scorer.facts["verdicts"]) == ("position", "per position")
    again = ("--model", "own:maps", "--workers", 0)
    status, printed, _ = featnorm("score", "detector.featnorm", "photos", *again, "-o", "v.csv", "--maps", "maps")
    assert (status, "Wrote maps." in printed) == (0, True)
    assert len(list((tmp_path / "maps").iterdir())) == 24
    assert (tmp_path / "v.csv").read_text().startswith("path,score,p_value,verdict,predicted,error,group,flagged_")
    status, printed, _ = featnorm("calibrate", "detector.featnorm", "photos", *again, "--out", "new.featnorm")
    assert (status, "Calibrated on 24 images." in printed) == (0, True)
    sets = ("--id", "photos[:12]", "--ood", "photos[12:]", "--detector", "KLUniform")
    status, printed, _ = featnorm("evaluate", "new.featnorm", *again, *sets)
    assert (status, "flagged by the fitted NAN()" in printed) == (0, True)
    status, printed, _ = featnorm("evaluate", *again, "--per", "position", *sets)
    assert (status, "KLUniform()" in printed) == (0, True)
    status, _, error = featnorm("export", "detector.featnorm", *again[:2], "--out", "x.onnx")
    assert (status, "calibrated on parts of images or clips" in error) == (2, True)


@pytest.mark.parametrize(
    ("model", "options", "message"),
    [
        ("make", (), "the model returns no maps of logits of shape (n, C, height, width), but [(2, 4)]"),
        (
            "maps",
            ("--detector", "KNN(k=3)"),
            "cannot be left out of the fit in turn: verdicts per position need scores",
        ),
        ("maps", ("--detector", "Mahalanobis"), "Mahalanobis() needs labels to fit"),
        ("maps", ("--head", "none"), "verdicts per position need the model's own classifier"),
        ("maps", ("--thresholds-by", "class"), "thresholds by group are for verdicts per input"),
        ("maps", ("--layer", "conv"), "leave out layer="),
    ],
)
def test_what_does_not_work_per_position_is_one_line(own, model, options, message):
    status, _, error = own(model, "--per", "position", "--detector", "NAN", *options)
    assert (status, error.count("\n"), message in error) == (2, 1, True), error


def test_a_detector_of_positions_is_fitted_to_some_of_each_image(own, tmp_path):
    random = np.random.default_rng(1)
    for i in range(24, 130):
        Image.fromarray(random.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(
            tmp_path / "photos" / f"{i:03}.png"
        )
    assert own("maps", "--per", "position", "--detector", "KLUniform+KNN(k=3)", "--tpr", "0.9")[0] == 0
    scorer = fn.load("detector.featnorm", "own:maps")
    knn = scorer.detector.terms[1]
    positions = 4 * 4
    assert len(knn.bank.rows) % positions == 0
    assert len(scorer.calibration.scores) + len(knn.bank.rows) < 130 * positions
