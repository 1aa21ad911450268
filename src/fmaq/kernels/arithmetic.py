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

from fmaq.kernels.ir_blocks import Value
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
            r = None
            if word is not None:
                low = v.b.and_(word, v.word(0xFFFF))
                r = v.widen(v.b.lshr(low, v.word(16 - self.acc.random_bits)))
            p = self._quantize(v, p, self.acc.product, r)
        return self._add(v, s, p, word, sum_is_exact(self.acc))

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._add(v, t, s, word, merge_is_exact(self.acc))

    def _add(self, v: Lanes, s: Value, p: Value, word: Value | None, is_exact: bool) -> Value:
        r = None if word is None else v.widen(v.b.lshr(word, v.word(32 - self.acc.random_bits)))
        p = _fold_huge(v, p, self.acc)
        return self._quantize(v, v.add(s, p) if is_exact else _add_to_odd(v, s, p), self.acc.format, r)

    def _quantize(self, v: Lanes, x: Value, format: Format, r: Value | None) -> Value:
        if isinstance(format, FixedFormat):
            return self._quantize_fixed(v, x, format, r)
        dropped = 52 - format.mantissa
        if self.acc.rounding == "nearest_even":
            bits = v.bits(x)
            last = v.b.and_(v.b.lshr(bits, v.bit_constant(dropped)), v.bit_constant(1))
            x = v.from_bits(v.b.add(v.b.add(bits, v.bit_constant(2 ** (dropped - 1) - 1)), last))
        elif r is not None:
            added = v.b.shl(r, v.bit_constant(dropped - self.acc.random_bits))
            x = v.from_bits(v.b.add(v.bits(x), added))
        x = v.keep_bits(x, dropped)
        x = v.zero_below(x, format.tiny if self.acc.underflow else FLOAT32_TINY)
        return v.clamp(x, -format.max, format.max)

    def _quantize_fixed(self, v: Lanes, x: Value, format: FixedFormat, r: Value | None) -> Value:
        units = v.mul(x, v.constant(2.0**format.fraction))
        if self.acc.rounding == "nearest_even":
            units = v.round_even(units)
        elif r is not None:
            units = _round_units_stochastically(v, units, r, self.acc.random_bits)
        else:
            units = v.trunc(units)
        half = 2.0 ** (format.width - 1)
        if format.overflow == "wrap":
            units = _fold(v, units, 2 * half)
            turns = v.floor(v.add(v.mul(units, v.constant(0.5 / half)), v.constant(0.5)))
            units = v.sub(units, v.mul(turns, v.constant(2 * half)))
        else:
            units = v.clamp(units, -half, half - 1)
        return v.mul(units, v.constant(2.0**-format.fraction))


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


def _fold_huge(v: Lanes, p: Value, acc: Accumulator) -> Value:
    """See `numerics.reference._fold_for_wrap`."""
    format = acc.format
    if not isinstance(format, FixedFormat) or format.overflow != "wrap" or isinstance(acc.product, FixedFormat):
        return p
    is_huge = v.b.fcmp_ordered(">=", v.magnitude(p), v.constant(2.0 ** (48 - format.fraction)))
    return v.b.select(is_huge, _fold(v, p, 2.0 ** (format.width - format.fraction)), p)


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
