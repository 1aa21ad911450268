"""Which arithmetic computes a product of given operands: the fastest that is exact for them, and its scales."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic32 import FLOAT32_EMIN, Fixed32, Float32
from fmaq.kernels.arithmetic64 import General64, general
from fmaq.kernels.choose_levels import fits_single, merging_levels
from fmaq.kernels.grids import ON_INTEGERS, is_right_by_truncation, most_away
from fmaq.kernels.ranges import Range
from fmaq.kernels.rounded32 import Rounded32
from fmaq.kernels.targets import Target
from fmaq.kernels.whole32 import Whole32
from fmaq.numerics import Accumulator, FixedFormat, Float32Format, FloatFormat, Format

Fast = Float32 | Rounded32 | Fixed32 | Whole32

NORM_SLACK = 2.0**-80  # above what squares lose that are too small for float32, times norms of at most 2^40

LONGEST_OBSERVED = 20  # bits of mantissa, so that a sum's last one is far above float32's
OBSERVED_TOGETHER = 19  # of a sum and of its term, where the sum has a half unit or is rounded to the nearest

MOST_COUNTED = 2**28  # products of a sum, of which the 8 cells of a tile see no more events than 32 bits count

LEAST_OF_A = -100  # exponent that A is multiplied with, unless it must be less: bounds bring it back up to 1

GUARD_BITS = 2  # behind the last one, of a product to odd, so that rounding its sum is right

MOST_GROWTH = 16.0  # by rounding, up to which bounds of chunks are worth taking

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
    acc = acc.with_seed(0)  # a kernel is told its seed at run time, and serves them all
    shift = _usual_bias(acc, depth)
    if shift:
        of_scaled = a._replace(largest=math.ldexp(a.largest, -shift), smallest=math.ldexp(a.smallest, -shift))
        choice = _choose(_moved(acc, shift), target, of_scaled, b, depth, use_bounds, is_counting)
        a_exponent = choice.a_exponent - shift
        if not isinstance(choice.arithmetic, General64) and abs(a_exponent) <= 126:
            return replace(choice, a_exponent=a_exponent, result_exponent=shift)
    return _choose(acc, target, a, b, depth, use_bounds, is_counting)


def _usual_bias(acc: Accumulator, depth: int) -> int:
    """What to add to biases so that accumulators that differ in range alone share a kernel; A is scaled likewise."""
    formats = [acc.format, acc.product, *(level.format for level in acc.levels)]
    if not acc.underflow or any(isinstance(format, FixedFormat) for format in formats):
        return 0
    assert isinstance(acc.format, FloatFormat)
    shift = 2 ** (acc.format.exponent - 1) - 1 - (acc.format.bias or 0)
    below: Format | Float32Format = acc.format
    for level in acc.levels:
        if isinstance(level.format, Float32Format):
            fits = fits_single(below, acc.underflow, depth)  # where it ends is not moved along
        else:
            fits = level.format.emin - shift >= FLOAT32_EMIN and level.format.emax - shift <= 127
        if acc.outer is not None and not fits:
            return 0
        below = level.format
    return shift if abs(shift) <= 126 else 0


def _moved(acc: Accumulator, by: int) -> Accumulator:
    """The accumulator with larger biases, on all levels."""
    outer = acc.outer
    moved = _moved(outer, by) if isinstance(outer, Accumulator) else _moved_format(outer, by)
    return replace(acc, format=_moved_format(acc.format, by), product=_moved_format(acc.product, by), outer=moved)  # type: ignore[arg-type]


def _moved_format(format: Format | Float32Format | None, by: int) -> Format | Float32Format | None:
    return replace(format, bias=(format.bias or 0) + by) if isinstance(format, FloatFormat) else format


def _choose(
    acc: Accumulator, target: Target, a: Range, b: Range, depth: int, use_bounds: bool, is_counting: bool
) -> Choice:
    found = (_fixed if isinstance(acc.format, FixedFormat) else _float32)(acc, target, a, b, depth)
    if found is not None and is_counting:
        found = _counting(found, a, b) if depth <= MOST_COUNTED else None
    below = acc.format if isinstance(acc.format, FloatFormat) else _narrowed(acc, a, b, depth)
    levels = None if found is None else merging_levels(acc, below, _scale_of_sums(found[0]), depth)
    if found is None or levels is None or (is_counting and not all(level.sees_events for level in levels)):
        return Choice(general(acc))
    arithmetic, scales, terms = found
    arithmetic = replace(arithmetic, levels=levels)
    if is_counting:
        arithmetic = arithmetic.looking()
    units = (-a.above - scales[0], -b.above - scales[1])
    if max(map(abs, units)) > 126:
        return Choice(arithmetic, *scales)
    choice = Choice(arithmetic, *scales, *units)
    return _bounded(choice, arithmetic, a, b, terms) if use_bounds and arithmetic.sum_clamped else choice


def _scale_of_sums(arithmetic: Fast) -> int:
    """Sums of chunks are passed on times 2^this."""
    if isinstance(arithmetic, (Float32, Rounded32)):
        return arithmetic.sum_scale
    finer = arithmetic.finer if isinstance(arithmetic, Fixed32) else 0
    return arithmetic.acc.format.fraction + finer  # type: ignore[union-attr]


def _counting(found: Found, a: Range, b: Range) -> Found | None:
    """The same where `Float32` or `Rounded32` sees every event: see there."""
    arithmetic, _, terms = found
    if not isinstance(arithmetic, (Float32, Rounded32)):
        return None
    product, format = arithmetic.acc.product, arithmetic.acc.format
    assert isinstance(format, FloatFormat)
    if isinstance(product, FloatFormat):
        p, m = product.significant, format.significant
        how = "short" if m + max(m, p) <= OBSERVED_TOGETHER else "any"
        if isinstance(arithmetic, Float32) and not format.half_unit and p <= m <= LONGEST_OBSERVED:
            how = "truncated"
        arithmetic = replace(arithmetic, product_exact=False, terms=how)
    scales = _scales(arithmetic, a, b, is_counting=True)
    if scales is None or not _constants_fit(arithmetic):
        return None
    if isinstance(arithmetic, Rounded32) and not _has_headroom(arithmetic, a, b, scales):
        return None
    is_flushed = min(a.below + scales[0], b.below + scales[1]) < FLOAT32_EMIN
    return None if is_flushed else (arithmetic, scales, terms)


def _bounded(choice: Choice, arithmetic: Fast, a: Range, b: Range, terms: int) -> Choice:
    """The choice that decides on saturation by tile and chunk, if float32 holds its limits."""
    acc = arithmetic.acc
    growth = _growth(acc, terms)
    if growth > MOST_GROWTH or terms > MOST_TERMS:
        return choice
    span = 2.0 ** -(a.above + b.above) / growth * (1 - 2.0**-8)
    largest = acc.format.max
    if isinstance(acc.product, FixedFormat):
        largest -= terms * most_away(acc.product, acc.rounding_of_products)
    if isinstance(arithmetic, Fixed32):
        largest -= terms * most_away(acc.format, acc.rounding)
    norm_limit = max(largest * span, 0.0) ** 2 - NORM_SLACK
    product_limit = min((acc.product or acc.format).max * span, 2.0**126)
    norm_limit = min(max(norm_limit, -1.0), 2.0**126)
    by_chunk = replace(arithmetic, by_chunk=True)
    return replace(choice, arithmetic=by_chunk, norm_limit=norm_limit, product_limit=product_limit)


def _growth(acc: Accumulator, terms: int) -> float:
    """How many times as large as the exact one rounding can make a product, or a sum of `terms` of them, in floats."""
    if isinstance(acc.format, FixedFormat):
        return 1.0
    away = most_away(acc.format, acc.rounding)
    if isinstance(acc.product, FloatFormat):
        away = max(away, most_away(acc.product, acc.rounding_of_products))
    exponent = (terms + 1) * math.log1p(away)
    return math.exp(exponent) * (1 + 2.0**-40) if exponent < 80 else math.inf


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
        tiny = 2.0 ** (acc.product.emin if acc.underflow else FLOAT32_EMIN)
        is_masked = acc.product.half_unit or a.significant + b.significant > acc.product.mantissa + 1
        is_clamped = largest > acc.product.max
        is_exact = not is_masked and not is_clamped and a.smallest * b.smallest >= tiny
        largest = min(largest, acc.product.max)
    is_summed_up = largest * terms * growth > acc.format.max
    checks = (acc, is_exact, is_masked, is_clamped, is_summed_up or is_clamped)
    is_short = a.significant + b.significant <= 24
    truncates = acc.rounding == "toward_zero" and not (is_masked and acc.rounding_of_products != "toward_zero")
    by_mask = target.name == "avx512" and acc.rounding == "nearest_away"
    arithmetic = Float32(*checks) if truncates else Rounded32(*checks, product_short=is_short, by_mask=by_mask)
    is_right = _rounds_sums(acc) and (not is_masked or _rounds_products(acc, is_short))
    if not is_right or not _constants_fit(arithmetic):
        return None
    scales = _scales(arithmetic, a, b)
    if scales is None or (isinstance(arithmetic, Rounded32) and not _has_headroom(arithmetic, a, b, scales)):
        return None
    return arithmetic, scales, terms


def _rounds_sums(acc: Accumulator) -> bool:
    """What float32 loses of a sum cannot change its rounding.

    Where the processor truncates, it cannot if the rounding asks for no bit that float32 has not. To the nearest, even,
    the processor rounds so, too: a sum that it rounds first is rounded twice, which differs from once only next to a
    tie of the format. A sum loses bits only if its terms lie more than 23 places apart, and then it lies next to the
    larger one, which is no tie: a sum has no more bits than the format, nor has a product, if its mantissa is no
    longer. With no mantissa, the bit that decides a tie is the hidden one.
    """
    m = acc.format.mantissa  # type: ignore[union-attr]
    if acc.rounding == "nearest_even":
        p = acc.product.significant if isinstance(acc.product, FloatFormat) else None
        return p is not None and 1 <= p <= m <= 10
    return is_right_by_truncation(acc.rounding, m, acc.random_bits)


def _rounds_products(acc: Accumulator, is_short: bool) -> bool:
    """What float32 loses of a product, nothing if it is short, cannot change its rounding."""
    assert isinstance(acc.product, FloatFormat)
    m, rounding = acc.product.mantissa, acc.rounding_of_products
    if rounding == "stochastic":
        return m + acc.random_bits <= 23 and (is_short or acc.rounding != "nearest_even")
    if is_short:
        return True
    if acc.rounding == "nearest_even":
        return rounding == "nearest_even"
    return is_right_by_truncation(rounding, m, acc.random_bits)


# --- Fixed point, and scales ------------------------------------------------------------------------------------------


def _constants_fit(arithmetic: Float32 | Rounded32) -> bool:
    """The powers of two that a step and the result are multiplied with, and the largest sum, are normal float32."""
    scales = [arithmetic.sum_scale, arithmetic.product_scale]
    if isinstance(arithmetic, Rounded32):
        scales.append(arithmetic.total_scale)
    is_normal = max(scales) - min(scales) <= 125 and abs(arithmetic.sum_scale) <= 126
    return is_normal and arithmetic.acc.format.emax + arithmetic.sum_scale <= 126


def _fixed(acc: Accumulator, target: Target, a: Range, b: Range, depth: int) -> Found | None:
    """`Whole32` or `Fixed32`, where one can serve."""
    format = acc.format
    assert isinstance(format, FixedFormat)
    is_open = _largest_sum(acc, a, b, depth if acc.outer is None else _terms(acc, depth)) <= format.max
    terms = _terms(acc, depth)
    found = _whole32(acc, target, a, b, terms, is_open) or _fixed32(acc, target, a, b, terms, is_open)
    if found is None:
        return None
    total = format.fraction
    if isinstance(found, Fixed32):
        total += found.finer - found.coarser
    scales = (total // 2, total - total // 2)
    low, high = min(a.below + scales[0], b.below + scales[1]), max(a.above + scales[0], b.above + scales[1])
    return None if low < FLOAT32_EMIN or high > 60 else (found, scales, terms)


def _largest_sum(acc: Accumulator, a: Range, b: Range, terms: int) -> float:
    """No sum of a fixed format and so many products is larger in magnitude before it is limited."""
    largest = a.largest * b.largest
    if isinstance(acc.product, FixedFormat):
        largest = min(largest + most_away(acc.product, acc.rounding_of_products), -acc.product.min)
        if acc.product.overflow == "wrap" and largest > acc.product.max:
            largest = -acc.product.min
    elif acc.product is not None:
        largest = acc.product.max
    return (largest + most_away(acc.format, acc.rounding)) * terms


def _narrowed(acc: Accumulator, a: Range, b: Range, depth: int) -> FixedFormat:
    """A fixed format that holds every sum of a chunk, as they are for operands of these ranges."""
    format = acc.format
    assert isinstance(format, FixedFormat)
    largest = _largest_sum(acc, a, b, _terms(acc, depth)) * 2.0**format.fraction
    width = max(2, math.frexp(largest)[1] + 1) if largest < 2.0**32 else 32
    return replace(format, width=min(width, format.width))


def _whole32(acc: Accumulator, target: Target, a: Range, b: Range, terms: int, is_open: bool) -> Whole32 | None:
    """Of whole operands whose products need no rounding, if 24 bits hold every sum (and one half, if it saturates)."""
    format, product = acc.format, acc.product
    assert isinstance(format, FixedFormat)
    largest = a.largest * b.largest
    if product is not None:
        is_unrounded = isinstance(product, FixedFormat) and product.fraction >= 0 and largest <= product.max
        if not is_unrounded:
            return None
    if not (a.is_whole and b.is_whole and format.fraction >= 0 and target.fused):
        return None
    units, half = largest * 2.0**format.fraction, 2.0 ** (format.width - 1)
    fits = units * terms < 2.0**24 if is_open or format.overflow == "wrap" else units + half < 2.0**23
    may_saturate = format.overflow == "saturate" and largest * terms > format.max
    return Whole32(acc, may_saturate, is_open) if fits else None


def _fixed32(acc: Accumulator, target: Target, a: Range, b: Range, terms: int, is_open: bool) -> Fixed32 | None:
    """`Fixed32` where products fit in int32 and are rounded exactly, and so do sums in units of the finer of both."""
    format, product = acc.format, acc.product
    assert isinstance(format, FixedFormat)
    largest, finer, coarser, is_limited = a.largest * b.largest, 0, 0, False
    if isinstance(product, FixedFormat):
        finer, coarser = max(0, product.fraction - format.fraction), max(0, format.fraction - product.fraction)
        rounding, half = acc.rounding_of_products, 2.0 ** (product.width - 1)
        steps = largest * 2.0**product.fraction
        is_limited = steps >= half - 1
        most = _most_steps(rounding, target)
        fits = half <= most if product.overflow == "saturate" else steps + 1 < most
        fits = fits and min(steps + 1, half) * 2.0**coarser <= 2.0**30
    elif product is not None:
        return None
    else:
        rounding = acc.rounding if acc.rounding in ("floor", "half_up") else "odd"
        if a.is_whole and b.is_whole and format.fraction >= 0:
            rounding = "toward_zero"
        finer = GUARD_BITS if rounding == "odd" else 0
        steps, most = largest * 2.0 ** (format.fraction + finer), _most_steps(rounding, target)
        is_limited = steps + 1 >= most
        fits = not is_limited or (format.overflow == "saturate" and 2.0 ** (format.width + finer) < most)
    if finer:
        fits = fits and acc.rounding in ON_INTEGERS and format.width + finer <= 30
    if not fits or (format.overflow == "saturate" and format.width > 30 and not is_open):
        return None
    may_saturate = format.overflow == "saturate" and _largest_sum(acc, a, b, terms) > format.max
    is_clamped = is_limited and (product or format).overflow == "saturate"
    return Fixed32(acc, rounding, is_limited, may_saturate or is_clamped, finer, coarser, is_open)


def _most_steps(rounding: str, target: Target) -> float:
    """Up to how many steps `Fixed32` rounds products exactly."""
    if rounding == "toward_zero":
        return 2.0**24
    if rounding == "nearest_away" or (rounding in ("nearest_even", "floor", "odd") and target.fused):
        return 2.0**22
    return 2.0**21 if rounding == "half_up" and target.fused else 0.0


def _has_headroom(arithmetic: Rounded32, a: Range, b: Range, scales: tuple[int, int]) -> bool:
    """Products, sums, and what they are rounded with, are finite."""
    of_product, of_sum = arithmetic.headroom
    product = a.above + b.above + arithmetic.product_scale
    term = product + arithmetic.total_scale - arithmetic.product_scale
    total = max(term, arithmetic.acc.format.emax + 1 + arithmetic.total_scale) + 1
    is_finite = max(product + of_product, b.above + scales[1] + of_product, total + of_sum) <= 126
    return is_finite and arithmetic.acc.format.emax + 1 + arithmetic.sum_scale <= 126


def _scales(arithmetic: Float32 | Rounded32, a: Range, b: Range, is_counting: bool = False) -> tuple[int, int] | None:
    """Exponents that A and B are multiplied with, which add up to the product's; None if float32 cannot hold them."""
    total = arithmetic.product_scale
    may_flush = not arithmetic.product_exact and arithmetic.acc.product is not None
    flushing = _flushing_scales(total, a, b, is_counting) if may_flush else None
    return flushing or _exact_scales(total, a, b)


def _flushing_scales(total: int, a: Range, b: Range, is_counting: bool) -> tuple[int, int] | None:
    """Exponents that add up to `total` and bring both operands below 1.

    An operand that becomes subnormal on the way is flushed; its product, with an operand below 1, is then below 2^−126
    and is flushed anyway, as it must be. B's exponent does not depend on A, where that can be, so that packed panels of
    a weight serve all activations; where events are counted, operands stay as far as can be from being flushed.
    """
    slack = -a.above - b.above - total
    if slack < 0:
        return None
    a_exponent = max(total + b.above, LEAST_OF_A)
    if is_counting or -a.above - a_exponent > 126:
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
