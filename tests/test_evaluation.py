"""The comparison of detectors, on synthetic features."""

import copy
import csv
import io
import json

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from torch import nn

import featnorm as fn
from featnorm.evaluation import Comparison, compare, standard_detectors
from featnorm.inputs import DataError, source_of
from featnorm.metrics import evaluate
from featnorm.models import create_model
from tiny_texts import WORDS, saved_classifier


def features(n, scale, seed, labels=False):
    generator = torch.Generator().manual_seed(seed)
    a = torch.rand(n, 12, generator=generator) * scale
    weight = torch.randn(4, 12, generator=torch.Generator().manual_seed(9))
    y = torch.arange(n) % 4 if labels else None
    return fn.Features(activation=a, pooled=a, logits=a @ weight.T, labels=y, classifier=(weight, None))


def batches(whole, size=7):
    return [whole[i : i + size] for i in range(0, len(whole), size)]


def test_scores_are_those_of_the_detectors_alone():
    known, near, far = features(60, 1.0, 0), features(40, 0.6, 1), features(50, 0.1, 2)
    train = features(90, 1.0, 3, labels=True)
    detectors = [fn.NAN(), fn.KNN(k=3), fn.Mahalanobis(), fn.KLUniform() + fn.KNN(k=3)]
    fresh_ones = copy.deepcopy(detectors)
    result = compare(
        detectors,
        fit=batches(train),
        id_set=("known", batches(known)),
        ood_sets={"near": batches(near), "far": batches(far)},
    )
    assert [outcome.detector for outcome in result.results] == [repr(detector) for detector in fresh_ones]
    for outcome, fresh in zip(result.results, fresh_ones, strict=True):
        fresh.fit(train)
        np.testing.assert_allclose(outcome.id_scores, fresh.score(known).numpy(), rtol=1e-5)
        np.testing.assert_allclose(outcome.ood_scores["far"], fresh.score(far).numpy(), rtol=1e-5)
        assert outcome.metrics["near"] == evaluate(outcome.id_scores, outcome.ood_scores["near"])
        assert outcome.mean.auroc == pytest.approx(np.mean([m.auroc for m in outcome.metrics.values()]))
    assert result.results[0].metrics["far"].auroc == 1
    assert {name: len(on) for name, on in result.patterns.items()} == {"known": 50, "near": 40, "far": 50}
    assert result.patterns["far"].dtype == bool


def test_streams_are_read_once():
    def once(parts):
        yield from parts

    known, far = features(30, 1.0, 0), features(30, 0.1, 2)
    result = compare(
        standard_detectors()[:4],
        fit=once(batches(known)),
        id_set=("known", once(batches(known))),
        ood_sets={"far": once(batches(far))},
    )
    assert len(result.results) == 4


def test_what_needs_no_fit_does_not_read_the_inputs_to_fit_on():
    def unread():
        raise AssertionError
        yield

    known, far = features(30, 1.0, 0), features(30, 0.1, 2)
    fitted = fn.KNN(k=3).fit(known)
    result = compare([fn.NAN(), fitted], fit=unread(), id_set=("known", [known]), ood_sets={"far": [far]})
    assert len(result.results) == 2


def test_detectors_that_cannot_work_are_left_out_by_name():
    known, far = features(30, 1.0, 0), features(30, 0.1, 2)
    detectors = [fn.NAN(), fn.KNN(k=50), fn.EmbeddingMagnitude(), fn.Mahalanobis()]
    detectors += [fn.NAN() + fn.KNN(k=25), fn.NAN() + fn.ODIN()]
    result = compare(detectors, fit=[known], id_set=("known", [known]), ood_sets={"far": [far]})
    assert [outcome.detector for outcome in result.results] == ["NAN()"]
    assert "only 30 inputs in its bank" in result.excluded["KNN()"]
    assert "only 24 inputs in its bank" in result.excluded["NAN() + KNN(k=25)"]
    assert result.excluded["NAN() + ODIN()"].startswith("runs the model again, so no inputs can be held out")
    assert "`embedding`" in result.excluded["EmbeddingMagnitude()"]
    assert "`labels`" in result.excluded["Mahalanobis()"]


