"""Packing: rows of A and columns of B into panels that the register tile reads in order, scaled, with bounds.

Columns are read straight from the image (see `gemm`). Bounds of a panel are, for every chunk, the largest squared norm
and the largest magnitude of its rows (or columns) there: by Cauchy and Schwarz no partial sum of a chunk exceeds the
product of the norms, so that most chunks are proven free of saturation before they are computed.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from fmaq.kernels.ir_blocks import (
    F32,
    I1,
    I8,
    I32,
    I64,
    POINTER,
    Value,
    either,
    element,
    for_chunks,
    for_range,
    i32,
    i64,
    load,
    repeat,
)
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.parameters import SPATIAL, Parameters
from fmaq.kernels.targets import Target

OUTSIDE = -(1 << 30)  # a coordinate that is in no image
FLOAT32_BYTES = 4
PACKING_TYPE = ir.FunctionType(ir.VoidType(), [POINTER] * 4 + [I64, I64])


class Packing:
    """Generates `pack_rows`, `pack_columns` and `locate_columns`, which know no format and so serve many kernels.

    Args:
        height: rows of a panel.
        width: columns that are packed at once: one panel or more.
        is_bounded: bounds are wanted.
        chunk: steps that a bound covers, or None for all of them.
        panels: of columns.
    """

    def __init__(
        self, target: Target, height: int, width: int, is_bounded: bool, chunk: int | None = None, panels: int = 1
    ) -> None:
        self.module = ir.Module("packing")
        self.target = target
        self.height = height
        self.width = width
        self.panels = panels
        self.panel = width // panels
        self.chunk = chunk
        self.is_bounded = is_bounded

    def _start(self, name: str) -> tuple[ir.Function, Lanes, Parameters]:
        """A function (parameters, packed, bounds, table, batch, first row or column)."""
        function = ir.Function(self.module, PACKING_TYPE, name)
        b = ir.IRBuilder(function.append_basic_block("entry"))
        return function, Lanes(b, self.target, FLOAT32_BYTES), Parameters(b, function.args[0])

    def build(self) -> ir.Module:
        """The module."""
        self._rows()
        self._columns()
        self._locations()
        return self.module

    # --- Rows of A ---------------------------------------------------------------------------------------------------

    def _rows(self) -> None:
        """`pack_rows(parameters, packed, bounds, unused, batch, first row)`: a block of rows as panels [k][height].

        Rows beyond the last are zero. Bounds are [panel][chunk][norm², magnitude].
        """
        function, v, parameters = self._start("pack_rows")
        b = v.b
        _, packed, bounds, _, batch, first = function.args
        depth = parameters["depth"]
        a = element(b, parameters.pointer("a"), b.mul(batch, parameters["a_batch"]), F32)
        a_row, a_k, last = parameters["a_row"], parameters["a_k"], b.sub(parameters["rows"], i64(1))
        scale, unit = parameters.number("a_scale"), parameters.number("a_unit")
        is_line = b.icmp_signed("==", a_k, i64(1))
        chunks = parameters["chunks"]

        def one_panel(panel: Value) -> None:
            sources, scales = [], []
            for r in range(self.height):
                row = b.add(b.add(first, b.mul(panel, i64(self.height))), i64(r))
                is_inside = b.icmp_signed("<=", row, last)
                sources.append(element(b, a, b.mul(b.select(is_inside, row, last), a_row), F32))
                scales.append(b.select(is_inside, scale, ir.Constant(F32, 0.0)))
            target = element(b, packed, b.mul(b.mul(panel, depth), i64(self.height)), F32)

            def one_chunk(index: Value, start: Value, end: Value, _: list[Value]) -> list[Value]:
                whole = b.and_(b.sub(end, start), i64(-v.count))
                middle = b.select(is_line, b.add(start, whole), start)
                lines = self._pack_lines(v, sources, scales, target, unit, start, middle)
                single = self._pack_singles(v, sources, scales, target, unit, a_k, middle, end)
                if self.is_bounded:
                    at = b.mul(b.add(b.mul(panel, chunks), index), i64(2))
                    self._store_row_bounds(v, lines, single, element(b, bounds, at, F32))
                return []

            for_chunks(b, depth, self.chunk, [], one_chunk)

        repeat(b, b.sdiv(parameters["block_rows"], i64(self.height)), one_panel)
        b.ret_void()

    def _pack_lines(
        self, v: Lanes, sources: list[Value], scales: list[Value], target: Value, unit: Value, start: Value, end: Value
    ) -> list[Value]:
        """Vectors of neighbouring k, a row each, interleaved. Returns each row's squares, and magnitudes, by lane."""
        b = v.b
        units, factors = v.splat(unit), [v.splat(scale) for scale in scales]

        def one(k: Value, found: list[Value]) -> list[Value]:
            values = [v.mul(v.load(element(b, s, k, F32)), f) for s, f in zip(sources, factors, strict=True)]
            b.store(_interleave(b, values, v.count), element(b, target, b.mul(k, i64(self.height)), F32), align=4)
            return self._grow(v, found, [v.mul(value, units) for value in values])

        return for_range(b, start, end, [v.constant(0.0)] * self._found(self.height), one, step=v.count)

    def _pack_singles(
        self,
        v: Lanes,
        sources: list[Value],
        scales: list[Value],
        target: Value,
        unit: Value,
        a_k: Value,
        start: Value,
        end: Value,
    ) -> list[Value]:
        """One k after the other, any stride. Returns each row's square and the magnitude."""
        b = v.b

        def one(k: Value, found: list[Value]) -> list[Value]:
            values = []
            for r, (source, scale) in enumerate(zip(sources, scales, strict=True)):
                values.append(b.fmul(load(b, source, b.mul(k, a_k), F32), scale))
                b.store(values[-1], element(b, target, b.add(b.mul(k, i64(self.height)), i64(r)), F32))
            return self._grow(v, found, [b.fmul(value, unit) for value in values])

        return for_range(b, start, end, [ir.Constant(F32, 0.0)] * self._found(self.height), one)

    def _found(self, count: int) -> int:
        return count + 1 if self.is_bounded else 0

    def _grow(self, v: Lanes, found: list[Value], values: list[Value]) -> list[Value]:
        """Add the squares of more values, and take their magnitudes into account; scalars or vectors."""
        if not self.is_bounded:
            return []
        b = v.b
        *squares, largest = found
        for value in values:
            magnitude = _magnitude(v, value)
            largest = b.select(b.fcmp_ordered(">", magnitude, largest), magnitude, largest)
        return [*(b.fadd(s, b.fmul(x, x)) for s, x in zip(squares, values, strict=True)), largest]

    def _store_row_bounds(self, v: Lanes, lines: list[Value], single: list[Value], target: Value) -> None:
        b = v.b
        total = v.declare(f"llvm.vector.reduce.fadd.v{v.count}f32", F32, [F32, v.vector])
        norms = [
            b.call(total, [x, line], fastmath=["reassoc"]) for x, line in zip(single[:-1], lines[:-1], strict=True)
        ]
        largest = _largest(b, [single[-1], _reduce_max(v, lines[-1])])
        b.store(_largest(b, norms), target)
        b.store(largest, element(b, target, i64(1), F32))

    # --- Columns of B ------------------------------------------------------------------------------------------------

    def _columns(self) -> None:
        """`pack_columns(parameters, packed, bounds, table, batch, first column)`: panels of columns as [k][panel].

        Positions outside the image, and columns beyond the last, are zero. Bounds are [chunk][norm², magnitude]; each
        panel's, as the panel itself, lie `panel_bytes` behind those of the one before. The table gets, for every
        column, the offset of its result in C, or −1 beyond the last.
        """
        function, v, parameters = self._start("pack_columns")
        b = v.b
        _, packed, bounds, table, batch, first = function.args
        starts, corners = self._locate_columns(b, parameters, table, first)

        image = element(b, parameters.pointer("b"), b.mul(batch, parameters["b_batch"]), F32)
        scale = v.splat(parameters.number("b_scale"))
        sizes = [v.splat(b.trunc(size, I32)) for size in parameters.spatial("size")]
        vectors = [self._locate_vector(v, table, starts, corners, i) for i in range(self.width // v.count)]

        panels = self._by_panel(b, parameters, packed)

        def one_k(k: Value, shift: Value, taps: list[Value]) -> None:
            for i, (offsets, corner, is_line) in enumerate(vectors):
                inside = _inside(v, corner, taps, sizes)
                value = self._read_vector(v, image, b.add(offsets, v.splat(shift)), inside, is_line)
                v.store(v.mul(value, scale), self._place(v, panels, k, i))

        done = self._pack_transposed(v, parameters, panels, image, vectors, sizes, scale)
        self._each_k(b, parameters, one_k, done)
        if self.is_bounded:
            for panel, of_panel in zip(panels, self._by_panel(b, parameters, bounds), strict=True):
                self._bound_columns(v, parameters, panel, of_panel)
        b.ret_void()

    def _by_panel(self, b: ir.IRBuilder, parameters: Parameters, first: Value) -> list[Value]:
        """Where each panel has what the first has there."""
        return [element(b, first, b.mul(parameters["panel_bytes"], i64(i)), I8) for i in range(self.panels)]

    def _place(self, v: Lanes, panels: list[Value], k: Value, i: int) -> Value:
        """Of step k and the i-th vector of columns."""
        panel, column = divmod(i * v.count, self.panel)
        return element(v.b, panels[panel], v.b.add(v.b.mul(k, i64(self.panel)), i64(column)), F32)

    def _pack_transposed(
        self,
        v: Lanes,
        parameters: Parameters,
        panels: list[Value],
        image: Value,
        vectors: list[tuple[Value, list[Value], Value]],
        sizes: list[Value],
        scale: Value,
    ) -> Value:
        """Where k is contiguous in B, as in a linear layer's weight: square blocks, transposed in registers.

        Returns the k up to which that is done; 0 where k is not contiguous.
        """
        b = v.b
        is_line = b.icmp_signed("==", parameters["b_channel"], i64(1))
        for size in parameters.spatial("kernel"):
            is_line = b.and_(is_line, b.icmp_signed("==", size, i64(1)))
        end = b.select(is_line, b.and_(parameters["channels"], i64(-v.count)), i64(0))

        def one_block(k: Value, _: list[Value]) -> list[Value]:
            for i, (offsets, corner, _) in enumerate(vectors):
                inside = _inside(v, corner, [i32(0)] * len(SPATIAL), sizes)
                safe = b.select(inside, offsets, ir.Constant(offsets.type, [i64(0)] * v.count))
                lines = []
                for lane in range(v.count):
                    source = element(b, image, b.add(b.extract_element(safe, i32(lane)), k), F32)
                    lines.append(v.load(source))
                for j, line in enumerate(_transpose(b, lines)):
                    kept = b.select(inside, v.mul(line, scale), v.constant(0.0))
                    v.store(kept, self._place(v, panels, b.add(k, i64(j)), i))
            return []

        for_range(b, i64(0), end, [], one_block, step=v.count)
        return end

    def _locations(self) -> None:
        """`locate_columns(parameters, unused, unused, table, unused, first column)`: the table of `pack_columns`."""
        function, v, parameters = self._start("locate_columns")
        *_, table, _, first = function.args
        self._locate_columns(v.b, parameters, table, first)
        v.b.ret_void()

    def _locate_columns(
        self, b: ir.IRBuilder, parameters: Parameters, table: Value, first: Value
    ) -> tuple[Value, Value]:
        """Column after column, counting up (image, position) without a division each.

        Returns the arrays behind the table: the offset of each column's first element in B, and its coordinates in the
        image, int32 [dimension][width].
        """
        starts = element(b, table, i64(self.width), I64)
        corners = element(b, starts, i64(self.width), I64)
        out, strides = parameters.spatial("out"), parameters.spatial("b")
        steps, before = parameters.spatial("stride"), parameters.spatial("before")
        columns, b_image = parameters["columns"], parameters["b_image"]
        c_image, c_position = parameters["c_image"], parameters["c_position"]
        plane = b.mul(out[1], out[2])
        positions = b.mul(out[0], plane)
        rest = b.srem(first, positions)
        counters = [
            *(b.sdiv(first, positions), b.sdiv(rest, plane)),
            *(b.sdiv(b.srem(rest, plane), out[2]), b.srem(rest, out[2])),
        ]

        def one(j: Value, now: list[Value]) -> list[Value]:
            image, *position = now
            is_valid = b.icmp_signed("<", b.add(first, j), columns)
            start = b.mul(image, b_image)
            for d in SPATIAL:
                corner = b.sub(b.mul(position[d], steps[d]), before[d])
                start = b.add(start, b.mul(corner, strides[d]))
                marked = b.select(is_valid, b.trunc(corner, I32), i32(OUTSIDE))
                b.store(marked, element(b, corners, b.add(i64(d * self.width), j), I32))
            b.store(start, element(b, starts, j, I64))
            flat = b.add(b.mul(b.add(b.mul(position[0], out[1]), position[1]), out[2]), position[2])
            result = b.add(b.mul(image, c_image), b.mul(flat, c_position))
            b.store(b.select(is_valid, result, i64(-1)), element(b, table, j, I64))
            return _count_up(b, image, position, out)

        for_range(b, i64(0), i64(self.width), counters, one)
        return starts, corners

    def _locate_vector(
        self, v: Lanes, table: Value, starts: Value, corners: Value, i: int
    ) -> tuple[Value, list[Value], Value]:
        """Offsets and corners of the i-th vector of columns, and whether its lanes are neighbours in memory."""
        b = v.b
        offsets = b.load(element(b, starts, i64(i * v.count), I64), typ=ir.VectorType(I64, v.count), align=8)
        corner = [
            b.load(element(b, corners, i64(d * self.width + i * v.count), I32), typ=v.words, align=4) for d in SPATIAL
        ]
        last = load(b, table, i64(i * v.count + v.count - 1), I64)
        counting = ir.Constant(offsets.type, [i64(lane) for lane in range(v.count)])
        first = v.splat(b.extract_element(offsets, i32(0)))
        every = v.declare(f"llvm.vector.reduce.and.v{v.count}i1", I1, [v.mask])
        # Both ends do not tell: with padding and channels last, a step to the next row may lead back.
        in_line = b.call(every, [b.icmp_signed("==", b.sub(offsets, first), counting)])
        return offsets, corner, b.and_(in_line, b.icmp_signed(">=", last, i64(0)))

    def _each_k(
        self, b: ir.IRBuilder, parameters: Parameters, body: Callable[[Value, Value, list[Value]], None], start: Value
    ) -> None:
        """k over (channel, kernel depth, row, column), with the offset of the tap and its coordinates.

        Channels before `start` are left out; there are none in a kernel of several taps.
        """
        kernel, dilation = parameters.spatial("kernel"), parameters.spatial("dilation")
        strides, b_channel, channels = parameters.spatial("b"), parameters["b_channel"], parameters["channels"]

        def nest(dimension: int, k: Value, shift: Value, taps: list[Value]) -> Value:
            if dimension == len(SPATIAL):
                body(k, shift, taps)
                return b.add(k, i64(1))

            def one(i: Value, values: list[Value]) -> list[Value]:
                reach = b.mul(i, dilation[dimension])
                further = b.add(shift, b.mul(reach, strides[dimension]))
                return [nest(dimension + 1, values[0], further, [*taps, b.trunc(reach, I32)])]

            return for_range(b, i64(0), kernel[dimension], [k], one)[0]

        def channel(c: Value, values: list[Value]) -> list[Value]:
            return [nest(0, values[0], b.mul(c, b_channel), [])]

        for_range(b, start, channels, [start], channel)

    def _read_vector(self, v: Lanes, image: Value, offsets: Value, inside: Value, is_line: Value) -> Value:
        """A masked load where the lanes are neighbours in memory, else a gather; zero outside."""
        b = v.b
        zero, aligned = v.constant(0.0), i32(FLOAT32_BYTES)

        def line() -> list[Value]:
            load = v.declare(f"llvm.masked.load.v{v.count}f32.p0", v.vector, [POINTER, I32, v.mask, v.vector])
            source = element(b, image, b.extract_element(offsets, i32(0)), F32)
            return [b.call(load, [source, aligned, inside, zero])]

        def scattered() -> list[Value]:
            pointers = ir.VectorType(POINTER, v.count)
            name = f"llvm.masked.gather.v{v.count}f32.v{v.count}p0"
            gather = v.declare(name, v.vector, [pointers, I32, v.mask, v.vector])
            addresses = element(b, image, offsets, F32)
            addresses.type = pointers  # llvmlite gives a scalar's type
            return [b.call(gather, [addresses, aligned, inside, zero])]

        return either(b, is_line, line, scattered)[0]

    def _bound_columns(self, v: Lanes, parameters: Parameters, packed: Value, bounds: Value) -> None:
        b = v.b
        unit, count = v.splat(parameters.number("b_unit")), self.panel // v.count

        def one_k(k: Value, found: list[Value]) -> list[Value]:
            row = element(b, packed, b.mul(k, i64(self.panel)), F32)
            values = [v.mul(v.load(element(b, row, i64(i * v.count), F32)), unit) for i in range(count)]
            return self._grow(v, found, values)

        def one_chunk(index: Value, start: Value, end: Value, _: list[Value]) -> list[Value]:
            *squares, largest = for_range(b, start, end, [v.constant(0.0)] * self._found(count), one_k)
            at = b.mul(index, i64(2))
            b.store(_largest(b, [_reduce_max(v, s) for s in squares]), element(b, bounds, at, F32))
            b.store(_reduce_max(v, largest), element(b, bounds, b.add(at, i64(1)), F32))
            return []

        for_chunks(b, parameters["depth"], self.chunk, [], one_chunk)


def _inside(v: Lanes, corner: list[Value], taps: list[Value], sizes: list[Value]) -> Value:
    """Which lanes of a tap lie in the image."""
    masks = [
        v.b.icmp_unsigned("<", v.b.add(c, v.splat(tap)), size) for c, tap, size in zip(corner, taps, sizes, strict=True)
    ]
    return v.b.and_(v.b.and_(masks[0], masks[1]), masks[2])


def _count_up(b: ir.IRBuilder, image: Value, position: list[Value], out: list[Value]) -> list[Value]:
    """The image and position after these."""
    carry: Value = i64(1)
    following: list[Value] = []
    for d in reversed(SPATIAL):
        up = b.add(position[d], carry)
        is_over = b.icmp_signed("==", up, out[d])
        following.insert(0, b.select(is_over, i64(0), up))
        carry = b.zext(is_over, I64)
    return [b.add(image, carry), *following]


def _transpose(b: ir.IRBuilder, rows: list[Value]) -> list[Value]:
    """A square of as many vectors as they have lanes: exchange blocks off the diagonal, of 1, 2, 4, … lanes."""
    rows, count, size = list(rows), len(rows), 1
    while size < count:
        upper = [lane if not lane & size else count + lane - size for lane in range(count)]
        lower = [lane + size if not lane & size else count + lane for lane in range(count)]
        orders = [ir.Constant(ir.VectorType(I32, count), [i32(i) for i in order]) for order in (upper, lower)]
        for i in range(count):
            if not i & size:
                pair = rows[i], rows[i | size]
                rows[i], rows[i | size] = (b.shuffle_vector(*pair, order) for order in orders)
        size *= 2
    return rows


def _interleave(b: ir.IRBuilder, values: list[Value], count: int) -> Value:
    """Vectors of `count` lanes as one: the first lanes of all, the second lanes of all, …"""
    if len(values) == 1:
        return values[0]
    joined, size = list(values), count
    while len(joined) > 1:
        if len(joined) % 2:
            joined.append(ir.Constant(joined[0].type, ir.Undefined))
        order = ir.Constant(ir.VectorType(I32, 2 * size), [i32(i) for i in range(2 * size)])
        joined = [b.shuffle_vector(x, y, order) for x, y in zip(joined[::2], joined[1::2], strict=True)]
        size *= 2
    order = [i32(r * count + j) for j in range(count) for r in range(len(values))]
    return b.shuffle_vector(
        joined[0], ir.Constant(joined[0].type, ir.Undefined), ir.Constant(ir.VectorType(I32, len(order)), order)
    )


def _magnitude(v: Lanes, value: Value) -> Value:
    if isinstance(value.type, ir.VectorType):
        return v.magnitude(value)
    return v.b.call(v.declare("llvm.fabs.f32", F32, [F32]), [value])


def _reduce_max(v: Lanes, value: Value) -> Value:
    reduce = v.declare(f"llvm.vector.reduce.fmax.v{v.count}f32", F32, [v.vector])
    return v.b.call(reduce, [value], fastmath=["nnan"])


def _largest(b: ir.IRBuilder, values: list[Value]) -> Value:
    largest = values[0]
    for value in values[1:]:
        largest = b.select(b.fcmp_ordered(">", value, largest), value, largest)
    return largest
