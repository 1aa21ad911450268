"""Running suites of cases, one after another, keeping what is done in a file meanwhile."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from pathlib import Path

from fmaq.bench import conv, costs, gemm, gradients, networks
from fmaq.bench.machine import describe
from fmaq.bench.rows import Case, Report
from fmaq.training.progress import Bars

SUITES: dict[str, Callable[[], list[Case]]] = {
    "gemm": gemm.cases,
    "conv": conv.cases,
    "networks": networks.inference_cases,
    "decoding": networks.decoding_cases,
    "training": networks.training_cases,
    "gradients": gradients.cases,
    "memory": costs.memory_cases,
    "start": costs.start_cases,
}


def select(suites: Sequence[str], sizes: Sequence[int] = ()) -> list[Case]:
    """The cases of suites, all of them if none is named.

    Args:
        sizes: n of the n×n×n products of the suite gemm, in place of its own.
    Raises:
        ValueError: an unknown suite, or a size below 1.
    """
    for name in suites:
        if name not in SUITES:
            near = difflib.get_close_matches(name, SUITES, 1, 0.4)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"no suite {name!r}; {hint}It may be {', '.join(SUITES)}")
    if any(n < 1 for n in sizes):
        raise ValueError(f"sizes must be at least 1, got {', '.join(map(str, sizes))}")
    makers = SUITES | ({"gemm": lambda: gemm.cases(sizes)} if sizes else {})
    return [case for name in suites or SUITES for case in makers[name]()]


def run(cases: Sequence[Case], rounds: int, output: Path | None, bars: Bars) -> Report:
    """Measure cases in order.

    Args:
        rounds: how often each pair is timed in turn.
        output: a JSON file, written anew after every row, so that an interrupted run leaves the rows it has.
    """
    report = Report(describe())
    with bars, bars.bar("Measuring", len(cases)) as advance:
        for case in cases:
            advance(0, f"{case.row.suite} {case.row.work}, {case.row.case}")
            report.rows.append(case.run(rounds))
            if output is not None:
                report.save(output)
            advance()
    report.is_complete = True
    if output is not None:
        report.save(output)
    return report
