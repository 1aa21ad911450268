"""Fine-tuning: the stages, exact resume after a kill, the log, and the checkpoints that are refused."""

import json
import os
import signal
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from torch import nn

from fmaq.emulation import Policy
from fmaq.training import Examples, Schedule, Stage, Windows, dual_stage, evaluate, finetune
from fmaq.training.checkpoint import CheckpointError
from fmaq.training.interrupts import Interrupted
from fmaq.training.loop import augment

POLICY = Policy(accumulator="M5E4b10 product=M5E4b12", weight="M4E3", activation="M4E3")
SCHEDULE = Schedule.dual((2, 1), (1e-2, 1e-3), batch_size=8, weight_decay=1e-2, checkpoint_seconds=0)

SCRIPT = """
import sys
from test_training_loop import POLICY, SCHEDULE, data, network
from fmaq.training import finetune
train, test = data()
finetune(network(pause=0.3), POLICY, train, test, SCHEDULE, output=sys.argv[1], seed=3, progress=False)
"""


class Slow(nn.Module):
    """Waits a little, so that a kill can come in the middle."""

    def __init__(self, pause: float) -> None:
        super().__init__()
        self.pause = pause

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.training:
            time.sleep(self.pause)
        return x


def network(pause: float = 0.0) -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Dropout(0.3),
        Slow(pause),
        nn.Linear(64, 3),
    )


