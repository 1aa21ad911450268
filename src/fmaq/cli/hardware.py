"""`fmaq hardware`: what an accumulator costs in gates, and its RTL."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmaq.cli.formats import hardware as formats
from fmaq.cli.recipes import Accumulator, PolicyFile, RecipePath, Weights, load_recipe, one

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.table import Table

    from fmaq.hardware.cost import MacSynthesis

app = typer.Typer(
    help="What an accumulator costs: area, delay and energy of its unit, and the RTL to take away.",
    no_args_is_help=True,
    rich_markup_mode="rich",
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware formats paper12\n\n"
    "  fmaq hardware synthesize paper12 M23E8b127\n\n  fmaq hardware table",
)

Names = Annotated[
    list[str],
    typer.Argument(
        metavar="ACCUMULATOR...",
        help='Such as paper12, "M7E4b10 product=M7E4b12", I16f8, or the baselines ieee32 and ieee16.',
        show_default=False,
    ),
]
Name = Annotated[str, typer.Argument(metavar="ACCUMULATOR", help="Such as paper12.", show_default=False)]
Weight = Annotated[str, typer.Option("--weight", "-w", help='Format of the weights, like "M4E3", "M4E3b5" or "int8".')]
Activation = Annotated[str, typer.Option("--activation", "-x", help="Format of the activations.")]
Liberty = Annotated[
    str, typer.Option("--liberty", "--library", "-l", help="unit (our own cells), osu018, osu035, or a Liberty file.")
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

app.command(
    name="formats",
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware formats paper12\n\n"
    '  fmaq hardware formats "M5E4b10 product=M5E4b12" --json',
)(formats)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware estimate paper12 M10E5b16 M23E8b127\n\n"
    "  fmaq hardware estimate I32f0 --weight int8 --activation int8 --components"
)
def estimate(
    accumulators: Names,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    components: Annotated[bool, typer.Option("--components", help="Show each component and its formula.")] = False,
    as_json: Json = False,
) -> None:
    """Count gates by formulas: instant, and no more than that."""
    from fmaq.hardware.gatecount import estimate as count

    results = [count(text, weight, activation) for text in accumulators]
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results]))
        return
    rows = [[text, f"{r.area:.0f}", f"{r.delay:.1f}"] for text, r in zip(accumulators, results, strict=True)]
    _print(["accumulator", "area (NAND2)", "delay (FO4)"], rows)
    if components:
        for text, result in zip(accumulators, results, strict=True):
            parts = [[c.name, c.formula, f"{c.gates:.0f}", f"{c.depth:.1f}"] for c in result.components]
            _print(["component", "formula", "gates", "depth (FO4)"], parts, title=text, left=2)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware synthesize paper12 M23E8b127\n\n"
    "  fmaq hardware synthesize paper12 --liberty osu018 --part mac"
)
def synthesize(
    accumulators: Names,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    liberty: Liberty = "unit",
    part: Annotated[str, typer.Option(help="unit: the combinational FMAq. mac: with registers and merging.")] = "unit",
    as_json: Json = False,
) -> None:
    """Synthesize units: area, delay, energy, and the front from the smallest to the fastest netlist."""
    from fmaq.hardware import cost, find_library

    library = find_library(liberty)
    if part not in ("unit", "mac"):
        raise ValueError(f"part must be unit or mac, got {part!r}")
    if part == "mac":
        _macs([cost.synthesize_mac(text, weight, activation, library) for text in accumulators], accumulators, as_json)
        return
    results = [cost.synthesize(text, weight, activation, library) for text in accumulators]
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results]))
        return
    rows = []
    for text, result in zip(accumulators, results, strict=True):
        for index, point in enumerate(result.front):
            first = index == 0
            energy = f"{result.energy:.0f}" if first else ""
            rows.append(
                [
                    text if first else "",
                    point.recipe,
                    f"{point.area:.0f}",
                    f"{point.delay:.2f}",
                    str(point.levels),
                    energy,
                ]
            )
    units = (f"delay ({library.delay_unit})", "levels", f"energy ({library.energy_unit})")
    title = f"{weight} weights, {activation} activations, library {library.name}"
    _print(["accumulator", "netlist", "area (NAND2)", *units], rows, title=title, left=2)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware rtl paper12 -o fmaq.v\n\n"
    "  fmaq hardware rtl paper12 --part mac -o mac.v"
)
def rtl(
    accumulator: Name,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    part: Annotated[
        str, typer.Option(help="unit: the combinational FMAq. mac: with chunks, registers and merging.")
    ] = "unit",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Verilog file; standard output without.")
    ] = None,
) -> None:
    """Write the Verilog of an accumulator's unit, or of the chunked multiply-accumulate around it."""
    from fmaq.hardware.unit import Unit
    from fmaq.hardware.verilog import verilog

    text = verilog(Unit.of(accumulator, weight, activation), part)
    if output is None:
        typer.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        typer.echo(f"verilog: {output}")


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware prove paper12\n\n"
    "  fmaq hardware prove paper12 M3E3b4 -l osu018 --iverilog\n\n  fmaq hardware prove -l unit -l osu018"
)
def prove(
    accumulators: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ACCUMULATOR...]", help="Those of `fmaq hardware table` without.", show_default=False),
    ] = None,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    liberty: Annotated[
        list[str] | None, typer.Option("--liberty", "-l", help="Libraries; unit, our own cells, without.")
    ] = None,
    vectors: Annotated[int, typer.Option(min=1, help="Where trying all inputs is too much.")] = 100_000,
    iverilog: Annotated[bool, typer.Option("--iverilog", help="Simulate the Verilog by Icarus Verilog too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare RTL and netlists with the reference, bit for bit; exit code 1 if anything differs."""
    from fmaq.hardware import find_library
    from fmaq.hardware.proof import prove as compare
    from fmaq.hardware.table import STUDIES
    from fmaq.hardware.unit import Unit

    wanted = [(text, weight, activation) for text in accumulators or []]
    wanted = wanted or [(text, s.operands, s.operands) for s in STUDIES.values() for text in s.accumulators]
    libraries = [find_library(name) for name in liberty or ["unit"]]
    units = [Unit.of(*names) for names in wanted]
    proofs = [compare(unit, libraries, vectors, iverilog=iverilog) for unit in units]
    if as_json:
        typer.echo(json.dumps([asdict(proof) for proof in proofs]))
    else:
        rows = []
        for (text, *operands), proof in zip(wanted, proofs, strict=True):
            tried = f"{proof.vectors:,}" + (" (all)" if proof.exhaustive else "")
            wrong = ", ".join(f"{name}: {count}" for name, count in proof.mismatches.items() if count)
            rows.append([text, " x ".join(operands), tried, str(len(proof.mismatches)), wrong or "0"])
        _print(["accumulator", "operands", "vectors", "designs", "mismatches"], rows, left=2)
    if not all(proof.holds for proof in proofs):
        raise typer.Exit(1)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware table\n\n"
    "  fmaq hardware table -l unit -l osu018 --operands int8 --markdown"
)
def table(
    operands: Annotated[str, typer.Option(help="M4E3 or int8: which accumulators are compared.")] = "M4E3",
    liberty: Annotated[
        list[str] | None, typer.Option("--liberty", "-l", help="Libraries; all that are installed without.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for a plot and the JSON.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_json: Json = False,
) -> None:
    """Area, delay and energy by accumulator, and ratios to the 32- and 16-bit baselines: minutes the first time."""
    from rich.progress import Progress

    from fmaq.hardware import find_library, installed_libraries
    from fmaq.hardware import table as tables

    if operands not in tables.STUDIES:
        raise ValueError(f"operands must be one of {', '.join(tables.STUDIES)}, got {operands!r}")
    study = tables.STUDIES[operands]
    libraries = [find_library(name) for name in liberty or installed_libraries()]
    found = {}
    with Progress(transient=True, disable=as_json or markdown) as bars:
        task = bars.add_task("synthesis", total=len(libraries) * len(study.accumulators))
        for library in libraries:
            found[library.name] = tables.run_study(study, library, progress=lambda _: bars.advance(task))
    record = {name: [asdict(row) for row in rows] for name, rows in found.items()}
    for library in libraries if not as_json else []:
        rows = found[library.name]
        if markdown:
            typer.echo(tables.markdown(study, library, rows) + "\n")
        else:
            units = f"delay in {library.delay_unit}, energy in {library.energy_unit}"
            title = f"{operands} operands, library {library.name}: area in NAND2 equivalents, {units}"
            _print([*tables.COLUMNS, *tables.RATIOS], [tables.cells(row) for row in rows], title=title)
    if as_json:
        typer.echo(json.dumps(record))
    if output is not None:
        from fmaq.hardware.plot import save_plot

        output.mkdir(parents=True, exist_ok=True)
        (output / "hardware.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        save_plot(found, output / "hardware.png")
        typer.echo(f"plot: {output / 'hardware.png'}", err=as_json)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware model examples/digits/recipe.yaml\n\n"
    "  fmaq hardware model recipe.yaml -a paper12 --examples 8 -l osu018\n\n"
    "  fmaq hardware model recipe.yaml --policy runs/mine/policy.yaml --weights runs/mine/model.safetensors"
)
def model(
    recipe: RecipePath,
    accumulator: Accumulator = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    liberty: Liberty = "unit",
    examples: Annotated[int, typer.Option(min=1, help="Test examples that the model runs on.")] = 4,
    as_json: Json = False,
) -> None:
    """Energy by layer: operations times the energy of one, over the layer's own weights and activations."""
    from fmaq.cli.hardware_model import record_model
    from fmaq.hardware import find_library
    from fmaq.hardware.layers import energy_by_layer

    loaded = load_recipe(recipe, one(accumulator), policy, weights, changes={"data.limit": examples})
    library = find_library(liberty)
    recording = record_model(loaded, weight, activation)
    costs = energy_by_layer(recording.layers, library)
    rows = [
        {
            "layer": cost.layer.name,
            "accumulator": cost.layer.accumulator,
            "operations": cost.layer.macs / recording.examples,
            "operation": cost.operation,
            "energy": cost.total / recording.examples,
            "to_32_bit": cost.operation / cost.baseline,
            "operands": "recorded" if cost.layer.streams else "gaussian",
        }
        for cost in costs
    ]
    total, baseline = sum(cost.total for cost in costs), sum(cost.baseline_total for cost in costs)
    if as_json:
        typer.echo(json.dumps({"layers": rows, "library": library.name, "to_32_bit": total / baseline}))
        return
    lines = [
        [
            str(row["layer"]),
            str(row["accumulator"]).split()[0],
            str(row["operands"]),
            *(
                f"{row['operations']:,.0f}",
                f"{row['operation']:.0f}",
                f"{row['energy']:.3g}",
                f"{row['to_32_bit']:.2f}",
            ),
        ]
        for row in rows
    ]
    each = total / recording.examples
    lines.append(["all", "", "", "", "", f"{each:.3g}", f"{total / baseline:.2f}"])
    names = ["layer", "accumulator", "operands", "operations", "of one", "energy", "to 32-bit"]
    title = (
        f"Energy of one example in {library.energy_unit}, library {library.name}: no glitches, wires, memory, registers"
    )
    _print(names, lines, title=title, left=3)


def _macs(results: Sequence[MacSynthesis], accumulators: Sequence[str], as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results]))
        return
    rows = [
        [text, f"{r.area:.0f}", str(r.flip_flops), f"{r.flip_flop_area:.0f}", f"{r.delay:.1f}"]
        for text, r in zip(accumulators, results, strict=True)
    ]
    delay = f"delay ({results[0].delay_unit})"
    title = f"chunked multiply-accumulate, library {results[0].library}"
    _print(["accumulator", "area (NAND2)", "flip-flops", "their area", delay], rows, title=title)


def _print(names: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, left: int = 1) -> None:
    """A table, as wide as it is where nobody's terminal limits it; the first `left` columns are words."""
    from rich.console import Console

    shown = _table(names, rows, title, left)
    console = Console()
    width = None if console.is_terminal else max(console.width, Console(width=1000).measure(shown).maximum)
    Console(width=width).print(shown)


def _table(names: Sequence[str], rows: Sequence[Sequence[str]], title: str | None, left: int) -> Table:
    from rich import box
    from rich.table import Table

    options: dict[str, Any] = {"title": title, "title_justify": "left"} if title else {}
    shown = Table(box=box.SIMPLE_HEAD, **options)
    for index, name in enumerate(names):
        shown.add_column(name, justify="left" if index < left else "right")
    for row in rows:
        shown.add_row(*row)
    return shown
