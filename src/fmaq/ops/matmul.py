"""Matrix products with a low bit-width accumulator: `matmul`, like torch's, and `linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.numerics import Accumulator
from fmaq.ops.operands import AccumulatorLike, check, full_precision, widen


class _BatchedProduct(torch.autograd.Function):
    """(B, M, K) times (B, K, N); the gradients are ordinary float32 products (`identity`)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, acc: Accumulator) -> Tensor:
        return kernels.matmul(a, b, acc)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        a, b = ctx.saved_tensors
        with full_precision():
            grad_a = torch.matmul(grads[0], b.mT) if ctx.needs_input_grad[0] else None
            grad_b = torch.matmul(a.mT, grads[0]) if ctx.needs_input_grad[1] else None
        return grad_a, grad_b, None


def matmul(a: Tensor, b: Tensor, acc: AccumulatorLike, estimator: str = "identity") -> Tensor:
    """`torch.matmul` whose dot products are summed in `acc`, chunk by chunk (arXiv 2401.14110).

    Args:
        a: (…, M, K) or (K,), float32, bfloat16, float16 or float8, any strides.
        b: (…, K, N) or (K,); the leading dimensions broadcast with a's.
        acc: an Accumulator, or what `Accumulator.parse` takes.
        estimator: of the gradients; `"identity"` is straight through.

    Returns:
        float32 of the shape that torch.matmul gives. A non-finite operand makes every output that depends on it NaN.

    Raises:
        TypeError: an operand's dtype.
        ValueError: shapes that do not fit, a template or a format that float32 cannot hold, an unknown estimator.
        NotImplementedError: an estimator that has no kernel yet.
    """
    acc = check(acc, estimator)
    shapes = f"a {tuple(a.shape)} and b {tuple(b.shape)}"
    a, b = widen(a, "a"), widen(b, "b")
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"matmul takes tensors of at least one dimension, got {shapes}")
    left, right = (a[None] if a.dim() == 1 else a), (b[:, None] if b.dim() == 1 else b)
    if left.shape[-1] != right.shape[-2]:
        raise ValueError(f"cannot multiply {shapes}: a's last dimension and b's last but one must be equal")
    y = _batched(left, right, acc, shapes)
    if a.dim() == 1:
        y = y.squeeze(-2)
    return y.squeeze(-1) if b.dim() == 1 else y


def _batched(a: Tensor, b: Tensor, acc: Accumulator, shapes: str) -> Tensor:
    """Two matrices, or stacks of them; a single b takes all of a's rows at once."""
    (m, depth), n = a.shape[-2:], b.shape[-1]
    if b.dim() == 2:
        rows = a.reshape(1, a.shape[:-1].numel(), depth)
        return _BatchedProduct.apply(rows, b[None], acc).reshape(*a.shape[:-1], n)
    try:
        batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    except RuntimeError:
        raise ValueError(f"cannot multiply {shapes}: their leading dimensions do not broadcast") from None
    a = a.expand(*batch, m, depth).reshape(batch.numel(), m, depth)
    b = b.expand(*batch, depth, n).reshape(batch.numel(), depth, n)
    return _BatchedProduct.apply(a, b, acc).reshape(*batch, m, n)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, acc: AccumulatorLike, estimator: str = "identity") -> Tensor:
    """`torch.nn.functional.linear` whose dot products are summed in `acc`; the bias is added afterwards in float32.

    Args:
        x: (…, K). weight: (N, K) or (K,). bias: (N,), or None.
        acc, estimator: see `matmul`.

    Returns:
        (…, N) in float32.
    """
    if not isinstance(weight, Tensor) or weight.dim() not in (1, 2):
        raise ValueError(f"weight must be (N, K) or (K,), got {tuple(getattr(weight, 'shape', ()))}")
    if x.dim() == 0 or x.shape[-1] != weight.shape[-1]:
        raise ValueError(
            f"cannot apply weight {tuple(weight.shape)} to x {tuple(x.shape)}: their last dimensions must be equal"
        )
    y = matmul(x, weight.t(), acc, estimator)
    return y if bias is None else y + widen(bias, "bias")
