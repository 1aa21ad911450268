"""Every format, rounding and operand in float64 lanes: always right, and it sees the events of every step.

A product of two float32 is exact; a sum is, or is rounded to odd by its exact error (see
`numerics.reference.exact_sum`).
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.grids import on_float_grid, on_whole_grid
from fmaq.kernels.ir_blocks import F32, I1, Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FixedFormat, Float32Format, FloatFormat, Format, Level
from fmaq.numerics.reference import FLOAT32_TINY

FLOAT32_EMIN = -126


@dataclass(frozen=True)
class Register64:
    """What a register makes of numbers: to the grid of its format, then into its range."""

    format: Format | Float32Format
    rounding: str
    random_bits: int
    underflow: bool

    def bits(self, v: Lanes, word: Value | None) -> Value | None:
        """Random integers from the high half of words, where rounding takes some."""
        if word is None or self.rounding != "stochastic":
            return None
        return v.widen(v.b.lshr(word, v.word(32 - self.random_bits)))

    def round(self, v: Lanes, x: Value, r: Value | None) -> Value:
        """To the format's grid, its range unbounded."""
        format = self.format
        if isinstance(format, Float32Format):
            return v.b.fpext(v.b.fptrunc(x, ir.VectorType(F32, v.count)), v.vector)
        if isinstance(format, FixedFormat):
            return v.mul(self._round_units(v, v.mul(x, v.constant(2.0**format.fraction)), r), v.constant(format.tiny))
        if r is not None:
            dropped = 52 - format.mantissa
            added = v.b.shl(r, v.bit_constant(dropped - self.random_bits))
            return v.keep_bits(v.from_bits(v.b.add(v.bits(x), added)), dropped)
        return on_float_grid(v, x, format, self.rounding)

    def _round_units(self, v: Lanes, units: Value, r: Value | None) -> Value:
        if r is None:
            return on_whole_grid(v, units, self.rounding)
        return _round_units_stochastically(v, units, r, self.random_bits)

    def keep(self, v: Lanes, rounded: Value) -> Value:
        """What a register keeps: flushed below the smallest, saturated or wrapped above the largest."""
        format = self.format
        if isinstance(format, Float32Format):
            return rounded
        if isinstance(format, FloatFormat):
            rounded = v.zero_below(rounded, 2.0**format.emin if self.underflow else FLOAT32_TINY)
        elif format.overflow == "wrap":
            return _wrap(v, rounded, format)
        return v.clamp(rounded, format.min, format.max)

    def add(self, v: Lanes, s: Value, p: Value, word: Value | None, below: Format | Float32Format | None) -> Sum:
        """s + p of a value p in a format below, or any product of two float32."""
        format, is_huge = self.format, None
        if isinstance(format, FixedFormat) and self._may_be_huge(below):
            is_huge = v.b.fcmp_ordered(">=", v.magnitude(p), v.constant(2.0**48 * format.tiny))
            p = v.b.select(is_huge, _fold(v, p, 2.0**format.bits * format.tiny), p)
        total = v.add(s, p) if self.adds_exactly(below) else _add_to_odd(v, s, p)
        rounded = self.round(v, total, self.bits(v, word))
        return Sum(total, rounded, self.keep(v, rounded), format, is_huge)

    def _may_be_huge(self, below: Format | Float32Format | None) -> bool:
        """Terms may lose bits against a wrapping sum; see `numerics.reference._fold_for_wrap`."""
        wraps = isinstance(self.format, FixedFormat) and self.format.overflow == "wrap"
        return wraps and not isinstance(below, FixedFormat)

    def adds_exactly(self, below: Format | Float32Format | None) -> bool:
        """Every s + p is a float64."""
        if below is None:
            return False
        spans = [_span(format, self.underflow) for format in (self.format, below)]
        return max(high for _, high in spans) + 2 - min(low for low, _ in spans) <= 53


