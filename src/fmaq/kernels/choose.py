"""Which arithmetic computes a product of given operands: the fastest that is exact for them, and its scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic32 import FLOAT32_EMIN, Fixed32, Float32
from fmaq.kernels.arithmetic64 import General64, general
from fmaq.kernels.ranges import Range
from fmaq.kernels.rounded32 import Rounded32
from fmaq.kernels.targets import Target
from fmaq.kernels.whole32 import Whole32
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat
from fmaq.numerics.formats import Format

Fast = Float32 | Rounded32 | Fixed32 | Whole32

NORM_SLACK = 2.0**-80  # above what squares lose that are too small for float32, times norms of at most 2^40

LONGEST_OBSERVED = 20  # bits of mantissa, so that a sum's last one is far above float32's

MOST_TERMS = 2**14  # whose squares float32 adds up with a relative error below 2^−9


@dataclass(frozen=True)
class Choice:
    """An arithmetic, and the numbers that it wants at run time.

    Attributes:
        arithmetic: how to compute.
        a_exponent, b_exponent: A and B are multiplied with 2^these on packing.
        a_unit, b_unit: exponents that bring packed operands below 1.
        norm_limit: where the product of squared norms of operands below 1 is at most this, no sum of a chunk saturates.
        product_limit: the same of magnitudes, and no product saturates.
        result_exponent: results are multiplied with 2^this.
    """

    arithmetic: Arithmetic
    a_exponent: int = 0
    b_exponent: int = 0
    a_unit: int = 0
    b_unit: int = 0
    norm_limit: float = 0.0
    product_limit: float = 0.0
    result_exponent: int = 0


def choose(
    acc: Accumulator, target: Target, a: Range, b: Range, depth: int, use_bounds: bool, is_counting: bool = False
) -> Choice:
    """The arithmetic for operands of these ranges, neither all zero, and sums of `depth` products.

    Args:
        use_bounds: bounds of tiles and chunks pay for themselves (many rows and columns share them).
        is_counting: it is to see events.
    """
    if acc.seed:
        acc = replace(acc, seed=0)  # a kernel is told its seed at run time, and serves them all
    shift = _usual_bias(acc)
    if shift:
        of_scaled = replace(a, largest=math.ldexp(a.largest, -shift), smallest=math.ldexp(a.smallest, -shift))
        choice = _choose(_moved(acc, shift), target, of_scaled, b, depth, use_bounds, is_counting)
        a_exponent = choice.a_exponent - shift
        if not isinstance(choice.arithmetic, General64) and abs(a_exponent) <= 126:
            return replace(choice, a_exponent=a_exponent, result_exponent=shift)
    return _choose(acc, target, a, b, depth, use_bounds, is_counting)


def _usual_bias(acc: Accumulator) -> int:
    """What to add to biases so that accumulators that differ in range alone share a kernel; A is scaled likewise."""
    if not isinstance(acc.format, FloatFormat) or isinstance(acc.product, FixedFormat) or not acc.underflow:
        return 0
    shift = 2 ** (acc.format.exponent - 1) - 1 - (acc.format.bias or 0)
    return shift if abs(shift) <= 126 else 0


def _moved(acc: Accumulator, by: int) -> Accumulator:
    """The accumulator with larger biases."""

    def moved(format: Format | None) -> Format | None:
        return replace(format, bias=(format.bias or 0) + by) if isinstance(format, FloatFormat) else format

    return replace(acc, format=moved(acc.format), product=moved(acc.product))  # type: ignore[arg-type]


def _choose(
    acc: Accumulator, target: Target, a: Range, b: Range, depth: int, use_bounds: bool, is_counting: bool
) -> Choice:
    if (
        acc.outer is not None
        or acc.format.half_unit
        or (acc.product and acc.product.half_unit)
        or acc.product_rounding
        or acc.rounding not in ("toward_zero", "nearest_even", "stochastic")
    ):
        return Choice(general(acc))
    found = (_fixed if isinstance(acc.format, FixedFormat) else _float32)(acc, target, a, b, depth)
    if found is not None and is_counting:
        found = _counting(found, a, b)
    if found is None:
        return Choice(general(acc))
    arithmetic, scales, terms = found
    if not use_bounds or not arithmetic.sum_clamped:
        return Choice(arithmetic, *scales)
    return _bounded(arithmetic, scales, a, b, terms)


def _counting(found: Found, a: Range, b: Range) -> Found | None:
    """The same where `Float32` sees every event: see there."""
    arithmetic, _, terms = found
    product, format = arithmetic.acc.product, arithmetic.acc.format
    if not isinstance(arithmetic, Float32) or not isinstance(product, FloatFormat):
        return None
    arithmetic = replace(arithmetic, product_exact=False)
    scales = _flushing_scales(arithmetic.product_scale, a, b)
    is_short = product.mantissa <= format.mantissa <= LONGEST_OBSERVED  # type: ignore[union-attr]
    if scales is None or not is_short or not _constants_fit(arithmetic):
        return None
    is_flushed = min(a.below + scales[0], b.below + scales[1]) < FLOAT32_EMIN
    return None if is_flushed else (arithmetic, scales, terms)


def _bounded(arithmetic: Fast, scales: tuple[int, int], a: Range, b: Range, terms: int) -> Choice:
    """The choice that decides on saturation by tile and chunk, if float32 holds its limits."""
    acc = arithmetic.acc
    units = (-a.above - scales[0], -b.above - scales[1])
    growth = _growth(acc, terms)
    if max(map(abs, units)) > 126 or growth > 2 or terms > MOST_TERMS:
        return Choice(arithmetic, *scales)
    span = 2.0 ** -(a.above + b.above) / growth * (1 - 2.0**-8)
    norm_limit = (acc.format.max * span) ** 2 - NORM_SLACK
    product_limit = min((acc.product or acc.format).max * span, 2.0**126)
    norm_limit = min(max(norm_limit, -1.0), 2.0**126)
    return Choice(replace(arithmetic, by_chunk=True), *scales, *units, norm_limit, product_limit)


def _growth(acc: Accumulator, terms: int) -> float:
    """How much larger than the exact one rounding can make a product, or a sum of `terms` of them."""
    if acc.rounding == "toward_zero" or isinstance(acc.format, FixedFormat):
        return 1.0
    formats = [f for f in (acc.format, acc.product) if isinstance(f, FloatFormat)]
    return (1 + max(2.0**-f.mantissa for f in formats)) ** min(terms + 1, 1000)


def _terms(acc: Accumulator, depth: int) -> int:
    return depth if acc.chunk is None else min(depth, acc.chunk)


Found = tuple[Fast, tuple[int, int], int]


def _float32(acc: Accumulator, target: Target, a: Range, b: Range, depth: int) -> Found | None:
    """`Float32` or `Rounded32` with the checks that the operands' ranges leave, and the scales, where one can serve."""
    formats = [f for f in (acc.format, acc.product) if f is not None]
    if not target.fused or not all(isinstance(f, FloatFormat) for f in formats):
        return None
    terms = _terms(acc, depth)
    growth = _growth(acc, terms)
    largest = a.largest * b.largest * growth
    is_exact, is_masked, is_clamped = True, False, False
    if isinstance(acc.product, FloatFormat):
        tiny = acc.product.tiny if acc.underflow else 2.0**FLOAT32_EMIN
        is_masked = a.significant + b.significant > acc.product.mantissa + 1
        is_clamped = largest > acc.product.max
        is_exact = not is_masked and not is_clamped and a.smallest * b.smallest >= tiny
        largest = min(largest, acc.product.max)
    is_summed_up = largest * terms * growth > acc.format.max
    kind = Float32 if acc.rounding == "toward_zero" else Rounded32
    arithmetic = kind(acc, is_exact, is_masked, is_clamped, is_summed_up or is_clamped)
    if not _rounds_exactly(acc) or not _constants_fit(arithmetic):
        return None
    if isinstance(arithmetic, Rounded32) and not _has_headroom(arithmetic, a, b, largest):
        return None
    scales = _scales(arithmetic, a, b)
    return None if scales is None else (arithmetic, scales, terms)


