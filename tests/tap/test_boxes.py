"""The features of boxes that `FeatureTap(per="box")` finds in detectors of torchvision's R-CNN family."""

import copy
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from detection import CLASSES, HIDDEN, noise_images, tiny_detector
from featnorm.detectors import KNN, NAN, ODIN
from featnorm.features import Features
from featnorm.tap import FeatureTap
from featnorm.tap.boxes import intersection_over_union

detection = pytest.importorskip("torchvision.models.detection")


def detected(model: nn.Module, images: list[Tensor]) -> list[dict[str, Tensor]]:
    """Return the detections of a model, one image at a time."""
    with torch.no_grad():
        return [model([image])[0] for image in images]


def assert_of_detections(features: Features, found: list[dict[str, Tensor]]) -> None:
    """Check features beside the detections that the model returns for the same images."""
    parts = features.parts
    counts = [len(one["labels"]) for one in found]
    assert parts.count == len(found)
    assert parts.owners.tolist() == [i for i, count in enumerate(counts) for _ in range(count)]
    assert torch.allclose(parts.boxes.corners, torch.cat([one["boxes"] for one in found]), atol=1e-3)
    assert torch.equal(parts.boxes.labels, torch.cat([one["labels"] for one in found]))
    assert torch.equal(parts.boxes.confidence, torch.cat([one["scores"] for one in found]))
    # The logits are those that the model's own confidence was computed from, with the background.
    confidence = features.logits.softmax(1).gather(1, parts.boxes.labels[:, None])[:, 0]
    assert torch.allclose(confidence, parts.boxes.confidence, atol=1e-6)
    weight, bias = features.linear()
    assert torch.allclose(features.activation @ weight.T + bias, features.logits, atol=1e-4)
    assert features.pooled is features.activation
    assert bool((features.activation >= 0).all())


def test_the_features_are_those_the_detections_were_made_of():
    model, images = tiny_detector(), noise_images(4)
    found = detected(model, images)
    assert all(len(one["labels"]) for one in found)
    features = FeatureTap(model, per="box")(images)
    assert_of_detections(features, found)
    assert features.activation.shape[1:] == (HIDDEN,)
    assert features.logits.shape[1:] == (CLASSES,)
    # The box head, run by hand on the proposals, makes these very rows.
    resized, _ = model.transform(images[:1])
    with torch.no_grad():
        maps = {"0": model.backbone(resized.tensors)}
        proposals, _ = model.rpn(resized, maps)
        rows = model.roi_heads.box_head(model.roi_heads.box_roi_pool(maps, proposals, resized.image_sizes))
    first = features.activation[features.parts.owners == 0]
    assert (first[:, None] - rows).abs().amax(2).amin(1).max() < 1e-6


@pytest.mark.parametrize(
    "name",
    [
        pytest.param("fasterrcnn_resnet50_fpn", marks=pytest.mark.slow),
        pytest.param("fasterrcnn_resnet50_fpn_v2", marks=pytest.mark.slow),
        "fasterrcnn_mobilenet_v3_large_320_fpn",
        pytest.param("maskrcnn_resnet50_fpn", marks=pytest.mark.slow),
        pytest.param("keypointrcnn_resnet50_fpn", marks=pytest.mark.slow),
    ],
)
@pytest.mark.usefixtures("seeded")
def test_torchvisions_detectors(name):
    options = {"box_score_thresh": 0.0, "box_detections_per_img": 3, "min_size": 96, "max_size": 128}
    # By default a thousand proposals of each image pass through the head.
    options |= {"rpn_pre_nms_top_n_test": 40, "rpn_post_nms_top_n_test": 20}
    model = getattr(detection, name)(weights=None, weights_backbone=None, **options).eval()
    nn.init.normal_(model.roi_heads.box_predictor.cls_score.weight, std=0.3)
    images = [torch.rand(3, 64, 96), torch.rand(3, 96, 72)]
    found = detected(model, images)
    features = FeatureTap(model, per="box")(images)
    assert len(features) == 6
    assert features.activation.shape == (6, 1024)
    assert_of_detections(features, found)


