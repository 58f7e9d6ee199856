"""The comparison of detectors, on synthetic features."""

import numpy as np
import pytest
import torch

import featnorm as fn
from featnorm.evaluation import compare, standard_detectors
from featnorm.metrics import evaluate


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
    detectors = [fn.NAN(), fn.KNN(k=3), fn.Mahalanobis()]
    result = compare(
        detectors,
        fit=batches(train),
        id_set=("known", batches(known)),
        ood_sets={"near": batches(near), "far": batches(far)},
    )
    assert [outcome.detector for outcome in result.results] == ["NAN()", "KNN(k=3)", "Mahalanobis()"]
    for outcome, fresh in zip(result.results, [fn.NAN(), fn.KNN(k=3), fn.Mahalanobis()], strict=True):
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


def test_detectors_that_cannot_work_are_left_out_by_name():
    known, far = features(30, 1.0, 0), features(30, 0.1, 2)
    detectors = [fn.NAN(), fn.KNN(k=50), fn.EmbeddingMagnitude(), fn.Mahalanobis()]
    result = compare(detectors, fit=[known], id_set=("known", [known]), ood_sets={"far": [far]})
    assert [outcome.detector for outcome in result.results] == ["NAN()"]
    assert "only 30 inputs in its bank" in result.excluded["KNN()"]
    assert "`embedding`" in result.excluded["EmbeddingMagnitude()"]
    assert "`labels`" in result.excluded["Mahalanobis()"]


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
