"""Unpacking: the gradient of a panel of columns, added where packing reads the columns from.

For a convolution that is the adjoint of unfolding: windows that overlap add up.
"""

from __future__ import annotations

from llvmlite import ir

from fmaq.kernels.ir_blocks import F32, I32, POINTER, Value, either, element, i32, i64
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.packing import FLOAT32_BYTES, Packing, _inside


class Unpacking(Packing):
    """Generates `add_columns(parameters, panel, unused, table, batch, first column)`: into the image at `b`."""

    def build(self) -> ir.Module:
        """The module."""
        function, v, parameters = self._start("add_columns")
        b = v.b
        _, panel, _, table, batch, first = function.args
        starts, corners = self._locate_columns(b, parameters, table, first)
        image = element(b, parameters.pointer("b"), b.mul(batch, parameters["b_batch"]), F32)
        sizes = [v.splat(b.trunc(size, I32)) for size in parameters.spatial("size")]
        vectors = [self._locate_vector(v, table, starts, corners, i) for i in range(self.width // v.count)]

        def one_k(k: Value, shift: Value, taps: list[Value]) -> None:
            row = element(b, panel, b.mul(k, i64(self.width)), F32)
            for i, (offsets, corner, is_line) in enumerate(vectors):
                inside = _inside(v, corner, taps, sizes)
                value = v.load(element(b, row, i64(i * v.count), F32))
                self._add_vector(v, image, b.add(offsets, v.splat(shift)), inside, is_line, value)

        self._each_k(b, parameters, one_k, i64(0))
        b.ret_void()
        return self.module

    def _add_vector(self, v: Lanes, image: Value, offsets: Value, inside: Value, is_line: Value, value: Value) -> None:
        """What `_read_vector` reads, with a vector added; no two lanes of a tap are the same element."""
        b, zero, aligned = v.b, v.constant(0.0), i32(FLOAT32_BYTES)
        void = ir.VoidType()

        def line() -> list[Value]:
            load = v.declare(f"llvm.masked.load.v{v.count}f32.p0", v.vector, [POINTER, I32, v.mask, v.vector])
            store = v.declare(f"llvm.masked.store.v{v.count}f32.p0", void, [v.vector, POINTER, I32, v.mask])
            place = element(b, image, b.extract_element(offsets, i32(0)), F32)
            b.call(store, [v.add(b.call(load, [place, aligned, inside, zero]), value), place, aligned, inside])
            return []

        def scattered() -> list[Value]:
            pointers = ir.VectorType(POINTER, v.count)
            suffix = f"v{v.count}f32.v{v.count}p0"
            gather = v.declare(f"llvm.masked.gather.{suffix}", v.vector, [pointers, I32, v.mask, v.vector])
            scatter = v.declare(f"llvm.masked.scatter.{suffix}", void, [v.vector, pointers, I32, v.mask])
            places = element(b, image, offsets, F32)
            places.type = pointers  # llvmlite gives a scalar's type
            b.call(scatter, [v.add(b.call(gather, [places, aligned, inside, zero]), value), places, aligned, inside])
            return []

        either(b, is_line, line, scattered)
