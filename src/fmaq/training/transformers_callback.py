"""The dual stage in transformers' Trainer: `Trainer(..., callbacks=[DualStageCallback(policy, share=0.8)])`."""

from __future__ import annotations

from typing import Any

from torch import nn

from fmaq.training.dual_stage import Staged

try:
    from transformers import TrainerCallback
except ImportError:
    raise ImportError("the callback needs the package transformers: pip install 'fmaq[trainers]'") from None


class DualStageCallback(Staged, TrainerCallback):
    """Trains the Trainer's model without underflow, then, from some step on, with it.

    The stage is that of the Trainer's global step, so a run that is resumed from one of its checkpoints is in the right
    one. Evaluation sees the stage in which it happens; afterwards the model stays attached to the policy itself. Rates
    are the Trainer's own business. Nothing is written: keep the policy beside the weights with `policy.save`.

    Args:
        policy: of the second stage, as `fmaq.attach` takes it.
        share, step, epoch: when the second stage begins; give one of them, see `Switch`.
        module: name of the submodule that is attached; by default the whole model.

    Raises:
        ValueError: not exactly one of share, step and epoch is given, or it is out of range.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the stage of the step that the run begins with."""
        self._begin(_unwrapped(kwargs["model"]))
        self._place(state.global_step, state.max_steps, state.epoch or 0.0)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the stage of the step that begins."""
        self._place(state.global_step, state.max_steps, state.epoch or 0.0)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Attach the policy itself, whatever stage the last step was in."""
        self._end()


def _unwrapped(model: nn.Module) -> nn.Module:
    from torch.nn.parallel import DistributedDataParallel

    return model.module if isinstance(model, DistributedDataParallel) else model
