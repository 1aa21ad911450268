"""Exit codes, and the one red line that an error prints."""

from __future__ import annotations

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130


def print_error(message: str) -> None:
    """Write a message to standard error, in red on a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message, style="red"))
