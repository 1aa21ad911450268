"""Progress bars, on a terminal only: elsewhere nothing is drawn, so that logs stay readable."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

Advance = Callable[..., None]


def _quiet(step: float = 1, note: str | None = None) -> None:
    pass


class Bars:
    """A stack of bars, `with Bars() as bars, bars.bar("Evaluating", 9) as advance: advance(3)`; may be nested."""

    def __init__(self, enabled: bool = True) -> None:
        self._progress: Any = None
        self._depth = 0
        if enabled:
            from rich.console import Console

            console = Console(stderr=True)
            if console.is_terminal:
                from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

                self._progress = Progress(
                    TextColumn("{task.description}"),
                    BarColumn(),
                    MofNCompleteColumn(),
                    TimeRemainingColumn(),
                    TextColumn("{task.fields[note]}"),
                    console=console,
                    transient=True,
                )

    def __enter__(self) -> Bars:
        self._depth += 1
        if self._progress is not None and self._depth == 1:
            self._progress.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, tb: TracebackType | None) -> None:
        self._depth -= 1
        if self._progress is not None and self._depth == 0:
            self._progress.stop()

    @contextmanager
    def bar(self, description: str, total: int, done: int = 0) -> Iterator[Advance]:
        """A bar of `total` steps; the value advances it, and may set a note behind it."""
        if self._progress is None:
            yield _quiet
            return
        task = self._progress.add_task(description, total=total, completed=done, note="")

        def advance(step: float = 1, note: str | None = None) -> None:
            self._progress.update(task, advance=step, **({} if note is None else {"note": note}))

        try:
            yield advance
        finally:
            self._progress.remove_task(task)