def test_a_detector_worse_than_chance_is_named_below_the_table():
    known, far = features(30, 0.1, 0), features(30, 1.0, 2)
    result = compare([fn.NAN(), fn.KNN(k=3)], id_set=("known", [known]), ood_sets={"far": [far]})
    auroc = 100 * result.results[0].mean.auroc
    words = f"NAN() ({auroc:.1f} %) is worse than chance here (AUROC below 50 %): OOD inputs get larger scores"
    assert auroc < 40
    assert result.table().splitlines()[2].startswith(words)
    assert result.table().splitlines()[3].startswith("skipped KNN(k=3): it needs a fit")


def test_a_detector_is_not_worse_than_chance_by_noise():
    for seed in range(5):
        known, far = features(30, 1.0, seed), features(30, 1.0, seed + 5)
        result = compare([fn.NAN()], id_set=("known", [known]), ood_sets={"far": [far]})
        if result.results[0].mean.auroc < 0.5:
            break
    assert result.results[0].mean.auroc < 0.5 < result.summaries[0].auroc.high[0]
    assert len(result.table().splitlines()) == 2


def test_each_set_keeps_the_type_of_its_scores():
    known, far = features(30, 1.0, 0).to(torch.float64), features(30, 0.1, 2)
    result = compare([fn.NAN()], id_set=("known", [known]), ood_sets={"far": [far]}).results[0]
    assert (result.id_scores.dtype, result.ood_scores["far"].dtype) == (np.float64, np.float32)


def test_a_comparison_without_results_has_a_repr():
    assert repr(Comparison("known", {"far": ""})) == "Comparison('known', {'far': ''})"


def test_sets_that_cannot_be_read_are_named_before_any_is_read(tmp_path):
    (tmp_path / "broken").mkdir()
    for name in "ab":
        (tmp_path / "broken" / f"{name}.png").write_bytes(b"no image")

    def unread():
        raise AssertionError
        yield

    words = "no usable input in stripes: none of 2 images can be read; the first is .*a.png: "
    with pytest.raises(ValueError, match=words):
        compare(["NAN"], id_set=("id", unread()), ood_sets={"stripes": str(tmp_path / "broken")})


def test_no_ood_set_is_named():
    with pytest.raises(ValueError, match="ood_sets is empty: pass at least one set of OOD inputs"):
        compare(["NAN"], id_set=[features(30, 1.0, 0)], ood_sets={})


def test_without_a_fit_the_learners_are_left_out():
    known, far = features(30, 1.0, 0), features(30, 0.1, 2)
    result = compare([fn.NAN(), fn.KNN(k=3)], fit=None, id_set=("known", [known]), ood_sets={"far": [far]})
    assert "no in-distribution inputs were given to fit on" in result.excluded["KNN(k=3)"]


def test_accuracy_counts_known_labels_only():
    known = features(40, 1.0, 0)
    labels = known.logits.argmax(1)
    labels[:10] = (labels[:10] + 1) % 4
    labels[10:20] = -1
    result = compare(
        [fn.NAN()],
        fit=None,
        id_set=("known", batches(known.replace(labels=labels))),
        ood_sets={"far": [features(5, 0.1, 2)]},
    )
    assert result.accuracy == pytest.approx(20 / 30)


def test_no_detector_or_no_input_is_an_error():
    known = features(30, 1.0, 0)
    with pytest.raises(ValueError, match="every detector is skipped"):
        compare([fn.KNN()], fit=None, id_set=("known", [known]), ood_sets={"far": [known]})
    with pytest.raises(ValueError, match="no usable input in far"):
        compare([fn.NAN()], fit=None, id_set=("known", [known]), ood_sets={"far": []})


