"""What the values of a tensor are like: its largest and smallest magnitudes, and how many bits they need.

One pass at memory speed. From these the arithmetic knows which checks a product can do without, exactly.
"""

from __future__ import annotations

import ctypes
import functools
import math
import threading
from typing import Any, NamedTuple

from llvmlite import ir
from torch import Tensor

from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.frozen import store_of
from fmaq.kernels.ir_blocks import F32, I32, I64, POINTER, Value, element, for_range, i32, i64
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.targets import Target, current_target

INFINITY_BITS = 0x7F800000
WORDS = 4  # that are found of a tensor's magnitudes

MANTISSA_BITS, EXPONENT_BITS = 0x007FFFFF, 0x7F800000
COARSE_EXPONENT_BITS = 0x78000000  # multiples of 16
FEW_BITS = 8  # of significands whose products may need no rounding: the smallest one counts


class Range(NamedTuple):
    """Bounds on the float32 values of a tensor.

    Attributes:
        largest: the largest magnitude; 0 where all are zero, NaN where one is not finite.
        smallest: the smallest magnitude above zero; infinite where all are zero.
        significant: bits that suffice for every significand, 1 to 24.
        is_whole: every value is an integer below 2^31 in magnitude.
    """

    largest: float
    smallest: float
    significant: int
    is_whole: bool

    @property
    def above(self) -> int:
        """The least e with every magnitude below 2^e."""
        return math.frexp(self.largest)[1]

    @property
    def below(self) -> int:
        """The largest e with every magnitude above zero at least 2^e."""
        return math.frexp(self.smallest)[1] - 1


class Measured(NamedTuple):
    """A `Range` as it was found, in plain integers.

    Attributes:
        largest, smallest: bits of float32 magnitudes; 0 and those of infinity where all values are zero.
        significant, is_whole: see `Range`.
    """

    largest: int
    smallest: int
    significant: int
    is_whole: bool

    @property
    def is_finite(self) -> bool:
        """Every value is finite."""
        return self.largest < INFINITY_BITS

    def widened(self, kept: int) -> Measured:
        """One of few ranges that this one lies in, so that what depends on ranges need not be decided for each.

        Args:
            kept: bits of the largest one's mantissa that stay. Those behind become ones, as far as significands reach:
                the largest value of a narrow format stays what it is.
        """
        largest, smallest, significant, is_whole = self
        ones = ((1 << significant - 1) - 1) << 24 - significant
        places = EXPONENT_BITS if kept or significant <= FEW_BITS else COARSE_EXPONENT_BITS
        return Measured(largest | ones & (MANTISSA_BITS >> kept), smallest & places or smallest, significant, is_whole)


def _module(target: Target) -> ir.Module:
    """`measure(values, count, result)`: words of a tensor's magnitudes.

    The largest bits; the smallest nonzero bits less one; the union of all bits; zero if all are integers below 2^31.
    """
    module = ir.Module("ranges")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, I64, POINTER]), "measure")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    values, count, result = function.args
    v = Lanes(b, target, 4)
    binary = [v.words, v.words]
    umax = v.declare(f"llvm.umax.v{v.count}i32", v.words, binary)
    umin = v.declare(f"llvm.umin.v{v.count}i32", v.words, binary)

    def merge(found: list[Value], bits: Value) -> list[Value]:
        bits = b.and_(bits, v.word(0x7FFFFFFF))
        return [
            b.call(umax, [found[0], bits]),
            b.call(umin, [found[1], b.sub(bits, v.word(1))]),
            b.or_(found[2], bits),
            b.or_(found[3], b.xor(bits, v.bits(b.sitofp(b.fptosi(v.from_bits(bits), v.words), v.vector)))),
        ]

    def whole(i: Value, found: list[Value]) -> list[Value]:
        return merge(found, b.load(element(b, values, i, F32), typ=v.words, align=4))

    def single(i: Value, found: list[Value]) -> list[Value]:
        return merge(found, v.splat(b.load(element(b, values, i, F32), typ=I32, align=4)))

    start = [v.word(0), v.word(-1), v.word(0), v.word(0)]
    in_vectors = b.and_(count, i64(-v.count))
    found = for_range(b, i64(0), in_vectors, start, whole, step=v.count)
    found = for_range(b, in_vectors, count, found, single)
    for i, (value, how) in enumerate(zip(found, ("umax", "umin", "or", "or"), strict=True)):
        reduce = v.declare(f"llvm.vector.reduce.{how}.v{v.count}i32", I32, [v.words])
        b.store(b.call(reduce, [value]), b.gep(result, [i32(i)], source_etype=I32))
    b.ret_void()
    return module


@functools.cache
def _measure(target: Target) -> tuple[Any, Compiled]:
    compiled = compile_module(_module(target), target)
    return compiled.function("measure", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), compiled


@functools.lru_cache(maxsize=4096)
def _is_dense(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """The elements fill one run of memory, in any order of dimensions."""
    end = 1
    for stride, size in sorted(pair for pair in zip(strides, shape, strict=True) if pair[1] > 1):
        if stride != end:
            return False
        end *= size
    return True


def in_memory_order(x: Tensor) -> Tensor:
    """The same values as one run of memory, without a copy where the strides allow."""
    if _is_dense(x.shape, x.stride()):
        return x
    order = sorted((d for d in range(x.dim()) if x.size(d) > 1 and x.stride(d) > 0), key=x.stride, reverse=True)
    index = tuple(slice(None) if d in order else 0 for d in range(x.dim()))
    remaining = sorted(order)
    return x[index].permute([remaining.index(d) for d in order]).contiguous()


class _Found(threading.local):
    """Where a thread's measurements are written."""

    def __init__(self) -> None:
        self.words = (ctypes.c_uint32 * WORDS)()
        self.address = ctypes.addressof(self.words)


_found = _Found()


def measured(x: Tensor, target: Target) -> Measured:
    """The range of a float32 tensor of any strides, with at least one element."""
    store = store_of(x)
    return _measured(x, target) if store is None else store.once(x, ("measured", target), lambda: _measured(x, target))


def _measured(x: Tensor, target: Target) -> Measured:
    x = in_memory_order(x)
    words, address = _found.words, _found.address
    _measure(target)[0](x.data_ptr(), x.numel(), address)
    largest, smallest_less_one, union, fractions = words[:WORDS]
    if largest == 0:
        return Measured(0, INFINITY_BITS, 1, True)
    mantissa = union & MANTISSA_BITS
    trailing = 23 if mantissa == 0 else (mantissa & -mantissa).bit_length() - 1
    return Measured(largest, smallest_less_one + 1, 24 - trailing, fractions == 0)


def range_of(found: Measured) -> Range:
    """In numbers."""
    largest, smallest, significant, is_whole = found
    if not found.is_finite:
        return Range(math.nan, math.nan, 24, False)
    return Range(_magnitude(largest), _magnitude(smallest) if largest else math.inf, significant, is_whole)


def largest_magnitude(x: Tensor) -> float:
    """Of a float32 tensor of any strides, with at least one element; NaN where a value is not finite."""
    found = measured(x, current_target())
    return _magnitude(found.largest) if found.is_finite else math.nan


def measure(x: Tensor, target: Target) -> Range:
    """The range of a float32 tensor of any strides, with at least one element."""
    return range_of(measured(x, target))


def _magnitude(bits: int) -> float:
    """The number that a float32's bits stand for. The processor, told to flush, would make zero of a subnormal one."""
    exponent, mantissa = bits >> 23, bits & 0x7FFFFF
    return math.ldexp(mantissa + (0x800000 if exponent else 0), max(exponent, 1) - 150)
