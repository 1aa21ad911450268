"""Counting events: the product with counters along, which are numbers in registers until a tile is done."""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.gemm import COUNTERS, Gemm
from fmaq.kernels.ir_blocks import I64, Value, element, i64, load
from fmaq.kernels.lanes import Lanes
from fmaq.numerics.reference import EVENTS

WORD = 64  # bits


class CountingGemm(Gemm):
    """A product that counts `numerics.reference.EVENTS` of its steps, then of its merges."""

    @property
    def counters(self) -> int:
        return COUNTERS

    def _counters(self, v: Lanes) -> list[Value]:
        return [i64(0)] * COUNTERS

    def _step(
        self,
        v: Lanes,
        arithmetic: Arithmetic,
        pairs: list[tuple[Value, Value]],
        sums: list[Value],
        words: list[Value | None],
        counted: list[Value],
    ) -> list[Value]:
        seen = [arithmetic.observed_step(v, x, w, s, word) for (x, w), s, word in zip(pairs, sums, words, strict=True)]
        of_steps = _count(v, arithmetic, counted[: len(EVENTS)], [masks for _, masks in seen])
        return [*(after for after, _ in seen), *of_steps, *counted[len(EVENTS) :]]

    def _merge(
        self,
        v: Lanes,
        merging: Merging,
        totals: list[Value],
        sums: list[Value],
        words: list[Value | None],
        counted: list[Value],
    ) -> list[Value]:
        seen = [merging.observed_merge(v, t, s, word) for t, s, word in zip(totals, sums, words, strict=True)]
        of_merges = _count(v, merging, counted[len(EVENTS) :], [masks for _, masks in seen])
        return [*(after for after, _ in seen), *counted[: len(EVENTS)], *of_merges]

    def _store_counters(self, v: Lanes, counted: list[Value]) -> None:
        for i, found in enumerate(counted):
            sum_so_far = v.b.add(load(v.b, self._counters_at, i64(i), I64), found)
            v.b.store(sum_so_far, element(v.b, self._counters_at, i64(i), I64))


def _count(v: Lanes, arithmetic: Merging, counters: list[Value], cells: list[list[Value]]) -> list[Value]:
    """Add the events that the masks of all cells tell of, as many cells at a time as a word has bits for."""
    at_once = WORD // v.count
    for first in range(0, len(cells), at_once):
        group = cells[first : first + at_once]
        words = [_in_a_word(v, masks) for masks in zip(*group, strict=True)]
        ones = ir.Constant(I64, (1 << v.count * len(group)) - 1)
        events = [v.b.and_(word, ones) for word in arithmetic.events(v.b, words)]
        counters = [v.b.add(c, v.b.ctpop(found)) for c, found in zip(counters, events, strict=True)]
    return counters


def _in_a_word(v: Lanes, masks: tuple[Value, ...]) -> Value:
    """Masks of lanes as the bits of one word."""
    word = i64(0)
    for i, mask in enumerate(masks):
        bits = v.b.zext(v.b.bitcast(mask, ir.IntType(v.count)), I64)
        word = v.b.or_(word, v.b.shl(bits, i64(i * v.count)))
    return word
