"""The paper's networks, in which `FeatureTap` finds the last hidden layer."""

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F

from featnorm import FeatureTap, HiddenConfidence, L1Norm
from featnorm.models import CifarResNet18, ProjectionHead, attach_head
from featnorm.paper.networks import MLP

ACTIVATIONS = {"relu": F.relu, "leaky_relu": F.leaky_relu, "gelu": F.gelu}


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_head_is_hidden_layer_embedding_and_cosine_logits(activation):
    torch.manual_seed(0)
    head = ProjectionHead(6, 5, hidden=9, embedding=4, activation=activation, temperature=0.2)
    pooled = torch.randn(7, 6)
    hidden = ACTIVATIONS[activation](pooled @ head.hidden.weight.T + head.hidden.bias)
    embedding = hidden @ head.embedding.weight.T + head.embedding.bias
    unit = embedding / embedding.norm(dim=1, keepdim=True)
    prototypes = head.classifier.weight / head.classifier.weight.norm(dim=1, keepdim=True)
    torch.testing.assert_close(head(pooled), unit @ prototypes.T / 0.2)
    features = FeatureTap(nn.Sequential(nn.Flatten(), nn.Linear(8, 6), nn.Tanh(), head))(torch.randn(7, 8))
    assert features.activation.shape == (7, 9)
    assert features.embedding.shape == (7, 4)
    assert features.logits.shape == (7, 5)
    torch.testing.assert_close(features.classifier[0], prototypes @ head.embedding.weight)
    assert (HiddenConfidence().score(features) <= L1Norm().score(features) + 1e-5).all()


def test_head_is_as_wide_as_its_input_by_default():
    assert ProjectionHead(24, 10).hidden.out_features == 24


def test_mlp_is_the_papers():
    model = MLP(3072, 10)
    linear = [(layer.in_features, layer.out_features) for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert linear == [(3072, 512), *[(512, 512)] * 4, (512, 512)]
    assert model.classifier.temperature == 0.1
    images = torch.randn(3, 3, 32, 32)
    features = FeatureTap(model)(images)
    torch.testing.assert_close(features.activation, model.body(images))
    torch.testing.assert_close(features.embedding, model.embedding(model.body(images)))


@pytest.mark.parametrize("width", [8, 64])
def test_resnet_is_resnet18_with_a_small_stem(width):
    model = CifarResNet18(width)
    if width == 64:
        reference = torchvision.models.resnet18()
        stem = sum(p.numel() for p in reference.conv1.parameters())
        body = (
            sum(p.numel() for p in reference.parameters())
            - stem
            - sum(p.numel() for p in reference.fc.parameters())
        )
        assert sum(p.numel() for p in model.parameters()) == body + 64 * 3 * 9
    sizes = []
    for stage in model.stages:
        stage.register_forward_hook(lambda _, __, output: sizes.append(output.shape[1:]))
    pooled = model(torch.randn(2, 3, 32, 32))
    assert pooled.shape == (2, 8 * width)
    assert sizes[::2] == [(width, 32, 32), (2 * width, 16, 16), (4 * width, 8, 8), (8 * width, 4, 4)]


def test_tap_on_a_resnet_with_a_head():
    model = nn.Sequential(CifarResNet18(8), ProjectionHead(64, 10, hidden=32))
    tap = FeatureTap(model)
    features = tap(torch.randn(4, 3, 32, 32))
    assert "hidden layer of an MLP head" in tap.describe()
    assert {name: value.shape[1] for name, value in features.fields()} == {
        "activation": 32,
        "pooled": 64,
        "embedding": 128,
        "logits": 10,
    }


TORCHVISION = {
    "resnet18": 512,
    "densenet121": 1024,
    "efficientnet_b0": 1280,
    "mobilenet_v3_small": 576,
    "regnet_y_400mf": 440,
    "swin_t": 768,
    "convnext_tiny": 768,
}
TIMM = ["test_resnet", "test_vit", "test_efficientnet", "test_convnext", "resnet18", "mobilenetv3_small_050"]


@pytest.mark.parametrize("name", TORCHVISION)
def test_attach_head_to_torchvision(name):
    backbone = torchvision.models.get_model(name, weights=None)
    classifier = {n: type(m) for n, m in backbone.named_modules()}
    model = attach_head(backbone, 7, hidden=20)
    assert {n: type(m) for n, m in backbone.named_modules()} == classifier  # the user's own is not touched
    features = FeatureTap(model)(torch.randn(2, 3, 64, 64))
    assert features.pooled.shape == (2, TORCHVISION[name])
    assert features.activation.shape == (2, 20)
    assert features.logits.shape == (2, 7)


@pytest.mark.parametrize("name", TIMM)
def test_attach_head_to_timm(name):
    backbone = timm.create_model(name)
    model = attach_head(backbone, 7, hidden=20)
    side = backbone.default_cfg["input_size"][-1]
    features = FeatureTap(model)(torch.randn(2, 3, side, side))
    assert features.activation.shape == (2, 20)
    assert features.logits.shape == (2, 7)


def test_attach_head_to_a_model_of_ones_own():
    backbone = nn.Sequential(nn.Conv2d(3, 5, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    model = attach_head(backbone, 4, features=5, hidden=6)
    assert FeatureTap(model)(torch.randn(2, 3, 8, 8)).activation.shape == (2, 6)
    with pytest.raises(ValueError, match="pass the width of its output as features="):
        attach_head(backbone, 4)


def test_what_is_wrong_is_named():
    with pytest.raises(ValueError, match="unknown activation 'tanh': use one of relu, leaky_relu, gelu"):
        ProjectionHead(4, 2, activation="tanh")
    with pytest.raises(ValueError, match="temperature must be positive"):
        ProjectionHead(4, 2, temperature=0)
