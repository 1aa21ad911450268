"""The schedule of a fine-tuning run: its stages, and what they share."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any, Literal


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
        return self.underflow and step >= self.underflow_from * steps

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
        batch_size: training examples a step.
        optimizer: `"adamw"` or `"sgd"` (with `momentum`).
        weight_decay: of matrices and kernels only; biases and normalisation have none.
        clip_norm: largest norm of the gradient of all parameters; None does not clip.
        flip, crop: augmentation of images (N, C, H, W): mirror one in two; shift by up to `crop` pixels over zeros.
        checkpoint_seconds: time between checkpoints inside an epoch; every epoch's end makes one too.
    """

    stages: tuple[Stage, ...]
    batch_size: int = 64
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

    def identity(self) -> dict[str, Any]:
        """What decides the run's result, as plain values: everything but the time between checkpoints."""
        values = asdict(self)
        del values["checkpoint_seconds"]
        return values | {"stages": list(values["stages"])}
