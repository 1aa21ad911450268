"""Fast arithmetic in 32-bit lanes, for formats and operands for which it is provably exact.

The processor rounds toward zero and flushes to zero. Operands are scaled by powers of two on packing, so that
magnitudes lie where that is of use.

* `Float32`: the smallest magnitude of products, and of sums, is scaled to float32's smallest normal
  number, so that truncation is one AND, and underflow is free; a fused multiply-add by a power of two brings a product
  into the scale of the sums. Rounding toward zero twice is rounding once, so 24 bits on the way do no harm. The half
  of a half-unit format is one OR more; with it, a zero is a subnormal number, which the processor takes as zero.
* `Fixed32`: products are rounded to 32-bit integers, and added as such. A wrapping sum is wrapped once.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import NamedTuple

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.grids import BY_TRUNCATION, on_coarser_grid, on_float_grid
from fmaq.kernels.ir_blocks import I1, Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat, Format

FLOAT32_EMIN = -126


@dataclass(frozen=True)
class Float32(Arithmetic):
    """Float formats, toward zero or half-unit, in float32 lanes; the checks that operands make needless are left out.

    Args:
        acc: float formats.
        product_exact: no product needs rounding or flushing, or there is no product format: x·w goes into the sum as it
            is.
        product_masked: some product may have too many bits.
        product_clamped: some product may exceed the largest.
        sum_clamped: some sum in a chunk may exceed the largest.
        by_chunk: whether they may is known better for a tile and a chunk, from bounds taken while packing.
        levels: see `Arithmetic`.
        is_clean: a zero with a half unit, which is a subnormal number, is made a zero again, since LLVM knows that it
            compares unequal to zero where nothing is flushed.
        terms: of sums whose events are counted: see `observed_sum`.
    """

    acc: Accumulator
    product_exact: bool
    product_masked: bool
    product_clamped: bool
    sum_clamped: bool = True
    by_chunk: bool = False
    levels: tuple[Merging, ...] = ()
    is_clean: bool = False
    terms: str = "any"

    element_bytes = 4
    flushes = True
    toward_zero = True
    sees_overflow = True
    sees_events = True

    @property
    def unclamped(self) -> Float32:
        return replace(self, product_clamped=False, sum_clamped=False, by_chunk=False)

    def looking(self) -> Float32:
        return replace(super().looking(), is_clean=True)

    def _scale(self, format: Format) -> int:
        """The exponent that brings the format's smallest magnitude to where the processor flushes what is below."""
        return FLOAT32_EMIN - (_float(format).emin if self.acc.underflow else FLOAT32_EMIN)

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
            return self._sum(v, v.fma(x, w, s), self.sum_clamped)
        lift = v.constant(2.0 ** (self.sum_scale - self.product_scale))
        return self._sum(v, v.fma(self._product(v, x, w), lift, s), self.sum_clamped)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self._sum(v, v.add(t, s), clamped=True)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.sum_scale))

    def _product(self, v: Lanes, x: Value, w: Value) -> Value:
        p = self._rounded_product(v, x, w)
        return clamp(v, p, self._product_limit) if self.product_clamped else p

    def _rounded_product(self, v: Lanes, x: Value, w: Value) -> Value:
        p = v.mul(x, w)
        return truncated(v, p, _float(self.acc.product), self.is_clean) if self.product_masked else p

    @property
    def _product_limit(self) -> float:
        return _float(self.acc.product).max * 2.0**self.product_scale

    @property
    def _sum_limit(self) -> float:
        return _float(self.acc.format).max * 2.0**self.sum_scale

    def _sum(self, v: Lanes, total: Value, clamped: bool) -> Value:
        total = self._rounded_sum(v, total)
        return clamp(v, total, self._sum_limit) if clamped else total

    def _rounded_sum(self, v: Lanes, total: Value) -> Value:
        return truncated(v, total, _float(self.acc.format), self.is_clean)

    # Events. A step of the scaled numbers loses nothing that is looked at, if no operand was flushed on packing, and
    # mantissas are short enough (`choose`).

    def observed_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        if self.product_exact:
            total = v.fma(x, w, s)
            limit = self._sum_limit if self.sum_clamped else None
            after, seen = observed_product_sum(v, x, w, s, total, self._rounded_sum(v, total), limit)
            return after, events(v.b, seen)
        p, overflows = self._rounded_product(v, x, w), None
        if self.product_clamped:
            overflows = is_beyond(v, p, self._product_limit)
            p = clamp(v, p, self._product_limit)
        lift = 2.0 ** (self.sum_scale - self.product_scale)
        after, seen = self._observed_sum(v, p, lift, s, self.sum_clamped)
        return after, events(v.b, seen, overflows)

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        after, seen = self._observed_sum(v, s, 1.0, t, clamped=True)
        return after, events(v.b, seen, of_merge=True)

    def _observed_sum(self, v: Lanes, p: Value, lift: float, s: Value, clamped: bool) -> tuple[Value, Seen]:
        """p·lift + s in its register."""
        total = v.fma(p, v.constant(lift), s)
        rounded = self._rounded_sum(v, total)
        limit = self._sum_limit if clamped else None
        return observed_sum(v, p, lift, s, total, rounded, limit, self.terms)

    # Overflows alone are seen whatever is flushed: what is flushed does not overflow.

    def overflowing_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        if self.product_exact:
            return self._limited_sum(v, v.fma(x, w, s), self.sum_clamped)
        p, of_product = self._rounded_product(v, x, w), nowhere(v)
        if self.product_clamped:
            p, of_product = clamp(v, p, self._product_limit), is_beyond(v, p, self._product_limit)
        lift = v.constant(2.0 ** (self.sum_scale - self.product_scale))
        after, of_sum = self._limited_sum(v, v.fma(p, lift, s), self.sum_clamped)
        return after, v.b.or_(of_product, of_sum)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        return self._limited_sum(v, v.add(t, s), clamped=True)

    def _limited_sum(self, v: Lanes, total: Value, clamped: bool) -> tuple[Value, Value]:
        total = self._sum(v, total, clamped=False)
        if not clamped:
            return total, nowhere(v)
        return clamp(v, total, self._sum_limit), is_beyond(v, total, self._sum_limit)


