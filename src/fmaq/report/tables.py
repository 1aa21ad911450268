"""A run's record as one table: for the terminal, and as rows of text for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmaq.numerics import Accumulator
from fmaq.recipes.record import AS_GIVEN, Record, Row, show

if TYPE_CHECKING:
    from rich.table import Table

ORDINALS = ("one", "two", "three", "four", "five", "six")


def headings(record: Record) -> list[str]:
    """The table's column headings."""
    if record.series:
        return ["operands", "accumulator", "bits", "products", *record.series]
    names = ["operands", "accumulator", "bits", "products", "chunk", *(["ranges"] if record.is_calibrated else [])]
    if record.stages == 0:
        return [*names, *record.baseline.metrics]
    return [
        *names,
        "zero-shot",
        *(f"after stage {ORDINALS[i] if i < len(ORDINALS) else i + 1}" for i in range(record.stages)),
    ]


def words(record: Record) -> tuple[int, ...]:
    """The columns that hold words, which stand to the left; the others hold figures."""
    return (0, 1, 3, 5) if record.is_calibrated else (0, 1, 3)


def lines(record: Record) -> list[tuple[list[str], bool]]:
    """The table's lines below the baseline's, as text, and whether each tells of fine-tuning."""
    if not record.series:
        return [(cells(record, row), bool(row.tuned and row.parsed)) for row in record.rows]
    by_bits: dict[int, list[Row]] = {}
    for row in record.rows:
        by_bits.setdefault(row.bits, []).append(row)
    return [(_side_by_side(record, rows), any(row.tuned and row.parsed for row in rows)) for rows in by_bits.values()]


def cells(record: Record, row: Row) -> list[str]:
    """One row's cells, as text; where kinds of accumulators stand side by side, those of the row alone."""
    if record.series:
        return _side_by_side(record, [row])
    acc, metric = row.parsed, record.metric
    if acc is None:
        names = ["float32", "32", "float32", "–"]
    else:
        names = [name_of(acc), str(acc.bits), products_of(acc), "all" if acc.chunk is None else str(acc.chunk)]
    ranges = [row.chosen or ("–" if acc is None else AS_GIVEN)] if record.is_calibrated else []
    line = [row.operands, *names, *ranges, show(metric, row.metrics.get(metric))]
    if record.stages == 0:
        return [*line, *(show(name, row.metrics.get(name)) for name in list(record.baseline.metrics)[1:])]
    return [*line, *(show(metric, row.after(stage, metric)) for stage in range(record.stages))]


def name_of(acc: Accumulator | None) -> str:
    """An accumulator in short: format, rounding and outer level; None is float32."""
    if acc is None:
        return "float32"
    return f"{acc.format}{_rounded(acc.rounding)}{'' if acc.outer is None else f' outer {acc.outer}'}"


def products_of(acc: Accumulator | None) -> str:
    """The format of an accumulator's products, and their rounding where it is their own; None is float32."""
    if acc is None or acc.product is None:
        return "float32" if acc is None else "exact"
    return f"{acc.product}{_rounded(acc.product_rounding or 'toward_zero')}"


def _rounded(rounding: str) -> str:
    return "" if rounding == "toward_zero" else f" {rounding.replace('_', ' ')}"


def _side_by_side(record: Record, rows: list[Row]) -> list[str]:
    """The line of rows of one width: the first one's names, then the metric in each series' column.

    A row that is of no series stands in the first.
    """
    metric, acc = record.metric, rows[0].parsed
    shown = dict.fromkeys(record.series, "")
    for row in rows:
        values = [row.metrics.get(metric), *([row.after(record.stages - 1, metric)] if row.tuned else [])]
        shown[row.series or record.series[0]] = " → ".join(show(metric, value) for value in values)
    name = "float32" if acc is None else str(acc.format)
    return [rows[0].operands, name, str(rows[0].bits), products_of(acc), *shown.values()]


def rich_table(record: Record) -> Table:
    """The table for the terminal: the float32 baseline, then each accumulator."""
    from rich import box
    from rich.table import Table

    table = Table(
        box=box.SIMPLE_HEAD,
        title=f"{record.name}: {record.metric} (operands are weights and activations)",
        title_justify="left",
    )
    for index, name in enumerate(headings(record)):
        table.add_column(name, justify="left" if index in words(record) else "right")
    table.add_row(*cells(record, record.baseline), end_section=True)
    for line, is_tuned in lines(record):
        table.add_row(*line, style="bold" if is_tuned else None)
    return table
