"""Convolutions with a low bit-width accumulator, and their transposed forms.

A dot product runs over (channel, kernel depth, row, column), the order of `weight.flatten(1)`; padding takes part as
zeros.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmaq import kernels
from fmaq.kernels import Geometry
from fmaq.ops.columns import Columns, Gain, Offset
from fmaq.ops.estimators import conv_gradients, straight_conv, wanted
from fmaq.ops.operands import AccumulatorLike, widen
from fmaq.ops.operators import SCHEMA, InDims, Operator, Summation, described, examples_in_front, operator, summation

Size = int | Sequence[int]


def _image_empty(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    out = _geometry(*options[:4]).out(x.shape[2:], weight.shape[2:])
    return x.new_empty(x.shape[0], weight.shape[0], *out, dtype=torch.float32)


def _geometry(stride: Sequence[int], padding: Sequence[int], dilation: Sequence[int], groups: int) -> Geometry:
    return Geometry(tuple(stride), tuple(padding), tuple(dilation), groups)


def _where(geometry: Geometry) -> tuple[Any, ...]:
    """A geometry as an operator takes it."""
    return list(geometry.stride), list(geometry.padding), list(geometry.dilation), geometry.groups


def _convolved(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    accumulator, seed, *_ = options[4:]
    return kernels.conv(x, weight, described(accumulator, seed), _geometry(*options[:4]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, *where = inputs[:6]
    ctx.geometry, ctx.how = _geometry(*where), Summation(*inputs[6:])
    ctx.save_for_backward(x, weight)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    (x, weight), how, geometry, (of_x, of_weight, *_) = ctx.saved_tensors, ctx.how, ctx.geometry, ctx.needs_input_grad
    grad_x, grad_weight = None, None
    if how.estimator != "identity":
        options = how.accumulator, how.seed, *_where(geometry), how.estimator, of_x, of_weight
        grad_x, grad_weight = wanted(conv_gradients(x, weight, grad, *options), (of_x, of_weight))
    elif how.backward is None:
        grad_x, grad_weight = straight_conv(x, weight, grad, (of_x, of_weight), geometry)
    else:
        summed = Summation(how.backward, how.backward_seed)
        if of_x:
            grad_x = _accumulated_grad_x(x, weight, grad, summed, geometry)
        if of_weight:
            grad_weight = _accumulated_grad_weight(x, weight, grad, summed, geometry)
    return grad_x, grad_weight, None, None, None, None, *(None for _ in how)


def _vmap(call: Operator, info: Any, in_dims: InDims, x: Tensor, weight: Tensor, *options: Any) -> tuple[Tensor, int]:
    """More images where the weight is shared, else one convolution after the other."""
    at_x, at_weight = in_dims[:2]
    if at_weight is None and at_x is not None:
        x = x.movedim(at_x, 0)
        return call(x.flatten(0, 1), weight, *options).unflatten(0, x.shape[:2]), 0
    x, weight = examples_in_front(info, in_dims, x, weight)
    return torch.stack([call(x[i], weight[i], *options) for i in range(info.batch_size)]), 0


convolution = operator(
    "convolution(Tensor x, Tensor weight, int[] stride, int[] padding, int[] dilation, int groups, "
    f"{SCHEMA}) -> Tensor",
    _convolved,
    _image_empty,
    _setup_context,
    _backward,
    _vmap,
)
"""(N, C, *spatial) with (O, C/groups, *kernel), where its windows lie, and a `Summation`."""


def _accumulated_grad_x(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    summed: Summation,
    geometry: Geometry,
) -> Tensor:
    """The gradient of x, summed in an accumulator: the transposed convolution of the output's gradient."""
    stuffed, dilation = _zero_stuffed(grad, geometry.stride), geometry.dilation
    spans = [d * (k - 1) for k, d in zip(weight.shape[2:], dilation, strict=True)]
    margins = [span - p for span, p in zip(spans, geometry.padding, strict=True)]
    sizes = zip(x.shape[2:], stuffed.shape[2:], margins, spans, strict=True)
    extra = [size - have - 2 * margin + span for size, have, margin, span in sizes]  # that no window of stride saw
    pads = [p for m, e in zip(reversed(margins), reversed(extra), strict=True) for p in (m, m + e)]
    flipped = _flipped(weight, geometry.groups)
    image, around = _symmetric(stuffed, flipped, pads, dilation)
    transposed = Geometry((1,) * len(dilation), around, dilation, geometry.groups)
    return convolution(image, flipped, *_where(transposed), *summed)


