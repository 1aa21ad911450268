"""The loops around the arithmetic: one blocked product serves matrices and convolutions.

    C[batch][row][column] = Σ_k A[batch][row][k]·B[batch][k][column],   lanes over the columns

A column is an output position and k runs over (channel, kernel depth, row, column), so that B is read straight from
the image and no im2col matrix exists; a matrix product is the convolution whose kernel is 1×1 and whose image is one
line. A *task* is a panel of columns (a few of them, where rows are few) of a block of rows of a batch: it packs its
panel of B (unless that was kept from an earlier call: see `panels`) and, when the block changes, of A, then computes
tile after tile in registers. Tasks are independent, which is all that threads need.
"""

from __future__ import annotations

from collections.abc import Callable

from llvmlite import ir

from fmaq.kernels.arithmetic import Arithmetic, Merging
from fmaq.kernels.arithmetic32 import Float32
from fmaq.kernels.control import FloatControl
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
from fmaq.kernels.packing import FLOAT32_BYTES, PACKING_TYPE
from fmaq.kernels.parameters import Parameters, Tile
from fmaq.kernels.targets import Target
from fmaq.numerics import Accumulator, Level, random
from fmaq.numerics.reference import EVENTS

CACHE_LINE = 64
PREFETCHED = 2048  # bytes ahead
MANY = 2**61  # more steps than there are
TILE_ARGUMENTS = [*[POINTER] * 5, I64, I64, POINTER, POINTER, F32, F32]
STORE_ARGUMENTS = [POINTER, POINTER, POINTER, I64, I64, F32]
COUNTERS = 2 * len(EVENTS)  # of steps, then of merges