def test_detectors_that_come_fitted_need_no_fit():
    train, known, far = features(90, 1.0, 3), features(60, 1.0, 0), features(50, 0.1, 2)
    fitted = fn.KNN(k=3).fit(train)
    result = compare([fitted, fn.SSD()], fit=None, id_set=("known", [known]), ood_sets={"far": [far]})
    (outcome,) = result.results
    np.testing.assert_array_equal(outcome.id_scores, fitted.score(known).numpy())
    assert "no in-distribution inputs were given to fit on" in result.excluded["SSD()"]


@pytest.fixture(scope="module")
def result():
    sets = {
        "near:a": features(40, 0.6, 1), "near:b": features(30, 0.7, 2), "far:c": features(50, 0.1, 3),
        "d": features(20, 0.3, 4),
    }  # fmt: skip
    train, known = features(90, 1.0, 3, labels=True), features(60, 1.0, 0, labels=True)
    return fn.compare(
        ["NAN", fn.KNN(k=3), "EmbeddingMagnitude"], fit=train, id_set=known, ood_sets=sets, reference="KNN(k=3)"
    )


def test_groups_are_averaged(result):
    assert (result.id_name, result.ood_groups) == ("ID", {"a": "near", "b": "near", "c": "far", "d": ""})
    assert [summary.title for summary in result.summaries] == ["Mean", "Near", "a", "b", "c", "d"]
    for place, outcome in enumerate(result.ranked):
        near = np.mean([outcome.metrics[name].auroc for name in "ab"])
        assert result.summaries[1].auroc.value[place] == pytest.approx(near)
        assert result.summaries[0].fpr95.value[place] == outcome.mean.fpr95
        for summary in result.summaries:
            for estimate in (summary.auroc, summary.fpr95):
                assert estimate.low[place] <= estimate.value[place] <= estimate.high[place]
    place = [outcome.detector for outcome in result.ranked].index("KNN(k=3)")
    assert result.reference == "KNN(k=3)"
    assert result.summaries[0].auroc.difference[place] == 0


def test_formats_hold_the_same_numbers(result, tmp_path):
    records = result.records()
    assert len(records) == 2 * 6
    rows = list(csv.DictReader(io.StringIO(result.to_csv())))
    assert [float(row["auroc_low"]) for row in rows] == [record["auroc_low"] for record in records]
    loaded = json.loads(result.to_json())
    assert loaded["results"] == records
    assert loaded["accuracy"] == result.accuracy is not None
    assert loaded["ood_inputs"] == {"a": 40, "b": 30, "c": 50, "d": 20}
    assert "`embedding`" in loaded["excluded"]["EmbeddingMagnitude()"]
    pandas = pytest.importorskip("pandas")
    pandas.testing.assert_frame_equal(result.to_pandas(), pandas.DataFrame(records))
    lines = result.table().splitlines()
    assert [line.split()[0] for line in lines[:3]] == ["Detector", *(one.detector for one in result.ranked)]
    assert lines[3:] == [f"skipped EmbeddingMagnitude(): {result.excluded['EmbeddingMagnitude()']}"]
    assert repr(result) == result.table()
    assert len(result.to_markdown().splitlines()) == 4
    files = result.save(tmp_path / "made" / "here")
    assert all(file.stat().st_size for file in files)
    files = result.save(tmp_path)
    assert all(file.stat().st_size for file in files)
    first = (tmp_path / "results.svg").read_bytes()
    assert [file.name for file in result.save(tmp_path)] == [file.name for file in files]
    assert (tmp_path / "results.svg").read_bytes() == first
    with pytest.raises(ValueError, match="xyz"):
        result.plot(tmp_path / "plot.xyz")


