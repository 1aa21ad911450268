"""The two stages of arXiv 2401.14110 on a model, for any loop: first its policy without underflow, then the policy.

What a stage is, is said here alone; when the second begins, by `Switch`. A loop of one's own calls `place` before each
step, as the callbacks for transformers and Lightning do; calling again changes nothing. So the stage is what the step
says, however often a run was stopped and resumed.
"""

from __future__ import annotations

from torch import nn

from fmaq.emulation import Policy, attach, detach
from fmaq.ops.operands import AccumulatorLike
from fmaq.training.schedule import Switch


class DualStage:
    """A model, attached to a policy with or without underflow.

    Args:
        model: it is not attached before the first `attach` or `place`; others' wrappers (DDP, FSDP) may come around it.
        policy: of the second stage.
        switch: when that begins, for `place`.

    Attributes:
        underflow: of the present stage; None before the first.
    """

    def __init__(self, model: nn.Module, policy: Policy, switch: Switch | None = None) -> None:
        self.model, self.policy, self._switch = model, policy, switch
        self.underflow: bool | None = None

    def attach(self, underflow: bool) -> None:
        """Attach the policy, with or without underflow, unless it is attached so already."""
        if self.underflow != underflow:
            detach(self.model)
            attach(self.model, self.policy if underflow else self.policy.replace(underflow=False))
            self.underflow = underflow

    def place(self, step: int, steps: float, epochs: float) -> None:
        """Attach the stage of a step: `step` steps of all `steps` and `epochs` epochs are done."""
        self.attach((self._switch or Switch(share=0.0)).is_on(step, steps, epochs))


class Staged:
    """What the callbacks for others' trainers share: a submodule's stages, from what the trainer says of its steps.

    Args:
        policy: of the second stage, as `fmaq.attach` takes it.
        share, step, epoch: when the second stage begins; give one of them, see `Switch`.
        module: name of the submodule that is attached (the policy's names are relative to it); by default the whole.
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

    def _begin(self, model: nn.Module) -> DualStage:
        self._stage = DualStage(model.get_submodule(self._module), self._policy, self._switch)
        return self._stage

    def _place(self, step: int, steps: float, epochs: float) -> None:
        if self._stage is not None:
            self._stage.place(step, steps, epochs)

    def _end(self) -> None:
        """Attach the policy itself, whatever stage the last step was in."""
        if self._stage is not None:
            self._stage.attach(True)
