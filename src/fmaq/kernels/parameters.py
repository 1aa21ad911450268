"""What a kernel is told at run time: an array of 64-bit integers, one a field."""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from fmaq.kernels.ir_blocks import F32, I32, I64, POINTER, Value, i64, load

FIELDS = (
    # Addresses of the packing functions, and of float32.
    *("pack_rows", "pack_columns", "locate_columns"),
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
    # Bits of a float32: powers of two that operands are multiplied with on packing, and results when they are stored,
    # and that bring packed operands below 1.
    *("a_scale", "b_scale", "c_scale", "a_unit", "b_unit"),
    # Bits of a float32: up to these, products of squared norms, and of magnitudes, of operands below 1 cannot saturate.
    *("norm_limit", "product_limit"),
    # Positions for stochastic rounding: m counts rows, or columns if `lanes_are_m`; a batch adds `m_batch`, `n_batch`.
    *("key", "lanes_are_m", "m_batch", "n_batch"),
    # The bytes of a panel of B, its bounds included; where panels are kept from call to call (0: nowhere), how many of
    # a batch, and 1 if all of them are packed already.
    *("panel_bytes", "kept_panels", "panels_kept", "is_packed"),
    # Chunks in the sum, and offsets in bytes of the parts of a thread's scratch memory.
    *(
        "chunks",
        "at_counters",
        "at_table",
        "at_buffer",
        "at_words",
        "at_panels",
        "at_row_bounds",
        "at_block",
    ),
    # Gradients: positions of the first row and column among all, addresses of a function and of the gradient of A, its
    # strides in elements of a batch and of a tile of rows, 1 where panels differ from the operands, and scratch memory.
    *("row_first", "column_first", "add_columns", "grad_a", "grad_a_batch", "grad_a_tile", "is_scaled"),
    *("at_true_panel", "at_true_block", "at_masks", "at_merges", "at_grad_panel"),
)
FIELD = {name: index for index, name in enumerate(FIELDS)}
SPATIAL = (0, 1, 2)


@dataclass(frozen=True)
class Tile:
    """The part of C that is held in registers: rows × vectors of columns."""

    rows: int
    vectors: int


class Parameters:
    """The fields, as a function's instructions read them."""

    def __init__(self, builder: ir.IRBuilder, pointer: Value) -> None:
        self.b = builder
        self.array = pointer

    def __getitem__(self, name: str) -> Value:
        return load(self.b, self.array, i64(FIELD[name]), I64)

    def pointer(self, name: str) -> Value:
        """A field that is an address."""
        return self.b.inttoptr(self[name], POINTER)

    def number(self, name: str) -> Value:
        """A field that is the bits of a float32."""
        return self.b.bitcast(self.b.trunc(self[name], I32), F32)

    def spatial(self, name: str) -> list[Value]:
        """A field of each spatial dimension."""
        return [self[f"{name}_{d}"] for d in SPATIAL]
