"""Which merges of sums of chunks are exact in 32-bit lanes, level by level, and their scales."""

from __future__ import annotations

import math
from dataclasses import replace

from fmaq.kernels.arithmetic import Merging
from fmaq.kernels.arithmetic32 import FLOAT32_EMIN
from fmaq.kernels.grids import ON_INTEGERS, is_right_by_truncation, most_away
from fmaq.kernels.levels32 import FixedLevel32, FloatLevel32, Level32, Single32
from fmaq.numerics import Accumulator, FixedFormat, Float32Format, FloatFormat, Format, Level

FLOAT32_MANTISSA = 23
NEAREST_TOGETHER = 20  # of a sum and of its term, so that float32's rounding before changes no rounding to the nearest


def merging_levels(
    acc: Accumulator, below: Format | Float32Format, scale: int, depth: int
) -> tuple[Merging, ...] | None:
    """The merges of sums of chunks in 32-bit lanes; None where they are not exact; none where there is no outer level.

    Args:
        below: the format of the sums of chunks.
        scale: they arrive times 2^this.
        depth: products in a whole sum.
    """
    if acc.outer is None:
        return ()
    found: list[Level32 | FixedLevel32] = []
    sums = _sums_of(depth, acc.chunk)
    for level in acc.levels:
        one: Level32 | FixedLevel32 | None
        count, sums = sums if level.chunk is None else min(sums, level.chunk), _sums_of(sums, level.chunk)
        if isinstance(level.format, FixedFormat):
            one = _fixed_level(level, below, scale, count)
        elif isinstance(below, FixedFormat) and below.width > 25:  # float32 does not hold its sums
            one = None
        elif isinstance(level.format, Float32Format):
            one = _single(below, acc.underflow, scale, count)
        else:
            one = _float_level(level, acc.underflow, below, scale, count)
        if one is None:
            return None
        found.append(one)
        below, scale = level.format, one.scale
    return tuple(found)


def _sums_of(terms: int, chunk: int | None) -> int:
    """How many sums of a chunk so many terms make."""
    return 1 if chunk is None else -(-terms // chunk)


def _ends(format: Format | Float32Format, underflow: bool) -> tuple[int, int]:
    """Exponents of the last bit of the smallest value, and above that of the largest."""
    if isinstance(format, FixedFormat):
        return -format.fraction, format.emax + 1
    return (format.emin if underflow else FLOAT32_EMIN) - format.significant, format.emax + 1


def fits_single(below: Format | Float32Format, underflow: bool, depth: int) -> bool:
    """Float32 sums of up to `depth` terms are neither subnormal nor infinite."""
    low, high = _ends(below, underflow)
    return low >= FLOAT32_EMIN and high + depth.bit_length() <= 127


def _single(below: Format | Float32Format, underflow: bool, scale: int, count: int) -> Single32 | None:
    low, high = _ends(below, underflow)
    may_be_subnormal = low < FLOAT32_EMIN
    lowest = FLOAT32_MANTISSA if may_be_subnormal else FLOAT32_EMIN - low
    highest = 126 - high - count.bit_length()
    if low < FLOAT32_EMIN - FLOAT32_MANTISSA or highest < -1:
        return None
    own = _nearest_scale(scale, lowest, highest)
    return None if own is None else Single32(scale, own, may_be_subnormal)


def _fixed_level(level: Level, below: Format | Float32Format, scale: int, count: int) -> FixedLevel32 | None:
    """Terms and sums are integers of int32, in the finer one of both units."""
    format = level.format
    assert isinstance(format, FixedFormat)
    if not isinstance(below, FixedFormat) or format.fraction - scale > 30:
        return None
    finer = max(0, below.fraction - format.fraction)
    if finer and level.rounding not in ON_INTEGERS:
        return None
    away = most_away(format, level.rounding) if finer else 0.0
    is_open = count * (2.0**below.emax + away) <= format.max
    is_narrow = format.width + finer <= 30 or ((format.overflow == "wrap" or is_open) and finer == 0)
    fits = is_narrow and below.emax + format.fraction + finer <= 30
    return FixedLevel32(level, scale, finer, is_open) if fits else None


def _float_level(
    level: Level, underflow: bool, below: Format | Float32Format, scale: int, count: int
) -> FloatLevel32 | None:
    format = level.format
    assert isinstance(format, FloatFormat)
    low, high = _sums(format, underflow, below, count)
    addition = _addition(level, below, max(high, _ends(below, underflow)[1]) + 1 - low <= 24)
    if addition is None:
        return None
    smallest = format.emin if underflow else FLOAT32_EMIN
    free = FLOAT32_EMIN - smallest
    found = FloatLevel32(level, underflow, scale, free, addition, low < smallest, high > format.emax)
    highest = 126 - found.headroom - max(format.emax + 1, _ends(below, underflow)[1])
    if level.rounding == "toward_zero" and _nearest_scale(scale, free, min(free, highest)) == free:
        return found
    own = _nearest_scale(scale, free + 1, highest)  # what may be rounded up to the smallest is not flushed
    return None if own is None else replace(found, scale=own)


def _sums(format: FloatFormat, underflow: bool, below: Format | Float32Format, count: int) -> tuple[int, int]:
    """Every sum of up to `count` terms is a multiple of 2^the first, and below 2^the second.

    It is a multiple of the terms' unit, or of the larger one that it was rounded to, unless it has a half unit.
    """
    low, high = _ends(below, underflow)
    growth = count * 2.0**-format.mantissa  # by rounding
    most = math.ceil(high + math.log2(count) + growth / math.log(2) + 2.0**-20)
    own_low = _ends(format, underflow)[0] if format.half_unit else format.emax - format.significant
    return min(low, own_low), min(most, format.emax + 1)


def _addition(level: Level, below: Format | Float32Format, is_exact: bool) -> str | None:
    """How t + s is rounded to float32, if it is not exact there, so that rounding it once more is right.

    None where no way is. To the nearest, even, of a longer and a shorter significand: a sum that float32 does not hold
    lies next to the larger one, far from a tie.
    """
    m, rounding = level.format.mantissa, level.rounding  # type: ignore[union-attr]
    if rounding == "stochastic" and m + level.random_bits > 23:
        return None
    if is_exact:
        return "own"
    if rounding in ("nearest_even", "odd"):
        is_next = rounding == "nearest_even" and m >= 1 and below.significant <= m
        is_next = is_next and m + below.significant <= NEAREST_TOGETHER
        return "own" if is_next else "odd" if m <= 21 else None
    if rounding in ("floor", "half_up"):
        return "down" if m <= 22 else None
    return "zero" if rounding == "stochastic" or is_right_by_truncation(rounding, m, level.random_bits) else None


def _nearest_scale(scale: int, low: int, high: int) -> int | None:
    """The exponent from `low` to `high` that is nearest to that of the terms; None where no power of two brings it."""
    if low > high:
        return None
    own = min(max(scale, low), high)
    return own if abs(own - scale) <= 126 and abs(own) <= 126 else None
