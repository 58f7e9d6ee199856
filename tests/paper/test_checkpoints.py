"""Checkpoints in the layouts of their authors, made of random weights."""

import argparse
import os

import pytest
import torch
import torchvision.models
from torch import nn

from featnorm.models import ModelError
from featnorm.paper.checkpoints import ContrastiveNetwork, load_contrastive

WIDTH = 512


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    network = ContrastiveNetwork("resnet18")
    for module in network.modules():  # fresh ones are all alike
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
    return network.eval()


def named(network, backbone, hidden, embedding, classifier=None):
    """The state of a network under an author's names."""
    parts = {"backbone": backbone, "hidden": hidden, "embedding": embedding, "classifier": classifier}
    state = {}
    for name, value in network.state_dict().items():
        part, _, rest = name.partition(".")
        if parts[part] is not None:
            state[parts[part] + rest] = value
    return state


def supcon(network, wrapper="module.", classifier="module.fc."):
    names = [f"{wrapper}encoder.", f"{wrapper}head.0.", f"{wrapper}head.2."]
    return {"opt": argparse.Namespace(lr=0.5), "model": named(network, *names, classifier), "epoch": 700}


def moco(network):
    query = [f"module.encoder_q.{part}" for part in ("", "fc.0.", "fc.2.")]
    state = named(network, *query)
    state |= {name.replace("encoder_q", "encoder_k"): torch.zeros_like(v) for name, v in state.items()}
    state |= {"module.queue": torch.zeros(128, 8), "module.queue_ptr": torch.zeros(1, dtype=torch.int64)}
    return {"epoch": 800, "arch": "resnet18", "state_dict": state}


def saved(tmp_path, thing, name="supcon.pth"):
    torch.save(thing, tmp_path / name)
    return tmp_path / name


def load(path, layout, **options):
    return load_contrastive(path, layout, architecture="resnet18", **options)


def refused(path, layout="supcon", **options):
    with pytest.raises(ModelError) as caught:
        load(path, layout, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_supcon(network, tmp_path):
    loaded = load(saved(tmp_path, supcon(network)), "supcon")
    pixels = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        pooled = loaded.backbone(pixels)
        assert torch.equal(pooled, network.backbone(pixels))
    features, expected = loaded.features(pooled), network.features(pooled)
    for name in ("activation", "pooled", "embedding", "logits"):
        assert torch.equal(features.tensor(name), expected.tensor(name)), name
    assert torch.equal(features.tensor("activation"), network.hidden(pooled).relu())
    assert features.tensor("logits").shape == (2, 1000)
    assert features.classifier_reads("pooled")
    assert not features.classifier_reads("activation")
    assert not loaded.training


@pytest.mark.parametrize("wrapper", ["", "module."])
def test_a_wrapper_around_all_or_around_the_encoder(network, tmp_path, wrapper):
    state = supcon(network, wrapper=wrapper, classifier="fc.")["model"]
    inside = {name.replace("encoder.", "encoder.module."): value for name, value in state.items()}
    for i, content in enumerate((state, {"model": inside})):
        loaded = load(saved(tmp_path, content, f"{i}.pth"), "supcon")
        assert torch.equal(loaded.backbone.conv1.weight, network.backbone.conv1.weight)
        assert torch.equal(loaded.classifier.weight, network.classifier.weight)


def test_a_classifier_of_its_own_file(network, tmp_path):
    alone = saved(tmp_path, supcon(network, classifier=None))
    without = load(alone, "supcon").features(torch.rand(3, WIDTH))
    assert without.logits is None
    with pytest.raises(ValueError, match="no `logits`: the network was trained without labels, or its file"):
        without.tensor("logits")
    linear = saved(
        tmp_path, {"model": {f"fc.{n}": v for n, v in network.classifier.state_dict().items()}}, "fc.pth"
    )
    loaded = load(alone, "supcon", classifier=linear)
    assert torch.equal(loaded.classifier.bias, network.classifier.bias)


def test_moco(network, tmp_path):
    loaded = load(saved(tmp_path, moco(network)), "moco")
    assert torch.equal(loaded.backbone.layer4[1].bn2.running_mean, network.backbone.layer4[1].bn2.running_mean)
    assert torch.equal(loaded.hidden.weight, network.hidden.weight)
    assert torch.equal(loaded.embedding.weight, network.embedding.weight)
    assert loaded.classifier is None


def test_what_does_not_fit_is_named(network, tmp_path):
    whole = supcon(network)["model"]
    lacking = {name: value for name, value in whole.items() if "head" not in name}
    message = refused(saved(tmp_path, {"model": lacking}))
    assert "layout of supcon: it lacks head.0.weight, head.0.bias, head.2.weight and 1 more" in message
    message = refused(saved(tmp_path, {"model": {**whole, "module.encoder.layer9.weight": torch.zeros(1)}}))
    assert message.endswith("it has encoder.layer9.weight, which are unknown")
    message = refused(saved(tmp_path, {"model": {**whole, "module.head.2.weight": torch.zeros(64, WIDTH)}}))
    assert message.endswith("head.2.weight is (64, 512) where (128, 512) is expected")
    plain = saved(tmp_path, torchvision.models.resnet18().state_dict())
    message = refused(plain)
    assert "it lacks encoder.conv1.weight" in message
    assert "it has conv1.weight" in message
    assert "it lacks encoder_q.conv1.weight" in refused(plain, "moco")


def test_other_layout_raises(network, tmp_path):
    message = refused(saved(tmp_path, moco(network)), "supcon")
    assert "it has encoder_q.conv1.weight" in message
    assert "it lacks encoder_q.conv1.weight" in refused(saved(tmp_path, supcon(network)), "moco")


class Evil:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_no_code_is_run(network, tmp_path):
    thing = {**supcon(network), "hook": Evil(tmp_path / "ran")}
    message = refused(saved(tmp_path, thing))
    assert (
        "could run any code when loaded: if you trust the file, load it yourself and save model.state_dict() alone"
        in message
    )
    assert not (tmp_path / "ran").exists()
    assert "check the path" in refused(tmp_path / "nowhere.pth")