def data() -> tuple[Examples, Examples]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(40, 1, 4, 4, generator=generator)
    y = (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long()
    return Examples(x[:30], y[:30]), Examples(x[30:], y[30:])


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_stages_learn_and_are_reported(tmp_path: Path) -> None:
    train, test = data()
    model = network()
    result = finetune(model, POLICY, train, test, SCHEDULE, output=tmp_path, progress=False)
    assert [s.stage.underflow for s in result.stages] == [False, True]
    assert result.metrics == evaluate(model, test, progress=False)
    log = lines(tmp_path / "log.jsonl")
    assert [line["event"] for line in log].count("step") == 3 * 4
    losses = [line["loss"] for line in log if line["event"] == "epoch"]
    assert losses[1] < losses[0]
    rates = [line["learning_rate"] for line in log if line["event"] == "step"]
    assert rates[0] == 1e-2 and rates[8] == 1e-3
    assert all(a > b for a, b in pairwise(rates[:8]))
    assert json.loads((tmp_path / "result.json").read_text())["stages"][1]["metrics"] == result.metrics


def test_stage_one_runs_without_underflow(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    real = dual_stage.attach

    def attach(model: nn.Module, policy: Policy) -> None:
        seen.append(policy.accumulator.underflow)
        real(model, policy)

    monkeypatch.setattr(dual_stage, "attach", attach)
    train, test = data()
    finetune(network(), POLICY, train, test, SCHEDULE, progress=False)
    assert list(dict.fromkeys(seen[:1])) == [False]
    assert seen[-1] is True and False not in seen[1:]


def test_underflow_is_switched_on_in_the_middle_of_a_stage(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    seen = []
    real = dual_stage.attach

    def attach(model: nn.Module, policy: Policy) -> None:
        seen.append(policy.accumulator.underflow)
        real(model, policy)

    monkeypatch.setattr(dual_stage, "attach", attach)
    train, test = data()
    schedule = Schedule((Stage(2, 1e-2, underflow_from=0.75),), batch_size=8)  # from the seventh of eight steps on
    whole = network()
    result = finetune(whole, POLICY, train, test, schedule, output=tmp_path, progress=False)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert seen == [False, True]
    assert result.stages[0].own_metrics == result.metrics == evaluate(whole, test, progress=False)
    assert [line["event"] for line in log].count("step") == 8
    for share, switches in ((0.0, [True]), (1.0, [False, True])):
        seen.clear()
        finetune(network(), POLICY, train, test, Schedule((Stage(1, 1e-2, underflow_from=share),)), progress=False)
        assert seen == switches
    with pytest.raises(ValueError, match="underflow=False"):
        Stage(1, 1e-2, underflow=False, underflow_from=0.5)
    with pytest.raises(ValueError, match="from 0 to 1"):
        Stage(1, 1e-2, underflow_from=1.5)


def test_the_same_seed_gives_the_same_bits_and_another_does_not() -> None:
    train, test = data()
    results = []
    for seed in (0, 0, 1):
        model = network()
        finetune(model, POLICY, train, test, SCHEDULE, seed=seed, progress=False)
        results.append(weights(model))
    assert same(results[0], results[1])
    assert not same(results[0], results[2])


NOISY = Policy(accumulator="M5E4b10 product=M5E4b12 rounding=stochastic random_bits=6", weight="M4E3")


@pytest.mark.parametrize(("after", "policy"), [(1, POLICY), (6, POLICY), (9, POLICY), (6, NOISY), (9, NOISY)])
def test_resume_after_an_interruption_is_exact(tmp_path: Path, after: int, policy: Policy) -> None:
    train, test = data()
    whole = network()
    expected = finetune(whole, policy, train, test, SCHEDULE, output=tmp_path / "whole", seed=3, progress=False)

    class Stop(Slow):
        count = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if self.training:
                Stop.count += 1
                if Stop.count == after:
                    signal.raise_signal(signal.SIGINT)
            return x

    stopped = network()
    stopped[5] = Stop(0)
    with pytest.raises(Interrupted, match="run the same again to go on from there"):
        finetune(stopped, policy, train, test, SCHEDULE, output=tmp_path / "part", seed=3, progress=False)
    resumed = network()
    result = finetune(resumed, policy, train, test, SCHEDULE, output=tmp_path / "part", seed=3, progress=False)
    assert same(weights(whole), weights(resumed))
    assert [s.metrics for s in result.stages] == [s.metrics for s in expected.stages]
    logs = [lines(tmp_path / name / "log.jsonl") for name in ("whole", "part")]
    without = [line for line in logs[1] if line["event"] != "resume"]
    assert without == logs[0]


@pytest.mark.slow
def test_resume_after_a_kill_is_exact(tmp_path: Path) -> None:
    def run(folder: str) -> None:
        finetune(network(), POLICY, *data(), SCHEDULE, output=tmp_path / folder, seed=3, progress=False)

    run("whole")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(Path(__file__).parent), *sys.path])}
    environment["OMP_NUM_THREADS"] = str(torch.get_num_threads())
    victim = subprocess.Popen([sys.executable, "-c", SCRIPT, str(tmp_path / "killed")], env=environment)
    log = tmp_path / "killed" / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"step", ') >= 6):
        assert victim.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    victim.kill()
    assert victim.wait() == -signal.SIGKILL
    assert not (tmp_path / "killed" / "model.safetensors").exists()
    run("killed")
    finals = [(tmp_path / name / "model.safetensors").read_bytes() for name in ("whole", "killed")]
    assert finals[0] == finals[1]
    assert any(line["event"] == "resume" for line in lines(log))
    assert sum(line["event"] == "step" for line in lines(log)) == 12


def test_a_finished_run_is_not_run_again(tmp_path: Path) -> None:
    train, test = data()
    model = network()
    first = finetune(model, POLICY, train, test, SCHEDULE, output=tmp_path, progress=False)
    fresh = network()
    again = finetune(fresh, POLICY, train, test, SCHEDULE, output=tmp_path, progress=False)
    assert again.stages == first.stages
    assert same(weights(model), weights(fresh))


def test_checkpoints_of_other_runs_are_refused(tmp_path: Path) -> None:
    train, test = data()
    options = {"output": tmp_path, "progress": False}
    finetune(network(), POLICY, train, test, SCHEDULE, **options)
    wider = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    with pytest.raises(CheckpointError, match=r"a run with another model .*resume=False \(--fresh\)"):
        finetune(wider, POLICY, train, test, SCHEDULE, **options)
    with pytest.raises(CheckpointError, match=r"with another policy .*M5E4b10.*M7E4b10"):
        finetune(network(), POLICY.replace(accumulator="paper12"), train, test, SCHEDULE, **options)
    with pytest.raises(CheckpointError, match="with another schedule"):
        finetune(network(), POLICY, train, test, Schedule.dual((2, 2), batch_size=8), **options)
    with pytest.raises(CheckpointError, match="with another data"):
        finetune(network(), POLICY, test, test, SCHEDULE, **options)
    with pytest.raises(CheckpointError, match="with another seed"):
        finetune(network(), POLICY, train, test, SCHEDULE, seed=8, **options)
    finetune(network(), POLICY, train, test, SCHEDULE, seed=8, resume=False, **options)


