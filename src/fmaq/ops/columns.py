"""What a product does to its output channels: an offset of their exponents before, undone after, and a gain.

An offset c by column is the product with b·2^c, times 2^−c, all exact: the column's accumulator has another bias. In
hardware it is an offset of the weights' exponents. A gain undoes the mean shrinkage of truncation, and folds into the
scale that follows.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

Offset = int | Tensor | None
Gain = float | Tensor | None

LARGEST = 126  # 2^±126 are normal float32


@dataclass(frozen=True)
class Columns:
    """An offset and a gain, each one for all columns, one a column, or None."""

    offset: Offset = None
    gain: Gain = None

    def scale(self, b: Tensor, dim: int) -> Tensor:
        """b·2^offset, with the columns of the product along `dim`.

        Raises:
            TypeError, ValueError: the offset is not integers of a fitting shape, or pushes b out of float32's range.
        """
        if self.offset is None:
            return b
        power = _along(self._power(b.shape[dim], 1), b.dim(), dim)
        scaled = b * power
        if not torch.equal(scaled.detach() / power, b.detach()) and bool(torch.isfinite(b).all()):
            raise ValueError(f"offset {self.offset} pushes values out of float32's range; choose one nearer to zero")
        return scaled

    def finish(self, y: Tensor, dim: int) -> Tensor:
        """y·2^−offset·gain, with the columns along `dim`."""
        if self.offset is not None:
            y = y * _along(self._power(y.shape[dim], -1), y.dim(), dim)
        if self.gain is None:
            return y
        gain = self.gain if isinstance(self.gain, Tensor) else torch.tensor(float(self.gain))
        if gain.dim() > 0 and gain.shape != (y.shape[dim],):
            raise ValueError(f"gain must be a number or ({y.shape[dim]},), one a column, got {tuple(gain.shape)}")
        return y * _along(gain.to(torch.float32), y.dim(), dim)

    def _power(self, columns: int, sign: int) -> Tensor:
        """2^(sign·offset) as float32, of shape () or (columns,)."""
        offset = torch.as_tensor(self.offset)
        if offset.is_floating_point() or offset.is_complex() or offset.dtype == torch.bool:
            raise TypeError(f"offset must be an integer or a tensor of integers, got {self.offset!r}")
        if offset.dim() > 0 and offset.shape != (columns,):
            raise ValueError(f"offset must be an integer or ({columns},), one a column, got {tuple(offset.shape)}")
        if offset.numel() and int(offset.abs().max()) > LARGEST:
            raise ValueError(f"offset must be from {-LARGEST} to {LARGEST}, got {self.offset}")
        return ((sign * offset.to(torch.int32) + 127) << 23).view(torch.float32)


def _along(x: Tensor, dims: int, dim: int) -> Tensor:
    """A scalar, or a vector along a dimension, that broadcasts with `dims` dimensions."""
    if x.dim() == 0:
        return x
    shape = [1] * dims
    shape[dim] = -1
    return x.reshape(shape)
