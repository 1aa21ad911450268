"""Fast arithmetic in 32-bit lanes, for formats and operands for which it is provably exact.

The processor rounds toward zero and flushes to zero. Operands are scaled by powers of two on packing, so that
magnitudes lie where that is of use.

* `Float32`, toward zero: the smallest magnitude of products, and of sums, is scaled to float32's smallest normal
  number, so that truncation is one AND, and underflow is free; a fused multiply-add by a power of two brings a product
  into the scale of the sums. Rounding toward zero twice is rounding once, so 24 bits on the way do no harm.
* `Float32`, to the nearest or stochastic: what 24 bits keep of a product or sum is rounded on its bits, with some
  headroom above where the processor flushes. That is exact where the lost bits cannot matter: see `choose`.
* `Fixed32`: products are truncated to 32-bit integers, and added as such. A wrapping sum is wrapped once.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat, Format

FLOAT32_EMIN = -126
HEADROOM = 50  # what is this far below the smallest magnitude may be flushed early, a product's 24 lost bits included


@dataclass(frozen=True)
class Float32(Arithmetic):
    """Float formats in float32 lanes; the checks that operands make needless are left out.

    Args:
        acc: float formats.
        product_exact: no product needs rounding or flushing, or there is no product format: x·w goes into the sum as it
            is.
        product_masked: some product may have too many bits.
        product_sticky: some product may have more than 24 bits, and one that is lost may break a tie.
        product_clamped: some product may exceed the largest.
        sum_clamped: some sum in a chunk may exceed the largest.
        by_chunk: whether they may is known better for a tile and a chunk, from bounds taken while packing.
    """

    acc: Accumulator
    product_exact: bool
    product_masked: bool
    product_sticky: bool
    product_clamped: bool
    sum_clamped: bool = True
    by_chunk: bool = False

    element_bytes = 4
    toward_zero = True

    @property
    def unclamped(self) -> Float32:
        return replace(self, product_clamped=False, sum_clamped=False, by_chunk=False)

    def _scale(self, format: Format) -> int:
        """The exponent that brings the format's smallest magnitude to where it is flushed, or above by the headroom."""
        smallest = format.emin if self.acc.underflow else FLOAT32_EMIN
        return FLOAT32_EMIN - smallest + (0 if self.acc.rounding == "toward_zero" else HEADROOM)

    @property
    def sum_scale(self) -> int:
        """Sums are held times 2^this."""
        return self._scale(self.acc.format)

    @property
    def product_scale(self) -> int:
        """x·w arrives times 2^this."""
        if self.product_exact or self.acc.product is None:
            return self.sum_scale
        return self._scale(self.acc.product)

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        if self.product_exact:
            total = v.fma(x, w, s)
        else:
            lift = v.constant(2.0 ** (self.sum_scale - self.product_scale))
            total = v.fma(self._product(v, x, w, word), lift, s)
        return self._sum(v, total, self.sum_clamped, word)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._sum(v, v.add(t, s), clamped=True, word=word)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.sum_scale))

    def _product(self, v: Lanes, x: Value, w: Value, word: Value | None) -> Value:
        format = _float(self.acc.product)
        p = v.mul(x, w)
        if self.product_sticky:
            lost = v.fma(x, w, v.b.fneg(p))
            is_exact = v.b.fcmp_ordered("==", lost, v.constant(0.0))
            p = v.b.select(is_exact, p, v.from_bits(v.b.or_(v.bits(p), v.bit_constant(1))))
        r = None if word is None else _aligned(v, v.b.shl(word, v.word(16)), self.acc.random_bits, 23 - format.mantissa)
        if self.product_masked:
            p = self._round(v, p, format, r)
        p = self._flush(v, p, format, self.product_scale)
        return _clamp(v, p, format.max * 2.0**self.product_scale) if self.product_clamped else p

    def _sum(self, v: Lanes, total: Value, clamped: bool, word: Value | None) -> Value:
        format = _float(self.acc.format)
        r = None if word is None else _aligned(v, word, self.acc.random_bits, 23 - format.mantissa)
        total = self._flush(v, self._round(v, total, format, r), format, self.sum_scale)
        return _clamp(v, total, format.max * 2.0**self.sum_scale) if clamped else total

    def _round(self, v: Lanes, x: Value, format: FloatFormat, r: Value | None) -> Value:
        dropped = 23 - format.mantissa
        if dropped == 0:
            return x
        if self.acc.rounding == "nearest_even":
            bits = v.bits(x)
            last = v.b.and_(v.b.lshr(bits, v.bit_constant(dropped)), v.bit_constant(1))
            x = v.from_bits(v.b.add(v.b.add(bits, v.bit_constant(2 ** (dropped - 1) - 1)), last))
        elif r is not None:
            x = v.from_bits(v.b.add(v.bits(x), r))
        return v.keep_bits(x, dropped)

    def _flush(self, v: Lanes, x: Value, format: FloatFormat, scale: int) -> Value:
        if self.acc.rounding == "toward_zero":
            return x  # the processor did
        smallest = format.emin if self.acc.underflow else FLOAT32_EMIN
        return v.zero_below(x, 2.0 ** (smallest + scale))


