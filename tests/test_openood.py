"""The benchmarks of OpenOOD v1.5: image lists, metrics and formats."""

import csv
import json
import shutil
from math import nan
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from sklearn import metrics as sklearn_metrics
from torch import nn

import featnorm as fn
from featnorm import openood
from featnorm.inputs import DataError, open_source

ROWS = ["cifar100", "tin", "nearood", "mnist", "svhn", "texture", "places365", "farood"]


def reference(id_scores, ood_scores):
    """The metrics by scikit-learn, as OpenOOD calls it: OOD is the positive class of FPR@95."""
    confidence = np.concatenate([id_scores, ood_scores])
    is_ood = np.repeat([0, 1], [len(id_scores), len(ood_scores)])
    fpr, tpr, _ = sklearn_metrics.roc_curve(is_ood, -confidence)
    inside = sklearn_metrics.precision_recall_curve(1 - is_ood, confidence)
    outside = sklearn_metrics.precision_recall_curve(is_ood, -confidence)
    return {
        "FPR@95": fpr[np.argmax(tpr >= 0.95)],
        "AUROC": sklearn_metrics.auc(fpr, tpr),
        "AUPR_IN": sklearn_metrics.auc(inside[1], inside[0]),
        "AUPR_OUT": sklearn_metrics.auc(outside[1], outside[0]),
    }


@pytest.mark.parametrize("levels", [None, 1000, 40, 6, 2, 1])
def test_metrics_are_those_of_openood(levels):
    """`levels` is the number of different scores, so that few of them mean many ties."""
    random = np.random.default_rng(0)
    for n, m, shift in ((1, 1, 0), (20, 20, 0.5), (37, 300, -0.4), (400, 41, 1.5), (1000, 1000, 0.8)):
        id_scores, ood_scores = random.normal(shift, 1, n), random.normal(0, 1, m)
        if levels is not None:
            id_scores, ood_scores = (np.floor(s * levels / 8) % levels for s in (id_scores, ood_scores))
        id_scores, ood_scores = id_scores.astype(np.float32), ood_scores.astype(np.float32)
        expected = reference(id_scores, ood_scores)
        assert openood.metrics(id_scores, ood_scores) == pytest.approx(expected, rel=0, abs=1e-12)


def test_thresholds_on_a_straight_line_are_no_thresholds():
    # Every level has an ID and an OOD input: the ROC curve is one line, and only its last point is kept.
    scores = np.arange(100)
    assert openood.metrics(scores, scores)["FPR@95"] == reference(scores, scores)["FPR@95"] == 1
    assert fn.fpr_at_tpr_ood_positive(scores, scores) == 0.95


def test_conventions_differ_from_those_of_the_paper():
    id_scores, ood_scores = np.r_[0, 0, 20:38], np.arange(1, 21)
    found = openood.metrics(torch.tensor(id_scores), torch.tensor(ood_scores))
    assert found["FPR@95"] == fn.fpr_at_tpr_ood_positive(id_scores, ood_scores) == 2 / 20
    assert fn.fpr_at_tpr(id_scores, ood_scores) == 1
    assert found["AUROC"] == fn.auroc(id_scores, ood_scores)
    assert found["AUPR_OUT"] < fn.aupr_out(id_scores, ood_scores) - 0.01


def write_lists(root, name, images, missing=()):
    """Write the lists and images of a benchmark; `images` maps "test_tin" to pixels and labels of its images."""
    benchmark = openood.BENCHMARKS[name]
    for split, pictures in images.items():
        set_name = split.partition("_")[2]
        folder = root / ("images_classic" if set_name == "textures" else benchmark.images)
        lines = []
        for i, (pixels, label) in enumerate(pictures):
            file = f"{set_name}/{split}/{i}.png"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            if (split, i) not in missing:
                Image.fromarray(np.asarray(pixels)).save(folder / file)
            lines.append(f"{file} {label}\n")
        lists = root / "benchmark_imglist" / name
        lists.mkdir(parents=True, exist_ok=True)
        (lists / f"{split}.txt").write_text("".join(lines))


def noise(name, n=6):
    """Return pictures of noise for all sets of a benchmark; those of the ID set have every label, in order."""
    random, benchmark = np.random.default_rng(0), openood.BENCHMARKS[name]
    splits = [f"train_{name}", *(f"test_{one}" for one in (name, *benchmark.near, *benchmark.far))]
    return {
        split: [
            (random.integers(0, 60 * place + 60, (32, 32, 3)).astype(np.uint8), i % 10 if name in split else -1)
            for i in range(n)
        ]
        for place, split in enumerate(splits)
    }


def preprocess(image):
    return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("openood")
    write_lists(root, "cifar10", noise("cifar10"), missing={("test_tin", 2), ("test_cifar10", 5)})
    return root


@pytest.fixture
def editable(root, tmp_path):
    return shutil.copytree(root, tmp_path / "data")


