"""Quantization of weights and activations, with a straight-through gradient.

Floats have a flexible bias (arXiv 2401.14110, section 3): the largest magnitude of the tensor is just representable.
To the nearest, ties to even, saturating; normal numbers from 2^(1−b), subnormals below with step 2^(1−b−M).

The largest magnitude is the tensor's own (dynamic: a value then depends on all others, of other samples and of padding,
too), or one that is given (static: a constant of the hardware).
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fmaq import kernels
from fmaq.numerics import FloatFormat, parse_format
from fmaq.numerics.formats import meant_by
from fmaq.ops.operands import widen
from fmaq.ops.operators import InDims, Operator, operator

AbsoluteMaximum = float | Sequence[float] | Tensor | None

INTEGER_NAME = re.compile(r"int(\d+)")
LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Of a floating-point number: integers of its size, bits behind the point, bias of the exponent."""


def _quantized(x: Tensor, format: str, channel: int | None, amax: Tensor | None) -> Tensor:
    parsed = _parsed(format)
    if channel is None and isinstance(parsed, FloatFormat):
        y = _by_kernel(x, parsed, amax)
        if y is not None:
            return y
    finite, largest = _finite(x, channel, amax)
    y = _to_integers(finite, parsed, largest) if isinstance(parsed, int) else _to_float(finite, parsed, largest)
    return y if finite is x else torch.where(torch.isfinite(x), y, x)


