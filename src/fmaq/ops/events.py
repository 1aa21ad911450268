"""Counting what the steps of a matrix product lost, and how large its products and partial sums are."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fmaq import kernels
from fmaq.kernels.histograms import LOWEST
from fmaq.numerics import Accumulator
from fmaq.numerics.reference import EVENTS
from fmaq.ops.matmul import as_batches
from fmaq.ops.operands import AccumulatorLike, check, widen
from fmaq.ops.uncompiled import uncompiled


class Events(dict[str, int]):
    """Counts by name; the names are attributes, too.

    `product_overflow`, `product_underflow`, `accumulator_overflow`, `accumulator_underflow`, `full_swamping` and
    `partial_swamping` of the steps, the same of the merges as `merge_…`, and the totals `steps` and `merges`. Merges
    are those of all levels, each judged by the level that makes it.
    """

    def __getattr__(self, name: str) -> int:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"there is no event {name!r}; there are {', '.join(self)}") from None


@uncompiled
def count_events(a: Tensor, b: Tensor, acc: AccumulatorLike) -> Events:
    """How often each event happens in the steps and merges of `matmul(a, b, acc)`.

    Args:
        a, b, acc: as for `matmul`; all values finite.

    Returns:
        Events, with `steps` and `merges` as the totals.

    Raises:
        ValueError: a value is not finite, or whatever `matmul` raises.
    """
    acc, left, right = _finite_operands(a, b, acc)
    return _events(left, right, acc)


@uncompiled
def count_events_by_rows(a: Tensor, b: Tensor, acc: AccumulatorLike, rows: int) -> list[Events]:
    """`count_events` of each block of `rows` rows of the output, in order; the last may be smaller.

    Args:
        a: (M, K). b: (K, N).

    Raises:
        ValueError: as `count_events`; and for operands of other dimensions, or fewer than one row.
    """
    if a.dim() != 2 or b.dim() != 2 or rows < 1:
        raise ValueError(
            f"events by rows take two matrices and at least 1 row a block, got a {tuple(a.shape)}, b {tuple(b.shape)} "
            f"and rows={rows}"
        )
    acc, left, right = _finite_operands(a, b, acc)
    return [_events(block, right, acc) for block in left.split(rows, 1)]


class Exponents(NamedTuple):
    """How many products, and how many partial sums, have which exponent; None is that of zeros.

    The lowest exponent that is told apart is −160; what is below counts as that.
    """

    products: dict[int | None, int]
    sums: dict[int | None, int]


@uncompiled
def count_exponents(a: Tensor, b: Tensor, acc: AccumulatorLike) -> Exponents:
    """The exponents ⌊log2|·|⌋ of Q_prod(x·w) and of the sum after each step of `matmul(a, b, acc)`, with their counts.

    Args:
        a, b, acc: as for `count_events`.
    """
    acc, left, right = _finite_operands(a, b, acc)
    return Exponents(*map(_by_exponent, kernels.count_exponents(left, right, acc)))


def _by_exponent(bins: np.ndarray) -> dict[int | None, int]:
    exponents = [None, *range(LOWEST, LOWEST + len(bins) - 1)]
    return {exponent: int(count) for exponent, count in zip(exponents, bins, strict=True) if count}


def _events(left: Tensor, right: Tensor, acc: Accumulator) -> Events:
    counts = kernels.count_events(left, right, acc)
    names = [*EVENTS, *(f"merge_{event}" for event in EVENTS)]
    outputs, depth = left.shape[0] * left.shape[1] * right.shape[2], left.shape[2]
    return Events(zip(names, counts, strict=True), steps=outputs * depth, merges=outputs * acc.merges(depth))


def _finite_operands(a: Tensor, b: Tensor, acc: AccumulatorLike) -> tuple[Accumulator, Tensor, Tensor]:
    parsed = check(acc, "identity")
    for name, x in (("a", a), ("b", b)):
        if not bool(torch.isfinite(widen(x, name)).all()):
            raise ValueError(f"{name} has values that are not finite; events are those of finite sums")
    left, right, _ = as_batches(widen(a.detach(), "a"), widen(b.detach(), "b"))
    return parsed, left, right
