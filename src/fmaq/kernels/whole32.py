"""Fixed-point sums of whole numbers in float32 lanes: int8 into any integer accumulator, say.

Products are exact and nothing is rounded, so a step is one fused multiply-add, and one limit where it may saturate.
Sums are held in units of the last bit of the format. A saturating one is held with one half added, which makes its
range symmetric: that is one VRANGE. A wrapping one is added up exactly in a chunk, and wrapped once, at the end.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.arithmetic32 import to_nearest, wrapped
from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator, FixedFormat

HALF = 0.5


@dataclass(frozen=True)
class Whole32(Arithmetic):
    """Whole operands, scaled to units; `choose` sees to it that float32 holds every sum.

    Args:
        acc: fixed format; no product is rounded or out of its format's range.
        sum_clamped: some sum in a chunk may be out of range.
        is_open: no sum is out of range, nor a sum of chunks, if it makes those.
        by_chunk: whether it may is known better for a tile and a chunk.
        levels: see `Arithmetic`.
    """

    acc: Accumulator
    sum_clamped: bool = True
    is_open: bool = False
    by_chunk: bool = False
    levels: tuple[Merging, ...] = ()

    element_bytes = 4
    flushes = True
    toward_zero = True
    sees_loss = False

    @property
    def needs_random(self) -> bool:
        return bool(self.levels) and any(level.rounding == "stochastic" for level in self.acc.levels)

    @property
    def _format(self) -> FixedFormat:
        assert isinstance(self.acc.format, FixedFormat)
        return self.acc.format

    @property
    def _saturates(self) -> bool:
        return self._format.overflow == "saturate" and not self.is_open

    @property
    def unclamped(self) -> Whole32:
        return replace(self, sum_clamped=False, by_chunk=False)

    def zero(self, v: Lanes) -> Value:
        return v.constant(HALF if self._saturates else 0.0)

    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        total = v.fma(x, w, s)
        return self._limited(v, total) if self.sum_clamped and self._saturates else total

    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        if self._saturates:
            return self._limited(v, v.add(t, v.sub(s, v.constant(HALF))))
        return v.from_bits(v.b.add(v.bits(t), v.b.fptosi(s, v.bit_vector)))

    def finish(self, v: Lanes, total: Value) -> Value:
        if self._saturates:
            units = v.sub(total, v.constant(HALF))
        else:
            units = to_nearest(v, self._in_range(v, v.bits(total)), self._format.width)
        return v.mul(units, v.constant(self._format.tiny))

    def passed(self, v: Lanes, total: Value) -> Value:
        """In units."""
        if self._saturates:
            return v.sub(total, v.constant(HALF))
        return total if self.is_open else v.b.sitofp(self.passed_whole(v, total), v.vector)

    def passed_whole(self, v: Lanes, total: Value) -> Value:
        units = v.sub(total, v.constant(HALF)) if self._saturates else total
        return self._in_range(v, v.b.fptosi(units, v.bit_vector))

    def _in_range(self, v: Lanes, whole: Value) -> Value:
        return whole if self.is_open or self._saturates else wrapped(v, whole, self._format.width)

    def _limited(self, v: Lanes, x: Value) -> Value:
        limit = 2.0 ** (self._format.width - 1) - HALF
        return v.clamp(x, -limit, limit)
