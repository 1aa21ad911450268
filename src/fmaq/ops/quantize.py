"""Quantization of weights and activations, with a straight-through gradient.

Floats have a flexible bias (arXiv 2401.14110, section 3): the largest magnitude of the tensor is just representable.
To the nearest, ties to even, saturating; normal numbers from 2^(1−b), subnormals below with step 2^(1−b−M).
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import Tensor

from fmaq.numerics import FloatFormat, parse_format
from fmaq.ops.operands import widen

INTEGER_NAME = re.compile(r"int(\d+)")


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, format: FloatFormat | int, channel: int | None) -> Tensor:
        return _to_integers(x, format, channel) if isinstance(format, int) else _to_float(x, format, channel)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return grads[0], None, None


def parse_tensor_format(name: str | FloatFormat) -> FloatFormat | int:
    """A tensor's format: a float such as `"M4E3"` (a bias in the name fixes it), or the bits of `"int8"`.

    Raises:
        TypeError, ValueError: neither, or a float with values above float32's.
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
        ValueError: `format` names none, or has values above float32's; or x has no dimension `channel`.
    """
    parsed = parse_tensor_format(format)
    x = widen(x, "x")
    if channel is not None and not -x.dim() <= channel < x.dim():
        raise ValueError(f"channel must be a dimension of x {tuple(x.shape)}, got {channel}")
    return x if x.numel() == 0 else _StraightThrough.apply(x, parsed, channel)


def _largest(x: Tensor, channel: int | None) -> Tensor:
    """The largest finite magnitude, of the tensor or of each slice along `channel`, broadcastable to x."""
    magnitude = x.abs()
    if not bool(torch.isfinite(magnitude.amax())):
        magnitude = torch.where(torch.isfinite(magnitude), magnitude, 0.0)
    if channel is None:
        return magnitude.amax()
    others = [d for d in range(x.dim()) if d != channel % x.dim()]
    return magnitude.amax(others, keepdim=True) if others else magnitude


def _power(exponent: Tensor) -> Tensor:
    """2^exponent, exactly, from −126 to 127."""
    return ((exponent.to(torch.int32) + 127) << 23).view(torch.float32)


def _to_float(x: Tensor, format: FloatFormat, channel: int | None) -> Tensor:
    top = torch.frexp(_largest(x, channel))[1] - 1  # ⌊log2 max|x|⌋
    if format.bias is not None:
        top = torch.full_like(top, 2**format.exponent - 1 - format.bias)
    lowest = top + 2 - 2**format.exponent - format.mantissa
    if int(lowest.min()) < -126 or int(top.max()) > 126:
        return _to_float_in_double(x, format.mantissa, top, lowest)
    first_normal, step = _power(top + 2 - 2**format.exponent), _power(lowest)
    limit = _power(top) * (2 - 2.0**-format.mantissa)
    dropped = 23 - format.mantissa
    bits = x.view(torch.int32)
    if dropped:
        bits = (bits + (2 ** (dropped - 1) - 1) + ((bits >> dropped) & 1)) & (-1 << dropped)
    subnormal = torch.round(x / step) * step
    rounded = torch.where(x.abs() < first_normal, subnormal, bits.view(torch.float32))
    return torch.where(torch.isfinite(x), rounded.clamp(-limit, limit), x)


def _to_float_in_double(x: Tensor, mantissa: int, top: Tensor, lowest: Tensor) -> Tensor:
    """The same where a step or a limit is not a normal float32: slower."""
    wide = x.double()
    exponent = torch.maximum(torch.frexp(wide)[1] - 1 - mantissa, lowest)
    step = torch.ldexp(torch.ones_like(wide), exponent)
    limit = torch.ldexp(torch.full_like(top, 2 - 2.0**-mantissa, dtype=torch.float64), top)
    rounded = (torch.round(wide / step) * step).clamp(-limit, limit)
    return torch.where(torch.isfinite(x), rounded, wide).float()


def _to_integers(x: Tensor, bits: int, channel: int | None) -> Tensor:
    scale = _largest(x, channel).double() / (2 ** (bits - 1) - 1)
    scale = torch.where(scale == 0, 1.0, scale)
    rounded = torch.round(x.double() / scale) * scale
    return torch.where(torch.isfinite(x), rounded, x).float()
