"""The callback for Lightning: what it logs and writes, and that the training is the same with it."""

import importlib
import math
import sys

import lightning.pytorch
import pytest
import pytorch_lightning
import torch
from torch import nn

import featnorm as fn
from digits import loader, network, parts
from featnorm.callbacks import TrainingScorer
from featnorm.lightning import OODCallback

QUIET = {
    "accelerator": "cpu",
    "enable_model_summary": False,
    "enable_progress_bar": False,
    "logger": False,
}
pytestmark = pytest.mark.filterwarnings("ignore:::(lightning|pytorch_lightning)")


def module(package=lightning.pytorch, seed=0):
    class Digits(package.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = network()

        def forward(self, x):
            return self.net(x)

        def training_step(self, batch, _):
            return nn.functional.cross_entropy(self(batch[0]), batch[1])

        def validation_step(self, batch, _):
            self.log("loss", nn.functional.cross_entropy(self(batch[0]), batch[1]))

        def configure_optimizers(self):
            return torch.optim.Adam(self.parameters(), lr=0.01)

    package.seed_everything(seed, verbose=False)
    return Digits()


def nan(model):
    return fn.Scorer(model, fn.NAN())


def knn(model):
    return fn.Scorer(model.net, fn.KNN(k=5))


def callback(make_scorer=nan, **changes):
    return OODCallback(make_scorer, calibration=loader("calibration"), ood={"nines": loader("nines")}, **changes)


def trainer(folder, *callbacks, package=lightning.pytorch, epochs=2, **options):
    return package.Trainer(
        max_epochs=epochs, callbacks=[*callbacks], default_root_dir=folder, **{**QUIET, **options}
    )


def fit(runner, model, **options):
    runner.fit(model, loader("train", shuffle=True), loader("validation"), **options)


def test_it_logs_the_measures_of_the_weights_as_they_are_and_writes_the_best_ones_beside_their_checkpoint(
    tmp_path,
):
    aurocs = []

    class History(lightning.pytorch.Callback):
        def on_validation_end(self, trainer, pl_module):
            if not trainer.sanity_checking:
                aurocs.append(float(trainer.callback_metrics["ood/nines/auroc"]))

    measuring = callback(drift=loader("nines"))
    # The first epoch is the best, so its weights are not those at the end.
    best = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", monitor="step", mode="min")
    runner, model = trainer(tmp_path, measuring, History(), best), module()
    fit(runner, model)
    assert len(aurocs) == 2
    scorer = fn.Scorer(model, fn.NAN()).calibrate(loader("calibration"), progress=False)
    scores = torch.cat([scorer(rows).score for rows, _ in loader("nines")])
    logged = {name: float(value) for name, value in runner.callback_metrics.items() if name != "loss"}
    monitor = fn.DriftMonitor(scorer.calibration.scores)
    monitor.update(scores)
    flagged = float((scores < scorer.calibration.threshold).double().mean())
    assert logged == pytest.approx(
        {
            "ood/nines/auroc": fn.auroc(scorer.calibration.scores, scores),
            "ood/nines/fpr95": fn.fpr_at_tpr(scorer.calibration.scores, scores),
            "ood/nines/flagged": flagged,
            "ood/drift/flagged": flagged,
            "ood/drift/log10_evidence": monitor.highest,
            "ood/drift/alarm": 1.0,
        },
        rel=1e-6,
    )
    assert measuring.path == tmp_path / "epoch=0.featnorm"
    assert (tmp_path / "epoch=0.ckpt").exists()
    with pytest.raises(ValueError, match="weights"):
        fn.load(measuring.path, model)
    first = module()
    first.load_state_dict(torch.load(tmp_path / "epoch=0.ckpt", weights_only=True)["state_dict"])
    loaded = fn.load(measuring.path, first)
    assert loaded.calibration.tpr == 0.95
    of_first = torch.cat([loaded(rows).score for rows, _ in loader("nines")])
    assert fn.auroc(loaded.calibration.scores, of_first) == pytest.approx(aurocs[0], rel=1e-6)


@pytest.mark.posix  # a worker of a DataLoader starts in no time
def test_the_training_is_the_same_with_it(tmp_path):
    def weights(*callbacks, own):
        # One loader for all, whose worker persists, and random numbers of its own; gradients that wait.
        runner = trainer(tmp_path, *callbacks, val_check_interval=5, accumulate_grad_batches=4, max_steps=4)
        model = module()
        runner.fit(model, own, loader("validation"))
        assert runner.global_step == 4
        assert model.training
        return model.state_dict(), torch.rand(3), own.generator.get_state()

    def own_loader():
        options = {"num_workers": 1, "persistent_workers": True, "shuffle": True}
        return loader("train", generator=torch.Generator().manual_seed(0), **options)

    first, *random = weights(own=own_loader())
    own = own_loader()
    second, *random_with = weights(callback(knn, train=own), own=own)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert all(map(torch.equal, random, random_with))


def test_a_run_that_is_resumed_writes_the_scorer_at_its_end(tmp_path):
    fit(trainer(tmp_path, callback(), epochs=1), module())
    (checkpoint,) = tmp_path.rglob("*.ckpt")
    measuring, model = callback(), module(seed=1)
    runner = trainer(tmp_path, measuring)
    fit(runner, model, ckpt_path=checkpoint)
    assert runner.current_epoch == 2
    assert fn.load(measuring.path, model).calibration is not None


def test_without_checkpoints_the_scorer_stands_in_the_root_folder_and_a_trial_run_writes_none(tmp_path):
    measuring = callback(knn, train=loader("train"))
    fit(trainer(tmp_path, measuring, fast_dev_run=True), module())
    assert measuring.path is None
    model = module()
    runner = trainer(tmp_path, measuring, epochs=1, enable_checkpointing=False, precision="bf16-mixed")
    fit(runner, model)
    assert fn.load(tmp_path / "scorer.featnorm", model.net).detector.k == 5
    # Outside of a training too, and in inference mode.
    (values,) = runner.validate(model, loader("validation"), verbose=False)
    assert {"ood/nines/auroc", "ood/nines/fpr95", "ood/nines/flagged", "loss"} == values.keys()


def test_it_works_with_pytorch_lightning_alone(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "lightning.pytorch")
    import featnorm.lightning

    try:
        alone = importlib.reload(featnorm.lightning)
        assert not issubclass(alone.OODCallback, lightning.pytorch.Callback)
        measuring = alone.OODCallback(
            nan, calibration=loader("calibration"), ood={name: loader("nines") for name in ("a", "b")}
        )
        runner = trainer(tmp_path, measuring, package=pytorch_lightning, epochs=1)
        model = module(pytorch_lightning)
        fit(runner, model)
    finally:
        monkeypatch.undo()
        importlib.reload(featnorm.lightning)
    assert float(runner.callback_metrics["ood/mean/auroc"]) == float(runner.callback_metrics["ood/a/auroc"])
    assert fn.load(measuring.path, model)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks processes")
def test_two_processes_log_one_value_and_write_one_file(tmp_path):
    measuring, model = callback(knn, train=loader("train", shuffle=True)), module()
    runner = trainer(tmp_path, measuring, strategy="ddp_fork", devices=2, epochs=1)
    fit(runner, model)
    (path,) = tmp_path.rglob("*.featnorm")
    assert path.with_suffix(".ckpt").exists()
    assert fn.load(path, model.net).calibration is not None
    assert 0.7 < float(runner.callback_metrics["ood/nines/auroc"]) < 1


@pytest.mark.parametrize(
    ("changes", "kind", "match"),
    [
        ({"ood": {"empty": []}}, ValueError, r"ood\['empty'\] is empty: pass a loader of at least one batch"),
        ({"drift": iter([torch.zeros(1, 64)])}, TypeError, "drift is an iterator, which yields its batches once"),
        ({"train": torch.zeros(2, 64)}, TypeError, "train: a tensor is not a loader"),
        ({"ood": {"mean": [torch.zeros(1, 64)]}}, ValueError, "'mean' is the name of other values"),
    ],
)
def test_loaders_that_cannot_be_used_are_errors(changes, kind, match):
    with pytest.raises(kind, match=match):
        OODCallback(nan, **{"calibration": loader("calibration"), **changes})


def once():
    """Return a loader whose passes share one iterator."""

    class Once:
        batches = iter([torch.zeros(100, 64)])

        def __iter__(self):
            return self.batches

    return Once()


def unsized(*batches):
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(batches)

    return torch.utils.data.DataLoader(Stream(), batch_size=None)


def test_what_would_fail_after_an_epoch_fails_before_the_training(tmp_path):
    with pytest.raises(ValueError, match=r"KNN\(k=5\) needs a fit: pass train="):
        fit(trainer(tmp_path, callback(knn)), module())
    with pytest.raises(ValueError, match="reads `activation`: there is no `activation`"):
        fit(trainer(tmp_path, callback(lambda model: fn.Scorer(model.net[0], fn.NAN()))), module())
    with pytest.raises(ValueError, match="in local folders, and these are in memory://runs"):
        fit(trainer("memory://runs", callback()), module())


@pytest.mark.parametrize(
    ("make_scorer", "changes", "kind", "match", "note"),
    [
        (
            nan,
            {"calibration": [torch.rand(9, 64)] * 2},
            ValueError,
            "18 calibration scores are too few",
            "calibration",
        ),
        (nan, {"calibration": unsized()}, ValueError, "the loader yielded no batch", "calibration"),
        (nan, {"ood": {"far": unsized()}}, ValueError, "the loader yielded no batch", "ood['far']"),
        (nan, {"drift": [torch.rand(9, 63)]}, ValueError, "takes vectors of 64 numbers", "drift"),
        (nan, {"calibration": once()}, TypeError, "calibration yields its batches once: pass a DataLoader", None),
        (
            lambda model: fn.Scorer(model, fn.Mahalanobis()),
            {"train": [torch.rand(50, 64)]},
            ValueError,
            "reads `labels`: there is no `labels`: the loader yields none",
            "train",
        ),
        (
            lambda model: fn.Scorer(model, fn.NAN(), thresholds_by="folder"),
            {},
            ValueError,
            "thresholds_by='folder' needs the group of each input",
            None,
        ),
    ],
)
def test_the_check_reads_the_first_batch_of_each_loader(make_scorer, changes, kind, match, note):
    with pytest.raises(kind, match=match) as caught:
        TrainingScorer(make_scorer, **{"calibration": loader("calibration"), **changes}).check(network())
    assert note is None or f"(in {note})" in caught.value.__notes__


def test_as_many_calibration_inputs_as_the_rate_needs_pass_the_check():
    TrainingScorer(nan, calibration=[torch.rand(9, 64), torch.rand(10, 64)]).check(network())


def test_weights_that_are_not_finite_give_nan_with_a_warning_and_no_scorer(tmp_path):
    sets = {name: loader("nines") for name in ("a", "b")}
    scorer = TrainingScorer(nan, calibration=loader("calibration"), ood=sets, drift=loader("nines"))
    model = network()
    finite = scorer.measured(model)
    with torch.no_grad():
        model[0].weight.fill_(float("nan"))
    with pytest.warns(UserWarning, match=r"the OOD measures are NaN: `activation` is not finite .*in calibration"):
        values = scorer.measured(model)
    assert values.keys() == finite.keys()
    assert all(math.isnan(value) for value in values.values())
    with pytest.warns(UserWarning, match="scorer.featnorm is not written: `activation` is not finite"):
        scorer.save(model, tmp_path / "scorer.featnorm", write=True)
    assert scorer.path is None


def test_generators_of_samplers_are_left_as_they_were():
    generator = torch.Generator().manual_seed(0)
    sampler = torch.utils.data.RandomSampler(parts()["calibration"], generator=generator)
    batches = torch.utils.data.BatchSampler(sampler, 100, drop_last=False)
    data = torch.utils.data.DataLoader(parts()["calibration"], batch_sampler=batches)
    model = network()
    before = generator.get_state(), torch.get_rng_state()
    TrainingScorer(nan, calibration=data).measured(model)
    assert all(map(torch.equal, before, (generator.get_state(), torch.get_rng_state())))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_generators_of_cuda_are_left_as_they_were():
    class Noisy:
        def __iter__(self):
            yield torch.rand(100, 64, device="cuda").cpu()

    model = network().cuda()
    before = torch.cuda.get_rng_state()
    TrainingScorer(nan, calibration=Noisy()).measured(model)
    assert torch.equal(before, torch.cuda.get_rng_state())


@pytest.mark.parametrize("precision", ["bf16-true", "64-true"])
def test_inputs_are_converted_to_the_precision_of_the_weights(precision, tmp_path):
    measuring, model = callback(), module()
    runner = trainer(
        tmp_path, measuring, precision=precision, enable_checkpointing=False, epochs=1, limit_train_batches=1
    )
    runner.fit(model, loader("train"), loader("validation"))
    assert 0 <= float(runner.callback_metrics["ood/nines/auroc"]) <= 1
    assert fn.load(measuring.path, model)


def test_the_scorer_of_a_checkpoint_with_hyperparameters_of_any_type(tmp_path):
    class Saving(type(module())):
        def __init__(self, folder=None):
            super().__init__()
            self.save_hyperparameters()

    measuring = callback()
    fit(trainer(tmp_path, measuring, epochs=1), Saving(tmp_path))
    first = measuring.path
    assert first.exists()
    # What the state of a resumed run names as its best checkpoint is not trusted.
    state = torch.load(first.with_suffix(".ckpt"), weights_only=False)
    torch.save({**state, "hyper_parameters": {}}, tmp_path / "resumed.ckpt")
    resumed = callback()
    with pytest.warns(UserWarning, match="is not written, because the run that was resumed wrote its checkpoint"):
        fit(trainer(tmp_path, resumed, epochs=1), Saving(), ckpt_path=tmp_path / "resumed.ckpt")
    assert resumed.path is None


def test_the_scorer_is_of_the_weights_that_a_later_callback_sets_at_the_end(tmp_path):
    averaging = lightning.pytorch.callbacks.StochasticWeightAveraging(0.01, swa_epoch_start=1)
    measuring, model = callback(), module()
    fit(trainer(tmp_path, measuring, averaging, enable_checkpointing=False), model)
    assert fn.load(measuring.path, model)


def test_an_error_names_the_loader():
    far = OODCallback(nan, calibration=loader("calibration"), ood={"far": unsized()})
    with pytest.raises(ValueError, match="the loader yielded no batch") as caught:
        far.measured(network())
    assert caught.value.__notes__ == ["(in ood['far'])"]
