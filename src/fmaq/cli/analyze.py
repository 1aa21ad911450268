"""`fmaq analyze`: what a recipe's layers need, before anything runs in a short accumulator."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmaq.cli.console import print_table
from fmaq.cli.recipes import Accumulator, PolicyFile, RecipePath, Weights, load_recipe, one

if TYPE_CHECKING:
    from fmaq.recipes.recipe import Recipe

EPILOG = (
    "[bold]Examples[/bold]\n\n  fmaq analyze examples/digits/recipe.yaml\n\n"
    '  fmaq analyze recipe.yaml -a "M6E4 product=M6E4 chunk=32"\n\n'
    "  fmaq analyze recipe.yaml -a I16f0 --input-max int8\n\n"
    "  fmaq analyze recipe.yaml --policy runs/mine/policy.yaml --weights runs/mine/model.safetensors\n\n"
    "  fmaq analyze recipe.yaml -a paper12 --json | jq .overflow"
)


def analyze(
    recipe: RecipePath,
    accumulator: Accumulator = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    input_max: Annotated[
        str | None,
        typer.Option(
            "--input-max",
            metavar="RANGE",
            help='Of every layer\'s inputs: the largest magnitude, LOW,HIGH, int8, uint8, or a format like "M4E3b5". '
            "By default the range seen in the examples, and a proof holds for that range.",
            show_default=False,
        ),
    ] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")] = None,
    examples: Annotated[int, typer.Option(min=1, help="Inputs to run the model on, once.")] = 8,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")] = False,
) -> None:
    """Show, layer by layer, the mantissa that sums of its length need, and the channels that cannot overflow.

    The first table predicts by length alone (variance retention, arXiv 1901.06588), and simulates what the
    accumulator's own rounding keeps of random sums. The second proves: no input in its range overflows in the channels
    counted, and the bias or width named would do for all. The data give shapes and ranges; no accuracy is measured.
    """
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    limits = None if input_max is None else read_range(input_max)
    found = _tables(load_recipe(recipe, one(accumulator), policy, weights), limits, examples)
    if as_json:
        rows = {name: table.to_dicts() for name, table in found.items()}
        typer.echo(json.dumps({"recipe": str(recipe), **rows}, ensure_ascii=False))
        return
    for name, table in found.items():
        if len(table):
            print_table(_rich(name, table))


def read_range(text: str) -> Any:
    """What `--input-max` says, as `fmaq.analysis.overflow_bounds` takes it.

    Raises:
        ValueError: it is no range.
    """
    from fmaq.analysis import input_range

    try:
        numbers = tuple(float(part) for part in text.split(","))
    except ValueError:
        input_range(text)
        return text
    if len(numbers) > 2:
        raise ValueError(f"--input-max takes one number or LOW,HIGH, got {text!r}")
    return input_range(numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1]))


def _tables(recipe: Recipe, limits: Any, examples: int) -> dict[str, Any]:
    """The tables by name. Mantissas are what floats have: an accumulator with a fixed format has the second alone."""
    import torch

    from fmaq.analysis import mantissa_needed, overflow_bounds
    from fmaq.analysis.calibration import call
    from fmaq.emulation import attach
    from fmaq.emulation.rule import FP32
    from fmaq.recipes.policies import emulating_policy, is_template
    from fmaq.recipes.run import prepare
    from fmaq.training.examples import first_inputs
    from fmaq.training.tasks import telling_of_the_batch

    policy = emulating_policy(recipe)
    ready = prepare(recipe)
    inputs = first_inputs(ready.test, examples)
    with torch.no_grad(), telling_of_the_batch(ready.model, inputs):
        call(ready.model, inputs)
    args, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    # No layer can be attached to an accumulator that lacks a bias, but all can be analysed for it.
    given = policy.accumulator if is_template(policy) else None
    attach(ready.model, policy if given is None else policy.replace(accumulator=FP32))
    mantissas = mantissa_needed(ready.model, *args, accumulator=given, **named)
    bounds = overflow_bounds(ready.model, *args, accumulator=given, input_max=limits, **named)
    if len(bounds) == 0:
        raise ValueError(f"none of the products of {type(ready.model).__name__} is emulated; see fmaq.coverage for why")
    return {"mantissa": mantissas, "overflow": bounds}


TITLES = {"mantissa": "Mantissa by length", "overflow": "Channels that cannot overflow"}
TEXT = ("layer", "product", "suitable", "inputs", "proves all", "not analysed")


def _rich(name: str, table: Any) -> Any:
    from rich import box
    from rich.table import Table

    shown = Table(
        box=box.SIMPLE_HEAD,
        title=TITLES[name],
        title_justify="left",
        caption=table.total(),
        caption_justify="left",
    )
    for heading in table.headings():
        shown.add_column(heading, justify="left" if heading in TEXT else "right")
    for cells in table.cells():
        shown.add_row(*cells)
    return shown
