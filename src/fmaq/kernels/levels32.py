"""Merges of sums of chunks into an outer level, in 32-bit lanes, where that is provably exact.

Sums arrive as float32 numbers times a power of two (`Arithmetic.passed`); a fused multiply-add by another brings them
into the scale of the level. Where float32's 24 bits do not hold a sum, that addition rounds as the level needs it,
however the processor rounds (`Lanes.added`; see `choose`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Merging
from fmaq.kernels.arithmetic32 import (
    FLOAT32_EMIN,
    Int32Sums,
    clamp,
    events,
    is_beyond,
    nowhere,
    observed_sum,
    truncated,
)
from fmaq.kernels.grids import on_coarser_grid, on_float_grid
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import FixedFormat, FloatFormat, Level

# A sum is rounded to M bits by adding, and taking away again, a power of two 23 − M places above its leading bit, the
# addition rounded so.
BY_ADDITION = {"nearest_even": "nearest", "floor": "down"}


class Level32(Merging):
    """Merges in float32 lanes, whose additions round in a way of their own.

    Attributes:
        below: terms arrive times 2^this.
        scale: sums are held times 2^this.
        addition: how t + s is rounded to float32 before the level rounds it: see `Lanes.added`.
    """

    below: int
    scale: int
    addition: str

    sees_overflow = True
    sees_events = True

    @property
    def lift(self) -> float:
        """What brings terms into the scale of the sums."""
        return 2.0 ** (self.scale - self.below)

    @property
    def limit(self) -> float | None:
        """The largest magnitude of sums, as they are held; None where they do not exceed it."""
        return None

    def rounded(self, v: Lanes, totals: list[Value], words: list[Value | None]) -> list[Value]:
        """On the level's grid, flushed but not limited."""
        return totals

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return self.merge_all(v, [t], [s], [word])[0]

    def merge_all(self, v: Lanes, ts: list[Value], ss: list[Value], words: list[Value | None]) -> list[Value]:
        rounded = self.rounded(v, v.added(self.addition, ss, ts, self.lift), words)
        return [self._limited(v, total) for total in rounded]

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        (rounded,) = self.rounded(v, v.added(self.addition, [s], [t], self.lift), [word])
        return self._limited(v, rounded), nowhere(v) if self.limit is None else is_beyond(v, rounded, self.limit)

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        (total,) = v.added(self.addition, [s], [t], self.lift)
        (rounded,) = self.rounded(v, [total], [word])
        after, seen = observed_sum(v, s, self.lift, t, total, rounded, self.limit, terms="any")
        return after, events(v.b, seen, of_merge=True)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.scale))

    def _limited(self, v: Lanes, rounded: Value) -> Value:
        return rounded if self.limit is None else clamp(v, rounded, self.limit)


