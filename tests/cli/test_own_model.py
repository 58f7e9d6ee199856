"""A network that was trained outside featnorm, from its training script through every command."""

import csv
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch

import featnorm as fn
from asking import client_of
from featnorm.cli import serve
from featnorm.inputs import open_source
from featnorm.serve import server
from snippets import run_once

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("operators_read_once")]

EXAMPLE = Path(__file__).parents[2] / "examples" / "own_model.py"
MODEL = ("--model", "own_model:make")


@pytest.fixture(scope="module")
def trained(tmp_path_factory, shared):
    """A folder in which the example was run, as a program."""
    assert "featnorm" not in re.sub(r'""".*?"""', "", EXAMPLE.read_text(), flags=re.DOTALL)
    _, wrote = run_once(EXAMPLE, shared)
    return shutil.copytree(wrote, tmp_path_factory.mktemp("trained"), dirs_exist_ok=True)


@pytest.fixture
def own(trained, monkeypatch, featnorm):
    """The command, run in that folder."""
    monkeypatch.chdir(trained)
    monkeypatch.delitem(sys.modules, "own_model", raising=False)
    monkeypatch.syspath_prepend(trained)
    return featnorm


@pytest.fixture
def file(own, trained):
    """A file that was fitted once, by the command."""
    path = trained / "digits.featnorm"
    if not path.exists():
        fitting = ["fit", "digits/new", *MODEL, "--detector", "KNN(k=5) / NAN()", "-o", path, "--cache", "cache"]
        status, said, error = own(*fitting)
        assert (status, error.count("Traceback")) == (0, 0), error
        (trained / "said.txt").write_text(said)
    return path


def rows_of(path):
    with path.open(newline="", encoding="utf-8") as table:
        return list(csv.DictReader(table))


def test_fit_keeps_the_classifier_and_says_so(own, file, trained):
    said = (trained / "said.txt").read_text()
    found = re.search(
        r"Head: the model's own classifier, 10 logits; its accuracy on the held-out images is (\S+) %", said
    )
    assert float(found[1]) > 85
    assert "(--head auto: the model is your own)" in said
    assert "This holds if the model was not trained on these images." in said
    scorer = fn.load(file, "own_model:make")
    model, transform = __import__("own_model").make()
    assert scorer.head == "keep"
    assert scorer.classes == [str(i) for i in range(10)]
    source = open_source("digits/new")
    images = torch.stack([transform(source.item(i)) for i in range(20)])
    torch.testing.assert_close(scorer(images).logits, model.eval()(images).detach(), rtol=1e-4, atol=1e-4)
    labels = [source.class_names[source.label(i)] for i in range(20)]
    verdicts = scorer.predict([source.item(i) for i in range(20)])
    assert np.mean([verdict.predicted == label for verdict, label in zip(verdicts, labels, strict=True)]) > 0.8


def test_score_and_its_page(own, file, trained, tmp_path):
    status, said, _ = own(
        "score", file, "patches", *MODEL, "-o", tmp_path / "t.csv", "--html", tmp_path / "t.html"
    )
    assert status == 0
    rows = rows_of(tmp_path / "t.csv")
    flagged = sum(row["verdict"] == "OOD" for row in rows)
    assert flagged > 90
    assert f"{flagged} of 100 images flagged" in said
    assert "Predicted: " in (tmp_path / "t.html").read_text()
    known = own("score", file, "digits/new", *MODEL, "-o", tmp_path / "k.csv")
    assert known[0] == 0
    # The rate holds on average over splits: in this one, few eights are held out, which the network knows least.
    assert np.mean([row["verdict"] == "OOD" for row in rows_of(tmp_path / "k.csv")]) < 0.2
    assert own("monitor", file, tmp_path / "t.csv")[0] == 3


