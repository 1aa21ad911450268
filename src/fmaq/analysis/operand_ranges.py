"""How large the operands of a product are: what static ranges of their formats are chosen by."""

from __future__ import annotations

import torch
from torch import Tensor

from fmaq.emulation.operands import by_channel, channel_ranges, formats_of, needs_range
from fmaq.emulation.products import Request
from fmaq.emulation.rule import Rule

Ranges = tuple[Tensor | None, Tensor | None]
"""Of both operands: one largest magnitude, or one an output channel; None where a format needs none."""


def largest_of_operands(request: Request, rule: Rule) -> Ranges:
    """The largest finite magnitudes of a product's operands, where their formats need one; see `fmaq.Policy.a_max`.

    An operand of zeros shows none.
    """
    found: list[Tensor | None] = []
    formats = formats_of(rule, request.is_weight)
    for position, (x, format) in enumerate(zip(request.operands, formats, strict=True)):
        if format is None or not x.numel() or not needs_range(format):
            found.append(None)
            continue
        x = x.detach().float()
        x = torch.where(torch.isfinite(x), x, 0.0)
        is_by_channel = position == 1 and by_channel(rule, request.is_weight, x)
        largest = channel_ranges(request.kind, x, request.options) if is_by_channel else x.abs().amax()
        found.append(largest if bool(largest.any()) else None)
    return found[0], found[1]


def larger_ranges(before: Ranges | None, found: Ranges) -> Ranges:
    """Of each operand the larger magnitudes; another number of channels starts anew."""
    if before is None:
        return found

    def larger(one: Tensor | None, other: Tensor | None) -> Tensor | None:
        if one is None or other is None or one.shape != other.shape:
            return one if other is None else other
        return torch.maximum(one, other)

    return larger(before[0], found[0]), larger(before[1], found[1])
