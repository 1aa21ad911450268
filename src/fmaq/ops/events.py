"""Counting what the steps of a matrix product lost."""

from __future__ import annotations

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.numerics.reference import EVENTS
from fmaq.ops.matmul import as_batches
from fmaq.ops.operands import AccumulatorLike, check, widen


class Events(dict[str, int]):
    """Counts by name; the names are attributes, too.

    `product_overflow`, `product_underflow`, `accumulator_overflow`, `accumulator_underflow`, `full_swamping` and
    `partial_swamping` of the steps, the same of the merges of chunks as `merge_…`, and the totals `steps` and `merges`.
    """

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no event {name!r}; there are {', '.join(self)}") from None


def count_events(a: Tensor, b: Tensor, acc: AccumulatorLike) -> Events:
    """How often each event happens in the steps and merges of `matmul(a, b, acc)`.

    Args:
        a, b, acc: as for `matmul`; all values finite.

    Returns:
        Events, with `steps` and `merges` as the totals.

    Raises:
        ValueError: a value is not finite, or whatever `matmul` raises.
    """
    acc = check(acc, "identity")
    for name, x in (("a", a), ("b", b)):
        if not bool(torch.isfinite(widen(x, name)).all()):
            raise ValueError(f"{name} has values that are not finite; events are those of finite sums")
    left, right, _ = as_batches(a.detach(), b.detach())
    counts = kernels.count_events(left, right, acc)
    names = [*EVENTS, *(f"merge_{event}" for event in EVENTS)]
    outputs, depth = left.shape[0] * left.shape[1] * right.shape[2], left.shape[2]
    chunks = -(-depth // (acc.chunk or max(depth, 1)))
    return Events(zip(names, counts, strict=True), steps=outputs * depth, merges=outputs * chunks)
