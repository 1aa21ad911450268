"""Rounding to the nearest, and stochastic rounding, in float32 lanes, where that is provably exact (see `choose`).

* To the nearest, ties to even: the processor does the same meanwhile. A number x is rounded to M bits of mantissa by
  adding, and taking away again, a power of two that is 23 − M places above its own leading bit: the unit in the last
  place of their sum is that of the format, and an even last place stays one. For a product, a fused multiply-add does
  so to the exact x·w.
* Stochastic: the processor rounds toward zero. Random bits are added to those behind the last that is kept.

Operands are scaled so that a format's smallest magnitude is 2: a number is flushed by one test, of its highest exponent
bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FloatFormat, Format

FLOAT32_EMIN = -126
EXPONENT_BITS = -1 << 23  # with the sign
HIGHEST_EXPONENT_BIT = 1 << 30


@dataclass(frozen=True)
class Rounded32(Arithmetic):
    """Float formats; checks that operands make needless are left out. The fields are those of `Float32`."""

    acc: Accumulator
    product_exact: bool
    product_masked: bool
    product_clamped: bool
    sum_clamped: bool = True
    by_chunk: bool = False

    element_bytes = 4
    flushes = True

    @property
    def toward_zero(self) -> bool:
        return self.needs_random

    @property
    def unclamped(self) -> Rounded32:
        return replace(self, product_clamped=False, sum_clamped=False, by_chunk=False)

    def _scale(self, format: FloatFormat) -> int:
        """The exponent that brings the format's smallest magnitude to 2."""
        return 1 - (format.emin if self.acc.underflow else FLOAT32_EMIN)

    @property
    def sum_scale(self) -> int:
        """Sums are held times 2^this."""
        return self._scale(_float(self.acc.format))

    @property
    def product_scale(self) -> int:
        """x·w arrives times 2^this."""
        if self.product_exact or self.acc.product is None:
            return self.sum_scale
        return self._scale(_float(self.acc.product))

    @property
    def headroom(self) -> int:
        """Places above a product, or a sum, that the powers of two for rounding take."""
        mantissas = [_float(self.acc.format).mantissa]
        if self.product_masked:
            mantissas.append(_float(self.acc.product).mantissa)
        return 24 - min(mantissas)

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        if self.product_exact:
            return self._sum(v, v.fma(x, w, s), self.sum_clamped, word)
        p = self._product(v, x, w, word)
        lift = v.constant(2.0 ** (self.sum_scale - self.product_scale))
        return self._sum(v, v.b.select(_is_kept(v, p), v.fma(p, lift, s), s), self.sum_clamped, word)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._sum(v, v.add(t, s), clamped=True, word=word)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.sum_scale))

    def _product(self, v: Lanes, x: Value, w: Value, word: Value | None) -> Value:
        """The product on its grid, not flushed yet."""
        format = _float(self.acc.product)
        dropped = 23 - format.mantissa
        if not self.product_masked or dropped == 0:
            p = v.mul(x, w)
        elif word is not None:
            p = _add_bits(v, v.mul(x, w), _moved(v, word, 16, dropped, self.acc.random_bits), dropped)
        else:
            anchor = _leading_bit(v, v.mul(v.mul(w, v.constant(2.0**dropped)), x))
            p = v.sub(v.fma(x, w, anchor), anchor)
        return _clamp(v, p, format, self.product_scale) if self.product_clamped else p

    def _sum(self, v: Lanes, total: Value, clamped: bool, word: Value | None) -> Value:
        format = _float(self.acc.format)
        dropped = 23 - format.mantissa
        if word is not None:
            total = _add_bits(v, total, _moved(v, word, 32, dropped, self.acc.random_bits), dropped)
        else:
            leading, up = _leading_bit(v, total), 2.0**dropped
            total = v.fma(leading, v.constant(-up), v.fma(leading, v.constant(up), total))
        if clamped:
            total = _clamp(v, total, format, self.sum_scale)
        return v.b.select(_is_kept(v, total), total, v.constant(0.0))


def _float(format: Format | None) -> FloatFormat:
    assert isinstance(format, FloatFormat)
    return format


def _leading_bit(v: Lanes, x: Value) -> Value:
    """x without its mantissa."""
    return v.from_bits(v.b.and_(v.bits(x), v.bit_constant(EXPONENT_BITS)))


def _moved(v: Lanes, word: Value, end: int, dropped: int, random_bits: int) -> Value:
    """The `random_bits` bits of a word below bit `end`, moved to just below bit `dropped`."""
    if dropped >= end:
        word = v.b.shl(word, v.word(dropped - end))
    else:
        word = v.b.lshr(word, v.word(end - dropped))
    return v.b.and_(word, v.word((1 << dropped) - (1 << (dropped - random_bits))))


def _add_bits(v: Lanes, x: Value, bits: Value, dropped: int) -> Value:
    return v.keep_bits(v.from_bits(v.b.add(v.bits(x), bits)), dropped)


def _is_kept(v: Lanes, x: Value) -> Value:
    """Which lanes are not below 2 in magnitude."""
    return v.b.icmp_unsigned("!=", v.b.and_(v.bits(x), v.bit_constant(HIGHEST_EXPONENT_BIT)), v.bit_constant(0))


def _clamp(v: Lanes, x: Value, format: FloatFormat, scale: int) -> Value:
    limit = format.max * 2.0**scale
    return v.clamp(x, -limit, limit)
