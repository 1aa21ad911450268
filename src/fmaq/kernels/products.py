"""Matrix products and convolutions of float32 tensors: sizes and strides as parameters, and the kernel that takes them.

A non-finite operand makes every output that depends on it NaN.
"""

from __future__ import annotations

import ctypes
import functools
import math
import struct
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmaq.kernels.arithmetic import Arithmetic
from fmaq.kernels.arithmetic64 import general
from fmaq.kernels.choose import Choice, choose
from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.events import CountingGemm
from fmaq.kernels.gemm import COUNTERS, Gemm
from fmaq.kernels.geometry import Geometry, torch_conv
from fmaq.kernels.histograms import BINS, HistogramGemm
from fmaq.kernels.packing import Packing
from fmaq.kernels.panels import Panels, kept
from fmaq.kernels.parameters import FIELD, FIELDS, SPATIAL, Tile
from fmaq.kernels.ranges import Range, measure
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
FEW_ROWS = 64  # that share a panel: up to so many, keeping panels pays
LARGE = 1 << 14  # elements of an operand that is worth keeping


@dataclass(frozen=True)
class Kernel:
    """A compiled product. `gemm` knows its tile and its scratch memory; `code` is what keeps the functions alive."""

    gemm: Gemm
    run: Any
    packing: dict[str, int]
    code: tuple[Compiled, Compiled]


@functools.cache
def kernel(arithmetic: Arithmetic, chunk: int | None, target: Target, tile: Tile, kind: type[Gemm] = Gemm) -> Kernel:
    """The kernel of an arithmetic, compiled at its first use."""
    gemm = kind(arithmetic, chunk, target, tile)
    packing = _packing(target, tile.rows, gemm.width, arithmetic.by_chunk, chunk if arithmetic.by_chunk else None)
    code = compile_module(gemm.build(), target)
    run = code.function("run", ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64, ctypes.c_void_p)
    return Kernel(gemm, run, {name: packing.address(name) for name in PACKING}, (code, packing))


@functools.cache
def _packing(target: Target, height: int, width: int, is_bounded: bool, chunk: int | None) -> Compiled:
    return compile_module(Packing(target, height, width, is_bounded, chunk).build(), target)


