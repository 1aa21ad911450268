"""Matrix products with a low bit-width accumulator: `matmul`, like torch's, and `linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.numerics import Accumulator
from fmaq.ops.columns import Columns, Gain, Offset
from fmaq.ops.estimators import STRAIGHT, Estimate, MatmulGradients, straight_matmul, unpacked
from fmaq.ops.operands import AccumulatorLike, check, widen
from fmaq.ops.uncompiled import uncompiled


class _BatchedProduct(torch.autograd.Function):
    """(B, M, K) times (B, K, N)."""

    @staticmethod
    def forward(a: Tensor, b: Tensor, acc: Accumulator, how: Estimate) -> Tensor:
        return kernels.matmul(a, b, acc)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        a, b, ctx.acc, ctx.how = inputs
        wants_a, wants_b, *_ = ctx.needs_input_grad
        if not ctx.how.looks_inside:
            a, b = (a if wants_b else None), (b if wants_a else None)
        ctx.save_for_backward(a, b)

    @staticmethod
    @uncompiled
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        (a, b), (grad,), wanted = ctx.saved_tensors, grads, ctx.needs_input_grad[:2]
        if ctx.how.looks_inside:
            found = MatmulGradients.apply(a, b, grad, ctx.acc, ctx.how.estimator, wanted)
            return *unpacked(found, wanted), None, None
        if ctx.how.backward is None:
            return *straight_matmul(a, b, grad, wanted), None, None
        grad_a = _BatchedProduct.apply(grad, b.mT, ctx.how.backward, STRAIGHT) if wanted[0] else None
        grad_b = _BatchedProduct.apply(a.mT, grad, ctx.how.backward, STRAIGHT) if wanted[1] else None
        return grad_a, grad_b, None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, acc: Accumulator, how: Estimate
    ) -> tuple[Tensor, int]:
        """One more dimension of the batch."""
        a, b = (
            x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            for x, at in ((a, in_dims[0]), (b, in_dims[1]))
        )
        y = _BatchedProduct.apply(a.flatten(0, 1), b.flatten(0, 1), acc, how)
        return y.unflatten(0, a.shape[:2]), 0


@uncompiled
def matmul(
    a: Tensor,
    b: Tensor,
    acc: AccumulatorLike,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.matmul` whose dot products are summed in `acc`, chunk by chunk (arXiv 2401.14110).

    Args:
        a: (…, M, K) or (K,), float32, bfloat16, float16 or float8, any strides.
        b: (…, K, N) or (K,); the leading dimensions broadcast with a's.
        acc: an Accumulator, or what `Accumulator.parse` takes.
        estimator: of the gradients; `"identity"` is straight through. `"immediate/of"` and `"immediate/diff"` stop at
            steps that overflow, or are lost; `"recursive/of"` and `"recursive/diff"` also at later ones.
        backward: an accumulator for the two gradient products of `"identity"`, a·grad and grad·b; None is float32.
            With an offset they are those of the product with b·2^c: a column's gradient enters them times 2^−c.
        offset: c, an integer or one a column (N,): the product with b·2^c, times 2^−c, all exact.
        gain: a number, or one a column (N,), that multiplies the finished sums in float32.
        shift: a number, or one a column (N,), that is then added.
            Of batched products all three may have the dimensions of the batch in front: (heads, 1), or (heads, N).
        per_token: every row of a has an exponent of its own, e = ⌊log2 max|row|⌋: the product with row·2^−e, times 2^e.
            In hardware that is an exponent to be found at run time.

    Returns:
        float32 of the shape that torch.matmul gives. A non-finite operand makes every output that depends on it NaN.

    Raises:
        TypeError: an operand's dtype.
        ValueError: shapes that do not fit, a template or a format that float32 cannot hold, an unknown estimator, or
            `backward` beside an estimator other than identity.
    """
    acc, how = check(acc, estimator), Estimate.parse(estimator, backward)
    columns = Columns(offset, gain, shift, per_token)
    if columns.is_empty:
        left, right, shape = as_batches(a, b)
        return _BatchedProduct.apply(left, right, acc, how).reshape(shape)
    a, b = widen(a, "a"), widen(b, "b")
    wide = b[:, None] if b.dim() == 1 else b
    a, powers = columns.by_token(a, (-1,)) if a.dim() else (a, None)
    left, right, shape = as_batches(a, columns.scale(wide, -1, batched=True) if b.dim() else b)
    y = _BatchedProduct.apply(left, right, acc, how).reshape(shape)
    y = columns.finish(y if powers is None else y / powers, -1, batched=True, rows=a.dim() > 1)
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


@uncompiled
def linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.linear` whose dot products are summed in `acc`; the bias is added afterwards in float32.

    Args:
        x: (…, K). weight: (N, K) or (K,). bias: (N,), or None.
        acc, estimator, offset, gain, shift, backward, per_token: see `matmul`.

    Returns:
        (…, N) in float32, or (…) with a weight of (K,).

    Raises:
        TypeError, ValueError: as `matmul`; and for a bias of another shape.
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
    y = matmul(x, weight.t(), acc, estimator, offset, gain, shift, backward, per_token)
    return y if bias is None else y + bias
