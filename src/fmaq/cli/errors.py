"""Exit codes, and the one red line that an error prints."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import typer

FAILURE = 1
BAD_INPUT = 2
INTERRUPTED = 130


def print_error(message: str) -> None:
    """Write a message to standard error, in red on a terminal."""
    from rich.console import Console
    from rich.text import Text

    Console(stderr=True, soft_wrap=True).print(Text("error: ", style="bold red") + Text(message, style="red"))


@contextmanager
def interruptible(message: str | None = None) -> Iterator[None]:
    """End with exit code 130 and a line about how to go on, when a run is interrupted."""
    from fmaq.training.interrupts import Interrupted

    try:
        yield
    except Interrupted as error:
        print_error(message or str(error))
        raise typer.Exit(INTERRUPTED) from None
