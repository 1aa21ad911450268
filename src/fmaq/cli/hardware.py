"""`fmaq hardware`: what an accumulator costs in gates, and its RTL."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fmaq.cli.formats import hardware as formats
from fmaq.cli.hardware_output import (
    print_csv,
    print_rows,
    refuse_both,
    warn_of_library,
    warn_of_unlike,
    warnings_in_yellow,
)
from fmaq.cli.recipes import Accumulator, PolicyFile, RecipePath, Weights, load_recipe, one

if TYPE_CHECKING:
    from fmaq.hardware.cost import Synthesis
    from fmaq.hardware.table import Study

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
Part = Annotated[
    str,
    typer.Option(
        help="unit: the combinational FMAq. mac: with chunks, registers and merging. shared: as many of these as a "
        "chunk has steps, which share a merging adder.",
    ),
]
PartOfCost = Annotated[
    str,
    typer.Option(
        "--part",
        help="unit, mac, or shared: a mac whose merging adder serves as many as a chunk has steps (its share).",
    ),
]
ModuleName = Annotated[
    str, typer.Option("--name", help="Of the top module; the names of those inside start with it.", show_default=True)
]
Csv = Annotated[bool, typer.Option("--csv", help="Print CSV, and nothing else, on standard output.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON, and nothing else, on standard output.")]

app.command(
    name="formats",
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware formats paper12\n\n"
    '  fmaq hardware formats "M5E4b10 product=M5E4b12" --json',
)(formats)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware estimate paper12 M10E5b16 M23E8b127\n\n"
    "  fmaq hardware estimate I32f0 --weight int8 --activation int8 --components\n\n"
    "  fmaq hardware estimate paper12 I16f10 --csv > gates.csv"
)
def estimate(
    accumulators: Names,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    components: Annotated[bool, typer.Option("--components", help="Show each component and its formula.")] = False,
    as_csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Count gates by formulas: instant, and no more than that."""
    from fmaq.hardware.gatecount import estimate as count
    from fmaq.hardware.unit import Unit

    refuse_both(as_json, as_csv)
    results = [count(text, weight, activation) for text in accumulators]
    warn_of_unlike([Unit.of(text, weight, activation) for text in accumulators])
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results]))
        return
    pairs = list(zip(accumulators, results, strict=True))
    if as_csv:
        fields = ("bits", "product", "product_bits", "area", "delay", "delay_unit")
        operands = {"weight": weight, "activation": activation}
        print_csv([operands | {"accumulator": text} | {name: getattr(r, name) for name in fields} for text, r in pairs])
        return
    rows = [[text, str(r.bits), r.product, str(r.product_bits), f"{r.area:.0f}", f"{r.delay:.1f}"] for text, r in pairs]
    title = f"{weight} weights, {activation} activations"
    print_rows(["accumulator", "bits", "product", "its bits", "area (NAND2)", "delay (FO4)"], rows, title)
    for text, result in pairs if components else []:
        parts = [[c.name, c.formula, f"{c.gates:.0f}", f"{c.depth:.1f}"] for c in result.components]
        print_rows(["component", "formula", "gates", "depth (FO4)"], parts, title=text, words=2)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware synthesize paper12 M23E8b127\n\n"
    "  fmaq hardware synthesize paper12 --liberty osu018 --part mac\n\n"
    '  fmaq hardware synthesize "M5E4b10h product=M5E4b12h outer=M10E5b16" --part shared\n\n'
    "  fmaq hardware synthesize I16f0 I32f0 -w int8 -x int8 --csv > front.csv"
)
def synthesize(
    accumulators: Names,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    liberty: Liberty = "unit",
    part: PartOfCost = "unit",
    as_csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Synthesize units: area, delay, energy, and the front from the smallest to the fastest netlist."""
    from fmaq.hardware import cost, find_library
    from fmaq.hardware.table import PARTS
    from fmaq.hardware.unit import Unit

    refuse_both(as_json, as_csv)
    runs = {"unit": cost.synthesize, "mac": cost.synthesize_mac, "shared": cost.synthesize_shared}
    run = runs[cost.check_part(part)]
    library = find_library(liberty)
    warn_of_library(library)
    warn_of_unlike([Unit.of(text, weight, activation) for text in accumulators])
    results = {text: run(text, weight, activation, library) for text in accumulators}
    if as_json:
        typer.echo(json.dumps([asdict(result) for result in results.values()]))
        return
    if as_csv:
        of_all = {"weight": weight, "activation": activation, "part": part}
        print_csv([of_all | record for text, result in results.items() for record in _front(text, result)])
        return
    rows = [_shown(record, index) for text, r in results.items() for index, record in enumerate(_front(text, r))]
    names = ["accumulator", "bits", "product", "its bits", "netlist", "area (NAND2)"]
    names += [f"delay ({library.delay_unit})", "levels", f"energy ({library.energy_unit})"]
    names += ["flip-flops", "their area"] if part != "unit" else []
    what = f"{PARTS[part]}, ".removeprefix(", ")
    print_rows(names, rows, title=f"{what}{weight} weights, {activation} activations, library {library.name}")


def _front(accumulator: str, result: Synthesis) -> list[dict[str, Any]]:
    """A record for each netlist of the front, the smallest first, which alone has an energy."""
    fields = ("bits", "product", "product_bits", "library", "delay_unit", "energy_unit")
    given = {"accumulator": accumulator} | {name: getattr(result, name) for name in fields}
    of_mac = {name: getattr(result, name) for name in ("flip_flops", "flip_flop_area") if hasattr(result, name)}
    return [
        given | asdict(point) | {"energy": None if index else result.energy} | of_mac
        for index, point in enumerate(result.front)
    ]


def _shown(record: dict[str, Any], index: int) -> list[str]:
    """A netlist's row; only an accumulator's first says what is the same for all of its netlists."""
    own = [record["recipe"], f"{record['area']:.0f}", f"{record['delay']:.2f}", str(record["levels"])]
    if index:
        return ["", "", "", "", *own, *[""] * (3 if "flip_flops" in record else 1)]
    whole = [record["accumulator"], str(record["bits"]), record["product"], str(record["product_bits"])]
    of_mac = [str(record["flip_flops"]), f"{record['flip_flop_area']:.0f}"] if "flip_flops" in record else []
    return [*whole, *own, f"{record['energy']:.0f}", *of_mac]


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware rtl paper12 -o fmaq.v\n\n"
    "  fmaq hardware rtl paper12 --part mac -o mac.v\n\n"
    "  fmaq hardware rtl M5E4b10 --part mac --name mac10 -o mac10.v\n\n"
    '  fmaq hardware rtl "M4E4b10h product=M4E4b12h outer=M10E5b16" --part shared --name macs -o macs.v'
)
def rtl(
    accumulator: Name,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    part: Part = "unit",
    name: ModuleName = "fmaq",
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Verilog file; standard output without.")
    ] = None,
) -> None:
    """Write the Verilog of an accumulator's unit, of the multiply-accumulate around it, or of many that share an adder.

    Designs of different names can be simulated together: no module of one has a name of the other's.
    """
    from fmaq.hardware.unit import Unit
    from fmaq.hardware.verilog import verilog

    text = verilog(Unit.of(accumulator, weight, activation), part, name)
    if output is None:
        typer.echo(text)
    else:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text, encoding="utf-8")
        typer.echo(f"verilog: {output}")


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware testbench paper12 -o bench\n\n"
    "  fmaq hardware testbench paper12 --part mac --name mac12 --vectors 2000 -o bench\n\n"
    "  fmaq hardware testbench paper12 --part shared --name macs --vectors 160 -o bench\n\n"
    "  cd bench && iverilog -g2012 -o mac12_tb mac12_tb.v mac12.v && vvp -n mac12_tb"
)
def testbench(
    accumulator: Name,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    part: Part = "unit",
    name: ModuleName = "fmaq",
    vectors: Annotated[
        int, typer.Option(min=1, help="Of a unit (few inputs: all); else dot products of 37 steps.")
    ] = 1000,
    seed: Annotated[int, typer.Option(min=0, help="Of the vectors.")] = 0,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the files.")] = Path("bench"),
) -> None:
    """Write the Verilog with a test bench that checks itself, for any simulator: stimulus, and what must come out.

    The bench prints PASS, or ends in an error that says how many codes differ.
    """
    from fmaq.hardware.testbench import testbench as files_of
    from fmaq.hardware.unit import Unit

    files = files_of(Unit.of(accumulator, weight, activation), part, name, vectors, seed)
    output.mkdir(parents=True, exist_ok=True)
    for file, text in files.items():
        (output / file).write_text(text, encoding="utf-8")
        typer.echo(f"{output / file}")
    typer.echo(f"run: iverilog -g2012 -o {name}_tb {name}_tb.v {name}.v && vvp -n {name}_tb")


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware prove paper12\n\n"
    "  fmaq hardware prove paper12 M3E3b4 -l osu018 --iverilog\n\n"
    "  fmaq hardware prove paper12 M23E8b127 -w int8 -x int8 --part mac\n\n"
    '  fmaq hardware prove "M4E4b10h product=M4E4b12h outer=M10E5b16" --part shared\n\n'
    "  fmaq hardware prove -l unit -l osu018 --part unit"
)
def prove(
    accumulators: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[ACCUMULATOR...]",
            help="Without: units of all lists of `fmaq hardware table` and of every other rounding, and some macs.",
            show_default=False,
        ),
    ] = None,
    weight: Weight = "M4E3",
    activation: Activation = "M4E3",
    liberty: Annotated[
        list[str] | None, typer.Option("--liberty", "-l", help="Libraries; unit, our own cells, without.")
    ] = None,
    part: Annotated[
        str | None, typer.Option(help="unit, mac or shared, as of rtl; unit without, and all without accumulators.")
    ] = None,
    vectors: Annotated[
        int, typer.Option(min=1, help="Where trying all inputs is too much; steps of multiply-accumulates.")
    ] = 100_000,
    iverilog: Annotated[bool, typer.Option("--iverilog", help="Simulate the Verilog by Icarus Verilog too.")] = False,
    as_json: Json = False,
) -> None:
    """Compare RTL and netlists with the reference, bit for bit; exit code 1 if anything differs."""
    from rich.progress import Progress

    from fmaq.hardware import find_library
    from fmaq.hardware.cost import DESIGNS, check_part
    from fmaq.hardware.proof import prove as compare
    from fmaq.hardware.table import proven
    from fmaq.hardware.unit import Unit

    parts = [check_part(part or "unit")] if part or accumulators else list(DESIGNS)
    own = [(text, weight, activation) for text in accumulators or []]
    wanted = [(part, *names) for part in parts for names in own or proven(part)]
    libraries = [find_library(name) for name in liberty or ["unit"]]
    units = [Unit.of(*names) for _, *names in wanted]
    with Progress(transient=True, disable=as_json) as bars:
        proofs = [
            compare(unit, libraries, vectors, iverilog=iverilog, part=part)
            for unit, (part, *_) in bars.track(list(zip(units, wanted, strict=True)), description="proof")
        ]
    if as_json:
        records = zip(wanted, proofs, strict=True)
        typer.echo(json.dumps([asdict(proof) | {"part": part} for (part, *_), proof in records]))
    else:
        rows = []
        for (part, text, *operands), unit, proof in zip(wanted, units, proofs, strict=True):
            tried = f"{proof.vectors:,}" + (" (all)" if proof.exhaustive else "")
            wrong = ", ".join(f"{name}: {count}" for name, count in proof.mismatches.items() if count)
            product = "exact" if unit.product is None else str(unit.product)
            bits = (str(unit.format.bits), product, str(unit.product_bits))
            rows.append([text, " x ".join(operands), part, *bits, tried, str(len(proof.mismatches)), wrong or "0"])
        names = ["accumulator", "operands", "part", "bits", "product", "its bits"]
        print_rows([*names, "vectors or steps", "designs", "mismatches"], rows, words=3)
        comparisons = sum(proof.vectors * len(proof.mismatches) for proof in proofs)
        designs, faults = sum(len(p.mismatches) for p in proofs), sum(sum(p.mismatches.values()) for p in proofs)
        typer.echo(f"{comparisons:,} comparisons in {designs} designs, {faults} mismatches")
    if not all(proof.holds for proof in proofs):
        raise typer.Exit(1)


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware table\n\n"
    "  fmaq hardware table -l unit -l osu018 --operands int8 --markdown\n\n"
    "  fmaq hardware table --operands levels -l unit --part all\n\n"
    "  fmaq hardware table --operands roundings -l osu018 --markdown\n\n"
    '  fmaq hardware table paper12 "M5E4b10 product=M5E4b12" I16f10 -l unit --part mac\n\n'
    "  fmaq hardware table I14f0 I18f0 -w int8 -x int4 -l unit --csv > mine.csv"
)
def table(
    accumulators: Annotated[
        list[str] | None,
        typer.Argument(metavar="[ACCUMULATOR...]", help="Your own list, beside baselines.", show_default=False),
    ] = None,
    operands: Annotated[
        str,
        typer.Option(
            help="M4E3, int8, levels or roundings: which of the documentation's lists, without one of your own."
        ),
    ] = "M4E3",
    weight: Annotated[
        str | None, typer.Option("--weight", "-w", help="Format of the weights of your list; --operands without.")
    ] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", "-x", help="Format of the activations; --operands without.")
    ] = None,
    wide: Annotated[
        str, typer.Option(help="The 32-bit baseline; without, M23E8b127, or I32f0 for integers.", show_default=False)
    ] = "",
    half: Annotated[
        str, typer.Option(help="The 16-bit baseline; without, M10E5b16, or I16f0.", show_default=False)
    ] = "",
    part: Annotated[
        str, typer.Option(help="unit, mac or shared, as of synthesize; all: the three of them side by side.")
    ] = "unit",
    liberty: Annotated[
        list[str] | None, typer.Option("--liberty", "-l", help="Libraries; all that are installed without.")
    ] = None,
    output: Annotated[Path | None, typer.Option("--output", "-o", help="Folder for a plot and the JSON.")] = None,
    markdown: Annotated[bool, typer.Option("--markdown", help="Print the tables as Markdown.")] = False,
    as_csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Area, delay and energy by accumulator, and ratios to the 32- and 16-bit baselines: minutes the first time."""
    from rich.progress import Progress

    from fmaq.hardware import find_library, installed_libraries
    from fmaq.hardware import table as tables

    refuse_both(as_json, as_csv)
    if accumulators or weight or activation or wide or half:
        chosen = accumulators or list(_study(operands).accumulators)
        of_list = tables.STUDIES.get(operands)
        both = (operands, operands) if of_list is None else (of_list.weight, of_list.activation)
        study = tables.study_of(chosen, weight or both[0], activation or both[1], wide, half)
    else:
        study = _study(operands)
    libraries = [find_library(name) for name in liberty or installed_libraries()]
    for library in libraries:
        warn_of_library(library)
    if study.warning:
        warn_of_unlike([study.unit(text) for text in study.accumulators])
    parts = list(tables.PARTS) if part == tables.ALL else [part]
    found = {}
    with Progress(transient=True, disable=as_json or as_csv or markdown) as bars:
        task = bars.add_task("synthesis", total=len(libraries) * len(study.accumulators) * len(parts))
        for library in libraries:
            found[library.name] = {
                part: tables.run_study(study, library, progress=lambda _: bars.advance(task), part=part)
                for part in parts
            }
    for library in libraries if not (as_json or as_csv) else []:
        rows = found[library.name]
        if markdown:
            typer.echo(tables.markdown(study, library, rows) + "\n")
        else:
            title = f"{tables.title(study, library, part)}: {tables.units(library)}"
            print_rows(tables.columns(part), tables.lines(rows), title=title)
    of_parts = {name: {p: [asdict(row) for row in rows] for p, rows in by.items()} for name, by in found.items()}
    record = of_parts if part == tables.ALL else {name: by[part] for name, by in of_parts.items()}
    if as_json:
        typer.echo(json.dumps(record))
    if as_csv:
        print_csv([tables.record(study, row, p) for by in found.values() for p, rows in by.items() for row in rows])
    if output is not None:
        from fmaq.hardware.plot import save_plot

        output.mkdir(parents=True, exist_ok=True)
        (output / "hardware.json").write_text(json.dumps(record, indent=1), encoding="utf-8")
        plots = {", ".join((name, p)[: len(parts)]): rows for name, by in found.items() for p, rows in by.items()}
        save_plot(plots, output / "hardware.png")
        typer.echo(f"plot: {output / 'hardware.png'}", err=as_json or as_csv)


def _study(operands: str) -> Study:
    """One of the documentation's lists."""
    from fmaq.hardware.table import STUDIES

    if operands not in STUDIES:
        raise ValueError(
            f"operands must be one of {', '.join(STUDIES)}, got {operands!r}; for others give accumulators, -w and -x"
        )
    return STUDIES[operands]


@app.command(
    epilog="[bold]Examples[/bold]\n\n  fmaq hardware model examples/digits/recipe.yaml\n\n"
    "  fmaq hardware model recipe.yaml -a paper12 --examples 8 -l osu018\n\n"
    '  fmaq hardware model recipe.yaml -a "M4E4b10h product=M4E4b12h outer=M10E5b16" --adder shared\n\n'
    "  fmaq hardware model recipe.yaml --policy runs/mine/policy.yaml --weights runs/mine/model.safetensors\n\n"
    "  fmaq hardware model recipe.yaml -a I24f0 -w int8 -x int8 --csv > energy.csv"
)
def model(
    recipe: RecipePath,
    accumulator: Accumulator = None,
    policy: PolicyFile = None,
    weights: Weights = None,
    weight: Annotated[
        str | None,
        typer.Option("--weight", "-w", help="Format of weights that the policy leaves in float32; M4E3 without."),
    ] = None,
    activation: Annotated[
        str | None, typer.Option("--activation", "-x", help="The same of activations; M4E3 without.")
    ] = None,
    liberty: Liberty = "unit",
    adder: Annotated[
        str,
        typer.Option(help="Of chunks' sums: own, one for each unit; shared, one for as many as a chunk has steps."),
    ] = "own",
    examples: Annotated[int, typer.Option(min=1, help="Test examples that the model runs on.")] = 4,
    as_csv: Csv = False,
    as_json: Json = False,
) -> None:
    """Energy by layer: steps and merges times the energy of one, over the layer's own weights and activations.

    In Python: fmaq.analysis.model_energy(model, policy, inputs).
    """
    from fmaq.analysis.energy import HEADS
    from fmaq.cli.hardware_model import recipe_energy
    from fmaq.hardware import find_library

    refuse_both(as_json, as_csv)
    loaded = load_recipe(recipe, one(accumulator), policy, weights, changes={"data.limit": examples})
    library = find_library(liberty)
    warn_of_library(library)
    with warnings_in_yellow():
        found = recipe_energy(loaded, weight, activation, library, adder)
    if as_json:
        record = {"layers": found.to_dicts(), "library": library.name, "to_32_bit": found.ratio}
        typer.echo(json.dumps(record))
    elif as_csv:
        print_csv(found.to_dicts())
    else:
        print_rows(HEADS, found.cells(), title=found.title, words=2)