def _accumulated_grad_weight(
    x: Tensor,
    weight: Tensor,
    grad: Tensor,
    summed: Summation,
    geometry: Geometry,
) -> Tensor:
    """The gradient of the weight, summed in an accumulator over (image, position).

    It is the convolution of x, whose images are its channels, with the output's gradient; stride and dilation trade
    places.
    """
    images = x.unflatten(1, (geometry.groups, weight.shape[1])).movedim(0, 2)  # (groups, C/groups, N, *spatial)
    channels = images.transpose(0, 1).flatten(1, 2)  # (C/groups, groups·N, *spatial)
    traded = replace(geometry, stride=geometry.dilation, dilation=geometry.stride)
    found = convolution(channels, grad.transpose(0, 1), *_where(traded), *summed)
    for d, size in enumerate(weight.shape[2:], 2):
        found = found.narrow(d, 0, size)  # what lies behind belongs to no tap
    return found.transpose(0, 1)


def _per_dimension(value: Size, name: str, dims: int, least: int) -> tuple[int, ...]:
    """One integer a spatial dimension."""
    values = (value,) * dims if isinstance(value, int) else tuple(value)
    if len(values) == 1:
        values *= dims
    if len(values) != dims or any(not isinstance(v, int) or isinstance(v, bool) or v < least for v in values):
        raise ValueError(f"{name} must be an integer of at least {least}, or {dims} of them, got {value!r}")
    return values


