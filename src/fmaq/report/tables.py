"""A run's record as one table: for the terminal, and as rows of text for the page."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fmaq.training.record import AS_GIVEN, Record, Row, show

if TYPE_CHECKING:
    from rich.table import Table

ORDINALS = ("one", "two", "three", "four", "five", "six")


def headings(record: Record) -> list[str]:
    """The table's column headings."""
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


def cells(record: Record, row: Row) -> list[str]:
    """One row's cells, as text."""
    acc, metric = row.parsed, record.metric
    if acc is None:
        names = ["float32", "32", "float32", "–"]
    else:
        extra = "" if acc.rounding == "toward_zero" else f" {acc.rounding.replace('_', ' ')}"
        product = "exact" if acc.product is None else str(acc.product)
        names = [f"{acc.format}{extra}", str(acc.bits), product, "all" if acc.chunk is None else str(acc.chunk)]
    ranges = [row.chosen or ("–" if acc is None else AS_GIVEN)] if record.is_calibrated else []
    line = [row.operands, *names, *ranges, show(metric, row.metrics.get(metric))]
    if record.stages == 0:
        return [*line, *(show(name, row.metrics.get(name)) for name in list(record.baseline.metrics)[1:])]
    return [*line, *(show(metric, row.after(stage, metric)) for stage in range(record.stages))]


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
    for row in record.rows:
        table.add_row(*cells(record, row), style="bold" if row.tuned and row.parsed else None)
    return table