def test_raw_items_in_python(own, file):
    scorer = fn.load(file, "own_model:make")
    path = next(Path("digits/new/3").iterdir())
    image = open_source("digits/new/3").item(0)
    preprocessed = scorer.preprocess(image)
    items = [str(path), path, image, np.asarray(image), preprocessed, "nothing.png", np.zeros((4, 4))]
    found = scorer.predict(items)
    assert len({verdict.score for verdict in found[2:5]}) == 1
    assert [verdict.item for verdict in found[:3]] == [str(path), str(path), "item 2"]
    assert [verdict.error for verdict in found[:5]] == [None] * 5
    assert found[5].error == "No such file or directory"
    assert "is not an image" in found[6].error
    with pytest.raises(TypeError, match="items must be a sequence, got one str"):
        scorer.predict("a.png")
    with pytest.raises(TypeError, match="item 0 is of type int"):
        scorer.predict([3])
    plain = fn.Scorer(scorer.model, fn.MSP())
    with pytest.raises(ValueError, match="takes tensors, not images, because it has no preprocess"):
        plain.predict([image])
    assert plain.predict([preprocessed])[0].score is not None


def test_onnx_agrees_with_pytorch(own, file, tmp_path):
    assert own("export", file, *MODEL, "-o", tmp_path / "d.onnx")[0] == 0
    scorer = fn.load(file, "own_model:make")
    source = open_source("digits/new")
    images = torch.stack([scorer.preprocess(source.item(i)) for i in range(30)])
    session = onnxruntime.InferenceSession(tmp_path / "d.onnx")
    logits, score, _, is_id = session.run(None, {"images": images.numpy()})
    wanted = scorer(images)
    np.testing.assert_allclose(logits, wanted.logits, atol=1e-4)
    np.testing.assert_allclose(score, wanted.score, rtol=1e-4)
    assert (is_id == wanted.is_id.numpy()).mean() > 0.9  # a score within rounding of the threshold
    facts = json.loads(session.get_modelmeta().custom_metadata_map["featnorm"])
    np.testing.assert_allclose(facts["mean"], [0.3] * 3, atol=1e-5)
    np.testing.assert_allclose(facts["deviation"], [0.4] * 3, atol=1e-5)
    assert facts["input size"] == [3, 16, 16]
    assert facts["threshold"] == pytest.approx(float(scorer.calibration.threshold))


def test_it_is_served(own, file, monkeypatch):
    def run_server(app, *_):
        with client_of(app, base_url="http://127.0.0.1") as client:
            for place, verdict in (("digits/new/3", "ID"), ("patches", "OOD")):
                body = sorted(Path(place).iterdir())[1].read_bytes()
                answer = client.post("/v1/score", content=body, headers={"Content-Type": "image/png"})
                (result,) = answer.json()["results"]
                assert result["verdict"] == verdict
                assert result["predicted"] in "0123456789"
                served.append(place)

    served = []
    monkeypatch.setattr(server, "run_server", run_server)
    # At its end, and in what it logs to, the command assumes a process of its own.
    monkeypatch.setattr(serve, "EndAtOnce", SystemExit)
    monkeypatch.setattr(serve, "_log_lines", lambda: None)
    status, _, error = own("serve", file, *MODEL, "--port", "0")
    assert (status, len(served)) == (0, 2), error


def test_another_rate_and_other_images_need_no_fit(own, file, tmp_path):
    status, said, _ = own("calibrate", file, "--tpr", "0.8", "-o", tmp_path / "e.featnorm")
    assert status == 0
    assert "flags at most 20.0 %" in said
    assert fn.load(tmp_path / "e.featnorm", "own_model:make").calibration.tpr == 0.8
    wanted = fn.load(file, "own_model:make").set_tpr(0.8).calibration.threshold
    for arguments, count in ((("--update",), 120 + 400), ((), 400)):
        again = tmp_path / "f.featnorm"
        assert own("calibrate", file, "digits/train[::3]", *MODEL, *arguments, "-o", again)[0] == 0
        scorer = fn.load(again, "own_model:make")
        assert len(scorer.calibration.scores) == pytest.approx(count, abs=2)
        assert "train[::3]" in scorer.facts["calibration"]
    assert own("score", file, "patches", *MODEL, "--tpr", "0.8", "-o", tmp_path / "t.csv")[0] == 0
    rows = rows_of(tmp_path / "t.csv")
    assert all((float(row["score"]) >= wanted) == (row["verdict"] == "ID") for row in rows)
    for arguments, words in {
        (): "nothing to calibrate: pass DATA, or another rate with --tpr",
        ("--tpr", "0.999"): "calibration scores are too few for tpr=0.999",
        ("--tpr", "1.5"): "tpr must be in (0, 1), got 1.5",
        ("digits/train",): "pass it again (--model)",
    }.items():
        status, _, error = own("calibrate", file, *arguments, "-o", tmp_path / "g.featnorm")
        assert status == 2
        assert words in error
        assert not (tmp_path / "g.featnorm").exists()


