"""The dual stage in Lightning's Trainer: `Trainer(..., callbacks=[DualStageCallback(policy, share=0.8)])`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fmaq.training.dual_stage import Staged

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    raise ImportError("the callback needs the package lightning: pip install 'fmaq[trainers]'") from None


class DualStageCallback(Staged, Callback):
    """Trains the Trainer's module without underflow, then, from some step on, with it.

    The stage is that of the Trainer's global step, so a run that is resumed from a checkpoint is in the right one.
    Validation sees the stage in which it happens; afterwards, and in `Trainer.test`, `validate` and `predict`, the
    module is attached to the policy itself. Rates are the module's own business.

    Products are emulated where submodules are called, as `training_step` does; those that it computes itself belong
    inside `with fmaq.emulating(self):`.

    Args:
        policy: of the second stage, as `fmaq.attach` takes it.
        share, step, epoch: when the second stage begins; give one of them, see `Switch`.
        module: name of the submodule that is attached (the policy's names are relative to it); by default the whole.

    Raises:
        ValueError: not exactly one of share, step and epoch is given, or it is out of range; in training, a share of an
            endless run.
    """

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Attach the module, before strategies wrap it."""
        self._begin(pl_module).attach(underflow=stage != "fit")

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach the stage of the step that the run begins with."""
        self._place_at(trainer, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Attach the stage of the step that begins."""
        self._place_at(trainer, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach the policy itself, whatever stage the last step was in."""
        self._end()

    def _place_at(self, trainer: Any, batch: int) -> None:
        epochs = trainer.current_epoch + batch / max(trainer.num_training_batches, 1)
        self._place(trainer.global_step, trainer.estimated_stepping_batches, epochs)
