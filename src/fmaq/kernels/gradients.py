"""Gradients through the accumulation: the forward pass again, tile by tile, for what its steps let pass.

A task is that of the forward product: a panel of columns of a block of rows. For every register tile it

1. traces: computes the sums again and notes, a bit a cell, which steps (and merges of chunks) pass;
2. settles: turns that into α of the estimator, from the last step to the first where it is recursive;
3. spreads: with G the gradient of the outputs, adds (α·G)·a into the gradient of the panel of B, and (α·G)·b, summed
   over the columns, into that of the rows of A.

Masks are words of a bit a column, [k][row], and those of merges [chunk][row]. Only tracing rounds as the accumulator
does; the gradients are float32's own sums of the operands as they are, not as they are scaled for tracing.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.control import FloatControl
from fmaq.kernels.gemm import Gemm, _function_at, _smaller, _up_to_a_line
from fmaq.kernels.ir_blocks import (
    F32,
    I8,
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
from fmaq.kernels.packing import FLOAT32_BYTES
from fmaq.kernels.parameters import FIELDS, Parameters, Tile
from fmaq.kernels.targets import Target

BYTE = 8


@dataclass(frozen=True)
class Wanted:
    """What a kernel is to compute.

    Attributes:
        estimator: one of `numerics.reference.ESTIMATORS`, other than identity.
        of_a, of_b: the gradients.
    """

    estimator: str
    of_a: bool = True
    of_b: bool = True

    @property
    def is_recursive(self) -> bool:
        """α looks at what a term passes through later."""
        return self.estimator.startswith("recursive/")

    @property
    def sees_loss(self) -> bool:
        """α is 0 where a step is lost; else where it overflows."""
        return self.estimator.endswith("/diff")


class GradientGemm(Gemm):
    """Generates `run(parameters, first task, last task, scratch)`, which adds to the gradients of A and B.

    There are three arrays of parameters, one behind the other: those of the forward product with the gradient of its
    output as C; the same with operands that are not scaled; and the same with the gradient of B as B. The gradient of
    A is [batch][tile of rows][k][row].
    """

    def __init__(self, arithmetic: Arithmetic, chunk: int | None, target: Target, tile: Tile, wanted: Wanted) -> None:
        super().__init__(arithmetic, chunk, target, tile)
        self.wanted = wanted
        self.word_bits = max(BYTE, self.width)
        self.words = ir.VectorType(ir.IntType(self.word_bits), tile.rows)  # of all rows of a tile
        self.mask_bytes = self.word_bits // BYTE
        self.lanes = target.lanes(FLOAT32_BYTES)
        self.group = max(1, self.lanes // tile.rows)  # steps whose sums over the columns fill a vector

    # --- Tracing ----------------------------------------------------------------------------------------------------

    def _trace(self) -> ir.Function:
        """The sums of a tile again, chunk by chunk, for the masks of what passes.

        `trace(a, b, words, masks, merges, depth, row bounds, column bounds, norm limit, product limit)`
        """
        function, b = self._function("tile", [POINTER] * 5 + [I64, POINTER, POINTER, F32, F32])
        a, packed, words, masks, merges, depth, *bounds = function.args
        v = self._lanes(b)
        cells = [(r, i) for r in range(self.tile.rows) for i in range(self.tile.vectors)]
        draw = self._drawing(v, words, cells)
        merges_at = self._levels_of_merges(b, merges, depth)

        def chunk(start: Value, end: Value) -> list[Value]:
            def steps(arithmetic: Arithmetic) -> list[Value]:
                def one_step(k: Value, sums: list[Value]) -> list[Value]:
                    xs, ws = self._operands(v, a, [packed], k)
                    seen = [
                        self._look(v, arithmetic, xs[r], ws[i], s, word)
                        for (r, i), s, word in zip(cells, sums, draw(k, 0), strict=True)
                    ]
                    self._store_masks(v, masks, k, [passes for _, passes in seen])
                    return [after for after, _ in seen]

                return for_range(b, start, end, [arithmetic.zero(v)] * len(cells), one_step)

            if not self.arithmetic.by_chunk:
                return steps(self.arithmetic)
            is_safe = self._cannot_saturate(b, self._index(b, start), *bounds)
            return either(b, is_safe, lambda: steps(self.arithmetic.unclamped), lambda: steps(self.arithmetic))

        def merged(level: int, start: Value, end: Value) -> list[Value]:
            """The sums of a level; level 0 is that of a chunk."""
            if level == 0:
                return chunk(start, end)

            def one(index: Value, start: Value, end: Value, totals: list[Value]) -> list[Value]:
                sums = merged(level - 1, start, end)
                drawn = draw(b.sub(end, i64(1)), level)
                seen = self._look_at_merges(v, level, totals, sums, drawn)
                self._store_masks(v, merges_at[level - 1], index, [passes for _, passes in seen])
                return [after for after, _ in seen]

            zeros = [self.arithmetic.merging[level - 1].zero(v)] * len(cells)
            return for_chunks(b, end, self.spans[level - 1], zeros, one, start)

        def alone(_: Value, start: Value, end: Value, nothing: list[Value]) -> list[Value]:
            chunk(start, end)
            return nothing

        if self.wanted.is_recursive:
            merged(len(self.arithmetic.merging), i64(0), depth)
        else:
            for_chunks(b, depth, self.chunk, [], alone)
        b.ret_void()
        return function

    def _levels_of_merges(self, b: ir.IRBuilder, merges: Value, depth: Value) -> list[Value]:
        """Where the masks of each level's merges are, one level behind the other."""
        places = []
        for span in self.spans:
            places.append(merges)
            size = b.mul(_chunks(b, depth, span)[0], i64(self.tile.rows * self.mask_bytes))
            merges = element(b, merges, size, I8)
        return places

    def _look(
        self, v: Lanes, arithmetic: Arithmetic, x: Value, w: Value, s: Value, word: Value | None
    ) -> tuple[Value, Value]:
        """A step, and in which lanes it does not overflow, or changes the sum."""
        if self.wanted.sees_loss:
            after = arithmetic.step(v, x, w, s, word)
            return after, v.b.not_(arithmetic.unchanged(v, s, after))
        after, overflows = arithmetic.overflowing_step(v, x, w, s, word)
        return after, v.b.not_(overflows)

    def _look_at_merges(
        self, v: Lanes, level: int, totals: list[Value], sums: list[Value], words: list[Value | None]
    ) -> list[tuple[Value, Value]]:
        """Merges, and in which lanes they do not overflow, or are not lost."""
        merging = self.arithmetic.merging
        mine, below = merging[level - 1], merging[level - 2] if level > 1 else self.arithmetic
        seen = []
        for t, s, passed, word in zip(totals, sums, self._passed(v, level, sums), words, strict=True):
            if self.wanted.sees_loss:
                after = mine.merge(v, t, passed, word)
                is_same, is_empty = mine.unchanged(v, t, after), below.is_empty(v, s)
                seen.append((after, v.b.or_(v.b.not_(is_same), is_empty)))
            else:
                after, overflows = mine.overflowing_merge(v, t, passed, word)
                seen.append((after, v.b.not_(overflows)))
        return seen

    def _store_masks(self, v: Lanes, masks: Value, index: Value, passes: list[Value]) -> None:
        """Masks of all cells, as the words [row] at an index: as many lanes at a time as are whole bytes."""
        b = v.b
        at = element(b, masks, b.mul(index, i64(self.tile.rows * self.mask_bytes)), I8)
        together = min(self.tile.vectors, max(1, BYTE // v.count))
        for r in range(self.tile.rows):
            for i in range(0, self.tile.vectors, together):
                first = r * self.tile.vectors + i
                bits = _joined(b, passes[first : first + together])
                if bits.type.width < BYTE:
                    bits = b.zext(bits, I8)
                b.store(bits, element(b, at, i64(r * self.mask_bytes + i * v.count // BYTE), I8), align=1)

    # --- Settling ---------------------------------------------------------------------------------------------------

    def _settle(self) -> ir.Function:
        """Masks of what passes to those of α: a step with a zero operand is not lost, and later steps count.

        `settle(masks, merges, a, b, depth)`, with operands as they are.
        """
        function, b = self._function("settle", [POINTER] * 4 + [I64])
        masks, merges, a, packed, depth = function.args
        v = Lanes(b, self.target, FLOAT32_BYTES)

        def words_at(array: Value, index: Value) -> Value:
            return element(b, array, b.mul(index, i64(self.tile.rows * self.mask_bytes)), I8)

        def of_step(k: Value) -> Value:
            found = b.load(words_at(masks, k), typ=self.words, align=1)
            return b.or_(found, self._zero_terms(v, a, packed, k)) if self.wanted.sees_loss else found

        def one(k: Value, _: list[Value]) -> list[Value]:
            b.store(of_step(k), words_at(masks, k), align=1)
            return []

        every = ir.Constant(self.words, [ir.Constant(self.words.element, -1)] * self.tile.rows)

        def settle(array: Value, count: Value, size: int | None, above: Value | None) -> None:
            """Of terms from the last to the first, `size` of them a sum, that goes on where `above` lets it."""

            def one_sum(from_last: Value, _: list[Value]) -> list[Value]:
                sums, length = _chunks(b, count, size)
                index = b.sub(b.sub(sums, i64(1)), from_last)
                start = b.mul(index, length)
                end = _smaller(b, b.add(start, length), count)
                later = every if above is None else b.load(words_at(above, index), typ=self.words, align=1)

                def one_back(i: Value, later: list[Value]) -> list[Value]:
                    at = b.sub(b.sub(end, i64(1)), i)
                    found = of_step(at) if array is masks else b.load(words_at(array, at), typ=self.words, align=1)
                    alpha = b.and_(later[0], found)
                    b.store(alpha, words_at(array, at), align=1)
                    return [alpha]

                for_range(b, i64(0), b.sub(end, start), [later], one_back)
                return []

            for_range(b, i64(0), _chunks(b, count, size)[0], [], one_sum)

        if self.wanted.is_recursive:
            places = self._levels_of_merges(b, merges, depth)
            counts = [_chunks(b, depth, span)[0] for span in self.spans]
            sizes = [self.chunk, *(level.chunk for level in self.arithmetic.merging[:-1]), None]
            above = None
            for array, count, size in reversed(list(zip([masks, *places], [depth, *counts], sizes, strict=True))):
                settle(array, count, size, above)
                above = array
        elif self.wanted.sees_loss:
            for_range(b, i64(0), depth, [], one)
        b.ret_void()
        return function

    def _zero_terms(self, v: Lanes, a: Value, packed: Value, k: Value) -> Value:
        """Words of the cells whose product is zero because an operand is."""
        b, rows = v.b, self.tile.rows
        floats = ir.VectorType(F32, rows)
        xs = b.load(element(b, a, b.mul(k, i64(rows)), F32), typ=floats, align=4)
        no_x = b.sext(b.fcmp_ordered("==", xs, ir.Constant(floats, [ir.Constant(F32, 0.0)] * rows)), self.words)
        at = element(b, packed, b.mul(k, i64(self.width)), F32)
        ws = [v.load(element(b, at, i64(i), F32)) for i in range(0, self.width, v.count)]
        no_w = _joined(b, [b.fcmp_ordered("==", w, v.constant(0.0)) for w in ws])
        if no_w.type.width < self.word_bits:
            no_w = b.zext(no_w, self.words.element)
        undefined = ir.Constant(self.words, ir.Undefined)
        same = ir.Constant(ir.VectorType(ir.IntType(32), rows), [i32(0)] * rows)
        return b.or_(no_x, b.shuffle_vector(b.insert_element(undefined, no_w, i32(0)), undefined, same))

    # --- Spreading --------------------------------------------------------------------------------------------------

    def _spread(self) -> ir.Function:
        """A tile's share of the gradients, a group of steps at a time; masks of steps beyond the last are zero.

        `spread(masks, a, b, outputs, panel, rows, depth)`: G in a buffer [row][width], and what is added to, the
        gradients of the panel of B, [k][width], and of the rows of A, [k][row].
        """
        function, b = self._function("spread", [POINTER] * 6 + [I64])
        masks, a, packed, outputs, panel, rows, depth = function.args
        v = Lanes(b, self.target, FLOAT32_BYTES)
        height, vectors = self.tile.rows, self.width // v.count
        grad = [
            [v.load(element(b, outputs, i64(r * self.width + i * v.count), F32)) for i in range(vectors)]
            for r in range(height)
        ]

        def one_step(k: Value) -> list[Value]:
            """Adds to the panel's gradient; returns the vectors whose lanes add up to that of the rows."""
            alpha = [self._masks_of_row(v, masks, k, r) for r in range(height)]
            at_panel = element(b, panel, b.mul(k, i64(self.width)), F32)
            at_b = element(b, packed, b.mul(k, i64(self.width)), F32)
            at_a = element(b, a, b.mul(k, i64(height)), F32)
            sums: list[Value | None] = [None] * height
            for i in range(vectors):
                if self.wanted.of_b:
                    place = element(b, at_panel, i64(i * v.count), F32)
                    total = v.load(place)
                    for r in range(height):
                        x = v.load_splat(element(b, at_a, i64(r), F32))
                        total = self._add_product(v, alpha[r][i], grad[r][i], x, total)
                    v.store(total, place)
                if self.wanted.of_a:
                    w = v.load(element(b, at_b, i64(i * v.count), F32))
                    sums = [self._add_product(v, alpha[r][i], grad[r][i], w, sums[r]) for r in range(height)]
            return [s for s in sums if s is not None]

        def one_group(k: Value, _: list[Value]) -> list[Value]:
            sums = [s for j in range(self.group) for s in one_step(b.add(k, i64(j)))]
            if self.wanted.of_a:
                sums += [v.constant(0.0)] * (v.count - len(sums))
                place = element(b, rows, b.mul(k, i64(height)), F32)
                v.store(v.add(v.load(place), _sums_of_lanes(b, sums)), place)
            return []

        for_range(b, i64(0), depth, [], one_group, step=self.group)
        b.ret_void()
        return function

    def _add_product(self, v: Lanes, mask: Value, x: Value, y: Value, total: Value | None) -> Value:
        """total + x·y where the mask is set; no total is zero."""
        if total is None:
            return v.b.select(mask, v.mul(x, y), v.constant(0.0))
        added = v.fma(x, y, total) if self.target.fused else v.add(v.mul(x, y), total)
        return v.b.select(mask, added, total)

    def _masks_of_row(self, v: Lanes, masks: Value, k: Value, r: int) -> list[Value]:
        """α of a step and a row, by vectors of columns."""
        b = v.b
        at = b.add(b.mul(k, i64(self.tile.rows * self.mask_bytes)), i64(r * self.mask_bytes))
        found = []
        for i in range(0, self.width, v.count):
            place = element(b, masks, b.add(at, i64(i // BYTE)), I8)
            bits = b.load(place, typ=ir.IntType(max(BYTE, v.count)), align=1)
            if v.count < BYTE:  # a byte has the masks of several vectors
                bits = b.trunc(b.lshr(bits, ir.Constant(bits.type, i % BYTE)), ir.IntType(v.count))
            found.append(b.bitcast(bits, v.mask))
        return found

    # --- Tasks ------------------------------------------------------------------------------------------------------

    def _fetch(self) -> ir.Function:
        """The gradient of a tile's outputs into a buffer [tile.rows][width], zero where there is no output.

        `fetch(buffer, first row, table, row stride, valid rows)`
        """
        function, b = self._function("fetch", [POINTER, POINTER, POINTER, I64, I64])
        buffer, outputs, table, row_stride, valid_rows = function.args
        v = Lanes(b, self.target, FLOAT32_BYTES)

        def one_row(r: Value) -> None:
            target = element(b, buffer, b.mul(r, i64(self.width)), F32)
            source = element(b, outputs, b.mul(r, row_stride), F32)
            is_valid = b.icmp_signed("<", r, valid_rows)

            def one_element(j: Value) -> None:
                offset = load(b, table, j, I64)
                b.store(ir.Constant(F32, 0.0), element(b, target, j, F32))
                with b.if_then(b.and_(is_valid, b.icmp_signed(">=", offset, i64(0)))):
                    b.store(load(b, source, offset, F32), element(b, target, j, F32))

            for start in range(0, self.width, v.count):
                first, last = (load(b, table, i64(start + lane), I64) for lane in (0, v.count - 1))
                in_line = b.icmp_signed("==", b.sub(last, first), i64(v.count - 1))
                in_line = b.and_(in_line, b.icmp_signed(">=", last, i64(0)))
                with b.if_else(b.and_(is_valid, in_line)) as (then, otherwise):
                    with then:
                        v.store(v.load(element(b, source, first, F32)), element(b, target, i64(start), F32))
                    with otherwise:
                        repeat(b, i64(start + v.count), one_element, start=i64(start))

        repeat(b, i64(self.tile.rows), one_row)
        b.ret_void()
        return function

    def _run(self) -> None:
        """Tasks first … last − 1: panels of columns, fastest, then blocks of rows, then batches."""
        trace, settle, fetch, spread = self._trace(), self._settle(), self._fetch(), self._spread()
        draw_words = self._draw_words() if self.arithmetic.needs_random else None
        function, b = self._function("run", [POINTER, I64, I64, POINTER])
        array, first, last, scratch = function.args
        true_array, out_array = (element(b, array, i64(i * len(FIELDS)), I64) for i in (1, 2))
        parameters = Parameters(b, array)
        names = ("depth", "rows", "panels", "block_rows", "row_blocks", "c_row")
        depth, rows, panels, block_rows, row_blocks, c_row = (parameters[name] for name in names)
        limits = [parameters.number("norm_limit"), parameters.number("product_limit")]
        parts = ("table", "buffer", "words", "panels", "row_bounds", "block")
        table, buffer, words, panel, row_bounds, block = (
            element(b, scratch, parameters[f"at_{part}"], I8) for part in parts
        )
        column_bounds = element(b, panel, b.mul(depth, i64(self.panel)), F32)
        more = ("true_panel", "true_block", "masks", "merges", "grad_panel")
        true_panel, true_block, masks, merges, grad_panel = (
            element(b, scratch, parameters[f"at_{part}"], I8) for part in more
        )
        pack = [
            [_function_at(b, Parameters(b, which)[name]) for name in ("pack_rows", "pack_columns")]
            for which in (array, true_array)
        ]
        add_columns = _function_at(b, parameters["add_columns"])
        is_scaled = b.icmp_signed("!=", parameters["is_scaled"], i64(0))
        height = i64(self.tile.rows)
        control = FloatControl(b, self.target)
        control.set()
        self._fill(b, element(b, masks, b.mul(depth, i64(self.tile.rows * self.mask_bytes)), I8), i64(self._slack()))

        def one_task(t: Value, previous: list[Value]) -> list[Value]:
            group = b.sdiv(t, panels)
            batch = b.sdiv(group, row_blocks)
            row = b.mul(b.srem(group, row_blocks), block_rows)
            column = b.mul(b.srem(t, panels), i64(self.width))
            with b.if_then(b.icmp_signed("!=", group, previous[0])):
                b.call(pack[0][0], [array, block, row_bounds, table, batch, row])
                with b.if_then(is_scaled):
                    b.call(pack[1][0], [true_array, true_block, row_bounds, table, batch, row])
            b.call(pack[0][1], [array, panel, column_bounds, table, batch, column])
            with b.if_then(is_scaled):
                b.call(pack[1][1], [true_array, true_panel, column_bounds, table, batch, column])
            if self.wanted.of_b:
                self._fill(b, grad_panel, b.mul(depth, i64(self.width * FLOAT32_BYTES)))
            c = element(b, parameters.pointer("c"), b.mul(batch, parameters["c_batch"]), F32)
            grad_a = element(b, parameters.pointer("grad_a"), b.mul(batch, parameters["grad_a_batch"]), F32)
            left = _smaller(b, b.sub(rows, row), block_rows)

            def one_tile(i: Value) -> None:
                at = b.mul(i, height)
                if draw_words is not None:
                    place = (b.add(b.add(row, at), parameters["row_first"]), b.add(column, parameters["column_first"]))
                    b.call(draw_words, [array, words, batch, *place])
                at_a = b.mul(at, depth)
                bounds = element(b, row_bounds, b.mul(b.mul(i, parameters["chunks"]), i64(2)), F32)
                control.set(self.arithmetic.toward_zero, self.arithmetic.flushes)
                a = element(b, block, at_a, F32)
                b.call(trace, [a, panel, words, masks, merges, depth, bounds, column_bounds, *limits])
                control.set()
                a = element(b, true_block, at_a, F32)
                b.call(settle, [masks, merges, a, true_panel, depth])
                source = element(b, c, b.mul(b.add(row, at), c_row), F32)
                b.call(fetch, [buffer, source, table, c_row, b.sub(left, at)])
                tile = b.add(b.sdiv(row, height), i)
                target = element(b, grad_a, b.mul(tile, parameters["grad_a_tile"]), F32)
                b.call(spread, [masks, a, true_panel, buffer, grad_panel, target, depth])

            repeat(b, b.sdiv(b.add(left, i64(self.tile.rows - 1)), height), one_tile)
            if self.wanted.of_b:
                b.call(add_columns, [out_array, grad_panel, panel, table, batch, column])
            return [group]

        for_range(b, first, last, [i64(-1)], one_task)
        control.restore()
        b.ret_void()

    def _fill(self, b: ir.IRBuilder, pointer: Value, size: Value) -> None:
        """Zero bytes."""
        name = "llvm.memset.p0.i64"
        types = [POINTER, I8, I64, ir.IntType(1)]
        memset = self.module.globals.get(name) or ir.Function(self.module, ir.FunctionType(ir.VoidType(), types), name)
        b.call(memset, [pointer, ir.Constant(I8, 0), size, ir.Constant(ir.IntType(1), 0)])

    def _slack(self) -> int:
        """Bytes of the masks of steps beyond the last, which fill up a group."""
        return self.group * self.tile.rows * self.mask_bytes

    def tile_elements(self, depth: int) -> int:
        """Elements of the gradient of a tile's rows of A, [k][row], with those that are beyond the last step."""
        return -(-depth // self.group) * self.group * self.tile.rows + self.lanes

    def scratch_layout(self, depth: int, block_rows: int) -> tuple[dict[str, int], int]:
        """As of a product, and packed operands as they are, masks, and the gradient of a panel; a group more of each.

        The array `panels` of columns is behind the others, and read beyond its end, but only where masks are zero.
        """
        merges = sum(1 if span is None else -(-depth // span) for span in self.spans)
        more = depth + self.group
        offsets, end = super().scratch_layout(more, block_rows)
        sizes = {
            "at_true_panel": FLOAT32_BYTES * more * self.width,
            "at_true_block": FLOAT32_BYTES * more * block_rows,
            "at_masks": self.tile.rows * self.mask_bytes * more,
            "at_merges": self.tile.rows * self.mask_bytes * merges,
            "at_grad_panel": FLOAT32_BYTES * more * self.width,
        }
        for name, size in sizes.items():
            offsets[name] = end
            end += _up_to_a_line(size)
        return offsets, end


def _joined(b: ir.IRBuilder, masks: list[Value]) -> Value:
    """Masks as the bits of one integer, the first lowest."""
    count = masks[0].type.count
    whole = ir.IntType(count * len(masks))
    word = b.bitcast(masks[0], ir.IntType(count))
    if len(masks) == 1:
        return word
    word = b.zext(word, whole)
    for i, mask in enumerate(masks[1:], 1):
        bits = b.zext(b.bitcast(mask, ir.IntType(count)), whole)
        word = b.or_(word, b.shl(bits, ir.Constant(whole, i * count)))
    return word


def _chunks(b: ir.IRBuilder, depth: Value, chunk: int | None) -> tuple[Value, Value]:
    """How many chunks there are, and their size."""
    if chunk is None:
        return i64(1), depth
    return b.sdiv(b.add(depth, i64(chunk - 1)), i64(chunk)), i64(chunk)


def _sums_of_lanes(b: ir.IRBuilder, vectors: list[Value]) -> Value:
    """A vector whose lanes are the sums of as many vectors: fold halves of two onto each other, then quarters, …"""
    count = len(vectors)
    size = count // 2
    while size >= 1:
        half = len(vectors) // 2
        kept = [lane if not lane & size else count + lane - size for lane in range(count)]
        moved = [lane + size if not lane & size else count + lane for lane in range(count)]
        orders = [ir.Constant(ir.VectorType(ir.IntType(32), count), [i32(i) for i in order]) for order in (kept, moved)]
        vectors = [
            b.fadd(*(b.shuffle_vector(x, y, order) for order in orders))
            for x, y in zip(vectors[:half], vectors[half:], strict=True)
        ]
        size //= 2
    return vectors[0]