def _rounds_exactly(acc: Accumulator) -> bool:
    """What float32 loses on the way cannot change a rounding.

    Toward zero, nothing can. Stochastic rounding looks at the `random_bits` behind the last that is kept. To the
    nearest, a product is rounded once; a sum that float32 rounds first is rounded twice, which differs from once only
    next to a tie of the format. A sum loses bits only if its terms lie more than 23 places apart, and then it lies next
    to the larger one, which is no tie: a sum has no more bits than the format, nor has a product, if its mantissa is no
    longer. With no mantissa, the bit that decides a tie is the hidden one.
    """
    m = acc.format.mantissa  # type: ignore[union-attr]
    p = acc.product.mantissa if isinstance(acc.product, FloatFormat) else None
    if acc.rounding == "toward_zero":
        return True
    if acc.rounding == "stochastic":
        return max(m, p or 0) + acc.random_bits <= 23
    return p is not None and 1 <= p <= m <= 10


def _constants_fit(arithmetic: Float32 | Rounded32) -> bool:
    """The powers of two that a step and the result are multiplied with, and the largest sum, are normal float32."""
    lift = arithmetic.sum_scale - arithmetic.product_scale
    is_normal = abs(lift) <= 126 and abs(arithmetic.sum_scale) <= 126
    return is_normal and arithmetic.acc.format.emax + arithmetic.sum_scale <= 126


