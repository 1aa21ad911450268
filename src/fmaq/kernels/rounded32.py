"""Rounding to the nearest, and stochastic rounding, in float32 lanes, where that is provably exact (see `choose`).

Products and sums may be rounded each in its own way.

* To the nearest, ties to even: the processor does the same meanwhile. A number x is rounded to M bits of mantissa by
  adding, and taking away again, a power of two that is 23 − M places above its own leading bit: the unit in the last
  place of their sum is that of the format, and an even last place stays one. For a product, a fused multiply-add does
  so to the exact x·w.
* Ties away from zero: the processor rounds toward zero. One is added to the first bit that is dropped.
* Stochastic: likewise. Random bits are added to those behind the last that is kept.

Operands are scaled so that a format's smallest magnitude is 2: a number is flushed by one test, of its highest exponent
bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.arithmetic32 import is_beyond, nowhere, observed_sum, sum_events
from fmaq.kernels.grids import on_float_grid
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FloatFormat, Format

FLOAT32_EMIN = -126
EXPONENT_BITS = -1 << 23  # with the sign
HIGHEST_EXPONENT_BIT = 1 << 30


@dataclass(frozen=True)
class Rounded32(Arithmetic):
    """Float formats; checks that operands make needless are left out.

    Args:
        product_short: float32 holds every x·w, so that it can be rounded however the processor rounds.
        acc, product_exact, product_masked, product_clamped, sum_clamped, by_chunk, levels: as those of `Float32`.
    """

    acc: Accumulator
    product_exact: bool
    product_masked: bool
    product_clamped: bool
    sum_clamped: bool = True
    by_chunk: bool = False
    levels: tuple[Merging, ...] = ()
    product_short: bool = False

    element_bytes = 4
    flushes = True
    sees_overflow = True
    sees_events = True

    @property
    def toward_zero(self) -> bool:
        return self.acc.rounding != "nearest_even"

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
        p = self._in_register(v, self._product(v, x, w, word))
        return self._sum(v, self._total(v, p, s), self.sum_clamped, word)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._sum(v, v.add(t, s), clamped=True, word=word)

    def overflowing_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        if self.product_exact:
            return self._limited_sum(v, v.fma(x, w, s), self.sum_clamped, word)
        p, of_product = self._product(v, x, w, word), nowhere(v)
        if self.product_clamped:
            of_product = is_beyond(v, p, _float(self.acc.product).max * 2.0**self.product_scale)
        after, of_sum = self._limited_sum(v, self._total(v, self._in_register(v, p), s), self.sum_clamped, word)
        return after, v.b.or_(of_product, of_sum)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        return self._limited_sum(v, v.add(t, s), clamped=True, word=word)

    # Events: see `Float32`.

    def observed_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        zero, overflows = v.constant(0.0), nowhere(v)
        p = self._product(v, x, w, word)
        if self.product_clamped:
            overflows = is_beyond(v, p, _float(self.acc.product).max * 2.0**self.product_scale)
        p = self._in_register(v, p)
        if self._is_anchored:
            p = _kept(v, p)
        is_term = v.b.and_(v.b.fcmp_unordered("!=", x, zero), v.b.fcmp_unordered("!=", w, zero))
        lift = 2.0 ** (self.sum_scale - self.product_scale)
        after, masks = self._observed_sum(v, p, lift, s, self.sum_clamped, word)
        return after, [overflows, is_term, *masks]

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        after, masks = self._observed_sum(v, s, 1.0, t, clamped=True, word=word)
        return after, [nowhere(v), nowhere(v), *masks]

    def _observed_sum(
        self, v: Lanes, p: Value, lift: float, s: Value, clamped: bool, word: Value | None
    ) -> tuple[Value, list[Value]]:
        """p·lift + s in its register, and masks."""
        total = v.fma(p, v.constant(lift), s)
        rounded = _kept(v, self._rounded_sum(v, total, word))
        limit = _float(self.acc.format).max * 2.0**self.sum_scale if clamped else None
        return observed_sum(v, p, lift, s, total, rounded, limit, is_truncated=False)

    def events(self, b: ir.IRBuilder, masks: list[Value]) -> list[Value]:
        return sum_events(b, masks)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.sum_scale))

    def _total(self, v: Lanes, p: Value, s: Value) -> Value:
        """p + s of what `_in_register` leaves of a product, or s where it is to be flushed."""
        lift = v.constant(2.0 ** (self.sum_scale - self.product_scale))
        if self._is_anchored:
            return v.b.select(_is_kept(v, p), v.fma(p, lift, s), s)
        return v.fma(p, lift, s)

    @property
    def _is_anchored(self) -> bool:
        """Products are rounded by the processor."""
        return self.product_masked and self.acc.rounding_of_products == "nearest_even" and not self.product_short

    def _in_register(self, v: Lanes, p: Value) -> Value:
        """A product on its grid, limited, and flushed unless `_total` does that."""
        if not self._is_anchored:
            p = _kept(v, p)
        return _clamp(v, p, _float(self.acc.product), self.product_scale) if self.product_clamped else p

    def _product(self, v: Lanes, x: Value, w: Value, word: Value | None) -> Value:
        """The product on its grid, neither limited nor flushed yet."""
        format, rounding = _float(self.acc.product), self.acc.rounding_of_products
        dropped = 23 - format.mantissa
        if not self.product_masked or dropped == 0:
            return v.mul(x, w)
        if rounding == "stochastic":
            return _add_bits(v, v.mul(x, w), _moved(v, word, 16, dropped, self.acc.random_bits), dropped)
        if self._is_anchored:
            anchor = _leading_bit(v, v.mul(v.mul(w, v.constant(2.0**dropped)), x))
            return v.sub(v.fma(x, w, anchor), anchor)
        return on_float_grid(v, v.mul(x, w), format, rounding)

    def _sum(self, v: Lanes, total: Value, clamped: bool, word: Value | None) -> Value:
        total, format = self._rounded_sum(v, total, word), _float(self.acc.format)
        if not clamped:
            return _kept(v, total)
        if self.acc.rounding == "nearest_even":
            return _kept(v, _clamp(v, total, format, self.sum_scale))
        return _clamp(v, _kept(v, total), format, self.sum_scale)

    def _rounded_sum(self, v: Lanes, total: Value, word: Value | None) -> Value:
        """On the grid, neither limited nor flushed yet."""
        format, rounding = _float(self.acc.format), self.acc.rounding
        dropped = 23 - format.mantissa
        if rounding == "stochastic":
            return _add_bits(v, total, _moved(v, word, 32, dropped, self.acc.random_bits), dropped)
        if rounding == "nearest_even":
            leading, up = _leading_bit(v, total), 2.0**dropped
            return v.fma(leading, v.constant(-up), v.fma(leading, v.constant(up), total))
        return on_float_grid(v, total, format, rounding)

    def _limited_sum(self, v: Lanes, total: Value, clamped: bool, word: Value | None) -> tuple[Value, Value]:
        """The sum in its register, and in which lanes it overflows."""
        after = self._sum(v, total, clamped, word)
        if not clamped:
            return after, nowhere(v)
        limit = _float(self.acc.format).max * 2.0**self.sum_scale
        return after, is_beyond(v, self._rounded_sum(v, total, word), limit)


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


def _kept(v: Lanes, x: Value) -> Value:
    """x, flushed below 2: by the AND that rounded it, if one did."""
    return v.b.select(_is_kept(v, x), x, v.constant(0.0))


def _clamp(v: Lanes, x: Value, format: FloatFormat, scale: int) -> Value:
    limit = format.max * 2.0**scale
    return v.clamp(x, -limit, limit)