def test_scores_are_columns_of_every_input(result, tmp_path):
    columns = result.scores
    assert list(columns) == ["set", "group", "item", "row", "NAN()", "KNN(k=3)"]
    assert {len(column) for column in columns.values()} == {60 + 40 + 30 + 50 + 20}
    assert dict(zip(columns["set"], columns["group"], strict=True)) == {
        "ID": "id", "a": "near", "b": "near", "c": "far", "d": "ood"
    }  # fmt: skip
    of_c = columns["set"] == "c"
    np.testing.assert_array_equal(columns["NAN()"][of_c], result.results[0].ood_scores["c"])
    np.testing.assert_array_equal(columns["row"][of_c], range(50))
    result.to_parquet(tmp_path / "s.parquet")
    table = pq.read_table(tmp_path / "s.parquet").to_pydict()
    assert table == {name: column.tolist() for name, column in columns.items()}


def test_every_kind_of_set_gives_the_same_scores(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(48, 16), nn.ReLU(), nn.Linear(16, 3)).eval()
    images = torch.randint(0, 256, (12, 4, 4, 3), dtype=torch.uint8)
    for name, part in (("known", images[:8]), ("other", images[8:])):
        (tmp_path / name).mkdir()
        for i, image in enumerate(part):
            Image.fromarray(image.numpy()).save(tmp_path / name / f"{i}.png")
    (tmp_path / "other" / "broken.png").write_bytes(b"no")

    def preprocess(image):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255

    inputs = torch.stack([preprocess(image) for image in images])
    of_loaders = fn.compare(
        ["NAN"], model=model, id_set=list(inputs[:8].split(3)), ood_sets={"other": [inputs[8:]]}
    )
    tap = fn.FeatureTap(model)
    of_features = fn.compare(["NAN"], id_set=tap(inputs[:8]), ood_sets={"other": tap(inputs[8:])})
    scorer = fn.Scorer(model, fn.NAN(), preprocess=preprocess)
    of_folders = fn.compare(
        ["Energy"], model=scorer, id_set=tmp_path / "known", ood_sets={"other": str(tmp_path / "other")}
    )
    assert (of_folders.id_name, list(of_folders.ood_names)) == ("known", ["other"])
    assert of_folders.items["other"] == [str(tmp_path / "other" / f"{i}.png") for i in range(4)]
    assert [file for file, _ in of_folders.skipped["other"]] == [str(tmp_path / "other" / "broken.png")]
    assert [one.detector for one in of_folders.results] == ["NAN()", "Energy()"]
    for one in (of_features, of_folders):
        np.testing.assert_allclose(one.results[0].id_scores, of_loaders.results[0].id_scores, rtol=1e-5)
        np.testing.assert_allclose(
            one.results[0].ood_scores["other"], of_loaders.results[0].ood_scores["other"], rtol=1e-5
        )
    np.testing.assert_array_equal(of_folders.predicted["known"], model(inputs[:8]).argmax(1))


def test_sets_that_cannot_be_used_are_errors():
    known = features(30, 1.0, 0)
    with pytest.raises(ValueError, match="two sets are called 'a'"):
        fn.compare(["NAN"], id_set=("a", known), ood_sets={"near:a": known})
    with pytest.raises(ValueError, match=r"the reference KNN\(\) is not among the detectors: NAN\(\)"):
        fn.compare(["NAN"], id_set=known, ood_sets={"a": known}, reference="KNN")
    with pytest.raises(TypeError, match="a must be Features, a loader, a source or a path, got 5"):
        fn.compare(["NAN"], id_set=known, ood_sets={"a": 5})
    with pytest.raises(ValueError, match=r"a holds rows: pass model= and preprocess=, or a Scorer that has both"):
        fn.compare(["NAN"], id_set=known, ood_sets={"a": torch.zeros(3, 3)})
    with pytest.raises(TypeError, match=r"batch 0 of a is not Features, but .*: pass model="):
        fn.compare(["NAN"], id_set=known, ood_sets={"a": [torch.zeros(3, 3)]})


