"""Tables and warnings on the terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.table import Table


def print_table(table: Table) -> None:
    """Write a table as wide as the terminal, or, in a pipe or a file, which have no width, as wide as it is."""
    from rich.console import Console

    console = Console()
    width = None if console.is_terminal else max(console.width, Console(width=1000).measure(table).maximum)
    Console(width=width).print(table)


def print_warning(message: str) -> None:
    """Write a message to standard error, in yellow on a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text(f"warning: {message}", style="yellow"))
