"""Rounding to the nearest, and stochastic rounding, in float32 lanes, where that is provably exact (see `choose`).

Products and sums may be rounded each in its own way.

* To the nearest, ties to even: the processor does the same meanwhile. A number x is rounded to M bits of mantissa by
  adding, and taking away again, a power of two that is 23 − M places above its own leading bit: the unit in the last
  place of their sum is that of the format, and an even last place stays one. For a product, a fused multiply-add does
  so to the exact x·w.
* Ties away from zero: the processor rounds toward zero. One is added to the first bit that is dropped.
* Stochastic: likewise. Random bits are added to those behind the last that is kept.

What is below a format's smallest magnitude is flushed once it is rounded: by a multiplication with a power of two that
brings the smallest to float32's, below which the processor flushes. Before it, products and sums are in scales where
the smallest is larger, so that what is rounded up to it is not flushed on the way. The multiplication brings a product
into the scale in which it is added; a fused multiply-add brings sums back into that. A product that an addition rounds
is flushed by taking the power of two away again. Where the AND that rounds takes a mask (AVX-512), a test of exponent
bits flushes instead, and sums stay where they are.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.arithmetic32 import (
    FLOAT32_EMIN,
    clamp,
    events,
    is_beyond,
    nowhere,
    observed_product_sum,
    observed_sum,
    truncated,
)
from fmaq.kernels.grids import on_float_grid
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FloatFormat, Format

FROM_TWICE_THE_SMALLEST = 0x7F << 24  # bits of which float32's magnitudes from 2^−125 on have one


@dataclass(frozen=True)
class Rounded32(Arithmetic):
    """Float formats; checks that operands make needless are left out.

    Args:
        by_mask: flush by a test of bits.
        product_short: float32 holds every x·w, so that it can be rounded however the processor rounds.
        acc, product_exact, product_masked, product_clamped, sum_clamped, by_chunk, levels, is_clean, terms: as those
            of `Float32`.
    """

    acc: Accumulator
    product_exact: bool
    product_masked: bool
    product_clamped: bool
    sum_clamped: bool = True
    by_chunk: bool = False
    levels: tuple[Merging, ...] = ()
    product_short: bool = False
    by_mask: bool = False
    is_clean: bool = False
    terms: str = "any"

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

    def looking(self) -> Rounded32:
        return replace(super().looking(), is_clean=True)

    def _scale(self, format: Format | None) -> int:
        """The exponent that brings the format's smallest magnitude to where the processor flushes what is below."""
        return FLOAT32_EMIN - (_float(format).emin if self.acc.underflow else FLOAT32_EMIN)

    @property
    def sum_scale(self) -> int:
        """Sums are held times 2^this."""
        return self._scale(self.acc.format) + self.by_mask

    @property
    def total_scale(self) -> int:
        """Sums are rounded times 2^this."""
        lowest = self._scale(self.acc.format) + 1
        return lowest if self.product_exact or self.by_mask else max(lowest, self._scale(self.acc.product))

    @property
    def product_scale(self) -> int:
        """x·w arrives times 2^this."""
        return self.total_scale if self.product_exact else self._scale(self.acc.product) + self._is_rounded_up

    @property
    def _register_scale(self) -> int:
        """Products are added times 2^this."""
        return self._scale(self.acc.product) + (self.by_mask and self._is_rounded_up)

    @property
    def _is_rounded_up(self) -> bool:
        """Products may be rounded up to the smallest before they are flushed: not by an addition, which does both."""
        rounds_away = self.product_masked and self.acc.rounding_of_products != "toward_zero"
        return rounds_away and not self.is_anchored

    @property
    def _product_limit(self) -> float:
        return _float(self.acc.product).max * 2.0**self.product_scale

    @property
    def _sum_limit(self) -> float:
        return _float(self.acc.format).max * 2.0**self.total_scale

    @property
    def headroom(self) -> tuple[int, int]:
        """Places above a product, and above a sum, that the powers of two for rounding take."""
        of_product = 24 - _float(self.acc.product).mantissa if self.is_anchored else 0
        return of_product, 24 - _float(self.acc.format).mantissa if self.acc.rounding == "nearest_even" else 0

    @property
    def is_anchored(self) -> bool:
        """Products are rounded by the processor."""
        return self.product_masked and self.acc.rounding_of_products == "nearest_even" and not self.product_short

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        return self._held(v, self._sum(v, self._total(v, x, w, s, word), word), self.sum_clamped)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._held(v, self._sum(v, v.add(self._raised(v, t), self._raised(v, s)), word), True)

    def overflowing_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        after, of_sum = self._limited_sum(v, self._total(v, x, w, s, word), self.sum_clamped, word)
        if not self.product_clamped:
            return after, of_sum
        return after, v.b.or_(is_beyond(v, self._product(v, x, w, word), self._product_limit), of_sum)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        return self._limited_sum(v, v.add(self._raised(v, t), self._raised(v, s)), True, word)

    def _limited_sum(self, v: Lanes, total: Value, clamped: bool, word: Value | None) -> tuple[Value, Value]:
        """The sum in its register, and in which lanes it overflows."""
        rounded = self._sum(v, total, word)
        return self._held(v, rounded, clamped), is_beyond(v, rounded, self._sum_limit) if clamped else nowhere(v)

    # Events: see `Float32`.

    def observed_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        overflows, before = nowhere(v), self._raised(v, s)
        total = self._total(v, x, w, s, word)
        rounded = self._raised(v, self._held(v, self._sum(v, total, word)))
        limit = self._sum_limit if self.sum_clamped else None
        if self.product_exact:
            after, seen = observed_product_sum(v, x, w, before, total, rounded, limit)
            return self._held(v, after), events(v.b, seen)
        if self.product_clamped:
            overflows = is_beyond(v, self._product(v, x, w, word), self._product_limit)
        p = self._in_register(v, self._product(v, x, w, word))
        lift = 2.0 ** (self.total_scale - self._register_scale)
        after, seen = observed_sum(v, p, lift, before, total, rounded, limit, self.terms)
        return self._held(v, after), events(v.b, seen, overflows)

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        before, p = self._raised(v, t), self._raised(v, s)
        total = v.add(before, p)
        rounded = self._raised(v, self._held(v, self._sum(v, total, word)))
        after, seen = observed_sum(v, p, 1.0, before, total, rounded, self._sum_limit, self.terms)
        return self._held(v, after), events(v.b, seen, of_merge=True)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.sum_scale))

    def _raised(self, v: Lanes, s: Value) -> Value:
        """A sum as it is rounded."""
        return s if self.by_mask else v.mul(s, v.constant(2.0 ** (self.total_scale - self.sum_scale)))

    def _held(self, v: Lanes, rounded: Value, clamped: bool = False) -> Value:
        """A rounded sum as it is held, limited, and flushed on the way."""
        limited = clamp(v, rounded, self._sum_limit) if clamped else rounded
        if self.by_mask:
            return _kept(v, rounded, limited)
        return v.mul(limited, v.constant(2.0 ** (self.sum_scale - self.total_scale)))

    def _total(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        """s and the product in its register, before the sum is rounded."""
        if self.product_exact:
            return v.fma(x, w, self._raised(v, s))
        p = self._in_register(v, self._product(v, x, w, word))
        lift = self.total_scale - self._register_scale
        if lift == 0 and not self.by_mask:
            return v.fma(s, v.constant(2.0 ** (self.total_scale - self.sum_scale)), p)
        return v.fma(p, v.constant(2.0**lift), self._raised(v, s))

    def _in_register(self, v: Lanes, p: Value) -> Value:
        """A product on its grid, limited, and flushed."""
        limited = clamp(v, p, self._product_limit) if self.product_clamped else p
        if not self._is_rounded_up:
            return limited
        return _kept(v, p, limited) if self.by_mask else v.mul(limited, v.constant(0.5))

    def _product(self, v: Lanes, x: Value, w: Value, word: Value | None) -> Value:
        """The product on its grid, neither limited nor flushed yet."""
        format, rounding = _float(self.acc.product), self.acc.rounding_of_products
        dropped = 23 - format.mantissa
        if not self.product_masked or dropped == 0:
            return v.mul(x, w)
        if rounding == "stochastic":
            return _add_bits(v, v.mul(x, w), _moved(v, word, 16, dropped, self.acc.random_bits), dropped)
        if rounding == "toward_zero":
            return truncated(v, v.mul(x, w), format, self.is_clean)
        if self.is_anchored:
            anchor = v.leading_bit(v.mul(v.mul(w, v.constant(2.0**dropped)), x))
            return v.sub(v.fma(x, w, anchor), anchor)
        return on_float_grid(v, v.mul(x, w), format, rounding)

    def _sum(self, v: Lanes, total: Value, word: Value | None) -> Value:
        """On the grid, neither limited nor flushed yet."""
        format, rounding = _float(self.acc.format), self.acc.rounding
        dropped = 23 - format.mantissa
        if rounding == "stochastic":
            return _add_bits(v, total, _moved(v, word, 32, dropped, self.acc.random_bits), dropped)
        if rounding == "nearest_even":
            leading, up = v.leading_bit(total), 2.0**dropped
            return v.fma(leading, v.constant(-up), v.fma(leading, v.constant(up), total))
        if rounding == "toward_zero":
            return truncated(v, total, format, self.is_clean)
        return on_float_grid(v, total, format, rounding)


def _float(format: Format | None) -> FloatFormat:
    assert isinstance(format, FloatFormat)
    return format


def _moved(v: Lanes, word: Value, end: int, dropped: int, random_bits: int) -> Value:
    """The `random_bits` bits of a word below bit `end`, moved to just below bit `dropped`."""
    if dropped >= end:
        word = v.b.shl(word, v.word(dropped - end))
    else:
        word = v.b.lshr(word, v.word(end - dropped))
    return v.b.and_(word, v.word((1 << dropped) - (1 << (dropped - random_bits))))


def _add_bits(v: Lanes, x: Value, bits: Value, dropped: int) -> Value:
    return v.keep_bits(v.from_bits(v.b.add(v.bits(x), bits)), dropped)


def _kept(v: Lanes, x: Value, limited: Value) -> Value:
    """x, limited, and flushed below 2^−125: by the AND that rounded it, or the instruction that limits it."""
    bits = v.b.and_(v.bits(x), v.bit_constant(FROM_TWICE_THE_SMALLEST))
    return v.b.select(v.b.icmp_unsigned("!=", bits, v.bit_constant(0)), limited, v.constant(0.0))
