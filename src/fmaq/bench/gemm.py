"""Matrix products against `torch.mm`: roundings, saturation, formats, sizes, skinny shapes, threads and events."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.bench.instructions import count, launched
from fmaq.bench.machine import vector_rate
from fmaq.bench.rows import Case, Operation, Row, Unavailable
from fmaq.bench.timing import compare
from fmaq.kernels.frozen import freezing
from fmaq.numerics import Accumulator
from fmaq.ops import linear

SIZES = (256, 512, 1024, 2048)
PAPER = Accumulator.paper12
IDEAS_UP_TO = 512  # the larger sizes say the same
SMALL_VALUES, LARGE_VALUES = 0.05, 4.0  # standard deviations: bounds exclude saturation in chunks of 16; never do


def _normal(*shape: int, scale: float = 1.0) -> Tensor:
    """Normal random numbers, with too many bits for any narrow product."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))) * scale


def _small(n: int) -> Tensor:
    return _normal(1, n, n, scale=SMALL_VALUES)


def _large(n: int) -> Tensor:
    return _normal(1, n, n, scale=LARGE_VALUES)


def _ordinary(n: int) -> Tensor:
    return _normal(1, n, n)


def _fp8(n: int) -> Tensor:
    """Numbers of FP8 E4M3, whose products have 8 significant bits, and none above what M7E4b18 holds."""
    return _normal(1, n, n, scale=SMALL_VALUES).to(torch.float8_e4m3fn).float()


def _int8(n: int) -> Tensor:
    """Integers in −127 … 127, equally likely: sums of 16 products may exceed 16 bits."""
    return torch.randint(-127, 128, (1, n, n), generator=torch.Generator().manual_seed(n)).float()


@dataclass(frozen=True)
class Kind:
    """Operands and an accumulator; `is_checked` where saturation has to be checked in every chunk."""

    name: str
    operands: Callable[[int], Tensor]
    accumulator: Accumulator
    target: float | None
    is_checked: bool = False


KINDS = (
    Kind("float32, no saturation possible", _small, PAPER, 1.9),
    Kind("float32, saturation checked everywhere", _large, PAPER, 2.8, is_checked=True),
    Kind("FP8 E4M3, product exact", _fp8, Accumulator("M7E4b10 product=M7E4b18"), 1.4),
    Kind("float32, product kept exact", _small, Accumulator("M7E4b10"), None),
    Kind("nearest_even", _small, replace(PAPER, rounding="nearest_even"), 6.0),
    Kind("stochastic, 10 bits", _small, replace(PAPER, rounding="stochastic"), 10.0),
    Kind("fixed I16f8, saturating", _large, Accumulator("I16f8 product=I16f8"), 3.0, is_checked=True),
    Kind("fixed I16f8w, wrapping", _ordinary, Accumulator("I16f8w product=I16f8w"), 2.5),
    Kind("int8 into I16, saturating", _int8, Accumulator("I16f0"), 3.0, is_checked=True),
    Kind("int8 into I16w, wrapping", _int8, Accumulator("I16f0w"), 2.5),
)


@dataclass(frozen=True)
class Idea:
    """An accumulator that costs little more than another; `avx512` and `others` are the most that it should, times."""

    name: str
    accumulator: Accumulator
    plain: Accumulator
    avx512: float
    others: float
    operands: Callable[[int], Tensor] = _small
    is_checked: bool = False

    @property
    def target(self) -> float:
        """On the instruction set in use."""
        return self.avx512 if kernels.current_target().name == "avx512" else self.others


NARROW = Accumulator("M5E4b10 product=M5E4b12")
HALF_UNIT = Accumulator("M5E4b10h product=M5E4b12h")
FIXED = Accumulator("I16f8 product=I16f8")
IDEAS = (
    Idea("half-unit", HALF_UNIT, NARROW, 1.1, 1.3),
    Idea("half-unit, saturation checked", HALF_UNIT, NARROW, 1.1, 1.3, _large, True),
    Idea("nearest_away", replace(NARROW, rounding="nearest_away"), NARROW, 1.8, 2.5),
    Idea("nearest_away, saturation checked", replace(NARROW, rounding="nearest_away"), NARROW, 1.8, 2.5, _large, True),
    Idea("outer M10E5", Accumulator(f"{HALF_UNIT} outer=M10E5b16"), HALF_UNIT, 1.1, 1.1),
    Idea("outer fp32", Accumulator(f"{HALF_UNIT} outer=fp32"), HALF_UNIT, 1.1, 1.3),
    Idea("fixed, half_up", replace(FIXED, rounding="half_up"), FIXED, 1.6, 1.6, _large, True),
    Idea("fixed, nearest_even", replace(FIXED, rounding="nearest_even"), FIXED, 1.6, 1.6, _large, True),
    Idea("fixed, floor", replace(FIXED, rounding="floor"), FIXED, 1.6, 1.6, _large, True),
)

EVENTS = Kind("events (M7E4)", _small, PAPER, 2.5)


