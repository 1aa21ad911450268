"""Counting events: the product with counters along, a number a lane, until a tile is done."""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.gemm import COUNTERS, Gemm
from fmaq.kernels.ir_blocks import I32, I64, Value, element, i32, i64, load
from fmaq.kernels.lanes import Lanes
from fmaq.numerics.reference import EVENTS

UNDERFLOW = EVENTS.index("product_underflow")


class CountingGemm(Gemm):
    """A product that counts `numerics.reference.EVENTS` of its steps, then of its merges."""

    @property
    def counters(self) -> int:
        return COUNTERS

    def _steps_at_once(self, arithmetic: Arithmetic) -> int:
        return 1

    def _counters(self, v: Lanes) -> list[Value]:
        return [v.bit_constant(0)] * COUNTERS

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
        of_steps = _count(v, counted[: len(EVENTS)], [events for _, events in seen])
        xs, ws = [x for x, _ in pairs[:: self.tile.vectors]], [w for _, w in pairs[: self.tile.vectors]]
        of_steps[UNDERFLOW] = v.b.sub(of_steps[UNDERFLOW], _terms(v, xs, ws))
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
        of_merges = _count(v, counted[len(EVENTS) :], [events for _, events in seen])
        return [*(after for after, _ in seen), *counted[: len(EVENTS)], *of_merges]

    def _store_counters(self, v: Lanes, counted: list[Value]) -> None:
        """Of what was counted: see `Merging.observed_merge`."""
        counted[UNDERFLOW] = v.b.sub(v.bit_constant(0), counted[UNDERFLOW])
        totals = [v.total(found) for found in counted]
        for last in (len(EVENTS) - 1, COUNTERS - 1):
            totals[last] = v.b.sub(totals[last], v.b.add(totals[last - 1], totals[last - 2]))
        for i, found in enumerate(totals):
            sum_so_far = v.b.add(load(v.b, self._counters_at, i64(i), I64), found)
            v.b.store(sum_so_far, element(v.b, self._counters_at, i64(i), I64))


def _terms(v: Lanes, xs: list[Value], ws: list[Value]) -> Value:
    """How many products of a step have no factor that is zero, in each lane.

    Args:
        xs: of each row, the same in all lanes. ws: of the columns.
    """
    b, zero = v.b, v.constant(0.0)
    rows: Value = ir.Constant(ir.VectorType(v.element, len(xs)), ir.Undefined)
    for r, x in enumerate(xs):
        rows = b.insert_element(rows, b.extract_element(x, i32(0)), i32(r))
    are_terms = b.fcmp_unordered("!=", rows, ir.Constant(rows.type, [ir.Constant(v.element, 0.0)] * len(xs)))
    in_column = v.splat(b.zext(b.ctpop(b.zext(b.bitcast(are_terms, ir.IntType(len(xs))), I32)), v.integer))
    terms = v.bit_constant(0)
    for w in ws:
        terms = b.add(terms, b.select(b.fcmp_unordered("!=", w, zero), in_column, v.bit_constant(0)))
    return terms


def _count(v: Lanes, counters: list[Value], cells: list[list[Value]]) -> list[Value]:
    """One more in each lane in which an event's mask is set, of every cell."""
    for events in cells:
        counters = [
            counter if isinstance(mask, ir.Constant) else v.increment(counter, mask)  # a constant one is nowhere
            for counter, mask in zip(counters, events, strict=True)
        ]
    return counters
