"""Runs of a recipe: evaluate a list of accumulators as they are, or fine-tune under one."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fmaq.analysis.calibration import calibrate
from fmaq.emulation import Policy, attach, detach
from fmaq.emulation.layer_names import layer_names
from fmaq.recipes.callables import load_callable
from fmaq.recipes.data import load_data
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.models import build_model
from fmaq.recipes.policies import (
    accumulators_of,
    all_policies,
    emulates,
    is_template,
    one_policy,
    operands_of,
    quantizes,
)
from fmaq.recipes.provenance import provenance
from fmaq.recipes.recipe import CalibrateRecipe, Recipe
from fmaq.recipes.record import Record, Row, show
from fmaq.training import checkpoint
from fmaq.training.checkpoint import CheckpointError
from fmaq.training.examples import Examples, Pairs, Windows, as_examples, digest
from fmaq.training.loop import finetune, identity
from fmaq.training.processes import Processes
from fmaq.training.progress import Bars
from fmaq.training.tasks import TASKS, Metrics, Task, evaluate

Say = Callable[[str], None]
RECORD, POLICY, STATE = "finetune.json", "policy.yaml", "checkpoint.safetensors"
"""What fine-tuning keeps in its folder."""


@dataclass
class Prepared:
    """A recipe's model, data and task, made and checked, and the policy of commands that take one."""

    recipe: Recipe
    model: nn.Module
    train: Any
    test: Any
    policy: Policy
    task: Task
    device: str
    bars: Bars

    def measure(self, policy: Policy | None) -> tuple[Metrics, float]:
        """The metrics under a policy (None: torch alone) and the seconds that measuring took."""
        detach(self.model)
        if policy is not None:
            attach(self.model, policy)
        start = time.monotonic()
        size = self.recipe.data.batch_size
        metrics = evaluate(self.model, self.test, self.task, device=self.device, batch_size=size, progress=self.bars)
        return metrics, time.monotonic() - start

    def record(self, kind: str) -> Record:
        """A fresh record, with the float32 baseline measured."""
        metrics, seconds = self.measure(None)
        baseline = Row("float32", "fp32", metrics, seconds)
        recipe = self.recipe.model_dump(mode="json", exclude_defaults=True)
        return Record(kind, self.recipe.name, self.recipe.task, self.recipe.seed, baseline, [], provenance(), recipe)


def _check_device(device: str) -> None:
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"torch cannot use the device {device!r} here: {str(error).splitlines()[0]}") from None


def prepare(recipe: Recipe, device: str = "cpu", bars: Bars | None = None) -> Prepared:
    """Build the model, load the data, and check that the policy's globs name layers of the model.

    Raises:
        RecipeError: something is not as the recipe says.
        ValueError: torch has no such device here.
    """
    _check_device(device)
    torch.manual_seed(recipe.seed)
    model, tokenizer = build_model(recipe.model, recipe.task)
    check_globs(recipe.load_policy(), model)
    train, test = load_data(recipe.data, recipe.task, tokenizer)
    task = recipe.task if recipe.task in TASKS else load_callable(recipe.task)
    return Prepared(recipe, model.to(device), train, test, one_policy(recipe), task, device, bars or Bars(False))


def check_globs(policy: Policy, model: nn.Module) -> None:
    """Refuse a policy whose `layers` name nothing in the model.

    Raises:
        RecipeError: naming the glob and some of the model's modules.
    """
    names = [name for names in layer_names(model).values() for name in names]
    for glob in policy.layers:
        if not any(glob == name or fnmatchcase(name, glob) for name in names):
            some = ", ".join(name for name, module in model.named_modules() if name and not list(module.children()))[
                :200
            ]
            raise RecipeError(f"policy.layers: {glob!r} matches no module of {type(model).__name__}; it has {some} ...")


