"""`FeatureTap` on models of torchvision and timm, with random weights."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featnorm.tap import FeatureTap

pytestmark = pytest.mark.slow

torchvision_models = pytest.importorskip("torchvision.models")
timm = pytest.importorskip("timm")

MLP_HEAD = "It is the hidden layer of an MLP head"
POOL = "Table 6"
NONE = "do not apply"
CLASSES = 10


@dataclass(frozen=True)
class Case:
    library: str
    name: str
    size: int
    kind: str
    width: int | None  # of the last hidden layer
    pooled: int
    classifier: str  # the path of the last linear layer
    read: Callable[[Any, Tensor], tuple[Tensor | None, Tensor]]  # activation and pooled, by hand


def _token(model: Any, x: Tensor) -> Tensor:
    x = model._process_input(x)
    return model.encoder(torch.cat([model.class_token.expand(len(x), -1, -1), x], 1))[:, 0]


def _avgpool(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled = model.avgpool(model.features(x)).flatten(1)
    return pooled, pooled


def _resnet(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    trunk = nn.Sequential(*list(model.children())[:-2]).eval()
    pooled = trunk(x).mean((2, 3))
    return pooled, pooled


def _densenet(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled = F.relu(model.features(x)).mean((2, 3))
    return pooled, pooled


def _head(upto: int) -> Callable[[Any, Tensor], tuple[Tensor, Tensor]]:
    def read(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        pooled = model.avgpool(model.features(x)).flatten(1)
        return model.classifier[:upto](pooled), pooled

    return read


def _timm_pool(model: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    pooled = model.forward_head(model.forward_features(x), pre_logits=True).flatten(1)
    return pooled, pooled


CASES = [
    Case("tv", "resnet50", 64, POOL, 2048, 2048, "fc", _resnet),
    Case("tv", "densenet121", 64, POOL, 1024, 1024, "classifier", _densenet),
    Case("tv", "vgg16_bn", 32, MLP_HEAD, 4096, 25088, "classifier.6", _head(5)),
    Case("tv", "efficientnet_b0", 64, POOL, 1280, 1280, "classifier.1", _avgpool),
    Case("tv", "mobilenet_v3_large", 64, MLP_HEAD, 1280, 960, "classifier.3", _head(2)),
    Case(
        "tv", "regnet_y_400mf", 64, POOL, 440, 440, "fc",
        lambda m, x: (m.trunk_output(m.stem(x)).mean((2, 3)),) * 2,
    ),
    Case("tv", "vit_b_16", 32, NONE, None, 768, "heads.head", lambda m, x: (None, _token(m, x))),
    Case(
        "tv", "swin_t", 64, NONE, None, 768, "head",
        lambda m, x: (None, m.flatten(m.avgpool(m.permute(m.norm(m.features(x)))))),
    ),
    Case(
        "tv", "convnext_tiny", 64, NONE, None, 768, "classifier.2",
        lambda m, x: (None, m.classifier[:2](m.avgpool(m.features(x)))),
    ),
    Case("timm", "tf_efficientnet_lite0", 64, POOL, 1280, 1280, "classifier", _timm_pool),
    Case(
        "timm", "vit_tiny_patch16_224", 224, NONE, None, 192, "head",
        lambda m, x: (None, m.forward_features(x)[:, 0]),
    ),
    Case("timm", "resnetv2_50", 64, POOL, 2048, 2048, "head.fc", _timm_pool),
]  # fmt: skip


def build(case: Case) -> nn.Module:
    options: dict[str, Any] = {"num_classes": CLASSES}
    if case.name == "vit_b_16":
        options["image_size"] = case.size
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if case.library == "timm":
            model = timm.create_model(case.name, pretrained=False, **options)
        else:
            model = torchvision_models.get_model(case.name, weights=None, **options)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1, generator=generator)
                module.running_var.uniform_(0.5, 1.5, generator=generator)
            elif isinstance(module, nn.Linear) and module.out_features == CLASSES:
                # Some are initialized to zero, and zero logits would hide errors.
                module.weight.normal_(0, 0.1, generator=generator)
                module.bias.normal_(generator=generator)
    return model


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.name)
def case(request: pytest.FixtureRequest) -> tuple[Case, nn.Module, FeatureTap, Tensor]:
    model = build(request.param)
    x = torch.randn(3, 3, request.param.size, request.param.size, generator=torch.Generator().manual_seed(2))
    return request.param, model, FeatureTap(model.train()).trace(x), x


Tapped = tuple[Case, nn.Module, FeatureTap, Tensor]


def test_what_is_found_is_what_a_manual_pass_gives(case: Tapped) -> None:
    expected, model, tap, x = case
    features = tap(x)
    assert all(m.training for m in model.modules())
    model.eval()
    try:
        with torch.no_grad():
            activation, pooled = expected.read(model, x)
            logits = model(x)
    finally:
        model.train()
    assert torch.equal(features.logits, logits)
    assert features.pooled.shape == (3, expected.pooled)
    torch.testing.assert_close(features.pooled, pooled.flatten(1), rtol=1e-4, atol=1e-5)
    assert features.embedding is None
    if expected.width is None:
        assert features.activation is None
        assert "normalization" in features.absent["activation"]
    else:
        assert features.activation.shape == (3, expected.width)
        torch.testing.assert_close(features.activation, activation.flatten(1), rtol=1e-4, atol=1e-5)


def test_the_classifier_makes_the_logits(case: Tapped) -> None:
    expected, model, tap, x = case
    features = tap(x)
    weight, bias = features.linear()
    layer = model.get_submodule(expected.classifier)
    assert torch.equal(weight, layer.weight.detach().flatten(1))
    assert torch.equal(bias, layer.bias.detach())
    read = features.pooled if expected.width is None else features.activation
    torch.testing.assert_close(read @ weight.T + bias, features.logits, rtol=1e-4, atol=1e-4)
    assert features.classifier_reads("pooled" if expected.width is None else "activation")


def test_what_a_plain_hook_on_the_last_linear_layer_sees(case: Tapped) -> None:
    expected, model, tap, x = case
    features = tap(x)
    seen: list[Tensor] = []
    handle = model.get_submodule(expected.classifier).register_forward_pre_hook(lambda m, a: seen.append(a[0]))
    model.eval()
    try:
        with torch.no_grad():
            model(x)
    finally:
        handle.remove()
        model.train()
    read = features.pooled if expected.width is None else features.activation
    assert torch.equal(read, seen[0].flatten(1))


def test_the_words_say_what_it_means_for_nan(case: Tapped) -> None:
    expected, _, tap, _ = case
    words = tap.describe()
    assert [kind for kind in (MLP_HEAD, POOL, NONE) if kind in words] == [expected.kind]
    if expected.width is None:
        assert all(part in words for part in ("MLP head", "layer=", "KNN"))
    else:
        assert f"{expected.width} units" in words
        assert "%" in words


def test_a_score_does_not_depend_on_the_batch(case: Tapped) -> None:
    _, _, tap, x = case
    whole, one = tap(x), tap(x[1:2])
    for name, value in one.fields():
        torch.testing.assert_close(value, getattr(whole, name)[1:2], rtol=1e-3, atol=1e-4)


def test_no_hook_is_left(case: Tapped) -> None:
    _, model, _, _ = case
    for name, module in model.named_modules():
        for kind in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs"):
            assert not getattr(module, kind), (name, kind)


def test_a_wrapped_resnet_is_listened_to_inside_its_wrapper() -> None:
    model = torchvision_models.resnet18(weights=None, num_classes=CLASSES).eval()
    x = torch.randn(2, 3, 64, 64)
    expected = FeatureTap(model)(x)
    for wrapped in (nn.DataParallel(model), torch.compile(model, backend="eager")):
        features = FeatureTap(wrapped)(x)
        for name, value in expected.fields():
            torch.testing.assert_close(getattr(features, name), value)
    assert expected.activation.shape == (2, 512)


def test_describe_without_inputs_takes_noise_of_the_size_of_the_model() -> None:
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1).eval()
    assert NONE in FeatureTap(model).describe()
    # The configuration of this one does not give the input size.
    model = timm.create_model("vit_tiny_patch16_224", pretrained=False, depth=1, img_size=32).eval()
    with pytest.raises(ValueError, match="trace"):
        FeatureTap(model).describe()


def test_the_mean_of_two_heads_is_logits() -> None:
    name = "deit_tiny_distilled_patch16_224"
    model = timm.create_model(name, pretrained=False, depth=1, img_size=32, num_classes=CLASSES).eval()
    x = torch.randn(2, 3, 32, 32)
    features = FeatureTap(model)(x)
    assert features.logits is not None, features.absent
    assert torch.equal(features.logits, model(x).detach())
    assert features.activation is None


def test_a_gated_map_is_a_rectified_map() -> None:
    # VoVNet ends in squeeze-excite after its last ReLU.
    model = timm.create_model("ese_vovnet19b_dw", pretrained=False, num_classes=CLASSES).eval()
    features = FeatureTap(model)(torch.randn(2, 3, 64, 64))
    assert features.activation is not None, features.absent["activation"]
    torch.testing.assert_close(features.activation, features.pooled)