def _float(format: Format | None) -> FloatFormat:
    assert isinstance(format, FloatFormat)
    return format


class Seen(NamedTuple):
    """What a sum p·lift + s shows: masks of lanes in which it overflows, p is zero, it is, it is s, it is not exact."""

    overflows: Value
    p_is_zero: Value
    is_zero: Value
    is_same: Value
    is_inexact: Value


def observed_sum(
    v: Lanes, p: Value, lift: float, s: Value, total: Value, rounded: Value, limit: float | None, terms: str
) -> tuple[Value, Seen]:
    """A sum in its register.

    It is exact if it is the sum before, and that was. Where s is zero, p alone may be flushed: `events` tells.

    Args:
        total: p·lift + s.
        rounded: on the format's grid.
        limit: the largest magnitude; None where it cannot be exceeded.
        terms: how to see that a sum is exact. "short" ones: if it less p·lift is s again; "truncated" as well: so is
            the rounded sum; "any": if rounding it up and down gives the same (see `choose`).
    """
    b, zero = v.b, v.constant(0.0)
    after, overflows = rounded, nowhere(v)
    if limit is not None:
        after, overflows = clamp(v, rounded, limit), is_beyond(v, rounded, limit)
    difference = v.fma(p, v.constant(-lift), after if terms == "truncated" else total)
    inexact = b.fcmp_unordered("!=", difference, s)
    if terms != "truncated":
        inexact = b.or_(inexact, b.fcmp_unordered("!=", after, total))
    if terms == "any":
        (down,), (up,) = (v.added(direction, [p], [s], lift) for direction in ("down", "up"))
        inexact = b.or_(inexact, b.fcmp_unordered("!=", down, up))
    p_is_zero, is_zero, is_same = (b.fcmp_ordered("==", *pair) for pair in ((p, zero), (after, zero), (after, s)))
    return after, Seen(overflows, p_is_zero, is_zero, is_same, inexact)


