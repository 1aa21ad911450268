"""The trainings of an experiment: all from the same start, resumable, each with a folder that keeps its result."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn

from fmaq.emulation import Policy
from fmaq.recipes.callables import load_callable
from fmaq.recipes.data import load_data
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.models import build_model
from fmaq.recipes.recipe import CalibrateRecipe
from fmaq.recipes.run import calibrated, check_globs
from fmaq.recipes.values import load_policy
from fmaq.reproduce.experiment import Cell, Pretrain, TrainingExperiment
from fmaq.reproduce.results import CellResult, folder_name
from fmaq.training.examples import digest
from fmaq.training.loop import finetune
from fmaq.training.progress import Bars
from fmaq.training.schedule import Schedule
from fmaq.training.tasks import TASKS, Task

Say = Callable[[str], None]
HEAVY = ("checkpoint.safetensors", "model.safetensors", "result.json")
"""What a cell's folder need not keep once its result is written."""


class Trainings:
    """Runs the cells of one experiment; the data are loaded once.

    Args:
        folder: gets `cells/` and `pretrained/`.
        say: told when something long but the cells themselves starts.

    Raises:
        RecipeError: the data have no training examples, or the policy names layers that the model lacks.
    """

    def __init__(self, experiment: TrainingExperiment, folder: Path, bars: Bars, say: Say) -> None:
        self.experiment, self.folder, self.bars, self.say = experiment, folder, bars, say
        self.policy = load_policy(experiment.policy)
        model, tokenizer = build_model(experiment.model, experiment.task)
        check_globs(self.policy, model)
        self.train, self.test = load_data(experiment.data, experiment.task, tokenizer)
        self.before = self.train
        if experiment.pretrain is not None and experiment.pretrain.data is not None:
            self.before, _ = load_data(experiment.pretrain.data, experiment.task, tokenizer)
        if self.train is None or self.before is None:
            raise RecipeError(f"{experiment.name} has no training examples; give data.train")
        self.task: Task = experiment.task if experiment.task in TASKS else load_callable(experiment.task)
        self.digests = [self.train.digest(), self.test.digest() if hasattr(self.test, "digest") else ""]

    def run(self, cell: Cell, commit: str | None) -> tuple[CellResult, bool]:
        """The result of a cell, and whether its folder had it already; a stopped training goes on where it was.

        Args:
            commit: that a new result names as its own.

        Raises:
            Interrupted: a signal came; the same call goes on from the checkpoint.
        """
        policy = self.policy.replace(accumulator=cell.accumulator, estimator=cell.estimator)
        plan = self.experiment.schedules[cell.variant]
        schedule = plan.schedule()
        before = self.experiment.pretrain
        first = cell.seed if before is None or before.seed is None else before.seed
        model, start = self._start(first)
        folder = (
            self.folder / "cells" / folder_name(cell.label, self._identity(start, policy, schedule, plan.calibrate))
        )
        if (kept := CellResult.kept(folder)) is not None:
            return kept, True
        self._pretrain(model, first, start)
        policy = calibrated(model, policy, self.train, self.experiment.data.batch_size, plan.calibrate)
        result = CellResult(cell, {}, commit=commit)
        try:
            found = self._finetune(model, policy, schedule, cell.seed, folder)
            result.metrics, result.seconds = found.metrics, found.seconds
            result.stages = found.to_mapping()["stages"]
        except FloatingPointError as error:
            result.failure = str(error)
        result.save(folder)
        for name in HEAVY:
            (folder / name).unlink(missing_ok=True)
        return result, False

    def _start(self, seed: int) -> tuple[nn.Module, str]:
        """A seed's model, as it is built, and a hash of its weights."""
        torch.manual_seed(seed)
        model, _ = build_model(self.experiment.model, self.experiment.task)
        return model, digest(model.state_dict())

    def _identity(
        self, start: str, policy: Policy, schedule: Schedule, plan: CalibrateRecipe | None = None
    ) -> dict[str, Any]:
        """All that decides a training's result, but the code."""
        before = self.experiment.pretrain
        chosen = {} if plan is None else {"calibrate": plan.model_dump()}
        return chosen | {
            "start": start,
            "pretrain": None if before is None else before.schedule().identity() | self._apart(before),
            "task": self.experiment.task,
            "data": self.digests,
            "policy": policy.to_mapping(),
            "schedule": schedule.identity(),
        }

    def _apart(self, before: Pretrain) -> dict[str, Any]:
        """What a pretraining of its own seed or data has beside its schedule."""
        given = {} if before.seed is None else {"seed": before.seed}
        return given if before.data is None else given | {"data": self.before.digest()}

    def _pretrain(self, model: nn.Module, seed: int, start: str) -> None:
        """Bring the model to where the cells of its seed start, training it in float32 unless that has been done."""
        if self.experiment.pretrain is None:
            return
        schedule = self.experiment.pretrain.schedule()
        name = folder_name(f"seed {seed}", self._identity(start, Policy(), schedule))
        folder = self.folder / "pretrained" / name
        if not (folder / "result.json").exists():
            self.say(f"pretraining in float32, seed {seed}")
            found = self._finetune(model, Policy(), schedule, seed, folder, self.before)
            self.say(f"pretrained: {', '.join(f'{name} {value:.4f}' for name, value in found.metrics.items())}")
            (folder / "checkpoint.safetensors").unlink()
        model.load_state_dict(load_file(folder / "model.safetensors"))

    def _finetune(
        self, model: nn.Module, policy: Policy, schedule: Schedule, seed: int, folder: Path, train: Any = None
    ) -> Any:
        return finetune(
            model,
            policy,
            self.train if train is None else train,
            self.test,
            schedule,
            output=folder,
            seed=seed,
            progress=self.bars,
            task=self.task,
            batch_size=self.experiment.data.batch_size,
        )