def _fixed(acc: Accumulator, target: Target, a: Range, b: Range, depth: int) -> Found | None:
    """`Whole32` or `Fixed32`, where one can serve."""
    format = acc.format
    assert isinstance(format, FixedFormat)
    first = format.fraction // 2
    scales = (first, format.fraction - first)
    low, high = min(a.below + scales[0], b.below + scales[1]), max(a.above + scales[0], b.above + scales[1])
    if low < FLOAT32_EMIN or high > 60:
        return None
    terms = _terms(acc, depth)
    found = _whole32(acc, target, a, b, terms) or _fixed32(acc, a, b, terms)
    return None if found is None else (found, scales, terms)


def _whole32(acc: Accumulator, target: Target, a: Range, b: Range, terms: int) -> Whole32 | None:
    """Of whole operands whose products need no rounding, if 24 bits hold every sum (and one half, if it saturates)."""
    format, product = acc.format, acc.product
    assert isinstance(format, FixedFormat)
    largest = a.largest * b.largest
    if product is not None:
        is_open = isinstance(product, FixedFormat) and product.fraction >= 0 and largest <= product.max
        if not is_open:
            return None
    if not (a.is_whole and b.is_whole and format.fraction >= 0 and target.fused):
        return None
    units, half = largest * 2.0**format.fraction, 2.0 ** (format.width - 1)
    fits = units * terms < 2.0**24 if format.overflow == "wrap" else units + half < 2.0**23
    return Whole32(acc, format.overflow == "saturate" and largest * terms > format.max) if fits else None


def _fixed32(acc: Accumulator, a: Range, b: Range, terms: int) -> Fixed32 | None:
    """`Fixed32` where products fit in int32 and are truncated exactly."""
    format, product = acc.format, acc.product
    assert isinstance(format, FixedFormat)
    if acc.rounding != "toward_zero" or (format.overflow == "saturate" and format.width > 30):
        return None
    steps = a.largest * b.largest * 2.0**format.fraction
    if isinstance(product, FixedFormat) and product.fraction == format.fraction:
        is_limited = steps >= 2.0 ** (product.width - 1) - 1
        fits = product.width <= 24 if product.overflow == "saturate" else steps < 2.0**24
    elif product is None and a.is_whole and b.is_whole and format.fraction >= 0:
        is_limited, fits = False, steps < 2.0**24
    else:
        return None
    if not fits:
        return None
    largest = min(a.largest * b.largest, product.max if isinstance(product, FixedFormat) else float("inf"))
    may_saturate = format.overflow == "saturate" and largest * terms > format.max
    is_clamped = is_limited and product is not None and product.overflow == "saturate"
    return Fixed32(acc, is_limited, may_saturate or is_clamped)


def _has_headroom(arithmetic: Rounded32, a: Range, b: Range, largest: float) -> bool:
    """Products, sums with a product of up to `largest`, and what they are rounded with, are finite."""
    product = a.above + b.above + arithmetic.product_scale
    total = math.frexp(max(largest, arithmetic.acc.format.max))[1] + 1 + arithmetic.sum_scale
    return max(product, total) + arithmetic.headroom <= 126


def _scales(arithmetic: Float32 | Rounded32, a: Range, b: Range) -> tuple[int, int] | None:
    """Exponents that A and B are multiplied with, which add up to the product's; None if float32 cannot hold them."""
    total = arithmetic.product_scale
    if arithmetic.product_exact:
        return _exact_scales(total, a, b)
    return (_balanced_scales if isinstance(arithmetic, Rounded32) else _flushing_scales)(total, a, b)


def _balanced_scales(total: int, a: Range, b: Range) -> tuple[int, int] | None:
    """Exponents that add up to `total` and bring both operands' largest magnitudes to about the same.

    An operand that is flushed on the way has products far below 2, which are flushed too, if the others are no larger
    than 2^64.
    """
    top = total + a.above + b.above
    a_exponent = top // 2 - a.above
    return _normal(a_exponent, total - a_exponent) if -200 <= top <= 126 else None


def _flushing_scales(total: int, a: Range, b: Range) -> tuple[int, int] | None:
    """Exponents that add up to `total` and bring both operands below 1.

    An operand that becomes subnormal on the way is flushed; its product, with an operand below 1, is then below 2^−126
    and is flushed anyway, as it must be.
    """
    slack = -a.above - b.above - total
    if slack < 0:
        return None
    a_exponent = -a.above - slack // 2
    return _normal(a_exponent, total - a_exponent)


def _exact_scales(total: int, a: Range, b: Range) -> tuple[int, int] | None:
    """Exponents that add up to `total` and keep every nonzero operand a normal float32."""
    low = max(FLOAT32_EMIN - a.below, total - (127 - b.above))
    high = min(127 - a.above, total - (FLOAT32_EMIN - b.below))
    if low > high:
        return None
    a_exponent = min(max(total // 2, low), high)
    return _normal(a_exponent, total - a_exponent)


def _normal(a_exponent: int, b_exponent: int) -> tuple[int, int] | None:
    """The exponents, if float32 holds their powers of two as normal numbers."""
    return (a_exponent, b_exponent) if max(abs(a_exponent), abs(b_exponent)) <= 126 else None