def observed_product_sum(
    v: Lanes, x: Value, w: Value, s: Value, total: Value, rounded: Value, limit: float | None
) -> tuple[Value, Seen]:
    """`observed_sum` of an exact product.

    A sum that is zero may have been flushed. It is exact if x·w is −s, whether it is rounded up or down.
    """
    b, zero = v.b, v.constant(0.0)
    after, overflows = rounded, nowhere(v)
    if limit is not None:
        after, overflows = clamp(v, rounded, limit), is_beyond(v, rounded, limit)
    (down,), (up,) = (v.added(direction, [x], [s], w) for direction in ("down", "up"))
    inexact = b.or_(b.fcmp_unordered("!=", down, up), b.fcmp_unordered("!=", after, total))
    negative = v.sub(zero, s)
    for direction in ("down", "up"):
        (p,) = v.added(direction, [x], [zero], w)
        is_lost = b.and_(b.fcmp_ordered("==", total, zero), b.fcmp_unordered("!=", p, negative))
        inexact = b.or_(inexact, is_lost)
    p_is_zero = b.or_(b.fcmp_ordered("==", x, zero), b.fcmp_ordered("==", w, zero))
    is_zero, is_same = b.fcmp_ordered("==", after, zero), b.fcmp_ordered("==", after, s)
    return after, Seen(overflows, p_is_zero, is_zero, is_same, inexact)


def events(b: ir.IRBuilder, seen: Seen, product_overflows: Value | None = None, of_merge: bool = False) -> list[Value]:
    """As `Merging.observed_merge`'s; `product_overflows`: where the product does, nowhere by default."""
    none = ir.Constant(seen.overflows.type, [ir.Constant(I1, 0)] * seen.overflows.type.count)
    product_overflows = product_overflows or none
    is_term = b.not_(seen.p_is_zero)
    unnoticed = b.and_(is_term, seen.is_same)
    lossy = b.or_(unnoticed, seen.is_inexact)  # of a p that is zero, no sum is inexact
    underflows = b.and_(lossy, seen.is_zero)
    in_range = b.not_(b.or_(product_overflows, seen.overflows))
    return [
        product_overflows,
        none if of_merge else is_term,
        seen.overflows,
        underflows,
        b.and_(b.and_(unnoticed, b.not_(seen.is_zero)), in_range),
        b.or_(underflows, b.and_(lossy, in_range)),
    ]


def truncated(v: Lanes, x: Value, format: FloatFormat, is_clean: bool) -> Value:
    """x toward zero, or to half a unit; `is_clean` as of `Float32`."""
    rounded = on_float_grid(v, x, format, "toward_zero")
    if not (is_clean and format.half_unit):
        return rounded
    return v.b.select(v.b.fcmp_ordered("==", x, v.constant(0.0)), v.constant(0.0), rounded)


def nowhere(v: Lanes) -> Value:
    """No lane."""
    return ir.Constant(v.mask, [ir.Constant(I1, 0)] * v.count)


def is_beyond(v: Lanes, x: Value, limit: float) -> Value:
    """Which magnitudes are above a limit."""
    return v.b.fcmp_ordered(">", v.magnitude(x), v.constant(limit))


def clamp(v: Lanes, x: Value, limit: float) -> Value:
    """Magnitudes limited."""
    return v.clamp(x, -limit, limit)


