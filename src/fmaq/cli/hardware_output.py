"""What `fmaq hardware` prints: tables, CSV and warnings."""

from __future__ import annotations

import csv
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from fmaq.cli.console import print_table, print_warning

if TYPE_CHECKING:
    from fmaq.hardware.liberty import Library
    from fmaq.hardware.unit import Unit


def print_rows(names: Sequence[str], rows: Sequence[Sequence[str]], title: str | None = None, words: int = 1) -> None:
    """A table whose first `words` columns are words, and the others numbers."""
    from rich import box
    from rich.table import Table

    options: dict[str, Any] = {"title": title, "title_justify": "left"} if title else {}
    shown = Table(box=box.SIMPLE_HEAD, **options)
    for index, name in enumerate(names):
        shown.add_column(name, justify="left" if index < words or name in ("product", "netlist") else "right")
    for row in rows:
        shown.add_row(*row)
    print_table(shown)


def print_csv(records: Sequence[Mapping[str, Any]]) -> None:
    """Records of one kind as CSV on standard output; what is not known is empty."""
    writer = csv.DictWriter(sys.stdout, list(records[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)


def refuse_both(as_json: bool, as_csv: bool) -> None:
    """Standard output takes one of the two.

    Raises:
        ValueError: both are asked for.
    """
    if as_json and as_csv:
        raise ValueError("give one of --json and --csv")


def warn_of_library(library: Library) -> None:
    """Say which cells of a library cannot be read, and are left out."""
    if library.unread:
        first = "; ".join(f"{name}: {why}" for name, why in list(library.unread.items())[:5])
        more = "; …" if len(library.unread) > 5 else ""
        print_warning(f"library {library.name}: {len(library.unread)} cells are left out ({first}{more})")


def warn_of_unlike(units: Sequence[Unit]) -> None:
    """Say what is unlike among accumulators in one table."""
    from fmaq.hardware.comparison import unlike

    if message := unlike(units):
        print_warning(message)


@contextmanager
def warnings_in_yellow() -> Iterator[None]:
    """Python's warnings of what runs inside, as the commands' own."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", UserWarning)
        yield
    for message in dict.fromkeys(str(warning.message) for warning in caught):
        print_warning(message)
