"""`fmaq reproduce`: run an experiment of examples/reproduce, or list them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fmaq.cli.console import print_table
from fmaq.cli.errors import interruptible

if TYPE_CHECKING:
    from fmaq.reproduce.results import Results

EPILOG = (
    "[bold]Examples[/bold]\n\n  fmaq reproduce\n\n  fmaq reproduce mlp-fashion --quick\n\n"
    "  fmaq reproduce mlp-fashion\n\n  fmaq reproduce mlp-fashion --seed 3 -o another-seed\n\n"
    "  fmaq reproduce my-experiment.yaml"
)


def reproduce(
    name: Annotated[
        str | None,
        typer.Argument(help="Of an experiment, or the path of its .yaml file; none lists them.", show_default=False),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="The quick form: seconds, on data that need no fetching.")
    ] = False,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder for the results; runs/reproduce/<name>, or <name>-quick."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Start over, discarding the folder's finished cells.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="In place of the experiment's seeds.")] = None,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads; all cores by default.")] = None,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the results as JSON, and nothing else, on standard output.")
    ] = False,
) -> None:
    """Run an experiment: a grid of accumulators, estimators and seeds, each a short training.

    Finished cells are kept, and a training goes on from its checkpoint, when the same command is given again. The
    output folder gets the results as JSON, CSV and Markdown, a plot and a page.
    """
    if name is None:
        _list()
        return
    if threads is not None:
        import torch

        torch.set_num_threads(threads)
    from fmaq.reproduce.experiment import find, load
    from fmaq.reproduce.run import run_experiment
    from fmaq.training.progress import Bars

    experiment = load(find(name), quick)
    folder = output or Path("runs/reproduce") / experiment.name
    with interruptible():
        results = run_experiment(
            experiment,
            folder,
            seed=seed,
            fresh=fresh,
            bars=Bars(),
            say=lambda line: typer.echo(line, err=as_json),
        )
    _finish(results, folder, as_json)


def _list() -> None:
    from rich import box
    from rich.table import Table

    from fmaq.reproduce.experiment import available

    table = Table(box=box.SIMPLE_HEAD)
    for heading in ("experiment", "title", "question"):
        table.add_column(heading, no_wrap=heading == "experiment")
    for name, (title, question) in available().items():
        table.add_row(name, title, question)
    print_table(table)


def _finish(results: Results, folder: Path, as_json: bool) -> None:
    """Write the report, and print the tables and where everything is."""
    from fmaq.reproduce.report import write_report
    from fmaq.reproduce.tables import rich_tables

    if not results.metrics:
        raise RuntimeError(f"every cell failed; the first: {results.cells[0].failure}")
    written = write_report(results, folder)
    if as_json:
        typer.echo(json.dumps(asdict(results), ensure_ascii=False))
        return
    for table in rich_tables(results):
        print_table(table)
    record = folder / results.name
    files = {"plot": written.plot, "report": written.page, "table": f"{record}.md", "cells": f"{record}.csv"}
    for what, path in files.items():
        typer.echo(f"{what + ':':<8}{path}")
