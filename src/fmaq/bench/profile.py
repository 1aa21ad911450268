"""Where the time of a product goes: calling (Python, memory for the result), ranges, packing, tiles, and storing.

The kernel's share is told apart by kernels that leave something out: one that stores nothing, and one whose tiles are
empty, too, so that it only packs. What the inner loop alone would take follows from its instructions (`instructions`).
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from llvmlite import ir
from rich import box
from rich.table import Table
from torch import Tensor

from fmaq import kernels
from fmaq.bench.conv import SHAPES, Shape
from fmaq.bench.instructions import count
from fmaq.bench.machine import vector_rate
from fmaq.bench.timing import seconds
from fmaq.kernels.gemm import STORE_ARGUMENTS, TILE_ARGUMENTS, Gemm
from fmaq.kernels.products import Problem, conv_problem, launch_of, matrix_problem
from fmaq.kernels.ranges import measured
from fmaq.kernels.threads import scratch
from fmaq.numerics import Accumulator
from fmaq.training.progress import Bars

SIZES = (64, 128, 256, 512, 1024, 2048)
HEADS = ((12, 128, 64, 128), (12, 128, 128, 64))  # of attention: heads, and rows, steps and columns of each
SCALE = 0.05  # standard deviation of the operands: bounds exclude saturation
LEAST = 0.01  # seconds that a part is run for, at least, in a round
PARTS = ("calling", "ranges", "packing", "tiles", "storing")


class _Storeless(Gemm):
    """Computes tiles, and stores none."""

    def _store(self) -> ir.Function:
        return self._nothing("store", STORE_ARGUMENTS)

    def _nothing(self, name: str, arguments: list[ir.Type]) -> ir.Function:
        function, b = self._function(name, arguments)
        b.ret_void()
        return function


class _Packing(_Storeless):
    """Packs operands alone."""

    def _tile(self) -> ir.Function:
        return self._nothing("tile", TILE_ARGUMENTS)


@dataclass(frozen=True)
class Profile:
    """Of one product, on one thread.

    Attributes:
        work: its shape.
        seconds: of the whole call.
        parts: the seconds of each of `PARTS`; they add up to the whole.
        loop: seconds that the tiles' inner loop takes if it does nothing but issue its instructions; None where the
            assembly is not understood.
    """

    work: str
    seconds: float
    parts: dict[str, float]
    loop: float | None


@dataclass(frozen=True)
class Work:
    """A product to be profiled: its shape in words, its multiply-accumulates, and what makes it."""

    name: str
    macs: int
    problem: Callable[[], Problem]
    call: Callable[[Problem, Accumulator], Tensor]


def works() -> list[Work]:
    """Square products, attention's, and convolutions."""
    return [*squares(), *(_matrix(*head) for head in HEADS), *map(_convolution, SHAPES)]


def squares(sizes: Sequence[int] = SIZES) -> list[Work]:
    """Products n×n×n."""
    return [_matrix(1, n, n, n) for n in sizes]


def _normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * SCALE


def _matrix(batches: int, m: int, k: int, n: int) -> Work:
    name = f"{m}×{k}×{n}" if batches == 1 else f"{batches} heads, {m}×{k}×{n}"
    return Work(
        name,
        batches * m * k * n,
        lambda: matrix_problem(_normal(batches, m, k), _normal(batches, k, n)),
        lambda problem, acc: kernels.matmul(problem.a, problem.b, acc),
    )


def _convolution(shape: Shape) -> Work:
    around = shape.kernel // 2
    geometry = kernels.Geometry((1, 1), (around, around), (1, 1), shape.groups)
    weight = _normal(shape.outputs, shape.channels // shape.groups, shape.kernel, shape.kernel)
    return Work(
        f"{shape.name}, {shape.work}",
        shape.macs,
        lambda: conv_problem(_normal(shape.images, shape.channels, shape.size, shape.size), weight, geometry),
        lambda problem, acc: kernels.conv(problem.b, weight, acc, geometry),
    )


def profile(work: Work, acc: Accumulator, rounds: int) -> Profile:
    """Measure a product and its parts in turn, on one thread; medians of the rounds."""
    target, problem = kernels.current_target(), work.problem()
    a, b = measured(problem.a, target), measured(problem.b, target)
    launches = [
        launch_of(problem.layout, acc, target, problem.layout.widened(a, b), 1, kind)
        for kind in (Gemm, _Storeless, _Packing)
    ]
    array = [launch.parameters(problem, acc.seed) for launch in launches]

    def running(index: int) -> Callable[[], object]:
        launch, parameters = launches[index], array[index]
        return lambda: launch.kernel.run(parameters, 0, launch.tasks, scratch(launch.scratch))

    def ranges() -> None:
        measured(problem.a, target)
        measured(problem.b, target)

    runs = [lambda: work.call(problem, acc), ranges, running(0), running(1), running(2)]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        repeats = [max(1, round(LEAST / min(seconds(run), seconds(run)))) for run in runs]
        found = [[seconds(run, count) for run, count in zip(runs, repeats, strict=True)] for _ in range(rounds)]
    finally:
        torch.set_num_threads(before)
    whole, of_ranges, kernel, storeless, packing = (statistics.median(times) for times in zip(*found, strict=True))
    parts = (whole - of_ranges - kernel, of_ranges, packing, storeless - packing, kernel - storeless)
    counted = count(launches[0].kernel.gemm, is_checked=False)
    loop = None if counted is None else work.macs / counted.bound(vector_rate(target)) / 1e9
    return Profile(work.name, whole, dict(zip(PARTS, parts, strict=True)), loop)


def run(works: Sequence[Work], acc: Accumulator, rounds: int, bars: Bars) -> list[Profile]:
    """Profile one after another."""
    found = []
    with bars, bars.bar("Profiling", len(works)) as advance:
        for work in works:
            advance(0, work.name)
            found.append(profile(work, acc, rounds))
            advance()
    return found


def profile_table(profiles: Sequence[Profile], acc: Accumulator, processor: str) -> Table:
    """A row a product: its time, the share of each part, and the inner loop's own."""
    title = f"{acc} on one thread, {kernels.current_target().name}, {processor}"
    table = Table(title=title, box=box.SIMPLE_HEAD)
    table.add_column("work")
    for heading in ("ms", *(f"{part}, %" for part in PARTS), "the loop alone, %", "at its bound"):
        table.add_column(heading, justify="right")
    for found in profiles:
        shares = [f"{100 * found.parts[part] / found.seconds:.0f}" for part in PARTS]
        loop = ["", ""]
        if found.loop is not None:
            loop = [f"{100 * found.loop / found.seconds:.0f}", f"{found.seconds / found.loop:.2f}×"]
        table.add_row(found.work, f"{1e3 * found.seconds:.3f}", *shares, *loop)
    return table
