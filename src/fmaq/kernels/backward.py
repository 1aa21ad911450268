"""Gradients of products by the estimators that look inside the accumulation: from tensors to `gradients.GradientGemm`.

The work is cut into parts by the sizes of the product alone, so that a gradient has the same bits on any number of
threads: ranges of batches, then of columns (whole images of a convolution), then of rows. Parts of columns have partial
gradients of A of their own, parts of rows of B; they are added up in order.
"""

from __future__ import annotations

import ctypes
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic64 import general
from fmaq.kernels.choose import Choice, choose
from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.geometry import Geometry
from fmaq.kernels.gradients import GradientGemm, Wanted
from fmaq.kernels.packing import FLOAT32_BYTES
from fmaq.kernels.parameters import FIELD, FIELDS, Tile
from fmaq.kernels.products import SMALL, USUAL, Problem, conv_problem, fields_of, matrix_problem, packing_of, power
from fmaq.kernels.ranges import measure
from fmaq.kernels.targets import Target, current_target
from fmaq.kernels.threads import run_tasks, scratch
from fmaq.kernels.unpacking import Unpacking
from fmaq.numerics import Accumulator, random

PARTS = 16  # of the work, where there is so much
PANELS, TILES = 4, 16  # of columns and of rows, that a part has at least: adding up partial gradients costs little then
PARTIAL_BYTES = 64 << 20  # of partial gradients, in all
BLOCK_BYTES = 1 << 20  # of A that a thread packs at a time

Range = tuple[int, int]
Gradients = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class GradientKernel:
    """Compiled gradients of a product; `code` keeps the functions alive.

    Attributes:
        packing, true_packing: addresses of the functions that pack operands as they are traced, and as they are.
    """

    gemm: GradientGemm
    run: Any
    packing: dict[str, int]
    true_packing: dict[str, int]
    code: tuple[Compiled, ...]


