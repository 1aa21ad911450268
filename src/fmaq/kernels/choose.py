"""Which arithmetic computes a product of given operands: the fastest that is exact for them, and its scales."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import FLOAT32_EMIN, Arithmetic, General64, Scaled32
from fmaq.kernels.ranges import Range
from fmaq.kernels.targets import Target
from fmaq.numerics import Accumulator, FloatFormat

NORM_SLACK = 2.0**-80  # above what squares lose that are too small for float32, times norms of at most 2^40


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
    """The arithmetic for operands of these ranges, neither of them all zero, and a sum of `depth` products.

    Args:
        use_bounds: bounds of tiles and chunks pay for themselves (many rows and columns share them).
    """
    if acc.seed:
        acc = replace(acc, seed=0)  # a kernel is told its seed at run time, and serves them all
    arithmetic = _scaled32(acc, target, a, b, depth)
    if arithmetic is None:
        return Choice(General64(acc))
    scales = (_exact_scales if arithmetic.product_exact else _flushing_scales)(arithmetic.product_scale, a, b)
    if scales is None:
        return Choice(General64(acc))
    if not use_bounds or not (arithmetic.product_clamped or arithmetic.sum_clamped):
        return Choice(arithmetic, *scales)
    units = (-a.above - scales[0], -b.above - scales[1])
    if max(map(abs, units)) > 126:
        return Choice(arithmetic, *scales)
    span = 2.0 ** -(a.above + b.above)
    norm_limit = (acc.format.max * span) ** 2 * (1 - 2.0**-8) - NORM_SLACK
    product_limit = min((acc.product or acc.format).max * span * (1 - 2.0**-8), 2.0**126)
    return Choice(
        replace(arithmetic, by_chunk=True), *scales, *units, min(max(norm_limit, -1.0), 2.0**126), product_limit
    )


def _scaled32(acc: Accumulator, target: Target, a: Range, b: Range, depth: int) -> Scaled32 | None:
    """The float32 arithmetic with the checks that the operands' ranges leave, where it can serve."""
    formats = [f for f in (acc.format, acc.product) if f is not None]
    if acc.rounding != "toward_zero" or not target.fused or not all(isinstance(f, FloatFormat) for f in formats):
        return None
    largest = a.largest * b.largest
    is_exact, is_masked, is_clamped = True, False, False
    if isinstance(acc.product, FloatFormat):
        tiny = acc.product.tiny if acc.underflow else 2.0**FLOAT32_EMIN
        is_masked = a.significant + b.significant > acc.product.mantissa + 1
        is_clamped = largest > acc.product.max
        is_exact = not is_masked and not is_clamped and a.smallest * b.smallest >= tiny
        largest = min(largest, acc.product.max)
    terms = depth if acc.chunk is None else min(depth, acc.chunk)
    arithmetic = Scaled32(acc, is_exact, is_masked, is_clamped, sum_clamped=largest * terms > acc.format.max)
    return arithmetic if _constants_fit(arithmetic) else None


def _constants_fit(arithmetic: Scaled32) -> bool:
    """The powers of two that a step and the result are multiplied with are normal float32."""
    lift = arithmetic.sum_scale - arithmetic.product_scale
    return abs(lift) <= 126 and abs(arithmetic.output_exponent) <= 126


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
