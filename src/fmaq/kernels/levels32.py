"""Merges of sums of chunks into an outer level, in 32-bit lanes, where that is provably exact.

Sums arrive as float32 numbers times a power of two (`Arithmetic.passed`); a fused multiply-add by another brings them
into the scale of the level. None of this depends on how the processor rounds where sums fit in float32's 24 bits, or
lie next to the larger term; else it truncates (see `choose`).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from llvmlite import ir

from fmaq.kernels.arithmetic import Merging
from fmaq.kernels.arithmetic32 import (
    FLOAT32_EMIN,
    Int32Sums,
    clamp,
    is_beyond,
    nowhere,
    observed_sum,
    sum_events,
    truncated,
)
from fmaq.kernels.grids import on_float_grid
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import FixedFormat, FloatFormat, Level


@dataclass(frozen=True)
class FloatLevel32(Merging):
    """Sums in a float format.

    Args:
        level: its format is a `FloatFormat`.
        underflow: as of the accumulator.
        below: terms arrive times 2^this.
        scale: sums are held times 2^this.
        is_clean: as of `Float32`.
    """

    level: Level
    underflow: bool
    below: int
    scale: int
    is_clean: bool = False

    sees_overflow = True

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
    def is_flushed_freely(self) -> bool:
        """The processor flushes what the format does."""
        return self.level.rounding == "toward_zero" and self.smallest + self.scale == FLOAT32_EMIN

    @property
    def sees_events(self) -> bool:
        return self.is_flushed_freely

    @property
    def _limit(self) -> float:
        return self.format.max * 2.0**self.scale

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        return clamp(v, self._rounded(v, self._total(v, t, s), word), self._limit)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        rounded = self._rounded(v, self._total(v, t, s), word)
        return clamp(v, rounded, self._limit), is_beyond(v, rounded, self._limit)

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        total = self._total(v, t, s)
        rounded = self._rounded(v, total, word)
        lift = 2.0 ** (self.scale - self.below)
        after, masks = observed_sum(v, s, lift, t, total, rounded, self._limit, is_truncated=False)
        return after, [nowhere(v), nowhere(v), *masks]

    def looking(self) -> FloatLevel32:
        return replace(self, is_clean=True)

    def events(self, b: ir.IRBuilder, masks: list[Value]) -> list[Value]:
        return sum_events(b, masks)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.scale))

    def _total(self, v: Lanes, t: Value, s: Value) -> Value:
        return v.add(t, s) if self.scale == self.below else v.fma(s, v.constant(2.0 ** (self.scale - self.below)), t)

    def _rounded(self, v: Lanes, total: Value, word: Value | None) -> Value:
        if self.level.rounding == "stochastic":
            assert word is not None
            dropped, random_bits = 23 - self.format.mantissa, self.level.random_bits
            bits = v.b.shl(v.b.lshr(word, v.word(32 - random_bits)), v.word(dropped - random_bits))
            rounded = v.keep_bits(v.from_bits(v.b.add(v.bits(total), bits)), dropped)
        elif self.level.rounding == "toward_zero":
            rounded = truncated(v, total, self.format, self.is_clean)
        else:
            rounded = on_float_grid(v, total, self.format, self.level.rounding)
        return rounded if self.is_flushed_freely else v.zero_below(rounded, 2.0 ** (self.smallest + self.scale))


@dataclass(frozen=True)
class Single32(Merging):
    """Sums in float32, to the nearest even, of terms that float32 holds, none of them subnormal when scaled."""

    below: int
    scale: int
    chunk: int | None = None

    sees_overflow = True

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        if self.scale != self.below:
            s = v.mul(s, v.constant(2.0 ** (self.scale - self.below)))
        return v.add_to_nearest(t, s)

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        return self.merge(v, t, s, word), nowhere(v)

    def finish(self, v: Lanes, total: Value) -> Value:
        return v.mul(total, v.constant(2.0**-self.scale))


@dataclass(frozen=True)
class FixedLevel32(Int32Sums):
    """Sums in a fixed format, of multiples of its unit."""

    level: Level
    below: int

    @property
    def chunk(self) -> int | None:  # type: ignore[override]
        return self.level.chunk

    @property
    def format(self) -> FixedFormat:
        assert isinstance(self.level.format, FixedFormat)
        return self.level.format

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        if self.format.fraction != self.below:
            s = v.mul(s, v.constant(2.0 ** (self.format.fraction - self.below)))
        return self.add_whole(v, t, v.b.fptosi(s, v.bit_vector), self.format.overflow == "saturate")
