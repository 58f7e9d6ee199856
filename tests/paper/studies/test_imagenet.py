"""The ImageNet-1k benchmark, on fabricated images of the right names and networks of random weights."""

import functools
import json
import statistics
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision.models
from PIL import Image

import featnorm as fn
from featnorm.inputs import DataError, open_source, source_loader
from featnorm.models import create_model
from featnorm.paper import imagenet_data
from featnorm.paper.checkpoints import ContrastiveNetwork, load_contrastive
from featnorm.paper.numbers import numbers
from featnorm.paper.studies import imagenet
from featnorm.paper.study import MissingError, studies
from featnorm.runtime import Runtime
from reproduction import context, reproduce, write_images

pytestmark = pytest.mark.slow

CLASSES = 6


def to_small_tensor(image):
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1).float().div(255)


@pytest.fixture
def small_inputs(monkeypatch):
    """Networks as they are loaded, but for images of 32 pixels."""
    load = imagenet._load

    def with_small_inputs(name, weights):
        network = load(name, weights)
        return replace(network, backbone=replace(network.backbone, transform=to_small_tensor))

    monkeypatch.setattr(imagenet, "_load", with_small_inputs)


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """A data root like that of scale "paper"."""
    root = tmp_path_factory.mktemp("large")
    for split, count, seed in (("train", 20, 0), ("val", 5, 1)):
        for c in range(CLASSES):
            write_images(root / "imagenet" / split / f"n{c:08}", count, 10 * seed + c, size=40, shift=15 * c)
    for i, folder in enumerate(("iNaturalist/images", "SUN/images", "Places/images", "dtd/images/banded")):
        write_images(root / folder, 12, 100 + i, size=40, shift=40 * i)
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A folder of checkpoints as SupCon's and MoCo-v2's authors have them, of ResNet-18s."""
    folder = tmp_path_factory.mktemp("weights")
    torch.manual_seed(0)
    network = ContrastiveNetwork("resnet18")
    theirs = {"supcon": {}, "moco": {}}
    for name, value in network.state_dict().items():
        part, _, rest = name.partition(".")
        supcon = {"backbone": "encoder.", "hidden": "head.0.", "embedding": "head.2.", "classifier": "fc."}
        moco = {"backbone": "", "hidden": "fc.0.", "embedding": "fc.2."}
        theirs["supcon"][f"module.{supcon[part]}{rest}"] = value
        if part in moco:
            theirs["moco"][f"module.encoder_q.{moco[part]}{rest}"] = value
    torch.save({"model": theirs["supcon"]}, folder / "supcon.pth")
    torch.save({"state_dict": theirs["moco"]}, folder / "moco_v2_800ep_pretrain.pth.tar")
    for name in ("resnet50", "vit"):
        (folder / imagenet_data.WEIGHTS[name].file).touch()
    return folder


@pytest.fixture
def paper(small_inputs, monkeypatch):
    """Scale "paper" with as few images as there are, and small networks."""
    for name in ("_TRAIN", "_VAL"):
        monkeypatch.setattr(
            imagenet_data, name, replace(getattr(imagenet_data, name), count=None, classes=CLASSES)
        )
    few = {name: replace(each, count=12) for name, each in imagenet_data.OOD_SETS.items()}
    monkeypatch.setitem(imagenet_data.DATA, "four OOD sets", imagenet_data._imagenet(few))
    monkeypatch.setitem(imagenet_data.DATA, "seven OOD sets", imagenet_data._imagenet(few))
    monkeypatch.setitem(imagenet.SCALES, "paper", replace(imagenet.SCALES["paper"], k=20, seeds=1))
    monkeypatch.setattr(imagenet, "load_contrastive", functools.partial(load_contrastive, architecture="resnet18"))
    torch.manual_seed(1)
    small = create_model("torchvision:resnet18", pretrained=False)
    monkeypatch.setattr(imagenet, "create_model", lambda _, weights: small)
    monkeypatch.setattr("featnorm.fitting._MIN_STEPS", 10)


def made(table, large, weights, out):
    assert reproduce(table, large, out, "--scale", "paper", "--weights", weights).exit_code == 0
    folder = out / "paper"
    return json.loads((folder / f"{table}.json").read_text()), (folder / f"{table}.md").read_text()


def test_every_table_at_scale_paper(large, weights, paper, tmp_path, monkeypatch):
    results, text = made("table1", large, weights, tmp_path)
    supcon, moco = results
    assert set(supcon["scores"]["NAN()"]) == {"iNaturalist", "SUN", "Places", "Textures"}
    assert supcon["computed"] == CLASSES * 25 + 4 * 12
    assert moco["accuracy"] is None
    assert "trained without labels" in moco["excluded"]["MSP()"]
    assert set(moco["scores"]) >= {"NAN()", "SSD()", "KNN(k=20)"}
    assert "92.32 / 31.59" in text
    assert "(96.94 / 15.86)" in text
    assert "accuracy on ID" in text
    assert "the paper's is 78.73 %" in text
    assert "KNN(k=2), 10% of the bank" in text

    def never(*_args, **_options):
        raise AssertionError("asked again")

    monkeypatch.setattr(imagenet, "backbone_features", never)
    _, text = made("table2", large, weights, tmp_path)
    assert "| KNN(k=20) / PooledReAct(NAN()) |" in text
    assert "94.37 / 24.94" in text


def test_tables_of_other_networks(large, weights, paper, tmp_path):
    results, text = made("table6-imagenet", large, weights, tmp_path)
    assert [result["network"] for result in results] == ["resnet50", "supcon"]
    assert "EmbeddingMagnitude()" in results[0]["excluded"]
    assert "57.99 / 95.22" in text
    assert "86.33 / 46.56" in text
    (vit,), text = made("table9", large, weights, tmp_path)
    assert vit["seconds"]["head"] > 0
    assert "85.57 / 60.22" in text
    (_,), text = made("table12", large, weights, tmp_path)
    assert "| PooledReAct(Sparsity()) |" in text


def test_scores_are_those_of_the_network(large, weights, paper, tmp_path):
    results, _ = made("table1", large, weights, tmp_path)
    network = load_contrastive(weights / "supcon.pth", "supcon", architecture="resnet18")

    def pooled(spec):
        images = [batch.inputs for batch in source_loader(open_source(spec, root=large), to_small_tensor)]
        with torch.no_grad():
            return network.backbone(torch.cat(images))

    train, test, sun = (pooled(spec) for spec in ("imagenet:train", "imagenet:val", "SUN"))

    def close(name, score):
        ours = 100 * fn.auroc(score(test), score(sun))
        assert results[0]["scores"][name]["SUN"][0] == pytest.approx(ours, abs=0.2), name

    def norm(h):
        return fn.negative_aware_norm(network.features(h).activation)

    def distance(h):
        unit = torch.nn.functional.normalize
        return torch.cdist(unit(h).double(), unit(train).double()).square().sort(1).values[:, 19]

    clip = float(train.quantile(0.9))
    close("NAN()", norm)
    close("KNN(k=20)", lambda h: -distance(h))
    close("KNN(k=20) / NAN()", lambda h: -distance(h) / norm(h))
    close("PooledReAct(NAN())", lambda h: norm(h.clamp(max=clip)))
    close("SSD() / PooledReAct(NAN())", lambda h: fn.SSD().fit(fn.Features(pooled=train)).score(
        fn.Features(pooled=h)) / norm(h.clamp(max=clip)))  # fmt: skip


@pytest.mark.parametrize(("name", "architecture"), [("resnet50", "resnet50"), ("vit", "vit_b_16")])
def test_torchvision_networks(name, architecture, tmp_path):
    torch.manual_seed(0)
    model = torchvision.models.get_model(architecture, weights=None).eval()
    torch.save(model.state_dict(), tmp_path / imagenet_data.WEIGHTS[name].file)
    network = imagenet._load(name, tmp_path)
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (256, 300, 3), dtype=np.uint8))
    inputs = network.backbone.transform(image)
    # 256 pixels on the short side, of which the central 224 are used.
    mean = torch.tensor([0.485, 0.456, 0.406])[:, None, None]
    pixels = torch.from_numpy(np.array(image.crop((38, 16, 262, 240)))).permute(2, 0, 1) / 255
    assert torch.allclose(inputs[0], ((pixels - mean) / 0.229)[0], atol=1e-5)
    with torch.no_grad():
        pooled, logits = network.backbone.model(inputs[None]), model(inputs[None])
    if name == "vit":
        assert pooled.shape == (1, 768)
        assert network.read is None
    else:
        features = network.read(pooled)
        assert torch.allclose(features.logits, logits, atol=1e-5)
        assert features.activation is features.pooled


def load(table, root, weights):
    return studies()[table].load(imagenet.SCALES["paper"], context(root=root, weights=weights))


def test_what_is_missing_is_named_all_at_once(large, weights, tmp_path, capsys):
    (tmp_path / "imagenet" / "val").mkdir(parents=True)
    write_images(tmp_path / "SUN" / "images", 3, 0)
    write_images(tmp_path / "imagenet" / "train" / "n01440764", 3, 0)
    with pytest.raises(DataError, match="table1 at scale paper: 8 data sets or checkpoints are missing"):
        reproduce("table1", tmp_path, tmp_path / "out", "--scale", "paper", "--weights", tmp_path)
    with pytest.raises(MissingError) as caught:
        load("table1", tmp_path, weights)
    lines = caught.value.lines
    assert len(lines) == 6
    train, val, naturalist, sun, *_ = lines
    assert "imagenet/train has 3 images, not 1,281,167: Unpack ILSVRC2012_img_train.tar" in train
    assert "no images or videos in" in val
    assert "valprep.sh" in val
    assert f"{tmp_path}/iNaturalist: no such folder" in naturalist
    assert "Unpack http://pages.cs.wisc.edu/~huangrui/imagenet_ood_dataset/iNaturalist.tar.gz" in naturalist
    assert "SUN has 3 images, not 10,000" in sun
    with pytest.raises(MissingError, match=r"vit_b_16-c867db91.pth: no folder of weights is set \(--wei"):
        load("table9", None, None)
    with pytest.raises(MissingError, match="species_sub: no data root is set"):
        load("table12", None, weights)


def test_images_without_classes_raise(paper, tmp_path):
    write_images(tmp_path / "imagenet" / "val", 3, 0)
    with pytest.raises(DataError, match="imagenet/val has 0 classes, not 6"):
        imagenet_data._VAL.find(tmp_path)


@pytest.fixture
def laptop(small_inputs, tmp_path, monkeypatch):
    """A data root like that of scale "laptop", with the first forty classes of ImageNet-1k and eight of Tiny."""
    import timm.data

    root, synsets = tmp_path / "data", timm.data.ImageNetInfo().label_names()
    for c in range(40):
        write_images(root / "imagenet1k_sample" / f"{c:03}", 1, c, size=70, shift=3 * c)
    for split, count, seed in (("train", 16, 0), ("val", 4, 1)):
        for c in range(8):
            folder = root / "tiny_imagenet" / split / synsets[5 * c]
            write_images(folder, count, 50 * seed + c, size=64, shift=15 * c)
    write_images(root / "ood224" / "textures", 20, 100, size=80)
    monkeypatch.setattr(imagenet_data, "_SAMPLE", replace(imagenet_data._SAMPLE, count=40, classes=40))
    tiny = {split: replace(each, classes=8) for split, each in imagenet_data._TINY.items()}
    monkeypatch.setattr(imagenet_data, "_TINY", tiny)
    monkeypatch.setitem(imagenet.SCALES, "laptop", replace(imagenet.SCALES["laptop"], k=10, seeds=2))
    small = create_model("timm:test_efficientnet", pretrained=False)
    monkeypatch.setattr(imagenet, "create_model", lambda _: small)
    monkeypatch.setattr("featnorm.fitting._MIN_STEPS", 10)
    return root


def test_laptop(laptop, tmp_path):
    assert reproduce("table1", laptop, tmp_path).exit_code == 0
    out = tmp_path / "laptop"
    results = json.loads((out / "table1.json").read_text())
    blocks = [(result["network"], result["data"], result["seed"]) for result in results]
    assert blocks == [
        (network, data, seed)
        for data in ("imagenet1k_sample", "tiny_imagenet")
        for network, seeds in ((imagenet.AS_IT_IS, 1), (imagenet.HEADED, 2))
        for seed in range(seeds)
    ]
    assert (out / "table1.md").read_text().count("| Detector |") == 4
    tiny = [result for result in results if result["data"] == "tiny_imagenet"]
    assert tiny[0]["images"]["OOD, other classes"].endswith(", 16")
    assert tiny[0]["images"]["resolution"] == "all shrunk to 64 pixels"
    assert tiny[1]["accuracy"] is not None
    # The backbone did not run again for the heads.
    assert [result["computed"] for result in tiny] == [8 * 20 + 16 + 10, 0, 0]
    sample = [result for result in results if result["data"] == "imagenet1k_sample"]
    assert "found no variation within the 20 classes" in sample[0]["excluded"]["Mahalanobis()"]
    assert sample[1]["accuracy"] is None
    # The pooled feature is the backbone's, whatever head is on it.
    assert sample[0]["scores"]["SSD()"] == sample[1]["scores"]["SSD()"]
    for table in ("table2", "table6-imagenet", "table9", "table12"):
        assert reproduce(table, laptop, tmp_path).exit_code == 0, table
    assert "efficientnet-lite0 with a head, tiny\\_imagenet: ours" in (out / "table6-imagenet.md").read_text()


def test_images_are_shrunk_to_squares():
    image = Image.new("RGB", (200, 100))
    image.paste((255, 255, 255), (50, 0, 150, 100))
    small = imagenet_data.Shrunk(lambda part: part, 20)(image)
    assert small.size == (20, 20)
    assert small.getextrema() == ((255, 255),) * 3
    assert imagenet_data.Shrunk(lambda part: part, 20)(small) is small


def test_banks_are_parts_of_each_other(large, paper, tmp_path):
    backbone = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())
    loaded = create_model("torchvision:resnet18", pretrained=False)
    known = imagenet.backbone_features(
        open_source("imagenet:train", root=large),
        loaded,
        backbone,
        cache=tmp_path,
        runtime=Runtime(progress=False),
    )
    whole, part = (imagenet._bank(known, count, tmp_path / f"{count}") for count in (120, 12))
    assert torch.equal(whole, fn.detectors.statistics.unit_rows(known.values).float())
    assert len(part) == 12
    assert all(any(torch.equal(row, other) for other in whole) for row in part)


def test_the_paper_agrees_with_itself():
    tables = numbers("imagenet")
    for name in ("table1", "table9", "table12"):
        for rows in tables[name]["rows"].values():
            for detector, row in rows.items():
                for i in range(2):
                    mean = statistics.fmean(pair[i] for key, pair in row.items() if key != "Average")
                    assert mean == pytest.approx(row["Average"][i], abs=0.011), (name, detector)
    nan = [tables[name]["rows"]["supcon"]["NAN()"]["Average"] for name in ("table1", "table2", "table6-imagenet")]
    assert nan[0] == nan[1] == nan[2]
    four = [
        pair
        for key, pair in tables["table12"]["rows"]["supcon"]["L1Norm()"].items()
        if key in imagenet_data.OOD_SETS
    ]
    for i in range(2):
        expected = tables["table6-imagenet"]["rows"]["supcon"]["L1Norm()"]["Average"][i]
        assert statistics.fmean(pair[i] for pair in four) == pytest.approx(expected, abs=0.011)
    shown = [study for study in studies().values() if isinstance(study, imagenet.ImageNetStudy)]
    assert {study.name for study in shown} >= {"table1", "table2", "table6-imagenet", "table9", "table12"}
    for study in shown:
        assert set().union(*tables[study.name]["rows"].values()) == set(study.detectors), study.name
