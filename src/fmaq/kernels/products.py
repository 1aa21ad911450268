"""Matrix products and convolutions of float32 tensors: sizes and strides as parameters, and the kernel that takes them.

A non-finite operand makes every output that depends on it NaN.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic64 import general
from fmaq.kernels.choose import Choice, choose
from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.events import CountingGemm
from fmaq.kernels.fingerprints import recognized
from fmaq.kernels.gemm import COUNTERS, Gemm
from fmaq.kernels.geometry import Geometry, torch_conv
from fmaq.kernels.histograms import BINS, HistogramGemm
from fmaq.kernels.packing import Packing
from fmaq.kernels.panels import Panels, kept
from fmaq.kernels.parameters import FIELD, FIELDS, SPATIAL, Tile
from fmaq.kernels.ranges import Measured, measured, range_of
from fmaq.kernels.targets import Target, current_target
from fmaq.kernels.threads import run_tasks, scratch
from fmaq.numerics import Accumulator, random

BLOCK_BYTES = 4 << 20  # of A that a thread packs at a time
SHARED = 16  # rows and columns from which on bounds pay
PACKING = ("pack_rows", "pack_columns", "locate_columns")
PARAMETERS = ctypes.c_int64 * len(FIELDS)
_OF_ONE_POINT = {f"{name}_{d}" for name in ("size", "kernel", "stride", "dilation", "out") for d in SPATIAL}
USUAL = [int(name in _OF_ONE_POINT) for name in FIELDS]  # a kernel and an image of one point
SMALL = 1 << 16  # multiply-adds that are not worth a second thread
MOST_PANELS = 4  # that a tile spans
FEW_ROWS = 64  # that share a panel: up to so many, keeping panels pays
LONG = 1 << 24  # multiply-adds that take longer than to choose their kernel
KEPT_BITS = 4  # of the number of steps in a sum, and of magnitudes, for which a kernel is chosen
LARGE = 1 << 14  # elements of an operand that is worth keeping


@dataclass(frozen=True)
class Kernel:
    """A compiled product. `gemm` knows its tile and its scratch memory; `code` is what keeps the function alive."""

    gemm: Gemm
    run: Any
    code: Compiled


@functools.cache
def kernel(arithmetic: Arithmetic, chunk: int | None, target: Target, tile: Tile, kind: type[Gemm] = Gemm) -> Kernel:
    """The kernel of an arithmetic, compiled at its first use."""
    gemm = kind(arithmetic, chunk, target, tile)
    code = compile_module(gemm.build(), target)
    run = code.function("run", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return Kernel(gemm, run, code)


@functools.cache
def packing_of(
    target: Target, height: int, width: int, is_bounded: bool, chunk: int | None, panels: int = 1
) -> Compiled:
    """What packs operands for tiles of a size."""
    return compile_module(Packing(target, height, width, is_bounded, chunk, panels).build(), target)


@dataclass(frozen=True, eq=False)
class Layout:
    """How a blocked product lies in memory, and how large it is: all that is known before its values are.

    Attributes:
        fields: the sizes and strides, as `parameters.FIELDS`; those of dimensions that it does not have are left out.
        shape: of the result.
        b_size: elements of B.
        is_matrix: it is no convolution.
        is_swapped: A is the second operand.
    """

    batches: int
    rows: int
    columns: int
    depth: int
    fields: dict[str, int]
    shape: tuple[int, ...]
    b_size: int
    is_matrix: bool = False
    is_swapped: bool = False

    @property
    def is_kept(self) -> bool:
        """Panels of B are worth keeping: they take longer to pack than to use, and B may be a weight."""
        return self.is_matrix and self.rows <= FEW_ROWS and self.b_size >= LARGE

    def widened(self, a: Measured, b: Measured) -> tuple[Measured, Measured]:
        """The ranges for which a kernel is chosen: in a short product, that takes longer than a check too many."""
        steps = self.batches * self.rows * self.columns * self.depth
        kept = KEPT_BITS if steps >= LONG else 0
        return a.widened(kept), b.widened(kept)

    @property
    def has_bounds(self) -> bool:
        """Enough rows and columns share the bounds of tiles and chunks."""
        return min(self.rows, self.columns) >= SHARED


@dataclass(frozen=True, eq=False)
class Launch:
    """A compiled kernel, and all that it is told but addresses and the key.

    Attributes:
        template: the parameters.
        tasks: into which the product is divided; `is_small`: not worth a second thread.
        scratch: bytes that a thread needs; `at_counters`: where in them it counts.
        panels: what packed panels of B depend on, and bytes of all.
        packing: what keeps the packing functions alive.
    """

    kernel: Kernel
    template: ctypes.Array[ctypes.c_int64]
    tasks: int
    is_small: bool
    scratch: int
    at_counters: int
    panels: tuple[tuple[Any, ...], int]
    packing: Compiled

    def parameters(self, problem: Problem, seed: int, kept: Panels | None = None) -> ctypes.Array[ctypes.c_int64]:
        """The template, with what is known of a call alone."""
        parameters = PARAMETERS.from_buffer_copy(self.template)
        parameters[FIELD["a"]] = problem.a.data_ptr()
        parameters[FIELD["b"]] = problem.b.data_ptr()
        parameters[FIELD["c"]] = problem.c.data_ptr()
        parameters[FIELD["key"]] = random.key(seed)
        if kept is not None:
            parameters[FIELD["kept_panels"]] = kept.address
            parameters[FIELD["is_packed"]] = int(kept.is_packed)
        return parameters

    def run(self, problem: Problem, seed: int, kept: Panels | None = None) -> np.ndarray | None:
        """Run all tasks; returns the sums of the threads' counters, where the kernel counts."""
        parameters = self.parameters(problem, seed, kept)
        run, count = self.kernel.run, self.kernel.gemm.counters

        def work(first: int, last: int) -> np.ndarray | None:
            memory = scratch(self.scratch)
            if not count:
                run(parameters, first, last, memory)
                return None
            counters = np.ctypeslib.as_array((ctypes.c_int64 * count).from_address(memory + self.at_counters))
            counters[:] = 0
            run(parameters, first, last, memory)
            return counters.copy()

        counted = run_tasks(self.tasks, work, self.is_small)
        return np.sum([found for found in counted if found is not None], axis=0) if count else None


