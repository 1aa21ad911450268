"""The operands of a product as they are multiplied: in their formats, or as the codes that an integer engine sums.

An integer engine (every int8 one) multiplies codes, sums codes, and multiplies the finished sum by the scales of both
operands. That is what a rule means by integer operands and fixed-point formats without a fraction. With any other
accumulator, values are summed: codes times their scale.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from torch import Tensor

from fmaq import ops
from fmaq.emulation.rule import Rule
from fmaq.emulation.vectors import Vector
from fmaq.numerics import Accumulator, FixedFormat


class Operands(NamedTuple):
    """What is multiplied.

    Attributes:
        tensors: the operands, quantized, or as codes.
        formats: of each, None where it stays as it was; empty where all do.
        scale: of codes: what the finished sums are multiplied by, in float64: a number, or one an output channel.
    """

    tensors: tuple[Tensor, ...]
    formats: tuple[str | None, ...] = ()
    scale: Tensor | None = None


def formats_of(rule: Rule, is_weight: tuple[bool, bool]) -> tuple[str | None, str | None]:
    """The names of both operands' formats."""
    of_first, of_second = is_weight
    return rule.weight if of_first else rule.activation, rule.weight if of_second else rule.activation


def is_integer(accumulator: Accumulator) -> bool:
    """All products and sums are integers."""
    formats = [format for format in (accumulator.format, accumulator.product) if format is not None]
    return all(isinstance(format, FixedFormat) and format.fraction == 0 for format in formats)


def sums_codes(accumulator: Accumulator | str, formats: tuple[str | None, str | None]) -> bool:
    """An integer engine: both operands are integers, and so are all products and sums."""
    if None in formats or not isinstance(accumulator, Accumulator):
        return False
    return all(name is not None and name.startswith("int") for name in formats) and is_integer(accumulator)


def by_channel(rule: Rule, is_weight: tuple[bool, bool], b: Tensor) -> bool:
    """Each output channel of the second operand has a bias or scale of its own."""
    return is_weight[1] and rule.weight_per_channel and b.dim() > 1


def needs_range(format: str) -> bool:
    """The format's bias or scale depends on how large the tensor is: it has none of its own."""
    parsed = ops.parse_tensor_format(format)
    return isinstance(parsed, int) or parsed.bias is None


def multiplied(
    rule: Rule,
    kind: str,
    operands: tuple[Tensor, Tensor],
    is_weight: tuple[bool, bool],
    options: dict[str, Any] | None,
    kept: list[Any] | None = None,
) -> Operands:
    """The operands as a rule wants them multiplied.

    Args:
        kind, operands, is_weight, options, kept: of the product, see `products.Request`.

    Raises:
        ValueError: a range of the rule does not fit its operand.
    """
    formats = formats_of(rule, is_weight)
    a, b = operands
    is_by_channel = by_channel(rule, is_weight, b)
    if sums_codes(rule.accumulator, formats):
        b_kind = kind if is_by_channel else None
        a, a_scale = _codes(a, formats[0], rule.a_max)
        b, b_scale = _once(kept, lambda: _codes(b, formats[1], rule.b_max, b_kind, options))
        return Operands((a, b), formats, a_scale * b_scale)
    if formats[0] is not None:
        a = ops.quantize(a, formats[0], amax=_tensor(rule.a_max))
    if formats[1] is not None:
        b_kind = kind if is_by_channel else None
        b = _once(kept, lambda: _quantized(b, formats[1], rule.b_max, b_kind, options))
    return Operands((a, b), formats)


def _once(kept: list[Any] | None, make: Callable[[], Any]) -> Any:
    """What is kept, made at first; without a list to keep it in, made each time."""
    if kept is None:
        return make()
    if not kept:
        kept.append(make())
    return kept[0]


def _quantized(
    x: Tensor, format: str | None, amax: Vector | None, kind: str | None, options: dict[str, Any] | None
) -> Tensor:
    """In its format; of a weight by channel, of a product of that kind."""
    assert format is not None
    if kind is None:
        return ops.quantize(x, format, amax=_tensor(amax))
    x, channel = _channels_apart(kind, x, options)
    return _together(kind, ops.quantize(x, format, channel, _tensor(amax)), options)


def _codes(
    x: Tensor, format: str | None, amax: Vector | None, kind: str | None = None, options: dict[str, Any] | None = None
) -> tuple[Tensor, Tensor]:
    """Codes and their scale; of a weight by channel, of a product of that kind, (channels,)."""
    assert format is not None
    if kind is None:
        return ops.integer_codes(x, format, amax=_tensor(amax))
    x, channel = _channels_apart(kind, x, options)
    codes, scale = ops.integer_codes(x, format, channel, _tensor(amax))
    return _together(kind, codes, options), scale.flatten()


def channel_ranges(kind: str, weight: Tensor, options: dict[str, Any] | None) -> Tensor:
    """The largest magnitude of each output channel of a product's second operand: (channels,)."""
    apart, channel = _channels_apart(kind, weight, options)
    return apart.abs().movedim(channel, 0).flatten(1).amax(1)


def _channels_apart(kind: str, weight: Tensor, options: dict[str, Any] | None) -> tuple[Tensor, int]:
    """The weight so that one dimension is that of the output channels, and which."""
    if kind.startswith("conv_transpose"):  # (C, O/groups, *kernel) as (O, C/groups, *kernel)
        groups = (options or {}).get("groups", 1)
        return weight.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1), 0
    return weight, 0 if kind.startswith(("linear", "conv")) else -1


def _together(kind: str, apart: Tensor, options: dict[str, Any] | None) -> Tensor:
    """The weight as it was, from how `_channels_apart` has it."""
    if not kind.startswith("conv_transpose"):
        return apart
    groups = (options or {}).get("groups", 1)
    return apart.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1)


def _tensor(amax: Vector | None) -> Tensor | None:
    return None if amax is None else amax.tensor
