"""Boxes: a Faster R-CNN that finds digits on textures, and what it finds of objects that are no such digits."""

from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from featnorm._utils.extras import vision_module
from featnorm._utils.progress import progress_bar
from featnorm.paper.images import as_pixels
from featnorm.paper.scenes import DIGITS, SIDE, Scenes

CELL = SIDE // 2

_WIDTH, _HIDDEN, _POOL = 64, 256, 7
_BATCH = 8
_RATE, _WARMUP, _DECAY = 1e-3, 0.1, 0.01
#: Confidence below which a detection is dropped, as is usual for detectors in use.
MIN_CONFIDENCE = 0.5


@dataclass(frozen=True)
class Scale:
    """Number of seeds, of training steps of `_BATCH` scenes, and of scenes to train and to test on."""

    seeds: int
    steps: int
    training: int
    known: int
    foreign: int


@dataclass(frozen=True)
class Draw:
    """A job: a detector and its scenes."""

    seed: int

    @property
    def folder(self) -> str:
        """Name of the folder of the run."""
        return f"boxes-seed{self.seed}"


def make_detector(seed: int) -> nn.Module:
    """Return a small Faster R-CNN with initial weights; torchvision's classes, on a backbone of six layers."""
    detection, ops = vision_module("torchvision.models.detection"), vision_module("torchvision.ops")
    anchors = vision_module("torchvision.models.detection.anchor_utils").AnchorGenerator
    heads = vision_module("torchvision.models.detection.faster_rcnn")

    def layer(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
        convolution = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        backbone: Any = nn.Sequential(
            layer(3, 16, 2), layer(16, 32, 2), layer(32, _WIDTH), layer(_WIDTH, _WIDTH), layer(_WIDTH, _WIDTH)
        )
        backbone.out_channels = _WIDTH
        model: nn.Module = detection.FasterRCNN(
            backbone,
            min_size=SIDE,
            max_size=SIDE,
            rpn_anchor_generator=anchors(((14, 22),), ((0.5, 1.0),)),
            rpn_pre_nms_top_n_train=200,
            rpn_pre_nms_top_n_test=100,
            rpn_post_nms_top_n_train=60,
            rpn_post_nms_top_n_test=30,
            rpn_batch_size_per_image=64,
            box_roi_pool=ops.MultiScaleRoIAlign(["0"], _POOL, 2),
            box_head=heads.TwoMLPHead(_WIDTH * _POOL**2, _HIDDEN),
            box_predictor=heads.FastRCNNPredictor(_HIDDEN, DIGITS + 1),
            box_batch_size_per_image=32,
            box_score_thresh=MIN_CONFIDENCE,
            box_detections_per_img=20,
        )
    return model


def targets_of(truth: Tensor) -> list[dict[str, Tensor]]:
    """Return the objects of scenes by their truth (n, 64, 64): ``boxes`` (k, 4) and ``labels`` (k,) of each scene.

    Labels are those of the truth: a digit plus one, or `FOREIGN`.
    """
    targets = []
    for scene in truth:
        boxes, labels = [], []
        for y, x in product(range(0, SIDE, CELL), repeat=2):
            cell = scene[y : y + CELL, x : x + CELL]
            rows, columns = cell.nonzero(as_tuple=True)
            if len(rows):
                boxes.append([x + columns.min(), y + rows.min(), x + columns.max() + 1, y + rows.max() + 1])
                labels.append(int(cell.max()))
        targets.append(
            {"boxes": torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4), "labels": torch.tensor(labels, dtype=torch.int64)}
        )
    return targets


def train_detector(scenes: Scenes, steps: int, seed: int, *, progress: bool | None = None) -> nn.Module:
    """Return a detector trained on scenes without foreign objects.

    Parameters
    ----------
    scenes : training scenes.
    steps : number of steps of AdamW, whose learning rate rises and falls along a cosine.
    seed : seed of the initial weights and of the order of the scenes.
    progress : whether to show a progress bar. Default: on a terminal; elsewhere a line every 30 seconds.
    """
    model, targets = make_detector(seed).train(), targets_of(scenes.truth)
    optimizer = torch.optim.AdamW(model.parameters(), _RATE, weight_decay=_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _RATE, total_steps=steps, pct_start=_WARMUP)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)  # torchvision's detectors draw the proposals to train on from torch's generator
        for _ in progress_bar(range(steps), unit="step", progress=progress):
            rows = torch.randint(len(targets), (_BATCH,)).tolist()
            losses = model([*as_pixels(scenes.pixels[rows])], [targets[row] for row in rows])
            optimizer.zero_grad()
            torch.stack([*losses.values()]).sum().backward()
            optimizer.step()
            schedule.step()
    return model.eval()
