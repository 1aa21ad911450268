"""An experiment's results as tables, one for each metric: for the terminal, for the page, and in Markdown.

A row is an accumulator (of a network, where there are several); a column an estimator, a schedule, or both.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from fmaq.emulation.rule import FP32
from fmaq.numerics import Accumulator
from fmaq.recipes.record import show
from fmaq.report.tables import name_of, products_of
from fmaq.reproduce.results import Key, Results, Spread
from fmaq.training.files import write_text

if TYPE_CHECKING:
    from rich.table import Table

NAMES = {
    "ratio": "time of a step, as a ratio to torch's in float32",
    "seconds": "seconds of a step",
    "memory": "memory of a step at its peak, MiB",
}
"""What a table of a metric is titled, where not by the metric's own name."""


@dataclass(frozen=True)
class Grid:
    """One metric's table.

    Attributes:
        words: how many of the first columns are words, not figures.
    """

    metric: str
    headings: list[str]
    rows: list[list[str]]
    words: int

    @property
    def title(self) -> str:
        """The metric, in words."""
        return NAMES.get(self.metric, self.metric)


def series(results: Results) -> list[tuple[str, str]]:
    """The columns: estimator and schedule, or the estimator alone (and "") where the variants are networks."""
    networks = results.variants_are == "network"
    return list(dict.fromkeys((r.cell.estimator, "" if networks else r.cell.variant) for r in results.cells))


def series_names(pairs: Sequence[tuple[str, str]]) -> list[str]:
    """What to call them: by what tells them apart; a schedule with one estimator needs no more than its own name."""
    variants = list(dict.fromkeys(variant for _, variant in pairs))
    if len(variants) == 1:
        return [estimator for estimator, _ in pairs]
    alone = {v for v in variants if sum(variant == v for _, variant in pairs) == 1}
    return [variant if variant in alone else f"{variant}, {estimator}" for estimator, variant in pairs]


def cell_text(metric: str, spread: Spread | None) -> str:
    """A mean, the range over seeds if there are several, and how many failed."""
    if spread is None:
        return ""
    if spread.mean is None:
        return "failed"
    text = show(metric, spread.mean)
    if len(spread.values) > 1:
        low, high = (show(metric, value).removesuffix(" %") for value in (spread.low, spread.high))
        text += f" ({low}–{high})"
    return text + (f", {spread.failed} failed" if spread.failed else "")


def grids(results: Results) -> list[Grid]:
    """A table for each metric."""
    return [_grid(results, metric) for metric in results.metrics]


def _grid(results: Results, metric: str) -> Grid:
    spread, columns = results.spread(metric), series(results)
    networks = results.variants_are == "network"
    rows = list(dict.fromkeys((r.cell.variant if networks else "", r.cell.accumulator) for r in results.cells))
    table = []
    for network, accumulator in rows:
        keys: list[Key] = [(accumulator, estimator, variant or network) for estimator, variant in columns]
        names = [network] if networks else []
        table.append([*names, *_accumulator(accumulator), *(cell_text(metric, spread.get(key)) for key in keys)])
    names = ["network"] if networks else []
    headings = [*names, "accumulator", "bits", "products", *series_names(columns)]
    return Grid(metric, headings, table, len(names) + 3)


def _accumulator(name: str) -> list[str]:
    """Format, bits and product."""
    if name == FP32:
        return ["float32", "32", "float32"]
    acc = Accumulator.parse(name)
    return [name_of(acc), str(acc.bits), products_of(acc)]


def rich_tables(results: Results) -> list[Table]:
    """The tables for the terminal."""
    from rich import box
    from rich.table import Table

    tables = []
    for grid in grids(results):
        table = Table(box=box.SIMPLE_HEAD, title=f"{results.name}: {grid.title}", title_justify="left")
        for index, name in enumerate(grid.headings):
            table.add_column(name, justify="left" if index < grid.words else "right")
        for row in grid.rows:
            table.add_row(*row)
        tables.append(table)
    return tables


def markdown(results: Results) -> str:
    """The tables in Markdown, with what is needed to read them."""
    lines = [f"## {results.title}", "", _run(results), "", results.question, *(f"\n{note}" for note in results.notes)]
    for grid in grids(results):
        lines += [
            "",
            f"{grid.title[0].upper()}{grid.title[1:]}:",
            "",
            _line(grid.headings),
            _line(["---"] * len(grid.headings)),
        ]
        lines += [_line(row) for row in grid.rows]
    return "\n".join(lines) + "\n"


def _run(results: Results) -> str:
    done = "" if len(results.cells) == results.total else f" · {len(results.cells)} of {results.total} cells so far"
    return f"`{results.provenance['command']}` · commit: {(results.provenance['commit'] or '–')[:7]}{done}"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def save_markdown(results: Results, path: Path) -> None:
    """Write the Markdown, atomically."""
    write_text(path, markdown(results))
