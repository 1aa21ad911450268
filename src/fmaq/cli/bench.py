"""`fmaq bench`: speed and memory as ratios to float32 torch in the same process, and two such runs side by side."""

from __future__ import annotations

import os
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer

from fmaq.cli.console import print_table, print_warning
from fmaq.cli.errors import INTERRUPTED, print_error

EPILOG = (
    "[bold]Examples[/bold]\n\n  fmaq bench --json before.json\n\n  fmaq bench -s gemm --sizes 256,512 --threads 2\n\n"
    "  fmaq bench -s gemm -s conv --target avx2\n\n  fmaq bench --compare before.json after.json\n\n"
    "  fmaq bench --profile --sizes 256,1024"
)

# With another target, torch's libraries may use no more than that either: a fair ratio, that of a smaller machine. They
# read these when they load.
TORCH_LIMITS = {
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_ENABLE_INSTRUCTIONS": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "sse2": {"ATEN_CPU_CAPABILITY": "default", "MKL_ENABLE_INSTRUCTIONS": "SSE4_2", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def bench(
    suite: Annotated[
        list[str] | None,
        typer.Option(
            "--suite",
            "-s",
            help="gemm, conv, networks, decoding, training, gradients, memory or start; may be repeated. All.",
        ),
    ] = None,
    threads: Annotated[int, typer.Option(min=1, help="Of both sides.")] = 1,
    target: Annotated[
        str | None,
        typer.Option(help="avx512, avx2, sse2 or neon; torch may use no more either. The fastest that there is."),
    ] = None,
    sizes: Annotated[
        str | None, typer.Option(metavar="N,N...", help="Of the suite gemm's products N×N×N.", show_default=False)
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="How often each pair is timed in turn.")] = 9,
    output: Annotated[
        Path | None, typer.Option("--json", metavar="OUT", help="Write the rows here too, after each of them.")
    ] = None,
    profile: Annotated[
        bool, typer.Option("--profile", help="Show where the time of products goes, part by part, on one thread.")
    ] = False,
    compare: Annotated[
        tuple[Path, Path] | None,
        typer.Option(metavar="OLD NEW", help="Measure nothing; show two files of --json side by side."),
    ] = None,
) -> None:
    """Measure what emulation costs, against float32 torch (or the plain network) in the same process.

    A row's value is the median ratio of rounds in which both run in turn.

    GEMM rows also count the vector instructions a step of the inner loop, with the GMAC/s and the ratio they allow.
    """
    if compare is not None:
        _compare(*compare)
        return
    _limit_torch(target)
    import torch

    from fmaq.bench.machine import load_average, warning
    from fmaq.bench.run import run, select
    from fmaq.bench.tables import report_table, summary
    from fmaq.kernels import use_target
    from fmaq.training.progress import Bars

    torch.set_num_threads(threads)
    if profile:
        _profile(target, _sizes(sizes), rounds)
        return
    try:
        with use_target(target) if target else nullcontext():
            cases = select(suite or [], _sizes(sizes))
            _warn_if(warning(load_average()))
            report = run(cases, rounds, output, Bars())
    except KeyboardInterrupt:
        kept = f"; the rows so far are in {output}" if output is not None and output.exists() else ""
        print_error(f"interrupted{kept}")
        raise typer.Exit(INTERRUPTED) from None
    print_table(report_table(report))
    for line in summary(report):
        typer.echo(line)
    _warn_if(warning(load_average(), own=threads))
    if output is not None:
        typer.echo(f"rows:   {output}")


def _profile(target: str | None, sizes: list[int], rounds: int) -> None:
    from fmaq.bench import profile
    from fmaq.bench.machine import describe, load_average, warning
    from fmaq.kernels import use_target
    from fmaq.numerics import Accumulator
    from fmaq.training.progress import Bars

    with use_target(target) if target else nullcontext():
        _warn_if(warning(load_average()))
        works = profile.squares(sizes) if sizes else profile.works()
        found = profile.run(works, Accumulator.paper12, rounds, Bars())
        print_table(profile.profile_table(found, Accumulator.paper12, str(describe()["processor"])))
    _warn_if(warning(load_average(), own=1))


def _compare(old: Path, new: Path) -> None:
    from fmaq.bench.rows import Report
    from fmaq.bench.tables import comparison_table, differences

    reports = Report.load(old), Report.load(new)
    print_table(comparison_table(*reports))
    for line in differences(*reports):
        print_warning(line)


def _limit_torch(target: str | None) -> None:
    """Keep torch's libraries to a target's instructions, unless the environment says otherwise."""
    for name, value in TORCH_LIMITS.get(target or "", {}).items():
        os.environ.setdefault(name, value)


def _sizes(text: str | None) -> list[int]:
    try:
        return [int(n) for n in text.split(",")] if text else []
    except ValueError:
        raise ValueError(f"--sizes takes whole numbers set apart by commas, like 256,512; got {text!r}") from None


def _warn_if(message: str | None) -> None:
    if message is not None:
        print_warning(message)
