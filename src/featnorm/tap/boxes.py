"""The box head of detectors of torchvision's R-CNN family, and the detections that they make of its rows."""

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from featnorm.features import Boxes, Features, Parts
from featnorm.tap.batch import BatchError, Call
from featnorm.tap.capture import TRACE_AGAIN, HookPoint, PathError, capture
from featnorm.tap.weights import Step

# Largest difference between a detection and the row of the box head that it was made of: of its confidence, and of
# its corners in pixels. Both are computed twice by the same operations.
_CONFIDENCE, _PIXELS = 0.01, 1.0
# Overlap from which a detected box is one of the boxes that are given with an image.
_SAME_BOX = 0.5


class BoxHead:
    """The box head of a detector: where its values are, and what they are.

    Every row of the box head is a proposal, of which the detector makes at most one detection per class. The
    features of a detection are the row that it was made of, from which its label and its confidence were computed.
    Those of its final box would need another pass of the head, and have other logits: on the scenes of
    docs/results/maps-and-boxes.md their AUROC is 2 to 7 points higher for NAN, and within 3 points for MSP, KNN.

    The logits include the background, class 0. Without it their softmax would not be the model's confidence, and
    the index of a logit would not be the label that the model gives.

    Parameters
    ----------
    model : a model with exactly one R-CNN in it, or an R-CNN.

    Raises
    ------
    ValueError
        The model has no such module, or several; or its classifier is not linear.
    """

    def __init__(self, model: nn.Module) -> None:
        found = {name: module for name, module in model.named_modules() if _is_rcnn(module)}
        if len(found) != 1:
            detector = next((module for module in model.modules() if hasattr(module, "anchor_generator")), model)
            raise ValueError(
                f"the model has {len(found)} R-CNNs: per='box' takes one, such as torchvision's Faster, Mask or "
                "Keypoint R-CNN"
                if found
                else f"{type(detector).__name__} has no box head: per='box' takes a model with roi_heads.box_head "
                "and roi_heads.box_predictor, such as torchvision's Faster, Mask or Keypoint R-CNN; one-stage "
                "detectors (RetinaNet, FCOS, SSD) have none"
            )
        ((name, rcnn),) = found.items()
        prefix = f"{name}." if name else ""
        self._rcnn: Any = rcnn
        self._heads = f"{prefix}roi_heads"
        weight = getattr(self._rcnn.roi_heads.box_predictor.cls_score, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2:
            raise ValueError(f"`{self._heads}.box_predictor.cls_score` is not a linear classifier of boxes")

    def points(self) -> dict[str, HookPoint]:
        """Return where the features are captured, one row per proposal."""
        hidden = HookPoint("out", f"{self._heads}.box_head", 0, (), 0, False)
        logits = HookPoint("out", f"{self._heads}.box_predictor", 0, (0,), 0, False)
        return {"activation": hidden, "pooled": hidden, "logits": logits}

    def classifier_steps(self) -> list[Step]:
        """Return the steps from the hidden layer to the logits, see `featnorm.tap.weights.classifier`."""
        layer = f"{self._heads}.box_predictor.cls_score"
        bias = self._rcnn.roi_heads.box_predictor.cls_score.bias
        return [
            ("source", 0),
            ("linear", f"{layer}.weight", False, False, None if bias is None else f"{layer}.bias"),
        ]

    def proposals(self, model: nn.Module, call: Call) -> Features:
        """Run a detector on a batch, and return the features of all its proposals.

        Fields that the features of its detections cannot have are absent.
        """
        found: dict[str, Any] = capture(model, self.points(), call)
        absent = {"embedding": "a box head has no embedding"}
        if bool((found["activation"] < 0).any()):
            del found["activation"]
            absent["activation"] = f"the output of `{self._heads}.box_head` is not rectified"
        return Features(**found, absent=absent)

    def capture(
        self, model: nn.Module, points: Mapping[str, HookPoint], call: Call, advice: str = TRACE_AGAIN
    ) -> tuple[dict[str, Tensor], Parts]:
        """Run a detector on a batch, and return the value of each of its final detections at each point.

        Only images of one size are run together: torchvision pads the images of a batch to one size, and what it
        finds near the padding depends on it.

        Returns
        -------
        Values (m, ...) of the m detections, image by image in the order of the detector, and what they are of.

        Raises
        ------
        PathError
            A point was not reached, or the detections are not made of the rows of the box head as in torchvision.
        """
        sizes: dict[torch.Size, list[int]] = {}
        for i, image in enumerate(call.args[0]):
            sizes.setdefault(image.shape, []).append(i)
        runs = [self._detections(model, points, call, images, advice) for images in sizes.values()]
        owners = torch.cat([parts.owners for _, parts in runs])
        order = owners.argsort(stable=True)
        boxes = Boxes(
            *(torch.cat(values)[order] for values in zip(*(parts.boxes for _, parts in runs), strict=True))
        )
        parts = Parts(owners[order], len(call.args[0]), boxes=boxes)
        # A tensor under two names stays one.
        joined = {point: torch.cat([values[point] for values, _ in runs])[order] for point in {*points.values()}}
        return {name: joined[point] for name, point in points.items()}, parts

    def _detections(
        self, model: nn.Module, points: Mapping[str, HookPoint], call: Call, images: Sequence[int], advice: str
    ) -> tuple[dict[HookPoint, Tensor], Parts]:
        """Return the values and the detections of some images of a batch, which are run together."""
        call = Call(([call.args[0][i] for i in images],))
        logits, regression = (
            HookPoint("out", f"{self._heads}.box_predictor", 0, (i,), 0, False) for i in range(2)
        )
        with self._passes() as passed:
            wanted = {str(i): point for i, point in enumerate((logits, regression, *points.values()))}
            caught = capture(model, wanted, call, advice=advice)
        rows, parts = self._matched(caught["0"], caught["1"], *passed)
        values = {wanted[name]: value[rows] for name, value in caught.items()}
        return values, replace(parts, owners=torch.tensor(images, device=rows.device)[parts.owners])

    @contextmanager
    def _passes(self) -> Iterator[list[Any]]:
        """Provide sizes before and after resizing, proposals and detections of the first pass in this thread."""
        passed: list[Any] = []
        thread = threading.get_ident()

        def resized(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread and not passed:
                passed.extend([[image.shape[-2:] for image in args[0]], output[0].image_sizes])

        def detected(_: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if threading.get_ident() == thread and len(passed) == 2:
                # Copies of the mappings, in which the detector replaces the boxes afterwards.
                passed.extend([list(args[1]), [dict(one) for one in output[0]]])

        handles = []
        try:
            handles.append(self._rcnn.transform.register_forward_hook(resized))
            handles.append(self._rcnn.roi_heads.register_forward_hook(detected))
            yield passed
        finally:
            for handle in handles:
                handle.remove()

    def _matched(
        self,
        logits: Tensor,
        regression: Tensor,
        given: Sequence[tuple[int, int]],
        resized: Sequence[tuple[int, int]],
        proposals: Sequence[Tensor],
        detections: Sequence[Mapping[str, Tensor]],
    ) -> tuple[Tensor, Parts]:
        """Return the row (m,) that each detection was made of, and the detections."""
        counts = [len(boxes) for boxes in proposals]
        decoded = self._rcnn.roi_heads.box_coder.decode(regression, list(proposals)).split(counts)
        confidence = logits.softmax(-1).split(counts)
        rows, corners, start = [], [], 0
        for i, found in enumerate(detections):
            (height, width), labels = resized[i], found["labels"]
            limits = found["boxes"].new_tensor([width, height] * 2)
            apart = (decoded[i][:, labels].clamp(min=0).minimum(limits) - found["boxes"]).abs().amax(2) / _PIXELS
            apart = apart.maximum((confidence[i][:, labels] - found["scores"]).abs() / _CONFIDENCE)
            # An image without detections may have no proposals either.
            nearest = apart.min(0) if len(labels) else None
            if nearest is not None and bool((nearest.values > 1).any()):
                raise PathError(
                    f"the detections are not those that torchvision's `{self._heads}` makes of its box head, so "
                    "that their features are not known: use a detector whose detections are not changed there"
                )
            rows.append(labels if nearest is None else nearest.indices + start)
            corners.append(found["boxes"] / limits * limits.new_tensor([given[i][1], given[i][0]] * 2))
            start += counts[i]
        labels, scores = (torch.cat([found[name] for found in detections]) for name in ("labels", "scores"))
        sizes = torch.tensor([len(one) for one in rows])
        owners = torch.arange(len(rows)).repeat_interleave(sizes).to(labels.device)
        return torch.cat(rows), Parts(owners, len(rows), boxes=Boxes(torch.cat(corners), labels, scores))


def _is_rcnn(module: nn.Module) -> bool:
    heads = getattr(module, "roi_heads", None)
    predictor = getattr(heads, "box_predictor", None)
    return hasattr(heads, "box_head") and hasattr(predictor, "cls_score") and hasattr(module, "transform")


def detector_call(call: Call, name: str) -> Call:
    """Return the call of a detector: a list of images is its one argument, and the targets are its labels.

    Raises
    ------
    BatchError
        The call has no images (c, h, w).
    """
    images, *targets = call.args or (None,)
    if (
        not isinstance(images, (tuple, list, Tensor))
        or not all(isinstance(image, Tensor) and image.ndim == 3 for image in images)
        or call.kwargs
    ):
        raise BatchError(
            f"{name} is not a list of images (c, h, w), optionally in a tuple with their targets, as a detector "
            "takes it"
        )
    labels = targets[0] if targets and call.labels is None else call.labels
    return Call(([*images],), {}, labels, call.labels_given)


def labels_of_boxes(parts: Parts, targets: Any) -> tuple[Tensor | None, str]:
    """Return the label (m,) of each detected box, or None and the reason.

    Parameters
    ----------
    parts : detected boxes.
    targets
        Per image, a mapping of ``boxes`` (k, 4) and ``labels`` (k,), as torchvision's detectors are trained with.
        A detected box has the label of the box with which its intersection over union is largest, if that is at
        least 0.5, and otherwise -1.
    """
    if targets is None:
        return None, "the loader yields none"
    if not isinstance(targets, (tuple, list)) or not all(
        isinstance(target, Mapping) and {"boxes", "labels"} <= {*target} for target in targets
    ):
        return None, "the loader's targets are not one mapping with boxes and labels per image"
    if len(targets) != parts.count:
        raise BatchError(f"there are targets of {len(targets)} images, and {parts.count} images")
    assert parts.boxes is not None
    found = torch.full_like(parts.owners, -1)
    for i, target in enumerate(targets):
        rows = (parts.owners == i).nonzero()[:, 0]
        boxes = target["boxes"].to(parts.boxes.corners)
        if len(boxes) and len(rows):
            overlap, which = intersection_over_union(parts.boxes.corners[rows], boxes).max(1)
            labels = target["labels"].to(found)[which]
            found[rows] = torch.where(overlap >= _SAME_BOX, labels, -1)
    return found, ""


def intersection_over_union(first: Tensor, second: Tensor) -> Tensor:
    """Return the intersection over union (n, m) of boxes (n, 4) and (m, 4)."""
    low = torch.maximum(first[:, None, :2], second[None, :, :2])
    high = torch.minimum(first[:, None, 2:], second[None, :, 2:])
    common = (high - low).clamp(min=0).prod(2)
    areas = [(boxes[:, 2:] - boxes[:, :2]).clamp(min=0).prod(1) for boxes in (first, second)]
    return common / (areas[0][:, None] + areas[1][None] - common).clamp_min(torch.finfo(common.dtype).tiny)