def test_a_reference_without_a_result_gives_way_to_the_best():
    known, far = features(30, 1.0, 0), features(30, 0.1, 2)
    result = fn.compare(
        ["NAN", "EmbeddingMagnitude"], id_set=known, ood_sets={"a": far}, reference="EmbeddingMagnitude"
    )
    assert result.reference == "NAN()"


def test_rows_in_memory_are_compared_as_features_and_by_a_scorer():
    rng = np.random.default_rng(0)
    known, far = rng.normal(size=(200, 4)).astype(np.float32), rng.normal(5, 1, (50, 4)).astype(np.float32)
    fit, test = known[:150], known[150:]
    expected = fn.KNN(k=3).fit(fn.Features(pooled=torch.tensor(fit)))
    expected = expected.score(fn.Features(pooled=torch.tensor(test))).numpy()
    forms = (
        lambda x: x,
        torch.tensor,
        lambda x: x.tolist(),
        lambda x: source_of(x, labels=[0, 1] * (len(x) // 2)),
    )
    for form in forms:
        result = compare(["KNN(k=3)"], fit=form(fit), id_set=form(test), ood_sets={"far": form(far)})
        np.testing.assert_allclose(result.results[0].id_scores, expected, rtol=1e-4)
        assert result.ood_names == ["far"]
        assert result.id_name == "the array"
    labeled = compare(["Mahalanobis"], fit=forms[3](fit), id_set=("id", test), ood_sets={"far": far})
    assert labeled.results[0].metrics["far"].auroc > 0.9
    frames = [pd.DataFrame(x, columns=list("abcd")) for x in (fit, test, far)]
    scorer = fn.fit(frames[0], detector="KNN(k=3, normalize=False)")
    result = compare(["KNN(k=3)"], model=scorer, id_set=("id", frames[1]), ood_sets={"far": frames[2]})
    assert result.results[0].detector == "KNN(k=3, normalize=False)"
    assert "KNN(k=3)" in result.excluded
    np.testing.assert_allclose(
        result.results[0].id_scores, [v.score for v in scorer.predict(frames[1])], rtol=1e-5
    )
    alone = compare(["KNN(normalize=False)"], fit=frames[0], id_set=frames[1], ood_sets={"far": frames[2]})
    assert alone.results[0].metrics["far"].auroc > 0.9


def test_texts_in_memory_and_labels_by_the_names_of_the_classes(tmp_path):
    texts = [f"my card was lost {word}" for word in WORDS[4:]] + ["the news"] * 10
    loaded = create_model(f"hf:{saved_classifier(tmp_path, ['news', 'Card', 'it'], texts)}")
    model = fn.Scorer(loaded.model, fn.MSP(), preprocess=loaded.transform, classes=loaded.classes)
    predicted = [verdict.predicted for verdict in model.predict(texts)]
    for labels, accuracy in ((predicted, 1), ([word.lower() for word in predicted], 1), (["x", "y"] * 10, None)):
        found = compare(["MSP"], model=model, id_set=source_of(texts, labels), ood_sets={"far": ["news ?"]})
        assert found.accuracy == accuracy
    found = compare(["MSP", "ODIN", "Views(MSP)"], model=model, id_set=texts, ood_sets={"far": ["news ?"]})
    why = "it changes the input, and the tokens of a text cannot be changed gradually"
    assert found.excluded == {"ODIN()": why, "Views(MSP())": why}
    assert found.id_name == "the list"
    assert found.items["the list"][3] == "row 3"
    by_folder = compare(
        ["MSP"],
        model=loaded.model,
        preprocess=loaded.transform,
        classes=loaded.classes,
        id_set=source_of(texts, predicted),
        ood_sets={"far": ["news ?"]},
    )
    assert by_folder.accuracy == 1
    with pytest.raises(DataError, match="the array holds rows, and the model takes texts"):
        compare(["MSP"], model=model, id_set=texts, ood_sets={"far": np.zeros((3, 3))})
