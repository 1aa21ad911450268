"""The arithmetic of one FMAq step and of one merge, on lanes: the only place in `kernels` that knows how to round.

Two ways, both exact:

* `Scaled32` (toward-zero floats): float32 lanes with the processor rounding toward zero and flushing to zero.
  Operands are scaled by powers of two so that the product's smallest magnitude is float32's smallest normal number;
  one fused multiply-add by a power of two brings the product into the accumulator's scale, where the accumulator's
  smallest magnitude is float32's. Truncation is then one AND, and underflow is free. Rounding toward zero twice is
  rounding once.
* `General64`: float64 lanes to the nearest, for every format, rounding and operand. A product of two float32 is exact;
  a sum is, or is rounded to odd by its exact error (see `numerics.reference.exact_sum`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar

from llvmlite import ir

from fmaq.kernels.ir_blocks import I1, Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat, Format
from fmaq.numerics.reference import FLOAT32_TINY

FLOAT32_EMIN = -126


class Arithmetic(ABC):
    """How a kernel computes; immutable and hashable, since kernels are cached by it.

    Attributes:
        element_bytes: width of a lane.
        toward_zero: the processor rounds toward zero and flushes to zero meanwhile.
        needs_random: steps take random words.
        by_chunk: a tile's chunk is computed `unclamped` where its bounds prove that nothing in it can saturate.
        output_exponent: a finished sum times 2^this is the result.
    """

    element_bytes: ClassVar[int]
    toward_zero: ClassVar[bool]
    by_chunk: bool = False

    @property
    def needs_random(self) -> bool:
        return False

    @property
    def output_exponent(self) -> int:
        return 0

    @property
    def unclamped(self) -> Arithmetic:
        """The same without saturation in a chunk."""
        return self

    @abstractmethod
    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        """FMAq(x, w, s)."""

    @abstractmethod
    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        """Q_acc(t + s)."""


def smallest_exponent(format: FloatFormat, acc: Accumulator) -> int:
    """The exponent of the smallest magnitude that is kept."""
    return format.emin if acc.underflow else FLOAT32_EMIN


@dataclass(frozen=True)
class Scaled32(Arithmetic):
    """Toward-zero float formats in float32 lanes; the checks that operands make needless are left out.

    Args:
        acc: toward_zero, float formats.
        product_exact: no product needs rounding or flushing, or there is no product format: x·w goes into the sum as it
            is.
        product_masked: some product may have too many bits.
        product_clamped: some product may exceed the largest.
        sum_clamped: some sum in a chunk may exceed the largest.
        by_chunk: whether they may is known better for a tile and a chunk, from bounds taken while packing.
    """

    acc: Accumulator
    product_exact: bool
    product_masked: bool
    product_clamped: bool
    sum_clamped: bool = True
    by_chunk: bool = False

    element_bytes = 4
    toward_zero = True

    @property
    def unclamped(self) -> Scaled32:
        return replace(self, product_clamped=False, sum_clamped=False, by_chunk=False)

    @property
    def sum_scale(self) -> int:
        """Sums are held times 2^this."""
        return FLOAT32_EMIN - smallest_exponent(_float(self.acc.format), self.acc)

    @property
    def product_scale(self) -> int:
        """x·w arrives times 2^this."""
        if self.product_exact or self.acc.product is None:
            return self.sum_scale
        return FLOAT32_EMIN - smallest_exponent(_float(self.acc.product), self.acc)

    @property
    def output_exponent(self) -> int:
        return -self.sum_scale

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        if self.product_exact:
            total = v.fma(x, w, s)
        else:
            total = v.fma(self._product(v, x, w), v.constant(2.0 ** (self.sum_scale - self.product_scale)), s)
        return self._sum(v, total, self.sum_clamped)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._sum(v, v.add(t, s), clamped=True)

    def _product(self, v: Lanes, x: Value, w: Value) -> Value:
        format = _float(self.acc.product)
        p = v.mul(x, w)
        if self.product_masked and format.mantissa < 23:
            p = v.keep_bits(p, 23 - format.mantissa)
        if self.product_clamped:
            limit = format.max * 2.0**self.product_scale
            p = v.clamp(p, -limit, limit)
        return p

    def _sum(self, v: Lanes, total: Value, clamped: bool) -> Value:
        format = _float(self.acc.format)
        if format.mantissa < 23:
            total = v.keep_bits(total, 23 - format.mantissa)
        limit = format.max * 2.0**self.sum_scale
        return v.clamp(total, -limit, limit) if clamped else total


def _float(format: Format | None) -> FloatFormat:
    assert isinstance(format, FloatFormat)
    return format


@dataclass(frozen=True)
class General64(Arithmetic):
    """Every format and rounding in float64 lanes, whatever the operands."""

    acc: Accumulator

    element_bytes = 8
    toward_zero = False

    @property
    def needs_random(self) -> bool:
        return self.acc.rounding == "stochastic"

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        p = v.mul(x, w)
        if self.acc.product is not None:
            p = self._keep(v, self._round(v, p, self.acc.product, self._product_bits(v, word)), self.acc.product)
        return self._add(v, s, p, word, sum_is_exact(self.acc)).after

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
    return smallest_exponent(format, acc) - format.mantissa, format.emax


def _fits_float64(acc: Accumulator, *formats: Format) -> bool:
    spans = [_span(format, acc) for format in formats]
    return max(high for _, high in spans) + 2 - min(low for low, _ in spans) <= 53


def sum_is_exact(acc: Accumulator) -> bool:
    """Every s + p is a float64."""
    return acc.product is not None and _fits_float64(acc, acc.format, acc.product)


def merge_is_exact(acc: Accumulator) -> bool:
    """Every t + s is a float64."""
    return _fits_float64(acc, acc.format)