@functools.lru_cache(maxsize=1 << 14)
def launch_of(
    layout: Layout,
    acc: Accumulator,
    target: Target,
    ranges: tuple[Measured, Measured] | None,
    threads: int,
    kind: type[Gemm] = Gemm,
) -> Launch:
    """What computes a product of operands of such ranges; None: by the general arithmetic."""
    choice = Choice(general(acc))
    if ranges is not None:
        choice = _choice(acc, target, *ranges, _rounded_up(layout.depth), layout.has_bounds, kind is CountingGemm)
    kernel = _kernel(layout, choice, acc.chunk, target, kind)
    gemm, depth, height = kernel.gemm, layout.depth, kernel.gemm.tile.rows
    panels = -(-layout.columns // gemm.width)
    tiles = -(-layout.rows // height)
    fitting = max(1, BLOCK_BYTES // (4 * height * depth))
    blocks = -(-tiles // min(tiles, fitting))
    if layout.batches * panels < threads:
        blocks = max(blocks, min(tiles, threads))
    block_rows = -(-tiles // blocks) * height
    blocks = -(-layout.rows // block_rows)
    offsets, size = gemm.scratch_layout(depth, block_rows)
    # Kept panels have their bounds, whether this kernel looks at them or not: another may.
    is_bounded = choice.arithmetic.by_chunk or layout.is_kept
    packing = packing_of(target, height, gemm.width, is_bounded, acc.chunk if is_bounded else None, gemm.panels)
    sizes = {"panels": panels, "block_rows": block_rows, "row_blocks": blocks}
    sizes["chunks"] = 1 if acc.chunk is None else -(-depth // acc.chunk)
    sizes["panel_bytes"] = gemm.panel_bytes(depth)
    sizes["panels_kept"] = -(-layout.columns // (MOST_PANELS * gemm.panel)) * MOST_PANELS
    sizes |= {name: packing.address(name) for name in PACKING}
    template = PARAMETERS(*USUAL)
    for name, value in (fields_of(layout, choice) | sizes | offsets).items():
        template[FIELD[name]] = value
    of_panels = layout.columns, choice.b_exponent, choice.b_unit, gemm.target.name, gemm.panel, gemm.chunk
    all_bytes = layout.batches * sizes["panels_kept"] * sizes["panel_bytes"]
    is_small = layout.batches * layout.rows * layout.columns * depth < SMALL
    tasks = layout.batches * blocks * panels
    return Launch(kernel, template, tasks, is_small, size, offsets["at_counters"], (of_panels, all_bytes), packing)


@functools.lru_cache(maxsize=1 << 14)
def _choice(
    acc: Accumulator, target: Target, a: Measured, b: Measured, depth: int, has_bounds: bool, is_counting: bool
) -> Choice:
    return choose(acc, target, range_of(a), range_of(b), depth, has_bounds, is_counting)


def _rounded_up(depth: int) -> int:
    """To one of few: what is exact for more steps is so for these, and attention has one more in every call."""
    unit = 1 << max(0, depth.bit_length() - KEPT_BITS)
    return -(-depth // unit) * unit


def _kernel(layout: Layout, choice: Choice, chunk: int | None, target: Target, kind: type[Gemm]) -> Kernel:
    rows, vectors = target.tile
    height = min(rows, layout.rows)
    lanes = target.lanes(choice.arithmetic.element_bytes)
    # Few rows leave registers to more columns, but a bound is that of one panel.
    most = (1 if choice.arithmetic.by_chunk else min(rows // height, MOST_PANELS)) * target.tile[1]
    while vectors * 2 <= most and vectors * lanes * 2 <= layout.columns:
        vectors *= 2
    return kernel(choice.arithmetic, chunk, target, Tile(height, vectors), kind)  # type: ignore[arg-type]


def fields_of(layout: Layout, choice: Choice) -> dict[str, int]:
    """The parameters that a product and a choice say."""
    return {
        **{"rows": layout.rows, "columns": layout.columns, "depth": layout.depth},
        **{"a_scale": power(choice.a_exponent), "b_scale": power(choice.b_exponent)},
        **{"c_scale": power(choice.result_exponent)},
        **{"a_unit": power(choice.a_unit), "b_unit": power(choice.b_unit)},
        **{"norm_limit": _bits(choice.norm_limit), "product_limit": _bits(choice.product_limit)},
        **layout.fields,
    }


class Problem(NamedTuple):
    """One blocked product."""

    a: Tensor
    b: Tensor
    c: Tensor
    layout: Layout

    def run(self, acc: Accumulator) -> bool:
        """Fill `c`; False, and `c` is left as it is, if an operand is not finite."""
        if self.c.numel() == 0:
            return True
        layout = self.layout
        if layout.depth == 0:
            self.c.zero_()
            return True
        target = current_target()
        a, mark = measured(self.a, target), None
        if layout.is_kept:
            mark, b = recognized(self.b, target)
        else:
            b = measured(self.b, target)
        if not (a.is_finite and b.is_finite):
            return False
        if a.largest == 0 or b.largest == 0:
            self.c.zero_()
            return True
        launch = launch_of(layout, acc.with_seed(0), target, layout.widened(a, b), torch.get_num_threads())
        how, size = launch.panels
        panels = None if mark is None else kept.find((mark, self.b.shape, self.b.stride(), *how), size)
        launch.run(self, acc.seed, panels)
        if panels is not None:
            panels.is_packed = True
        return True

    def count_events(self, acc: Accumulator) -> list[int]:
        """Fill `c`, of finite operands, and count `gemm.COUNTERS` events."""
        nothing = [0] * COUNTERS
        if self.c.numel() == 0 or self.layout.depth == 0:
            return nothing
        target = current_target()
        a, b = measured(self.a, target), measured(self.b, target)
        if a.largest == 0 or b.largest == 0:
            self.c.zero_()
            return nothing
        found = self._counted(acc, self.layout.widened(a, b), CountingGemm)
        return found.tolist()

    def count_exponents(self, acc: Accumulator) -> np.ndarray:
        """Fill `c`, of finite operands, and count exponents: (2, BINS), of rounded products, then of partial sums."""
        if self.c.numel() == 0 or self.layout.depth == 0:
            return np.zeros((2, BINS), np.int64)
        bins = self._counted(acc, None, HistogramGemm).reshape(2, BINS, -1).sum(2)
        # A tile's rows and columns beyond the last have zeros, too.
        bins[:, 0] = self.c.numel() * self.layout.depth - bins[:, 1:].sum(1)
        return bins

    def _counted(self, acc: Accumulator, ranges: tuple[Measured, Measured] | None, kind: type[Gemm]) -> np.ndarray:
        how = self.layout, acc.with_seed(0), current_target(), ranges, torch.get_num_threads(), kind
        launch = launch_of(*how)  # type: ignore[arg-type]
        counted = launch.run(self, acc.seed)
        assert counted is not None
        return counted


def power(exponent: int) -> int:
    """The bits of 2^exponent as a float32."""
    return (exponent + 127) << 23


def _bits(number: float) -> int:
    """The bits of a number as a float32."""
    return int(struct.unpack("I", struct.pack("f", number))[0])


def matmul(a: Tensor, b: Tensor, acc: Accumulator) -> Tensor:
    """(B, M, K) times (B, K, N), float32 of any strides, is (B, M, N) in float32."""
    problem = matrix_problem(a, b)
    if problem.run(acc):
        return problem.c
    spoiled = ~torch.isfinite(a).all(-1)[:, :, None] | ~torch.isfinite(b).all(-2)[:, None, :]
    return matmul(_finite_part(a), _finite_part(b), acc).masked_fill_(spoiled, torch.nan)


def count_events(a: Tensor, b: Tensor, acc: Accumulator) -> list[int]:
    """How often each of `numerics.reference.EVENTS` happens in the steps, then in the merges, of `matmul` (finite)."""
    return matrix_problem(a, b).count_events(acc)


def count_exponents(a: Tensor, b: Tensor, acc: Accumulator) -> np.ndarray:
    """How often each exponent happens among the rounded products, then the partial sums, of `matmul` (finite).

    Returns:
        (2, BINS): zeros first, then exponents from LOWEST (and below) on; see `histograms`.
    """
    return matrix_problem(a, b).count_exponents(acc)


def matrix_problem(a: Tensor, b: Tensor) -> Problem:
    """Of (B, M, K) and (B, K, N)."""
    layout = _matrix_layout(a.shape, a.stride(), b.shape, b.stride())
    c = a.new_empty(layout.shape)
    return Problem(b, a, c, layout) if layout.is_swapped else Problem(a, b, c, layout)


@functools.lru_cache(maxsize=4096)
def _matrix_layout(
    a_shape: tuple[int, ...], a_strides: tuple[int, ...], b_shape: tuple[int, ...], b_strides: tuple[int, ...]
) -> Layout:
    """Lanes run over the columns or, where that leaves fewer of them idle, over the rows."""
    batches, m, depth = a_shape
    n = b_shape[2]
    b_strides, c_strides = (b_strides[0], b_strides[2], b_strides[1]), (m * n, n, 1)
    swap = _padded_cells(n, m) < _padded_cells(m, n)
    if swap:
        a_shape, b_shape, a_strides, b_strides = b_shape, a_shape, b_strides, a_strides
        c_strides = (c_strides[0], c_strides[2], c_strides[1])
    rows, columns = (n, m) if swap else (m, n)
    fields = {
        **{"a_batch": a_strides[0], "a_row": a_strides[1], "a_k": a_strides[2]},
        **{"b_batch": b_strides[0], "b_2": b_strides[1], "b_channel": b_strides[2]},
        **{"c_batch": c_strides[0], "c_row": c_strides[1], "c_position": c_strides[2]},
        **{"channels": depth, "size_2": columns, "out_2": columns},
        **{"lanes_are_m": int(swap), "m_batch": m},
    }
    return Layout(batches, rows, columns, depth, fields, (batches, m, n), math.prod(b_shape), True, swap)


def _finite_part(x: Tensor) -> Tensor:
    return torch.where(torch.isfinite(x), x, 0.0)


def _padded_cells(rows: int, columns: int) -> int:
    """Outputs that are computed for a tile of 4 × 32."""
    return -(-rows // 4) * 4 * (-(-columns // 32) * 32)


def conv(
    x: Tensor,
    weight: Tensor,
    acc: Accumulator,
    geometry: Geometry,
) -> Tensor:
    """Convolution over 1 to 3 spatial dimensions of float32 tensors; no im2col matrix is made.

    Args:
        x: (N, C, *spatial), any strides.
        weight: (O, C/groups, *kernel).

    Returns:
        (N, O, *out) in float32.
    """
    problem = conv_problem(x, weight, geometry)
    if problem.run(acc):
        return problem.c
    return _spoiled_conv(x, weight, acc, geometry)


def count_conv_events(
    x: Tensor,
    weight: Tensor,
    acc: Accumulator,
    geometry: Geometry,
) -> list[int]:
    """How often each of `numerics.reference.EVENTS` happens in the steps, then in the merges, of `conv` (finite)."""
    return conv_problem(x, weight, geometry).count_events(acc)


def count_conv_exponents(
    x: Tensor,
    weight: Tensor,
    acc: Accumulator,
    geometry: Geometry,
) -> np.ndarray:
    """`count_exponents` of `conv`."""
    return conv_problem(x, weight, geometry).count_exponents(acc)


def conv_problem(x: Tensor, weight: Tensor, geometry: Geometry) -> Problem:
    """Of (N, C, *spatial) and (O, C/groups, *kernel)."""
    flat = weight.reshape(weight.shape[0], -1)
    layout = _conv_layout(x.shape, x.stride(), weight.shape, flat.stride(), geometry)
    return Problem(flat, x, x.new_empty(layout.shape), layout)


@functools.lru_cache(maxsize=4096)
def _conv_layout(
    image: tuple[int, ...],
    strides: tuple[int, ...],
    weight: tuple[int, ...],
    flat_strides: tuple[int, ...],
    geometry: Geometry,
) -> Layout:
    """Rows are output channels, columns output positions of all images, batches groups."""
    dims, groups = len(image) - 2, geometry.groups
    images, outputs, channels, *kernel_size = image[0], *weight
    out = geometry.out(image[2:], kernel_size)
    positions = math.prod(out)
    per_group = outputs // groups
    fields = {
        **{"a_batch": per_group * flat_strides[0], "a_row": flat_strides[0], "a_k": flat_strides[1]},
        **{"b_batch": channels * strides[1], "b_image": strides[0], "b_channel": strides[1]},
        **{"c_batch": per_group * positions, "c_row": positions, "c_image": outputs * positions, "c_position": 1},
        **{"channels": channels, "lanes_are_m": 1, "n_batch": per_group},
    }
    for d in range(dims):
        at = 3 - dims + d
        fields |= {f"b_{at}": strides[2 + d], f"size_{at}": image[2 + d], f"kernel_{at}": kernel_size[d]}
        fields |= {f"stride_{at}": geometry.stride[d], f"before_{at}": geometry.padding[d]}
        fields |= {f"dilation_{at}": geometry.dilation[d], f"out_{at}": out[d]}
    depth = channels * math.prod(kernel_size)
    return Layout(groups, per_group, images * positions, depth, fields, (images, outputs, *out), math.prod(image))


def _spoiled_conv(
    x: Tensor,
    weight: Tensor,
    acc: Accumulator,
    geometry: Geometry,
) -> Tensor:
    """A convolution whose operands are not all finite: NaN where a window holds such a value, or a filter does."""
    y = conv(_finite_part(x), _finite_part(weight), acc, geometry)
    return y.masked_fill_(spoiled_outputs(x, weight, geometry), torch.nan)


def spoiled_outputs(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Tensor:
    """Which outputs of a convolution depend on a value that is not finite."""
    marks = (~torch.isfinite(x)).float()
    in_window = torch_conv(marks, torch.ones_like(weight), geometry) > 0
    in_filter = ~torch.isfinite(weight).flatten(1).all(1)
    return in_window | in_filter.reshape(-1, *[1] * (x.dim() - 2))
