"""The metrics for torchmetrics: the same numbers as those of `featnorm.metrics`, in batches and in processes."""

import functools
import multiprocessing
import pickle

import numpy as np
import pytest
import torch
from sklearn import metrics as sk
from torchmetrics import MetricCollection

import featnorm as fn
from featnorm.torchmetrics import AUROC, AUPRIn, AUPROut, DetectionAccuracy, FPRAtTPR, FPRAtTPROODPositive

PAIRS = {
    "AUROC": (AUROC(), fn.auroc),
    "AUPRIn": (AUPRIn(), fn.aupr_in),
    "AUPROut": (AUPROut(), fn.aupr_out),
    "DetectionAccuracy": (DetectionAccuracy(), fn.detection_accuracy),
    "FPRAtTPR": (FPRAtTPR(tpr=0.9), functools.partial(fn.fpr_at_tpr, tpr=0.9)),
    "FPRAtTPROODPositive": (FPRAtTPROODPositive(), fn.fpr_at_tpr_ood_positive),
}


def batches():
    """Return batches with ties, one of ID alone, one of OOD alone and an empty one."""
    generator = torch.Generator().manual_seed(0)
    sizes, shares = (37, 1, 20, 20, 0), (0.6, 1.0, 1.0, 0.0, 0.5)
    for n, share in zip(sizes, shares, strict=True):
        is_id = torch.rand(n, generator=generator) < share
        scores = torch.randn(n, generator=generator, dtype=torch.float64) + is_id
        yield (scores * 8).round() / 8, is_id


def together():
    scores, is_id = map(torch.cat, zip(*batches(), strict=True))
    return scores, is_id, {name: of(scores[is_id], scores[~is_id]) for name, (_, of) in PAIRS.items()}


def collection():
    return MetricCollection({name: metric.clone() for name, (metric, _) in PAIRS.items()})


@pytest.mark.filterwarnings("error")
def test_batches_give_the_numbers_of_all_scores_at_once_and_one_state_serves_a_collection():
    metrics, (scores, is_id, expected) = collection(), together()
    for _ in range(2):
        for batch in batches():
            metrics.update(*batch)
        assert {name: float(value) for name, value in metrics.compute().items()} == expected
        metrics.reset()
    assert len(metrics.compute_groups) == 1
    of_sklearn = {
        "AUROC": sk.roc_auc_score(is_id, scores),
        "AUPRIn": sk.average_precision_score(is_id, scores),
        "AUPROut": sk.average_precision_score(~is_id, -scores),
    }
    for name, value in of_sklearn.items():
        assert expected[name] == pytest.approx(value, abs=1e-12)


def test_forward_returns_the_measure_of_its_batch_and_keeps_all():
    (first, second), metric = list(batches())[:2], AUROC()
    assert float(metric(*first)) == fn.auroc(first[0][first[1]], first[0][~first[1]])
    with pytest.warns(UserWarning, match="AUROC is NaN, because there are no OOD scores: call update with both"):
        assert metric(*second).isnan()
    both = [torch.cat(parts) for parts in zip(first, second, strict=True)]
    assert float(metric.compute()) == fn.auroc(both[0][both[1]], both[0][~both[1]])


def test_a_metric_can_be_merged_pickled_and_plotted():
    first, second = (FPRAtTPR(tpr=0.9) for _ in range(2))
    for i, batch in enumerate(batches()):
        (second if i % 2 else first).update(*batch)
    first.merge_state(second)
    assert float(pickle.loads(pickle.dumps(first)).compute()) == together()[2]["FPRAtTPR"]
    assert not first.higher_is_better
    assert repr(first) == "FPRAtTPR(tpr=0.9)"
    assert first.plot()[1].get_ylim()[0] == pytest.approx(0, abs=0.1)


def test_scores_of_half_precision_and_of_numpy_count_as_they_are():
    metric = AUROC()
    metric.update(torch.tensor([1.5, 0.5], dtype=torch.bfloat16), torch.tensor([1, 0]))
    metric.update(np.float32([1.5, 2.0]), np.array([False, True]))
    metric.update([], [])
    assert float(metric.compute()) == fn.auroc([1.5, 2.0], [0.5, 1.5])


@pytest.mark.parametrize(
    ("scores", "is_id", "match"),
    [
        ([1.0, 2.0], [True], r"is_id must hold True or 1 .* 2 values in all, got torch.bool of shape \(1,\)"),
        ([1.0, 2.0], [1, -1], r"got torch.int64 of shape \(2,\) with values from -1 to 1"),
        ([1.0], [0.5], r"got torch.float32 of shape \(1,\)"),
        ([1.0], [1j], r"got torch.complex64 of shape \(1,\)"),
        ([[1.0]], [[1]], r"scores must be 1-D, one score per input, got shape \(1, 1\)"),
        ([float("nan")], [1], r"scores: 1 of 1 values are NaN, the first at index 0"),
    ],
)
def test_an_update_that_is_none_is_an_error(scores, is_id, match):
    with pytest.raises(ValueError, match=match):
        AUROC().update(torch.tensor(scores), torch.tensor(is_id))
    with pytest.raises(ValueError, match=r"tpr must be in \(0, 1\]"):
        FPRAtTPR(tpr=0)


def _process(rank, store, results):
    """Update with every second batch, the second process with those of ID alone; then with none."""
    torch.distributed.init_process_group("gloo", f"file://{store}", rank=rank, world_size=2)
    metrics, rows = collection(), list(batches())
    for i in (0, 3, 4) if rank == 0 else (1, 2):
        metrics.update(*rows[i])
    first = metrics.compute()
    metrics.reset()
    if rank == 0:
        for batch in rows:
            metrics.update(*batch)
    results.put([{name: float(value) for name, value in found.items()} for found in (first, metrics.compute())])
    torch.distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.posix
@pytest.mark.filterwarnings("ignore:The ``compute`` method")
def test_two_processes_compute_the_measure_of_all_their_scores(tmp_path):
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=_process, args=(rank, tmp_path / "store", results)) for rank in range(2)]
    for process in processes:
        process.start()
    found = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(60)
    assert found == 2 * [2 * [together()[2]]]