class Int32Sums(Merging):
    """Sums of a fixed format as int32, which the loops carry as the bits of float32.

    Attributes:
        finer: they count units of 2^−finer of the format's last place.
        is_open: no sum is out of range.
    """

    finer: int = 0
    is_open: bool = False

    def is_empty(self, v: Lanes, total: Value) -> Value:
        return self.unchanged(v, self.zero(v), total)

    @property
    @abstractmethod
    def format(self) -> FixedFormat:
        """Of the sums."""

    @property
    def width(self) -> int:
        """Bits of the integers."""
        return self.format.width + self.finer

    def finish(self, v: Lanes, total: Value) -> Value:
        whole = to_nearest(v, self.in_range(v, v.bits(total)), self.width)
        return v.mul(whole, v.constant(self.format.tiny * 2.0**-self.finer))

    def passed(self, v: Lanes, total: Value) -> Value:
        """In units."""
        return v.b.sitofp(self.passed_whole(v, total), v.vector)

    def passed_whole(self, v: Lanes, total: Value) -> Value:
        return self.in_range(v, v.bits(total))

    def unchanged(self, v: Lanes, before: Value, after: Value) -> Value:
        changed = v.b.xor(v.bits(before), v.bits(after))
        if self.wraps:
            # The bits above are wrapped only at the end.
            changed = v.b.shl(changed, v.bit_constant(32 - self.width))
        return v.b.icmp_signed("==", changed, v.bit_constant(0))

    @property
    def saturates(self) -> bool:
        """Sums may be limited."""
        return self.format.overflow == "saturate" and not self.is_open

    @property
    def wraps(self) -> bool:
        """Sums may be wrapped."""
        return self.format.overflow == "wrap" and not self.is_open

    def limited(self, v: Lanes, total: Value) -> Value:
        """An integer into the range of the format, where it saturates."""
        half = 2 ** (self.width - 1)
        for sign, limit in (("<", half - 2**self.finer), (">", -half)) if self.saturates else ():
            bound = v.bit_constant(limit)
            total = v.b.select(v.b.icmp_signed(sign, total, bound), total, bound)
        return total

    def in_range(self, v: Lanes, total: Value) -> Value:
        """An integer wrapped, where the format wraps."""
        return wrapped(v, total, self.width) if self.wraps else total


WHOLE_ANCHOR, HALVES_ANCHOR = 1.5 * 2.0**23, 1.5 * 2.0**22  # among which float32 counts in ones, and in halves


