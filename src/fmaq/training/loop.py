"""Fine-tuning under a policy, stage by stage: by the paper's recipe first without underflow, then with it.

arXiv 2401.14110, section 3: while small sums are flushed to zero their gradients say nothing, so the first stage trains
without underflow, and a short second stage with it. Weights stay float32; the policy quantizes and sums as it is told.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fmaq.emulation import Policy, call_counts, restart_calls
from fmaq.training import checkpoint
from fmaq.training.dual_stage import DualStage
from fmaq.training.examples import Examples, Inputs, Windows, as_examples, to_device
from fmaq.training.files import write_bytes, write_json
from fmaq.training.interrupts import Flag, Interrupted, deferred_interrupts
from fmaq.training.processes import Processes, Trackers, parts_of, whole
from fmaq.training.progress import Bars
from fmaq.training.schedule import Schedule, Stage
from fmaq.training.tasks import Metrics, Task, evaluate, loss


@dataclass
class StageResult:
    """What a stage reached: `metrics` under the policy, `own_metrics` as the stage ran, perhaps without underflow."""

    stage: Stage
    loss: float | None
    metrics: Metrics
    own_metrics: Metrics


@dataclass
class FinetuneResult:
    """The stages' results, in order, and the seconds of training and evaluation that they took in all."""

    stages: list[StageResult] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def metrics(self) -> Metrics:
        """The last stage's, under the policy itself."""
        return self.stages[-1].metrics if self.stages else {}

    def to_mapping(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return asdict(self)


def finetune(
    model: nn.Module,
    policy: Policy,
    train: Any,
    test: Any,
    schedule: Schedule,
    *,
    output: str | Path | None = None,
    resume: bool = True,
    seed: int = 0,
    progress: bool | Bars = True,
    log: str | Path | None = None,
    task: Task = "classification",
    device: str = "cpu",
    batch_size: int = 128,
    say: Callable[[str], None] | None = None,
    trackers: Sequence[str] = (),
    shard: bool = False,
) -> FinetuneResult:
    """Train a model in place under a policy; it stays attached to the policy.

    In a program that torchrun or accelerate launch started in several processes, they train it together, each on its
    part of every step's examples; the main one writes, and all have to see its folder. `docs/distributed.md` says how.

    Args:
        model: its parameters that require gradients are trained. Seeds torch's, NumPy's and Python's global generators.
        policy: what to train for. A stage without underflow uses `policy.replace(underflow=False)`.
        train: `Examples` or `Windows`, a pair (inputs, classes) of tensors, or a torch data set of such pairs.
        test: the same (or what `task` takes), measured after every epoch; None measures nothing.
        schedule: stages and optimizer; `Schedule.dual()` is the paper's.
        output: folder for `checkpoint.safetensors`, `log.jsonl` and, in the end, `model.safetensors` and `result.json`.
        resume: go on from the folder's checkpoint, if any, to the bits of a run never stopped; False starts over.
        seed: of the order of the examples, of augmentation and of dropout.
        progress: draw bars when standard error is a terminal.
        log: file for the JSON lines (one a step, epoch and stage) in place of the folder's.
        task, batch_size: what `evaluate` measures, and how many examples at once.
        say: told one line after each epoch.
        trackers: `"tensorboard"`, `"wandb"`, which get every step's loss and rate and every epoch's metrics.
        shard: of several processes, each keeps a share of the model (FSDP), which stays so split; else all of it (DDP).

    Returns:
        Each stage's loss and metrics.

    Raises:
        CheckpointError: the folder's checkpoint is of another model, policy, schedule, data or seed.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written. A kind of KeyboardInterrupt.
        FloatingPointError: the loss is no longer finite.
        ValueError: accelerate or a tracker's package is missing, or a tracker is unknown.
    """
    train, test = as_examples(train), None if test is None else as_examples(test)
    if not isinstance(train, Examples | Windows):
        raise TypeError(f"finetune trains on Examples or Windows, not {type(train).__name__}")
    if len(train) == 0:
        raise ValueError("there are no training examples")
    processes = Processes(device)
    model.to(processes.device)
    run = _Run(model, policy, train, test, schedule, seed, task, processes, batch_size, say)
    try:
        run.open(None if output is None else Path(output), None if log is None else Path(log), resume, trackers)
        bars = progress if isinstance(progress, Bars) else Bars(progress)
        bars = bars if processes.is_main else Bars(False)
        with deferred_interrupts() as flag, bars:
            run.train_all(bars, flag, shard)
    finally:
        run.close()
    return run.result


def identity(
    model: nn.Module, policy: Policy, train: Examples | Windows, schedule: Schedule, seed: int, processes: int = 1
) -> dict[str, Any]:
    """What decides a run's result, as JSON: a checkpoint with another identity is of another run."""
    found = {
        "model": checkpoint.model_signature(model),
        "policy": policy.to_mapping(),
        "schedule": schedule.identity(processes),
        "data": f"{len(train)} training examples, {train.digest()}",
        "seed": seed,
    }
    mapping: dict[str, Any] = json.loads(json.dumps(found))
    return mapping


class _Run:
    """A run's place in its schedule, and all that a checkpoint keeps."""

    def __init__(
        self,
        model: nn.Module,
        policy: Policy,
        train: Examples | Windows,
        test: Any,
        schedule: Schedule,
        seed: int,
        task: Task,
        processes: Processes,
        batch_size: int,
        say: Callable[[str], None] | None,
    ) -> None:
        self.model, self.policy, self.train, self.test, self.schedule = model, policy, train, test, schedule
        self.seed, self.task, self.processes, self.batch_size = seed, task, processes, batch_size
        self.say = say if say is not None and processes.is_main else (lambda line: None)
        self.dual = DualStage(model, policy)
        self.wrapped = model
        self.counted = train.counted()
        self.stage = self.epoch = self.step = 0
        self.loss_sum = 0.0
        self.result = FinetuneResult()
        self.own_metrics: Metrics = {}
        self.mean_loss: float | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.restored: dict[str, Tensor] | None = None
        self.path: Path | None = None
        self.log: Any = None
        self.trackers: Trackers | None = None
        self.saved_at = time.monotonic()

    # Files

    def open(self, output: Path | None, log: Path | None, resume: bool, trackers: Sequence[str]) -> None:
        """Take up a checkpoint or start afresh, and open the log and the trackers."""
        self.output = output
        self.path = None if output is None else output / "checkpoint.safetensors"
        self.identity = identity(self.model, self.policy, self.train, self.schedule, self.seed, self.processes.count)
        offset = 0
        if self.path is not None and self.path.exists() and resume:
            offset = self._restore(self.path)
        else:
            own = self.seed + self.processes.rank * 0x9E3779B1 & 0xFFFFFFFF
            random.seed(own)
            np.random.seed(own)
            torch.manual_seed(own)
        log = output / "log.jsonl" if log is None and output is not None else log
        if log is not None and self.processes.is_main:
            log.parent.mkdir(parents=True, exist_ok=True)
            self.log = open(log, "ab")  # noqa: SIM115  (closed by `close`)
            self.log.truncate(min(offset, log.stat().st_size))
        if self.processes.is_main:
            config = {name: value if name == "seed" else json.dumps(value) for name, value in self.identity.items()}
            self.trackers = Trackers(trackers, output.name if output else "fmaq", output, config, self.steps_done)
        if offset:
            self._write_log("resume")
        else:
            self._write_log("start", **self.identity)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()
        if self.trackers is not None:
            self.trackers.close()

    def _write_log(self, event: str, **values: Any) -> None:
        if self.log is not None:
            place = {"event": event, "stage": self.stage, "epoch": self.epoch, "step": self.step}
            self.log.write(json.dumps(place | values, ensure_ascii=False).encode() + b"\n")
            self.log.flush()

    def _restore(self, path: Path) -> int:
        tensors, state = checkpoint.read(path)
        checkpoint.check_identity(path, state["identity"], self.identity)
        checkpoint.restore_model(self.model, tensors)
        checkpoint.restore_generators(tensors, state, self.processes.rank)
        self.stage, self.epoch, self.step = state["stage"], state["epoch"], state["step"]
        self.loss_sum = state["loss_sum"]
        stages = [StageResult(**(s | {"stage": Stage(**s["stage"])})) for s in state["result"]["stages"]]
        self.result = FinetuneResult(stages, state["result"]["seconds"])
        self.restored = tensors
        if state.get("underflow") is not None:  # attached so, after so many calls: both matter to stochastic rounding
            self.dual.attach(state["underflow"])
            restart_calls(self.model, state["calls"])
        if self.stage == len(self.schedule.stages):
            self.say(f"{path} holds the end of this run: nothing is left to train")
        else:
            self.say(f"resumed from {path}: stage {self.stage + 1}, epoch {self.epoch + 1}, step {self.step}")
        return int(state["log_bytes"])

    def _save(self) -> None:
        self.saved_at = time.monotonic()
        if self.path is None:
            return
        place = {"stage": self.stage, "epoch": self.epoch, "step": self.step, "loss_sum": self.loss_sum}
        state = place | {
            "identity": self.identity,
            "underflow": self.dual.underflow,
            "calls": call_counts(self.model),
            "result": self.result.to_mapping(),
            "log_bytes": self.log.tell() if self.log is not None else 0,
        }
        checkpoint.write(self.path, self.model, self.optimizer, state, self.processes)

    # Training

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.train) / self.examples_a_step)

    @property
    def steps_done(self) -> int:
        """Of all stages."""
        before = sum(stage.epochs for stage in self.schedule.stages[: self.stage])
        return (before + self.epoch) * self.steps_an_epoch + self.step

    @property
    def examples_a_step(self) -> int:
        return self.schedule.batch_size * self.schedule.accumulation * self.processes.count

    def train_all(self, bars: Bars, flag: Flag, shard: bool) -> None:
        start, before = time.monotonic(), self.result.seconds
        self.wrapped = self.processes.wrapped(self.model, shard)
        while self.stage < len(self.schedule.stages):
            stage = self.schedule.stages[self.stage]
            self._begin_stage()
            total = stage.epochs * self.steps_an_epoch
            done = self.epoch * self.steps_an_epoch + self.step
            self.dual.attach(stage.underflows(done, total))
            title = (
                f"Stage {self.stage + 1} of {len(self.schedule.stages)}{'' if stage.underflow else ', no underflow'}"
            )
            with bars.bar(title, total, done) as advance:
                while self.epoch < stage.epochs:
                    self._train_epoch(stage, bars, flag, advance)
            self._end_stage(stage, bars)
            self.result.seconds = before + time.monotonic() - start
            self._save()
        self.dual.attach(True)
        self._write_results()

    def _begin_stage(self) -> None:
        decayed = [p for p in self.model.parameters() if p.requires_grad and p.dim() > 1]
        plain = [p for p in self.model.parameters() if p.requires_grad and p.dim() <= 1]
        decay = self.schedule.weight_decay
        groups = [{"params": ps, "weight_decay": d} for ps, d in ((decayed, decay), (plain, 0.0)) if ps]
        rate = self.schedule.stages[self.stage].learning_rate
        if self.schedule.optimizer == "adamw":
            self.optimizer = torch.optim.AdamW(groups, lr=rate)
        else:
            self.optimizer = torch.optim.SGD(groups, lr=rate, momentum=self.schedule.momentum)
        if self.restored is not None:
            checkpoint.restore_optimizer(self.optimizer, self.restored)
            self.restored = None

    def _train_epoch(self, stage: Stage, bars: Bars, flag: Flag, advance: Callable[..., None]) -> None:
        order = torch.randperm(len(self.train), generator=self._generator())
        self.model.train()
        while self.step < self.steps_an_epoch:
            if self.processes.any(flag.raised):
                self._stop()
            size = self.examples_a_step
            value = self._train_step(stage, order[self.step * size : (self.step + 1) * size])
            advance(1, f"loss {value:.3f}")
            is_due = time.monotonic() - self.saved_at >= self.schedule.checkpoint_seconds
            if self.processes.any(is_due and self.processes.is_main):
                self._save()
        mean = self.loss_sum / len(self.train)
        self.own_metrics = self._measure(bars)
        self._write_log("epoch", loss=mean, metrics=self.own_metrics)
        self._track(**{f"test {name}": value for name, value in self.own_metrics.items()})
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.own_metrics.items() if name != "loss")
        self.say(f"stage {self.stage + 1}, epoch {self.epoch + 1} of {stage.epochs}: training loss {mean:.4f}, {shown}")
        self.mean_loss = mean
        self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
        if self.epoch < stage.epochs:
            self._save()
            if self.processes.any(flag.raised):
                self._stop()

    def _train_step(self, stage: Stage, index: Tensor) -> float:
        assert self.optimizer is not None
        steps = stage.epochs * self.steps_an_epoch
        done = self.epoch * self.steps_an_epoch + self.step
        self.dual.attach(stage.underflows(done, steps))
        rate = stage.rate(done, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad(set_to_none=True)
        number = self._gradient(index)
        if not math.isfinite(number):
            raise FloatingPointError(
                f"the loss became {number} in stage {self.stage + 1}, epoch {self.epoch + 1}, step {self.step}; "
                f"lower the stage's learning_rate (now {stage.learning_rate:g}) or set clip_norm"
            )
        if self.schedule.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip_norm)
        self.optimizer.step()
        self.loss_sum += number * len(index)
        self._write_log("step", loss=number, learning_rate=rate)
        self.step += 1
        self._track(loss=number, learning_rate=rate)
        return number

    def _gradient(self, index: Tensor) -> float:
        """Put the gradient of the mean loss of a step's examples into the parameters, and give that loss.

        Each process takes its own batches of them. What wraps the model takes the mean of the processes' gradients, so
        that each multiplies by their number.
        """
        count, accumulation = self.processes.count, self.schedule.accumulation
        parts = parts_of(self.counted[index], count * accumulation)[self.processes.rank * accumulation :][:accumulation]
        number = 0.0
        for n, (at, share) in enumerate(parts):
            if not share and count == 1 and len(parts) > 1:
                continue
            inputs, targets = self.train.batch(index[at])
            inputs = augment(inputs, self.schedule, self._generator(self.step + 1), at, len(index))
            more = n + 1 < len(parts)
            with self.processes.not_yet(self.wrapped) if more else nullcontext():
                inputs, targets = to_device(inputs, self.processes.device), targets.to(self.processes.device)
                value = loss(self.wrapped, self.train, inputs, targets)
                number += share * float(value.detach())
                (value * (share * count)).backward()
        return self.processes.sum(number)

    def _end_stage(self, stage: Stage, bars: Bars) -> None:
        own = self.own_metrics if stage.epochs else self._measure(bars)
        metrics = own
        if not self.dual.underflow:
            self.dual.attach(True)
            metrics = self._measure(bars)
        self.result.stages.append(StageResult(stage, self.mean_loss, metrics, own))
        self._write_log("stage", metrics=metrics)
        self.stage, self.epoch, self.step = self.stage + 1, 0, 0
        self.optimizer, self.mean_loss = None, None

    def _measure(self, bars: Bars) -> Metrics:
        if self.test is None:
            return {}
        found = evaluate(
            self.model,
            self.test,
            self.task,
            device=str(self.processes.device),
            batch_size=self.batch_size,
            progress=bars,
            label="  testing",
        )
        return self.processes.shared(found)

    def _track(self, **values: float) -> None:
        if self.trackers is not None:
            self.trackers.log(self.steps_done, **values)

    def _generator(self, step: int = 0) -> torch.Generator:
        """A generator for one epoch's order (step 0) or one step's augmentation: it depends on the place alone."""
        words = np.random.SeedSequence([self.seed, self.stage, self.epoch, step]).generate_state(2, np.uint32)
        return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))

    def _stop(self) -> None:
        self._save()
        how = (
            f"saved {self.path}: run the same again to go on from there"
            if self.path
            else "nothing was saved: give an output folder"
        )
        raise Interrupted(f"interrupted in stage {self.stage + 1}, epoch {self.epoch + 1}, step {self.step}; {how}")

    def _write_results(self) -> None:
        if self.output is None:
            return
        state = self.model.state_dict()
        tensors = {name: whole(t.detach()).cpu().contiguous().clone() for name, t in state.items()}
        if self.processes.is_main:
            write_bytes(self.output / "model.safetensors", save(tensors))
            write_json(self.output / "result.json", self.identity | self.result.to_mapping())
        self.processes.wait()


