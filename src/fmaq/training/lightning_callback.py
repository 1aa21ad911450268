"""The dual stage in Lightning's Trainer: `Trainer(..., callbacks=[DualStageCallback(policy, share=0.8)])`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fmaq.emulation import Policy
from fmaq.ops.operands import AccumulatorLike
from fmaq.training.dual_stage import DualStage
from fmaq.training.schedule import Switch

try:
    from lightning.pytorch.callbacks import Callback
except ImportError:
    raise ImportError("the callback needs the package lightning: pip install 'fmaq[trainers]'") from None


class DualStageCallback(Callback):
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

    def __init__(
        self,
        policy: Policy | AccumulatorLike,
        *,
        share: float | None = None,
        step: int | None = None,
        epoch: float | None = None,
        module: str = "",
    ) -> None:
        self._policy, self._switch, self._module = Policy.parse(policy), Switch(share, step, epoch), module
        self._stage: DualStage | None = None

    def setup(self, trainer: Any, pl_module: nn.Module, stage: str) -> None:
        """Attach the module, before strategies wrap it."""
        module = pl_module.get_submodule(self._module)
        self._stage = DualStage(module, self._policy, self._switch)
        if stage == "fit":
            self._stage.attach(False)
        else:
            self._stage.attach(True)

    def on_train_start(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach the stage of the step that the run begins with."""
        self._place(trainer, 0)

    def on_train_batch_start(self, trainer: Any, pl_module: nn.Module, batch: Any, batch_idx: int) -> None:
        """Attach the stage of the step that begins."""
        self._place(trainer, batch_idx)

    def on_train_end(self, trainer: Any, pl_module: nn.Module) -> None:
        """Attach the policy itself, whatever stage the last step was in."""
        if self._stage is not None:
            self._stage.attach(True)

    def _place(self, trainer: Any, batch: int) -> None:
        if self._stage is not None:
            epochs = trainer.current_epoch + batch / max(trainer.num_training_batches, 1)
            self._stage.place(trainer.global_step, trainer.estimated_stepping_batches, epochs)
