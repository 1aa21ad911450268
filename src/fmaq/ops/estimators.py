"""How gradients of a product are computed: straight through, or by an estimator that looks inside the accumulation.

Straight through (`identity`), they are two products, of float32 or of an accumulator of their own. The others are
computed by `kernels.matmul_gradients` and `kernels.conv_gradients`; a further derivative of theirs is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.kernels import Geometry
from fmaq.ops.operands import full_precision
from fmaq.ops.operators import InDims, Operator, described, examples_in_front, operator

Wanted = tuple[bool, bool]
Found = tuple[Tensor | None, Tensor | None]
Mapped = tuple[tuple[Tensor, ...], tuple[int, ...]]


def wanted(found: tuple[Tensor, Tensor], which: Wanted) -> Found:
    """Both gradients, with None for one that is not wanted."""
    first, second = (gradient if is_wanted else None for gradient, is_wanted in zip(found, which, strict=True))
    return first, second


def straight_matmul(a: Tensor, b: Tensor, grad: Tensor, wanted: Wanted) -> Found:
    """The gradients of `identity` in float32."""
    with full_precision():
        return (torch.matmul(grad, b.mT) if wanted[0] else None, torch.matmul(a.mT, grad) if wanted[1] else None)


def straight_conv(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    wanted: Wanted,
    geometry: Geometry,
) -> Found:
    """The gradients of `identity` in float32."""
    with full_precision():
        where = geometry.stride, geometry.padding, geometry.dilation
        no_more = [0] * len(geometry.stride)
        of_x, of_weight, _ = torch.ops.aten.convolution_backward(
            grad, x, weight, None, *where, False, no_more, geometry.groups, [*wanted, False]
        )
    return of_x, of_weight


def _marked(found: Found, marks: tuple[Tensor, Tensor]) -> Found:
    """NaN where an output that is NaN has a part in a gradient."""
    first, second = (None if g is None else g.masked_fill(m, torch.nan) for g, m in zip(found, marks, strict=True))
    return first, second


def _of_matmul(
    a: Tensor, b: Tensor, grad: Tensor, accumulator: str, seed: int, estimator: str, of_a: bool, of_b: bool
) -> tuple[Tensor, Tensor]:
    finite_a, finite_b = torch.isfinite(a), torch.isfinite(b)
    is_finite = bool(finite_a.all() and finite_b.all())
    if not is_finite:
        a, b = torch.where(finite_a, a, 0.0), torch.where(finite_b, b, 0.0)
    found = kernels.matmul_gradients(a, b, grad, described(accumulator, seed), estimator, of_a, of_b)
    found = straight_matmul(a, b, grad, (of_a, of_b)) if found is None else found
    if not is_finite:
        spoiled = ~(finite_a.all(-1)[:, :, None] & finite_b.all(-2)[:, None, :]) & (grad != 0)
        found = _marked(found, (spoiled.any(2)[:, :, None], spoiled.any(1)[:, None, :]))
    return _or_empty(found, grad)


def _of_conv(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    accumulator: str,
    seed: int,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    estimator: str,
    of_x: bool,
    of_weight: bool,
) -> tuple[Tensor, Tensor]:
    geometry, which = Geometry(tuple(stride), tuple(padding), tuple(dilation), groups), (of_x, of_weight)
    finite_x, finite_weight = torch.isfinite(x), torch.isfinite(weight)
    is_finite = bool(finite_x.all() and finite_weight.all())
    if not is_finite:
        spoiled = kernels.spoiled_outputs(x, weight, geometry) & (grad != 0)
        x, weight = torch.where(finite_x, x, 0.0), torch.where(finite_weight, weight, 0.0)
    found = kernels.conv_gradients(x, weight, grad, described(accumulator, seed), estimator, geometry, *which)
    found = straight_conv(x, weight, grad, which, geometry) if found is None else found
    if not is_finite:
        seen, _ = straight_conv(x, torch.ones_like(weight), spoiled.float(), (True, False), geometry)
        assert seen is not None
        filters = spoiled.movedim(1, 0).flatten(1).any(1).reshape(-1, *[1] * (weight.dim() - 1))
        found = _marked(found, (seen > 0, filters))
    return _or_empty(found, grad)


def _or_empty(found: Found, grad: Tensor) -> tuple[Tensor, Tensor]:
    """An operator gives tensors: an empty one for a gradient that is not wanted."""
    first, second = (grad.new_empty(0) if g is None else g.contiguous() for g in found)
    return first, second


def _like_operands(first: Tensor, second: Tensor, grad: Tensor, *options: Any) -> tuple[Tensor, Tensor]:
    return first.new_empty(first.shape if options[-2] else 0), second.new_empty(second.shape if options[-1] else 0)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
    ctx.estimator = inputs[-3]


def _no_derivative(ctx: Any, *grads: Tensor) -> Any:
    raise RuntimeError(
        f'gradients by the estimator "{ctx.estimator}" have no derivative; use "identity" for second derivatives'
    )


def _vmap_matmul(call: Operator, info: Any, in_dims: InDims, *inputs: Any) -> Mapped:
    """One more dimension of the batch."""
    tensors, options = examples_in_front(info, in_dims, *inputs[:3]), inputs[3:]
    found = call(*(x.flatten(0, 1) for x in tensors), *options)
    shape = tensors[0].shape[:2]
    is_wanted = options[-2:]
    return tuple(
        g.unflatten(0, shape) if w else g.expand(info.batch_size, 0) for g, w in zip(found, is_wanted, strict=True)
    ), (0, 0)


def _vmap_conv(call: Operator, info: Any, in_dims: InDims, *inputs: Any) -> Mapped:
    """One after the other: every example has a gradient of the weight of its own."""
    tensors, options = examples_in_front(info, in_dims, *inputs[:3]), inputs[3:]
    single = [call(*(x.select(0, i) for x in tensors), *options) for i in range(info.batch_size)]
    return tuple(torch.stack(gradients) for gradients in zip(*single, strict=True)), (0, 0)


matmul_gradients = operator(
    "matmul_gradients(Tensor a, Tensor b, Tensor grad, str accumulator, int seed, str estimator, bool of_a, bool of_b)"
    " -> (Tensor, Tensor)",
    _of_matmul,
    _like_operands,
    _setup_context,
    _no_derivative,
    _vmap_matmul,
)
"""Those of (B, M, K) times (B, K, N), by an estimator other than identity; empty where not wanted."""

conv_gradients = operator(
    "convolution_gradients(Tensor x, Tensor weight, Tensor grad, str accumulator, int seed, int[] stride, "
    "int[] padding, int[] dilation, int groups, str estimator, bool of_x, bool of_weight) -> (Tensor, Tensor)",
    _of_conv,
    _like_operands,
    _setup_context,
    _no_derivative,
    _vmap_conv,
)
"""Those of a convolution, of x and of the weight."""
