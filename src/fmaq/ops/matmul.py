"""Matrix products with a low bit-width accumulator: `matmul`, like torch's, and `linear`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.ops.columns import Columns, Gain, Offset
from fmaq.ops.estimators import matmul_gradients, straight_matmul, wanted
from fmaq.ops.operands import AccumulatorLike, widen
from fmaq.ops.operators import SCHEMA, InDims, Operator, Summation, described, examples_in_front, operator, summation


def _empty(a: Tensor, b: Tensor, *summation: Any) -> Tensor:
    return a.new_empty(a.shape[0], a.shape[1], b.shape[2], dtype=torch.float32)


def _product(a: Tensor, b: Tensor, accumulator: str, seed: int, *_: Any) -> Tensor:
    return kernels.matmul(a, b, described(accumulator, seed))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    a, b, ctx.how = *inputs[:2], Summation(*inputs[2:])
    wants_a, wants_b, *_ = ctx.needs_input_grad
    if ctx.how.estimator == "identity":
        a, b = (a if wants_b else None), (b if wants_a else None)
    ctx.save_for_backward(a, b)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (a, b), how, (of_a, of_b, *_) = ctx.saved_tensors, ctx.how, ctx.needs_input_grad
    if how.estimator != "identity":
        found = matmul_gradients(a, b, grad, how.accumulator, how.seed, how.estimator, of_a, of_b)
        grad_a, grad_b = wanted(found, (of_a, of_b))
    elif how.backward is None:
        grad_a, grad_b = straight_matmul(a, b, grad, (of_a, of_b))
    else:
        summed = Summation(how.backward, how.backward_seed)
        grad_a = batched_matmul(grad, b.mT, *summed) if of_a else None
        grad_b = batched_matmul(a.mT, grad, *summed) if of_b else None
    return grad_a, grad_b, *(None for _ in how)


def _vmap(call: Operator, info: Any, in_dims: InDims, a: Tensor, b: Tensor, *summation: Any) -> tuple[Tensor, int]:
    """One more dimension of the batch."""
    a, b = examples_in_front(info, in_dims, a, b)
    return call(a.flatten(0, 1), b.flatten(0, 1), *summation).unflatten(0, a.shape[:2]), 0


batched_matmul = operator(
    f"matmul(Tensor a, Tensor b, {SCHEMA}) -> Tensor", _product, _empty, _setup_context, _backward, _vmap
)
"""(B, M, K) times (B, K, N), and a `Summation`."""


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
    how = summation(acc, estimator, backward)
    columns = Columns(offset, gain, shift, per_token)
    return _multiplied(widen(a, "a"), widen(b, "b"), how, columns)


def _multiplied(a: Tensor, b: Tensor, how: Summation, columns: Columns) -> Tensor:
    """The product of two float32 tensors."""
    if columns.is_empty:
        left, right, shape = as_batches(a, b)
        return _shaped(batched_matmul(left, right, *how), shape)
    wide = b[:, None] if b.dim() == 1 else b
    a, powers = columns.by_token(a, (-1,)) if a.dim() else (a, None)
    left, right, shape = as_batches(a, columns.scale(wide, -1, batched=True) if b.dim() else b)
    y = batched_matmul(left, right, *how).reshape(shape)
    y = columns.finish(y if powers is None else y / powers, -1, batched=True, rows=a.dim() > 1)
    return y[..., 0] if b.dim() == 1 else y


def as_batches(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Float32 operands as (B, M, K) and (B, K, N), and the shape of the product; see `matmul`.

    A single b takes all of a's rows at once. A row's position for stochastic rounding, counted over the whole batch, is
    the same either way.
    """
    if a.dim() == 0 or b.dim() == 0:
        raise ValueError(f"matmul takes tensors of at least one dimension, got {_shapes(a, b)}")
    left, right = (a[None] if a.dim() == 1 else a), (b[:, None] if b.dim() == 1 else b)
    (m, depth), n = left.shape[-2:], right.shape[-1]
    if depth != right.shape[-2]:
        raise ValueError(f"cannot multiply {_shapes(a, b)}: a's last dimension and b's last but one must be equal")
    batch = left.shape[:-2]
    if right.dim() > 2:
        try:
            batch = torch.broadcast_shapes(batch, right.shape[:-2])
        except RuntimeError:
            raise ValueError(f"cannot multiply {_shapes(a, b)}: their leading dimensions do not broadcast") from None
        left = left.expand(*batch, m, depth)
    shape = (*batch, *((m,) if a.dim() > 1 else ()), *((n,) if b.dim() > 1 else ()))
    is_single = right.shape[:-2].numel() == 1
    count, rows = (1, batch.numel() * m) if is_single else (batch.numel(), m)
    if not is_single:
        right = right.expand(*batch, depth, n)
    return _shaped(left, (count, rows, depth)), _shaped(right, (count, depth, n)), shape


def _shaped(x: Tensor, shape: tuple[int, ...]) -> Tensor:
    """x in a shape: torch's own takes time even where it has it already."""
    if x.shape == shape:
        return x
    return x.unsqueeze(0) if (1, *x.shape) == shape else x.reshape(shape)


def _shapes(a: Tensor, b: Tensor) -> str:
    return f"a {tuple(a.shape)} and b {tuple(b.shape)}"


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
    y = _multiplied(x, weight.t(), summation(acc, estimator, backward), Columns(offset, gain, shift, per_token))
    return y if bias is None else y + bias
