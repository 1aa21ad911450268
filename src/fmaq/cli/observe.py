"""`fmaq observe`: what happens in the sums of a recipe's network."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from fmaq.cli.console import print_table
from fmaq.cli.recipes import Accumulator, PolicyFile, RecipePath, Weights, load_recipe, one

EPILOG = (
    "[bold]Examples[/bold]\n\n  fmaq observe examples/digits/recipe.yaml\n\n"
    '  fmaq observe examples/minilm/12bit.yaml -a "M5E4b10 product=M5E4b12"\n\n'
    "  fmaq observe recipe.yaml --policy runs/mine/policy.yaml --weights runs/mine/model.safetensors\n\n"
    "  fmaq observe recipe.yaml --batches 4 --json | jq .layers"
)


def observe(
    recipe: RecipePath,
    accumulator: Accumulator = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    batches: Annotated[int, typer.Option(min=1, help="Of test examples, of the recipe's batch size.")] = 1,
    every_step: Annotated[bool, typer.Option("--every-step", help="Count in all outputs, not in a sample.")] = False,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for the results.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")] = False,
) -> None:
    """Count what every layer's sums lose: overflow, underflow and swamping, by layer, with ranges and noise.

    The output folder, runs/<name> by default, gets events.csv, exponents.csv and a plot.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from fmaq.analysis.observation import STEPS
    from fmaq.recipes.observed import run_observe
    from fmaq.training.files import made_folder

    loaded = load_recipe(recipe, one(accumulator), policy, weights)
    folder = made_folder(output or loaded.output or Path("runs") / loaded.name)
    found = run_observe(loaded, batches, None if every_step else STEPS)
    frames = {"events.csv": found.to_dataframe(), "exponents.csv": found.histograms()}
    for name, frame in frames.items():
        frame.to_csv(folder / name, index=False)
    plot = found.plot(folder / "events.png")
    if as_json:
        layers: dict[str, Any] = {name: {**e.counts, "steps": e.steps, "snr_db": e.snr} for name, e in found.items()}
        typer.echo(json.dumps({"recipe": loaded.name, "layers": layers}, ensure_ascii=False))
        return
    print_table(found.table(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    for what, path in {"plot": plot, "events": folder / "events.csv", "ranges": folder / "exponents.csv"}.items():
        typer.echo(f"{what + ':':<8}{path}")