@pytest.mark.parametrize("name", ["cifar100", "imagenet200", "imagenet"])
def test_sets_of_a_benchmark(tmp_path, name):
    write_lists(tmp_path, name, noise(name, 1))
    sets = openood.benchmark_sets(name, tmp_path)
    groups = {
        "cifar100": ["near:cifar10", "near:tin", "far:mnist", "far:svhn", "far:texture", "far:places365"],
    }.get(name, ["near:ssb_hard", "near:ninco", "far:inaturalist", "far:textures", "far:openimage_o"])
    assert list(sets["ood_sets"]) == groups
    large = "images_classic" if name == "cifar100" else "images_largescale"
    for key, source in sets["ood_sets"].items():
        assert Path(source.name(0)).parts[-4] == ("images_classic" if key == "far:textures" else large)
    assert all(source.label(0) is None for source in sets["ood_sets"].values())
    title, source = sets["id_set"]
    assert (title, len(source.class_names), source.label(0)) == (name, openood.BENCHMARKS[name].classes, 0)
    assert source.item(0).size == sets["fit"].item(0).size == (32, 32)


def test_lists_with_ugly_lines(editable):
    path = editable / "benchmark_imglist" / "cifar10" / "test_cifar10.txt"
    (editable / "images_classic" / "my image.png").write_bytes(b"")
    path.write_bytes(b"\xef\xbb\xbfcifar10/test_cifar10/0.png 3\r\n\r\n  my image.png\t9  \n\ncaf\xe9.png 0")
    source = openood.benchmark_sets("cifar10", editable)["id_set"][1]
    assert [source.label(i) for i in range(len(source))] == [3, 9, 0]
    assert source.name(0).endswith("0.png")
    assert source.name(1).endswith("my image.png")
    for line, message in (
        ("no-label.png", "expected a path and a label, got 'no-label.png'"),
        ("a.png dog", "expected a path and a label, got 'a.png dog'"),
        ("/a.png 1", "the path '/a.png' must be relative to the folder of images"),
        ("a.png 10", "the label 10 is not one of the 10 classes"),
        ("a.png -1", "the label -1 is not one of the 10 classes"),
    ):
        path.write_text(f"cifar10/test_cifar10/0.png 3\n\n{line}\n")
        with pytest.raises(DataError, match="line 3: ") as caught:
            openood.benchmark_sets("cifar10", editable)
        assert str(caught.value) == f"{path}, line 3: {message}"
    path.write_text("\n")
    with pytest.raises(DataError, match=r"the image list .*test_cifar10\.txt is empty"):
        openood.benchmark_sets("cifar10", editable)


def test_what_is_missing_is_named(editable):
    with pytest.raises(DataError, match=r"no benchmark 'mnist' in OpenOOD v1\.5: choose one of cifar10, cifar100"):
        openood.benchmark_sets("mnist", editable)
    shutil.rmtree(editable / "images_classic" / "cifar10" / "train_cifar10")
    assert openood.benchmark_sets("cifar10", editable)["fit"] is None
    shutil.rmtree(editable / "images_classic" / "svhn")
    with pytest.raises(
        DataError, match=r"none of the 6 images of .*test_svhn\.txt exist, such as .*0\.png \(Open"
    ):
        openood.benchmark_sets("cifar10", editable)
    path = editable / "benchmark_imglist" / "cifar10" / "test_tin.txt"
    path.unlink()
    with pytest.raises(DataError, match="cannot read the image list") as caught:
        openood.benchmark_sets("cifar10", editable)
    assert str(path) in str(caught.value)
    assert "scripts/download/download.py" in str(caught.value)


def test_results_of_a_comparison(root, tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 10)).eval()
    sets = openood.benchmark_sets("cifar10", root)
    result = fn.compare(["NAN", "KNN(k=2)"], model=model, preprocess=preprocess, **sets)
    assert [len(result.skipped[name]) for name in ("tin", "cifar10")] == [1, 1]
    predicted = result.predicted["cifar10"]
    accuracy = 100 * np.mean(predicted == np.arange(5))
    found = openood.results(result)
    assert list(found) == [one.detector for one in result.ranked]
    for one in result.results:
        rows = found[one.detector]
        assert list(rows) == ROWS
        for name in result.ood_names:
            expected = {key: 100 * v for key, v in reference(one.id_scores, one.ood_scores[name]).items()}
            assert rows[name] == pytest.approx(expected | {"ACC": accuracy})
            assert list(rows[name]) == list(openood.MEASURES)
        assert rows["nearood"]["AUPR_IN"] == pytest.approx(
            np.mean([rows[name]["AUPR_IN"] for name in ("cifar100", "tin")])
        )
    files = openood.save(result, tmp_path)
    tables, leaderboard = ([*csv.reader(file.read_text().splitlines())] for file in files)
    assert tables[0] == ["Postprocessor", "", "FPR@95", "AUROC", "AUPR_IN", "AUPR_OUT", "ACC"]
    assert [row[:2] for row in tables[1:]] == [[detector, name] for detector in found for name in ROWS]
    best = result.ranked[0].detector
    assert tables[1][2:] == [f"{value:.2f}" for value in found[best]["cifar100"].values()]
    near, far = (found[best][row]["AUROC"] for row in ("nearood", "farood"))
    assert leaderboard[1] == ["", best, f"{near:.2f}", f"{far:.2f}", f"{accuracy:.2f}", "", "", ""]
    assert ",".join(leaderboard[0]) == (
        "Training,Postprocessor,Near-OOD_AUROC,Far-OOD_AUROC,ID_Accuracy,Outlier_Data,Arch,Additional_Description"
    )