def test_broken_checkpoint(tmp_path: Path) -> None:
    (tmp_path / "checkpoint.safetensors").write_bytes(b"broken")
    train, test = data()
    with pytest.raises(CheckpointError, match=r"cannot read the checkpoint .*delete it"):
        finetune(network(), POLICY, train, test, SCHEDULE, output=tmp_path, progress=False)


def test_a_foreign_safetensors_file_is_no_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(1)}, tmp_path / "checkpoint.safetensors")
    train, test = data()
    with pytest.raises(CheckpointError, match="is not a checkpoint of this version"):
        finetune(network(), POLICY, train, test, SCHEDULE, output=tmp_path, progress=False)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_frozen_parameters_stay(optimizer: str) -> None:
    train, test = data()
    model = network()
    model[0].weight.requires_grad_(False)
    before = weights(model)
    schedule = Schedule((Stage(1, 1e-2, cosine=False),), batch_size=8, optimizer=optimizer, clip_norm=1.0)
    finetune(model, Policy(), train, test, schedule, progress=False)
    after = weights(model)
    assert torch.equal(before["0.weight"], after["0.weight"])
    assert not torch.equal(before["6.weight"], after["6.weight"])


def test_a_loss_that_is_not_finite_stops_the_run() -> None:
    train, test = data()
    model = network()
    with torch.no_grad():
        model[6].bias.fill_(float("nan"))
    with pytest.raises(
        FloatingPointError, match=r"the loss became nan in stage 1, epoch 1, step 0; lower .*learning_rate"
    ):
        finetune(model, Policy(), train, test, SCHEDULE, progress=False)


def test_bad_arguments() -> None:
    train, test = data()
    with pytest.raises(TypeError, match="trains on Examples or Windows, not list"):
        finetune(network(), Policy(), [1], test, SCHEDULE)
    with pytest.raises(ValueError, match="no training examples"):
        finetune(network(), Policy(), Examples(train.inputs[:0], train.targets[:0]), test, SCHEDULE)
    with pytest.raises(ValueError, match="3 inputs but 2 targets"):
        Examples(torch.zeros(3, 1), torch.zeros(2))
    with pytest.raises(ValueError, match="optimizer must be"):
        Schedule((), optimizer="adam")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="learning_rate must be above 0"):
        Stage(1, 0.0)


def test_language_models_train_too() -> None:
    class Bigram(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Embedding(7, 7)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.table(input_ids)

    windows = Windows(torch.arange(7).repeat(4)[None].repeat(3, 1))
    torch.manual_seed(0)
    model = Bigram()
    before = evaluate(model, windows, "perplexity", progress=False)["perplexity"]
    schedule = Schedule((Stage(20, 0.1),), batch_size=1)
    result = finetune(model, Policy(), windows, windows, schedule, task="perplexity", progress=False)
    assert result.metrics["perplexity"] < 1.5 < before


def test_augmentation_mirrors_and_shifts() -> None:
    x = torch.arange(1, 33, dtype=torch.float32).view(2, 1, 4, 4)
    schedule = Schedule((), crop=1)
    shifted = augment(x, schedule, torch.Generator().manual_seed(0))
    padded = nn.functional.pad(x, [1] * 4)
    places = [padded[:, :, i : i + 4, j : j + 4] for i in range(3) for j in range(3)]
    for n in range(2):
        assert any(torch.equal(shifted[n], place[n]) for place in places)
    mirrored = augment(x.repeat(20, 1, 1, 1), Schedule((), flip=True), torch.Generator().manual_seed(0))
    kinds = {torch.equal(a, b) for a, b in zip(mirrored, x.repeat(20, 1, 1, 1), strict=True)}
    assert kinds == {True, False}
    with pytest.raises(ValueError, match=r"augmentation is for images \(N, C, H, W\); the inputs have shape \(3, 2\)"):
        augment(torch.zeros(3, 2), schedule, torch.Generator())
