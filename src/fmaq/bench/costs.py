"""What emulation costs besides time in a product: memory beyond operands and output, first calls, and the import.

Each is measured in a process of its own, since memory that was used before hides what is used now.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from fmaq import kernels
from fmaq.bench.rows import Case, Row, Unavailable
from fmaq.numerics import Accumulator

MEBIBYTE = 2**20
MEMORY_TARGET = 64.0  # MiB
STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
ROUNDINGS = ("toward_zero", "nearest_even", "stochastic")


def memory_cases(size: int = 2048) -> list[Case]:
    """The extra memory of a square product, by rounding."""
    return [_memory(replace(Accumulator.paper12, rounding=rounding), size) for rounding in ROUNDINGS]


def start_cases() -> list[Case]:
    """The first call of a format, and the import."""
    first = Row("start", "first call of a new format", "64×64×64, after another format", unit="s")
    imported = Row("start", "import fmaq", "after import torch", unit="s")
    return [Case(first, _first_call), Case(imported, _import)]


def extra_memory(acc: Accumulator, size: int) -> float:
    """MiB that a product of this process needs at its peak beyond its operands and its output.

    Raises:
        Unavailable: the system does not tell a process its peak.
    """
    small = torch.randn(1, 64, 64)
    kernels.matmul(small, small, acc)  # the code is there, and so is what it loads
    a, b = torch.randn(1, size, size), torch.randn(1, size, size)
    return max(0.0, peak_memory(lambda: kernels.matmul(a, b, acc)) - a.nbytes / MEBIBYTE)


def peak_memory(work: Callable[[], object]) -> float:
    """MiB that work, which runs once, needs at its peak beyond what the process has in memory before.

    Raises:
        Unavailable: the system does not tell a process its peak.
    """
    try:
        CLEAR.write_text("5")  # forgets the peak so far
    except OSError as error:
        raise Unavailable(f"the peak of a process's memory is read from Linux's /proc, which says: {error}") from None
    before = _status("VmRSS")
    work()
    return _status("VmHWM") - before


def _status(name: str) -> float:
    """A field of this process's status, in MiB."""
    for line in STATUS.read_text().splitlines():
        key, _, value = line.partition(":")
        if key == name:
            return int(value.split()[0]) / 1024
    raise Unavailable(f"{STATUS} has no field {name}")


def _in_new_process(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    if done.returncode != 0:
        raise Unavailable(f"its process failed: {(done.stderr.strip().splitlines() or ['no message'])[-1]}")
    return done.stdout


def _memory(acc: Accumulator, size: int) -> Case:
    def measure(row: Row, rounds: int) -> Row:
        code = (
            "import torch; from fmaq import Accumulator, kernels; from fmaq.bench.costs import extra_memory\n"
            f"torch.set_num_threads({torch.get_num_threads()})\n"
            f"with kernels.use_target({kernels.current_target().name!r}):\n"
            f"    print(extra_memory(Accumulator.parse({str(acc)!r}), {size}))"
        )
        return replace(row, value=float(_in_new_process(code)))

    work = f"{size}×{size}×{size}"
    row = Row("memory", work, f"{acc.rounding}, beyond operands and output", MEMORY_TARGET, unit="MiB")
    return Case(row, measure)


def _median(measure: Callable[[int], float], count: int) -> float:
    return statistics.median(measure(i) for i in range(count))


def _first_call(row: Row, rounds: int) -> Row:
    a = torch.randn(1, 64, 64)
    kernels.matmul(a, a, Accumulator.paper12)

    def first(i: int) -> float:
        # No other row uses these, so that none of them has been compiled.
        acc = Accumulator(f"M{2 + i}E3b3", product=f"M{2 + i}E3b5")
        start = time.perf_counter()
        kernels.matmul(a, a, acc)
        return time.perf_counter() - start

    return replace(row, value=_median(first, min(rounds, 5)))


def _import(row: Row, rounds: int) -> Row:
    code = "import time, torch; t = time.perf_counter(); import fmaq; print(time.perf_counter() - t)"
    return replace(row, value=_median(lambda _: float(_in_new_process(code)), min(rounds, 3)))
