"""The loops around the arithmetic: one blocked product serves matrices and convolutions.

    C[batch][row][column] = Σ_k A[batch][row][k]·B[batch][k][column],   lanes over the columns

A column is an output position and k runs over (channel, kernel depth, row, column), so that B is read straight from the image and
no im2col matrix exists; a matrix product is the convolution whose kernel is 1×1 and whose image is one line. A *task* is a
panel of columns of a block of rows of a batch: it packs its panel of B (and, when the block changes, of A), then computes tile after
tile in registers. Tasks are independent, which is all that threads need.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.control import FloatControl
from fmaq.kernels.ir_blocks import F32, I1, I8, I32, I64, POINTER, Value, element, for_range, i32, i64, load, repeat
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.targets import Target
from fmaq.numerics import random

FIELDS = (
    # Pointers to float32.
    *("a", "b", "c"),
    # Sizes of the product; `panels` counts the panels of columns, `row_blocks` the blocks of `block_rows` rows.
    *("rows", "columns", "depth", "panels", "block_rows", "row_blocks"),
    # Strides in elements.
    *("a_batch", "a_row", "a_k"),
    *("b_batch", "b_image", "b_channel", "b_0", "b_1", "b_2"),
    *("c_batch", "c_row", "c_image", "c_position"),
    # The convolution: three spatial dimensions each.
    *("channels", "size_0", "size_1", "size_2", "kernel_0", "kernel_1", "kernel_2"),
    *("stride_0", "stride_1", "stride_2", "before_0", "before_1", "before_2"),
    *("dilation_0", "dilation_1", "dilation_2", "out_0", "out_1", "out_2"),
    # Powers of two that operands are multiplied with on packing, as bits of a float32.
    *("a_scale", "b_scale"),
    # Positions for stochastic rounding: m counts rows, or columns where `lanes_are_m`; m grows by `m_batch`, n by `n_batch`.
    *("key", "lanes_are_m", "m_batch", "n_batch"),
)
FIELD = {name: index for index, name in enumerate(FIELDS)}
SPATIAL = (0, 1, 2)
OUTSIDE = -(1 << 30)  # a coordinate that is in no image


@dataclass(frozen=True)
class Tile:
    """The part of C that is held in registers: rows × vectors of columns."""

    rows: int
    vectors: int

    def columns(self, lanes: int) -> int:
        """Columns of a panel."""
        return self.vectors * lanes


class Gemm:
    """Generates the function `run(parameters, first task, last task, scratch)` for an arithmetic on a target."""

    def __init__(self, arithmetic: Arithmetic, chunk: int | None, target: Target, tile: Tile) -> None:
        self.arithmetic = arithmetic
        self.chunk = chunk
        self.target = target
        self.tile = tile
        self.module = ir.Module("fmaq")
        self.width = tile.columns(target.lanes(arithmetic.element_bytes))

    def build(self) -> ir.Module:
        """The module, whose one public function is `run`."""
        self._run()
        return self.module

    # --- Helpers -----------------------------------------------------------------------------------------------------

    def _function(self, name: str, arguments: list[ir.Type]) -> tuple[ir.Function, ir.IRBuilder]:
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), name)
        if name != "run":
            function.linkage = "internal"
            function.attributes.add("noinline")
        return function, ir.IRBuilder(function.append_basic_block("entry"))

    def _lanes(self, b: ir.IRBuilder, memory: bool = False) -> Lanes:
        """Lanes of the arithmetic or, for packing, of float32 as it lies in memory."""
        return Lanes(b, self.target, 4 if memory else self.arithmetic.element_bytes)

    @staticmethod
    def _field(b: ir.IRBuilder, parameters: Value, name: str) -> Value:
        return load(b, parameters, i64(FIELD[name]), I64)

    def _pointer(self, b: ir.IRBuilder, parameters: Value, name: str) -> Value:
        return b.inttoptr(self._field(b, parameters, name), POINTER)

    def _scale(self, b: ir.IRBuilder, parameters: Value, name: str) -> Value:
        return b.bitcast(b.trunc(self._field(b, parameters, name), I32), F32)

    # --- Packing -----------------------------------------------------------------------------------------------------

    def _pack_rows(self) -> ir.Function:
        """A block of rows of A as panels [k][tile.rows], scaled; rows beyond the last are zero."""
        function, b = self._function("pack_rows", [POINTER, POINTER, I64, I64])
        parameters, packed, batch, first = function.args
        depth, rows = self._field(b, parameters, "depth"), self._field(b, parameters, "rows")
        a_k, scale = self._field(b, parameters, "a_k"), self._scale(b, parameters, "a_scale")
        start = b.mul(batch, self._field(b, parameters, "a_batch"))
        a = element(b, self._pointer(b, parameters, "a"), start, F32)
        height = self.tile.rows

        def one_row(i: Value) -> None:
            row = b.add(first, i)
            is_inside = b.icmp_signed("<", row, rows)
            source = element(b, a, b.mul(row, self._field(b, parameters, "a_row")), F32)
            panel = b.mul(b.mul(b.sdiv(i, i64(height)), depth), i64(height))
            target = element(b, packed, b.add(panel, b.srem(i, i64(height))), F32)

            def copy(k: Value) -> None:
                value = b.fmul(load(b, source, b.mul(k, a_k), F32), scale)
                b.store(value, element(b, target, b.mul(k, i64(height)), F32))

            def clear(k: Value) -> None:
                b.store(ir.Constant(F32, 0.0), element(b, target, b.mul(k, i64(height)), F32))

            with b.if_else(is_inside) as (then, otherwise):
                with then:
                    repeat(b, depth, copy)
                with otherwise:
                    repeat(b, depth, clear)

        repeat(b, self._field(b, parameters, "block_rows"), one_row)
        b.ret_void()
        return function

    def _pack_columns(self) -> ir.Function:
        """A panel of columns of B as [k][width], scaled; positions outside the image, and columns beyond the last, are zero.

        Also fills the panel's table: for every column the offset of its result in C, or −1 beyond the last.
        """
        function, b = self._function("pack_columns", [POINTER, POINTER, POINTER, I64, I64])
        parameters, packed, table, batch, first = function.args
        field = {name: self._field(b, parameters, name) for name in FIELDS}
        v = self._lanes(b, memory=True)
        width = i64(self.width)
        starts = element(b, table, width, I64)  # offset of each column's first element in B
        corners = element(b, starts, width, I64)  # its coordinates in the image, int32: [dimension][width]
        self._locate_columns(b, field, table, starts, corners, first)

        image = element(b, b.inttoptr(field["b"], POINTER), b.mul(batch, field["b_batch"]), F32)
        vectors = self.width // v.count
        scale = v.splat(self._scale(b, parameters, "b_scale"))
        offsets, coordinates, is_line = [], [], []
        for i in range(vectors):
            at = i64(i * v.count)
            wide = ir.VectorType(I64, v.count)
            offsets.append(b.load(element(b, starts, at, I64), typ=wide, align=8))
            coordinates.append(
                [b.load(element(b, corners, i64(d * self.width + i * v.count), I32), typ=v.words, align=4) for d in SPATIAL]
            )
            ends = [b.extract_element(offsets[i], i32(lane)) for lane in (0, v.count - 1)]
            last_valid = load(b, table, i64(i * v.count + v.count - 1), I64)
            in_line = b.icmp_signed("==", b.sub(ends[1], ends[0]), i64(v.count - 1))
            is_line.append(b.and_(in_line, b.icmp_signed(">=", last_valid, i64(0))))

        def one_k(k: Value, shift: Value, taps: list[Value]) -> None:
            row = element(b, packed, b.mul(k, width), F32)
            for i in range(vectors):
                inside = self._inside(v, coordinates[i], taps, [field[f"size_{d}"] for d in SPATIAL])
                self._copy_vector(v, image, b.add(offsets[i], v.splat(shift)), inside, is_line[i], scale, row, i)

        self._for_each_k(b, field, one_k)
        b.ret_void()
        return function

    def _locate_columns(
        self, b: ir.IRBuilder, field: dict[str, Value], table: Value, starts: Value, corners: Value, first: Value
    ) -> None:
        """Column after column, counting up (image, position) without a division each."""
        out = [field[f"out_{d}"] for d in SPATIAL]
        plane = b.mul(out[1], out[2])
        positions = b.mul(out[0], plane)
        image = b.sdiv(first, positions)
        rest = b.srem(first, positions)
        counters = [image, b.sdiv(rest, plane), b.sdiv(b.srem(rest, plane), out[2]), b.srem(rest, out[2])]

        def one(j: Value, now: list[Value]) -> list[Value]:
            image, *position = now
            is_valid = b.icmp_signed("<", b.add(first, j), field["columns"])
            start = b.mul(image, field["b_image"])
            for d in SPATIAL:
                corner = b.sub(b.mul(position[d], field[f"stride_{d}"]), field[f"before_{d}"])
                start = b.add(start, b.mul(corner, field[f"b_{d}"]))
                marked = b.select(is_valid, b.trunc(corner, I32), i32(OUTSIDE))
                b.store(marked, element(b, corners, b.add(i64(d * self.width), j), I32))
            b.store(start, element(b, starts, j, I64))
            flat = b.add(b.mul(b.add(b.mul(position[0], out[1]), position[1]), out[2]), position[2])
            result = b.add(b.mul(image, field["c_image"]), b.mul(flat, field["c_position"]))
            b.store(b.select(is_valid, result, i64(-1)), element(b, table, j, I64))
            carry: Value = i64(1)
            following = []
            for d in reversed(SPATIAL):
                up = b.add(position[d], carry)
                is_over = b.icmp_signed("==", up, out[d])
                following.insert(0, b.select(is_over, i64(0), up))
                carry = b.zext(is_over, I64)
            return [b.add(image, carry), *following]

        for_range(b, i64(0), i64(self.width), counters, one)

    def _for_each_k(
        self, b: ir.IRBuilder, field: dict[str, Value], body: Callable[[Value, Value, list[Value]], None]
    ) -> None:
        """k over (channel, kernel depth, row, column), with the offset of the tap and its coordinates."""

        def nest(dimension: int, k: Value, shift: Value, taps: list[Value]) -> Value:
            if dimension == 3:
                body(k, shift, taps)
                return b.add(k, i64(1))

            def one(i: Value, values: list[Value]) -> list[Value]:
                reach = b.mul(i, field[f"dilation_{dimension}"])
                further = b.add(shift, b.mul(reach, field[f"b_{dimension}"]))
                return [nest(dimension + 1, values[0], further, [*taps, b.trunc(reach, I32)])]

            return for_range(b, i64(0), field[f"kernel_{dimension}"], [k], one)[0]

        def channel(c: Value, values: list[Value]) -> list[Value]:
            return [nest(0, values[0], b.mul(c, field["b_channel"]), [])]

        for_range(b, i64(0), field["channels"], [i64(0)], channel)

    def _inside(self, v: Lanes, corner: list[Value], taps: list[Value], sizes: list[Value]) -> Value:
        """Which lanes of a tap lie in the image."""
        masks = []
        for d in SPATIAL:
            coordinate = v.b.add(corner[d], v.splat(taps[d]))
            masks.append(v.b.icmp_unsigned("<", coordinate, v.splat(v.b.trunc(sizes[d], I32))))
        return v.b.and_(v.b.and_(masks[0], masks[1]), masks[2])

    def _copy_vector(
        self, v: Lanes, image: Value, offsets: Value, inside: Value, is_line: Value, scale: Value, row: Value, i: int
    ) -> None:
        """One vector of a packed row: a masked load where the lanes are neighbours in memory, else a gather."""
        b = v.b
        target = element(b, row, i64(i * v.count), F32)
        zero = v.constant(0.0)
        with b.if_else(is_line) as (then, otherwise):
            with then:
                source = element(b, image, b.extract_element(offsets, i32(0)), F32)
                masked = v.declare(f"llvm.masked.load.v{v.count}f32.p0", v.vector, [POINTER, I32, v.mask, v.vector])
                v.store(b.fmul(b.call(masked, [source, i32(4), inside, zero]), scale), target)
            with otherwise:
                pointers = ir.VectorType(POINTER, v.count)
                gather = v.declare(
                    f"llvm.masked.gather.v{v.count}f32.v{v.count}p0", v.vector, [pointers, I32, v.mask, v.vector]
                )
                addresses = element(b, image, offsets, F32)
                addresses.type = pointers  # llvmlite gives a scalar's type
                v.store(b.fmul(b.call(gather, [addresses, i32(4), inside, zero]), scale), target)

    # --- The register tile ---------------------------------------------------------------------------------------------

    def _tile(self) -> ir.Function:
        """One tile over all of k, chunk by chunk, into a buffer [tile.rows][width]."""
        random_words = [POINTER] if self.arithmetic.needs_random else []
        function, b = self._function("tile", [POINTER, POINTER, POINTER, I64, *random_words])
        a, packed, buffer, depth, *words = function.args
        v = self._lanes(b)
        cells = [(r, i) for r in range(self.tile.rows) for i in range(self.tile.vectors)]
        zero = v.constant(0.0)
        bases = []
        if words:
            bases = [b.load(element(b, words[0], i64(r * self.width + i * v.count), I32), typ=v.words, align=4) for r, i in cells]

        def step_words(k: Value, merge: bool) -> list[Value | None]:
            if not bases:
                return [None] * len(cells)
            at = v.splat(b.mul(b.trunc(k, I32), ir.Constant(I32, random.STEP)))
            salt = random.MERGE if merge else 0
            return [v.mix(b.add(b.xor(base, v.word(salt)), at)) for base in bases]

        def one_step(k: Value, sums: list[Value]) -> list[Value]:
            at_b = element(b, packed, b.mul(k, i64(self.width)), F32)
            ws = [v.load(element(b, at_b, i64(i * v.count), F32)) for i in range(self.tile.vectors)]
            at_a = element(b, a, b.mul(k, i64(self.tile.rows)), F32)
            xs = [v.load_splat(element(b, at_a, i64(r), F32)) for r in range(self.tile.rows)]
            drawn = step_words(k, merge=False)
            return [
                self.arithmetic.step(v, xs[r], ws[i], s, word) for (r, i), s, word in zip(cells, sums, drawn, strict=True)
            ]

        def one_chunk(start: Value, totals: list[Value]) -> list[Value]:
            end = depth
            if self.chunk is not None:
                whole = b.add(start, i64(self.chunk))
                end = b.select(b.icmp_signed("<", whole, depth), whole, depth)
            sums = for_range(b, start, end, [zero] * len(cells), one_step)
            drawn = step_words(b.sub(end, i64(1)), merge=True)
            return [self.arithmetic.merge(v, t, s, word) for t, s, word in zip(totals, sums, drawn, strict=True)]

        length = self.chunk if self.chunk is not None else 2**62
        totals = for_range(b, i64(0), depth, [zero] * len(cells), one_chunk, step=length)
        back = v.constant(2.0**self.arithmetic.output_exponent)
        for (r, i), total in zip(cells, totals, strict=True):
            v.store(v.mul(total, back), element(b, buffer, i64(r * self.width + i * v.count), F32))
        b.ret_void()
        return function

    def _store(self) -> ir.Function:
        """The valid part of a tile's buffer into C, whose row starts at `c`."""
        function, b = self._function("store", [POINTER, POINTER, POINTER, I64, I64])
        buffer, c, table, row_stride, valid_rows = function.args
        v = self._lanes(b, memory=True)

        def one_row(r: Value) -> None:
            source = element(b, buffer, b.mul(r, i64(self.width)), F32)
            target = element(b, c, b.mul(r, row_stride), F32)
            for i in range(self.width // v.count):
                first, last = (load(b, table, i64(i * v.count + lane), I64) for lane in (0, v.count - 1))
                in_line = b.icmp_signed("==", b.sub(last, first), i64(v.count - 1))
                with b.if_else(b.and_(in_line, b.icmp_signed(">=", last, i64(0)))) as (then, otherwise):
                    with then:
                        v.store(v.load(element(b, source, i64(i * v.count), F32)), element(b, target, first, F32))
                    with otherwise:
                        repeat(b, i64(v.count), lambda j, i=i: one_element(source, target, b.add(j, i64(i * v.count))))

        def one_element(source: Value, target: Value, j: Value) -> None:
            offset = load(b, table, j, I64)
            with b.if_then(b.icmp_signed(">=", offset, i64(0))):
                b.store(load(b, source, j, F32), element(b, target, offset, F32))

        repeat(b, valid_rows, one_row)
        b.ret_void()
        return function

    def _draw_words(self) -> ir.Function:
        """The random words of a tile's outputs, [tile.rows][width], from their positions m and n."""
        function, b = self._function("draw_words", [POINTER, POINTER, I64, I64, I64])
        parameters, buffer, batch, row, column = function.args
        v = self._lanes(b)
        m_start = b.trunc(b.mul(batch, self._field(b, parameters, "m_batch")), I32)
        n_start = b.trunc(b.mul(batch, self._field(b, parameters, "n_batch")), I32)
        lanes_are_m = b.trunc(self._field(b, parameters, "lanes_are_m"), I1)
        key = v.splat(b.trunc(self._field(b, parameters, "key"), I32))
        counting = ir.Constant(v.words, [ir.Constant(I32, lane) for lane in range(v.count)])
        for i in range(self.tile.vectors):
            columns = b.add(v.splat(b.add(b.trunc(column, I32), i32(i * v.count))), counting)
            for r in range(self.tile.rows):
                rows = v.splat(b.add(b.trunc(row, I32), i32(r)))
                m = b.add(b.select(lanes_are_m, columns, rows), v.splat(m_start))
                n = b.add(b.select(lanes_are_m, rows, columns), v.splat(n_start))
                word = v.mix(b.add(v.mix(b.xor(key, m)), n))
                b.store(word, element(b, buffer, i64(r * self.width + i * v.count), I32), align=4)
        b.ret_void()
        return function

    # --- Tasks -------------------------------------------------------------------------------------------------------

    def _run(self) -> None:
        """Tasks first … last − 1: panels of columns, fastest, then blocks of rows, then batches."""
        pack_rows, pack_columns = self._pack_rows(), self._pack_columns()
        tile, store = self._tile(), self._store()
        draw_words = self._draw_words() if self.arithmetic.needs_random else None
        function, b = self._function("run", [POINTER, I64, I64, POINTER])
        parameters, first, last, scratch = function.args
        field = {name: self._field(b, parameters, name) for name in FIELDS}
        table, buffer, words, panel, block = self._split_scratch(b, scratch, field["depth"])
        control = FloatControl(b, self.target)
        control.set(toward_zero=False)

        def one_task(t: Value, previous: list[Value]) -> list[Value]:
            group = b.sdiv(t, field["panels"])
            batch = b.sdiv(group, field["row_blocks"])
            row = b.mul(b.srem(group, field["row_blocks"]), field["block_rows"])
            column = b.mul(b.srem(t, field["panels"]), i64(self.width))
            with b.if_then(b.icmp_signed("!=", group, previous[0])):
                b.call(pack_rows, [parameters, block, batch, row])
            b.call(pack_columns, [parameters, panel, table, batch, column])
            c = element(b, b.inttoptr(field["c"], POINTER), b.mul(batch, field["c_batch"]), F32)
            left = b.sub(field["rows"], row)
            rows = b.select(b.icmp_signed("<", left, field["block_rows"]), left, field["block_rows"])
            control.set(self.arithmetic.toward_zero)
            height = i64(self.tile.rows)

            def one_tile(i: Value) -> None:
                at = b.mul(i, height)
                rest = b.sub(rows, at)
                valid = b.select(b.icmp_signed("<", rest, height), rest, height)
                drawn = []
                if draw_words is not None:
                    b.call(draw_words, [parameters, words, batch, b.add(row, at), column])
                    drawn = [words]
                a = element(b, block, b.mul(at, field["depth"]), F32)
                b.call(tile, [a, panel, buffer, field["depth"], *drawn])
                target = element(b, c, b.mul(b.add(row, at), field["c_row"]), F32)
                b.call(store, [buffer, target, table, field["c_row"], valid])

            repeat(b, b.sdiv(b.add(rows, i64(self.tile.rows - 1)), height), one_tile)
            control.set(toward_zero=False)
            return [group]

        for_range(b, first, last, [i64(-1)], one_task)
        control.restore()
        b.ret_void()

    def _split_scratch(self, b: ir.IRBuilder, scratch: Value, depth: Value) -> list[Value]:
        """The parts of `scratch_bytes`: table (offsets, starts, corners), buffer, words, panel of B, block of A."""
        parts, at = [], i64(0)
        cell = self.tile.rows * self.width * 4
        for size in (i64(28 * self.width), i64(cell), i64(cell), b.mul(depth, i64(4 * self.width))):
            parts.append(element(b, scratch, at, I8))
            at = b.add(at, b.and_(b.add(size, i64(63)), i64(-64)))
        return [*parts, element(b, scratch, at, I8)]

    def scratch_bytes(self, depth: int, block_rows: int) -> int:
        """Bytes of scratch memory that `run` needs for a thread, aligned to 64."""
        cell = self.tile.rows * self.width * 4
        sizes = (28 * self.width, cell, cell, 4 * depth * self.width, 4 * depth * block_rows)
        return sum((size + 63) // 64 * 64 for size in sizes)
