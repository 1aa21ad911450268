"""Fine-tuning under a policy, stage by stage: by the paper's recipe first without underflow, then with it.

arXiv 2401.14110, section 3: while small sums are flushed to zero their gradients say nothing, so the first stage trains
without underflow, and a short second stage with it. Weights stay float32; the policy quantizes and sums as it is told.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from fmaq.emulation import Policy, attach, call_counts, detach, restart_calls
from fmaq.training import checkpoint
from fmaq.training.examples import Examples, Inputs, Windows, as_examples, to_device
from fmaq.training.files import write_bytes, write_json
from fmaq.training.interrupts import Flag, Interrupted, deferred_interrupts
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
) -> FinetuneResult:
    """Train a model in place under a policy; it stays attached to the policy.

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

    Returns:
        Each stage's loss and metrics.

    Raises:
        CheckpointError: the folder's checkpoint is of another model, policy, schedule, data or seed.
        Interrupted: Ctrl-C or SIGTERM came; a checkpoint was written. A kind of KeyboardInterrupt.
        FloatingPointError: the loss is no longer finite.
    """
    train, test = as_examples(train), None if test is None else as_examples(test)
    if not isinstance(train, Examples | Windows):
        raise TypeError(f"finetune trains on Examples or Windows, not {type(train).__name__}")
    if len(train) == 0:
        raise ValueError("there are no training examples")
    run = _Run(model.to(device), policy, train, test, schedule, seed, task, device, batch_size, say)
    run.open(None if output is None else Path(output), None if log is None else Path(log), resume)
    bars = progress if isinstance(progress, Bars) else Bars(progress)
    try:
        with deferred_interrupts() as flag, bars:
            run.train_all(bars, flag)
    finally:
        run.close()
    return run.result


def identity(
    model: nn.Module, policy: Policy, train: Examples | Windows, schedule: Schedule, seed: int
) -> dict[str, Any]:
    """What decides a run's result, as JSON: a checkpoint with another identity is of another run."""
    found = {
        "model": checkpoint.model_signature(model),
        "policy": policy.to_mapping(),
        "schedule": schedule.identity(),
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
        device: str,
        batch_size: int,
        say: Callable[[str], None] | None,
    ) -> None:
        self.model, self.policy, self.train, self.test, self.schedule = model, policy, train, test, schedule
        self.seed, self.task, self.device, self.batch_size = seed, task, device, batch_size
        self.say = say or (lambda line: None)
        self.stage = self.epoch = self.step = 0
        self.loss_sum = 0.0
        self.result = FinetuneResult()
        self.own_metrics: Metrics = {}
        self.mean_loss: float | None = None
        self.optimizer: torch.optim.Optimizer | None = None
        self.restored: dict[str, Tensor] | None = None
        self.path: Path | None = None
        self.log: Any = None
        self.saved_at = time.monotonic()
        self.underflow: bool | None = None

    # Files

    def open(self, output: Path | None, log: Path | None, resume: bool) -> None:
        """Take up a checkpoint or start afresh, and open the log."""
        self.output = output
        self.path = None if output is None else output / "checkpoint.safetensors"
        self.identity = identity(self.model, self.policy, self.train, self.schedule, self.seed)
        offset = 0
        if self.path is not None and self.path.exists() and resume:
            offset = self._restore(self.path)
        else:
            random.seed(self.seed)
            np.random.seed(self.seed)
            torch.manual_seed(self.seed)
        log = output / "log.jsonl" if log is None and output is not None else log
        if log is not None:
            log.parent.mkdir(parents=True, exist_ok=True)
            self.log = open(log, "ab")  # noqa: SIM115  (closed by `close`)
            self.log.truncate(min(offset, log.stat().st_size))
        if offset:
            self._write_log("resume")
        else:
            self._write_log("start", **self.identity)

    def close(self) -> None:
        if self.log is not None:
            self.log.close()

    def _write_log(self, event: str, **values: Any) -> None:
        if self.log is not None:
            place = {"event": event, "stage": self.stage, "epoch": self.epoch, "step": self.step}
            self.log.write(json.dumps(place | values, ensure_ascii=False).encode() + b"\n")
            self.log.flush()

    def _restore(self, path: Path) -> int:
        tensors, state = checkpoint.read(path)
        checkpoint.check_identity(path, state["identity"], self.identity)
        checkpoint.restore_model(self.model, tensors)
        checkpoint.restore_generators(tensors, state)
        self.stage, self.epoch, self.step = state["stage"], state["epoch"], state["step"]
        self.loss_sum = state["loss_sum"]
        stages = [StageResult(**(s | {"stage": Stage(**s["stage"])})) for s in state["result"]["stages"]]
        self.result = FinetuneResult(stages, state["result"]["seconds"])
        self.restored = tensors
        if state.get("underflow") is not None:  # attached so, after so many calls: both matter to stochastic rounding
            self._attach(state["underflow"])
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
            "underflow": self.underflow,
            "calls": call_counts(self.model),
            "result": self.result.to_mapping(),
            "log_bytes": self.log.tell() if self.log is not None else 0,
        }
        checkpoint.write(self.path, self.model, self.optimizer, state)

    # Training

    @property
    def steps_an_epoch(self) -> int:
        return math.ceil(len(self.train) / self.schedule.batch_size)

    def train_all(self, bars: Bars, flag: Flag) -> None:
        start, before = time.monotonic(), self.result.seconds
        while self.stage < len(self.schedule.stages):
            stage = self.schedule.stages[self.stage]
            self._begin_stage()
            total = stage.epochs * self.steps_an_epoch
            done = self.epoch * self.steps_an_epoch + self.step
            self._attach(stage.underflows(done, total))
            title = (
                f"Stage {self.stage + 1} of {len(self.schedule.stages)}{'' if stage.underflow else ', no underflow'}"
            )
            with bars.bar(title, total, done) as advance:
                while self.epoch < stage.epochs:
                    self._train_epoch(stage, bars, flag, advance)
            self._end_stage(stage, bars)
            self.result.seconds = before + time.monotonic() - start
            self._save()
        self._attach(True)
        self._write_results()

    def _attach(self, underflow: bool) -> None:
        """Attach the policy, with or without underflow, unless it is attached so already."""
        if self.underflow != underflow:
            detach(self.model)
            attach(self.model, self.policy if underflow else self.policy.replace(underflow=False))
            self.underflow = underflow

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
            if flag.raised:
                self._stop()
            size = self.schedule.batch_size
            value = self._train_step(stage, order[self.step * size : (self.step + 1) * size])
            advance(1, f"loss {value:.3f}")
            if time.monotonic() - self.saved_at >= self.schedule.checkpoint_seconds:
                self._save()
        mean = self.loss_sum / len(self.train)
        self.own_metrics = self._measure(bars)
        self._write_log("epoch", loss=mean, metrics=self.own_metrics)
        shown = ", ".join(f"{name} {value:.4f}" for name, value in self.own_metrics.items() if name != "loss")
        self.say(f"stage {self.stage + 1}, epoch {self.epoch + 1} of {stage.epochs}: training loss {mean:.4f}, {shown}")
        self.mean_loss = mean
        self.epoch, self.step, self.loss_sum = self.epoch + 1, 0, 0.0
        if self.epoch < stage.epochs:
            self._save()
            if flag.raised:
                self._stop()

    def _train_step(self, stage: Stage, index: Tensor) -> float:
        assert self.optimizer is not None
        steps = stage.epochs * self.steps_an_epoch
        done = self.epoch * self.steps_an_epoch + self.step
        self._attach(stage.underflows(done, steps))
        rate = stage.rate(done, steps)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        inputs, targets = self.train.batch(index)
        inputs = augment(inputs, self.schedule, self._generator(self.step + 1))
        self.optimizer.zero_grad(set_to_none=True)
        value = loss(self.model, self.train, to_device(inputs, self.device), targets.to(self.device))
        number = float(value.detach())
        if not math.isfinite(number):
            raise FloatingPointError(
                f"the loss became {number} in stage {self.stage + 1}, epoch {self.epoch + 1}, step {self.step}; "
                f"lower the stage's learning_rate (now {stage.learning_rate:g}) or set clip_norm"
            )
        value.backward()
        if self.schedule.clip_norm is not None:
            nn.utils.clip_grad_norm_(self.model.parameters(), self.schedule.clip_norm)
        self.optimizer.step()
        self.loss_sum += number * len(index)
        self._write_log("step", loss=number, learning_rate=rate)
        self.step += 1
        return number

    def _end_stage(self, stage: Stage, bars: Bars) -> None:
        own = self.own_metrics if stage.epochs else self._measure(bars)
        metrics = own
        if not self.underflow:
            self._attach(True)
            metrics = self._measure(bars)
        self.result.stages.append(StageResult(stage, self.mean_loss, metrics, own))
        self._write_log("stage", metrics=metrics)
        self.stage, self.epoch, self.step = self.stage + 1, 0, 0
        self.optimizer, self.mean_loss = None, None

    def _measure(self, bars: Bars) -> Metrics:
        if self.test is None:
            return {}
        return evaluate(
            self.model,
            self.test,
            self.task,
            device=self.device,
            batch_size=self.batch_size,
            progress=bars,
            label="  testing",
        )

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
        tensors = {name: t.detach().cpu().contiguous().clone() for name, t in self.model.state_dict().items()}
        write_bytes(self.output / "model.safetensors", save(tensors))
        write_json(self.output / "result.json", self.identity | self.result.to_mapping())


def augment(inputs: Inputs, schedule: Schedule, generator: torch.Generator) -> Inputs:
    """Mirror and shift images (N, C, H, W) as the schedule says; other inputs come back as they are."""
    if not isinstance(inputs, Tensor) or not (schedule.flip or schedule.crop):
        return inputs
    if inputs.dim() != 4:
        raise ValueError(f"augmentation is for images (N, C, H, W); the inputs have shape {tuple(inputs.shape)}")
    n, _, height, width = inputs.shape
    if schedule.flip:
        mirrored = torch.rand(n, generator=generator) < 0.5
        inputs = torch.where(mirrored[:, None, None, None], inputs.flip(3), inputs)
    if schedule.crop:
        padded = nn.functional.pad(inputs, [schedule.crop] * 4)
        top, left = torch.randint(0, 2 * schedule.crop + 1, (2, n), generator=generator)
        rows = (top[:, None] + torch.arange(height))[:, None, :, None]
        columns = (left[:, None] + torch.arange(width))[:, None, None, :]
        image, channel = torch.arange(n)[:, None, None, None], torch.arange(inputs.shape[1])[None, :, None, None]
        inputs = padded[image, channel, rows, columns]
    return inputs