@pytest.mark.parametrize("name", ["retinanet_resnet50_fpn", "fcos_resnet50_fpn", "ssdlite320_mobilenet_v3_large"])
def test_detectors_without_a_box_head_are_named(name):
    with torch.device("meta"):
        model = getattr(detection, name)(weights=None, weights_backbone=None)
    with pytest.raises(ValueError, match=rf"{type(model).__name__} has no box head: per='box' takes a model with"):
        FeatureTap(model, per="box")


def test_other_models_are_named():
    with pytest.raises(ValueError, match=r"^Linear has no box head"):
        FeatureTap(nn.Linear(3, 2), per="box")
    with pytest.raises(ValueError, match="the model has 2 R-CNNs: per='box' takes one"):
        FeatureTap(nn.ModuleList([tiny_detector(), tiny_detector()]), per="box")
    model = tiny_detector()
    model.roi_heads.box_predictor.cls_score = nn.Identity()
    with pytest.raises(
        ValueError, match=r"`roi_heads.box_predictor.cls_score` is not a linear classifier of boxes"
    ):
        FeatureTap(model, per="box")
    with pytest.raises(ValueError, match="a hidden classifier is of an input and not of boxes"):
        FeatureTap(tiny_detector(), per="box").hidden(noise_images())


class Wrapper(nn.Module):
    """A detector inside a module, which scales its images."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"detector": tiny_detector()})

    def forward(self, images: list[Tensor]) -> Any:
        return {"found": self.inner["detector"]([image / 2 for image in images])}


def test_a_detector_inside_a_module():
    model, images = Wrapper().eval(), noise_images()
    found = detected(model.inner["detector"], [image / 2 for image in images])
    tap = FeatureTap(nn.DataParallel(model), per="box")
    assert_of_detections(tap(images), found)
    assert "`inner.detector.roi_heads.box_head`" in tap.describe()
    # The targets of a wrapper that takes none are the labels of the batch.
    targets = [{"boxes": one["boxes"][:1], "labels": torch.tensor([2])} for one in found]
    assert 2 in tap((images, targets)).labels


def test_images_without_boxes():
    model, images = tiny_detector(), noise_images(4)
    tap = FeatureTap(model, per="box")
    sure = [float(one["scores"].max()) for one in detected(model, images)]
    model.roi_heads.score_thresh = sorted(sure)[1]
    features = tap(images)
    owners = {i for i, confidence in enumerate(sure) if confidence > sorted(sure)[1]}
    assert set(features.parts.owners.tolist()) == owners
    assert len(owners) == 2
    assert features.parts.count == 4
    model.roi_heads.score_thresh = 1.0
    for empty in (tap(images), FeatureTap(model, per="box")(images)):
        assert len(empty) == 0
        assert empty.parts.count == 4
        assert empty.parts.boxes.corners.shape == (0, 4)
        assert len(NAN().score(empty)) == 0


def test_a_box_has_the_label_of_the_object_that_it_overlaps():
    model, images = tiny_detector(), noise_images(2)
    boxes = [one["boxes"] for one in detected(model, images)]
    targets = [
        {"boxes": torch.stack([boxes[0][1], torch.tensor([0.0, 0.0, 1.0, 1.0])]), "labels": torch.tensor([3, 1])},
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0, dtype=torch.int64)},
    ]
    features = FeatureTap(model, per="box")((images, targets))
    overlaps = intersection_over_union(features.parts.boxes.corners, boxes[0][1:2])[:, 0] >= 0.5
    overlaps &= features.parts.owners == 0
    assert overlaps[1]
    assert torch.equal(features.labels, torch.where(overlaps, 3, -1))
    tap = FeatureTap(model, per="box")
    assert tap(images).labels is None
    # As a loader with torchvision's usual `collate_fn` yields them.
    (streamed,) = tap.stream([(tuple(images), tuple(targets))], progress=False)
    assert torch.equal(streamed.labels, features.labels)
    (unlabeled,) = tap.stream([images], progress=False)
    with pytest.raises(ValueError, match="there is no `labels`: the loader yields none"):
        unlabeled.tensor("labels")
    with pytest.raises(ValueError, match="not one mapping with boxes and labels per image"):
        tap((images, [1, 2])).tensor("labels")
    with pytest.raises(ValueError, match="there are targets of 1 images, and 2 images"):
        tap((images, targets[:1]))


def test_intersection_over_union():
    torchvision = pytest.importorskip("torchvision")
    corners = torch.rand(2, 9, 4, generator=torch.Generator().manual_seed(0)).cumsum(2)
    assert torch.allclose(intersection_over_union(*corners), torchvision.ops.box_iou(*corners))
    assert float(intersection_over_union(torch.zeros(1, 4), torch.zeros(1, 4))) == 0


def test_batches_that_are_not_images():
    tap = FeatureTap(tiny_detector(), per="box")
    for batch in (torch.rand(3, 64, 64), {"images": [torch.rand(3, 64, 64)]}, [torch.rand(64, 64)]):
        with pytest.raises(ValueError, match=r"the batch is not a list of images \(c, h, w\)"):
            tap(batch)


def test_a_box_head_that_is_not_rectified():
    tap = FeatureTap(tiny_detector(nn.Sequential(nn.Flatten(), nn.Linear(72, HIDDEN))), per="box")
    features = tap(noise_images())
    assert features.activation is None
    assert features.pooled.shape[1] == HIDDEN
    with pytest.raises(ValueError, match=r"the output of `roi_heads.box_head` is not rectified"):
        NAN().score(features)
    assert tap.describe().startswith("No last hidden layer for NAN: the output of `roi_heads.box_head`")


def test_detections_that_are_changed_after_the_box_head_are_refused():
    model = tiny_detector()
    original = model.roi_heads.postprocess_detections

    def moved(*args: Any) -> Any:
        boxes, scores, labels = original(*args)
        return [one + 3 for one in boxes], scores, labels

    model.roi_heads.postprocess_detections = moved
    with pytest.raises(RuntimeError, match=r"not those that torchvision's `roi_heads` makes of its box head"):
        FeatureTap(model, per="box")(noise_images())


def test_a_score_does_not_depend_on_the_rest_of_its_batch():
    # Two images of each of four sizes.
    tap, images = FeatureTap(tiny_detector(), per="box"), noise_images(8)
    together = tap(images)
    for i, image in enumerate(images):
        alone = tap([image])
        assert torch.allclose(together.activation[together.parts.owners == i], alone.activation, atol=1e-4)


def test_the_model_is_left_as_it_was():
    model = tiny_detector().train()
    before = copy.deepcopy(model.state_dict())
    FeatureTap(model, per="box")(noise_images())
    assert all(module.training for module in model.modules())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_threads_that_run_the_same_model():
    model = tiny_detector()
    tap = FeatureTap(model, per="box").trace(noise_images())
    batches = [noise_images(2, seed) for seed in range(8)]
    expected = [tap(batch) for batch in batches]
    got: dict[int, Features] = {}

    def run(i: int) -> None:
        got[i] = tap(batches[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i, features in enumerate(expected):
        assert torch.equal(got[i].parts.boxes.corners, features.parts.boxes.corners)
        assert torch.equal(got[i].activation, features.activation)


def test_detectors_that_run_the_model_again_are_refused():
    features = FeatureTap(tiny_detector(), per="box")(noise_images())
    with pytest.raises(ValueError, match="possible per input only, and not per position or box"):
        ODIN().score(features)
    assert KNN(k=1).fit(features).score(features).shape == (len(features),)


def test_the_state_of_a_tap_makes_it_again():
    model, images = tiny_detector(), noise_images()
    tap = FeatureTap(model, per="box").trace(images)
    again = FeatureTap.from_dict(model, tap.to_dict())
    assert again.describe() == tap.describe()
    assert torch.equal(again(images).activation, tap(images).activation)
    moved = tap(images).to("cpu")
    assert torch.equal(moved.parts.boxes.corners, tap(images).parts.boxes.corners)
