"""What a product does to its output channels: an offset of their exponents before, undone after, a gain and a shift;
and, if that is wanted, to its tokens: an exponent of their own.

An offset c by column is the product with b·2^c, times 2^−c, all exact: the column's accumulator has another bias. In
hardware it is an offset of the weights' exponents. A gain undoes the mean shrinkage of truncation, and folds into the
scale that follows; a shift undoes a mean error, and folds into the bias vector.

By token, the product is that of a·2^−e, times 2^e, where e is the exponent of the largest magnitude in the row of a:
each row has another bias, as it needs. Unlike the others that is not known before: the hardware has to find e, the
largest exponent of K, while it reads the row, and to add it to the exponents of the row's results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.ops.operators import InDims, Operator, operator

Offset = int | Sequence[int] | Tensor | None
Gain = float | Sequence[float] | Tensor | None

LARGEST = 126  # 2^±126 are normal float32
SMALLEST = 2.0**-126
KEPT = 2.0**-100  # an offset that turns a value as large as this into less than the smallest is refused


@dataclass(frozen=True)
class Columns:
    """An offset, a gain and a shift, each one for all columns, one a column, or None; and whether it is by token.

    Of a batched product each may have the dimensions of the batch in front: (heads, 1) is one a head, (heads, N) one a
    head and column.
    """

    offset: Offset = None
    gain: Gain = None
    shift: Gain = None
    per_token: bool = False

    @property
    def is_empty(self) -> bool:
        """Nothing is done."""
        return self.offset is None and self.gain is None and self.shift is None and not self.per_token

    def scale(self, b: Tensor, dim: int, batched: bool = False) -> Tensor:
        """b·2^offset, with the columns of the product along `dim`; `batched`: (…, K, N).

        It is exact, but for what is below 2^−126 afterwards, which may lose bits.

        Raises:
            TypeError, ValueError: the offset is not integers of a fitting shape, or pushes b out of float32's range.
        """
        if self.offset is None:
            return b
        power = _along(self._power(1), b, dim, "offset", batched, rows=True)
        store = kernels.store_of(b)
        if store is None:
            return _times_powers(b, power)
        how = "times powers", power.shape, tuple(power.flatten().tolist())
        return store.once(b, how, lambda: _times_powers(b, power))

    def by_token(self, a: Tensor, dims: tuple[int, ...]) -> tuple[Tensor, Tensor | None]:
        """a·2^−e and 2^−e, which the product is to be divided by; without `per_token` a, and None.

        Args:
            dims: of a, over which one token extends; they are 1 in 2^−e.
        """
        if not self.per_token:
            return a, None
        powers = token_powers(a, dims)
        return a * powers, powers

    def finish(self, y: Tensor, dim: int, batched: bool = False, rows: bool = True) -> Tensor:
        """y·2^−offset·gain + shift, with the columns along `dim`; `batched`: (…, M, N), or (…, N) without `rows`."""
        if self.offset is not None:
            y = y * _along(self._power(-1), y, dim, "offset", batched, rows)
        if self.gain is not None:
            y = y * _along(_float(self.gain), y, dim, "gain", batched, rows)
        if self.shift is not None:
            y = y + _along(_float(self.shift), y, dim, "shift", batched, rows)
        return y

    def _power(self, sign: int) -> Tensor:
        """2^(sign·offset) as float32."""
        offset = torch.as_tensor(self.offset)
        if offset.is_floating_point() or offset.is_complex() or offset.dtype == torch.bool:
            raise TypeError(f"offset must be an integer or a tensor of integers, got {self.offset!r}")
        return powers_of_two(offset, sign)


def _times_powers(b: Tensor, power: Tensor) -> Tensor:
    return times_powers(b.expand(torch.broadcast_shapes(b.shape, power.shape)), power)


def _powers(offset: Tensor, sign: int) -> Tensor:
    if offset.numel() and not -LARGEST <= int(offset.min()) <= int(offset.max()) <= LARGEST:
        raise ValueError(f"offset must be from {-LARGEST} to {LARGEST}, got {offset.tolist()}")
    return ((sign * offset.to(torch.int32) + 127) << 23).view(torch.float32)


def _scaled(b: Tensor, power: Tensor) -> Tensor:
    """b times powers of two, refused where that is not exact."""
    scaled = b * power
    if not torch.equal(scaled / power, b):
        lost = (b.abs() >= KEPT) & (scaled.abs() < SMALLEST)
        if bool((torch.isinf(scaled) & torch.isfinite(b)).any() | lost.any()):
            offsets = (torch.frexp(power)[1] - 1).flatten().tolist()
            raise ValueError(
                f"offset {offsets[0] if len(offsets) == 1 else offsets} pushes values out of float32's range; choose "
                "one nearer to zero"
            )
    return scaled


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
    return grad * ctx.saved_tensors[0], None


def _vmap(call: Operator, info: Any, in_dims: InDims, b: Tensor, power: Tensor) -> tuple[Tensor, int]:
    """All examples at once: the powers broadcast from the last dimension on."""
    assert in_dims[0] is not None
    return call(b.movedim(in_dims[0], 0), power), 0


def _vmap_powers(call: Operator, info: Any, in_dims: InDims, offset: Tensor, sign: int) -> tuple[Tensor, int | None]:
    return call(offset, sign), in_dims[0]


def _no_gradient(ctx: Any, grad: Tensor) -> tuple[None, None]:
    return None, None


powers_of_two = operator(
    "powers_of_two(Tensor offset, int sign) -> Tensor",
    _powers,
    lambda offset, sign: torch.empty_like(offset, dtype=torch.float32),
    lambda ctx, inputs, output: None,
    _no_gradient,
    _vmap_powers,
)
"""2^(sign·offset) as float32; an offset beyond ±126 is refused."""

times_powers = operator(
    "times_powers(Tensor b, Tensor power) -> Tensor",
    _scaled,
    lambda b, power: torch.empty_like(b),
    _setup_context,
    _backward,
    _vmap,
)
"""b times powers of two that broadcast to it; refused where that is not exact."""


def token_powers(a: Tensor, dims: tuple[int, ...]) -> Tensor:
    """2^−e with e = ⌊log2 max|a|⌋ over some dimensions, which are kept as 1; 1 for tokens that are zero or not finite.

    a·2^−e is exact but for what is smaller than 2^−126 of the token's largest magnitude. −126 ≤ e ≤ 126.
    """
    return powers_of_tokens(a, [d % a.dim() - a.dim() for d in dims])


def _of_tokens(a: Tensor, dims: Sequence[int]) -> Tensor:
    if not a.numel():
        return _one_a_token(a, dims).fill_(1.0)
    largest = a.abs().amax(tuple(dims), keepdim=True)
    exponent = (torch.frexp(largest)[1] - 1).clamp(-LARGEST, LARGEST)
    has_one = torch.isfinite(largest) & (largest > 0)
    return torch.where(has_one, ((127 - exponent) << 23).view(torch.float32), 1.0)


def _one_a_token(a: Tensor, dims: Sequence[int]) -> Tensor:
    return a.new_empty([1 if d - a.dim() in dims else size for d, size in enumerate(a.shape)])


def _vmap_tokens(call: Operator, info: Any, in_dims: InDims, a: Tensor, dims: Sequence[int]) -> tuple[Tensor, int]:
    assert in_dims[0] is not None
    return call(a.movedim(in_dims[0], 0), dims), 0


powers_of_tokens = operator(
    "token_powers(Tensor a, int[] dims) -> Tensor",
    _of_tokens,
    _one_a_token,
    lambda ctx, inputs, output: None,
    _no_gradient,
    _vmap_tokens,
)
"""See `token_powers`; dims are counted from the last on, which is −1."""


def _float(value: float | Sequence[float] | Tensor) -> Tensor:
    return torch.as_tensor(value).to(torch.float32)


def _along(x: Tensor, whole: Tensor, dim: int, name: str, batched: bool, rows: bool) -> Tensor:
    """A number, one a column, or (batched) some a column in each batch, so that it broadcasts with `whole`.

    Raises:
        ValueError: it does not.
    """
    if x.dim() == 0:
        return x
    columns = whole.shape[dim]
    if x.dim() == 1 and x.shape[0] == columns:
        shape = [1] * whole.dim()
        shape[dim] = -1
        return x.reshape(shape)
    if batched and x.dim() > 1 and x.shape[-1] in (1, columns):
        wide = x.unsqueeze(-2) if rows else x
        try:
            torch.broadcast_shapes(wide.shape, whole.shape)
        except RuntimeError:
            pass
        else:
            return wide
    kind = "an integer" if name == "offset" else "a number"
    further = ", or have the batch's dimensions before that or before 1" if batched and whole.dim() > 2 else ""
    raise ValueError(f"{name} must be {kind} or ({columns},), one a column{further}, got {tuple(x.shape)}")