@functools.cache
def gradient_kernel(
    arithmetic: Arithmetic, chunk: int | None, target: Target, tile: Tile, wanted: Wanted
) -> GradientKernel:
    """The kernel of an arithmetic and an estimator, compiled at its first use."""
    gemm = GradientGemm(arithmetic, chunk, target, tile, wanted)
    by_chunk = arithmetic.by_chunk
    packing = packing_of(target, tile.rows, gemm.width, by_chunk, chunk if by_chunk else None)
    true_packing = packing_of(target, tile.rows, gemm.width, False, None)
    unpacking = _unpacking(target, gemm.width)
    code = compile_module(gemm.build(), target)
    run = code.function("run", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    names = ("pack_rows", "pack_columns")
    first, second = ({name: module.address(name) for name in names} for module in (packing, true_packing))
    first["add_columns"] = unpacking.address("add_columns")
    return GradientKernel(gemm, run, first, second, (code, packing, true_packing, unpacking))


@functools.cache
def _unpacking(target: Target, width: int) -> Compiled:
    return compile_module(Unpacking(target, 1, width, False).build(), target)


@dataclass(frozen=True)
class Part:
    """A share of the work: ranges of batches, rows and columns, and which partial gradients it adds to."""

    batches: Range
    rows: Range
    columns: Range
    of_a: int
    of_b: int


@dataclass
class Backward:
    """The gradients of a product.

    Attributes:
        problem: the product; the fields of C are those of `grad`.
        grad: the gradient of the product.
        image_fields: names of the fields of B's strides, and the dimension of B, and a factor, that each comes from.
        unit: columns between which the ranges of columns may be cut.
        unit_fields: the fields of B, and of C, from which a range of columns is found.
    """

    problem: Problem
    grad: Tensor
    wanted: Wanted
    image_fields: dict[str, tuple[int, int]]
    unit: int
    unit_fields: tuple[str, str]

    def run(self, acc: Accumulator) -> Gradients | None:
        """The gradients of the problem's A, as (batches, rows, depth), and B; None where every step passes."""
        problem, target = self.problem, current_target()
        layout = problem.layout
        a, b = measure(problem.a, target), measure(problem.b, target)
        if a.largest == 0 or b.largest == 0:
            return None
        choice = choose(acc, target, a, b, layout.depth, layout.has_bounds)
        arithmetic = choice.arithmetic
        sees = "sees_loss" if self.wanted.sees_loss else "sees_overflow"
        if not all(getattr(each, sees) for each in (arithmetic, *arithmetic.levels)):
            choice = Choice(general(acc.with_seed(0)))
        choice = replace(choice, arithmetic=choice.arithmetic.looking())
        rows, vectors = target.tile
        tile = Tile(min(rows, layout.rows), vectors)
        kernel = gradient_kernel(choice.arithmetic, acc.chunk, target, tile, self.wanted)
        return self._launch(kernel, choice, acc)

    def _launch(self, kernel: GradientKernel, choice: Choice, acc: Accumulator) -> Gradients:
        problem, layout, gemm = self.problem, self.problem.layout, kernel.gemm
        height, tiles = gemm.tile.rows, -(-layout.rows // gemm.tile.rows)
        of_tile = gemm.tile_elements(layout.depth)
        parts = self._parts(gemm, tiles, of_tile)
        size_a = (1 + max(part.of_a for part in parts), layout.batches, tiles, of_tile)
        partial_a = problem.a.new_zeros(size_a if self.wanted.of_a else (1,))
        count_b = 1 + max(part.of_b for part in parts) if self.wanted.of_b else 0
        partial_b = [torch.zeros_like(problem.b) for _ in range(count_b)]
        arrays, size = self._arrays(kernel, choice, acc, parts, partial_a, partial_b)

        def work(first: int, last: int) -> None:
            for part, (array, tasks) in zip(parts[first:last], arrays[first:last], strict=True):
                kernel.run(array, part.batches[0] * tasks, part.batches[1] * tasks, scratch(size))

        steps = layout.batches * layout.rows * layout.columns * layout.depth
        run_tasks(len(parts), work, is_small=steps < SMALL)
        of_a = None
        if self.wanted.of_a:
            strides = (tiles * of_tile, of_tile, 1, height)
            total = _added_up(list(partial_a)).as_strided((layout.batches, tiles, height, layout.depth), strides)
            of_a = total.reshape(layout.batches, tiles * height, layout.depth)[:, : layout.rows]
        return of_a, _added_up(partial_b) if self.wanted.of_b else None

    def _parts(self, gemm: GradientGemm, tiles: int, of_tile: int) -> list[Part]:
        problem, layout = self.problem, self.problem.layout
        bytes_a = FLOAT32_BYTES * layout.batches * tiles * of_tile * self.wanted.of_a
        bytes_b = FLOAT32_BYTES * problem.b.numel() * self.wanted.of_b
        batches = _ranges(layout.batches, 1, PARTS)
        unit = self.unit * -(-gemm.width // self.unit)
        most = max(1, min(layout.columns // (PANELS * gemm.width), PARTIAL_BYTES // max(1, bytes_a)))
        columns = _ranges(layout.columns, unit, min(most, -(-PARTS // len(batches))))
        left = PARTIAL_BYTES - len(columns) * bytes_a
        most = max(1, min(tiles // TILES, left // max(1, bytes_b)))
        rows = _ranges(layout.rows, gemm.tile.rows, min(most, -(-PARTS // (len(batches) * len(columns)))))
        return [
            Part(of_batches, of_rows, of_columns, i, j)
            for of_batches, (i, of_columns), (j, of_rows) in itertools.product(
                batches, enumerate(columns), enumerate(rows)
            )
        ]

    def _arrays(
        self,
        kernel: GradientKernel,
        choice: Choice,
        acc: Accumulator,
        parts: Sequence[Part],
        partial_a: Tensor,
        partial_b: Sequence[Tensor],
    ) -> tuple[list[tuple[Any, int]], int]:
        """Of every part, its parameters and its tasks a batch; and the scratch memory that they need."""
        layout, gemm = self.problem.layout, kernel.gemm
        height, depth = gemm.tile.rows, layout.depth
        of_tile = gemm.tile_elements(depth)
        block_tiles = max(1, BLOCK_BYTES // (FLOAT32_BYTES * height * depth))
        is_scaled = choice.a_exponent != 0 or choice.b_exponent != 0
        found, largest = [], 0
        for part in parts:
            tiles = -(-(part.rows[1] - part.rows[0]) // height)
            blocks = -(-tiles // block_tiles)
            block_rows = -(-tiles // blocks) * height
            offsets, size = gemm.scratch_layout(depth, block_rows)
            largest = max(largest, size)
            if not is_scaled:
                offsets |= {"at_true_panel": offsets["at_panels"], "at_true_block": offsets["at_block"]}
            rows, columns = part.rows[1] - part.rows[0], part.columns[1] - part.columns[0]
            panels = -(-columns // gemm.width)
            values = {
                **{
                    "key": random.key(acc.seed),
                    "panels": panels,
                    "block_rows": block_rows,
                    "row_blocks": -(-rows // block_rows),
                },
                **{"chunks": 1 if acc.chunk is None else -(-depth // acc.chunk), "is_scaled": int(is_scaled)},
                **{"rows": rows, "columns": columns, "row_first": part.rows[0], "column_first": part.columns[0]},
                **{"grad_a_batch": -(-layout.rows // height) * of_tile, "grad_a_tile": of_tile},
                **self._places(part, height, of_tile, partial_a),
            }
            usual = dict(zip(FIELDS, USUAL, strict=True)) | fields_of(layout, choice) | values | offsets
            true = usual | {"a_scale": power(0), "b_scale": power(0)} | kernel.true_packing
            out = true | self._image(part, partial_b)
            array = (ctypes.c_int64 * (3 * len(FIELDS)))()
            for at, fields in enumerate((usual | kernel.packing, true, out)):
                for name, value in fields.items():
                    array[at * len(FIELDS) + FIELD[name]] = value
            found.append((array, panels * -(-rows // block_rows)))
        return found, largest

    def _places(self, part: Part, height: int, of_tile: int, partial_a: Tensor) -> dict[str, int]:
        """Where the operands of a part, the gradient of its outputs, and that of A, start."""
        problem, fields = self.problem, self.problem.layout.fields
        row, unit = part.rows[0], part.columns[0] // self.unit
        of_b, of_c = self.unit_fields
        at_a = row // height * of_tile + (part.of_a * partial_a.stride(0) if self.wanted.of_a else 0)
        return {
            "a": problem.a.data_ptr() + FLOAT32_BYTES * row * fields["a_row"],
            "b": problem.b.data_ptr() + FLOAT32_BYTES * unit * fields[of_b],
            "c": self.grad.data_ptr() + FLOAT32_BYTES * (row * fields["c_row"] + unit * fields[of_c]),
            "grad_a": partial_a.data_ptr() + FLOAT32_BYTES * at_a,
        }

    def _image(self, part: Part, partial_b: Sequence[Tensor]) -> dict[str, int]:
        """The fields of B as those of its gradient."""
        if not partial_b:
            return {}
        image = partial_b[part.of_b]
        fields = {name: factor * image.stride(d) for name, (d, factor) in self.image_fields.items()}
        unit = part.columns[0] // self.unit
        return fields | {"b": image.data_ptr() + FLOAT32_BYTES * unit * fields[self.unit_fields[0]]}


def _ranges(count: int, multiple: int, parts: int) -> list[Range]:
    """0 … count − 1 in as many ranges, of about the same size; all but the last end at a multiple."""
    units = -(-count // multiple)
    parts = max(1, min(parts, units))
    ends = [min(count, multiple * (units * i // parts)) for i in range(parts + 1)]
    return list(itertools.pairwise(ends))


def _added_up(partial: Sequence[Tensor]) -> Tensor:
    """Their sum, in order, in the first."""
    total, *others = partial
    for other in others:
        total += other
    return total


def matmul_gradients(
    a: Tensor, b: Tensor, grad: Tensor, acc: Accumulator, estimator: str, of_a: bool = True, of_b: bool = True
) -> Gradients | None:
    """Those of `products.matmul`, through its steps.

    Args:
        a: (B, M, K), finite. b: (B, K, N), finite. grad: of the product, (B, M, N).
        estimator: see `numerics.reference.estimator_masks`; not identity.
        of_a, of_b: which of them are wanted.

    Returns:
        The gradients, None for one that is not wanted; or None where every step passes, so that they are those of
        the identity.
    """
    problem = matrix_problem(a, b)
    layout = problem.layout
    if 0 in (layout.batches, layout.rows, layout.columns, layout.depth):
        return None
    is_swapped = layout.is_swapped
    of_batch, of_row, of_column = (0, 2, 1) if is_swapped else (0, 1, 2)
    fields = {"c_batch": grad.stride(of_batch), "c_row": grad.stride(of_row), "c_position": grad.stride(of_column)}
    problem = problem._replace(layout=replace(layout, fields=layout.fields | fields))
    columns, channel = (1, 2) if is_swapped else (2, 1)
    image_fields = {"b_batch": (0, 1), "b_2": (columns, 1), "b_channel": (channel, 1)}
    wanted = Wanted(estimator, *((of_b, of_a) if is_swapped else (of_a, of_b)))
    found = Backward(problem, grad, wanted, image_fields, 1, ("b_2", "c_position")).run(acc)
    if found is None or not is_swapped:
        return found
    first, second = found
    return second, None if first is None else first.mT


def conv_gradients(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    acc: Accumulator,
    estimator: str,
    geometry: Geometry,
    of_x: bool = True,
    of_weight: bool = True,
) -> Gradients | None:
    """Those of `products.conv`, of its x and weight, through its steps; see `matmul_gradients`."""
    problem = conv_problem(x, weight, geometry)
    layout = problem.layout
    if 0 in (layout.batches, layout.rows, layout.columns, layout.depth):
        return None
    grad, dims = grad.contiguous(), x.dim() - 2
    image_fields = {"b_batch": (1, weight.shape[1]), "b_image": (0, 1), "b_channel": (1, 1)}
    image_fields |= {f"b_{3 - dims + d}": (2 + d, 1) for d in range(dims)}
    wanted = Wanted(estimator, of_weight, of_x)
    positions = grad.shape[2:].numel()
    found = Backward(problem, grad, wanted, image_fields, positions, ("b_image", "c_image")).run(acc)
    if found is None:
        return None
    of_rows, of_image = found
    return of_image, None if of_rows is None else of_rows.reshape(weight.shape)
