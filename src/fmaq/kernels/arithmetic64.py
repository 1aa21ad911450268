"""Every format, rounding and operand in float64 lanes: always right, and it sees the events of every step.

A product of two float32 is exact; a sum is, or is rounded to odd by its exact error (see
`numerics.reference.exact_sum`).
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.ir_blocks import I1, Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat, Format
from fmaq.numerics.reference import FLOAT32_TINY

FLOAT32_EMIN = -126


@dataclass(frozen=True)
class General64(Arithmetic):
    """Float64 lanes, the processor rounding to the nearest."""

    acc: Accumulator

    element_bytes = 8
    flushes = False
    toward_zero = False
    sees_overflow = True

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        return self.product_and_sum(v, x, w, s, word)[1]

    def product_and_sum(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        """Q_prod(x·w), and FMAq(x, w, s)."""
        p = v.mul(x, w)
        if self.acc.product is not None:
            p = self._keep(v, self._round(v, p, self.acc.product, self._product_bits(v, word)), self.acc.product)
        return p, self._add(v, s, p, word, sum_is_exact(self.acc)).after

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._add(v, t, s, word, merge_is_exact(self.acc)).after

    def observed_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        """FMAq(x, w, s), and in which lanes it sees which of `numerics.reference.EVENTS`."""
        x_w = p = v.mul(x, w)
        overflows = underflows = ir.Constant(v.mask, [ir.Constant(I1, 0)] * v.count)
        if self.acc.product is not None:
            rounded = self._round(v, x_w, self.acc.product, self._product_bits(v, word))
            p = self._keep(v, rounded, self.acc.product)
            overflows = _is_beyond(v, rounded, self.acc.product)
            underflows = v.b.and_(_differ(v, x_w, v.constant(0.0)), _are_equal(v, p, v.constant(0.0)))
        total = self._add(v, s, p, word, sum_is_exact(self.acc))
        return total.after, [overflows, underflows, *_sum_events(v, p, s, total, v.b.or_(overflows, underflows))]

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        """Q_acc(t + s), and its events."""
        total = self._add(v, t, s, word, merge_is_exact(self.acc))
        nowhere = ir.Constant(v.mask, [ir.Constant(I1, 0)] * v.count)
        return total.after, [nowhere, nowhere, *_sum_events(v, s, t, total, nowhere)]

    def overflowing_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        after, (of_product, _, of_sum, *_) = self.observed_step(v, x, w, s, word)
        return after, v.b.or_(of_product, of_sum)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        after, (_, _, of_sum, *_) = self.observed_merge(v, t, s, word)
        return after, of_sum

    def _product_bits(self, v: Lanes, word: Value | None) -> Value | None:
        if word is None:
            return None
        low = v.b.and_(word, v.word(0xFFFF))
        return v.widen(v.b.lshr(low, v.word(16 - self.acc.random_bits)))

    def _add(self, v: Lanes, s: Value, p: Value, word: Value | None, is_exact: bool) -> Sum:
        format = self.acc.format
        r = None if word is None else v.widen(v.b.lshr(word, v.word(32 - self.acc.random_bits)))
        is_huge = None
        if _may_be_huge(self.acc):
            is_huge = v.b.fcmp_ordered(">=", v.magnitude(p), v.constant(2.0**48 * format.tiny))
            p = v.b.select(is_huge, _fold(v, p, 2.0**format.bits * format.tiny), p)
        total = v.add(s, p) if is_exact else _add_to_odd(v, s, p)
        rounded = self._round(v, total, format, r)
        return Sum(total, rounded, self._keep(v, rounded, format), format, is_huge)

    def _round(self, v: Lanes, x: Value, format: Format, r: Value | None) -> Value:
        """To the format's grid, its range unbounded."""
        if isinstance(format, FixedFormat):
            return v.mul(self._round_units(v, v.mul(x, v.constant(2.0**format.fraction)), r), v.constant(format.tiny))
        dropped = 52 - format.mantissa
        if self.acc.rounding == "nearest_even":
            bits = v.bits(x)
            last = v.bit_constant(1)  # of a significand without a mantissa; the bit there is the exponent's
            if format.mantissa > 0:
                last = v.b.and_(v.b.lshr(bits, v.bit_constant(dropped)), last)
            x = v.from_bits(v.b.add(v.b.add(bits, v.bit_constant(2 ** (dropped - 1) - 1)), last))
        elif r is not None:
            added = v.b.shl(r, v.bit_constant(dropped - self.acc.random_bits))
            x = v.from_bits(v.b.add(v.bits(x), added))
        return v.keep_bits(x, dropped)

    def _round_units(self, v: Lanes, units: Value, r: Value | None) -> Value:
        if self.acc.rounding == "nearest_even":
            return v.round_even(units)
        return v.trunc(units) if r is None else _round_units_stochastically(v, units, r, self.acc.random_bits)

    def _keep(self, v: Lanes, rounded: Value, format: Format) -> Value:
        """What a register keeps: flushed below the smallest, saturated or wrapped above the largest."""
        if isinstance(format, FloatFormat):
            rounded = v.zero_below(rounded, format.tiny if self.acc.underflow else FLOAT32_TINY)
        elif format.overflow == "wrap":
            return _wrap(v, rounded, format)
        return v.clamp(rounded, format.min, format.max)


