"""The features of positions that `FeatureTap(per="position")` finds in models that return maps."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featnorm.features import Features
from featnorm.tap import FeatureTap
from networks import Net, assert_absent, assert_reproduces, plain, same

pytestmark = pytest.mark.usefixtures("seeded")

N, D, C, H, W = 3, 8, 5, 6, 10


def up(x: Tensor) -> Tensor:
    return F.interpolate(x, (2 * H, 2 * W), mode="bilinear", align_corners=False)


def conv(width: int, kernel: int = 1, inputs: int = 3) -> nn.Conv2d:
    return nn.Conv2d(inputs, width, kernel, padding=kernel // 2)


def unet() -> nn.Module:
    """Return a small U-Net, whose last layer is rectified."""

    def run(net: Any, x: Tensor) -> Tensor:
        high = F.relu(net.first(x))
        low = F.relu(net.second(F.max_pool2d(high, 2)))
        return net.head(F.relu(net.third(torch.cat([high, F.interpolate(low, scale_factor=2.0)], 1))))

    return Net(run, first=conv(4, 3), second=conv(6, 3, 4), third=conv(D, 3, 10), head=conv(C, 1, D))


@pytest.fixture
def images() -> Tensor:
    return torch.randn(N, 3, H, W)


def per_position(net: nn.Module, x: Tensor) -> Features:
    return FeatureTap(net.eval(), per="position")(x)


def rows(maps: Tensor) -> Tensor:
    """Return maps (n, C, h, w) as one row per position."""
    return maps.movedim(1, -1).flatten(0, 2)


def test_every_position_of_a_unet_is_a_row_with_its_image_as_owner(images: Tensor) -> None:
    net = unet()
    features = per_position(net, images)
    same(features.logits, rows(plain(net, images)))
    assert features.activation is features.pooled
    assert features.tensor("activation").min() >= 0
    assert_reproduces(features, "activation")
    assert features.parts is not None
    assert features.parts.owners.tolist() == [i for i in range(N) for _ in range(H * W)]
    assert (features.parts.count, features.parts.grid) == (N, (H, W))


HEADS: dict[str, Callable[[Any, Tensor], Any]] = {
    "interpolated": lambda net, x: up(net.head(F.relu(net.trunk(x)))),
    "nearest": lambda net, x: F.interpolate(net.head(F.relu(net.trunk(x))), scale_factor=2.0),
    "softmax": lambda net, x: up(net.head(F.relu(net.trunk(x)))).softmax(1),
    "softmax before": lambda net, x: up(net.head(F.relu(net.trunk(x))).softmax(1)),
    "dict": lambda net, x: {"aux": net.other(x), "out": up(net.head(F.relu(net.trunk(x))))},
    "logits": lambda net, x: {"loss": x.sum(), "logits": net.head(F.relu(net.trunk(x)))},
    "channels last": lambda net, x: net.linear(F.relu(net.trunk(x)).movedim(1, -1)).movedim(-1, 1),
    "tokens": lambda net, x: up(net.linear(F.relu(net.trunk(x)).flatten(2).mT).mT.reshape(len(x), C, H, W)),
    "dropout and a scale": lambda net, x: 2 * net.head(F.dropout(F.relu(net.trunk(x)), training=net.training)),
}


@pytest.mark.parametrize("head", HEADS)
def test_the_linear_classifier_of_each_position_is_found(head: str, images: Tensor) -> None:
    parts = {"trunk": conv(D, 3), "head": conv(C, 1, D), "other": conv(C), "linear": nn.Linear(D, C)}
    net = Net(HEADS[head], **parts)
    features = per_position(net, images)
    hidden = plain(Net(lambda net, x: F.relu(net.trunk(x)), **parts), images)
    same(features.activation, rows(hidden))
    weight = parts["linear" if head in ("channels last", "tokens") else "head"].weight
    scale = 2 if "scale" in head else 1
    same(features.linear()[0], scale * weight.flatten(1))
    assert_reproduces(features, "activation")


def test_the_classifier_of_a_sum_reads_all_branches(images: Tensor) -> None:
    def run(net: Any, x: Tensor) -> Tensor:
        return net.head(F.relu(net.trunk(x))) + net.second(F.relu(net.other(x)))

    net = Net(run, trunk=conv(D, 3), other=conv(4), head=conv(C, 1, D), second=conv(C, 1, 4))
    features = per_position(net, images)
    assert features.tensor("activation").shape == (N * H * W, D + 4)
    assert_reproduces(features, "activation", rows(plain(net, images)))


def test_one_logit_is_read_as_two_classes(images: Tensor) -> None:
    net = Net(lambda net, x: net.head(F.relu(net.trunk(x))), trunk=conv(D, 3), head=conv(1, 1, D))
    features = per_position(net, images)
    logit = rows(plain(net, images))
    same(features.logits, torch.cat([-logit, logit], 1) / 2)
    assert_reproduces(features, "activation")


def test_a_classifier_of_a_neighborhood_has_a_hidden_layer_but_no_weights_per_position(images: Tensor) -> None:
    net = Net(lambda net, x: net.head(F.relu(net.trunk(x))), trunk=conv(D, 3), head=conv(C, 3, D))
    features = per_position(net, images)
    same(features.logits, rows(plain(net, images)))
    same(features.activation, rows(F.relu(plain(net.trunk, images))))
    assert_absent(features, "classifier", "embedding")
    assert "`convolution` in `head`" in features.absent["classifier"]


def test_logits_without_a_linear_layer_are_all_there_is(images: Tensor) -> None:
    nets = {
        "upsample_bilinear2d": lambda net, x: net.head(F.relu(net.trunk(x))) + up(net.other(x))[..., ::2, ::2],
        "native_group_norm": lambda net, x: net.norm(net.head(F.relu(net.trunk(x)))),
    }
    parts = {"trunk": conv(D, 3), "head": conv(C, 1, D), "other": conv(C), "norm": nn.GroupNorm(1, C)}
    for run in nets.values():
        net = Net(run, **parts)
        features = per_position(net, images)
        same(features.logits, rows(plain(net, images)))
        assert_absent(features, "activation", "pooled", "embedding", "classifier")


def test_a_classifier_that_reads_what_is_not_rectified_has_no_activation(images: Tensor) -> None:
    net = Net(lambda net, x: net.head(net.trunk(x)), trunk=conv(D, 3), head=conv(C, 1, D))
    features = per_position(net, images)
    assert_reproduces(features, "pooled")
    with pytest.raises(ValueError, match=r"`trunk`.* is not rectified.*Train the model with a ReLU before its"):
        features.tensor("activation")


def test_a_chosen_output_is_the_logits(images: Tensor) -> None:
    net = Net(
        lambda net, x: [net.head(F.relu(net.trunk(x))), net.other(x)],
        trunk=conv(D, 3), head=conv(C, 1, D), other=conv(C),
    ).eval()  # fmt: skip
    tap = FeatureTap(net, output="1", per="position")
    same(tap(images).logits, rows(plain(net, images)[1]))
    assert (
        "the model's output '0'; other heads: '1'"
        in FeatureTap(net, per="position").trace(images).describe_heads()
    )


def test_images_of_another_size_have_another_grid_and_no_image_depends_on_the_others(images: Tensor) -> None:
    tap = FeatureTap(unet().eval(), per="position").trace(images)
    larger = torch.randn(2, 3, 2 * H, W)
    features = tap(larger)
    assert features.parts is not None
    assert features.parts.grid == (2 * H, W)
    alone = tap(larger[1:])
    same(alone.activation, features.tensor("activation")[2 * H * W :])


def test_a_tap_of_positions_is_restored_from_its_state(images: Tensor) -> None:
    net = unet().eval()
    tap = FeatureTap(net, per="position").trace(images)
    again = FeatureTap.from_dict(net, tap.to_dict())
    same(again(images).activation, tap(images).tensor("activation"))
    assert again.describe() == tap.describe()
    assert "rectified as NAN expects" in tap.describe()


def test_positions_take_the_labels_of_the_nearest_pixels(images: Tensor) -> None:
    net = Net(
        lambda net, x: up(net.head(F.relu(net.trunk(F.avg_pool2d(x, 2))))), trunk=conv(D, 3), head=conv(C, 1, D)
    ).eval()
    masks = torch.randint(C, (N, H, W))
    masks[0, :4] = 255
    (features,) = FeatureTap(net, per="position").stream([(images, masks)], progress=False)
    wanted = masks[:, 1::2, 1::2].flatten()
    assert features.tensor("labels").tolist() == torch.where(wanted == 255, -1, wanted).tolist()
    (features,) = FeatureTap(net, per="position").stream([(images, masks[:, 0, 0])], progress=False)
    assert "must be masks (n, height, width) of integers for 3 inputs" in features.absent["labels"]


def test_what_has_no_positions_is_an_error(images: Tensor) -> None:
    pooled = Net(lambda net, x: net.trunk(x).mean((2, 3)), trunk=conv(C))
    with pytest.raises(ValueError, match=r"returns no maps of logits of shape \(n, C, height, width\)"):
        per_position(pooled, images)
    net = Net(lambda net, x: net.head(F.relu(F.avg_pool2d(x, (H, W)))), head=conv(C, 1))
    with pytest.raises(ValueError, match="trace it on larger inputs"):
        per_position(net, images)
    with pytest.raises(ValueError, match="leave out layer="):
        FeatureTap(unet(), "third", per="position")
    with pytest.raises(ValueError, match="per must be one of 'input', 'position', 'box', got 'pixel'"):
        FeatureTap(unet(), per="pixel")  # type: ignore[arg-type]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fcn_resnet50", "deeplabv3_mobilenet_v3_large", "lraspp_mobilenet_v3_large"])
def test_segmentation_models_of_torchvision(name: str) -> None:
    models = pytest.importorskip("torchvision.models.segmentation")
    net = getattr(models, name)(weights=None, weights_backbone=None, num_classes=C).eval()
    x = torch.randn(2, 3, 64, 96)
    features = per_position(net, x)
    assert features.parts is not None
    height, width = features.parts.grid or (0, 0)
    maps = features.tensor("logits").reshape(2, height, width, C).movedim(-1, 1)
    same(F.interpolate(maps, (64, 96), mode="bilinear", align_corners=False), plain(net, x)["out"])
    # The low-level branch of LR-ASPP is not rectified.
    assert (features.activation is None) == name.startswith("lraspp")
    assert_reproduces(features, "pooled")


@pytest.mark.slow
def test_segmentation_models_of_transformers() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_labels=C, hidden_sizes=[16, 32, 40, 64], decoder_hidden_size=24, depths=[1, 1, 1, 1]
    )
    net = transformers.SegformerForSemanticSegmentation(config).eval()
    x = torch.randn(2, 3, 64, 96)
    features = per_position(net, x)
    same(features.logits, rows(plain(net, x).logits))
    assert features.tensor("activation").shape == (2 * 16 * 24, 24)
    assert_reproduces(features, "activation")