def test_a_model_of_other_classes_has_no_accuracy(root, tmp_path):
    model = nn.Sequential(nn.Flatten(), nn.Linear(3072, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    sets = openood.benchmark_sets("cifar10", root)
    result = fn.compare(["NAN"], model=model, preprocess=preprocess, **sets)
    assert openood.results(result)["NAN()"]["farood"]["ACC"] == pytest.approx(nan, nan_ok=True)
    tables, leaderboard = (file.read_text().splitlines() for file in openood.save(result, tmp_path))
    assert tables[1].endswith(",")
    assert leaderboard[1].endswith(",/,,,")
    alone = fn.compare(
        ["NAN"], model=model, preprocess=preprocess, id_set=sets["id_set"], ood_sets={"near:a": root}
    )
    with pytest.raises(ValueError, match="no far OOD sets: name one 'far:NAME'"):
        openood.results(alone)


def test_the_command_follows_the_protocol(featnorm, root, tmp_path):
    torch.manual_seed(0)
    torch.save(timm.create_model("test_resnet", num_classes=10).state_dict(), tmp_path / "w.pth")
    options = ["evaluate", "--model", "timm:test_resnet", "--weights", "w.pth", "--workers", 0]
    options += ["--detector", "MSP", "--detector", "KNN(k=2)", "--protocol", "openood-v1.5"]
    status, printed, error = featnorm(*options, "--benchmark", "cifar10", "--data-root", root)
    assert status == 0, error
    assert "skipped 1 unreadable image in tin" in printed
    assert "By OpenOOD's conventions" in printed
    out = tmp_path / "featnorm-evaluation"
    rows = [*csv.DictReader((out / "openood.csv").open())]
    assert [row[""] for row in rows] == [*ROWS, *ROWS]
    assert {rows[0]["Postprocessor"], rows[8]["Postprocessor"]} == {"MSP()", "KNN(k=2)"}
    assert rows[2]["FPR@95"] in printed
    results = json.loads((out / "results.json").read_text())
    assert f"{100 * results['accuracy']:.2f}" == rows[0]["ACC"]
    assert results["facts"]["fit"] == "train_cifar10.txt, 6 inputs"
    assert results["facts"]["OOD, tin"] == "test_tin.txt, 5 inputs"
    assert results["facts"]["protocol"] == "openood-v1.5, cifar10; 2 listed images could not be read"
    assert len((out / "leaderboard.csv").read_text().splitlines()) == 3
    for wrong in (["--benchmark", "cifar10"], ["--data-root", root]):
        status, _, error = featnorm(*options, *wrong)
        assert (status, error) == (
            2, "featnorm: --protocol openood-v1.5 takes --benchmark and --data-root, and no --id and --ood\n"
        )  # fmt: skip
    status, _, error = featnorm(*options[:7], "--benchmark", "cifar10")
    assert (status, error) == (
        2, "featnorm: pass --id and --ood, or --protocol with --benchmark and --data-root\n"
    )  # fmt: skip


def test_real_images_through_a_trained_network(featnorm, shared_data, tmp_path):
    """The packaged network on images of the sets that are here, in the layout of OpenOOD."""
    here = {
        "test_cifar10": "cifar10/test.parquet[5000:]",
        "test_tin": "ood32/tiny_imagenet.parquet",
        "test_cifar100": "ood32/tiny_imagenet.parquet[1000:]",
        "test_mnist": "ood32/mnist.parquet",
        "test_texture": "ood32/textures.parquet",
        "test_svhn": "ood32/mnist.parquet[1000:]",
        "test_places365": "ood32/textures.parquet[300:]",
        "train_cifar10": "cifar10/train.parquet",
    }
    images = {}
    for split, spec in here.items():
        source = open_source(f"{shared_data}/{spec}")
        images[split] = [(source.item(i), source.label(i)) for i in range(20)]
    write_lists(tmp_path, "cifar10", images)
    options = ["--protocol", "openood-v1.5", "--benchmark", "cifar10", "--data-root", tmp_path, "--workers", 0]
    status, _, error = featnorm("evaluate", "--model", "featnorm:cifar10-resnet18", *options, "--detector", "NAN")
    assert status == 0, error
    rows = {row[""]: row for row in csv.DictReader((tmp_path / "featnorm-evaluation" / "openood.csv").open())}
    assert float(rows["mnist"]["ACC"]) >= 80
    assert float(rows["mnist"]["AUROC"]) > 90