def _padding(
    padding: Size | str, kernel: Sequence[int], dilation: tuple[int, ...], stride: tuple[int, ...]
) -> list[int]:
    """Padding as F.pad takes it: (before, after) a dimension, the last one first."""
    if isinstance(padding, str):
        if padding not in ("same", "valid"):
            raise ValueError(f'padding must be a number, "same" or "valid", got {padding!r}')
        if padding == "same" and any(s != 1 for s in stride):
            raise ValueError(f'padding="same" needs stride 1, got {stride}')
        totals = [d * (k - 1) if padding == "same" else 0 for k, d in zip(kernel, dilation, strict=True)]
        pairs = [(total // 2, total - total // 2) for total in totals]
    else:
        pairs = [(p, p) for p in _per_dimension(padding, "padding", len(kernel), 0)]
    return [p for pair in reversed(pairs) for p in pair]


def _check_dimensions(x: Tensor, weight: Tensor, dims: int) -> None:
    if x.dim() not in (dims + 1, dims + 2) or weight.dim() != dims + 2:
        raise ValueError(
            f"a convolution over {dims} dimension(s) takes x of {dims + 1} or {dims + 2} and a weight of {dims + 2}, "
            f"got x {tuple(x.shape)} and weight {tuple(weight.shape)}"
        )


def _check_shapes(x: Tensor, weight: Tensor, bias: Tensor | None, dims: int, groups: int) -> None:
    _check_dimensions(x, weight, dims)
    channels, outputs = x.shape[-dims - 1], weight.shape[0]
    if groups < 1 or channels % groups or outputs % groups or weight.shape[1] != channels // groups:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} in {groups} group(s): it must be "
            f"(outputs, channels / groups, *kernel), outputs and channels multiples of groups"
        )
    if weight.numel() == 0 and weight.shape[1]:
        raise ValueError(f"weight {tuple(weight.shape)} has no outputs or an empty kernel")
    if bias is not None and widen(bias, "bias").shape != (outputs,):
        raise ValueError(f"bias must be ({outputs},), got {tuple(bias.shape)}")


def _symmetric(x: Tensor, weight: Tensor, pads: list[int], dilation: tuple[int, ...]) -> tuple[Tensor, tuple[int, ...]]:
    """The image and its padding, a number a dimension; what is not the same on both sides is applied to the image.

    Args:
        pads: as F.pad takes it.
    """
    if pads[::2] != pads[1::2] or min(pads) < 0:
        x, pads = F.pad(x, pads), [0] * len(pads)
    padding = tuple(reversed(pads[::2]))
    for size, k, d, p in zip(x.shape[2:], weight.shape[2:], dilation, padding, strict=True):
        if size + 2 * p < d * (k - 1) + 1:
            raise ValueError(
                f"kernel {tuple(weight.shape[2:])} with dilation {dilation} is larger than the padded input "
                f"{tuple(s + 2 * q for s, q in zip(x.shape[2:], padding, strict=True))}"
            )
    return x, padding


def as_convolution(
    kind: str,
    x: Tensor,
    weight: Tensor,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    output_padding: Size = 0,
) -> tuple[Tensor, Tensor, Geometry]:
    """The image, weight and geometry of the convolution that "conv2d" or a transposed one is.

    Args:
        kind: "conv1d" … "conv3d", "conv_transpose1d" … "conv_transpose3d".
        x, weight, stride, padding, dilation, groups, output_padding: as that function takes them.

    Raises:
        ValueError: sizes that do not fit.
    """
    dims = int(kind[-2])
    if "transpose" in kind:
        if isinstance(padding, str):
            raise ValueError(f"a transposed convolution takes padding as a number a dimension, got {padding!r}")
        return _stuffed(dims, x, weight, stride, padding, output_padding, groups, dilation)
    _check_shapes(x, weight, None, dims, groups)
    stride, dilation = _per_dimension(stride, "stride", dims, 1), _per_dimension(dilation, "dilation", dims, 1)
    pads = _padding(padding, weight.shape[2:], dilation, stride)
    x, padding = _symmetric(x if x.dim() == dims + 2 else x[None], weight, pads, dilation)
    return x, weight, Geometry(stride, padding, dilation, groups)


def _conv(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size | str,
    dilation: Size,
    groups: int,
    how: Summation,
    columns: Columns,
) -> Tensor:
    x, weight = widen(x, "x"), widen(weight, "weight")
    _check_shapes(x, weight, bias, dims, groups)
    image, weight, geometry = as_convolution(f"conv{dims}d", x, weight, stride, padding, dilation, groups)
    y = _scaled(image, weight, geometry, how, columns)
    return _finish(y, bias, is_batched=x.dim() == dims + 2)


def _scaled(image: Tensor, weight: Tensor, geometry: Geometry, how: Summation, columns: Columns) -> Tensor:
    """A convolution with its offset, gain and shift; an image is a token."""
    image, powers = columns.by_token(image, tuple(range(1, image.dim())))
    y = convolution(image, columns.scale(weight, 0), *_where(geometry), *how)
    return columns.finish(y if powers is None else y / powers, 1)


def _finish(y: Tensor, bias: Tensor | None, is_batched: bool) -> Tensor:
    if bias is not None:
        y = y + widen(bias, "bias").reshape(-1, *[1] * (y.dim() - 2))
    return y if is_batched else y[0]


def conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv1d` whose dot products are summed in `acc`; see `conv2d`."""
    how = summation(acc, estimator, backward)
    return _conv(1, x, weight, bias, stride, padding, dilation, groups, how, Columns(offset, gain, shift, per_token))


def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv2d` whose dot products are summed in `acc`; the bias is added afterwards in float32.

    Args:
        x: (N, C, H, W) or (C, H, W), float32, bfloat16, float16 or float8, any strides.
        weight: (O, C/groups, kH, kW). bias: (O,), or None.
        acc, estimator, backward: see `matmul`; offset, gain and shift, too: of all output channels, or one each (O,).
        per_token: every image has an exponent of its own, see `matmul`.
        stride, dilation, groups: as torch's. padding: a number a dimension, `"same"` or `"valid"`.

    Returns:
        (N, O, H', W') or (O, H', W') in float32. A non-finite operand makes every output that depends on it NaN.

    Raises:
        TypeError: an operand's dtype.
        ValueError: shapes or sizes that do not fit; the message names them.
    """
    how = summation(acc, estimator, backward)
    return _conv(2, x, weight, bias, stride, padding, dilation, groups, how, Columns(offset, gain, shift, per_token))


def conv3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    stride: Size = 1,
    padding: Size | str = 0,
    dilation: Size = 1,
    groups: int = 1,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv3d` whose dot products are summed in `acc`; see `conv2d`."""
    how = summation(acc, estimator, backward)
    return _conv(3, x, weight, bias, stride, padding, dilation, groups, how, Columns(offset, gain, shift, per_token))


def _conv_transpose(
    dims: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
    how: Summation,
    columns: Columns,
) -> Tensor:
    x, weight = widen(x, "x"), widen(weight, "weight")
    image, weight, geometry = _stuffed(dims, x, weight, stride, padding, output_padding, groups, dilation)
    _check_shapes(image, weight, bias, dims, groups)
    y = _scaled(image, weight, geometry, how, columns)
    return _finish(y, bias, is_batched=x.dim() == dims + 2)


def _stuffed(
    dims: int,
    x: Tensor,
    weight: Tensor,
    stride: Size,
    padding: Size,
    output_padding: Size,
    groups: int,
    dilation: Size,
) -> tuple[Tensor, Tensor, Geometry]:
    """A transposed convolution as the convolution of the zero-stuffed image; see `as_convolution`."""
    stride, dilation = _per_dimension(stride, "stride", dims, 1), _per_dimension(dilation, "dilation", dims, 1)
    padding = _per_dimension(padding, "padding", dims, 0)
    extra = _per_dimension(output_padding, "output_padding", dims, 0)
    if any(e >= max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise ValueError(f"output_padding {extra} must be smaller than stride {stride} or dilation {dilation}")
    _check_dimensions(x, weight, dims)
    if groups < 1 or weight.shape[0] % groups or weight.shape[0] != x.shape[-dims - 1]:
        raise ValueError(
            f"weight {tuple(weight.shape)} does not fit x {tuple(x.shape)} in {groups} group(s): it must be "
            f"(channels, outputs / groups, *kernel), channels a multiple of groups"
        )
    sizes = zip(x.shape[-dims:], weight.shape[2:], stride, padding, dilation, extra, strict=True)
    out = tuple((n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, p, d, e in sizes)
    if min(out) < 1 or x.shape[-dims:].numel() == 0:
        raise ValueError(
            f"x {tuple(x.shape)} and weight {tuple(weight.shape)} with stride {stride}, padding {padding} and dilation "
            f"{dilation} leave no output: its size would be {out}"
        )
    flipped = _flipped(weight, groups)
    _check_shapes(x, flipped, None, dims, groups)
    stuffed = _zero_stuffed(x if x.dim() == dims + 2 else x[None], stride)
    margins = [d * (k - 1) - p for k, d, p in zip(weight.shape[2:], dilation, padding, strict=True)]
    pads = [q for m, e in zip(reversed(margins), reversed(extra), strict=True) for q in (m, m + e)]
    image, around = _symmetric(stuffed, flipped, pads, dilation)
    return image, flipped, Geometry((1,) * dims, around, dilation, groups)


def _flipped(weight: Tensor, groups: int) -> Tensor:
    """(C, O/groups, *kernel) as the weight (O, C/groups, *kernel) of the equivalent convolution."""
    spatial = list(range(2, weight.dim()))
    grouped = weight.flip(spatial).reshape(groups, weight.shape[0] // groups, *weight.shape[1:])
    return grouped.transpose(1, 2).reshape(groups * weight.shape[1], weight.shape[0] // groups, *weight.shape[2:])


def _zero_stuffed(x: Tensor, stride: tuple[int, ...]) -> Tensor:
    """x with stride − 1 zeros between neighbours."""
    if all(s == 1 for s in stride):
        return x
    sizes = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    stuffed = x.new_zeros(*x.shape[:2], *sizes)
    grid = (slice(None), slice(None), *(slice(None, None, s) for s in stride))
    stuffed[grid] = x
    return stuffed


def conv_transpose1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv_transpose1d` whose dot products are summed in `acc`; see `conv_transpose2d`."""
    how, columns = summation(acc, estimator, backward), Columns(offset, gain, shift, per_token)
    return _conv_transpose(1, x, weight, bias, stride, padding, output_padding, groups, dilation, how, columns)


def conv_transpose2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv_transpose2d` whose dot products are summed in `acc`.

    It is the convolution of the zero-stuffed input with the flipped kernel, and its dot products run in that order.

    Args:
        x: (N, C, H, W) or (C, H, W). weight: (C, O/groups, kH, kW). bias: (O,), or None.
        The others as in torch and `conv2d`.

    Returns:
        (N, O, H', W') or (O, H', W') in float32.
    """
    how, columns = summation(acc, estimator, backward), Columns(offset, gain, shift, per_token)
    return _conv_transpose(2, x, weight, bias, stride, padding, output_padding, groups, dilation, how, columns)


def conv_transpose3d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    acc: AccumulatorLike,
    stride: Size = 1,
    padding: Size = 0,
    output_padding: Size = 0,
    groups: int = 1,
    dilation: Size = 1,
    estimator: str = "identity",
    offset: Offset = None,
    gain: Gain = None,
    shift: Gain = None,
    backward: AccumulatorLike | None = None,
    per_token: bool = False,
) -> Tensor:
    """`torch.nn.functional.conv_transpose3d` whose dot products are summed in `acc`; see `conv_transpose2d`."""
    how, columns = summation(acc, estimator, backward), Columns(offset, gain, shift, per_token)
    return _conv_transpose(3, x, weight, bias, stride, padding, output_padding, groups, dilation, how, columns)
