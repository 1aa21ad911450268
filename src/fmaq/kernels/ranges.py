"""What the values of a tensor are like: its largest and smallest magnitudes, and how many bits they need.

One pass at memory speed. From these the arithmetic knows which checks a product can do without, exactly.
"""

from __future__ import annotations

import ctypes
import functools
import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from llvmlite import ir
from torch import Tensor

from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.ir_blocks import F32, I32, I64, POINTER, Value, element, for_range, i32, i64
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.targets import Target

INFINITY_BITS = 0x7F800000
WORDS = 4  # that are found of a tensor's magnitudes


@dataclass(frozen=True)
class Range:
    """Bounds on the float32 values of a tensor.

    Attributes:
        largest: the largest magnitude; 0 where all are zero, NaN where one is not finite.
        smallest: the smallest magnitude above zero; infinite where all are zero.
        significant: bits that suffice for every significand, 1 to 24.
        is_whole: every value is an integer below 2^31 in magnitude.
        fingerprint: of all values in the order of memory, where it was asked for.
    """

    largest: float
    smallest: float
    significant: int
    is_whole: bool
    fingerprint: bytes = b""

    @property
    def is_finite(self) -> bool:
        """Every value is finite."""
        return not math.isnan(self.largest)

    @property
    def above(self) -> int:
        """The least e with every magnitude below 2^e."""
        return int(np.frexp(self.largest)[1])

    @property
    def below(self) -> int:
        """The largest e with every magnitude above zero at least 2^e."""
        return int(np.frexp(self.smallest)[1]) - 1


def _module(target: Target, has_fingerprint: bool) -> ir.Module:
    """`measure(values, count, result)`: words of a tensor's magnitudes.

    The largest bits; the smallest nonzero bits less one; the union of all bits; zero if all are integers below 2^31;
    then the fingerprint, a word a lane: bits are added, and what was there is rotated before.
    """
    module = ir.Module("ranges")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, I64, POINTER]), "measure")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    values, count, result = function.args
    v = Lanes(b, target, 4)
    binary = [v.words, v.words]
    umax = v.declare(f"llvm.umax.v{v.count}i32", v.words, binary)
    umin = v.declare(f"llvm.umin.v{v.count}i32", v.words, binary)

    rotate = v.declare(f"llvm.fshl.v{v.count}i32", v.words, [v.words] * 3)

    def merge(found: list[Value], bits: Value) -> list[Value]:
        prints = [b.add(b.call(rotate, [x, x, v.word(5)]), bits) for x in found[4:]]
        bits = b.and_(bits, v.word(0x7FFFFFFF))
        return [
            b.call(umax, [found[0], bits]),
            b.call(umin, [found[1], b.sub(bits, v.word(1))]),
            b.or_(found[2], bits),
            b.or_(found[3], b.xor(bits, v.bits(b.sitofp(b.fptosi(v.from_bits(bits), v.words), v.vector)))),
            *prints,
        ]

    def whole(i: Value, found: list[Value]) -> list[Value]:
        return merge(found, b.load(element(b, values, i, F32), typ=v.words, align=4))

    def single(i: Value, found: list[Value]) -> list[Value]:
        return merge(found, v.splat(b.load(element(b, values, i, F32), typ=I32, align=4)))

    start = [v.word(0), v.word(-1), v.word(0), v.word(0), *[v.word(0)] * has_fingerprint]
    in_vectors = b.and_(count, i64(-v.count))
    found = for_range(b, i64(0), in_vectors, start, whole, step=v.count)
    found = for_range(b, in_vectors, count, found, single)
    for i, (value, how) in enumerate(zip(found[:WORDS], ("umax", "umin", "or", "or"), strict=True)):
        reduce = v.declare(f"llvm.vector.reduce.{how}.v{v.count}i32", I32, [v.words])
        b.store(b.call(reduce, [value]), b.gep(result, [i32(i)], source_etype=I32))
    for value in found[WORDS:]:
        b.store(value, b.gep(result, [i32(WORDS)], source_etype=I32), align=4)
    b.ret_void()
    return module


@functools.cache
def _measure(target: Target, has_fingerprint: bool) -> tuple[Any, Compiled]:
    compiled = compile_module(_module(target, has_fingerprint), target)
    return compiled.function("measure", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), compiled


def _in_memory_order(x: Tensor) -> Tensor:
    """The same values as one contiguous run, without a copy where the strides allow."""
    if x.is_contiguous():
        return x
    order = sorted((d for d in range(x.dim()) if x.size(d) > 1 and x.stride(d) > 0), key=x.stride, reverse=True)
    index = tuple(slice(None) if d in order else 0 for d in range(x.dim()))
    remaining = sorted(order)
    return x[index].permute([remaining.index(d) for d in order]).contiguous()


def measure(x: Tensor, target: Target, has_fingerprint: bool = False) -> Range:
    """The range of a float32 tensor of any strides, with at least one element."""
    flat = _in_memory_order(x)
    found = np.empty(WORDS + target.lanes(4) * has_fingerprint, np.uint32)
    _measure(target, has_fingerprint)[0](flat.data_ptr(), flat.numel(), found.ctypes.data)
    largest, smallest_less_one, union, fractions = (int(word) for word in found[:WORDS])
    if largest >= INFINITY_BITS:
        return Range(math.nan, math.nan, 24, False)
    fingerprint = found[WORDS:].tobytes()
    if largest == 0:
        return Range(0.0, float("inf"), 1, True, fingerprint)
    mantissa = union & 0x7FFFFF
    trailing = 23 if mantissa == 0 else (mantissa & -mantissa).bit_length() - 1
    smallest = _magnitude(smallest_less_one + 1)
    return Range(_magnitude(largest), smallest, 24 - trailing, fractions == 0, fingerprint)


def _magnitude(bits: int) -> float:
    """The number that a float32's bits stand for. The processor, told to flush, would make zero of a subnormal one."""
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    return math.ldexp(mantissa + (0x800000 if exponent else 0), max(exponent, 1) - 150)
