"""The callback for Hugging Face's Trainer: what it logs and writes, and that the training is the same with it."""

import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments

import featnorm as fn
from featnorm.transformers import OODCallback

WORDS = 40


def rows(n, seed, repeated=4):
    """Return texts of 6 words as ids of words; the class says which one is repeated."""
    ids = torch.randint(4, WORDS, (n, 6), generator=torch.Generator().manual_seed(seed))
    labels = torch.arange(n) % 2
    ids[:, :repeated] = labels[:, None] + 4
    return [{"input_ids": row, "labels": int(label)} for row, label in zip(ids, labels, strict=True)]


TRAIN, HELD_OUT, FAR = rows(64, 0), rows(40, 1), rows(30, 2, repeated=2)


def model():
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=WORDS, **sizes))


def trained(folder, *, with_it=True, evaluated=HELD_OUT, resume=None, epochs=2, **options):
    arguments = TrainingArguments(
        folder,
        use_cpu=True,
        num_train_epochs=epochs,
        per_device_train_batch_size=16,
        learning_rate=0.01,
        eval_strategy="epoch",
        save_strategy="epoch",
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = Trainer(model(), arguments, train_dataset=TRAIN, eval_dataset=evaluated)
    callback = None
    if with_it:

        def loader(data, **how):
            return DataLoader(data, batch_size=16, collate_fn=trainer.data_collator, **how)

        callback = OODCallback(
            trainer,
            lambda model: fn.Scorer(model, fn.KNN(k=5)),
            train=loader(TRAIN, shuffle=True),
            calibration=loader(HELD_OUT),
            ood={"far": loader(FAR)},
            drift=loader(FAR),
        )
        trainer.add_callback(callback)
    trainer.train(resume_from_checkpoint=resume)
    return trainer, callback


def measured(trainer, callback):
    """Return AUROC with the scorer that was written, and the same model."""
    scorer = fn.load(callback.path, trainer.model)
    verdict = scorer({"input_ids": torch.stack([row["input_ids"] for row in FAR])})
    return fn.auroc(scorer.calibration.scores, verdict.score)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A training with the callback, and one without it."""
    return [trained(tmp_path_factory.mktemp("out"), with_it=with_it) for with_it in (True, False)]


def test_it_logs_at_each_evaluation_and_writes_the_scorer(plain):
    (trainer, callback), _ = plain
    logged = [log for log in trainer.state.log_history if "eval_ood_far_auroc" in log]
    assert [log["epoch"] for log in logged] == [1.0, 2.0]
    assert logged[-1].keys() - {"epoch", "step"} == {
        *(f"eval_ood_far_{measure}" for measure in ("auroc", "fpr95", "flagged")),
        *(f"eval_ood_drift_{measure}" for measure in ("log10_evidence", "alarm", "flagged")),
    }
    assert callback.path.name == "scorer.featnorm"
    assert measured(trainer, callback) == logged[-1]["eval_ood_far_auroc"]
    assert "eval_ood_far_auroc" in trainer.evaluate()


def test_the_training_is_the_same_with_it(plain):
    (with_it, _), (without, _) = plain
    assert all(
        torch.equal(one, other)
        for one, other in zip(with_it.model.parameters(), without.model.parameters(), strict=True)
    )


def test_the_best_model_by_a_measure_of_ood_is_that_of_the_scorer_and_a_resumed_run_writes_one(tmp_path):
    best = {"load_best_model_at_end": True, "metric_for_best_model": "eval_ood_far_auroc", "seed": 1}
    trainer, callback = trained(tmp_path, **best, evaluated={"a": HELD_OUT, "b": HELD_OUT}, epochs=1)
    assert sum("eval_ood_far_auroc" in log for log in trainer.state.log_history) == 1
    assert measured(trainer, callback) == trainer.state.best_metric
    trainer, callback = trained(tmp_path, **best, resume=True)
    assert measured(trainer, callback) == trainer.state.best_metric
    assert trainer.state.epoch == 2


def test_the_scorer_of_a_training_in_mixed_precision_is_of_full_precision(tmp_path):
    trainer, callback = trained(tmp_path, epochs=1, bf16=True)
    assert "_original_forward" in vars(trainer.model)
    batch = {"input_ids": torch.stack([row["input_ids"] for row in HELD_OUT])}
    mixed = fn.load(callback.path, trainer.model)(batch).score
    full = fn.load(callback.path, trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False))
    assert not torch.allclose(mixed, full(batch).score, rtol=1e-4)
    torch.testing.assert_close(
        full.calibration.scores, full(batch).score.double().sort().values, rtol=1e-4, atol=0
    )


def test_a_detector_that_needs_a_fit_needs_training_inputs(tmp_path):
    # The bar of a training that ends by an error would stay open.
    arguments = TrainingArguments(tmp_path, use_cpu=True, report_to=[], disable_tqdm=True)
    trainer = Trainer(model(), arguments, train_dataset=TRAIN)
    callback = OODCallback(trainer, lambda model: fn.Scorer(model, fn.KNN()), calibration=[{}])
    trainer.add_callback(callback)
    with pytest.raises(ValueError, match="needs a fit: pass train=, a loader of training inputs"):
        trainer.train()
