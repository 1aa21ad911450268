"""How gradients of a product are computed: straight through, or by an estimator that looks inside the accumulation.

Straight through (`identity`), they are two products, of float32 or of an accumulator of their own. The others are
computed by `kernels.matmul_gradients` and `kernels.conv_gradients`; a further derivative of theirs is refused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.kernels import Geometry
from fmaq.numerics import Accumulator
from fmaq.ops.operands import AccumulatorLike, check, full_precision

Wanted = tuple[bool, bool]
Found = tuple[Tensor | None, Tensor | None]


@dataclass(frozen=True)
class Estimate:
    """How a product's gradients are computed.

    Attributes:
        estimator: one of `numerics.reference.ESTIMATORS`.
        backward: accumulator of the two products of `identity`; None is float32.
    """

    estimator: str = "identity"
    backward: Accumulator | None = None

    @classmethod
    def parse(cls, estimator: str, backward: AccumulatorLike | None) -> Estimate:
        """Checked.

        Raises:
            ValueError: an unknown estimator, an accumulator that is not fit for tensors, or one beside an estimator
                other than identity.
        """
        if backward is None:
            return cls(estimator)
        accumulator = check(backward, estimator)
        check_backward(estimator)
        return cls(estimator, accumulator)

    @property
    def looks_inside(self) -> bool:
        """Gradients depend on the steps of the accumulation."""
        return self.estimator != "identity"


STRAIGHT = Estimate()


def check_backward(estimator: str) -> None:
    """Refuse an accumulator for the gradients of an estimator other than identity.

    Raises:
        ValueError: it is not identity.
    """
    if estimator != "identity":
        raise ValueError(
            f'backward is the accumulator of the two gradient products of "identity"; estimator "{estimator}" sums its '
            f"gradients in float32. Give one of the two"
        )


class _Gradients(torch.autograd.Function):
    """Gradients as a function of the operands and of the gradient of the output, without derivatives of its own."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        ctx.estimator = inputs[4]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise RuntimeError(
            f'gradients by the estimator "{ctx.estimator}" have no derivative; use "identity" for second derivatives'
        )


class MatmulGradients(_Gradients):
    """Those of (B, M, K) times (B, K, N), as many as are wanted."""

    @staticmethod
    def forward(
        a: Tensor, b: Tensor, grad: Tensor, acc: Accumulator, estimator: str, wanted: Wanted
    ) -> tuple[Tensor, ...]:
        finite_a, finite_b = torch.isfinite(a), torch.isfinite(b)
        if not bool(finite_a.all() and finite_b.all()):
            a, b = torch.where(finite_a, a, 0.0), torch.where(finite_b, b, 0.0)
            spoiled = ~(finite_a.all(-1)[:, :, None] & finite_b.all(-2)[:, None, :]) & (grad != 0)
            found = _matmul_gradients(a, b, grad, acc, estimator, wanted)
            return _as_wanted(_marked(found, (spoiled.any(2)[:, :, None], spoiled.any(1)[:, None, :])))
        return _as_wanted(_matmul_gradients(a, b, grad, acc, estimator, wanted))

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], a: Tensor, b: Tensor, grad: Tensor, *options: Any
    ) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One more dimension of the batch."""
        tensors = [
            x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
            for x, at in zip((a, b, grad), in_dims, strict=False)
        ]
        found = MatmulGradients.apply(*(x.flatten(0, 1) for x in tensors), *options)
        return tuple(g.unflatten(0, tensors[0].shape[:2]) for g in found), (0,) * len(found)


class ConvGradients(_Gradients):
    """Those of a convolution, of x and of the weight, as many as are wanted."""

    @staticmethod
    def forward(
        x: Tensor,
        weight: Tensor,
        grad: Tensor,
        acc: Accumulator,
        estimator: str,
        wanted: Wanted,
        geometry: Geometry,
    ) -> tuple[Tensor, ...]:
        finite_x, finite_weight = torch.isfinite(x), torch.isfinite(weight)
        if not bool(finite_x.all() and finite_weight.all()):
            spoiled = kernels.spoiled_outputs(x, weight, geometry) & (grad != 0)
            x, weight = torch.where(finite_x, x, 0.0), torch.where(finite_weight, weight, 0.0)
            found = _conv_gradients(x, weight, grad, acc, estimator, wanted, geometry)
            seen, _ = straight_conv(x, torch.ones_like(weight), spoiled.float(), (True, False), geometry)
            assert seen is not None
            filters = spoiled.movedim(1, 0).flatten(1).any(1).reshape(-1, *[1] * (weight.dim() - 1))
            return _as_wanted(_marked(found, (seen > 0, filters)))
        return _as_wanted(_conv_gradients(x, weight, grad, acc, estimator, wanted, geometry))

    @staticmethod
    def vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        """One after the other: every example has a gradient of the weight of its own."""
        tensors, options = inputs[:3], inputs[3:]
        single = [
            ConvGradients.apply(
                *(x if at is None else x.select(at, i) for x, at in zip(tensors, in_dims, strict=False)), *options
            )
            for i in range(info.batch_size)
        ]
        found = tuple(torch.stack(gradients) for gradients in zip(*single, strict=True))
        return found, (0,) * len(found)


def unpacked(found: tuple[Tensor, ...], wanted: Wanted) -> Found:
    """Of the gradients that are wanted, both, with None for one that is not."""
    left = iter(found)
    first, second = (next(left) if is_wanted else None for is_wanted in wanted)
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


def _matmul_gradients(a: Tensor, b: Tensor, grad: Tensor, acc: Accumulator, estimator: str, wanted: Wanted) -> Found:
    found = kernels.matmul_gradients(a, b, grad, acc, estimator, *wanted)
    return straight_matmul(a, b, grad, wanted) if found is None else found


def _conv_gradients(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    acc: Accumulator,
    estimator: str,
    wanted: Wanted,
    geometry: Geometry,
) -> Found:
    found = kernels.conv_gradients(x, weight, grad, acc, estimator, geometry, *wanted)
    return straight_conv(x, weight, grad, wanted, geometry) if found is None else found


def _marked(found: Found, marks: tuple[Tensor, Tensor]) -> Found:
    """NaN where an output that is NaN has a part in a gradient."""
    first, second = (None if g is None else g.masked_fill(m, torch.nan) for g, m in zip(found, marks, strict=True))
    return first, second


def _as_wanted(found: Found) -> tuple[Tensor, ...]:
    return tuple(g for g in found if g is not None)