@dataclass(frozen=True)
class Fixed32(Int32Sums, Arithmetic):
    """Fixed formats in int32 lanes.

    Products arrive in steps of their own, and are rounded to integers. Toward zero, or away from it at ties: below
    2^24 they are truncated exactly, above they saturate. Otherwise a fused multiply-add brings the exact product among
    float32 numbers whose last place is a step, or half of one: there the processor rounds to the nearest, or down
    (toward zero, from above), or to odd, and the bits count the steps. Sums of finer products are rounded in their
    units, after every step.

    Args:
        acc: fixed format, and a fixed product format, or none.
        rounding: of products to steps: the product format's; without one, any where they are whole, the sums' where
            it does not matter whether products or sums are rounded (`floor`, `half_up`), else `odd`, to quarters.
        product_limited: some product may be out of the product format's range, or far out of that of sums.
        sum_clamped: some sum in a chunk may be out of range.
        finer, coarser: a step is 2^−finer, or 2^coarser, of the sums' last place.
        is_open: no sum is out of range, nor a sum of chunks, if it makes those.
        by_chunk, levels: see `Float32`.
    """

    acc: Accumulator
    rounding: str
    product_limited: bool
    sum_clamped: bool = True
    finer: int = 0
    coarser: int = 0
    is_open: bool = False
    by_chunk: bool = False
    levels: tuple[Merging, ...] = ()

    element_bytes = 4
    flushes = True

    @property
    def toward_zero(self) -> bool:
        return self.rounding != "nearest_even"

    @property
    def needs_random(self) -> bool:
        return bool(self.levels) and any(level.rounding == "stochastic" for level in self.acc.levels)

    @property
    def format(self) -> FixedFormat:
        return _fixed(self.acc.format)

    @property
    def unclamped(self) -> Fixed32:
        return replace(self, product_limited=False, sum_clamped=False, by_chunk=False)

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        whole = self._product(v, x, w)
        product = self.acc.product
        if isinstance(product, FixedFormat) and self.product_limited and product.overflow == "wrap":
            whole = wrapped(v, whole, product.width)
        total = v.b.add(v.bits(s), v.b.shl(whole, v.bit_constant(self.coarser)) if self.coarser else whole)
        if self.finer:
            total = self.in_range(v, on_coarser_grid(v, total, self.finer, self.acc.rounding))
        return v.from_bits(self.limited(v, total) if self.sum_clamped else total)

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return v.from_bits(self.limited(v, v.b.add(v.bits(t), v.bits(s))))

    def _product(self, v: Lanes, x: Value, w: Value) -> Value:
        """x·w as an integer, limited where it saturates."""
        if self.rounding in BY_TRUNCATION:
            p = self._limited(v, v.mul(x, w), 0.0)
            if self.rounding == "nearest_away":
                p = v.add(p, v.copy_sign(v.constant(0.5), p))
            return v.b.fptosi(p, v.bit_vector)
        anchor = HALVES_ANCHOR if self.rounding == "half_up" else WHOLE_ANCHOR
        (found,) = v.added("odd" if self.rounding == "odd" else "own", [x], [v.constant(anchor)], w)
        found = self._limited(v, found, anchor)
        counted, at_zero = v.bits(found), v.bits(v.constant(anchor))
        if self.rounding == "half_up":
            return v.b.ashr(v.b.sub(counted, v.b.sub(at_zero, v.bit_constant(1))), v.bit_constant(1))
        return v.b.sub(counted, at_zero)

    def _limited(self, v: Lanes, x: Value, zero: float) -> Value:
        product = self.acc.product
        if not self.product_limited:
            return x
        if product is None:  # so far out of the range of sums that they saturate
            far = 2.0**self.width
            return v.clamp(x, zero - far, zero + far)
        half = 2.0 ** (_fixed(product).width - 1)
        return v.clamp(x, zero - half, zero + half - 1) if _fixed(product).overflow == "saturate" else x


def _fixed(format: Format) -> FixedFormat:
    assert isinstance(format, FixedFormat)
    return format


def wrapped(v: Lanes, whole: Value, width: int) -> Value:
    """The low `width` bits, sign-extended."""
    unused = v.bit_constant(32 - width)
    return v.b.ashr(v.b.shl(whole, unused), unused)


def to_nearest(v: Lanes, whole: Value, width: int) -> Value:
    """Integers of `width` bits as the nearest float32, ties to even, while the processor rounds toward zero."""
    b, zero, one = v.b, v.bit_constant(0), v.bit_constant(1)
    if width <= 25:  # float32 holds them
        return b.sitofp(whole, v.vector)
    sign = b.ashr(whole, v.bit_constant(31))
    magnitude = b.sub(b.xor(whole, sign), sign)  # unsigned
    leading_zeros = v.declare(f"llvm.ctlz.v{v.count}i32", v.bit_vector, [v.bit_vector, I1])
    excess = b.sub(v.bit_constant(8), b.call(leading_zeros, [magnitude, ir.Constant(I1, 0)]))
    is_long = b.icmp_signed(">", excess, zero)
    dropped = b.select(is_long, excess, zero)
    unit = b.shl(one, dropped)
    last = b.and_(b.lshr(magnitude, dropped), one)
    half = b.add(b.sub(b.lshr(unit, one), one), last)
    rounded = b.and_(b.add(magnitude, b.select(is_long, half, zero)), b.sub(zero, unit))
    return v.copy_sign(b.uitofp(rounded, v.vector), b.sitofp(whole, v.vector))