@dataclass(frozen=True)
class Sum:
    """s + p on the way into its register: exact (or rounded to odd), on the grid, in range.

    `is_huge` marks lanes whose product was folded into the range of a wrapping sum.
    """

    total: Value
    rounded: Value
    after: Value
    format: Format
    is_huge: Value | None


def _are_equal(v: Lanes, x: Value, y: Value) -> Value:
    return v.b.fcmp_ordered("==", x, y)


def _differ(v: Lanes, x: Value, y: Value) -> Value:
    return v.b.fcmp_unordered("!=", x, y)


def _is_beyond(v: Lanes, rounded: Value, format: Format) -> Value:
    above = v.b.fcmp_ordered(">", rounded, v.constant(format.max))
    return v.b.or_(above, v.b.fcmp_ordered("<", rounded, v.constant(format.min)))


def _sum_events(v: Lanes, p: Value, before: Value, total: Sum, others: Value) -> list[Value]:
    """Overflow, underflow, full and partial swamping of a sum; `others` are lanes with an event of the product."""
    b, zero = v.b, v.constant(0.0)
    overflows = _is_beyond(v, total.rounded, total.format)
    if total.is_huge is not None:
        overflows = b.or_(overflows, total.is_huge)
    underflows = b.and_(_differ(v, total.total, zero), _are_equal(v, total.after, zero))
    if total.is_huge is not None:
        underflows = b.or_(underflows, b.and_(total.is_huge, _are_equal(v, total.after, zero)))
    none_of_these = b.and_(_differ(v, p, zero), b.not_(b.or_(others, b.or_(overflows, underflows))))
    unchanged = _are_equal(v, total.after, before)
    inexact = _differ(v, total.after, total.total)
    full = b.and_(none_of_these, unchanged)
    return [overflows, underflows, full, b.and_(none_of_these, b.and_(b.not_(unchanged), inexact))]


def _round_units_stochastically(v: Lanes, units: Value, r: Value, random_bits: int) -> Value:
    whole = v.trunc(units)
    fraction = v.magnitude(v.sub(units, whole))
    compared = v.add(v.floor(v.mul(fraction, v.constant(2.0**random_bits))), v.b.uitofp(r, v.vector))
    up = v.b.fcmp_ordered(">=", compared, v.constant(2.0**random_bits))
    away = v.b.select(up, v.copy_sign(v.constant(1.0), units), v.constant(0.0))
    return v.add(whole, away)


def _fold(v: Lanes, x: Value, span: float) -> Value:
    """x modulo the span, with the sign of x: exact."""
    return v.sub(x, v.mul(v.trunc(v.mul(x, v.constant(1 / span))), v.constant(span)))


def _wrap(v: Lanes, x: Value, format: FixedFormat) -> Value:
    """x on the grid, modulo the format's span, from its smallest to its largest."""
    span = 2.0**format.width * format.tiny
    x = _fold(v, x, span)
    turns = v.floor(v.add(v.mul(x, v.constant(1 / span)), v.constant(0.5)))
    return v.sub(x, v.mul(turns, v.constant(span)))


def _may_be_huge(acc: Accumulator) -> bool:
    """Products may lose bits against a wrapping sum; see `numerics.reference._fold_for_wrap`."""
    format = acc.format
    wraps = isinstance(format, FixedFormat) and format.overflow == "wrap"
    return wraps and not isinstance(acc.product, FixedFormat)


def _add_to_odd(v: Lanes, s: Value, p: Value) -> Value:
    """s + p rounded to odd: where TwoSum's error is not zero, the neighbour with a last bit of 1."""
    total = v.add(s, p)
    p_part = v.sub(total, s)
    error = v.add(v.sub(s, v.sub(total, p_part)), v.sub(p, p_part))
    bits = v.bits(total)
    signs_differ = v.b.icmp_signed("<", v.b.xor(bits, v.bits(error)), v.bit_constant(0))
    truncated = v.b.add(bits, v.b.sext(signs_differ, v.bit_vector))
    odd = v.b.or_(truncated, v.bit_constant(1))
    is_exact = v.b.fcmp_ordered("==", error, v.constant(0.0))
    return v.b.select(is_exact, total, v.from_bits(odd))


def _span(format: Format, acc: Accumulator) -> tuple[int, int]:
    """Exponents of the last bit of the smallest value and of the first bit of the largest."""
    if isinstance(format, FixedFormat):
        return -format.fraction, format.width - 1 - format.fraction
    return (format.emin if acc.underflow else FLOAT32_EMIN) - format.mantissa, format.emax


def _fits_float64(acc: Accumulator, *formats: Format) -> bool:
    spans = [_span(format, acc) for format in formats]
    return max(high for _, high in spans) + 2 - min(low for low, _ in spans) <= 53


def sum_is_exact(acc: Accumulator) -> bool:
    """Every s + p is a float64."""
    return acc.product is not None and _fits_float64(acc, acc.format, acc.product)


def merge_is_exact(acc: Accumulator) -> bool:
    """Every t + s is a float64."""
    return _fits_float64(acc, acc.format)
