"""What the tests of `fmaq.ops` share: accumulators, operands, and the reference over batches and windows."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from hypothesis import strategies as st
from torch import Tensor

from fmaq.numerics import Accumulator, reference

ACCUMULATORS = tuple(
    Accumulator(name)
    for name in (
        "paper12",
        "M4E3b3 product=M4E3b4 chunk=3",
        "M7E4b10 product=M7E4b12 chunk=4 rounding=nearest_even",
        "M3E4b8 chunk=3 rounding=stochastic seed=5",
        "I10f4 chunk=None",
        "M4E4b8h product=M4E4b10h chunk=4 outer=(M7E5b14 rounding=nearest_even chunk=2 outer=fp32)",
        "M4E4b8 product=M4E4b10 chunk=3 rounding=nearest_away",
        "I10f4 product=I8f4 chunk=3 rounding=half_up outer=I14f4",
    )
)
accumulators = st.sampled_from(ACCUMULATORS)
EXACT = Accumulator("M23E7b64", chunk=None)
"""Wide enough that gradients of small cases hardly differ from float32's."""


def values(rng: np.random.Generator, shape: Sequence[int], scale: float = 1.0) -> Tensor:
    """float32 numbers of a few bits, some of them zero."""
    x = rng.normal(size=tuple(shape)) * scale * (rng.random(tuple(shape)) > 0.1)
    return torch.from_numpy(np.asarray(x, np.float32))


def spoiled(rng: np.random.Generator, x: Tensor, count: int = 1) -> Tensor:
    """A copy with some values that are not finite."""
    x = x.clone(memory_format=torch.contiguous_format)
    for _ in range(count if x.numel() else 0):
        x.view(-1)[int(rng.integers(x.numel()))] = float(rng.choice([np.nan, np.inf, -np.inf]))
    return x


def same(actual: Tensor, expected: np.ndarray) -> None:
    """Equal in shape, value by value, NaN with NaN; and float32."""
    assert actual.dtype == torch.float32
    np.testing.assert_array_equal(actual.detach().numpy(), np.asarray(expected).astype(np.float32))


def reference_matmul(a: Tensor, b: Tensor, acc: Accumulator) -> np.ndarray:
    """`torch.matmul` by the reference, one pair of matrices after the other; rows are counted over the whole batch."""
    x, y = a.detach().float().numpy(), b.detach().float().numpy()
    wide_x, wide_y = (x[None] if x.ndim == 1 else x), (y[:, None] if y.ndim == 1 else y)
    batch = np.broadcast_shapes(wide_x.shape[:-2], wide_y.shape[:-2])
    m, n = wide_x.shape[-2], wide_y.shape[-1]
    wide_x, wide_y = (np.broadcast_to(v, (*batch, *v.shape[-2:])) for v in (wide_x, wide_y))
    result = np.zeros((*batch, m, n))
    for position, index in enumerate(np.ndindex(*batch)):
        result[index] = reference.matmul(wide_x[index], wide_y[index], acc, rows=np.arange(m) + position * m)
    if x.ndim == 1:
        result = result[..., 0, :]
    return result[..., 0] if y.ndim == 1 else result


def reference_conv(
    x: Tensor,
    weight: Tensor,
    acc: Accumulator,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int,
) -> np.ndarray:
    """A convolution by the reference, over the rows of an unfolded image: (image, position) times (channel, kernel)."""
    image = np.pad(x.detach().float().numpy(), [(0, 0), (0, 0), *padding])
    filters = weight.detach().float().numpy()
    kernel = filters.shape[2:]
    out = [
        (size - d * (k - 1) - 1) // s + 1
        for size, k, s, d in zip(image.shape[2:], kernel, stride, dilation, strict=True)
    ]
    windows = np.zeros((image.shape[0], *out, image.shape[1], *kernel), np.float32)
    for at in itertools.product(*(range(k) for k in kernel)):
        picked = tuple(
            slice(i * d, i * d + (o - 1) * s + 1, s) for i, d, o, s in zip(at, dilation, out, stride, strict=True)
        )
        windows[(..., slice(None), *at)] = np.moveaxis(image[(slice(None), slice(None), *picked)], 1, -1)
    per_group, inputs = filters.shape[0] // groups, filters.shape[1]
    parts = []
    for g in range(groups):
        channels = (slice(g * inputs, (g + 1) * inputs), *[slice(None)] * len(kernel))
        rows = windows[(..., *channels)].reshape(image.shape[0] * int(np.prod(out)), inputs * int(np.prod(kernel)))
        # The reference counts columns from 0, so a group's are those of a product that has all the earlier ones too.
        columns = np.zeros((rows.shape[1], (g + 1) * per_group), np.float32)
        columns[:, g * per_group :] = filters[g * per_group : (g + 1) * per_group].reshape(per_group, rows.shape[1]).T
        parts.append(reference.matmul(rows, columns, acc)[:, g * per_group :])
    return np.moveaxis(np.concatenate(parts, 1).reshape(image.shape[0], *out, filters.shape[0]), -1, 1)


def torch_gradients(outputs: Tensor, operands: Sequence[Tensor], seed: Tensor) -> list[Tensor]:
    """Gradients of the operands for one gradient of the output."""
    return list(torch.autograd.grad(outputs, list(operands), seed))
