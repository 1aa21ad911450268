"""Running an experiment: cell by cell, each kept when it is finished, so that the same command goes on where it was."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from fmaq.recipes.provenance import provenance
from fmaq.recipes.record import show
from fmaq.reproduce.costs import Costs
from fmaq.reproduce.experiment import Cell, CostExperiment, TrainingExperiment
from fmaq.reproduce.results import CellResult, Results
from fmaq.reproduce.trainings import Trainings
from fmaq.training.interrupts import Interrupted
from fmaq.training.progress import Bars

Say = Callable[[str], None]


class Runner(Protocol):
    """Makes the results of one experiment's cells."""

    def run(self, cell: Cell, commit: str | None) -> tuple[CellResult, bool]:
        """The result of a cell, and whether it was there already."""


def run_experiment(
    experiment: TrainingExperiment | CostExperiment,
    output: Path,
    *,
    seed: int | None = None,
    fresh: bool = False,
    bars: Bars | None = None,
    say: Say = print,
) -> Results:
    """Run all cells of an experiment that the folder has no result of; their results are saved after each.

    Args:
        output: folder for `<name>.json`, `<name>.csv` and the cells' own folders.
        seed: in place of the grid's seeds.
        fresh: first remove the folder's finished cells and checkpoints.
        say: told one line a cell.

    Raises:
        Interrupted: by Ctrl-C or SIGTERM; the same call goes on from there.
    """
    if fresh:
        for name in ("cells", "pretrained"):
            shutil.rmtree(output / name, ignore_errors=True)
    bars = bars or Bars(False)
    cells = experiment.cells(seed)
    results = _empty(experiment, len(cells))
    runner: Runner
    if isinstance(experiment, TrainingExperiment):
        runner = Trainings(experiment, output, bars, say)
    else:
        runner = Costs(experiment, output)
    with bars, bars.bar(experiment.name, len(cells)) as advance:
        for number, cell in enumerate(cells, 1):
            try:
                result, was_there = runner.run(cell, results.provenance["commit"])
            except Interrupted:
                raise
            except KeyboardInterrupt:
                raise Interrupted(
                    "interrupted; finished cells are kept: run the same again to go on from there"
                ) from None
            results.cells.append(result)
            results.save(output / f"{experiment.name}.json")
            results.save_csv(output / f"{experiment.name}.csv")
            advance()
            say(f"[{number}/{len(cells)}] {cell.label}: {_line(result)}{' (from before)' if was_there else ''}")
    return results


def _empty(experiment: TrainingExperiment | CostExperiment, total: int) -> Results:
    return Results(
        experiment.name,
        experiment.title,
        experiment.question,
        experiment.kind,
        experiment.variants_are,
        experiment.across,
        total,
        list(experiment.notes),
        provenance=provenance(),
        experiment=experiment.model_dump(mode="json", exclude_defaults=True, exclude={"quick"}),
    )


def _line(result: CellResult) -> str:
    if result.failure is not None:
        return f"failed, {result.failure}"
    shown = ", ".join(f"{name} {show(name, value)}" for name, value in result.metrics.items())
    return f"{shown} ({result.seconds:.0f} s)"