@dataclass(frozen=True)
class FloatLevel32(Level32):
    """Sums in a float format.

    Args:
        level: its format is a `FloatFormat`.
        underflow: as of the accumulator.
        is_clean: as of `Float32`.
        may_underflow, may_overflow: some sum may be flushed, or limited.
        below, scale, addition: see `Level32`.
    """

    level: Level
    underflow: bool
    below: int
    scale: int
    addition: str
    may_underflow: bool = True
    may_overflow: bool = True
    is_clean: bool = False

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return self.level.chunk

    @property
    def format(self) -> FloatFormat:
        """Of the sums."""
        assert isinstance(self.level.format, FloatFormat)
        return self.level.format

    @property
    def smallest(self) -> int:
        """The exponent below which sums are flushed."""
        return self.format.emin if self.underflow else FLOAT32_EMIN

    @property
    def limit(self) -> float | None:
        return self.format.max * 2.0**self.scale if self.may_overflow else None

    @property
    def headroom(self) -> int:
        """Places above a sum that it is rounded with."""
        return 24 - self.format.mantissa if self.level.rounding in BY_ADDITION else 0

    def looking(self) -> FloatLevel32:
        return replace(self, is_clean=True)

    def rounded(self, v: Lanes, totals: list[Value], words: list[Value | None]) -> list[Value]:
        rounding, format = self.level.rounding, self.format
        if rounding == "stochastic":
            rounded = [self._rounded_stochastically(v, *pair) for pair in zip(totals, words, strict=True)]
        elif rounding == "toward_zero":
            rounded = [truncated(v, total, format, self.is_clean) for total in totals]
            if self.smallest + self.scale == FLOAT32_EMIN:
                return rounded  # the processor flushes what the format does
        elif rounding in BY_ADDITION and format.mantissa < v.mantissa and v.target.fused:
            up = 2.0 ** (v.mantissa - format.mantissa)
            leading = [v.leading_bit(total) for total in totals]
            far = v.added(BY_ADDITION[rounding], leading, totals, up)
            rounded = [v.fma(one, v.constant(-up), x) for one, x in zip(leading, far, strict=True)]
        else:
            rounded = [on_float_grid(v, total, format, rounding) for total in totals]
        if not self.may_underflow:
            return rounded
        return [v.zero_below(total, 2.0 ** (self.smallest + self.scale)) for total in rounded]

    def _rounded_stochastically(self, v: Lanes, total: Value, word: Value | None) -> Value:
        assert word is not None
        dropped, random_bits = 23 - self.format.mantissa, self.level.random_bits
        bits = v.b.shl(v.b.lshr(word, v.word(32 - random_bits)), v.word(dropped - random_bits))
        return v.keep_bits(v.from_bits(v.b.add(v.bits(total), bits)), dropped)


@dataclass(frozen=True)
class Single32(Level32):
    """Sums in float32, to the nearest even, of terms that float32 holds, none of them subnormal when scaled.

    Args:
        below, scale: see `Level32`.
        may_be_subnormal: sums may be, as they are; those are multiples of float32's smallest number, and exact.
    """

    below: int
    scale: int
    may_be_subnormal: bool = False
    chunk: int | None = None

    addition = "nearest"

    def finish(self, v: Lanes, total: Value) -> Value:
        if not self.may_be_subnormal:
            return super().finish(v, total)
        # The processor would flush them; their bits are their multiples of 2^−149.
        magnitude, normal = v.magnitude(total), super().finish(v, total)
        count = v.b.fptosi(v.mul(magnitude, v.constant(2.0 ** (149 - self.scale))), v.bit_vector)
        is_normal = v.b.fcmp_ordered(">=", magnitude, v.constant(2.0 ** (FLOAT32_EMIN + self.scale)))
        return v.b.select(is_normal, normal, v.copy_sign(v.from_bits(count), total))


@dataclass(frozen=True)
class FixedLevel32(Int32Sums):
    """Sums in a fixed format, of terms that may be finer: as integers of whose lowest bits a sum has none.

    Args:
        level: its format is a `FixedFormat`.
        below: terms arrive as integers, times 2^this, and are multiples of the level's units.
        finer: terms have so many bits behind the level's last one.
        is_open: no sum is out of range.
    """

    level: Level
    below: int
    finer: int = 0
    is_open: bool = False

    takes_whole = True

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return self.level.chunk

    @property
    def format(self) -> FixedFormat:
        assert isinstance(self.level.format, FixedFormat)
        return self.level.format

    @property
    def scale(self) -> int:
        """The integers that sums are held as are the sums times 2^this."""
        return self.format.fraction + self.finer

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        if self.scale > self.below:
            s = v.b.shl(s, v.bit_constant(self.scale - self.below))
        elif self.scale < self.below:
            s = v.b.ashr(s, v.bit_constant(self.below - self.scale))
        total = on_coarser_grid(v, v.b.add(v.bits(t), s), self.finer, self.level.rounding)
        if self.finer:
            total = self.in_range(v, total)  # its sign matters
        return v.from_bits(self.limited(v, total))
