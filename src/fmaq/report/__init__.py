"""What a run shows: one table, one plot, and one self-contained page."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fmaq.recipes.record import Record
from fmaq.report.tables import rich_table

__all__ = ["Written", "rich_table", "write_report"]


@dataclass(frozen=True)
class Written:
    """Where a report's files are."""

    plot: Path
    page: Path


def write_report(record: Record, folder: Path, name: str = "report") -> Written:
    """Write `<name>.png` and the self-contained page `<name>.html` of a record into a folder.

    Args:
        record: with at least one row.
        folder: made if need be.

    Raises:
        ValueError: the record has no rows: its run was stopped before the first accumulator was measured.
    """
    if not record.rows:
        raise ValueError(f"the record of {record.name} has no rows yet: its run measured no accumulator; run it again")
    from fmaq.report.page import render
    from fmaq.report.plot import draw, save_png, to_svg
    from fmaq.training.files import write_text

    figure = draw(record)
    written = Written(folder / f"{name}.png", folder / f"{name}.html")
    save_png(figure, written.plot)
    write_text(written.page, render(record, to_svg(figure)))
    return written
