"""What the commands on recipes share: their options, and the recipe that a command line makes."""

from __future__ import annotations

import difflib
import os
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from fmaq.recipes.recipe import Recipe

RecipePath = Annotated[Path, typer.Argument(metavar="RECIPE", help="A recipe, a YAML file.", show_default=False)]
Accumulators = Annotated[
    list[str] | None,
    typer.Option(
        "--accumulator",
        "-a",
        help="In place of the policy's and the recipe's list, like \"M7E4b10 product=M7E4b12\". May be repeated.",
        show_default=False,
    ),
]
Accumulator = Annotated[
    str | None,
    typer.Option(
        "--accumulator",
        "-a",
        help="In place of the policy's, like paper12; without, the policy's, or else the first of the recipe's list.",
        show_default=False,
    ),
]
PolicyFile = Annotated[
    Path | None,
    typer.Option(
        "--policy",
        help="A policy's YAML file, such as calibrate writes, in place of the recipe's policy, accumulators, operands "
        "and finetune.calibrate.",
        show_default=False,
    ),
]
Weights = Annotated[
    Path | None,
    typer.Option(
        "--weights",
        help="A .safetensors file, such as finetune writes, in place of the recipe's model.weights.",
        show_default=False,
    ),
]
Seed = Annotated[int | None, typer.Option(min=0, help="In place of the recipe's seed.")]


def load_recipe(
    path: Path,
    accumulators: Sequence[str] = (),
    policy: Path | None = None,
    weights: Path | None = None,
    seed: int | None = None,
    changes: Mapping[str, Any] | None = None,
) -> Recipe:
    """The checked recipe, with what the command line has in its place; see `fmaq.recipes.policies`.

    Args:
        changes: as `Recipe.load` takes them.

    Raises:
        ValueError: a file is missing, or something in the recipe or the command line is wrong; says which and how.
    """
    from fmaq.emulation import Policy
    from fmaq.recipes.policies import with_accumulators
    from fmaq.recipes.recipe import Recipe

    changed = dict(changes or {})
    if seed is not None:
        changed["seed"] = seed
    if policy is not None:
        Policy.load(_existing(policy, "--policy"))  # what is wrong in it is told by its own name
        changed |= {"policy": policy, "accumulators": [], "operands": []}
    if weights is not None:
        changed["model.weights"] = _existing(weights, "--weights")
    recipe = Recipe.load(path, changed)
    if policy is not None and recipe.finetune is not None:
        recipe = recipe.model_copy(update={"finetune": recipe.finetune.model_copy(update={"calibrate": None})})
    return with_accumulators(recipe, accumulators) if accumulators else recipe


def _existing(path: Path, option: str) -> Path:
    if path.is_file():
        return path
    near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob(f"*{path.suffix}")], 1, 0.4)
    hint = f"; did you mean {path.parent / near[0]}?" if near else ""
    raise ValueError(f"{option}: there is no file {path}{hint}")


def one(accumulator: str | None) -> Sequence[str]:
    """An option that may be given once, as `load_recipe` takes accumulators."""
    return () if accumulator is None else [accumulator]


def next_command(command: str, recipe: Path, policy: Path, weights: Path | None = None) -> str:
    """How to go on from a policy's file, and perhaps a model's: a command line, for a shell."""
    options = ["--policy", str(policy), *(["--weights", str(weights)] if weights else [])]
    return shlex.join(["fmaq", command, str(recipe), *options])


def in_recipe(policy: Path, recipe: Path) -> str:
    """A policy's file as a recipe's key `policy` has to name it: from the recipe's own folder."""
    return os.path.relpath(policy.absolute(), recipe.absolute().parent)
