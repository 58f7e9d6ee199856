"""A detector of one's own images: the library's side."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import featnorm as fn
from featnorm import archive, fitting
from featnorm.fitting import backbone_features, fit_source
from featnorm.inputs import FRAMES, DataError, SlicedSource, Source, open_source, source_loader
from featnorm.models import ModelError, create_model
from featnorm.splitting import MIN_CONSTANTS, first_of_groups, for_constants, held_out, near_duplicates
from painted import paint


def fit(folder, loaded, cache, **options):
    runtime = fn.Runtime(progress=False, workers=0)
    return fit_source(open_source(str(folder)), loaded, cache=cache, runtime=runtime, **options)


@pytest.fixture(scope="module")
def small(narrow):
    return create_model("featnorm:cifar10-resnet18")


@pytest.fixture(scope="module")
def trained(small):
    return replace(small, model=fn.load_model("cifar10-resnet18"))


def noise(n, seed=1):
    return torch.rand(n, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


@pytest.mark.usefixtures("heads_trained_once")
@pytest.mark.parametrize("targets", ["labels", "clusters"])
@pytest.mark.parametrize(
    "detector",
    ["NAN()", "KNN(k=3) / NAN()", "HiddenConfidence()", "SSD()", "Views(NAN())", "KLUniform() + KNN(k=3)"],
)
def test_a_file_scores_as_what_was_fitted(folder, tiny, cache, tmp_path, targets, detector):
    scorer, fitted = fit(folder, tiny, cache, targets=targets, detector=fn.parse_detector(detector))
    # Without the corrupt one and the copy; of 48 that are held out, 12 are for the constants of a sum.
    assert (fitted.trained, fitted.held_out) == (191, 36 if "+" in detector else 48)
    assert [Path(name).name for name, _ in fitted.corrupt] == ["000.png"]
    assert (fitted.accuracy is None) == (targets == "clusters")
    if fitted.accuracy is not None:
        assert fitted.accuracy > 0.9
        assert scorer.classes == ["a", "b", "c", "d"]
    scorer.save(tmp_path / "d.featnorm", weights=True)
    again = fn.load(tmp_path / "d.featnorm", tiny.name)
    assert again.facts == scorer.facts
    for images in (noise(5), tiny.transform(Image.new("RGB", (32, 32), (200, 20, 20)))[None]):
        mine, theirs = scorer(images), again(images)
        for a, b in zip(mine[:4], theirs[:4], strict=True):
            assert torch.equal(a, b)
    source = SlicedSource(open_source(str(folder)), range(10), "ten")
    rows = [row for batch in again.stream(source, runtime=fn.Runtime(batch_size=4, workers=0)) for row in batch]
    assert [row.item for row in rows] == [source.name(i) for i in range(10)]
    assert rows[0].error is not None
    assert rows[0].score is None
    assert all(row.error is None and 0 < row.p_value <= 1 for row in rows[1:])
    assert {row.predicted for row in rows[1:]} == ({"a"} if targets == "labels" else {None})
    verdicts = [which.predict_batch(noise(1), ["noise"], explain=[0])[0] for which in (scorer, again)]
    one, other = (verdict.why for verdict in verdicts)
    assert (one.sentence, one.rows()) == (other.sentence, other.rows())
    assert [term for term, _ in one.terms] == (["KLUniform()", "KNN(k=3)"] if "+" in detector else [])
    if one.terms:
        assert sum(value for _, value in one.terms) == pytest.approx(verdicts[0].score)
        assert dict(one.rows())["score by term"] in one.sentence


@pytest.mark.usefixtures("heads_trained_once")
def test_features_are_cached_once_for_all_kinds_of_heads(folder, tiny, tmp_path):
    few = f"{folder}[:120]"
    report = fit(few, tiny, tmp_path, head="none", detector=fn.KNN(k=3))[1]
    assert (report.computed > 100, report.computed + report.copies) == (True, 119)
    assert fit(few, tiny, tmp_path, head="train", detector=fn.KNN(k=3))[1].computed == 0


@pytest.mark.usefixtures("heads_trained_once")
@pytest.mark.parametrize(
    "detector", [fn.NAN(), fn.KNN(k=3), fn.Energy(), fn.HiddenConfidence(), fn.ViM(), fn.Mahalanobis()]
)
def test_known_features_give_the_scores_of_the_whole_network(folder, tiny, cache, detector):
    """The calibration never saw the images, and agrees with what the network says of them."""
    scorer, fitted = fit(folder, tiny, cache, detector=detector)
    source = open_source(str(folder))
    rows = [i for i in range(len(source)) if source.name(i) != fitted.corrupt[0][0]]
    rows = [i for i in rows if "copy" not in source.name(i)]
    apart = held_out([source.digest(i) for i in rows])
    images = torch.stack([tiny.transform(source.item(rows[i])) for i in apart.nonzero().squeeze(1).tolist()])
    scores = scorer(images).score.double().sort().values
    assert torch.allclose(scores, scorer.calibration.scores, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("heads_trained_once")
@pytest.mark.parametrize("targets", ["labels", "clusters"])
def test_an_explanation_is_of_the_score(folder, tiny, cache, targets):
    scorer = fit(folder, tiny, cache, targets=targets, detector=fn.HiddenConfidence())[0]
    assert int(scorer.statistics.inputs) == 191
    images = torch.cat([noise(3), tiny.transform(Image.new("RGB", (32, 32), (200, 20, 20)))[None]])
    verdict = scorer(images)
    judged = scorer.predict_batch(images, "abcd", explain=[0, 1, 2, 3])
    explained = [one.why for one in judged]
    assert all(one.heat is None and not one.no_heat for one in explained)
    some = scorer.predict_batch(images, "abcd", explain=[2])
    assert [one.why is None for one in some] == [True, True, False, True]
    assert some[2].why.rows() == explained[2].rows()
    assert [one.score for one in some] == [one.score for one in judged] == verdict.score.tolist()
    features = scorer.tap(images)
    for i, one in enumerate(why.units for why in explained):
        assert one.predicted == int(verdict.logits[i].argmax())
        assert one.predicted_name == (
            f"cluster {one.predicted}" if targets == "clusters" else "abcd"[one.predicted]
        )
        assert one.hidden_confidence == pytest.approx(float(verdict.score[i]), rel=1e-4)
        assert torch.equal(one.activation, features.activation[i])
    assert explained[3].units.seen > 0
    assert len(explained[3].units.inactive_units) <= len(explained[0].units.inactive_units)
    scorer.statistics = None
    (alone,) = scorer.predict_batch(images[3:], "d", explain=[0])
    assert alone.why.units is None
    assert alone.why.rows() == explained[3].rows()[-1:]
    scorer.examples = None
    with pytest.raises(ValueError, match="has neither activation statistics nor examples"):
        scorer.predict_batch(images, "abcd", explain=[0])


@pytest.mark.usefixtures("heads_trained_once")
@pytest.mark.parametrize("thumbnails", [True, False])
def test_a_sample_of_the_fitting_images_is_kept(folder, small, cache, tmp_path, thumbnails, monkeypatch):
    monkeypatch.setattr(fitting, "MAX_EXAMPLES", 50)
    scorer = fit(folder, small, cache, thumbnails=thumbnails)[0]
    examples = scorer.examples
    assert len(examples.features) == 50
    assert set(examples.labels) == {"a", "b", "c", "d"}
    scorer.save(tmp_path / "d.featnorm", weights=True)
    assert ("examples.thumbnails" in archive.read(tmp_path / "d.featnorm")[0]) is thumbnails
    again = fn.load(tmp_path / "d.featnorm")
    source = open_source(str(folder))
    rows = range(10, 20)
    whys = [v.why for v in again.predict([source.name(i) for i in rows], explain=True)]
    for row, why in zip(rows, whys, strict=True):
        assert [one.label for one in why.nearest] == [source.class_names[source.label(row)]] * 3
        assert 1 >= why.nearest[0].similarity >= why.nearest[2].similarity > 0.8
        assert why.nearest[0].image() is None or thumbnails
        assert why.heat.shape == (4, 4)
        assert "most similar in-distribution images" in dict(why.rows())
    if thumbnails:
        pixels = np.asarray(whys[0].nearest[0].image(), float).mean((0, 1))
        assert np.abs(pixels - np.asarray(source.item(10), float).mean((0, 1))).max() < 40


@pytest.mark.usefixtures("heads_trained_once")
def test_a_file_is_bounded_by_its_thumbnails(folder, tiny, cache, monkeypatch):
    """Then it keeps fewer images, chosen at random."""
    monkeypatch.setattr(fitting, "MAX_BYTES", 20_000)
    examples = fit(folder, tiny, cache)[0].examples
    assert 5 < len(examples.features) == len(examples.thumbnails) < 100
    assert sum(map(len, examples.thumbnails)) <= 20_000
    assert set(examples.labels) == {"a", "b", "c", "d"}


@pytest.mark.usefixtures("heads_trained_once")
@pytest.mark.parametrize(
    "detector", ["KLUniform() + KNN(k=3)", "ODIN() + 2 * (KNN(k=3) / NAN())", "TemperatureScaling(MSP()) + SSD()"]
)
def test_constants_come_from_images_that_neither_fit_nor_threshold_have(folder, tiny, cache, detector):
    scorer, report = fit(folder, tiny, cache, detector=fn.parse_detector(detector))
    source = open_source(str(folder))
    cached = backbone_features(source, tiny, scorer.model[0], cache=cache)
    cached = fn.fitting._without_duplicates(cached)
    digests, groups = cached.digests, near_duplicates(cached.values)
    apart = held_out(digests, groups, 0.95, MIN_CONSTANTS)
    constants = for_constants(digests, groups, apart, 0.95)
    calibrates = first_of_groups(digests, groups) & apart & ~constants
    assert (int((~apart).sum()), int(calibrates.sum())) == (report.trained, report.held_out)
    assert (
        f"{report.trained} to fit on, 12 held out for the detector's constants, 36 held out for"
        in (scorer.facts["images"])
    )

    def batch(chosen):
        rows = cached.rows[chosen].tolist()
        images = next(
            iter(source_loader(SlicedSource(source, rows, "some"), tiny.transform, batch_size=240))
        ).inputs
        return images, torch.tensor([source.label(row) for row in rows])

    again = fn.Scorer(scorer.model, fn.parse_detector(detector)).fit([batch(~apart)], [batch(constants)])
    torch.testing.assert_close(again(noise(5)).score, scorer(noise(5)).score, rtol=1e-3, atol=1e-3)
    expected = again.calibrate([batch(calibrates)]).calibration.scores
    torch.testing.assert_close(scorer.calibration.scores, expected, rtol=1e-3, atol=1e-3)


def test_it_tells_what_does_not_belong(folder, trained, cache, shared_data):
    scorer, _ = fit(folder, trained, cache, detector=fn.KNN(k=3))
    foreign = open_source("ood32/textures[:100]", root=shared_data)
    verdict = scorer(torch.stack([trained.transform(foreign.item(i)) for i in range(100)]))
    assert verdict.is_id.double().mean() < 0.1


def test_the_same_images_give_the_same_detector(folder, tiny, cache, tmp_path):
    for name in ("one", "two"):
        torch.rand(3)
        fit(folder, tiny, cache)[0].save(tmp_path / name, weights=True)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    assert fit(folder, tiny, cache)[1].computed == 0
    assert fit(folder, tiny, tmp_path / "other")[1].computed == 239


@pytest.mark.usefixtures("heads_trained_once")
def test_features_of_images_decoded_by_another_rule_are_not_used(folder, tiny, cache, monkeypatch):
    fit(folder, tiny, cache)
    monkeypatch.setattr(fitting, "DECODING", fitting.DECODING - 1)
    assert fit(folder, tiny, cache)[1].computed == 239


def test_the_head_reads_features_as_they_are():
    generator = torch.Generator().manual_seed(0)
    targets = torch.arange(300) % 3
    values = torch.randn(300, 8, generator=generator) + 3 * torch.nn.functional.one_hot(targets, 8)
    values[:, 7] = 5.0  # never moves
    head = fitting.fit_head(values, targets, progress=False)
    scaled = fitting.fit_head(1000 * values + 50, targets, progress=False)
    logits, same = head(values), scaled(1000 * values + 50)
    assert (logits.argmax(1) == targets).double().mean() > 0.95
    assert torch.allclose(logits, same, atol=0.05)


def test_clusters_are_the_groups_that_are_there():
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(10, 16, generator=generator)
    values = centres.repeat(10, 1) + 0.01 * torch.randn(100, 16, generator=generator)
    clusters = fitting.cluster(values)
    assert clusters.max() == 9
    assert all(len(clusters[i::10].unique()) == 1 for i in range(10))


@pytest.mark.usefixtures("heads_trained_once")
def test_a_model_of_ones_own(folder, cache, tmp_path, monkeypatch):
    (tmp_path / "mymodel.py").write_text(
        "import torch\n"
        "from torch import nn\n"
        "from torchvision.transforms import v2\n"
        "def make():\n"
        "    torch.manual_seed(0)\n"
        "    layers = [nn.Conv2d(3, 24, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]\n"
        "    scale = v2.ToDtype(torch.float32, scale=True)\n"
        "    return nn.Sequential(*layers), v2.Compose([v2.ToImage(), v2.Resize((16, 16)), scale])\n"
        "def classifies():\n"
        "    model, transform = make()\n"
        "    return model.append(nn.Linear(24, 10)), transform\n"
        "def only(): return nn.Flatten()\n"
        "def fails(): raise KeyError('no file')\n"
        "def bad(): return nn.Flatten(), lambda image: 1 / 0\n"
        "def pairs():\n"
        "    model, transform = make()\n"
        "    model.append(nn.Identity())\n"
        "    model.forward = lambda x: (x, x)\n"
        "    return model, transform\n"
        "def other():\n"
        "    model, transform = make()\n"
        "    return nn.Sequential(*model[:2], nn.AdaptiveMaxPool2d(1), nn.Flatten()), transform\n"
    )
    (tmp_path / "broken.py").write_text("raise AttributeError('inside')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", list(__import__("sys").path))
    own = create_model("mymodel:make")
    assert own.input_size == (3, 16, 16)
    scorer, report = fit(folder, own, cache)
    assert (report.head, report.why) == ("train", "your model returns features, not logits")
    scorer.save("d.featnorm", weights=True)
    with pytest.raises(ModelError, match="on your own model mymodel:make, and opening a file imports nothing"):
        fn.load("d.featnorm")
    again = fn.load("d.featnorm", model="mymodel:make")
    assert again.facts["backbone"] == "mymodel:make; its output used as features"
    classifying = fit(folder, create_model("mymodel:classifies"), cache, head="train")[0].facts["backbone"]
    assert classifying.endswith(
        "from the linear layer '4': if that is its classifier, return the model without it"
    )
    images = torch.rand(3, 3, 16, 16)
    assert torch.equal(again(images).score, scorer(images).score)
    # The same weights, computed with otherwise: neither the cache nor the file takes one for the other.
    assert fit(folder, create_model("mymodel:other"), cache)[1].computed == 239
    with pytest.raises(archive.ArchiveError, match="another model or preprocess than mymodel:other: the weights"):
        fn.load("d.featnorm", model="mymodel:other")
    with pytest.raises(DataError, match="the backbone returned tuple"):
        fit(folder, create_model("mymodel:pairs"), cache, head="train")
    with pytest.raises(ValueError, match="the model returns no logits or features of shape"):
        fit(folder, create_model("mymodel:pairs"), cache)
    for spec, words in {
        "mymodel:only": "got Flatten",
        "mymodel:fails": "raised KeyError",
        "mymodel:bad": "the transform of mymodel:bad raised ZeroDivisionError",
        "broken:make": "importing broken raised AttributeError: inside",
        "mymodel:none": "has no function none",
        "nowhere:make": "cannot import nowhere:make",
    }.items():
        with pytest.raises(ModelError, match=words):
            create_model(spec)


def test_copies_are_no_further_images(tiny, tmp_path):
    random = np.random.default_rng(0)
    for i in range(150):
        paint(tmp_path / "few" / f"{i}.png", i % 4, random if i < 90 else np.random.default_rng(i % 8))
    cache = tmp_path / "cache"  # others may have computed the features of these images
    scorer, report = fit(tmp_path / "few", tiny, cache)
    assert (report.trained, report.held_out, report.computed) == (97, 19, 97)
    assert repr(scorer.detector) == "Jackknife(KNN(k=1))"
    with pytest.raises(
        DataError, match=r"found fewer than 100 readable images in few .*, too few to train a head"
    ):
        fit(tmp_path / "few", tiny, cache, head="train")


def test_what_is_no_source_no_backbone_or_no_detector_is_named(folder, small):
    source = open_source(str(folder))
    for words, arguments, options in (
        ("the data must be a source", (str(folder), small), {}),
        ("the model must be a LoadedModel", (source, "timm:test_resnet"), {}),
        (
            "fit takes a detector such as NAN.*: fn.parse_detector makes a detector of",
            (source, small),
            {"detector": "NAN"},
        ),
    ):
        with pytest.raises(TypeError, match=words):
            fit_source(*arguments, **options)


def test_what_is_refused_before_the_work(folder, tiny, cache, tmp_path):
    for words, options in {
        "tpr": {"tpr": 1.0},
        "targets must be one of auto, labels, clusters, got 'lables'": {"targets": "lables"},
        "the seed must be": {"seed": -1},
        "needs labels to fit, and": {"detector": fn.Mahalanobis(), "targets": "clusters"},
    }.items():
        with pytest.raises(ValueError, match=words):
            fit(folder, tiny, tmp_path / "unused", **options)
    assert not (tmp_path / "unused").exists()


@pytest.mark.usefixtures("heads_trained_once")
def test_what_is_refused(folder, tiny, cache, tmp_path):
    source = open_source(str(folder))
    few = SlicedSource(source, range(60), "few")
    with pytest.raises(DataError, match=r"found 59 readable images in few \(duplicates excluded\); at least 100"):
        fit_source(few, tiny, tpr=0.99, cache=cache, runtime=fn.Runtime(progress=False))
    with pytest.raises(ValueError, match=r"239 groups of inputs are too few for tpr=0\.999: 999 are needed"):
        fit(folder, tiny, cache, tpr=0.999)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i in range(120):
        paint(flat / f"{i}.png", i % 4, np.random.default_rng(i))
    with pytest.raises(DataError, match="no label for"):
        fit(flat, tiny, cache, targets="labels")
    assert fit(flat, tiny, cache)[1].accuracy is None
    with pytest.raises(DataError, match="is random: use its evaluation transform"):
        fit(folder, replace(tiny, transform=lambda image: tiny.transform(image) + torch.rand(1)), cache)


@pytest.fixture(scope="module")
def thirty(tmp_path_factory):
    """30 pictures of two of the four colors, and one of them once more."""
    folder, random = tmp_path_factory.mktemp("thirty"), np.random.default_rng(0)
    for i in range(30):
        paint(folder / f"{i:02}.png", i % 2, random)
    (folder / "copy.png").write_bytes((folder / "01.png").read_bytes())
    return folder


def test_thirty_images_are_left_out_in_turn(thirty, tiny, cache, tmp_path):
    scorer, report = fit(thirty, tiny, cache)
    assert repr(scorer.detector) == "Jackknife(KNN(k=1))"
    assert (report.trained, report.held_out, report.head) == (30, 19, "none")
    assert report.why.endswith("on other images, and fewer than 100 images are too few to train a head")
    assert scorer.facts["images"].endswith(": 30 to fit on, 19 of them left out in turn for calibration")
    assert scorer.is_jackknife
    assert [len(knn.bank.rows) for knn in scorer.detector.copies] == [29] * 19
    files = sorted(thirty.iterdir())
    own = [verdict.is_id for verdict in scorer.predict(files)]
    assert sum(own) >= 29
    paint(tmp_path / "blue.png", 2, np.random.default_rng(1))
    assert scorer.predict([tmp_path / "blue.png"])[0].is_id is False
    again, _ = fit(thirty, tiny, cache, tpr=0.9)
    assert (repr(again.detector), again.calibration.tpr) == ("Jackknife(KNN(k=1), count=9)", 0.9)
    of_groups, _ = fit(thirty, tiny, cache, tpr=0.9, group_by=r"([^/\\])\.png$")
    assert [len(knn.bank.rows) for knn in of_groups.detector.copies] == [27] * 9


def test_thirty_images_calibrate_a_detector_that_needs_no_fit(thirty, small, cache):
    scorer, report = fit(thirty, small, cache, head="keep", detector=fn.NAN())
    assert repr(scorer.detector) == "NAN()"
    assert (report.trained, report.held_out, report.head) == (30, 30, "keep")
    assert scorer.facts["images"].endswith(": 30 for calibration, none to fit on")
    assert not scorer.is_jackknife
    verdicts = scorer.predict(sorted(thirty.iterdir())[:30])
    scores = torch.tensor([verdict.score for verdict in verdicts], dtype=torch.float64)
    torch.testing.assert_close(scores.sort().values, scorer.calibration.scores, rtol=1e-4, atol=1e-4)
    by_class = fit(thirty, small, cache, head="keep", detector=fn.NAN(), thresholds_by="class")[0]
    assert len(by_class.calibration.group_names) == 10


def test_any_number_of_images_calibrates_a_detector_that_needs_no_fit(folder, small, cache):
    scorer, report = fit(folder, small, cache, head="keep", detector=fn.Energy())
    assert report.trained == report.held_out == len(scorer.calibration.scores) > 200
    assert scorer.facts["images"].endswith(f": {report.held_out} for calibration, none to fit on")
    _, trained = fit(folder, small, cache, head="keep", detector=fn.KNN())
    assert trained.trained + trained.held_out == report.trained
    with pytest.raises(ValueError, match=r"form 4 groups of images that belong together \(near-dup.* by 'folder'"):
        fit(folder, small, cache, head="keep", detector=fn.Energy(), group_by="folder")


@pytest.mark.parametrize(
    ("head", "tpr", "bank", "expected"),
    [
        ("keep", 0.95, None, "KLUniform() + KNN(k=10)"),
        ("keep", 0.995, None, "KLUniform()"),  # over half of the images would be held out
        ("keep", 0.95, 50 * 64, "KLUniform() + KNN(k=10, size=50)"),
        ("none", 0.95, None, "KNN(k=10)"),
        ("none", 0.95, 50 * 64, "KNN(k=10, size=50)"),
    ],
)
def test_the_default_detector(folder, small, cache, monkeypatch, head, tpr, bank, expected):
    if bank is not None:
        monkeypatch.setattr(fitting, "_MAX_BANK", bank)
    scorer, report = fit(folder, small, cache, head=head, tpr=tpr)
    assert repr(scorer.detector) == expected
    assert (report.held_out == report.trained) is (expected == "KLUniform()")


def test_a_kept_classifier_without_pooled_features_has_no_bank():
    logits = torch.rand(3, 4)
    for pooled, expected in ((None, "KLUniform()"), (torch.rand(3, 8), "KLUniform() + KNN(k=10)")):
        plan = fitting._Plan("keep", "", None, None, fn.Features(logits=logits, pooled=pooled), {})
        assert repr(fitting._default_detector(plan, False, normalize=True)) == expected
        assert repr(fitting._default_detector(plan, True, normalize=True)) == "KLUniform()"


def test_thirty_images_are_left_out_of_a_sum_in_turn(thirty, tiny, cache):
    scorer, report = fit(thirty, tiny, cache, detector=fn.parse_detector("NAN() + KNN(k=1)"))
    assert repr(scorer.detector) == "Jackknife(NAN() + KNN(k=1))"
    assert (report.trained, report.held_out) == (30, 19)
    # Each copy holds 5 of 29 images out of its own fit.
    assert {len(part.terms[1].bank.rows) for part in scorer.detector.copies} == {24}
    assert not scorer(noise(5)).is_id.any()


def test_a_jackknife_is_saved_calibrated_again_and_not_added_to(thirty, small, cache, tmp_path):
    scorer, _ = fit(thirty, small, cache)
    scorer.save(tmp_path / "d.featnorm", weights=True)
    again = fn.load(tmp_path / "d.featnorm")
    assert again.is_jackknife
    for mine, theirs in zip(scorer(noise(5))[:4], again(noise(5))[:4], strict=True):
        assert mine is theirs is None or torch.equal(mine, theirs)
    with pytest.raises(ValueError, match="the earlier calibration left inputs out of the fit in turn"):
        again.use_scores(torch.ones(5), update=True)
    assert again.set_tpr(0.9).is_jackknife
    assert not again.calibrate([(noise(30),)]).is_jackknife
    again.use_scores(torch.ones(5), update=True)
    assert len(again.calibration.scores) == 35


def test_thirty_digits(trained, cache, shared_data):
    runtime = fn.Runtime(progress=False, workers=0)
    scorer, report = fit_source(
        open_source("mnist/test[:30]", root=shared_data), trained, runtime=runtime, cache=cache
    )
    assert (report.trained, report.held_out) == (30, 19)
    flagged = []
    for name in ("mnist/test[30:330]", "ood32/textures[:100]"):
        source = open_source(name, root=shared_data)
        verdicts = [verdict for batch in scorer.stream(source, runtime=runtime) for verdict in batch]
        flagged.append(sum(not verdict.is_id for verdict in verdicts) / len(verdicts))
    digits, textures = flagged
    assert digits <= 0.15
    assert textures > 0.9


def test_what_few_images_do_not_allow(thirty, tiny, small, cache):
    source = open_source(str(thirty))
    runtime = fn.Runtime(progress=False, workers=0)
    for words, count, options in (
        (r"found 19 readable images in few .*; at least 20 are needed for tpr=0.95: 19 to calibrate", 19, {}),
        (r"found 9 readable images in few .*; at least 10 are needed for tpr=0.9", 9, {"tpr": 0.9}),
        (r"found 30 readable images in few .*; at least 100 are needed for tpr=0.99", 31, {"tpr": 0.99}),
        (r"found fewer than 100 readable .*, too few to train a head: use head='none'", 31, {"head": "train"}),
        (r"left out of the fit in turn: a threshold per group", 31, {"thresholds_by": r"([^/\\])\.png$"}),
        (r"left out of the fit in turn: Views\(KNN\(k=1\)\) runs", 31, {"detector": fn.Views(fn.KNN(k=1))}),
        (r"has only 29 inputs in its bank: fit on more, or lower k", 31, {"detector": fn.KNN(k=30)}),
        (r"3 groups of inputs are too few for tpr=0.95", 31, {"group_by": r"([^/\\])[^/\\]\.png$"}),
    ):
        with pytest.raises(ValueError, match=words):
            fit_source(SlicedSource(source, range(count), "few"), tiny, cache=cache, runtime=runtime, **options)


@pytest.mark.usefixtures("heads_trained_once")
def test_a_foreign_or_changed_file_is_refused(folder, small, cache, tmp_path):
    path = tmp_path / "d.featnorm"
    scorer, _ = fit(folder, small, cache)
    scorer.save(path, weights=True)
    tensors, header = archive.read(path)

    def refused(words, *, drop=None, **about):
        kept = {name: t for name, t in tensors.items() if name != drop}
        archive.write(path, kept, {**header, "scorer": {**header["scorer"], **about}})
        with pytest.raises((fn.ArchiveError, ModelError), match=words):
            fn.load(path)

    refused("pass it again", spec="os:getcwd")
    refused("does not fit what is installed here: unknown model", spec="timm:nothing")
    refused(
        "does not fit timm:test_resnet: .* is .* in the file and .* in the model; pass", spec="timm:test_resnet"
    )
    refused("damaged: it has no 'hidden.weight'", drop="model.1.hidden.weight")
    refused(
        r"does not fit .*: 1.hidden.bias is missing in the file and of shape \(\d+,\) in the model; pass",
        drop="model.1.hidden.bias",
    )
    refused("damaged: it has only one of preprocessed and response", drop="preprocessed")
    refused("damaged", spec=5)
    refused("damaged: it cannot score an image .there are 1 class names, but the model has 4", classes=["a"])
    refused("damaged", **{"head settings": {"inputs": 3}})
    refused("damaged: its head is 'both'", head="both")
    for change in (1, float("nan")):
        archive.write(path, {**tensors, "preprocessed": tensors["preprocessed"] + change}, header)
        with pytest.raises(fn.ArchiveError, match="another preprocess"):
            fn.load(path)
    plain = fn.Scorer(scorer.model, fn.NAN())
    plain.tap.trace(noise(2))
    plain.save(path)
    with pytest.raises(ModelError, match="does not contain its model"):
        fn.load(path)
    with pytest.raises(FileNotFoundError):
        fn.load(tmp_path / "none")


class Footage(Source):
    """Frames of clips that have a color each, without files: frame i is of clip ``i // FRAMES_PER_CLIP``."""

    kind, fps, clip_length = FRAMES, 1.0, 4

    def __init__(self, clips):
        super().__init__("footage", [None] * (clips * self.clip_length), None)

    def _read(self, i):
        random = np.random.default_rng(i // self.clip_length)
        color = random.integers(40, 216, 3)
        pixels = color + np.random.default_rng(i).integers(-9, 10, (16, 16, 3))
        return Image.fromarray(pixels.astype(np.uint8)), b"%032d" % i

    def _name(self, i):
        return f"clip {i // self.clip_length} at {i % self.clip_length:.3f} s"

    def unit(self, i):
        return f"clip {self._checked(i) // self.clip_length}"


def fit_footage(clips, small, cache, **options):
    runtime = fn.Runtime(progress=False, workers=0)
    return fit_source(Footage(clips), small, cache=cache, runtime=runtime, head="none", **options)


@pytest.mark.parametrize("detector", ["KNN(k=1)", "KNN(k=1) + SSD()", "Views(KNN(k=1))"])
def test_clips_are_fitted_to_or_calibrate_as_wholes(tiny, cache, detector, monkeypatch):
    constants = []
    of_constants = fitting.for_constants

    def kept(*arguments):
        constants.append(of_constants(*arguments))
        return constants[-1]

    monkeypatch.setattr(fitting, "for_constants", kept)
    scorer, report = fit_footage(60, tiny, cache, detector=fn.parse_detector(detector))
    calibration = scorer.calibration
    clips = len(calibration.unit_scores)
    assert report.held_out == len(calibration.scores) == clips * Footage.clip_length
    assert clips >= 19
    assert report.trained % Footage.clip_length == 0
    if constants:
        # One frame of each of some clips, none of which calibrates.
        clips_of_constants = {int(i) // Footage.clip_length for i in constants[0].nonzero()}
        assert len(clips_of_constants) == int(constants[0].sum()) == MIN_CONSTANTS
        assert report.trained + report.held_out == (60 - MIN_CONSTANTS) * Footage.clip_length
    else:
        assert report.trained + report.held_out == 60 * Footage.clip_length
    assert f"of {clips} of the 60 clips" in scorer.facts["frames"]


def test_a_detector_without_a_fit_is_calibrated_on_all_clips(tiny, cache):
    scorer, report = fit_footage(25, replace(tiny, own=True), cache, detector=fn.NAN())
    assert len(scorer.calibration.unit_scores) == 25
    assert report.held_out == report.trained == 100


def test_what_clips_cannot_have_is_named(tiny, cache):
    with pytest.raises(DataError, match=r"footage has 19 clips; at least 20 are needed for tpr=0\.95"):
        fit_footage(19, tiny, cache)
    with pytest.raises(ValueError, match="frames of a clip are not"):
        fit_footage(30, tiny, cache, thresholds_by="class")
    with pytest.raises(DataError, match=r"each clip needs scores \(--fps takes more frames\)"):
        fit_footage(20, tiny, cache, detector=fn.KNN(k=1))
