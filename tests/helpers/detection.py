"""A tiny object detector of torchvision, with random weights, and images for it."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

SIDE, HIDDEN, CLASSES = 64, 24, 4  # with the background


def tiny_detector(head: nn.Module | None = None, seed: int = 0, **options: Any) -> Any:
    """Return a Faster R-CNN that finds boxes in noise; ``head`` is its box head of `HIDDEN` units."""
    detection = pytest.importorskip("torchvision.models.detection")
    ops = pytest.importorskip("torchvision.ops")
    faster_rcnn, anchors = detection.faster_rcnn, detection.anchor_utils
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        backbone: Any = nn.Sequential(nn.Conv2d(3, 8, 3, 4, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, 2, 1), nn.ReLU())
        backbone.out_channels = 8
        model = detection.FasterRCNN(
            backbone,
            min_size=SIDE,
            max_size=2 * SIDE,
            rpn_anchor_generator=anchors.AnchorGenerator(((16, 32),), ((0.5, 1.0),)),
            rpn_post_nms_top_n_test=20,
            box_roi_pool=ops.MultiScaleRoIAlign(["0"], 3, 2),
            box_head=head or faster_rcnn.TwoMLPHead(8 * 9, HIDDEN),
            box_predictor=faster_rcnn.FastRCNNPredictor(HIDDEN, CLASSES),
            box_detections_per_img=6,
            **options,
        )
        with torch.no_grad():  # or all proposals of all images would have nearly the same logits
            model.roi_heads.box_predictor.cls_score.weight.mul_(50)
    return model.eval()


def noise_images(count: int = 3, seed: int = 0, channels: int = 3) -> list[Tensor]:
    """Return images of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    sizes = ((40, 60), (64, 64), (80, 50), (50, 90))
    return [torch.rand(channels, *sizes[i % len(sizes)], generator=generator) for i in range(count)]
