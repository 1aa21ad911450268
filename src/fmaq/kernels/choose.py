"""Which arithmetic computes a product of given operands: the fastest that is exact for them, and its scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic32 import FLOAT32_EMIN, Fixed32, Float32
from fmaq.kernels.arithmetic64 import General64
from fmaq.kernels.ranges import Range
from fmaq.kernels.targets import Target
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat

NORM_SLACK = 2.0**-80  # above what squares lose that are too small for float32, times norms of at most 2^40

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
    """

    arithmetic: Arithmetic
    a_exponent: int = 0
    b_exponent: int = 0
    a_unit: int = 0
    b_unit: int = 0
    norm_limit: float = 0.0
    product_limit: float = 0.0


def choose(acc: Accumulator, target: Target, a: Range, b: Range, depth: int, use_bounds: bool) -> Choice:
    """The arithmetic for operands of these ranges, neither all zero, and sums of `depth` products.

    Args:
        use_bounds: bounds of tiles and chunks pay for themselves (many rows and columns share them).
    """
    if acc.seed:
        acc = replace(acc, seed=0)  # a kernel is told its seed at run time, and serves them all
    found = _fixed32(acc, a, b, depth) if isinstance(acc.format, FixedFormat) else _float32(acc, target, a, b, depth)
    if found is None:
        return Choice(General64(acc))
    arithmetic, scales, terms = found
    if not use_bounds or not arithmetic.sum_clamped:
        return Choice(arithmetic, *scales)
    return _bounded(arithmetic, scales, a, b, terms)


def _bounded(arithmetic: Float32 | Fixed32, scales: tuple[int, int], a: Range, b: Range, terms: int) -> Choice:
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
    if acc.rounding == "toward_zero":
        return 1.0
    formats = [f for f in (acc.format, acc.product) if isinstance(f, FloatFormat)]
    return (1 + max(2.0**-f.mantissa for f in formats)) ** min(terms + 1, 1000)


def _terms(acc: Accumulator, depth: int) -> int:
    return depth if acc.chunk is None else min(depth, acc.chunk)


Found = tuple[Float32 | Fixed32, tuple[int, int], int]


def _float32(acc: Accumulator, target: Target, a: Range, b: Range, depth: int) -> Found | None:
    """`Float32` with the checks that the operands' ranges leave, and the scales, where it can serve."""
    formats = [f for f in (acc.format, acc.product) if f is not None]
    if not target.fused or not all(isinstance(f, FloatFormat) for f in formats):
        return None
    terms = _terms(acc, depth)
    growth = _growth(acc, terms)
    largest = a.largest * b.largest * growth
    bits = a.significant + b.significant
    is_exact, is_masked, is_clamped = True, False, False
    if isinstance(acc.product, FloatFormat):
        tiny = acc.product.tiny if acc.underflow else 2.0**FLOAT32_EMIN
        is_masked = bits > acc.product.mantissa + 1
        is_clamped = largest > acc.product.max
        is_exact = not is_masked and not is_clamped and a.smallest * b.smallest >= tiny
        largest = min(largest, acc.product.max)
    is_sticky = is_masked and acc.rounding == "nearest_even" and bits > 24
    is_summed_up = largest * terms * growth > acc.format.max
    arithmetic = Float32(acc, is_exact, is_masked, is_sticky, is_clamped, is_summed_up or is_clamped)
    if not _rounds_exactly(arithmetic) or not _constants_fit(arithmetic):
        return None
    scales = (_exact_scales if is_exact else _flushing_scales)(arithmetic.product_scale, a, b)
    return None if scales is None else (arithmetic, scales, terms)


def _rounds_exactly(arithmetic: Float32) -> bool:
    """What float32 loses on the way cannot change a rounding.

    Toward zero, nothing can. Stochastic rounding looks at the `random_bits` behind the last that is kept. To the
    nearest, lost bits matter only where those kept look like a tie. A sum loses bits only if its terms lie more than 23
    places apart, and then the bit behind the last that is kept would have to be the smaller term's (too far away, if
    the mantissas have at most 20 bits together) or the larger one's (which is a product only if it has more bits than
    the sum). With no mantissa, the bit that decides a tie is the hidden one.
    """
    acc = arithmetic.acc
    m = acc.format.mantissa  # type: ignore[union-attr]
    p = acc.product.mantissa if isinstance(acc.product, FloatFormat) else None
    if acc.rounding == "toward_zero":
        return True
    if acc.rounding == "stochastic":
        return max(m, p or 0) + acc.random_bits <= 23
    return p is not None and 1 <= p <= m <= 10


def _constants_fit(arithmetic: Float32) -> bool:
    """The powers of two that a step and the result are multiplied with, and the largest sum, are normal float32."""
    lift = arithmetic.sum_scale - arithmetic.product_scale
    is_normal = abs(lift) <= 126 and abs(arithmetic.sum_scale) <= 126
    return is_normal and arithmetic.acc.format.emax + arithmetic.sum_scale <= 126


def _fixed32(acc: Accumulator, a: Range, b: Range, depth: int) -> Found | None:
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
    first = format.fraction // 2
    scales = (first, format.fraction - first)
    low, high = min(a.below + scales[0], b.below + scales[1]), max(a.above + scales[0], b.above + scales[1])
    if not fits or low < FLOAT32_EMIN or high > 60:
        return None
    terms = _terms(acc, depth)
    largest = min(a.largest * b.largest, product.max if isinstance(product, FixedFormat) else float("inf"))
    may_saturate = format.overflow == "saturate" and largest * terms > format.max
    is_clamped = is_limited and product is not None and product.overflow == "saturate"
    return Fixed32(acc, is_limited, may_saturate or is_clamped), scales, terms


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
