"""Two actors of a local Ray cluster score, extract and fit as this process does."""

import copy
import os
import signal
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import featnorm as fn
import tiny_texts
from featnorm.fitting import fit_source
from featnorm.inputs import DataError, ImageSource, SlicedSource, open_source, source_of
from featnorm.scoring import score_source

ray = pytest.importorskip("ray")

from featnorm.cluster import Cluster, cluster  # noqa: E402
from featnorm.cluster.bank import BankPart, ShardedKNN  # noqa: E402

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("few_steps")]

BATCH = 4


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    # By default its processes wait for everything else that runs, and so for the other process of tests.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("HOME", str(tmp_path_factory.mktemp("home")))  # of the exported graphs
        patch.setenv("RAY_worker_niceness", "0")
        # By default they are killed where other programs fill the memory.
        patch.setenv("RAY_memory_monitor_refresh_ms", "0")
        ray.init(num_cpus=2, log_to_driver=False, include_dashboard=False)
    # Workers do not import this file.
    ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
    with Cluster("cpu") as cluster:
        yield cluster
    ray.shutdown()


def local(scorer, source):
    return list(scorer.stream(source, runtime=fn.Runtime(batch_size=BATCH, workers=0)))


def remote(workers, scorer, source, batches=None):
    batches = range(-(-len(source) // BATCH)) if batches is None else batches
    found = dict(workers.score(scorer, source, batches, runtime=fn.Runtime(batch_size=BATCH)))
    assert sorted(found) == list(batches)
    return [found[number] for number in batches]


def preprocessed(scorer, preprocess):
    """The same scorer with another preprocess."""
    other = copy.copy(scorer)
    other._preprocess = (preprocess,)
    return other


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert [(v.item, v.error, v.predicted, v.is_id) for v in a] == [
            (v.item, v.error, v.predicted, v.is_id) for v in b
        ]
        for one, other in zip(a, b, strict=True):
            if other.score is not None:
                assert one.score == pytest.approx(other.score, rel=1e-6, abs=1e-6)
                assert one.p_value == pytest.approx(other.p_value, abs=1e-6)


def fit(folder, loaded, cache, workers=None, **options):
    runtime = fn.Runtime(batch_size=BATCH, workers=0, cluster=workers, progress=False)
    return fit_source(open_source(str(folder)), loaded, head="train", cache=cache, runtime=runtime, **options)


@pytest.mark.parametrize(
    "detector",
    ["KLUniform()", "Views(NAN())", "KNN(k=3) / NAN()", "SSD()", "Mahalanobis()", "NAN() + 2 * KNN(k=3) + MSP()"],
)
def test_fits_and_scores_are_those_of_one_process(workers, folder, tiny, cache, tmp_path, monkeypatch, detector):
    targets = "clusters" if detector == "SSD()" else "labels"
    # Several parts to merge.
    monkeypatch.setattr(fn.fitting, "_ROWS", 50)
    source = SlicedSource(open_source(str(folder)), range(30), "thirty")
    alone, one = fit(folder, tiny, cache, detector=fn.parse_detector(detector), targets=targets)
    asked = cache if detector != "KLUniform()" else tmp_path / "asked by the workers"
    merged, two = fit(folder, tiny, asked, detector=fn.parse_detector(detector), workers=workers, targets=targets)
    assert (two.trained, two.held_out, two.accuracy) == (one.trained, one.held_out, one.accuracy)
    assert two.corrupt == one.corrupt
    assert two.computed == (0 if asked is cache else one.trained + one.held_out)
    expected = local(alone, source)
    assert expected[0][0].error is not None
    assert_same(local(merged, source), expected)
    if asked is not cache or detector.startswith("KNN"):
        assert_same(remote(workers, alone, source), expected)
    for mine, theirs in zip(merged.statistics.buffers(), alone.statistics.buffers(), strict=True):
        assert torch.equal(mine, theirs)


def test_rows_are_fitted_and_scored_as_by_one_process(workers):
    rows = np.random.default_rng(0).normal(size=(240, 6))
    detector = "KNN(k=3, normalize=False)"
    alone, merged = (
        fn.fit(rows, detector=detector, runtime=fn.Runtime(batch_size=BATCH, workers=0, cluster=actors))
        for actors in (None, workers)
    )
    new = source_of(np.concatenate([rows[:30], np.full((1, 6), np.nan), 9 + rows[:5]]))
    expected = local(alone, new)
    assert expected[7][2].error == "column 0 is nan in float32, which is not finite"
    assert_same(local(merged, new), expected)
    assert_same(remote(workers, alone, new), expected)


@pytest.mark.usefixtures("operators_read_once")
def test_onnxruntime_runs_the_network_in_each_actor(workers, folder, tiny, cache, tmp_path):
    alone = fit(folder, tiny, cache, detector=fn.NAN())[0]
    runtime = fn.Runtime(batch_size=BATCH, workers=0, cluster=workers, progress=False, engine="onnx")
    source = open_source(str(folder))
    merged, report = fit_source(source, tiny, detector=fn.NAN(), head="train", cache=tmp_path, runtime=runtime)
    assert (merged.facts["engine"], report.computed) == ("onnxruntime", 239)
    few, expected, found = SlicedSource(source, range(10), "ten"), [], []
    score_source(alone, few, runtime=fn.Runtime(engine="torch", progress=False), on_batch=expected.extend)
    score_source(alone, few, runtime=runtime, on_batch=found.extend)
    found, expected = (sorted(verdicts, key=lambda verdict: verdict.item) for verdicts in (found, expected))
    for one, other in zip(found, expected, strict=True):
        assert (one.item, one.error, one.is_id) == (other.item, other.error, other.is_id)
        assert one.score == other.score is None or one.score == pytest.approx(other.score, rel=1e-4)


def test_a_small_set_is_fitted_here_and_scored_by_the_workers(workers, folder, tiny, cache, tmp_path):
    few, new = (SlicedSource(open_source(str(folder)), range(i, 240, 6), "some") for i in (0, 1))
    found = []
    for place, actors in ((cache, None), (tmp_path / "asked by the workers", workers)):
        runtime = fn.Runtime(batch_size=BATCH, workers=0, cluster=actors, progress=False)
        found.append(fit_source(few, tiny, cache=place, runtime=runtime)[0])
    alone, merged = found
    assert merged.is_jackknife
    assert torch.allclose(merged.detector.left_out.scores, alone.detector.left_out.scores, rtol=1e-4)
    assert_same(remote(workers, alone, new), local(alone, new))


def test_some_batches_in_any_number(workers, folder, tiny, cache, monkeypatch):
    monkeypatch.setattr(cluster, "_SHARD", 2)
    scorer = fit(folder, tiny, cache)[0]
    source = SlicedSource(open_source(str(folder)), range(27), "some")
    expected = local(scorer, source)
    wanted = [0, 2, 3, 6]  # the last of three images
    assert_same(remote(workers, scorer, source, wanted), [expected[i] for i in wanted])
    assert list(workers.score(scorer, source, [], runtime=fn.Runtime(batch_size=BATCH))) == []


def test_no_more_is_under_way_than_the_actors_can_soon_take(workers, folder, tiny, cache, monkeypatch):
    monkeypatch.setattr(cluster, "_SHARD", 1)
    loaded = replace(tiny, transform=lambda image: torch.zeros(3, 8, 8))
    source = SlicedSource(open_source(str(folder)), range(1, 41), "forty")
    taken, numbers = [], []
    results = workers._results

    def counting(method, calls, ordered):
        return results(method, (taken.append(1) or call for call in calls), ordered)

    monkeypatch.setattr(workers, "_results", counting)
    for part in workers.extract(loaded, tiny.model, runtime=fn.Runtime(batch_size=2))(source):
        numbers.append(part.rows[0])
        assert len(taken) <= len(numbers) + cluster._CALLS * workers.actors.count
    assert numbers == list(range(0, 40, 2))
    assert len(taken) == 20


class Deadly(ImageSource):
    """Images of which one ends the process that reads it, once or always; it writes down what is read."""

    def __init__(self, source, row, place, always=False):
        super().__init__("deadly", [None] * len(source), None)
        self.source, self.row, self.place, self.always = source, row, place, always

    def _read(self, i):
        with (self.place / "read").open("a") as file:
            file.write(f"{i}\n")
        if i == self.row and (self.always or not (self.place / "died").exists()):
            (self.place / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.source.read(i)

    def _name(self, i):
        return self.source.name(i)

    def _identity(self, i):
        return self.source.identity(i)

    def _digest(self, i):
        return self.source.digest(i)


def test_a_killed_worker_costs_its_shard_and_no_more(workers, folder, tiny, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_SHARD", 2)
    scorer = fit(folder, tiny, cache)[0]
    source = SlicedSource(open_source(str(folder)), range(1, 49), "some")
    deadly = Deadly(source, 29, tmp_path)
    assert_same(remote(workers, scorer, deadly), local(scorer, source))
    assert (tmp_path / "died").exists()
    read = np.bincount([int(line) for line in (tmp_path / "read").read_text().split()], minlength=48)
    assert read.min() == 1
    # Rows 24 to 31 are the shard; what the other worker had was not lost.
    again = (read > 1).nonzero()[0]
    assert len(again)
    assert set(again.tolist()) <= set(range(24, 32))


def test_images_that_end_every_worker_are_named(workers, folder, tiny, cache, tmp_path, monkeypatch):
    monkeypatch.setattr(cluster, "_SHARD", 2)
    monkeypatch.setattr(cluster, "_RETRIES", 1)
    scorer = fit(folder, tiny, cache)[0]
    source = SlicedSource(open_source(str(folder)), range(1, 49), "some")
    with pytest.raises(DataError) as raised:
        remote(workers, scorer, Deadly(source, 29, tmp_path, always=True))
    first, last = source.name(24), source.name(31)
    assert f"the process that read {first} to {last} of deadly ended 2 times" in str(raised.value)
    assert (tmp_path / "read").read_text().split().count("29") == 2
    # The actors work on.
    assert_same(remote(workers, scorer, source), local(scorer, source))


def test_a_large_bank_lies_in_parts_and_one_that_dies_is_started_again(workers, folder, tiny, cache, monkeypatch):
    # Within a fusion, within views, within a sum: each part is a process, which takes seconds to start.
    detector = "KLUniform() + Views(KNN(k=3) / NAN())"
    scorer = fit(folder, tiny, cache, detector=fn.parse_detector(detector))[0]
    source = SlicedSource(open_source(str(folder)), range(1, 21), "some")
    expected = local(scorer, source)
    in_parts, made = workers._in_parts, []
    assert in_parts(scorer) is scorer
    monkeypatch.setattr(cluster, "_BANK_SHARE", 0.0)
    monkeypatch.setattr(workers, "_in_parts", lambda scorer: made.append(in_parts(scorer)) or made[-1])
    assert_same(remote(workers, scorer, source), expected)
    (parts,) = made
    within = [m for m in parts.detector.modules() if isinstance(m, fn.KNN)]
    assert all(isinstance(knn, ShardedKNN) and knn.bank.is_empty for knn in within)
    assert len(within) == detector.count("KNN")
    assert repr(parts.detector) == repr(scorer.detector)
    assert all(not knn.bank.is_empty for knn in scorer.detector.modules() if type(knn) is fn.KNN)
    # A part that dies is started again.
    queries = torch.nn.functional.normalize(torch.randn(5, within[0].bank_shape[1]))
    before = within[0].nearest(queries, 3)
    ray.kill(within[0].parts[0], no_restart=False)
    assert torch.equal(within[0].nearest(queries, 3), before)


class PartHere:
    """A part of a bank in this process, which is called like an actor."""

    def __init__(self, rows, expression):
        self._part = BankPart(rows, expression)

    @property
    def nearest(self):
        return SimpleNamespace(remote=lambda queries, k: ray.put(self._part.nearest(queries, k)))


@pytest.mark.usefixtures("workers")
def test_the_nearest_of_the_bank_are_the_nearest_of_the_parts():
    torch.manual_seed(0)
    bank = torch.nn.functional.normalize(torch.randn(12, 6))
    queries = torch.nn.functional.normalize(torch.randn(5, 6))
    whole = fn.KNN(7).use_bank(bank)
    # More neighbors than a part has rows.
    parts = [PartHere(part.numpy(), repr(whole)) for part in bank.tensor_split(2)]
    found = ShardedKNN(whole, parts).nearest(queries, 7)
    exact = torch.cdist(queries.double(), bank.double()).square().sort(1).values[:, :7]
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(found, whole.nearest(queries, 7), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="has only 12 inputs in its bank"):
        ShardedKNN(fn.KNN(13).use_bank(bank), parts).score(fn.Features(pooled=queries))


def test_an_error_comes_back_in_its_own_words(workers, folder, tiny, cache):
    scorer = fit(folder, tiny, cache)[0]
    source = SlicedSource(open_source(str(folder)), range(1, 9), "some")

    def fails(image):
        raise RuntimeError("no such colour")

    broken = preprocessed(scorer, fails)
    with pytest.raises(DataError, match=r"the transform failed on .*png \(RuntimeError: no such colour\)"):
        remote(workers, broken, source)
    not_finite = preprocessed(scorer, lambda image: torch.full((3, 32, 32), torch.nan))
    with pytest.raises(ValueError, match="not finite"):
        remote(workers, not_finite, source)


def test_devices_that_there_are(workers):
    with pytest.raises(ValueError, match="cannot use device 'cuda': the cluster has no GPU"):
        Cluster("cuda")
    with pytest.raises(ValueError, match="a cluster cannot use device 'mps': choose auto, cpu or cuda"):
        Cluster("mps")
    assert workers.actors == cluster.Actors(2, "cpu", 1, 0)
    assert cluster._actors("auto", {"CPU": 32.0, "GPU": 4.0}) == cluster.Actors(4, "cuda", 8, 1)
    assert cluster._actors("cpu", {"CPU": 32.0, "GPU": 4.0}) == cluster.Actors(32, "cpu", 1, 0)


def test_the_commands_on_a_cluster(workers, featnorm, folder, tmp_path, monkeypatch):
    # An actor takes seconds to begin, so those that there are go from each command to the next, and back.
    init, left, closed = Cluster.__init__, list(workers._ready), []

    def begin(self, device):
        init(self, device)
        self._ready.extend(left)

    def leave(self):
        closed.append(self)
        left[:] = self._ready

    for name, stand_in in (("__init__", begin), ("close", leave)):
        monkeypatch.setattr(Cluster, name, stand_in)
    # One shard for each command.
    size = 16
    backbone = ("--model", "featnorm:cifar10-resnet18", "--device", "cpu", "--batch-size", size)
    # Half of the images are enough batches.
    images = f"{folder}[::2]"
    fitting = ("fit", images, "--cache", tmp_path / "cache", "--detector", "SSD", *backbone)
    status, printed, error = featnorm(*fitting, "-o", "ray.featnorm", "--ray")
    assert (status, error) == (0, "")
    assert "Computed the features of 119 images" in printed
    status, printed, _ = featnorm(*fitting, "-o", "one.featnorm")
    assert "The features of all images were in the cache." in printed
    scoring = ("score", "ray.featnorm", images, "--batch-size", size, "--device", "cpu")
    status, printed, _ = featnorm(*scoring, "-o", "one.csv", "--workers", 0)
    assert status == 0
    # The second journal breaks off: what it holds is not scored again, by one process or by many.
    score = Cluster.score

    def die(*arguments, **options):
        for count, found in enumerate(score(*arguments, **options)):
            if count == 3:
                raise KeyboardInterrupt
            yield found

    monkeypatch.setattr(Cluster, "score", die)
    assert featnorm(*scoring, "-o", "ray.csv", "--ray")[0] == 130
    monkeypatch.setattr(Cluster, "score", score)
    status, printed, error = featnorm(*scoring, "-o", "ray.csv", "--ray")
    assert (status, error) == (0, "")
    assert f"resuming after {3 * size} of" in printed
    assert "on at most 2 actors (cpu)" in printed
    one, many = (
        [line.split(",") for line in (tmp_path / f"{name}.csv").read_text().splitlines()]
        for name in ("one", "ray")
    )
    assert len(one) == len(many)
    for a, b in zip(one[1:], many[1:], strict=True):
        assert (a[0], a[3:]) == (b[0], b[3:])
        for x, y in zip(a[1:3], b[1:3], strict=True):
            assert (x == y == "") or float(x) == pytest.approx(float(y), rel=1e-6, abs=1e-6)
    assert not list(tmp_path.glob(".*"))
    status, printed, _ = featnorm(*scoring, "--ray")
    assert status == 0
    assert "flagged as OOD" in printed
    assert len(closed) == 4
    workers._ready[:] = left


def test_a_batch_that_does_not_fit_is_scored_in_parts(folder, tiny, cache, monkeypatch):
    scorer = fit(folder, tiny, cache, detector=fn.KLUniform())[0]
    source = SlicedSource(open_source(str(folder)), range(14), "some")
    expected = [v for batch in scorer.stream(source, runtime=fn.Runtime(batch_size=14, workers=0)) for v in batch]
    predict, sizes = fn.Scorer._predict, []

    def small(self, images, names, **options):
        if len(images) > 4:
            raise torch.OutOfMemoryError("CUDA out of memory")
        sizes.append(len(images))
        return predict(self, images, names, **options)

    monkeypatch.setattr(fn.Scorer, "_predict", small)
    found = [v for batch in scorer.stream(source, runtime=fn.Runtime(batch_size=14, workers=0)) for v in batch]
    assert sum(sizes) == 13  # one cannot be read
    # A batch of another size rounds otherwise, and as these images calibrated, a tie may break: the p-values are
    # to be those of the scores found.
    scores = [v.score for v in found if v.score is not None]
    p_values = iter(scorer.calibration.p_value(torch.tensor(scores)).tolist())
    expected = [v if v.score is None else v._replace(p_value=next(p_values)) for v in expected]
    assert_same([found], [expected])
    monkeypatch.setattr(
        fn.Scorer, "_predict", lambda *_, **__: (_ for _ in ()).throw(torch.OutOfMemoryError("all"))
    )
    with pytest.raises(torch.OutOfMemoryError, match="all"):
        list(scorer.stream(source, runtime=fn.Runtime(batch_size=14, workers=0)))


def test_texts(workers, tmp_path):
    tiny_texts.write_texts(tmp_path / "known.parquet", 2, 60, tiny_texts.WORDS[4:])
    (tmp_path / "new.txt").write_text("my card was lost\n\nis it ?\n" + "the news\n" * 9)
    runtime = fn.Runtime(batch_size=BATCH, workers=0, cluster=workers, progress=False)
    model = f"hf:{tiny_texts.saved(tmp_path / 'encoder')}"
    scorer = fn.fit(tmp_path / "known.parquet", model, cache=tmp_path / "cache", runtime=runtime)
    source = open_source(str(tmp_path / "new.txt"))
    found = remote(workers, scorer, source)
    assert_same(found, local(scorer, source))
    assert found[0][1].error == "an empty text"


def test_actors_stay_for_the_next_work_until_the_cluster_is_closed(workers, folder, tiny, cache):
    scorer = fit(folder, tiny, cache)[0]
    source = SlicedSource(open_source(str(folder)), range(4), "some")
    remote(workers, scorer, source)
    stayed = set(workers._ready) | set(workers._starting.values())
    remote(workers, scorer, SlicedSource(open_source(str(folder)), range(4, 8), "others"))
    assert stayed == set(workers._ready) | set(workers._starting.values())
    workers.close()
    assert not workers._ready
    assert not workers._starting
