"""`fmaq hardware model`: a recipe's model, run on its first test examples, for `fmaq.analysis.energy`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmaq.analysis.energy import ModelEnergy, energy_of_run
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.run import prepare
from fmaq.training.progress import Bars
from fmaq.training.tasks import evaluate

if TYPE_CHECKING:
    from fmaq.hardware.liberty import Library


def recipe_energy(
    recipe: Recipe, weight: str | None, activation: str | None, library: Library, adder: str
) -> ModelEnergy:
    """Energy by layer of a recipe's model, over all of its test examples.

    Args:
        weight, activation, library, adder: as of `fmaq.analysis.model_energy`.
    """
    ready = prepare(recipe, bars=Bars(False))

    def run() -> None:
        evaluate(ready.model, ready.test, ready.task, batch_size=recipe.data.batch_size, progress=False)

    return energy_of_run(ready.model, ready.policy, run, len(ready.test), weight, activation, library, adder)
