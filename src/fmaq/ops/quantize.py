"""Quantization of weights and activations, with a straight-through gradient.

Floats have a flexible bias (arXiv 2401.14110, section 3): the largest magnitude of the tensor is just representable.
To the nearest, ties to even, saturating; normal numbers from 2^(1−b), subnormals below with step 2^(1−b−M).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.numerics import FloatFormat, parse_format
from fmaq.ops.operands import widen

INTEGER_NAME = re.compile(r"int(\d+)")
LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Of a floating-point number: integers of its size, bits behind the point, bias of the exponent."""


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, format: FloatFormat | int, channel: int | None) -> Tensor:
        largest = _largest(x, channel)
        if not bool(torch.isfinite(largest).all()):
            finite = torch.isfinite(x)
            cleared = torch.where(finite, x, 0.0)
            return torch.where(finite, _nearest(cleared, format, _largest(cleared, channel)), x)
        return _nearest(x, format, largest)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[int | None, ...], x: Tensor, format: FloatFormat | int, channel: int | None
    ) -> tuple[Tensor, int]:
        """Every example, or every channel of one, is a slice with a bias or scale of its own."""
        assert in_dims[0] is not None
        x = x.movedim(in_dims[0], 0)
        if channel is None:
            return _StraightThrough.apply(x, format, 0), 0
        at = channel % (x.dim() - 1) + 1
        slices = x.movedim(at, 1)
        y = _StraightThrough.apply(slices.flatten(0, 1), format, 0)
        return y.unflatten(0, slices.shape[:2]).movedim(1, at), 0


def parse_tensor_format(name: str | FloatFormat) -> FloatFormat | int:
    """A tensor's format: a float such as `"M4E3"` (a bias in the name fixes it), or the bits of `"int8"`.

    Raises:
        TypeError, ValueError: neither, a half-unit float, or one with values above float32's.
    """
    if isinstance(name, str) and (match := INTEGER_NAME.fullmatch(name.strip())):
        bits = int(match[1])
        if not 2 <= bits <= 24:
            raise ValueError(f"integers have 2 to 24 bits, got {name!r}")
        return bits
    try:
        format = parse_format(name)
    except ValueError:
        format = None
    if not isinstance(format, FloatFormat) or format.zero != "flag":
        raise ValueError(f'{name!r} is not a tensor format; write a float like "M4E3" or "M4E3b5", or "int8"')
    if format.half_unit:
        raise ValueError(
            f"{format} is a half-unit format: one of sums and products, whose implied half no weight and no activation "
            f'has. Write "{str(format).removesuffix("h")}"'
        )
    if format.bias is not None and format.emax > 127:
        raise ValueError(
            f"{format} has values above float32's: its largest exponent is {format.emax}, float32's 127; "
            f"its bias must be at least {2**format.exponent - 128}"
        )
    return format


def quantize(x: Tensor, format: str | FloatFormat, channel: int | None = None) -> Tensor:
    """x on the grid of a float with a flexible bias, or of symmetric integers; the gradient passes straight through.

    Args:
        x: any shape; float32, or a narrower float, widened first.
        format: `"M4E3"` (bias by the largest magnitude), `"M4E3b5"`, or `"int8"`, `"int4"` (multiples of
            max|x| / (2^(bits−1) − 1)).
        channel: the dimension along which every slice has its own bias or scale; None is one for the tensor.

    Returns:
        float32 of x's shape. Non-finite values stay what they are and do not count for the largest.

    Raises:
        TypeError: x is not a tensor of a supported dtype, or `format` no name and no FloatFormat.
        ValueError: `format` names none, is half-unit, or has values above float32's; or x has no dimension `channel`.
    """
    parsed = parse_tensor_format(format)
    x = widen(x, "x")
    if channel is not None and not -x.dim() <= channel < x.dim():
        raise ValueError(f"channel must be a dimension of x {tuple(x.shape)}, got {channel}")
    return x if x.numel() == 0 else _StraightThrough.apply(x, parsed, channel)


def _nearest(x: Tensor, format: FloatFormat | int, largest: Tensor) -> Tensor:
    return _to_integers(x, format, largest) if isinstance(format, int) else _to_float(x, format, largest)


def _largest(x: Tensor, channel: int | None) -> Tensor:
    """The largest magnitude, of the tensor or of each slice along `channel`, broadcastable to x."""
    if channel is None:
        low, high = torch.aminmax(x)
        return torch.maximum(-low, high)
    others = [d for d in range(x.dim()) if d != channel % x.dim()]
    if not others:
        return x.abs()
    return torch.maximum(-x.amin(others, keepdim=True), x.amax(others, keepdim=True))


def _to_float(x: Tensor, format: FloatFormat, largest: Tensor) -> Tensor:
    """x to the nearest value of the format, whose bias fits `largest` unless it has one. Finite numbers only."""
    top = torch.frexp(largest)[1] - 1  # ⌊log2 max|x|⌋
    if format.bias is not None:
        top = torch.full_like(top, 2**format.exponent - 1 - format.bias)
    smallest = top + 2 - 2**format.exponent  # exponent of the smallest normal number
    # float64 only where a unit in the last place is no normal float32, or a limit none at all: formats of a huge range.
    is_small = int(smallest.min()) - format.mantissa >= -126 and int(top.max()) <= 127
    if is_small and largest.dim() == 0 and int(smallest) <= 100:
        return kernels.round_to_float(x, format.mantissa, int(smallest), int(top))
    dtype = torch.float32 if is_small else torch.float64
    wide = x.to(dtype)
    lowest = _number(_power(smallest, dtype))
    limit = _number(_power(top, dtype) * (2 - 2.0**-format.mantissa))
    unit = _power_below(wide).clamp_(min=lowest).mul_(2.0**-format.mantissa)
    return torch.div(wide, unit).round_().mul_(unit).clamp_(min=-limit, max=limit).float()


def _number(x: Tensor) -> Any:
    """x, as a plain number if it has no dimensions: torch clamps by numbers several times as fast as by tensors."""
    return x.item() if x.dim() == 0 else x


def _power(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2^exponent, exactly."""
    integer, bits, bias = LAYOUT[dtype]
    return ((exponent.to(integer) + bias) << bits).view(dtype)


def _power_below(x: Tensor) -> Tensor:
    """2^⌊log2|x|⌋; zero of a zero or a subnormal number."""
    integer, bits, bias = LAYOUT[x.dtype]
    return (x.view(integer) & ((2 * bias + 1) << bits)).view(x.dtype)


def _to_integers(x: Tensor, bits: int, largest: Tensor) -> Tensor:
    """x to the nearest multiple of largest / (2^(bits−1) − 1): in float64 up to the last rounding, as the reference."""
    scale = largest.double() / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    return x.double().div_(scale).round_().mul_(scale).float()
