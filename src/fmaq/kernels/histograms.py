"""Exponents of all products and partial sums: the product with a histogram of each along, one a lane.

Float64 lanes, which compute every accumulator; a step reads, increments and writes the counters of its lanes.
"""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic64 import General64
from fmaq.kernels.gemm import Gemm
from fmaq.kernels.ir_blocks import I1, I32, I64, POINTER, Value, element, i32, i64
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
        place = element(b, self._counters_at, b.add(b.mul(bin, v.bit_constant(v.count)), lanes), I64)
        place.type = ir.VectorType(POINTER, v.count)  # llvmlite gives a scalar's type
        every, aligned = ir.Constant(v.mask, [ir.Constant(I1, 1)] * v.count), i32(8)
        types = [place.type, I32, v.mask]
        gather = v.declare(f"llvm.masked.gather.v{v.count}i64.v{v.count}p0", v.bit_vector, [*types, v.bit_vector])
        scatter = v.declare(f"llvm.masked.scatter.v{v.count}i64.v{v.count}p0", ir.VoidType(), [v.bit_vector, *types])
        before = b.call(gather, [place, aligned, every, v.bit_constant(0)])
        b.call(scatter, [b.add(before, v.bit_constant(1)), place, aligned, every])
