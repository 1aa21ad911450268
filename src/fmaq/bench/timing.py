"""Timing two things against each other: alternately, several times, the median of the ratios."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

LONGEST = 30.0  # seconds that one comparison may take, if three rounds fit


@dataclass(frozen=True)
class Comparison:
    """Medians over the rounds.

    Attributes:
        ours, theirs: seconds of one run.
        ratio: how many times as long ours takes.
        quartiles: of the rounds' ratios, the first and the third.
    """

    ours: float
    theirs: float
    ratio: float
    quartiles: tuple[float, float]


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one run, over a few in a row."""
    start = time.perf_counter()
    for _ in range(repeats):
        work()
    return (time.perf_counter() - start) / repeats


def compare(
    ours: Callable[[], object], theirs: Callable[[], object], rounds: int = 9, least: float = 0.01
) -> Comparison:
    """Both in turn, `rounds` times (fewer, at least 3, where they are slow), each for at least `least` seconds.

    Each runs twice before: once to compile and warm up, once to know how long it takes.
    """
    once = [min(seconds(work), seconds(work)) for work in (ours, theirs)]
    repeats = [max(1, round(least / time)) for time in once]
    a_round = sum(count * time for count, time in zip(repeats, once, strict=True))
    rounds = min(rounds, max(3, int(LONGEST / a_round)))
    pairs = [(seconds(ours, repeats[0]), seconds(theirs, repeats[1])) for _ in range(rounds)]
    first, second = zip(*pairs, strict=True)
    ratios = [x / y for x, y in pairs]
    return Comparison(
        statistics.median(first), statistics.median(second), statistics.median(ratios), _quartiles(ratios)
    )


def _quartiles(values: list[float]) -> tuple[float, float]:
    if len(values) == 1:
        return values[0], values[0]
    first, _, third = statistics.quantiles(values, n=4, method="inclusive")
    return first, third