def augment(
    inputs: Inputs, schedule: Schedule, generator: torch.Generator, at: Tensor | None = None, of: int | None = None
) -> Inputs:
    """Mirror and shift images (N, C, H, W) as the schedule says; other inputs come back as they are.

    Args:
        at: positions of these images among the `of` that are drawn for; by default they are all.
    """
    if not isinstance(inputs, Tensor) or not (schedule.flip or schedule.crop):
        return inputs
    if inputs.dim() != 4:
        raise ValueError(f"augmentation is for images (N, C, H, W); the inputs have shape {tuple(inputs.shape)}")
    n, _, height, width = inputs.shape
    at, of = (torch.arange(n), n) if at is None or of is None else (at, of)
    if schedule.flip:
        mirrored = torch.rand(of, generator=generator)[at] < 0.5
        inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
    if schedule.crop:
        padded = nn.functional.pad(inputs, [schedule.crop] * 4)
        top, left = torch.randint(0, 2 * schedule.crop + 1, (2, of), generator=generator)[:, at]
        rows = (top[:, None] + torch.arange(height))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, None, :]
        image, channel = torch.arange(n)[:, None, None, None], torch.arange(inputs.shape[1])[None, :, None, None]
        inputs = padded[image, channel, rows, columns]
    return inputs