@dataclass(frozen=True)
class General64(Arithmetic):
    """Float64 lanes, the processor rounding to the nearest."""

    acc: Accumulator
    levels: tuple[Merging, ...] = ()

    element_bytes = 8
    flushes = False
    toward_zero = False
    sees_overflow = True
    sees_events = True

    @property
    def _sums(self) -> Register64:
        return Register64(self.acc.format, self.acc.rounding, self.acc.random_bits, self.acc.underflow)

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        return self.product_and_sum(v, x, w, s, word)[1]

    def product_and_sum(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        """Q_prod(x·w), and FMAq(x, w, s)."""
        p = v.mul(x, w)
        if self.acc.product is not None:
            p = self._products.keep(v, self._products.round(v, p, self._product_bits(v, word)))
        return p, self._sums.add(v, s, p, word, self.acc.product).after

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._own_level.merge(v, t, s, word)

    def observed_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        x_w = p = v.mul(x, w)
        overflows = underflows = ir.Constant(v.mask, [ir.Constant(I1, 0)] * v.count)
        if self.acc.product is not None:
            rounded = self._products.round(v, x_w, self._product_bits(v, word))
            p = self._products.keep(v, rounded)
            overflows = _is_beyond(v, rounded, self.acc.product)
            underflows = v.b.and_(_differ(v, x_w, v.constant(0.0)), _are_equal(v, p, v.constant(0.0)))
        total = self._sums.add(v, s, p, word, self.acc.product)
        is_term = _differ(v, p, v.constant(0.0))
        return total.after, [overflows, is_term, *_sum_events(v, p, s, total, v.b.or_(overflows, underflows))]

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        return self._own_level.observed_merge(v, t, s, word)

    def overflowing_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        after, (of_product, _, of_sum, *_) = self.observed_step(v, x, w, s, word)
        return after, v.b.or_(of_product, of_sum)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        return self._own_level.overflowing_merge(v, t, s, word)

    @property
    def _own_level(self) -> Level64:
        return Level64(self._sums, self.acc.format)

    @property
    def _products(self) -> Register64:
        assert self.acc.product is not None
        acc = self.acc
        return Register64(self.acc.product, acc.rounding_of_products, acc.random_bits, acc.underflow)

    def _product_bits(self, v: Lanes, word: Value | None) -> Value | None:
        if word is None or self.acc.rounding_of_products != "stochastic":
            return None
        low = v.b.and_(word, v.word(0xFFFF))
        return v.widen(v.b.lshr(low, v.word(16 - self.acc.random_bits)))


@dataclass(frozen=True)
class Level64(Merging):
    """Merges of values in a format below, in float64 lanes."""

    sums: Register64
    below: Format | Float32Format
    chunk: int | None = None

    sees_overflow = True
    sees_events = True

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self.sums.add(v, t, s, word, self.below).after

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        """Q(t + s), and its events."""
        total = self.sums.add(v, t, s, word, self.below)
        nowhere = ir.Constant(v.mask, [ir.Constant(I1, 0)] * v.count)
        return total.after, [nowhere, nowhere, *_sum_events(v, s, t, total, nowhere)]

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        after, (_, _, of_sum, *_) = self.observed_merge(v, t, s, word)
        return after, of_sum


def general(acc: Accumulator) -> General64:
    """The arithmetic that is always right."""
    below = (acc.format, *(level.format for level in acc.levels))
    levels = [_level(level, acc, format) for level, format in zip(acc.levels, below, strict=False)]
    return General64(acc, () if acc.outer is None else tuple(levels))


def _level(level: Level, acc: Accumulator, below: Format | Float32Format) -> Level64:
    return Level64(Register64(level.format, level.rounding, level.random_bits, acc.underflow), below, level.chunk)


@dataclass(frozen=True)
class Sum:
    """s + p on the way into its register: exact (or rounded to odd), on the grid, in range.

    `is_huge` marks lanes whose product was folded into the range of a wrapping sum.
    """

    total: Value
    rounded: Value
    after: Value
    format: Format | Float32Format
    is_huge: Value | None


def _are_equal(v: Lanes, x: Value, y: Value) -> Value:
    return v.b.fcmp_ordered("==", x, y)


def _differ(v: Lanes, x: Value, y: Value) -> Value:
    return v.b.fcmp_unordered("!=", x, y)


def _is_beyond(v: Lanes, rounded: Value, format: Format | Float32Format) -> Value:
    above = v.b.fcmp_ordered(">", rounded, v.constant(format.max))
    return v.b.or_(above, v.b.fcmp_ordered("<", rounded, v.constant(format.min)))


def _sum_events(v: Lanes, p: Value, before: Value, total: Sum, others: Value) -> list[Value]:
    """Overflow, underflow, full swamping of a sum, and where it loses something: as `Merging.observed_merge`'s.

    `others` are lanes with an event of the product.
    """
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
    return [overflows, underflows, full, b.or_(underflows, b.and_(none_of_these, b.or_(unchanged, inexact)))]


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


def _add_to_odd(v: Lanes, s: Value, p: Value) -> Value:
    """s + p rounded to odd: where TwoSum's error is not zero, the neighbour with a last bit of 1."""
    total = v.add(s, p)
    p_part = v.sub(total, s)
    error = v.add(v.sub(s, v.sub(total, p_part)), v.sub(p, p_part))
    bits = v.bits(total)
    signs_differ = v.b.icmp_signed("<", v.b.xor(bits, v.bits(error)), v.bit_constant(0))
    truncated = v.b.add(bits, v.b.sext(signs_differ, v.bit_vector))
    odd = v.b.or_(truncated, v.bit_constant(1))
    is_exact = v.b.fcmp_unordered("==", error, v.constant(0.0))  # an infinite sum has no error
    return v.b.select(is_exact, total, v.from_bits(odd))


def _span(format: Format | Float32Format, underflow: bool) -> tuple[int, int]:
    """Exponents of the last bit of the smallest value and of the first bit of the largest."""
    if isinstance(format, FixedFormat):
        return -format.fraction, format.width - 1 - format.fraction
    return (format.emin if underflow else FLOAT32_EMIN) - format.significant, format.emax
