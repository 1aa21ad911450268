"""A recipe's network, observed: what the sums of its layers lose on its test examples."""

from __future__ import annotations

import torch

from fmaq.analysis.calibration import call
from fmaq.analysis.observation import STEPS, Observed, observe
from fmaq.emulation import attach, detach
from fmaq.emulation.policy import FP32
from fmaq.training.calibrated import batches_of
from fmaq.training.explain import RecipeError
from fmaq.training.recipe import Recipe
from fmaq.training.run import prepare, variants


def run_observe(
    recipe: Recipe, accumulator: str | None = None, batches: int = 1, steps: int | None = STEPS
) -> Observed:
    """Run the network on its first test batches, under its policy (or the first of its accumulators).

    Args:
        accumulator: in place of the policy's.
        steps: see `fmaq.observe`.

    Raises:
        RecipeError: neither the policy nor `accumulators` emulate anything, or a test set has no batches.
    """
    ready = prepare(recipe)
    policies = [policy for policy in variants(recipe, ready.policy) if policy.accumulator != FP32 or policy.layers]
    if accumulator is not None:
        policies = [ready.policy.replace(accumulator=accumulator)]
    if not policies:
        raise RecipeError("this recipe emulates nothing: give policy.accumulator, accumulators, or -a")
    attach(ready.model, policies[0])
    ready.model.eval()
    try:
        with torch.no_grad(), observe(ready.model, steps) as found:
            for batch in batches_of(ready.test, recipe.data.batch_size, batches):
                call(ready.model, batch)
    finally:
        detach(ready.model)
    if not found:
        raise RecipeError(
            f"none of the products of {type(ready.model).__name__} is emulated; see fmaq.coverage for why"
        )
    return found