def cases(sizes: Sequence[int] = SIZES) -> list[Case]:
    """Every kind at every size, the ideas, then the skinny products, two threads, and events."""
    squares = [_square(kind, n) for kind in KINDS for n in sizes]
    squares += [_against_plain(idea, n) for idea in IDEAS for n in sizes if n <= IDEAS_UP_TO]
    few = ((1, 3.0), (8, 2.0))
    skinny = [_skinny(rows, target, is_frozen) for is_frozen in (True, False) for rows, target in few]
    return [*squares, *skinny, _two_threads(max(sizes)), *(_events(n) for n in sizes)]


def _work(m: int, k: int, n: int) -> str:
    return f"{m}×{k}×{n}"


def _from_smallest(n: int, target: float | None) -> float | None:
    """A target, which is for products of at least 256³: smaller ones are mostly the cost of a call."""
    return target if n >= SIZES[0] else None


def _with_instructions(row: Row, ours: Operation, is_checked: bool) -> Row:
    """The row with the instructions and the bound of the kernel that `ours` runs."""
    kernels_run = launched(ours)
    found = count(kernels_run[-1].gemm, is_checked) if kernels_run else None
    if found is None:
        return row
    bound = found.bound(vector_rate(kernels.current_target()) * torch.get_num_threads())
    return replace(row, instructions=found.computing, moves=found.moving, bound=bound)


def _square(kind: Kind, n: int) -> Case:
    def measure(row: Row, rounds: int) -> Row:
        a, b = kind.operands(n), kind.operands(n + 1)[:, :n, :n].contiguous()

        def ours() -> Tensor:
            return kernels.matmul(a, b, kind.accumulator)

        row = _with_instructions(row, ours, kind.is_checked)
        return row.timed(compare(ours, lambda: torch.mm(a[0], b[0]), rounds))

    return Case(Row("gemm", _work(n, n, n), kind.name, _from_smallest(n, kind.target), macs=n**3), measure)


def _against_plain(idea: Idea, n: int) -> Case:
    """An accumulator against the one without its idea."""

    def measure(row: Row, rounds: int) -> Row:
        a, b = idea.operands(n), idea.operands(n + 1)[:, :n, :n].contiguous()

        def ours() -> Tensor:
            return kernels.matmul(a, b, idea.accumulator)

        row = _with_instructions(row, ours, idea.is_checked)
        return row.timed(compare(ours, lambda: kernels.matmul(a, b, idea.plain), rounds))

    target = _from_smallest(n, idea.target)
    return Case(Row("gemm", _work(n, n, n), idea.name, target, against=_short(idea.plain), macs=n**3), measure)


def _short(acc: Accumulator) -> str:
    """The formats alone."""
    return f"{acc.format}, {acc.product}"


def _skinny(m: int, target: float, is_frozen: bool, n: int = 1024) -> Case:
    """A linear layer of few rows, whose weight is promised not to change, or recognized by what it holds."""

    def measure(row: Row, rounds: int) -> Row:
        x, weight = _normal(m, n, scale=SMALL_VALUES), _normal(n, n, scale=SMALL_VALUES)

        def ours() -> Tensor:
            return linear(x, weight, None, PAPER)

        with torch.no_grad(), freezing([weight]) if is_frozen else contextlib.nullcontext():
            row = _with_instructions(row, ours, is_checked=False)
            return row.timed(compare(ours, lambda: torch.nn.functional.linear(x, weight), rounds))

    name = f"linear, the weight {'frozen' if is_frozen else 'recognized'}"
    return Case(Row("gemm", _work(m, n, n), name, target, macs=m * n * n), measure)


def _two_threads(n: int) -> Case:
    """How many times faster two threads are than one."""

    def measure(row: Row, rounds: int) -> Row:
        if (os.cpu_count() or 1) < 2:
            raise Unavailable("this machine has one core")
        a, b = _small(n), _small(n + 1)[:, :n, :n].contiguous()
        before = torch.get_num_threads()

        def on(threads: int) -> Tensor:
            torch.set_num_threads(threads)
            return kernels.matmul(a, b, PAPER)

        try:
            found = compare(lambda: on(2), lambda: on(1), rounds)
        finally:
            torch.set_num_threads(before)
        row = row.timed(found)
        first, third = found.quartiles
        return replace(row, value=1 / found.ratio, quartiles=(1 / third, 1 / first))

    target = _from_smallest(n, 1.85)
    row = Row("gemm", _work(n, n, n), "2 threads, times faster", target, True, against="1 thread", macs=n**3)
    return Case(row, measure)


def _events(n: int) -> Case:
    def measure(row: Row, rounds: int) -> Row:
        a, b = EVENTS.operands(n), EVENTS.operands(n + 1)[:, :n, :n].contiguous()

        def ours() -> list[int]:
            return kernels.count_events(a, b, EVENTS.accumulator)

        row = _with_instructions(row, ours, is_checked=True)
        return row.timed(compare(ours, lambda: kernels.matmul(a, b, EVENTS.accumulator), rounds))

    target = _from_smallest(n, EVENTS.target)
    row = Row("gemm", _work(n, n, n), EVENTS.name, target, against="plain forward", macs=n**3)
    return Case(row, measure)
