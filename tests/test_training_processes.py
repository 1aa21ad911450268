"""Training in several processes, which torchrun starts on gloo: what it is equal to, and resuming after kill -9."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from fmaq.emulation import Policy
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.record import Record
from fmaq.recipes.run import run_finetune
from fmaq.training import Examples, Schedule, Stage, finetune
from fmaq.training.examples import IGNORED
from fmaq.training.processes import parts_of
from test_training_loop import Slow, lines

POLICY = Policy(accumulator="M5E4b10 product=M5E4b12", weight="M4E3", activation="M4E3")
NOISY = Policy(accumulator="M5E4b10 product=M5E4b12 rounding=stochastic random_bits=6", weight="M4E3")
DUAL = Schedule.dual((2, 1), (1e-2, 1e-3), batch_size=4, weight_decay=1e-2, checkpoint_seconds=0, crop=1, flip=True)
CONVEX = Schedule((Stage(3, 0.05, cosine=False),), batch_size=4, optimizer="sgd", momentum=0.0)
"""A convex loss by plain gradient steps: what float32 does to it can be bounded."""

WORKER = "from test_training_processes import work; work()"


class Killed(nn.Module):
    """Kills its process at a step, if it has this rank, and once: the file that it writes then is there next time."""

    def __init__(self, step: int, rank: int, marker: Path) -> None:
        super().__init__()
        self.left, self.marker = step if os.environ.get("RANK") == str(rank) else math.inf, marker

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.left -= self.training
        if self.left < 0 and not self.marker.exists():
            self.marker.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x


def images() -> Examples:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(29, 1, 4, 4, generator=generator)  # the last step has fewer
    return Examples(x, (x.mean((1, 2, 3)) > 0).long() + (x[:, 0, 0, 0] > 0).long())


def network() -> nn.Sequential:
    torch.manual_seed(1)
    convolution = nn.Conv2d(1, 4, 3, padding=1)
    return nn.Sequential(nn.Sequential(convolution, nn.ReLU()), nn.Flatten(), nn.Linear(64, 3))


def linear() -> nn.Sequential:
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 3, bias=False))


def random_network(extra: nn.Module) -> nn.Sequential:
    """Batch norm, whose running statistics are state, and dropout, which draws from each process's own generator."""
    torch.manual_seed(1)
    norm = nn.BatchNorm1d(8)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 8), norm, nn.ReLU(), nn.Dropout(0.3), extra, nn.Linear(8, 3))


def splits() -> tuple[Examples, Examples]:
    return images(), images()


def recipe(**finetune: object) -> Recipe:
    stages = {
        name: {"epochs": 1, "learning_rate": rate}
        for name, rate in (("without_underflow", 1e-2), ("with_underflow", 1e-3))
    }
    values = {
        "name": "small",
        "model": {"callable": f"{__file__}:network"},
        "data": {"kind": "callable", "callable": f"{__file__}:splits"},
        "policy": POLICY.to_mapping(),
        "finetune": {"batch_size": 4, **stages, **finetune},
    }
    return Recipe.parse(values)


def train(output: Path, case: str, step: int = 0, rank: int = 0, pause: float = 0.0) -> None:
    """Train by one of the cases that the tests compare."""
    options = {"output": output, "seed": 3, "progress": False}
    data = images()
    if case == "killed" or case == "random":
        extra = Killed(step, rank, output.parent / "marker") if case == "killed" else Slow(pause)
        finetune(random_network(extra), NOISY, data, data, DUAL, **options)
    elif case == "recipe":
        run_finetune(recipe(), output)
    elif case == "convex":
        finetune(linear(), Policy(), data, None, CONVEX, **options)
    else:
        finetune(network(), POLICY, data, data, DUAL, shard=case == "sharded", **options)


def work() -> None:
    """What torchrun's processes do: a list of cases."""
    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    folder.mkdir(exist_ok=True)
    (folder / f"pid{os.environ['RANK']}").write_text(str(os.getpid()))
    for arguments in json.loads(sys.argv[2]):
        train(folder / arguments["case"], **arguments)