def run_evaluate(
    recipe: Recipe, output: Path, device: str = "cpu", bars: Bars | None = None, say: Say = print
) -> Record:
    """Measure the model in float32 and under each of the recipe's policies; the record is saved after each.

    Args:
        output: folder for `evaluate.json` and `evaluate.csv`.
        say: told one line a measurement.
    """
    policies = all_policies(recipe)
    for policy in policies:
        if is_template(policy):
            lacking = next(accumulator for accumulator in accumulators_of(policy) if accumulator.is_template)
            raise RecipeError(
                f"the accumulator {str(lacking)!r} lacks a bias; give it, like M7E4b10, or let `fmaq calibrate` choose "
                f"it"
            )
    ready = prepare(recipe, device, bars)
    with ready.bars:
        record = ready.record("evaluate")
        say(line(record, record.baseline))
        for policy in policies:
            metrics, seconds = ready.measure(policy)
            record.rows.append(Row(operands_of(policy), str(policy.accumulator), metrics, seconds))
            say(line(record, record.rows[-1]))
            record.save(output / "evaluate.json")
            record.save_csv(output / "evaluate.csv")
    detach(ready.model)
    return record


def run_finetune(
    recipe: Recipe,
    output: Path,
    device: str = "cpu",
    bars: Bars | None = None,
    say: Say = print,
    resume: bool = True,
) -> Record:
    """Fine-tune the model under the recipe's policy, from the folder's checkpoint if there is one.

    Of several processes that a launcher started, all train, and the main one writes and says.

    Args:
        output: folder for the checkpoint, the log, the model, its policy, `finetune.json` and `finetune.csv`.
        resume: False starts over.
    Raises:
        RecipeError: the recipe has no `finetune`, or its data no training examples.
    """
    if recipe.finetune is None:
        raise RecipeError("this recipe cannot be fine-tuned: give it the key finetune, with its stages")
    _check_device(device)
    processes = Processes(device)
    if not processes.is_main:
        bars, say = None, _silent
    ready = prepare(recipe, str(processes.device), bars)
    if ready.train is None:
        raise RecipeError("this recipe cannot be fine-tuned: its data have no training examples; give data.train")
    asked = ready.policy
    ready.policy = processes.shared(_start(ready, output, resume, say))
    with ready.bars:
        record = _before(ready, asked, output, resume, processes.count)
        processes.wait()  # until all have read what the main one now writes over
        row = record.rows[0]
        for shown in (record.baseline, row):
            say(line(record, shown))
        if processes.is_main:
            _keep_policy(ready.policy, output / POLICY)
            record.save(output / RECORD)
        detach(ready.model)
        result = finetune(
            ready.model,
            ready.policy,
            ready.train,
            ready.test,
            recipe.finetune.schedule(),
            output=output,
            resume=resume,
            seed=recipe.seed,
            progress=ready.bars,
            task=ready.task,
            device=device,
            batch_size=recipe.data.batch_size,
            say=say,
            trackers=recipe.finetune.trackers,
            shard=recipe.finetune.shard,
        )
    row.tuned = result.to_mapping()
    if processes.is_main:
        record.save(output / RECORD)
        record.save_csv(output / "finetune.csv")
    return record


def _silent(line: str) -> None:
    pass


def batches_of(data: Any, size: int, count: int) -> list[Any]:
    """The inputs of the first batches of examples, windows or pairs."""
    data = as_examples(data)
    if isinstance(data, Mapping):  # of a task of its own: the pairs among what it takes
        data = next((value for value in data.values() if isinstance(value, Pairs)), data)
    if not isinstance(data, Examples | Windows | Pairs):
        raise RecipeError(f"examples, windows or pairs are needed, and the data are {type(data).__name__}")
    slices = [slice(i * size, (i + 1) * size) for i in range(count) if i * size < len(data)]
    if isinstance(data, Pairs):
        return [{name: tensor[part] for name, tensor in data.inputs.items()} for part in slices]
    return [data.batch(part)[0] for part in slices]


