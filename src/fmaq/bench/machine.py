"""What a benchmark ran on: the processor, the versions, how busy it was, and how fast its vector units are."""

from __future__ import annotations

import ctypes
import functools
import os
import platform
from pathlib import Path
from typing import Any

import torch
from llvmlite import ir

from fmaq.bench.timing import seconds
from fmaq.kernels.compile import compile_module
from fmaq.kernels.ir_blocks import F32, I64, POINTER, Value, for_range, i64
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.targets import Target, current_target
from fmaq.recipes.provenance import provenance

IDLE = 0.5  # processes that the load average may count on an idle machine
CHAINS = 12  # more than a pair of units needs to be busy, fewer than the registers of SSE2
TURNS = 100_000
REPEATS = 50


def describe() -> dict[str, Any]:
    """Processor, cores, load, versions, commit, threads, target and the rate of its vector instructions."""
    rate = vector_rate(current_target())
    return provenance() | {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "load_average": load_average(),
        "target": current_target().name,
        "torch_capability": torch.backends.cpu.get_cpu_capability(),
        "vector_instructions_per_second": rate,
    }


def load_average() -> float | None:
    """Processes that wanted to run, over the last minute; None where the system does not say."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def warning(load: float | None, own: int = 0) -> str | None:
    """What to say if the machine was not idle; `own` threads are the benchmark's."""
    if load is None or load <= own + IDLE:
        return None
    others = "" if own == 0 else f", {own} of them this benchmark's"
    return (
        f"the machine is not idle: {load:.1f} processes wanted to run in the last minute{others}. "
        "The ratios may be off; measure again when it is"
    )


def _processor() -> str:
    """The processor's model, as Linux or the platform calls it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() == "model name":
            return value.strip()
    return platform.processor() or platform.machine()


@functools.cache
def vector_rate(target: Target) -> float:
    """Vector instructions a second that one thread retires, where nothing but their number limits it.

    The faster of two generated loops of independent chains, which touch no memory: of fused multiply-adds (multiplies
    where there are none), and of as many of them as ANDs, which some processors have more units for.
    """
    return max(_rate(target, has_ands=False), _rate(target, has_ands=True))


def _rate(target: Target, has_ands: bool) -> float:
    code = compile_module(_peak_module(target, has_ands), target)
    run = code.function("peak", ctypes.c_void_p, ctypes.c_int64, ctypes.c_float)
    result = (ctypes.c_float * target.lanes(4))()
    best = min(seconds(lambda: run(result, TURNS, 1.0)) for _ in range(REPEATS))
    return (2 if has_ands else 1) * CHAINS * TURNS / best


def _peak_module(target: Target, has_ands: bool) -> ir.Module:
    """`peak(result, turns, factor)`: s ← s·factor + factor, without its low bits if there are ANDs, in every chain."""
    module = ir.Module("peak")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, I64, F32]), "peak")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    result, turns, factor = function.args
    v = Lanes(b, target, 4)
    by = v.splat(factor)

    def multiplied(s: Value) -> Value:
        return v.fma(s, by, by) if target.fused else v.mul(s, by)

    def turn(_: Value, sums: list[Value]) -> list[Value]:
        return [v.keep_bits(multiplied(s), 16) if has_ands else multiplied(s) for s in sums]

    starts = [v.mul(by, v.constant(float(i + 1))) for i in range(CHAINS)]
    sums = for_range(b, i64(0), turns, starts, turn)
    v.store(functools.reduce(v.add, sums), result)
    b.ret_void()
    return module
