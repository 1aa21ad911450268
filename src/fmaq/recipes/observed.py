"""A recipe's network, observed: what the sums of its layers lose on its test examples."""

from __future__ import annotations

import torch

from fmaq.analysis.calibration import call
from fmaq.analysis.observation import STEPS, Observed, observe
from fmaq.emulation import attach, detach
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.policies import emulating_policy
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.run import batches_of, prepare
from fmaq.training.tasks import telling_of_the_batch


def run_observe(recipe: Recipe, batches: int = 1, steps: int | None = STEPS) -> Observed:
    """Run the network on its first test batches, under the recipe's policy (see `fmaq.recipes.policies`).

    Args:
        steps: see `fmaq.observe`.

    Raises:
        RecipeError: the recipe emulates nothing, or a test set has no batches.
    """
    policy = emulating_policy(recipe)
    ready = prepare(recipe)
    attach(ready.model, policy)
    ready.model.eval()
    try:
        with torch.no_grad(), observe(ready.model, steps) as found:
            for batch in batches_of(ready.test, recipe.data.batch_size, batches):
                with telling_of_the_batch(ready.model, batch):
                    call(ready.model, batch)
    finally:
        detach(ready.model)
    if not found:
        raise RecipeError(
            f"none of the products of {type(ready.model).__name__} is emulated; see fmaq.coverage for why"
        )
    return found