def _float(format: Format | None) -> FloatFormat:
    assert isinstance(format, FloatFormat)
    return format


def _clamp(v: Lanes, x: Value, limit: float) -> Value:
    return v.clamp(x, -limit, limit)


def _aligned(v: Lanes, word: Value, random_bits: int, dropped: int) -> Value:
    """The highest bits of a word as an integer just below the last bit that is kept."""
    drawn = v.b.lshr(word, v.word(32 - dropped))
    return v.b.and_(drawn, v.word(-1 << (dropped - random_bits)))


@dataclass(frozen=True)
class Fixed32(Arithmetic):
    """Fixed formats, toward zero, in int32 lanes, which the loops carry as the bits of float32.

    Products arrive in steps of the format: below 2^24 they are truncated exactly, above they saturate.

    Args:
        acc: fixed format, and a fixed product format of the same fraction, or none where products are whole steps.
        product_limited: some product may be out of the product format's range.
        sum_clamped: some sum in a chunk may be out of range.
        by_chunk: see `Float32`.
    """

    acc: Accumulator
    product_limited: bool
    sum_clamped: bool = True
    by_chunk: bool = False

    element_bytes = 4
    toward_zero = True

    @property
    def unclamped(self) -> Fixed32:
        return replace(self, product_limited=False, sum_clamped=False, by_chunk=False)

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        p = v.mul(x, w)
        product = self.acc.product
        if isinstance(product, FixedFormat) and self.product_limited and product.overflow == "saturate":
            half = 2.0 ** (product.width - 1)
            p = v.clamp(p, -half, half - 1)
        whole = v.b.fptosi(p, v.bit_vector)
        if isinstance(product, FixedFormat) and self.product_limited and product.overflow == "wrap":
            whole = _wrapped(v, whole, product.width)
        return self._add(v, s, whole, self.sum_clamped and _fixed(self.acc.format).overflow == "saturate")

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._add(v, t, v.bits(s), clamped=_fixed(self.acc.format).overflow == "saturate")

    def finish(self, v: Lanes, total: Value) -> Value:
        format = _fixed(self.acc.format)
        whole = v.bits(total)
        if format.overflow == "wrap":
            whole = _wrapped(v, whole, format.width)
        return v.mul(v.b.sitofp(whole, v.vector), v.constant(format.tiny))

    def _add(self, v: Lanes, s: Value, p: Value, clamped: bool) -> Value:
        total = v.b.add(v.bits(s), p)
        if clamped:
            half = 2 ** (self.acc.format.bits - 1)
            for sign, limit in (("<", half - 1), (">", -half)):
                bound = v.bit_constant(limit)
                total = v.b.select(v.b.icmp_signed(sign, total, bound), total, bound)
        return v.from_bits(total)


def _fixed(format: Format) -> FixedFormat:
    assert isinstance(format, FixedFormat)
    return format


def _wrapped(v: Lanes, whole: Value, width: int) -> Value:
    """The low `width` bits, sign-extended."""
    unused = v.bit_constant(32 - width)
    return v.b.ashr(v.b.shl(whole, unused), unused)
