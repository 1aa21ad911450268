"""Counting events: the product with counters along, which are vectors in registers until a tile is done."""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic64 import General64
from fmaq.kernels.gemm import COUNTERS, Gemm
from fmaq.kernels.ir_blocks import I64, Value, element, i64, load
from fmaq.kernels.lanes import Lanes
from fmaq.numerics.reference import EVENTS


class CountingGemm(Gemm):
    """A product in float64 lanes that counts `numerics.reference.EVENTS` of its steps, then of its merges."""

    arithmetic: General64

    def _counters(self, v: Lanes) -> list[Value]:
        return [ir.Constant(v.bit_vector, [i64(0)] * v.count)] * COUNTERS

    def _step(
        self,
        v: Lanes,
        arithmetic: Arithmetic,
        pairs: list[tuple[Value, Value]],
        sums: list[Value],
        words: list[Value | None],
        counted: list[Value],
    ) -> list[Value]:
        results = []
        of_steps, of_merges = counted[: len(EVENTS)], counted[len(EVENTS) :]
        for (x, w), s, word in zip(pairs, sums, words, strict=True):
            after, seen = self.arithmetic.observed_step(v, x, w, s, word)
            of_steps = _count(v, of_steps, seen)
            results.append(after)
        return [*results, *of_steps, *of_merges]

    def _merge(
        self, v: Lanes, totals: list[Value], sums: list[Value], words: list[Value | None], counted: list[Value]
    ) -> list[Value]:
        results = []
        of_steps, of_merges = counted[: len(EVENTS)], counted[len(EVENTS) :]
        for t, s, word in zip(totals, sums, words, strict=True):
            after, seen = self.arithmetic.observed_merge(v, t, s, word)
            of_merges = _count(v, of_merges, seen)
            results.append(after)
        return [*results, *of_steps, *of_merges]

    def _store_counters(self, v: Lanes, counted: list[Value], counters: Value) -> None:
        total = v.declare(f"llvm.vector.reduce.add.v{v.count}i64", I64, [v.bit_vector])
        for i, vector in enumerate(counted):
            sum_so_far = v.b.add(load(v.b, counters, i64(i), I64), v.b.call(total, [vector]))
            v.b.store(sum_so_far, element(v.b, counters, i64(i), I64))


def _count(v: Lanes, counters: list[Value], seen: list[Value]) -> list[Value]:
    """One more in every lane of a mask: its sign-extension is −1."""
    return [v.b.sub(c, v.b.sext(mask, v.bit_vector)) for c, mask in zip(counters, seen, strict=True)]