def test_everything_in_the_file_is_shown_without_the_model(own, file):
    status, said, _ = own("inspect", file)
    assert status == 0
    assert "detector: KNN(k=5) / NAN()" in said
    assert "specification: own_model:make" in said
    assert "own_model" not in sys.modules
    summary = json.loads(own("inspect", file, "--json")[1])
    assert summary["model"]["class"] == "ResNet"
    assert summary["calibration"]["share of in-distribution images to accept"] == 0.95
    assert re.fullmatch(r"\d{4}-\d\d-\d\d, with featnorm \S+, seed 0, from 599 images", summary["facts"]["made"])
    assert len(summary["facts"]["digest of the fitting data"]) == 64
    for arguments in ((), (file, *MODEL)):
        status, _, error = own("inspect", *arguments)
        assert status == 2
        assert "pass either a file SCORER or a model" in error


def test_the_fitted_detector_is_evaluated_beside_others(own, file, tmp_path):
    options = ["--id", "digits/train", "--ood", "photographs=patches", "--detector", "MSP", "-o", tmp_path / "out"]
    status, said, error = own("evaluate", file, *MODEL, *options)
    assert status == 0, error
    assert "photographs AUROC" in said
    assert re.search(
        r"flagged by the fitted KNN\(k=5\) / NAN\(\), .*: \d+\.\d % of \S+, \d+\.\d % of photographs", said
    )
    assert re.search(r"^MSP\(\) ", said, re.MULTILINE)
    assert (tmp_path / "out" / "index.html").is_file()


@pytest.mark.usefixtures("file")  # whose features are in the cache
def test_thresholds_by_class_and_by_folder(own, trained, tmp_path):
    fitting = ["fit", "digits/new", *MODEL, "--detector", "Energy", "--tpr", "0.9", "--cache", "cache"]
    for by in ("class", "folder"):
        path = tmp_path / f"{by}.featnorm"
        status, said, error = own(*fitting, "--thresholds-by", by, "-o", path)
        assert status == 0, error
        assert "in each of 10 groups" in said
        scorer = fn.load(path, "own_model:make")
        assert scorer.calibration.group_names == tuple("0123456789")
        assert len(set(scorer.calibration.threshold.tolist())) > 5
        table = tmp_path / f"{by}.csv"
        assert own("score", path, "digits/train[::3]", *MODEL, "-o", table)[0] == 0
        rows = rows_of(table)
        groups = [row["predicted"] if by == "class" else Path(row["path"]).parent.name for row in rows]
        assert [row["group"] for row in rows] == groups
        scores = torch.tensor([float(row["score"]) for row in rows])
        p_values, is_id = scorer.calibration.predict(scores, groups)
        assert [row["verdict"] for row in rows] == ["ID" if known else "OOD" for known in is_id.tolist()]
        np.testing.assert_allclose([float(row["p_value"]) for row in rows], p_values)
        assert own("monitor", path, table)[0] in (0, 3)
        sets = ("--id", "held=digits/train[::3]", "--ood", "patches", "--detector", "Energy", "-o", tmp_path / by)
        status, said, error = own("evaluate", path, *MODEL, *sets)
        assert status == 0, error
        share = 100 * (1 - is_id.double().mean())
        assert f"in-distribution inputs, with thresholds by {by}: {share:.1f} % of held, " in said
        unknown = "unknown for patches (it has groups without a threshold)."
        assert (unknown in said) == (by == "folder")
        assert own("export", path, *MODEL, "-o", tmp_path / "d.onnx")[0] == (0 if by == "class" else 2)
    again = ("-o", tmp_path / "e.featnorm")
    status, said, _ = own("calibrate", tmp_path / "folder.featnorm", "digits/train/3", *MODEL, *again)
    assert status == 0
    assert "No images of 9 groups" in said
    assert "(0, 1, 2, 4, 5, ...)" in said
    status, _, error = own("score", tmp_path / "folder.featnorm", "patches", *MODEL, "-o", tmp_path / "t.csv")
    assert status == 2
    assert "is of the group 'patches', which was not in the calibration" in error
    assert not (tmp_path / "t.csv").exists()