def _straight_through(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    return grad, None, None, None


def _vmap(
    call: Operator,
    info: Any,
    in_dims: InDims,
    x: Tensor,
    format: str,
    channel: int | None,
    amax: Tensor | None,
) -> tuple[Tensor, int]:
    """Every example, or every channel of one, is a slice with a bias or scale of its own, unless it is given."""
    x, slices, restore = _as_slices(x, in_dims, channel, amax)
    if slices is None:
        return call(x, format, None, amax), 0
    return restore(call(slices, format, 0, _repeated(amax, x))), 0


quantized = operator(
    "quantize(Tensor x, str format, int? channel, Tensor? amax) -> Tensor",
    _quantized,
    lambda x, format, channel=None, amax=None: torch.empty_like(x),
    lambda ctx, inputs, output: None,
    _straight_through,
    _vmap,
)


def _coded(x: Tensor, bits: int, channel: int | None, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    finite, largest = _finite(x, channel, amax)
    scale = _scale(largest, bits)
    y = _nearest_codes(finite, bits, scale).float()
    return (y if finite is x else torch.where(torch.isfinite(x), y, x)), scale


def _like_codes(x: Tensor, bits: int, channel: int | None = None, amax: Tensor | None = None) -> tuple[Tensor, Tensor]:
    shape = [] if channel is None else [n if d == channel % x.dim() else 1 for d, n in enumerate(x.shape)]
    return torch.empty_like(x), x.new_empty(shape, dtype=torch.float64)


def _keep_scale(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(output[1])


def _by_scale(ctx: Any, grad: Tensor, *_: Any) -> tuple[Tensor, None, None, None]:
    """A code's value is the code times the scale: the gradient is divided by it."""
    (scale,) = ctx.saved_tensors
    return (grad.double() / scale).float(), None, None, None


def _vmap_codes(
    call: Operator,
    info: Any,
    in_dims: InDims,
    x: Tensor,
    bits: int,
    channel: int | None,
    amax: Tensor | None,
) -> tuple[tuple[Tensor, Tensor], tuple[int, int]]:
    """As `_vmap`; the scales have the examples in front."""
    x, slices, restore = _as_slices(x, in_dims, channel, amax)
    if slices is None:
        codes, scale = call(x, bits, None, amax)
        return (codes, scale.expand(x.shape[0])), (0, 0)
    codes, scale = call(slices, bits, 0, _repeated(amax, x))
    codes = restore(codes)
    if channel is None:
        return (codes, scale.reshape(x.shape[0])), (0, 0)
    shape = [1] * x.dim()
    shape[0], at = x.shape[0], channel % (x.dim() - 1) + 1
    shape[at] = x.shape[at]
    return (codes, scale.reshape(shape)), (0, 0)


coded = operator(
    "integer_codes(Tensor x, int bits, int? channel, Tensor? amax) -> (Tensor, Tensor)",
    _coded,
    _like_codes,
    _keep_scale,
    _by_scale,
    _vmap_codes,
)


def _as_slices(
    x: Tensor, in_dims: InDims, channel: int | None, amax: Tensor | None
) -> tuple[Tensor, Tensor | None, Callable[[Tensor], Tensor]]:
    """Examples in front; as slices that each have a range of their own, and the way back; None: one range is given."""
    assert in_dims[0] is not None
    x = x.movedim(in_dims[0], 0)
    if channel is None:
        return x, None if amax is not None else x, lambda y: y
    at = channel % (x.dim() - 1) + 1
    slices = x.movedim(at, 1)
    return x, slices.flatten(0, 1), lambda y: y.unflatten(0, slices.shape[:2]).movedim(1, at)


def _repeated(amax: Tensor | None, x: Tensor) -> Tensor | None:
    """The ranges of channels, for each example."""
    return None if amax is None else amax.repeat(x.shape[0])


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
        how = 'write a float like "M4E3" or "M4E3b5", or "int8"'
        raise ValueError(f"{name!r} is not a tensor format; {how}{meant_by(name)}")
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


def quantize(x: Tensor, format: str | FloatFormat, channel: int | None = None, amax: AbsoluteMaximum = None) -> Tensor:
    """x on the grid of a float with a flexible bias, or of symmetric integers; the gradient passes straight through.

    It passes where a value saturates, too: with a fixed bias or range, weights beyond the largest value may drift;
    clamp them, or let the range follow them.

    Args:
        x: any shape; float32, or a narrower float, widened first.
        format: `"M4E3"` (bias by the largest magnitude), `"M4E3b5"`, or `"int8"`, `"int4"` (multiples of
            max|x| / (2^(bits−1) − 1)).
        channel: the dimension along which every slice has its own bias or scale; None is one for the tensor.
        amax: static: the largest magnitude that bias or scale are made for, in place of max|x|, so that a value does
            not depend on the others; a number, or one a slice with `channel`.

    Returns:
        float32 of x's shape. Non-finite values stay what they are and do not count for the largest.

    Raises:
        TypeError: x is not a tensor of a supported dtype, or `format` no name and no FloatFormat.
        ValueError: `format` names none, is half-unit, or has values above float32's; x has no dimension `channel`;
            or `amax` does not fit, or is given beside a bias.
    """
    (name, _, has_bias), x = _checked(format), widen(x, "x")
    _check_channel(x, channel)
    if amax is not None and has_bias:
        raise ValueError(f"{name} has a bias, which says how large values may be: amax must be None")
    if x.numel() == 0:
        return x
    given = _given_range(x, channel, amax)
    store = kernels.store_of(x)
    if store is None:
        return quantized(x, name, channel, given)
    return store.once(x, ("quantized", name, channel, _plain(given)), lambda: quantized(x, name, channel, given))


_parsed = functools.lru_cache(maxsize=4096)(parse_tensor_format)


def _checked(format: str | FloatFormat) -> tuple[str, int | None, bool]:
    """A tensor's format by its name, the bits of an integer, and whether it has a bias; a constant to torch.compile."""
    parsed = _parsed(format) if isinstance(format, str) else parse_tensor_format(format)
    if isinstance(parsed, int):
        return f"int{parsed}", parsed, False
    return str(parsed), None, parsed.bias is not None


_checked._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's mark, without its import


def integer_codes(
    x: Tensor, format: str, channel: int | None = None, amax: AbsoluteMaximum = None
) -> tuple[Tensor, Tensor]:
    """x as what an integer engine multiplies: codes, and the scale that a code's value is a multiple of.

    `codes * scale` is what `quantize` makes of x, up to float32's rounding; so is the gradient.

    Args:
        x, channel, amax: see `quantize`.
        format: `"int8"`, `"int4"`; codes are from −(2^(bits−1) − 1) to 2^(bits−1) − 1.

    Returns:
        Codes, whole numbers in float32 of x's shape, and the scale, amax / (2^(bits−1) − 1) in float64: a number, or
        with `channel` one a slice, of as many dimensions as x.

    Raises:
        TypeError, ValueError: as `quantize`; or the format is no integer.
    """
    (_, bits, _), x = _checked(format), widen(x, "x")
    if bits is None:
        raise ValueError(f'codes are integers, and {format!r} is a float; write "int8"')
    _check_channel(x, channel)
    if x.numel() == 0:
        return x, x.new_ones((), dtype=torch.float64)
    given = _given_range(x, channel, amax)
    store = kernels.store_of(x)
    if store is None:
        return coded(x, bits, channel, given)
    return store.once(x, ("coded", bits, channel, _plain(given)), lambda: coded(x, bits, channel, given))


def _plain(amax: Tensor | None) -> Any:
    """What two equal ranges have in common."""
    return None if amax is None else tuple(amax.flatten().tolist())


def _check_channel(x: Tensor, channel: int | None) -> None:
    if channel is not None and not -x.dim() <= channel < x.dim():
        raise ValueError(f"channel must be a dimension of x {tuple(x.shape)}, got {channel}")


def _given_range(x: Tensor, channel: int | None, amax: AbsoluteMaximum) -> Tensor | None:
    """`amax` as float32, () or (slices,); None: to be taken from x.

    Raises:
        ValueError: it does not fit x.
    """
    if amax is None:
        return None
    given = torch.as_tensor(amax).detach().to(torch.float32)
    shapes = [()] if channel is None else [(), (x.shape[channel],)]
    if tuple(given.shape) not in shapes:
        wanted = "a number" if channel is None else f"a number, or ({x.shape[channel]},), one a slice"
        raise ValueError(f"amax must be {wanted}, got {tuple(given.shape)}")
    return given if channel is None else given.expand(x.shape[channel])


def _by_kernel(x: Tensor, format: FloatFormat, amax: Tensor | None) -> Tensor | None:
    """All of x in two passes; None where torch has to do it."""
    largest = kernels.largest_magnitude(x)
    if not math.isfinite(largest):
        return None
    if amax is not None:
        largest = amax.item()
        if not (math.isfinite(largest) and largest >= 0):
            return None
    top = math.frexp(largest)[1] - 1 if format.bias is None else 2**format.exponent - 1 - format.bias
    smallest = top + 2 - 2**format.exponent
    if not (_fits_kernel(format, smallest, top)):
        return None
    return kernels.round_to_float(x, format.mantissa, smallest, top)


def _fits_kernel(format: FloatFormat, smallest: int, top: int) -> bool:
    """A unit in the last place is a normal float32, and the largest value is one."""
    return smallest - format.mantissa >= -126 and smallest <= 100 and top <= 127


def _finite(x: Tensor, channel: int | None, amax: Tensor | None) -> tuple[Tensor, Tensor]:
    """x with zeros for what is not finite, and the largest magnitude, of all or by slice, broadcastable to x."""
    largest = _largest(x, channel)
    if not bool(torch.isfinite(largest).all()):
        x = torch.where(torch.isfinite(x), x, 0.0)
        largest = _largest(x, channel)
    if amax is not None:
        if not bool((torch.isfinite(amax) & (amax >= 0)).all()):
            raise ValueError(f"amax must be finite and at least 0, got {amax.tolist()}")
        largest = amax.expand(largest.shape) if channel is None else amax.reshape(largest.shape)
    return x, largest


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
    if largest.dim() == 0 and _fits_kernel(format, int(smallest), int(top)):
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
    """x to the nearest multiple of the scale: in float64 up to the last rounding, as the reference."""
    scale = _scale(largest, bits)
    return _nearest_codes(x, bits, scale).mul_(scale).float()


def _scale(largest: Tensor, bits: int) -> Tensor:
    """largest / (2^(bits−1) − 1) in float64; 1 where all is zero."""
    scale = largest.double() / (2 ** (bits - 1) - 1)
    return torch.where(scale == 0, 1.0, scale)


def _nearest_codes(x: Tensor, bits: int, scale: Tensor) -> Tensor:
    """x / scale to the nearest integer, ties to even, saturated: float64."""
    most = 2 ** (bits - 1) - 1
    return x.double().div_(scale).round_().clamp_(-most, most)
