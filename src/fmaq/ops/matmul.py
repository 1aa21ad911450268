"""Matrix products with a low bit-width accumulator: `matmul`, like torch's, and `linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.numerics import Accumulator
from fmaq.ops.columns import Columns, Gain, Offset
from fmaq.ops.operands import AccumulatorLike, check, full_precision, widen


class _BatchedProduct(torch.autograd.Function):
    """(B, M, K) times (B, K, N); the gradients are ordinary float32 products (`identity`)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, acc: Accumulator) -> Tensor:
        return kernels.matmul(a, b, acc)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, _ = inputs
        wants_a, wants_b, _ = ctx.needs_input_grad
        ctx.save_for_backward(a if wants_b else None, b if wants_a else None)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        with full_precision():
            grad_a = torch.matmul(grads[0], b.mT) if ctx.needs_input_grad[0] else None
            grad_b = torch.matmul(a.mT, grads[0]) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, acc: Accumulator) -> tuple[Tensor, int]:
        """One more dimension of the batch."""
        a, b = (
            x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            for x, at in ((a, in_dims[0]), (b, in_dims[1]))
        )
        y = _BatchedProduct.apply(a.flatten(0, 1), b.flatten(0, 1), acc)
        return y.unflatten(0, a.shape[:2]), 0


def matmul(
    a: Tensor,
    b: Tensor,
    acc: AccumulatorLike,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
) -> Tensor:
    """`torch.matmul` whose dot products are summed in `acc`, chunk by chunk (arXiv 2401.14110).

    Args:
        a: (…, M, K) or (K,), float32, bfloat16, float16 or float8, any strides.
        b: (…, K, N) or (K,); the leading dimensions broadcast with a's.
        acc: an Accumulator, or what `Accumulator.parse` takes.
        estimator: of the gradients; `"identity"` is straight through.
        offset: c, an integer or one a column (N,): the product with b·2^c, times 2^−c, all exact.
        gain: a number, or one a column (N,), that multiplies the finished sums in float32.
        shift: a number, or one a column (N,), that is then added.
            Of batched products all three may have the dimensions of the batch in front: (heads, 1), or (heads, N).

    Returns:
        float32 of the shape that torch.matmul gives. A non-finite operand makes every output that depends on it NaN.

    Raises:
        TypeError: an operand's dtype.
        ValueError: shapes that do not fit, a template or a format that float32 cannot hold, an unknown estimator.
        NotImplementedError: an estimator that has no kernel yet.
    """
    acc = check(acc, estimator)
    columns = Columns(offset, gain, shift)
    if columns.is_empty:
        left, right, shape = as_batches(a, b)
        return _BatchedProduct.apply(left, right, acc).reshape(shape)
    a, b = widen(a, "a"), widen(b, "b")
    wide = b[:, None] if b.dim() == 1 else b
    left, right, shape = as_batches(a, columns.scale(wide, -1, batched=True) if b.dim() else b)
    y = _BatchedProduct.apply(left, right, acc).reshape(shape)
    y = columns.finish(y, -1, batched=True, rows=a.dim() > 1)
    return y[..., 0] if b.dim() == 1 else y


def as_batches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """The operands as (B, M, K) and (B, K, N) in float32, and the shape of the product; see `matmul`.

    A single b takes all of a's rows at once. A row's position for stochastic rounding, counted over the whole batch, is
    the same either way.
    """
    a, b = widen(a, "a"), widen(b, "b")
    shapes = f"a {tuple(a.shape)} and b {tuple(b.shape)}"
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"matmul takes tensors of at least one dimension, got {shapes}")
    left, right = (a[None] if a.dim() == 1 else a), (b[:, None] if b.dim() == 1 else b)
    (m, depth), n = left.shape[-2:], right.shape[-1]
    if depth != right.shape[-2]:
        raise ValueError(f"cannot multiply {shapes}: a's last dimension and b's last but one must be equal")
    try:
        batch = torch.broadcast_shapes(left.shape[:-2], right.shape[:-2])
    except RuntimeError:
        raise ValueError(f"cannot multiply {shapes}: their leading dimensions do not broadcast") from None
    shape = (*batch, *((m,) if a.dim() > 1 else ()), *((n,) if b.dim() > 1 else ()))
    is_single = right.shape[:-2].numel() == 1
    count, rows = (1, batch.numel() * m) if is_single else (batch.numel(), m)
    left = left.expand(*batch, m, depth).reshape(count, rows, depth)
    right = right.reshape(1, depth, n) if is_single else right.expand(*batch, depth, n).reshape(count, depth, n)
    return left, right, shape


def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
) -> Tensor:
    """`torch.nn.functional.linear` whose dot products are summed in `acc`; the bias is added afterwards in float32.

    Args:
        x: (…, K). weight: (N, K) or (K,). bias: (N,), or None.
        acc, estimator, offset, gain, shift: see `matmul`.

    Returns:
        (…, N) in float32, or (…) with a weight of (K,).

    Raises:
        TypeError, ValueError, NotImplementedError: as `matmul`; and for a bias of another shape.
    """
    x, weight = widen(x, "x"), widen(weight, "weight")
    if weight.dim() not in (1, 2):
        raise ValueError(f"weight must be (N, K) or (K,), got {tuple(weight.shape)}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"cannot apply weight {tuple(weight.shape)} to x {tuple(x.shape)}: their last dimensions must be equal"
        )
    if bias is not None:
        bias = widen(bias, "bias")
        if bias.shape != weight.shape[:-1]:
            raise ValueError(f"bias must be {tuple(weight.shape[:-1])}, got {tuple(bias.shape)}")
    y = matmul(x, weight.t(), acc, estimator, offset, gain, shift)
    return y if bias is None else y + bias