def torchrun(folder: Path, *cases: dict, restarts: int = 0) -> "subprocess.Popen[bytes]":
    script = folder.parent / "worker.py"
    script.write_text(WORKER)
    path = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"  # for restarts: see docs/distributed.md
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += ["--max-restarts", str(restarts), str(script), str(folder), json.dumps(cases)]
    return subprocess.Popen(command, env=environment)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of what two processes trained together."""
    folder = tmp_path_factory.mktemp("together") / "runs"
    cases = [{"case": case} for case in ("network", "sharded", "recipe", "convex", "random")]
    assert torchrun(folder, *cases).wait(200) == 0
    return folder


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder / "log.jsonl") if line["event"] == "step"]


def final(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


def replaced(schedule: Schedule, **values: int) -> Schedule:
    return Schedule(**{**vars(schedule), **values})


def test_two_processes_are_one_that_accumulates_two_batches(together: Path, tmp_path: Path, one_thread: None) -> None:
    """Bit for bit: the same batches go through the network, and a sum of two has one order."""
    data, folders = images(), (tmp_path, together / "network")
    schedule = replaced(DUAL, accumulation=2)
    finetune(network(), POLICY, data, data, schedule, output=tmp_path, seed=3, progress=False)
    assert losses(tmp_path) == losses(together / "network") and len(losses(tmp_path)) == 3 * 4
    assert final(tmp_path) == final(together / "network")
    epochs = [[line for line in lines(f / "log.jsonl") if line["event"] == "epoch"] for f in folders]
    assert epochs[0] == epochs[1]


def test_sharded_training_gives_the_same_bits(together: Path) -> None:
    assert losses(together / "sharded") == losses(together / "network")
    assert final(together / "sharded") == final(together / "network")


def test_a_recipe_is_trained_by_all_and_recorded_once(together: Path, tmp_path: Path, one_thread: None) -> None:
    run_finetune(recipe(accumulation=2), tmp_path)
    assert final(tmp_path) == final(together / "recipe")
    one, two = (Record.load(folder / "finetune.json") for folder in (tmp_path, together / "recipe"))
    assert one.baseline.metrics == two.baseline.metrics
    tuned = [[stage["metrics"] for stage in record.rows[0].tuned["stages"]] for record in (one, two)]
    assert tuned[0] == tuned[1]
    with pytest.raises(RecipeError, match=r"finetune\.trackers\.0: Input should be 'tensorboard' or 'wandb'"):
        recipe(trackers=["tensorbord"])
    with pytest.raises(RecipeError, match=r"finetune\.accumulation: Input should be greater than or equal to 1"):
        recipe(accumulation=0)


def test_two_processes_give_the_curve_of_one_with_twice_the_batch(
    together: Path, tmp_path: Path, one_thread: None
) -> None:
    """Equal but for the order in which float32 sums gradients; how far that can go is bounded here by hand.

    The loss of a linear classifier is convex, with a second derivative of at most ‖x‖²/2, so a gradient step of a rate
    below 4/‖x‖² brings two sets of weights no farther apart; only the errors of each step's gradients add up.
    """
    data = images()
    schedule = replaced(CONVEX, batch_size=8)
    finetune(linear(), Policy(), data, None, schedule, output=tmp_path, seed=3, progress=False)
    one, two = losses(tmp_path), losses(together / "convex")
    assert len(one) == len(two) == 3 * 4
    rate, steps, unit = 0.05, len(one), 2.0**-24
    length = float(data.inputs.flatten(1).norm(dim=1).max())
    assert rate < 4 / length**2
    weights = [load_file(folder / "model.safetensors")["1.weight"] for folder in (tmp_path, together / "convex")]
    size = float(linear()[1].weight.detach().norm()) + steps * rate * math.sqrt(2) * length  # of the weights, at most
    # Roundings: 16 products of a logit, 8 terms of a gradient, and 8 for the softmax, the mean and the step itself.
    error = (16 + 8 + 8) * unit * (1 + size * length)
    apart = steps * (2 * rate * math.sqrt(2) * length * error + 2 * unit * size)
    assert apart < 1e-3
    assert float((weights[0] - weights[1]).norm()) <= apart
    for a, b in zip(one, two, strict=True):
        assert abs(a - b) <= math.sqrt(2) * length * apart + 2 * error
    assert one[-1] < one[0]


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_the_weights_are_the_same(together: Path, tmp_path: Path) -> None:
    step, rank = random.randrange(12), random.randrange(2)
    job = torchrun(tmp_path / "runs", {"case": "killed", "step": step, "rank": rank}, restarts=1)
    assert job.wait(200) == 0
    assert (tmp_path / "runs" / "marker").exists(), f"nobody was killed at step {step}"
    log = lines(tmp_path / "runs" / "killed" / "log.jsonl")
    assert step == 0 or any(line["event"] == "resume" for line in log)
    assert final(tmp_path / "runs" / "killed") == final(together / "random"), f"rank {rank} was killed at step {step}"
    assert losses(tmp_path / "runs" / "killed") == losses(together / "random")


@pytest.mark.slow
def test_a_killed_job_goes_on_to_the_same_weights(together: Path, tmp_path: Path) -> None:
    folder, step = tmp_path / "runs", random.randrange(1, 12)
    job = torchrun(folder, {"case": "random", "pause": 0.2})
    log, deadline = folder / "random" / "log.jsonl", time.monotonic() + 120
    while not (log.exists() and log.read_text().count('"step", ') >= step):
        assert job.poll() is None, "it ended before it could be killed"
        assert time.monotonic() < deadline
        time.sleep(0.02)
    for process in (job.pid, *(int((folder / f"pid{rank}").read_text()) for rank in range(2))):
        os.kill(process, signal.SIGKILL)
    job.wait()
    assert not (folder / "random" / "model.safetensors").exists()
    assert torchrun(folder, {"case": "random"}).wait(200) == 0
    assert final(folder / "random") == final(together / "random"), f"killed at step {step}"
    assert losses(folder / "random") == losses(together / "random")


def test_a_run_of_several_processes_is_not_one_of_one(together: Path) -> None:
    data = images()
    with pytest.raises(ValueError, match=r"another schedule .*processes\": 2"):
        finetune(network(), POLICY, data, data, DUAL, output=together / "network", seed=3, progress=False)


def test_accumulated_batches_weigh_what_their_targets_do() -> None:
    """Batches of unequal numbers of targets that count, some of none, give the step of them all."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(7, 5, 6, generator=generator)
    y = torch.randint(0, 3, (7, 5), generator=generator)
    y[1, 1:] = IGNORED
    y[2:4] = IGNORED
    models = []
    for accumulation in (1, 7):
        torch.manual_seed(0)
        models.append(nn.Linear(6, 3))
        schedule = Schedule((Stage(2, 0.1),), 7 // accumulation, accumulation, optimizer="sgd")
        finetune(models[-1], Policy(), Examples(x, y), None, schedule, progress=False)
    torch.testing.assert_close(models[0].weight, models[1].weight, rtol=1e-5, atol=1e-6)
    with pytest.raises(FloatingPointError, match="the loss became nan"):
        finetune(models[0], Policy(), Examples(x, torch.full_like(y, IGNORED)), None, schedule, progress=False)


def test_parts_cover_a_step() -> None:
    counted = torch.tensor([2, 0, 0, 5, 1])
    parts = parts_of(counted, 2)
    assert [at.tolist() for at, _ in parts] == [[0, 1, 2], [3, 4]] and [share for _, share in parts] == [2 / 8, 6 / 8]
    parts = parts_of(counted, 7)
    assert sum(share for _, share in parts) == 1 and len(parts) == 7
    assert all(at.tolist() == [3] for at, share in parts if not share)  # somebody's gradients, which do not count


def test_tensorboard_has_the_curves(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    data = images()
    finetune(linear(), Policy(), data, data, CONVEX, output=tmp_path / "a", progress=False, trackers=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "a"))
    events.Reload()
    found = [(point.step, point.value) for point in events.Scalars("loss")]
    assert [step for step, _ in found] == list(range(1, 25))
    assert [value for _, value in found] == pytest.approx(losses(tmp_path / "a"))
    assert [point.step for point in events.Scalars("test accuracy")] == [8, 16, 24]


def test_tensorboard_takes_back_what_a_killed_run_drew_after_its_checkpoint(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    class Fails(nn.Module):
        left = 12

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.left -= 1
            if self.left < 0:
                raise torch.OutOfMemoryError("no memory")
            return x

    data, options = images(), {"output": tmp_path / "a", "progress": False, "trackers": ["tensorboard"]}
    with pytest.raises(torch.OutOfMemoryError, match="no memory"):
        finetune(linear().append(Fails()), Policy(), data, None, CONVEX, **options)
    finetune(linear().append(nn.Identity()), Policy(), data, None, CONVEX, **options)
    events = EventAccumulator(str(tmp_path / "a" / "tensorboard" / "a"))
    events.Reload()
    assert [point.step for point in events.Scalars("loss")] == list(range(1, 25))


def test_weights_and_biases_has_the_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accelerate; its package is stood in for, since it wants an account."""
    points: list[tuple[dict, int]] = []
    settings: dict = {}
    run = SimpleNamespace(log=lambda values, step=None, **_: points.append((values, step)), finish=lambda: None)
    config = SimpleNamespace(update=lambda values, **_: settings.update(values))
    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=lambda project, **_: run, config=config))
    data = images()
    finetune(linear(), Policy(), data, None, CONVEX, output=tmp_path, progress=False, trackers=["wandb"])
    assert [values["loss"] for values, _ in points if "loss" in values] == losses(tmp_path)
    assert settings["seed"] == 0 and '"batch_size": 4' in settings["schedule"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = images()
    with pytest.raises(ValueError, match="no tracker 'tensorbord'; known are tensorboard, wandb"):
        finetune(linear(), Policy(), data, None, CONVEX, output=tmp_path, trackers=["tensorbord"])
    with pytest.raises(ValueError, match="a tracker needs an output folder"):
        finetune(linear(), Policy(), data, None, CONVEX, trackers=["tensorboard"])
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(ValueError, match="wandb needs the package wandb: pip install wandb"):
        finetune(linear(), Policy(), data, None, CONVEX, output=tmp_path, trackers=["wandb"])
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(ValueError, match=r"a tracker needs the package accelerate: pip install 'fmaq\[trainers\]'"):
        finetune(linear(), Policy(), data, None, CONVEX, output=tmp_path, trackers=["tensorboard"])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match=r"several processes needs the package accelerate"):
        finetune(linear(), Policy(), data, None, CONVEX)
    with pytest.raises(ValueError, match="accumulation must be at least 1, got 0"):
        Schedule((), accumulation=0)