def calibrated(model: nn.Module, policy: Policy, train: Any, size: int, plan: CalibrateRecipe | None) -> Policy:
    """The policy with what a recipe's `finetune.calibrate` chooses; as it is, without that or with nothing to choose.

    Args:
        size: examples in a batch.
    """
    if plan is None or not (emulates(policy) or quantizes(policy)):
        return policy
    detach(model)
    model.eval()
    return calibrate(model, policy, batches_of(train, size, plan.batches), **plan.how())


def _keep_policy(policy: Policy, path: Path) -> None:
    """Write the policy, for measuring the model under it later; one that says nothing needs no file."""
    if policy == Policy():
        path.unlink(missing_ok=True)
    else:
        policy.save(path)


def _start(ready: Prepared, output: Path, resume: bool, say: Say) -> Policy:
    """The policy to train under, calibrated where the recipe says so; the folder's, where this same run chose one."""
    assert ready.recipe.finetune is not None  # run_finetune has seen to it
    plan, kept = ready.recipe.finetune.calibrate, output / POLICY
    if plan is None:
        return ready.policy
    if resume and (output / STATE).exists() and kept.exists() and _is_of(ready.recipe, Record.load(output / RECORD)):
        return Policy.load(kept)
    start = time.monotonic()
    found = calibrated(ready.model, ready.policy, ready.train, ready.recipe.data.batch_size, plan)
    say(f"calibrated per {plan.per} in {time.monotonic() - start:.1f} s: {kept}")
    return found


def _is_of(recipe: Recipe, record: Record) -> bool:
    return record.recipe == recipe.model_dump(mode="json", exclude_defaults=True)


def _before(ready: Prepared, asked: Policy, output: Path, resume: bool, processes: int) -> Record:
    """The measurements before fine-tuning; taken from the folder if this same run made them already.

    Args:
        asked: the policy before calibration.
    """
    path, state = output / RECORD, output / STATE
    digests = _digests(ready)
    if resume and path.exists() and state.exists():
        _refuse_another_run(ready, state, processes)  # before the record, which is that run's, is written over
        record = Record.load(path)
        for what, found in record.provenance.get("digests", {}).items():
            if found != digests.get(what):
                raise CheckpointError(
                    f"{state} is the checkpoint of a run that began with other {what}. Choose another output "
                    f"folder, or start over with resume=False (--fresh), which overwrites it"
                )
        if _is_of(ready.recipe, record):
            record.rows[0].tuned = None
            return record
    record = ready.record("finetune")
    record.provenance["digests"] = digests
    metrics, seconds = ready.measure(ready.policy)
    plan = ready.recipe.finetune.calibrate if ready.recipe.finetune and ready.policy != asked else None
    chosen, file = (f"per {plan.per}", POLICY) if plan else (None, None)
    record.rows.append(Row(operands_of(asked), str(asked.accumulator), metrics, seconds, chosen=chosen, policy=file))
    return record


def _refuse_another_run(ready: Prepared, path: Path, processes: int) -> None:
    assert ready.recipe.finetune is not None and ready.train is not None  # run_finetune has seen to it
    schedule, train = ready.recipe.finetune.schedule(), as_examples(ready.train)
    ours = identity(ready.model, ready.policy, train, schedule, ready.recipe.seed, processes)
    checkpoint.check_identity(path, checkpoint.read(path)[1]["identity"], ours)


def _digests(ready: Prepared) -> dict[str, str]:
    """Of what a checkpoint does not know: the weights that training starts from, and the test examples."""
    found = {"weights": digest(ready.model.state_dict())}
    test = as_examples(ready.test)
    return found | ({"test examples": test.digest()} if isinstance(test, Examples | Windows | Pairs) else {})


def line(record: Record, row: Row) -> str:
    """A row as one line of text."""
    value = show(record.metric, row.metrics[record.metric])
    chosen = f"{row.chosen}: " if row.chosen else ""
    return f"{row.operands:>8}  {row.accumulator:<42} {chosen}{record.metric} {value}  {row.seconds:.1f} s"
