"""Rounding to the grid of a format, its range unbounded: of float formats on bit patterns, of fixed ones on units.

Lanes may be float32 or float64. They hold a number exactly, or so that its rounding is the same: truncated, for the
roundings of `BY_TRUNCATION`, which ask for no bit behind the first that is dropped. Stochastic rounding, which takes
random bits besides, is beside the arithmetic that draws them.
"""

from __future__ import annotations

from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import FixedFormat, FloatFormat, Format

BY_TRUNCATION = ("toward_zero", "nearest_away")
ON_INTEGERS = ("toward_zero", "nearest_even", "nearest_away", "half_up", "floor")  # `on_coarser_grid` rounds so


def is_right_by_truncation(rounding: str, mantissa: int, random_bits: int) -> bool:
    """A number that is truncated to float32 is rounded as it would be without."""
    if rounding == "stochastic":
        return mantissa + random_bits <= 23
    return rounding in BY_TRUNCATION and (rounding == "toward_zero" or mantissa <= 22)


def most_away(format: Format, rounding: str) -> float:
    """The most by which rounding can increase a magnitude: of a fixed format; of a float one, relative to it."""
    if rounding == "toward_zero" and not format.half_unit:
        return 0.0
    unit = format.tiny if isinstance(format, FixedFormat) else 2.0**-format.mantissa
    is_near = format.half_unit or rounding in ("nearest_even", "nearest_away", "half_up")
    return unit / 2 if is_near else unit


def on_float_grid(v: Lanes, x: Value, format: FloatFormat, rounding: str) -> Value:
    """x with M bits of mantissa: what is added to its bits carries into those that are kept, or does not.

    A zero in a half-unit format gets its half, too: that is a subnormal number, which is flushed.
    """
    dropped = v.mantissa - format.mantissa
    if format.half_unit:
        kept = v.bits(v.keep_bits(x, dropped))
        return v.from_bits(v.b.or_(kept, v.bit_constant(1 << (dropped - 1))))
    if dropped == 0 or rounding == "toward_zero":
        return v.keep_bits(x, dropped)
    b, bits, half, one = v.b, v.bits(x), 1 << (dropped - 1), v.bit_constant(1)
    below = v.bit_constant((1 << dropped) - 1)
    match rounding:
        case "nearest_even":
            last = one  # of a significand without a mantissa; the bit there is the exponent's
            if format.mantissa > 0:
                last = b.and_(b.lshr(bits, v.bit_constant(dropped)), one)
            bits = b.add(b.add(bits, v.bit_constant(half - 1)), last)
        case "nearest_away":
            bits = b.add(bits, v.bit_constant(half))
        case "floor":
            bits = b.add(bits, b.and_(v.sign_bits(x), below))
        case "half_up":
            bits = b.add(bits, b.add(v.sign_bits(x), v.bit_constant(half)))
        case "odd":
            if format.mantissa > 0:  # a significand of one bit is odd
                some = b.add(b.and_(bits, below), below)
                bits = b.or_(bits, b.and_(some, v.bit_constant(1 << dropped)))
        case _:
            raise NotImplementedError(f"no kernel rounds {rounding}")
    return v.keep_bits(v.from_bits(bits), dropped)


def on_whole_grid(v: Lanes, units: Value, rounding: str) -> Value:
    """A number to an integer."""
    b = v.b
    match rounding:
        case "toward_zero":
            return v.trunc(units)
        case "nearest_even":
            return v.round_even(units)
        case "floor":
            return v.floor(units)
        case "half_up":
            whole = v.floor(units)
            up = b.fcmp_ordered(">=", v.sub(units, whole), v.constant(0.5))
            return v.add(whole, b.select(up, v.constant(1.0), v.constant(0.0)))
    whole = v.trunc(units)
    fraction = v.magnitude(v.sub(units, whole))
    if rounding == "nearest_away":
        away = b.fcmp_ordered(">=", fraction, v.constant(0.5))
    elif rounding == "odd":
        halves = v.mul(whole, v.constant(0.5))
        is_even = b.fcmp_ordered("==", v.trunc(halves), halves)
        away = b.and_(is_even, b.fcmp_ordered(">", fraction, v.constant(0.0)))
    else:
        raise NotImplementedError(f"no kernel rounds {rounding}")
    return v.add(whole, b.select(away, v.copy_sign(v.constant(1.0), units), v.constant(0.0)))


def on_coarser_grid(v: Lanes, whole: Value, finer: int, rounding: str) -> Value:
    """An integer to a multiple of 2^finer."""
    if finer == 0:
        return whole
    b, half, below, one = v.b, 1 << (finer - 1), (1 << finer) - 1, v.bit_constant(1)
    sign = b.ashr(whole, v.bit_constant(31))
    match rounding:
        case "floor":
            pass
        case "toward_zero":
            whole = b.add(whole, b.and_(sign, v.bit_constant(below)))
        case "half_up":
            whole = b.add(whole, v.bit_constant(half))
        case "nearest_away":
            whole = b.add(whole, b.add(sign, v.bit_constant(half)))
        case "nearest_even":
            last = b.and_(b.lshr(whole, v.bit_constant(finer)), one)
            whole = b.add(whole, b.add(last, v.bit_constant(half - 1)))
        case _:
            raise NotImplementedError(f"no kernel rounds integers {rounding}")
    return b.and_(whole, v.bit_constant(-1 << finer))