@dataclass
class Problem:
    """One blocked product, as the fields of `gemm.FIELDS`; those of dimensions that it does not have are left out."""

    a: Tensor
    b: Tensor
    c: Tensor
    batches: int
    rows: int
    columns: int
    depth: int
    fields: dict[str, int] = field(default_factory=dict)
    is_matrix: bool = False

    def run(self, acc: Accumulator) -> bool:
        """Fill `c`; False, and `c` is left as it is, if an operand is not finite."""
        if self.c.numel() == 0:
            return True
        if self.depth == 0:
            self.c.zero_()
            return True
        target = current_target()
        a, b = measure(self.a, target), measure(self.b, target, self._is_kept)
        if not (a.is_finite and b.is_finite):
            return False
        if a.largest == 0 or b.largest == 0:
            self.c.zero_()
            return True
        choice = self._choose(acc, target, a, b)
        kernel = self._kernel(choice, acc, target)
        panels = self._panels(kernel.gemm, choice, b.fingerprint) if self._is_kept else None
        self._launch(kernel, choice, acc, panels)
        if panels is not None:
            panels.is_packed = True
        return True

    def count(self, acc: Accumulator) -> list[int]:
        """Fill `c`, of finite operands, and count `gemm.COUNTERS` events."""
        nothing = [0] * COUNTERS
        if self.c.numel() == 0 or self.depth == 0:
            return nothing
        target = current_target()
        a, b = measure(self.a, target), measure(self.b, target)
        if a.largest == 0 or b.largest == 0:
            self.c.zero_()
            return nothing
        choice = self._choose(acc, target, a, b, is_counting=True)
        return self._launch(self._kernel(choice, acc, target, CountingGemm), choice, acc).tolist()

    def exponents(self, acc: Accumulator) -> np.ndarray:
        """Fill `c`, of finite operands, and count exponents: (2, BINS), of rounded products, then of partial sums."""
        if self.c.numel() == 0 or self.depth == 0:
            return np.zeros((2, BINS), np.int64)
        choice = Choice(general(replace(acc, seed=0)))
        found = self._launch(self._kernel(choice, acc, current_target(), HistogramGemm), choice, acc)
        bins = found.reshape(2, BINS, -1).sum(2)
        # A tile's rows and columns beyond the last have zeros, too.
        bins[:, 0] = self.c.numel() * self.depth - bins[:, 1:].sum(1)
        return bins

    @property
    def _is_kept(self) -> bool:
        """Panels of B are worth keeping: they take longer to pack than to use, and B may be a weight."""
        return self.is_matrix and self.rows <= FEW_ROWS and self.b.numel() >= LARGE

    def _panels(self, gemm: Gemm, choice: Choice, fingerprint: bytes) -> Panels | None:
        """Kept panels of B, as this kernel reads them."""
        size = self.batches * -(-self.columns // gemm.width) * gemm.panel_bytes(self.depth)
        how = (gemm.target.name, gemm.width, choice.arithmetic.by_chunk and (gemm.chunk or 0))
        key = (fingerprint, self.b.shape, self.b.stride(), self.columns, choice.b_exponent, choice.b_unit, how)
        return kept.find(key, size)

    def _choose(self, acc: Accumulator, target: Target, a: Range, b: Range, is_counting: bool = False) -> Choice:
        use_bounds = min(self.rows, self.columns) >= SHARED
        return choose(acc, target, a, b, self.depth, use_bounds, is_counting)

    def _kernel(self, choice: Choice, acc: Accumulator, target: Target, kind: type[Gemm] = Gemm) -> Kernel:
        rows, vectors = target.tile
        height = min(rows, self.rows)
        lanes = target.lanes(choice.arithmetic.element_bytes)
        while height * vectors * 2 <= rows * target.tile[1] and vectors * lanes * 2 <= self.columns:
            vectors *= 2  # few rows leave registers to more columns
        return kernel(choice.arithmetic, acc.chunk, target, Tile(height, vectors), kind)  # type: ignore[arg-type]

    def _launch(self, kernel: Kernel, choice: Choice, acc: Accumulator, own: Panels | None = None) -> np.ndarray:
        """Run all tasks; returns the sums of the threads' counters."""
        gemm = kernel.gemm
        panels = -(-self.columns // gemm.width)
        height = gemm.tile.rows
        tiles = -(-self.rows // height)
        fitting = max(1, BLOCK_BYTES // (4 * height * self.depth))
        blocks = -(-tiles // min(tiles, fitting))
        if self.batches * panels < torch.get_num_threads():
            blocks = max(blocks, min(tiles, torch.get_num_threads()))
        block_rows = -(-tiles // blocks) * height
        blocks = -(-self.rows // block_rows)
        parameters = self._parameters(choice, acc)
        offsets, size = gemm.scratch_layout(self.depth, block_rows)
        chunks = 1 if acc.chunk is None else -(-self.depth // acc.chunk)
        sizes = {"panels": panels, "block_rows": block_rows, "row_blocks": blocks, "chunks": chunks}
        if own is not None:
            sizes |= {"kept_panels": own.address, "is_packed": int(own.is_packed)}
            sizes |= {"panel_bytes": gemm.panel_bytes(self.depth)}
        for name, value in (sizes | offsets | kernel.packing).items():
            parameters[FIELD[name]] = value

        def work(first: int, last: int) -> np.ndarray:
            memory = scratch(size)
            place = (ctypes.c_int64 * gemm.counters).from_address(memory + offsets["at_counters"])
            counters = np.ctypeslib.as_array(place)
            counters[:] = 0
            kernel.run(parameters, first, last, memory)
            return counters.copy()

        work_size = self.batches * self.rows * self.columns * self.depth
        counted = run_tasks(self.batches * blocks * panels, work, is_small=work_size < SMALL)
        return np.sum(counted, axis=0)

    def _parameters(self, choice: Choice, acc: Accumulator) -> ctypes.Array[ctypes.c_int64]:
        values = {
            **{"a": self.a.data_ptr(), "b": self.b.data_ptr(), "c": self.c.data_ptr()},
            **{"rows": self.rows, "columns": self.columns, "depth": self.depth, "key": random.key(acc.seed)},
            **{"a_scale": _power(choice.a_exponent), "b_scale": _power(choice.b_exponent)},
            **{"c_scale": _power(choice.result_exponent)},
            **{"a_unit": _power(choice.a_unit), "b_unit": _power(choice.b_unit)},
            **{"norm_limit": _bits(choice.norm_limit), "product_limit": _bits(choice.product_limit)},
            **self.fields,
        }
        parameters = PARAMETERS(*USUAL)
        for name, value in values.items():
            parameters[FIELD[name]] = value
        return parameters


def _power(exponent: int) -> int:
    """The bits of 2^exponent as a float32."""
    return (exponent + 127) << 23


def _bits(number: float) -> int:
    """The bits of a number as a float32."""
    return int(struct.unpack("I", struct.pack("f", number))[0])


def matmul(a: Tensor, b: Tensor, acc: Accumulator) -> Tensor:
    """(B, M, K) times (B, K, N), float32 of any strides, is (B, M, N) in float32."""
    problem = _matrix_problem(a, b)
    if problem.run(acc):
        return problem.c
    spoiled = ~torch.isfinite(a).all(-1)[:, :, None] | ~torch.isfinite(b).all(-2)[:, None, :]
    return matmul(_finite_part(a), _finite_part(b), acc).masked_fill_(spoiled, torch.nan)


def count_events(a: Tensor, b: Tensor, acc: Accumulator) -> list[int]:
    """How often each of `numerics.reference.EVENTS` happens in the steps, then in the merges, of `matmul` (finite)."""
    return _matrix_problem(a, b).count(acc)


def count_exponents(a: Tensor, b: Tensor, acc: Accumulator) -> np.ndarray:
    """How often each exponent happens among the rounded products, then the partial sums, of `matmul` (finite).

    Returns:
        (2, BINS): zeros first, then exponents from LOWEST (and below) on; see `histograms`.
    """
    return _matrix_problem(a, b).exponents(acc)


def _matrix_problem(a: Tensor, b: Tensor) -> Problem:
    """Lanes run over the columns or, where that leaves fewer of them idle, over the rows."""
    batches, m, depth = a.shape
    n = b.shape[2]
    c = a.new_empty(batches, m, n)
    a_strides, b_strides, c_strides = a.stride(), (b.stride(0), b.stride(2), b.stride(1)), c.stride()
    swap = _padded_cells(n, m) < _padded_cells(m, n)
    if swap:
        a, b, a_strides, b_strides = b, a, b_strides, a_strides
        c_strides = (c_strides[0], c_strides[2], c_strides[1])
    rows, columns = (n, m) if swap else (m, n)
    fields = {
        **{"a_batch": a_strides[0], "a_row": a_strides[1], "a_k": a_strides[2]},
        **{"b_batch": b_strides[0], "b_2": b_strides[1], "b_channel": b_strides[2]},
        **{"c_batch": c_strides[0], "c_row": c_strides[1], "c_position": c_strides[2]},
        **{"channels": depth, "size_2": columns, "out_2": columns},
        **{"lanes_are_m": int(swap), "m_batch": m},
    }
    return Problem(a, b, c, batches, rows, columns, depth, fields, is_matrix=True)


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
    problem = _conv_problem(x, weight, geometry)
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
    return _conv_problem(x, weight, geometry).count(acc)


def count_conv_exponents(
    x: Tensor,
    weight: Tensor,
    acc: Accumulator,
    geometry: Geometry,
) -> np.ndarray:
    """`count_exponents` of `conv`."""
    return _conv_problem(x, weight, geometry).exponents(acc)


def _conv_problem(
    x: Tensor,
    weight: Tensor,
    geometry: Geometry,
) -> Problem:
    """Rows are output channels, columns output positions of all images, batches groups."""
    dims, groups = x.dim() - 2, geometry.groups
    images, outputs, kernel_size = x.shape[0], weight.shape[0], weight.shape[2:]
    out = geometry.out(x.shape[2:], kernel_size)
    c = x.new_empty(images, outputs, *out)
    flat = weight.reshape(outputs, -1)
    positions = math.prod(out)
    per_group = outputs // groups
    fields = {
        **{"a_batch": per_group * flat.stride(0), "a_row": flat.stride(0), "a_k": flat.stride(1)},
        **{"b_batch": weight.shape[1] * x.stride(1), "b_image": x.stride(0), "b_channel": x.stride(1)},
        **{"c_batch": per_group * positions, "c_row": positions, "c_image": outputs * positions, "c_position": 1},
        **{"channels": weight.shape[1], "lanes_are_m": 1, "n_batch": per_group},
    }
    for d in range(dims):
        at = 3 - dims + d
        fields |= {f"b_{at}": x.stride(2 + d), f"size_{at}": x.shape[2 + d], f"kernel_{at}": kernel_size[d]}
        fields |= {f"stride_{at}": geometry.stride[d], f"before_{at}": geometry.padding[d]}
        fields |= {f"dilation_{at}": geometry.dilation[d], f"out_{at}": out[d]}
    return Problem(flat, x, c, groups, per_group, images * positions, flat.shape[1], fields)


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
