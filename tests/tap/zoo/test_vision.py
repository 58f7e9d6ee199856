"""Classifiers of timm and torchvision: `pooled` is what the head reads, and the logits are the output."""

import pytest

pytest.importorskip("timm")

from zoo_vision import DIFFERENCES, TIMM, TORCHVISION, check

pytestmark = pytest.mark.slow

# The others take minutes: docs/zoo.md has all of them.
QUICK = [
    "crossvit_tiny_240", "deit_tiny_distilled_patch16_224", "efficientvim_m1", "efficientvit_m0", "fasternet_t0",
    "levit_128s", "mobilenetv3_small_050", "starnet_s050", "test_convnext", "test_mambaout", "test_nfnet",
    "test_vit",
]  # fmt: skip
QUICK_TORCHVISION = ["mobilenet_v3_small", "resnet18", "shufflenet_v2_x0_5", "squeezenet1_1"]


@pytest.mark.parametrize("name", QUICK)
def test_what_timm_calls_pre_logits(name: str) -> None:
    assert not check("timm", name).problems()


@pytest.mark.parametrize("name", QUICK_TORCHVISION)
def test_what_the_heads_of_torchvision_read(name: str) -> None:
    assert not check("torchvision", name).problems()


def test_the_zoo_is_large() -> None:
    assert len(set(TIMM)) >= 120
    assert set(QUICK) < set(TIMM)
    assert set(QUICK_TORCHVISION) < set(TORCHVISION)
    assert all(reason for reason, _ in DIFFERENCES.values())
