"""Which policies a command runs on a recipe: one rule, for all commands.

A recipe's policies are its own `policy`, if that emulates anything, and then the same with each of `accumulators` in
place of its own; all of them in every format of `operands`, where the recipe has any. If nothing of this emulates
anything, there is one: `policy` as it is.

- `fmaq evaluate` and `fmaq calibrate` run them all.
- `fmaq observe`, `analyze`, `finetune` and `hardware model` run one: `policy`, or where that emulates nothing, the
  first of `accumulators` that does; in the first of `operands`.
- `-a` takes the place of the accumulator of `policy` (of all its entries) and of `accumulators`.
- `--policy FILE` takes the place of `policy`, `accumulators` and `operands`, and of `finetune.calibrate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fmaq.emulation import Policy
from fmaq.emulation.rule import FP32
from fmaq.numerics import Accumulator
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.recipe import Recipe


def accumulators_of(policy: Policy) -> list[Accumulator]:
    """All that a policy names, its entries' too; not `"fp32"`."""
    layers = [entry for entry in policy.layers.values() if entry is not None]
    products = [
        part for entry in ({"products": policy.products}, *layers) for part in entry.get("products", {}).values()
    ]
    named = [policy.accumulator, *(entry.get("accumulator") for entry in (*layers, *products))]
    return [accumulator for accumulator in named if isinstance(accumulator, Accumulator)]


def emulates(policy: Policy) -> bool:
    """Whether any of a policy's entries names an accumulator."""
    return bool(accumulators_of(policy))


def quantizes(policy: Policy) -> bool:
    """Whether any of a policy's entries names a format of operands."""
    entries = [entry for entry in policy.layers.values() if entry is not None]
    parts = [part for entry in ({"products": policy.products}, *entries) for part in entry.get("products", {}).values()]
    named = [{"weight": policy.weight, "activation": policy.activation}, *entries, *parts]
    return any(entry.get(role) is not None for entry in named for role in ("weight", "activation"))


def is_template(policy: Policy) -> bool:
    """Whether any of a policy's accumulators lacks a bias, which calibration has to choose."""
    return any(accumulator.is_template for accumulator in accumulators_of(policy))


def with_accumulators(recipe: Recipe, accumulators: Sequence[Any]) -> Recipe:
    """The recipe with accumulators in place of the policy's and of its own list, as `-a` gives them.

    Raises:
        ValueError, TypeError: one is no accumulator.
    """
    given = [str(recipe.load_policy().replace(accumulator=item).accumulator) for item in accumulators]
    # A policy that has been in float32 altogether no longer knows which of its entries were not.
    main = next((item for item in given if item != FP32), FP32)
    policy = recipe.load_policy().replace(accumulator=main)
    rest = given if len(given) > 1 else []
    return recipe.model_copy(update={"policy": policy.to_mapping(), "accumulators": rest})


def with_operands(policy: Policy, name: str) -> Policy:
    """The policy with weights and activations in one format; `"float32"` leaves them alone."""
    format = None if name == "float32" else name
    return policy.replace(weight=format, activation=format)


def operands_of(policy: Policy) -> str:
    """The formats of a policy's weights and activations, as a table shows them."""
    weight, activation = policy.weight or "float32", policy.activation or "float32"
    return weight if weight == activation else f"{weight}/{activation}"


def all_policies(recipe: Recipe) -> list[Policy]:
    """What `evaluate` and `calibrate` run; see the module's text."""
    return [policy for base in _in_operands(recipe) for policy in _of(base, recipe)]


def one_policy(recipe: Recipe) -> Policy:
    """What the other commands run; see the module's text. It emulates nothing where the recipe does not."""
    own = _in_operands(recipe)[0]
    return next((policy for policy in [own, *_of(own, recipe)] if emulates(policy)), own)


def emulating_policy(recipe: Recipe) -> Policy:
    """`one_policy`, for a command that has nothing to do where all sums are torch's.

    Raises:
        RecipeError: nothing of the recipe emulates anything.
    """
    policy = one_policy(recipe)
    if not emulates(policy):
        raise nothing_emulated(recipe)
    return policy


def nothing_emulated(recipe: Recipe) -> RecipeError:
    """What to raise where a recipe has no accumulators, and the command needs one."""
    return RecipeError(
        f"the recipe {recipe.name} leaves every sum in float32; name an accumulator, like -a paper12, or give the "
        f"recipe policy.accumulator or accumulators"
    )


def _in_operands(recipe: Recipe) -> list[Policy]:
    own = recipe.load_policy()
    return [with_operands(own, name) for name in recipe.operands] or [own]


def _of(own: Policy, recipe: Recipe) -> list[Policy]:
    listed = [own.replace(accumulator=item) for item in recipe.accumulators]
    is_one_more = own not in listed and (emulates(own) or not listed)
    return [own, *listed] if is_one_more else listed
