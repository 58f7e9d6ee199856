"""A callback for the Trainer of Hugging Face: AUROC and drift at each evaluation, and a scorer of the model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featnorm._utils.extras import import_extra
from featnorm.callbacks import TrainingScorer
from featnorm.scorer import Scorer

__all__ = ["OODCallback"]


class OODCallback(TrainingScorer, import_extra("transformers").TrainerCallback):  # type: ignore[misc]
    """Callback of a Hugging Face ``Trainer`` that measures OOD detection at each evaluation, and writes a scorer.

    Add it to its trainer: ``trainer.add_callback(OODCallback(trainer, make_scorer, ...))``. At each evaluation,
    the callback fits and calibrates a scorer of the model as it is. It logs the results through the trainer, so
    that every integration gets them:

    - ``eval_ood_NAME_auroc``, ``eval_ood_NAME_fpr95`` and ``eval_ood_NAME_flagged``, the share flagged, for each
      OOD set NAME; for several sets, their means too, ``eval_ood_mean_auroc`` and so on,
    - with ``drift``, ``eval_ood_drift_log10_evidence``, the highest of a `featnorm.DriftMonitor`,
      ``eval_ood_drift_alarm``, 0 or 1, and ``eval_ood_drift_flagged``.

    They are added to the metrics of the evaluation, so that ``metric_for_best_model`` can be one of them.

    At the end of the training, the callback writes a scorer of the model, with ``load_best_model_at_end`` of the
    best one, to ``scorer.featnorm`` in ``output_dir``. To open the file, pass `featnorm.load` a model with these
    weights, such as ``trainer.save_model()`` saves.

    Loaders yield batches as the model takes them, such as ``DataLoader(dataset, batch_size=64,
    collate_fn=trainer.data_collator)``. The scorer runs in the precision of the weights, even if the training is
    in mixed precision; floating-point inputs are converted to it. In a distributed training, every process runs
    all batches, the values of the first one are used, and it writes the file. FSDP and DeepSpeed are not
    supported.

    Parameters
    ----------
    trainer : trainer to which the callback is added.
    make_scorer, parts : see `featnorm.callbacks.TrainingScorer`.

    Attributes
    ----------
    path : file that was written; None before the end of the training.

    Examples
    --------
    >>> trainer = transformers.Trainer(model)
    >>> ood = {"noise": [torch.randn(64, 3, 8, 8)]}
    >>> callback = OODCallback(trainer, lambda m: Scorer(m, NAN()), calibration=held_out_loader, ood=ood)
    >>> trainer.add_callback(callback)
    """

    def __init__(self, trainer: Any, make_scorer: Callable[[Any], Scorer], **parts: Any) -> None:
        super().__init__(make_scorer, **parts)
        self.trainer = trainer
        self._measured_at: int | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """Check that the scorer can be made."""
        self._measured_at = None
        self.check(of_trainer["model"])

    def on_evaluate(
        self, args: Any, state: Any, control: Any, metrics: dict[str, float], **of_trainer: Any
    ) -> None:
        """Measure, and log."""
        # In a training with several evaluation sets, once for all of them.
        if self.trainer.is_in_train and state.global_step == self._measured_at:
            return
        self._measured_at = state.global_step
        model = of_trainer["model"]
        with _full_precision(model):
            measured = self.measured(model)
        # Processes that choose the best checkpoint by different values would load different ones.
        [measured] = import_extra("accelerate").utils.broadcast_object_list([measured])
        values = {f"eval_ood_{name.replace('/', '_')}": value for name, value in measured.items()}
        metrics.update(values)
        self.trainer.log(values)

    def on_train_end(self, args: Any, state: Any, control: Any, **of_trainer: Any) -> None:
        """Fit and calibrate on the model, and write the scorer."""
        model = of_trainer["model"]
        with _full_precision(model):
            self.save(model, Path(args.output_dir) / "scorer.featnorm", write=state.is_world_process_zero)


@contextmanager
def _full_precision(model: Any) -> Iterator[None]:
    """Run a block without the mixed precision in which accelerate wraps the forward pass of a model."""
    original, wrapped = model.__dict__.get("_original_forward"), model.__dict__.get("forward")
    if original is not None:
        model.forward = original
    try:
        yield
    finally:
        if original is not None:
            model.forward = wrapped
