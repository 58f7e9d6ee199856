"""A callback for Lightning: AUROC and drift while a model is trained, and a scorer beside its checkpoint.

It is a callback of ``lightning.pytorch`` or of ``pytorch_lightning``, whichever is imported before this module.
"""

import copy
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from featnorm._utils.extras import import_extra
from featnorm.callbacks import TrainingScorer, warn_of

__all__ = ["OODCallback"]

_BASES = [
    sys.modules[name].Callback for name in ("lightning.pytorch", "pytorch_lightning") if name in sys.modules
] or [import_extra("lightning.pytorch").Callback]


class OODCallback(TrainingScorer, *_BASES):  # type: ignore[misc]
    """Callback of a Lightning ``Trainer`` that measures OOD detection at each validation, and writes a scorer.

    At the end of each validation epoch, except in the sanity check, the callback fits and calibrates a scorer of
    the module as it is. It logs the results through the module, so that every logger gets them:

    - ``ood/NAME/auroc``, ``ood/NAME/fpr95`` and ``ood/NAME/flagged``, the share flagged, for each OOD set NAME;
      for several sets, their means too, ``ood/mean/auroc`` and so on,
    - with ``drift``, ``ood/drift/log10_evidence``, the highest of a `featnorm.DriftMonitor`, ``ood/drift/alarm``,
      0 or 1, and ``ood/drift/flagged``.

    ``ModelCheckpoint`` and ``EarlyStopping`` can monitor these names.

    At the end of the training, the callback writes a scorer of the best checkpoint beside it, under its name with
    the suffix ".featnorm"; without checkpoints, a scorer of the last weights to ``scorer.featnorm`` in the
    trainer's ``default_root_dir``. To open the file, pass `featnorm.load` a model with these weights. With
    ``fast_dev_run``, nothing is written.

    Loaders yield batches as the module's ``forward`` takes them, with or without labels; floating-point inputs are
    converted to the precision of the weights, such as that of ``precision="bf16-true"``. In a distributed
    training, every process runs all batches, the means over the processes are logged, and the first process writes
    the file. Strategies that shard the model are not supported. List this callback before ``WeightAveraging``,
    which takes the averaged weights out again when the validation ends; listed after it, this callback measures
    the plain ones.

    Parameters
    ----------
    make_scorer, calibration, ood, train, drift, tpr : see `featnorm.callbacks.TrainingScorer`.

    Attributes
    ----------
    path : file that was written; None before the end of the training.

    Examples
    --------
    >>> ood = {"noise": [torch.randn(64, 3, 8, 8)]}
    >>> callback = OODCallback(lambda module: Scorer(module, NAN()), calibration=held_out_loader, ood=ood)
    >>> trainer = lightning.pytorch.Trainer(callbacks=[callback], logger=False, enable_checkpointing=False)
    """

    _restored: tuple[str, int] | None = None

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Check that the scorer can be made, and that its file can be written."""
        self._restored = _best(trainer) if trainer.ckpt_path else None
        self.check(pl_module)
        folder = str(getattr(trainer.checkpoint_callback, "dirpath", None) or trainer.default_root_dir)
        if "://" in folder:
            raise ValueError(f"scorers are written beside checkpoints in local folders, and these are in {folder}")

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        """Measure, and log."""
        if not trainer.sanity_checking:
            values = {f"ood/{name}": value for name, value in self.measured(pl_module).items()}
            pl_module.log_dict(values, sync_dist=True)

    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        """Fit and calibrate on the weights of the best checkpoint, and write the scorer.

        Before, in ``on_train_end``, other callbacks may still change the weights and write checkpoints.
        """
        if trainer.fast_dev_run:
            return
        best = _best(trainer)
        path = (
            Path(best[0]).with_suffix(".featnorm") if best else Path(trainer.default_root_dir, "scorer.featnorm")
        )
        # The trainer has moved the module to the CPU.
        pl_module.to(trainer.strategy.root_device)
        # A checkpoint that this training wrote may hold hyperparameters of any type, and is as safe to load as the
        # code that wrote it. The state of a resumed run may name any file as its best checkpoint.
        weights = _weights_of(best[0], pl_module, trusted=best != self._restored) if best else nullcontext()
        try:
            with weights:
                self.save(pl_module, path, write=trainer.is_global_zero)
        except UnpicklingError as error:
            warn_of(f"{path.name} is not written, because the run that was resumed wrote its checkpoint", error)
        pl_module.cpu()


def _best(trainer: Any) -> tuple[str, int] | None:
    """Return the best checkpoint of a trainer and its time of change; None if there is none."""
    path = getattr(trainer.checkpoint_callback, "best_model_path", "")
    # A resumed run may name one that was moved.
    return (path, Path(path).stat().st_mtime_ns) if Path(path).is_file() else None


@contextmanager
def _weights_of(checkpoint: str, module: Any, *, trusted: bool) -> Iterator[None]:
    """Run a block with the weights of a checkpoint in the module."""
    loaded = torch.load(checkpoint, map_location="cpu", weights_only=not trusted)
    before = copy.deepcopy(module.state_dict())
    try:
        module.load_state_dict(loaded["state_dict"], strict=module.strict_loading)
        yield
    finally:
        module.load_state_dict(before, strict=module.strict_loading)
