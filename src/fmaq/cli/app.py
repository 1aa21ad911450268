"""The application and its commands; what a command needs is imported when it runs, so that `--help` is quick."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmaq.cli import analyze, bench, hardware, observe, reproduce
from fmaq.cli.console import print_table
from fmaq.cli.errors import interruptible
from fmaq.cli.recipes import (
    Accumulator,
    Accumulators,
    PolicyFile,
    RecipePath,
    Seed,
    Weights,
    in_recipe,
    load_recipe,
    next_command,
    one,
)

if TYPE_CHECKING:
    from fmaq.recipes.recipe import Recipe
    from fmaq.recipes.record import Record

app = typer.Typer(
    name="fmaq",
    help="Neural networks whose dot products are summed in low bit-width accumulators.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="Errors are one line and exit code 2 (bad input) or 1; add --debug for the traceback.",
)

Output = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder for the results, in place of the recipe's.")
]
Json = Annotated[bool, typer.Option("--json", help="Print the record as JSON, and nothing else, on standard output.")]
Device = Annotated[str, typer.Option(help="Where the model runs, a torch device.")]
Threads = Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")]


def _version(wanted: bool) -> None:
    if wanted:
        import fmaq

        typer.echo(f"fmaq {fmaq.__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq demo\n\n"
    "  fmaq demo --quick\n\n  fmaq demo --seed 1 -o demo-1\n\n  fmaq demo --json | jq .rows"
)
def demo(
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the results.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the weights and of the order of the examples.")] = 0,
    threads: Annotated[
        int, typer.Option(min=1, help="Threads; the network is so small that more than one gain little.")
    ] = 1,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer epochs: seconds, to see that everything runs.")] = False,
    as_json: Json = False,
) -> None:
    """Train a small CNN on digits, try ever smaller accumulators of three kinds, fine-tune those that suffer.

    It takes a minute or two, needs no network, and writes nothing outside its output folder.
    """
    _use_threads(threads)
    from fmaq.recipes.demo import run_demo
    from fmaq.training.progress import Bars

    with interruptible("interrupted; the demo starts over when it is run again"):
        record = run_demo(output, seed, Bars(), _say(as_json), quick=quick)
    _finish(record, output, "demo", as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq evaluate examples/digits/recipe.yaml\n\n"
    '  fmaq evaluate recipe.yaml -a fp32 -a paper12 -a "M5E4b10 product=M5E4b12"\n\n'
    "  fmaq evaluate recipe.yaml --policy runs/mine/calibrated.yaml --weights runs/mine/model.safetensors"
)
def evaluate(
    recipe: RecipePath,
    accumulators: Accumulators = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    output: Output = None,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Measure a network as it is, in float32, under a recipe's policy and under each of its accumulators.

    Writes evaluate.json, evaluate.csv, a plot and a page into the output folder, runs/<name> by default.
    """
    _use_threads(threads)
    from fmaq.recipes.run import run_evaluate
    from fmaq.training.progress import Bars

    loaded, folder = _open(load_recipe(recipe, accumulators or (), policy, weights, seed), output)
    _finish(run_evaluate(loaded, folder, device, Bars(), _say(as_json)), folder, "evaluate", as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq finetune examples/digits/recipe.yaml\n\n"
    '  fmaq finetune recipe.yaml -a "M5E4b10 product=M5E4b12" -o runs/10-bit\n\n'
    "  fmaq finetune recipe.yaml --policy runs/mine/calibrated.yaml --weights trained.safetensors\n\n"
    "  fmaq finetune recipe.yaml --fresh\n\n"
    "  torchrun --nproc-per-node 2 -m fmaq finetune recipe.yaml"
)
def finetune(
    recipe: RecipePath,
    accumulator: Accumulator = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    output: Output = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, overwriting the folder's checkpoint.")] = False,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Fine-tune a network under a recipe's policy, by its stages.

    An interrupted run goes on from its last checkpoint when the same command is given again, to the same bits.
    The output folder, runs/<name> by default, gets the model, a log, finetune.json, a plot and a page.
    """
    _use_threads(threads)
    from fmaq.recipes.run import run_finetune
    from fmaq.training.processes import is_main
    from fmaq.training.progress import Bars

    loaded, folder = _open(load_recipe(recipe, one(accumulator), policy, weights, seed), output)
    with interruptible():
        record = run_finetune(loaded, folder, device, Bars(), _say(as_json), resume=not fresh)
    if not is_main():
        return
    _finish(record, folder, "finetune", as_json)
    if not as_json and (own := folder / "policy.yaml").exists():
        typer.echo(f"next:   {next_command('evaluate', recipe, own, folder / 'model.safetensors')}")


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq calibrate examples/digits/recipe.yaml\n\n"
    "  fmaq calibrate recipe.yaml --per layer --per channel --batches 4\n\n"
    '  fmaq calibrate recipe.yaml -a "M7E4 product=M7E4" --chunk 16 --chunk 32\n\n'
    "  fmaq calibrate recipe.yaml --policy runs/mine/policy.yaml --ranges given\n\n"
    "  fmaq calibrate recipe.yaml --importance likelihood\n\n"
    "  fmaq calibrate recipe.yaml --policy by-hand.yaml --weights runs/mine/model.safetensors"
)
def calibrate(
    recipe: RecipePath,
    per: Annotated[
        list[str] | None,
        typer.Option(
            help="What has a bias of its own: model, layer, channel, or token (and channel; it costs the hardware an "
            "exponent found at run time). May be repeated; channel by default."
        ),
    ] = None,
    batches: Annotated[int, typer.Option(min=1, help="Of training examples, to calibrate on.")] = 2,
    chunk: Annotated[
        list[int] | None, typer.Option(min=1, help="Try this chunk for every product. May be repeated.")
    ] = None,
    rule: Annotated[
        str, typer.Option(help="trial: the least squared error of the sums; maximum: the largest just fits.")
    ] = "trial",
    gain: Annotated[bool, typer.Option(help="Fit gains, which undo the mean shrinkage of truncation.")] = True,
    ranges: Annotated[
        str,
        typer.Option(
            help="Of the operands' formats: static, chosen here; dynamic, found at run time, so that results depend on "
            "the batch; given, those of the policy."
        ),
    ] = "static",
    importance: Annotated[
        str | None,
        typer.Option(
            help="What an error matters where one choice is for all channels: by its channel's own size, or by the "
            "gradient of the output, taken as logits (likelihood) or as any numbers (projection), which takes longer."
        ),
    ] = None,
    accumulators: Accumulators = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    output: Output = None,
    device: Device = "cpu",
    threads: Threads = None,
    seed: Seed = None,
    as_json: Json = False,
) -> None:
    """Choose biases, offsets, gains and ranges of operands on training examples, and measure what that gives.

    Every accumulator of the recipe is measured as given, if it has biases, and calibrated. The output folder,
    runs/<name> by default, gets each calibrated policy as YAML (for --policy, or a recipe's key policy), the record,
    plot and page.
    """
    _use_threads(threads)
    from fmaq.analysis.importance import scalar_named
    from fmaq.recipes.calibrated import run_calibrate
    from fmaq.training.progress import Bars

    scalar = scalar_named(importance)
    loaded, folder = _open(load_recipe(recipe, accumulators or (), policy, weights, seed), output)
    pers: Any = tuple(per or ["channel"])
    how: dict[str, Any] = {"rule": rule, "gain": gain, "shift": gain, "chunks": chunk or (), "ranges": ranges}
    how["importance"] = scalar
    record = run_calibrate(loaded, folder, pers, batches, device, Bars(), _say(as_json), **how)
    _finish(record, folder, "calibrate", as_json)
    if not as_json and record.best is not None and record.best.policy is not None:
        file = folder / record.best.policy
        typer.echo(f"next:   {next_command('evaluate', recipe, file)}")
        typer.echo(f"        or in {recipe}:  policy: {in_recipe(file, recipe)}")


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq report runs/demo/demo.json\n\n  fmaq report runs/*/evaluate.json -o figures"
)
def report(
    records: Annotated[list[Path], typer.Argument(metavar="RECORD", help="JSON files of runs.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Folder for plots and pages, in place of the records' own.")
    ] = None,
) -> None:
    """Show what demo, evaluate, finetune or calibrate recorded: the table again, and a new plot and page."""
    from fmaq.recipes.record import Record
    from fmaq.report import rich_table, write_report

    for path in records:
        record = Record.load(path)
        written = write_report(record, output or path.parent, f"{record.name}-{path.stem}" if output else path.stem)
        print_table(rich_table(record))
        for what, file in (("plot", written.plot), ("report", written.page)):
            typer.echo(f"{what + ':':<8}{file}")


def _open(recipe: Recipe, output: Path | None) -> tuple[Recipe, Path]:
    """The recipe, and the folder for its results, made."""
    from fmaq.training.files import made_folder

    return recipe, made_folder(output or recipe.output or Path("runs") / recipe.name)


def _use_threads(threads: int | None) -> None:
    if threads is not None:
        import torch

        torch.set_num_threads(threads)


def _say(as_json: bool) -> Any:
    """Where a run's lines go: standard error if JSON has standard output to itself."""

    def say(line: str) -> None:
        typer.echo(line, err=as_json)

    return say


def _finish(record: Record, folder: Path, name: str, as_json: bool) -> None:
    """Write the report, and print the table and where everything is."""
    from dataclasses import asdict

    from fmaq.report import rich_table, write_report

    written = write_report(record, folder, name)
    if as_json:
        typer.echo(json.dumps(asdict(record), ensure_ascii=False))
        return
    print_table(rich_table(record))
    for what, path in (("plot", written.plot), ("report", written.page), ("record", folder / f"{name}.json")):
        typer.echo(f"{what + ':':<8}{path}")


app.command(epilog=observe.EPILOG)(observe.observe)

app.command(epilog=analyze.EPILOG)(analyze.analyze)

app.command(epilog=bench.EPILOG)(bench.bench)

app.command(epilog=reproduce.EPILOG)(reproduce.reproduce)

app.add_typer(hardware.app, name="hardware")
