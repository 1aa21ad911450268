"""What a kernel knows of the arithmetic it computes: one FMAq step, one merge, and how a finished sum is read out.

`arithmetic32` is fast, in float32 or int32 lanes, where it is provably exact; `arithmetic64` is always right, in
float64 lanes. Only these know how to round; `choose` picks one for an accumulator and the operands at hand.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import replace
from typing import ClassVar, Self

from fmaq.kernels.ir_blocks import Value
from fmaq.kernels.lanes import Lanes
from fmaq.numerics import Accumulator


class Merging(ABC):
    """How sums of chunks, or of the level below, are merged: t ← Q(t + s).

    Attributes:
        chunk: how many make one sum of this level; None is all.
        sees_loss: has `unchanged`.
        sees_overflow: has `overflowing_merge` (and `overflowing_step`).
        sees_events: has `observed_merge` (and `observed_step`).
        takes_whole: terms are integers (`passed_whole`).
        may_be_subnormal: finished sums may be; else subnormal bits are zeros.
    """

    chunk: int | None = None
    sees_loss: ClassVar[bool] = True
    sees_overflow: ClassVar[bool] = False
    takes_whole: ClassVar[bool] = False
    may_be_subnormal: bool = False

    @property
    def sees_events(self) -> bool:
        """Counts events."""
        return False

    def zero(self, v: Lanes) -> Value:
        """An empty sum."""
        return v.constant(0.0)

    @abstractmethod
    def merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> Value:
        """Q(t + s)."""

    def merge_all(self, v: Lanes, ts: list[Value], ss: list[Value], words: list[Value | None]) -> list[Value]:
        """`merge` of every cell of a tile."""
        return [self.merge(v, t, s, word) for t, s, word in zip(ts, ss, words, strict=True)]

    def finish(self, v: Lanes, total: Value) -> Value:
        """The value of a finished sum."""
        return total

    def passed(self, v: Lanes, total: Value) -> Value:
        """A finished sum as the next level takes it: times a power of two that was agreed on."""
        return total

    def passed_whole(self, v: Lanes, total: Value) -> Value:
        """The same as an integer, where the next level takes those."""
        raise NotImplementedError(f"{type(self).__name__} has no integers")

    def looking(self) -> Self:
        """The same for kernels that look at sums, not only at the last one."""
        return self

    def observed_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        """Q(t + s), and in which lanes it sees which of `numerics.reference.EVENTS`, but for two.

        Instead of a product's underflow: where it is not zero (nowhere in a merge). The last mask, of partial swamping,
        also has the lanes of the sum's underflow and of full swamping. `events` subtracts, which masks would pay for.

        Raises:
            NotImplementedError: this arithmetic does not look.
        """
        raise NotImplementedError(f"{type(self).__name__} sees no events")

    # What the gradient estimators look at.

    def unchanged(self, v: Lanes, before: Value, after: Value) -> Value:
        """In which lanes a sum is the same as before."""
        return v.b.fcmp_ordered("==", before, after)

    def is_empty(self, v: Lanes, total: Value) -> Value:
        """In which lanes a sum is zero."""
        return v.b.fcmp_ordered("==", total, v.constant(0.0))

    def overflowing_merge(self, v: Lanes, t: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        """Q(t + s), and in which lanes it overflows."""
        raise NotImplementedError(f"{type(self).__name__} sees no overflow")


class Arithmetic(Merging):
    """How a kernel computes; immutable and hashable, since kernels are cached by it.

    Its own merges are those of an accumulator without outer levels.

    Attributes:
        acc: the accumulator; its seed does not count.
        levels: how sums of chunks are merged, the innermost first; none: as `merge` does.
        element_bytes: width of a lane.
        flushes: the processor flushes what is no normal number to zero.
        by_chunk: a tile's chunk is computed `unclamped` where its bounds prove that nothing in it can saturate.
    """

    acc: Accumulator
    element_bytes: ClassVar[int]
    flushes: ClassVar[bool]
    levels: tuple[Merging, ...] = ()
    by_chunk: bool = False

    @property
    @abstractmethod
    def toward_zero(self) -> bool:
        """The processor rounds toward zero meanwhile, else to the nearest."""

    @property
    def needs_random(self) -> bool:
        """Steps, or merges, take random words."""
        return self.acc.is_stochastic

    @property
    def merging(self) -> tuple[Merging, ...]:
        """The levels, or itself."""
        return self.levels or (self,)

    def looking(self) -> Self:
        return replace(self, levels=tuple(level.looking() for level in self.levels))  # type: ignore[type-var]

    @property
    def unclamped(self) -> Arithmetic:
        """The same without saturation in a chunk."""
        return self

    @abstractmethod
    def step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> Value:
        """FMAq(x, w, s), sums held as the arithmetic likes, an empty one as `zero`."""

    def observed_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, list[Value]]:
        """FMAq(x, w, s), and its events; as `observed_merge`."""
        raise NotImplementedError(f"{type(self).__name__} sees no events")

    def overflowing_step(self, v: Lanes, x: Value, w: Value, s: Value, word: Value | None) -> tuple[Value, Value]:
        """FMAq(x, w, s), and in which lanes the product or the sum overflows."""
        raise NotImplementedError(f"{type(self).__name__} sees no overflow")
