"""What a training step costs by estimator: its time against torch's own step, and its memory at the peak.

Each cell is measured in a process of its own, since memory that was used before hides what is used now:
`python -m fmaq.reproduce.costs` reads what to measure from standard input, as JSON, and prints the metrics.
"""

from __future__ import annotations

import copy
import json
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fmaq.bench.costs import peak_memory
from fmaq.bench.networks import training_step
from fmaq.bench.timing import compare
from fmaq.emulation import Policy, attach
from fmaq.recipes.data import load_data
from fmaq.recipes.models import build_model
from fmaq.recipes.values import load_policy
from fmaq.reproduce.experiment import Cell, CostExperiment, Network
from fmaq.reproduce.results import CellResult, folder_name
from fmaq.training.tasks import Metrics


class Costs:
    """Measures the cells of one experiment.

    Args:
        folder: gets `cells/`.
    """

    def __init__(self, experiment: CostExperiment, folder: Path) -> None:
        self.experiment, self.folder = experiment, folder
        self.policy = load_policy(experiment.policy)

    def run(self, cell: Cell, commit: str | None) -> tuple[CellResult, bool]:
        """The costs of a cell, and whether its folder had them already.

        Args:
            commit: that a new result names as its own.
        """
        policy = self.policy.replace(accumulator=cell.accumulator, estimator=cell.estimator)
        work = {
            "network": self.experiment.networks[cell.variant].model_dump(mode="json"),
            "policy": policy.to_mapping(),
            "seed": cell.seed,
            "rounds": self.experiment.rounds,
            "threads": torch.get_num_threads(),
        }
        folder = self.folder / "cells" / folder_name(cell.label, work)
        if (kept := CellResult.kept(folder)) is not None:
            return kept, True
        start = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-m", "fmaq.reproduce.costs"], input=json.dumps(work), capture_output=True, text=True
        )
        result = CellResult(cell, {}, seconds=time.monotonic() - start, commit=commit)
        if done.returncode == 0:
            result.metrics = json.loads(done.stdout)
            result.save(folder)
        else:  # not kept: the next run tries again
            result.failure = (done.stderr.strip().splitlines() or ["no message"])[-1]
        return result, False


def measure(work: Mapping[str, Any]) -> Metrics:
    """The costs of one training step in this process, which should have done nothing yet.

    Args:
        work: `network`, as `Network` takes it; `policy`; `seed`; `rounds`, how often the step is timed; `threads`.

    Returns:
        `ratio` of the step's time to torch's own, its `seconds`, and `memory`, the MiB at its peak beyond the network
        and the batch.
    """
    torch.set_num_threads(work["threads"])
    network = Network.model_validate(work["network"])
    torch.manual_seed(work["seed"])
    plain, tokenizer = build_model(network.model)
    attached = attach(copy.deepcopy(plain), Policy.parse(work["policy"]))
    data, _ = load_data(network.data, tokenizer=tokenizer)
    inputs, targets = data.batch(slice(0, network.batch_size))
    few, few_targets = data.batch(slice(0, 2))
    training_step(attached, few, few_targets)()  # the code is there, and so is what it loads
    attached.zero_grad(set_to_none=True)
    ours, theirs = training_step(attached, inputs, targets), training_step(plain, inputs, targets)
    memory = peak_memory(ours)
    found = compare(ours, theirs, work["rounds"])
    return {"ratio": found.ratio, "seconds": found.ours, "memory": memory}


if __name__ == "__main__":
    print(json.dumps(measure(json.load(sys.stdin))))
