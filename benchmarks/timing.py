"""Timing two things against each other: alternately, several times, the median of the ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Comparison:
    """Seconds of one run of each, and how many times as long ours takes: medians."""

    ours: float
    theirs: float
    ratio: float


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Seconds of one run, over a few in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 9, least: float = 0.01
) -> Comparison:
    """Both in turn, `rounds` times, each for at least `least` seconds, after one run to warm up."""
    repeats = [max(1, int(least / max(seconds(work, 1), seconds(work, 1)))) for work in (ours, theirs)]
    pairs = [(seconds(ours, repeats[0]), seconds(theirs, repeats[1])) for _ in range(rounds)]
    first, second = zip(*pairs, strict=True)
    ratios = [x / y for x, y in pairs]
    return Comparison(statistics.median(first), statistics.median(second), statistics.median(ratios))
