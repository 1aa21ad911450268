"""Exponents of all products and partial sums: the product with a histogram of each along, one a lane.

Float64 lanes, which compute every accumulator; a step reads, increments and writes the counters of its lanes.
"""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic64 import General64
from fmaq.kernels.gemm import Gemm
from fmaq.kernels.ir_blocks import I64, Value, element, i32, i64, load
from fmaq.kernels.lanes import Lanes

LOWEST = -160  # the exponent of the second bin, which also counts smaller ones; the first bin counts zeros
BINS = 290
FLOAT64_BIAS, FLOAT64_MANTISSA = 1023, 52


class HistogramGemm(Gemm):
    """A product that counts, in each lane, the exponents of its steps' rounded products, then of their sums."""

    arithmetic: General64

    @property
    def counters(self) -> int:
        return 2 * BINS * self.target.lanes(self.arithmetic.element_bytes)

    def _step(
        self,
        v: Lanes,
        arithmetic: Arithmetic,
        pairs: list[tuple[Value, Value]],
        sums: list[Value],
        words: list[Value | None],
        counted: list[Value],
    ) -> list[Value]:
        found = [
            self.arithmetic.product_and_sum(v, x, w, s, word)
            for (x, w), s, word in zip(pairs, sums, words, strict=True)
        ]
        for p, after in found:
            self._increment(v, p, 0)
            self._increment(v, after, BINS)
        return [after for _, after in found]

    def _increment(self, v: Lanes, x: Value, first_bin: int) -> None:
        """One more in the bin of each lane's exponent."""
        b = v.b
        exponent = b.and_(b.lshr(v.bits(x), v.bit_constant(FLOAT64_MANTISSA)), v.bit_constant(0x7FF))
        above = b.sub(exponent, v.bit_constant(FLOAT64_BIAS + LOWEST - 1))
        lowest, highest = v.bit_constant(1), v.bit_constant(BINS - 1)
        above = b.select(b.icmp_signed("<", above, lowest), lowest, above)
        above = b.select(b.icmp_signed(">", above, highest), highest, above)
        is_zero = b.fcmp_ordered("==", x, v.constant(0.0))
        bin = b.add(b.select(is_zero, v.bit_constant(0), above), v.bit_constant(first_bin))
        lanes = ir.Constant(v.bit_vector, [i64(lane) for lane in range(v.count)])
        index = b.add(b.mul(bin, v.bit_constant(v.count)), lanes)
        for lane in range(v.count):  # one by one: gathering and scattering takes twice as long
            place = element(b, self._counters_at, b.extract_element(index, i32(lane)), I64)
            b.store(b.add(load(b, self._counters_at, b.extract_element(index, i32(lane)), I64), i64(1)), place)