class Gemm:
    """Generates the function `run(parameters, first task, last task, scratch)` for an arithmetic on a target.

    Attributes:
        width: columns of a tile.
        panel: columns of a panel, which are the same for all tiles of a target, so that these share panels.
        panels: that a tile spans.
    """

    def __init__(self, arithmetic: Arithmetic, chunk: int | None, target: Target, tile: Tile) -> None:
        self.arithmetic = arithmetic
        self.chunk = chunk
        self.target = target
        self.tile = tile
        self.width = tile.vectors * target.lanes(arithmetic.element_bytes)
        self.panels = -(-tile.vectors // target.tile[1])
        self.panel = self.width // self.panels
        self.spans = _spans([chunk, *(level.chunk for level in arithmetic.merging[:-1])])
        self.module = ir.Module("fmaq")

    def build(self) -> ir.Module:
        """The module, whose one public function is `run`."""
        self._run()
        return self.module

    def _function(self, name: str, arguments: list[ir.Type]) -> tuple[ir.Function, ir.IRBuilder]:
        """A function that lies apart, since the control register differs around it."""
        function = ir.Function(self.module, ir.FunctionType(ir.VoidType(), arguments), name)
        if name != "run":
            function.linkage = "internal"
            function.attributes.add("noinline")
        return function, ir.IRBuilder(function.append_basic_block("entry"))

    def _lanes(self, b: ir.IRBuilder) -> Lanes:
        rounding = "zero" if self.arithmetic.toward_zero else "nearest"
        return Lanes(b, self.target, self.arithmetic.element_bytes, rounding, self.arithmetic.flushes)

    # --- The register tile ------------------------------------------------------------------------------------------

    def _tile(self) -> ir.Function:
        """One tile over all of k, chunk by chunk, into a buffer [tile.rows][width].

        `tile(a, b, buffer, words, counters, depth, bytes of a panel of b, row bounds, column bounds, norm limit,
        product limit)`
        """
        function, b = self._function("tile", TILE_ARGUMENTS)
        a, packed, buffer, words, self._counters_at, depth, panel_bytes, *bounds = function.args
        v = self._lanes(b)
        cells = [(r, i) for r in range(self.tile.rows) for i in range(self.tile.vectors)]
        draw = self._drawing(v, words, cells)
        panels = [element(b, packed, b.mul(panel_bytes, i64(j)), I8) for j in range(self.panels)]

        def chunk(start: Value, end: Value, counted: list[Value]) -> list[Value]:
            """The sums of a chunk, and the counters after it."""

            def steps(arithmetic: Arithmetic) -> list[Value]:
                def one_step(k: Value, carried: list[Value]) -> list[Value]:
                    xs, ws = self._operands(v, a, panels, k)
                    pairs = [(xs[r], ws[i]) for r, i in cells]
                    return self._step(v, arithmetic, pairs, carried[: len(cells)], draw(k, 0), carried[len(cells) :])

                empty = [*[arithmetic.zero(v)] * len(cells), *counted]
                at_once = self._steps_at_once(arithmetic)
                if at_once == 1:
                    return for_range(b, start, end, empty, one_step)

                def some_steps(k: Value, carried: list[Value]) -> list[Value]:
                    for i in range(at_once):
                        carried = one_step(b.add(k, i64(i)), carried)
                    return carried

                grouped = b.add(start, b.and_(b.sub(end, start), i64(-at_once)))
                sums = for_range(b, start, grouped, empty, some_steps, step=at_once)
                return for_range(b, grouped, end, sums, one_step)

            if not self.arithmetic.by_chunk:
                return steps(self.arithmetic)
            is_safe = self._cannot_saturate(b, self._index(b, start), *bounds)
            return either(b, is_safe, lambda: steps(self.arithmetic.unclamped), lambda: steps(self.arithmetic))

        def merged(level: int, start: Value, end: Value, counted: list[Value]) -> list[Value]:
            """The sums of a level, and the counters after them; level 0 is that of a chunk."""
            if level == 0:
                return chunk(start, end, counted)
            merging = self.arithmetic.merging[level - 1]

            def one(_: Value, start: Value, end: Value, carried: list[Value]) -> list[Value]:
                totals, counted = carried[: len(cells)], carried[len(cells) :]
                found = merged(level - 1, start, end, counted)
                drawn = draw(b.sub(end, i64(1)), level)
                sums = self._passed(v, level, found[: len(cells)])
                return self._merge(v, merging, totals, sums, drawn, found[len(cells) :])

            zeros = [merging.zero(v)] * len(cells)
            return for_chunks(b, end, self.spans[level - 1], [*zeros, *counted], one, start)

        carried = merged(len(self.arithmetic.merging), i64(0), depth, self._counters(v))
        totals = carried[: len(cells)]
        self._store_counters(v, carried[len(cells) :])
        for (r, i), total in zip(cells, totals, strict=True):
            value = self.arithmetic.merging[-1].finish(v, total)
            v.store(value, element(b, buffer, i64(r * self.width + i * v.count), F32))
        b.ret_void()
        return function

    def _steps_at_once(self, arithmetic: Arithmetic) -> int:
        """Steps of a turn of the inner loop.

        Where a step is four instructions, the loop's own are worth saving. With a half unit, AVX-512's VPTERNLOG
        overwrites what it rounds, so that a single step would end in copying every sum. Elsewhere nothing is gained.
        """
        if not isinstance(arithmetic, Float32):
            return 1
        if not arithmetic.sum_clamped:
            return next((steps for steps in (8, 4) if (self.chunk or 8) % steps == 0), 2)
        return 2 if arithmetic.acc.format.half_unit else 1

    def _index(self, b: ir.IRBuilder, start: Value) -> Value:
        """Of the chunk that starts there."""
        return i64(0) if self.chunk is None else b.sdiv(start, i64(self.chunk))

    def _passed(self, v: Lanes, level: int, sums: list[Value]) -> list[Value]:
        """Sums of the level below, as this one takes them."""
        if not self.arithmetic.levels:
            return sums
        below = self.arithmetic if level == 1 else self.arithmetic.levels[level - 2]
        passed = below.passed_whole if self.arithmetic.levels[level - 1].takes_whole else below.passed
        return [passed(v, s) for s in sums]

    # What a step and a merge do to all cells; `events` and `histograms` carry counters along.

    @property
    def counters(self) -> int:
        """64-bit counters in a thread's scratch memory."""
        return 0

    def _counters(self, v: Lanes) -> list[Value]:
        return []

    def _step(
        self,
        v: Lanes,
        arithmetic: Arithmetic,
        pairs: list[tuple[Value, Value]],
        sums: list[Value],
        words: list[Value | None],
        counted: list[Value],
    ) -> list[Value]:
        return [arithmetic.step(v, x, w, s, word) for (x, w), s, word in zip(pairs, sums, words, strict=True)]

    def _merge(
        self,
        v: Lanes,
        merging: Merging,
        totals: list[Value],
        sums: list[Value],
        words: list[Value | None],
        counted: list[Value],
    ) -> list[Value]:
        return merging.merge_all(v, totals, sums, words)

    def _store_counters(self, v: Lanes, counted: list[Value]) -> None:
        pass

    def _operands(self, v: Lanes, a: Value, panels: list[Value], k: Value) -> tuple[list[Value], list[Value]]:
        """Of step k: an element of A for each row, in every lane, and the vectors of B's row, from each panel."""
        b = v.b
        at_a = element(b, a, b.mul(k, i64(self.tile.rows)), F32)
        xs = [v.load_splat(element(b, at_a, i64(r), F32)) for r in range(self.tile.rows)]
        rows = [element(b, panel, b.mul(k, i64(self.panel)), F32) for panel in panels]
        if len(panels) > 1:  # few rows wait for memory
            for row in rows:
                for at in range(0, FLOAT32_BYTES * self.panel, CACHE_LINE):
                    v.prefetch(element(b, row, i64(PREFETCHED + at), I8))
        return xs, [v.load(element(b, row, i64(i), F32)) for row in rows for i in range(0, self.panel, v.count)]

    def _drawing(
        self, v: Lanes, words: Value, cells: list[tuple[int, int]]
    ) -> Callable[[Value, int], list[Value | None]]:
        """The random words of a step (level 0) or of a level's merge, for every cell; None where nothing takes any."""
        b = v.b
        bases = []
        if self.arithmetic.needs_random:
            addresses = [element(b, words, i64(r * self.width + i * v.count), I32) for r, i in cells]
            bases = [b.load(address, typ=v.words, align=4) for address in addresses]

        def draw(k: Value, level: int) -> list[Value | None]:
            if not bases:
                return [None] * len(cells)
            at = v.splat(b.mul(b.trunc(k, I32), ir.Constant(I32, random.STEP)))
            salt = random.MERGE * level & 0xFFFFFFFF
            drawn = [v.mix(b.add(b.xor(base, v.word(salt)), at)) for base in bases]
            acc = self.arithmetic.acc
            rounded: Accumulator | Level = acc.levels[level - 1] if level else acc
            odd = v.word(random.lowest_bits(rounded.random_bits))
            return [b.or_(word, odd) for word in drawn] if rounded.centred else drawn

        return draw

    def _cannot_saturate(
        self, b: ir.IRBuilder, chunk: Value, rows: Value, columns: Value, norm_limit: Value, product_limit: Value
    ) -> Value:
        """The bounds of a chunk prove that none of its products and sums in this tile saturates."""
        norm_at = b.mul(chunk, i64(2))
        magnitude_at = b.add(norm_at, i64(1))
        norms = b.fmul(load(b, rows, norm_at, F32), load(b, columns, norm_at, F32))
        magnitudes = b.fmul(load(b, rows, magnitude_at, F32), load(b, columns, magnitude_at, F32))
        return b.and_(b.fcmp_ordered("<=", norms, norm_limit), b.fcmp_ordered("<=", magnitudes, product_limit))

    def _store(self) -> ir.Function:
        """The valid part of a tile's buffer, times a power of two, into C, whose row starts at `c`."""
        function, b = self._function("store", STORE_ARGUMENTS)
        buffer, c, table, row_stride, valid_rows, scale = function.args
        v = Lanes(b, self.target, FLOAT32_BYTES)
        scales = v.splat(scale)

        def one_row(r: Value) -> None:
            source = element(b, buffer, b.mul(r, i64(self.width)), F32)
            target = element(b, c, b.mul(r, row_stride), F32)

            def one_element(j: Value) -> None:
                offset = load(b, table, j, I64)
                with b.if_then(b.icmp_signed(">=", offset, i64(0))):
                    b.store(b.fmul(load(b, source, j, F32), scale), element(b, target, offset, F32))

            for start in range(0, self.width, v.count):
                first, last = (load(b, table, i64(start + lane), I64) for lane in (0, v.count - 1))
                in_line = b.icmp_signed("==", b.sub(last, first), i64(v.count - 1))
                with b.if_else(b.and_(in_line, b.icmp_signed(">=", last, i64(0)))) as (then, otherwise):
                    with then:
                        value = v.mul(v.load(element(b, source, i64(start), F32)), scales)
                        v.store(value, element(b, target, first, F32))
                    with otherwise:
                        repeat(b, i64(start + v.count), one_element, start=i64(start))

        repeat(b, valid_rows, one_row)
        b.ret_void()
        return function

    def _draw_words(self) -> ir.Function:
        """The random words of a tile's outputs, [tile.rows][width], from their positions m and n."""
        function, b = self._function("draw_words", [POINTER, POINTER, I64, I64, I64])
        array, buffer, batch, row, column = function.args
        parameters = Parameters(b, array)
        v = self._lanes(b)
        m_start = b.trunc(b.mul(batch, parameters["m_batch"]), I32)
        n_start = b.trunc(b.mul(batch, parameters["n_batch"]), I32)
        lanes_are_m = b.trunc(parameters["lanes_are_m"], I1)
        key = v.splat(b.trunc(parameters["key"], I32))
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
        tile, store = self._tile(), self._store()
        draw_words = self._draw_words() if self.arithmetic.needs_random else None
        function, b = self._function("run", [POINTER, I64, I64, POINTER])
        array, first, last, scratch = function.args
        parameters = Parameters(b, array)
        names = ("depth", "rows", "panels", "block_rows", "row_blocks", "c_row")
        depth, rows, panels, block_rows, row_blocks, c_row = (parameters[name] for name in names)
        limits = [parameters.number("norm_limit"), parameters.number("product_limit")]
        c_scale = parameters.number("c_scale")
        parts = ("counters", "table", "buffer", "words", "panels", "row_bounds", "block")
        counters, table, buffer, words, own_panels, row_bounds, block = (
            element(b, scratch, parameters[f"at_{part}"], I8) for part in parts
        )
        pack_rows, pack_columns, locate_columns = (
            _function_at(b, parameters[name]) for name in ("pack_rows", "pack_columns", "locate_columns")
        )
        kept, panel_bytes, is_packed = parameters["kept_panels"], parameters["panel_bytes"], parameters["is_packed"]
        is_kept = b.icmp_signed("!=", kept, i64(0))
        height = i64(self.tile.rows)
        control = FloatControl(b, self.target)
        control.set()
        keeps_subnormal = self.arithmetic.merging[-1].may_be_subnormal

        def set_control() -> None:
            control.set(self.arithmetic.toward_zero, self.arithmetic.flushes)

        def one_task(t: Value, previous: list[Value]) -> list[Value]:
            group = b.sdiv(t, panels)
            batch = b.sdiv(group, row_blocks)
            row = b.mul(b.srem(group, row_blocks), block_rows)
            column = b.mul(b.srem(t, panels), i64(self.width))
            with b.if_then(b.icmp_signed("!=", group, previous[0])):
                b.call(pack_rows, [array, block, row_bounds, table, batch, row])
            index = b.add(b.mul(batch, parameters["panels_kept"]), b.mul(b.srem(t, panels), i64(self.panels)))
            place = b.inttoptr(b.add(kept, b.mul(index, panel_bytes)), POINTER)
            panel = b.select(is_kept, place, own_panels)
            column_bounds = element(b, panel, b.mul(depth, i64(self.panel)), F32)
            with b.if_else(b.icmp_signed("!=", is_packed, i64(0))) as (then, otherwise):
                with then:
                    b.call(locate_columns, [array, panel, column_bounds, table, batch, column])
                with otherwise:
                    b.call(pack_columns, [array, panel, column_bounds, table, batch, column])
            c = element(b, parameters.pointer("c"), b.mul(batch, parameters["c_batch"]), F32)
            left = _smaller(b, b.sub(rows, row), block_rows)
            set_control()

            def one_tile(i: Value) -> None:
                at = b.mul(i, height)
                if draw_words is not None:
                    b.call(draw_words, [array, words, batch, b.add(row, at), column])
                a = element(b, block, b.mul(at, depth), F32)
                bounds = element(b, row_bounds, b.mul(b.mul(i, parameters["chunks"]), i64(2)), F32)
                if keeps_subnormal:
                    set_control()
                b.call(tile, [a, panel, buffer, words, counters, depth, panel_bytes, bounds, column_bounds, *limits])
                if keeps_subnormal:
                    control.set()
                target = element(b, c, b.mul(b.add(row, at), c_row), F32)
                b.call(store, [buffer, target, table, c_row, _smaller(b, b.sub(left, at), height), c_scale])

            repeat(b, b.sdiv(b.add(left, i64(self.tile.rows - 1)), height), one_tile)
            control.set()
            return [group]

        for_range(b, first, last, [i64(-1)], one_task)
        control.restore()
        b.ret_void()

    def panel_bytes(self, depth: int) -> int:
        """The size of a panel of B, with its bounds behind it."""
        chunks = 1 if self.chunk is None else -(-depth // self.chunk)
        return _up_to_a_line(FLOAT32_BYTES * (depth * self.panel + 2 * chunks))

    def scratch_layout(self, depth: int, block_rows: int) -> tuple[dict[str, int], int]:
        """Offsets of the parts of a thread's scratch memory, as parameters, and its size in bytes.

        The table holds a column's offset in C, its offset in B and three int32 coordinates.
        """
        chunks = 1 if self.chunk is None else -(-depth // self.chunk)
        cell = self.tile.rows * self.width * FLOAT32_BYTES
        sizes = {
            "at_counters": 8 * self.counters,
            "at_table": 28 * self.width,
            "at_buffer": cell,
            "at_words": cell,
            "at_panels": self.panels * self.panel_bytes(depth),
            "at_row_bounds": 2 * FLOAT32_BYTES * chunks * (block_rows // self.tile.rows),
            "at_block": FLOAT32_BYTES * depth * block_rows,
        }
        offsets, end = {}, 0
        for name, size in sizes.items():
            offsets[name] = end
            end += _up_to_a_line(size)
        return offsets, end


def _spans(chunks: list[int | None]) -> list[int | None]:
    """Steps in a chunk, and in a sum of each level but the last; None is all."""
    spans: list[int | None] = []
    span = 1
    for chunk in chunks:
        if chunk is None or span * chunk >= MANY:
            return spans + [None] * (len(chunks) - len(spans))
        span *= chunk
        spans.append(span)
    return spans


def _up_to_a_line(size: int) -> int:
    return -(-size // CACHE_LINE) * CACHE_LINE


def _function_at(b: ir.IRBuilder, address: Value) -> Value:
    """A packing function from its address."""
    return b.inttoptr(address, ir.PointerType(PACKING_TYPE))


def _smaller(b: ir.IRBuilder, x: Value, y: Value) -> Value:
    return b.select(b.icmp_signed("<", x, y), x, y)
