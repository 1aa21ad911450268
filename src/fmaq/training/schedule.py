"""The schedule of a fine-tuning run: its stages, and what they share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class Switch:
    """When underflow is switched on, and with it the second stage begins; one of three.

    Args:
        share: of all steps that go by before, from 0 (at once) to 1 (never while training).
        step: number of steps that go by before; of the optimizer, not of batches whose gradients are accumulated.
        epoch: number of epochs that go by before; may be a fraction.

    Raises:
        ValueError: not exactly one is given, or it is out of range.
    """

    share: float | None = None
    step: int | None = None
    epoch: float | None = None

    def __post_init__(self) -> None:
        given = {name: value for name, value in vars(self).items() if value is not None}
        if len(given) != 1:
            raise ValueError(f"give one of share, step and epoch, got {', '.join(given) or 'none'}")
        ((name, value),) = given.items()
        if not 0 <= value <= (1 if name == "share" else math.inf):
            raise ValueError(f"{name} must be {'from 0 to 1' if name == 'share' else 'at least 0'}, got {value}")

    def is_on(self, step: int, steps: float, epochs: float) -> bool:
        """Whether the step runs with underflow before which `step` of all `steps`, `epochs` epochs, are done."""
        if self.step is not None:
            return step >= self.step
        if self.epoch is not None:
            return epochs >= self.epoch
        assert self.share is not None  # one of three is given
        if not math.isfinite(steps):
            raise ValueError("a share of the steps needs their number, and this run has no end: give step or epoch")
        return step >= self.share * steps


@dataclass(frozen=True)
class Stage:
    """Some epochs at one learning rate, with or without underflow.

    Args:
        epochs: passes over the training examples.
        learning_rate: at the first step.
        underflow: False keeps magnitudes below the accumulator's smallest, the first stage of arXiv 2401.14110.
        cosine: fall to `final_learning_rate` along half a cosine over the stage; otherwise the rate is constant.
        final_learning_rate: at the end of the cosine.
        underflow_from: share of the stage's steps that go by before underflow is switched on.
    """

    epochs: int
    learning_rate: float
    underflow: bool = True
    cosine: bool = True
    final_learning_rate: float = 0.0
    underflow_from: float = 0.0

    def __post_init__(self) -> None:
        if self.epochs < 0:
            raise ValueError(f"epochs must be at least 0, got {self.epochs}")
        if not self.learning_rate > 0:
            raise ValueError(f"learning_rate must be above 0, got {self.learning_rate}")
        if not 0 <= self.underflow_from <= 1:
            raise ValueError(f"underflow_from must be a share of the steps, from 0 to 1, got {self.underflow_from}")
        if self.underflow_from and not self.underflow:
            raise ValueError("underflow_from is for a stage with underflow; this one has underflow=False")

    def underflows(self, step: int, steps: int) -> bool:
        """Whether step `step` of the stage's `steps` runs with underflow."""
        return self.underflow and Switch(share=self.underflow_from).is_on(step, steps, epochs=0.0)

    def rate(self, step: int, steps: int) -> float:
        """The learning rate of step `step` of the stage's `steps`."""
        if not self.cosine:
            return self.learning_rate
        fall = 0.5 * (1 + math.cos(math.pi * step / steps))
        return self.final_learning_rate + (self.learning_rate - self.final_learning_rate) * fall


@dataclass(frozen=True)
class Schedule:
    """Stages in order, and what they share; see `Schedule.dual` for the paper's two.

    Args:
        stages: in order; each starts a fresh optimizer.
        batch_size: training examples that a process takes through the network at once.
        accumulation: batches of which the gradients are added up for a step of the optimizer: a step takes
            batch_size · accumulation · processes examples.
        optimizer: `"adamw"` or `"sgd"` (with `momentum`).
        weight_decay: of matrices and kernels only; biases and normalisation have none.
        clip_norm: largest norm of the gradient of all parameters; None does not clip.
        flip, crop: augmentation of images (N, C, H, W): mirror one in two; shift by up to `crop` pixels over zeros.
        checkpoint_seconds: time between checkpoints inside an epoch; every epoch's end makes one too.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 64
    accumulation: int = 1
    optimizer: Literal["adamw", "sgd"] = "adamw"
    weight_decay: float = 0.0
    momentum: float = 0.9
    clip_norm: float | None = None
    flip: bool = False
    crop: int = 0
    checkpoint_seconds: float = 60.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "stages", tuple(self.stages))
        if self.batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {self.batch_size}")
        if self.accumulation < 1:
            raise ValueError(f"accumulation must be at least 1, got {self.accumulation}")
        if self.optimizer not in ("adamw", "sgd"):
            raise ValueError(f'optimizer must be "adamw" or "sgd", got {self.optimizer!r}')

    @classmethod
    def dual(
        cls,
        epochs: tuple[int, int] = (5, 1),
        learning_rates: tuple[float, float] = (1e-3, 1e-4),
        **shared: Any,
    ) -> Schedule:
        """The paper's dual stages: first without underflow, then with it, each with a cosine (arXiv 2401.14110)."""
        first, second = (
            Stage(n, rate, underflow=underflow)
            for n, rate, underflow in zip(epochs, learning_rates, (False, True), strict=True)
        )
        return cls((first, second), **shared)

    def identity(self, processes: int = 1) -> dict[str, Any]:
        """What decides the run's result, as plain values: everything but the time between checkpoints.

        Args:
            processes: that train together; one, and no accumulation, are not mentioned.
        """
        values = asdict(self) | {"processes": processes}
        del values["checkpoint_seconds"]
        for name in ("accumulation", "processes"):
            if values[name] == 1:
                del values[name]
        return values | {"stages": list(values["stages"])}