def test_classes_that_are_not_the_models_are_reported(own, trained, tmp_path):
    for name in ("six", "order"):
        for i, folder in enumerate(sorted((trained / "digits" / "new").iterdir())[: 6 if name == "six" else 10]):
            shutil.copytree(folder, tmp_path / name / (folder.name if name == "six" else f"{9 - i}"))
    (tmp_path / "cache").mkdir()
    wanted = {"six": "the model has 10 logits, but six has 6 classes", "order": "no better than chance"}
    for name, words in wanted.items():
        status, said, error = own(
            "fit", tmp_path / name, *MODEL, "-o", tmp_path / "d.featnorm", "--cache", "cache"
        )
        assert status == 0, error
        assert words in said
        assert fn.load(tmp_path / "d.featnorm", "own_model:make").classes is None
        with pytest.warns(UserWarning, match=words):
            fn.fit(tmp_path / name, "own_model:make", cache="cache")


@pytest.mark.usefixtures("few_steps", "file")
def test_other_heads_of_the_same_model(own, trained, tmp_path):
    for head, detector in (("train", "KLUniform() + KNN(k=10)"), ("none", "KNN(k=10)")):
        path = tmp_path / f"{head}.featnorm"
        status, said, error = own("fit", "digits/new", *MODEL, "--head", head, "-o", path, "--cache", "cache")
        assert status == 0, error
        scorer = fn.load(path, "own_model:make")
        assert (scorer.head, repr(scorer.detector)) == (head, detector)
        assert (scorer.statistics is not None) == (head == "train")
        assert scorer.explains, "by similar images"
        # A trained head is exported in test_export.
        assert head == "train" or scorer.export(tmp_path / "d.onnx") <= 1e-4
        status, said, _ = own("score", path, "patches", *MODEL)
        assert status == 0
        flagged = int(re.search(r"(\d+) of 100 images flagged", said)[1])
        assert head == "train" or flagged > 50  # a head trained for few steps knows little


def test_a_file_without_the_model_takes_a_model_by_its_weights(own, trained, tmp_path):
    module = __import__("own_model")
    model, transform = module.make()
    scorer = fn.Scorer(model, fn.NAN(), preprocess=transform, classes=list("0123456789"))
    source = open_source("digits/new")
    known = torch.stack([transform(source.item(i)) for i in range(100)])
    scorer.fit([known]).calibrate([known])
    scorer.save("plain.featnorm")
    scorer.save("whole.featnorm", weights=True)
    verdict = scorer(known[:4])
    for again in (
        fn.load("plain.featnorm", model, preprocess=transform),
        fn.load("plain.featnorm", "own_model:make"),
        fn.load("whole.featnorm", "own_model:make"),
        fn.load("whole.featnorm", module.network(), preprocess=transform),
    ):
        torch.testing.assert_close(again(known[:4]).score, verdict.score)
        assert again.predict([source.item(0)])[0].predicted in "0123456789"
    assert own("score", "plain.featnorm", "patches", *MODEL)[0] == 0
    other = fn.Scorer(model, fn.NAN(), preprocess=lambda image: 2 * transform(image))
    other.calibrate([known])
    other.save("other.featnorm")
    for file, wanted, words in (
        ("plain.featnorm", module.network(), "was made for another model: a ResNet with other weights"),
        ("plain.featnorm", None, "does not contain its model"),
        ("whole.featnorm", None, "was fitted on your own model, and opening a file imports nothing"),
        ("other.featnorm", "own_model:make", "was made with another preprocess than that of own_model:make"),
        ("plain.featnorm", torch.nn.Linear(3, 3), "was made for another model: a ResNet with 4916694 values"),
    ):
        with pytest.raises(ValueError, match=words):
            fn.load(file, wanted)
    with pytest.raises(ValueError, match="there are 3 class names, but the model has 10 logits"):
        fn.Scorer(model, fn.NAN(), preprocess=transform, classes=["a", "b", "c"]).predict([source.item(0)])
