"""Ctrl-C and a polite kill, put off to the end of a step, so that a run stops where it can be resumed exactly."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Interrupted(KeyboardInterrupt):
    """A run that was stopped from outside; the message says how to resume it."""


class Flag:
    """Whether a signal has asked the run to stop."""

    def __init__(self) -> None:
        self.raised = False


@contextmanager
def deferred_interrupts() -> Iterator[Flag]:
    """Let SIGINT and SIGTERM raise a flag; a second one interrupts at once. Outside the main thread it does nothing."""
    flag = Flag()
    if threading.current_thread() is not threading.main_thread():
        yield flag
        return

    def on_signal(number: int, frame: FrameType | None) -> None:
        if flag.raised:
            raise KeyboardInterrupt
        flag.raised = True

    before = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield flag
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
