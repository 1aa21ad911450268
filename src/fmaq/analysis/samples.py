"""A part of a matrix product met in a model: some of its rows, all of its channels, and what can be done with them.

Rows and images are taken at even distances, always the same ones. A sample is a product of its own: its outputs, and
the events in them, are those that the whole product has there (stochastic rounding aside, which goes by position).

By token, a sample is of operands that are scaled by token: its sums are in units of the token's exponent.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fmaq import kernels
from fmaq.emulation.vectors import Vector
from fmaq.kernels import Geometry
from fmaq.numerics import Accumulator
from fmaq.ops.columns import Columns, Offset
from fmaq.ops.conv import as_convolution
from fmaq.ops.matmul import as_batches
from fmaq.ops.operands import widen

Index = Sequence[int]


def evenly(total: int, wanted: int) -> list[int]:
    """`wanted` of the numbers 0 … total − 1 at even distances, the first and the last among them; all if no more."""
    wanted = max(1, min(wanted, total))
    return [i * (total - 1) // max(1, wanted - 1) for i in range(wanted)] if total else []


def spread(sizes: Tensor, wanted: int) -> Tensor:
    """`wanted` indices at even distances, an eighth of them those of the largest sizes instead; all if no more."""
    largest = sizes.topk(min(wanted, len(sizes)) // 8).indices
    return torch.cat([largest, torch.tensor(evenly(len(sizes), wanted - len(largest)), dtype=torch.long)]).unique()


def _starts(depth: int, span: int, most: int) -> list[int]:
    """Where parts of a sum begin."""
    return [i * span for i in evenly(-(-depth // span), most)]


@dataclass(frozen=True)
class MatrixSample:
    """(…, M, K) times (…, K, N); the channels are the columns.

    Attributes:
        a, b: the operands, rows of a picked.
        share: of the whole product's outputs, 0 to 1.
        powers: of two, (…, M, 1), by which the rows of a are multiplied; None: not by token.
    """

    a: Tensor
    b: Tensor
    share: float
    powers: Tensor | None = None

    channel_dim = -1

    @property
    def depth(self) -> int:
        """K, the steps of one dot product."""
        return self.a.shape[-1]

    @property
    def channels(self) -> int:
        """N."""
        return self.b.shape[-1]

    @property
    def outputs(self) -> int:
        """Sums that are computed."""
        batch = torch.broadcast_shapes(self.a.shape[:-2], self.b.shape[:-2])
        return batch.numel() * self.a.shape[-2] * self.channels

    @property
    def heads(self) -> int | None:
        """The size of the last dimension of the batch, where there is one behind the first: attention's heads."""
        return self.b.shape[-3] if self.b.dim() >= 4 else None

    def exact(self) -> Tensor:
        """The sums in float32 by torch, not to be written into: (…, M, N)."""
        return self._exact

    @cached_property
    def _exact(self) -> Tensor:
        return torch.matmul(self.a, self.b)

    def emulated(self, acc: Accumulator) -> Tensor:
        """The sums in an accumulator: (…, M, N)."""
        left, right, shape = as_batches(widen(self.a, "a"), widen(self.b, "b"))
        return kernels.matmul(left, right, acc).reshape(shape)

    def parts(self, span: int, most: int) -> Iterator[Tensor]:
        """The sums of every `span` consecutive products in float32, of `most` such parts at even distances."""
        for start in _starts(self.depth, span, most):
            yield self.a[..., start : start + span] @ self.b[..., start : start + span, :]

    def count(self, acc: Accumulator) -> list[int]:
        """How often each event happens in the steps, then in the merges."""
        left, right, _ = as_batches(widen(self.a, "a"), widen(self.b, "b"))
        return kernels.count_events(left, right, acc)

    def scaled(self, offset: Vector | Offset) -> MatrixSample:
        """The same with the columns of b times 2^offset."""
        return replace(self, b=_columns(offset).scale(self.b, -1, batched=True))

    def finished(self, y: Tensor, columns: Columns) -> Tensor:
        """Sums of the scaled sample with offset, gain and shift."""
        return columns.finish(y, -1, batched=True)

    def input_power(self) -> Tensor:
        """The mean square of each of K's inputs: (K,)."""
        return self.a.double().square().flatten(0, -2).mean(0)

    def output_power(self, power: Tensor) -> Tensor:
        """The mean square of each channel, (N,), were its inputs of such mean squares independent and of mean zero."""
        return (power @ self.b.double().square()).reshape(-1, self.channels).mean(0)

    def narrowed(self, channels: Tensor) -> MatrixSample:
        """The same with some of the columns alone."""
        return replace(self, b=self.b[..., channels])

    def few(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        """(rows, K) and (K, channels) from its first matrix, fewer where it has no more."""
        a = self.a.reshape(-1, *self.a.shape[-2:])[0]
        b = self.b.reshape(-1, *self.b.shape[-2:])[0]
        return a[evenly(a.shape[0], rows)], b[:, evenly(b.shape[1], channels)]


@dataclass(frozen=True)
class ConvSample:
    """A convolution of some images, or of bands of them; the channels are the output's.

    Attributes:
        x, weight: (N, C, *spatial) and (O, C/groups, *kernel).
        share: of the whole product's outputs, 0 to 1.
        powers: of two, (N, 1, …), by which the images are multiplied; None: not by token.
    """

    x: Tensor
    weight: Tensor
    geometry: Geometry
    share: float
    powers: Tensor | None = None

    channel_dim = 1
    heads = None

    @property
    def depth(self) -> int:
        """K, the steps of one dot product."""
        return self.weight[0].numel()

    @property
    def channels(self) -> int:
        """O."""
        return self.weight.shape[0]

    @property
    def outputs(self) -> int:
        """Sums that are computed."""
        return self.x.shape[0] * self.channels * math.prod(self.geometry.out(self.x.shape[2:], self.weight.shape[2:]))

    def exact(self) -> Tensor:
        """The sums in float32 by torch, not to be written into: (N, O, *out)."""
        return self._exact

    @cached_property
    def _exact(self) -> Tensor:
        return kernels.torch_conv(self.x, self.weight, self.geometry)

    def emulated(self, acc: Accumulator) -> Tensor:
        """The sums in an accumulator: (N, O, *out)."""
        return kernels.conv(self.x, self.weight, acc, self.geometry)

    def parts(self, span: int, most: int) -> Iterator[Tensor]:
        """The sums of every `span` consecutive products in float32, of `most` such parts at even distances."""
        window = self.weight.shape[2:].numel()
        x = self.x.unflatten(1, (self.groups, -1))
        for start in _starts(self.depth, span, most):
            channels = slice(start // window, -(-(start + span) // window))
            weight = torch.zeros_like(self.weight).flatten(1)
            weight[:, start : start + span] = self.weight.flatten(1)[:, start : start + span]
            weight = weight.unflatten(1, self.weight.shape[1:])[:, channels]
            yield kernels.torch_conv(x[:, :, channels].flatten(1, 2), weight, self.geometry)

    def count(self, acc: Accumulator) -> list[int]:
        """How often each event happens in the steps, then in the merges."""
        return kernels.count_conv_events(self.x, self.weight, acc, self.geometry)

    def scaled(self, offset: Vector | Offset) -> ConvSample:
        """The same with each filter times 2^offset."""
        return replace(self, weight=_columns(offset).scale(self.weight, 0))

    def finished(self, y: Tensor, columns: Columns) -> Tensor:
        """Sums of the scaled sample with offset, gain and shift."""
        return columns.finish(y, 1)

    def input_power(self) -> Tensor:
        """The mean square of each input channel: (C,)."""
        return self.x.double().square().transpose(0, 1).flatten(1).mean(1)

    def output_power(self, power: Tensor) -> Tensor:
        """The mean square of each channel, (O,), were its inputs of such mean squares independent and of mean zero."""
        taps = (
            self.weight.double().square().flatten(2).sum(2).unflatten(0, (self.groups, -1))
        )  # (groups, O/groups, C/groups)
        return (taps * power.reshape(self.groups, 1, -1)).sum(2).flatten()

    def narrowed(self, channels: Tensor) -> ConvSample:
        """The same with some of the filters alone; there may be but one group."""
        return replace(self, weight=self.weight[channels])

    def few(self, rows: int, channels: int) -> tuple[Tensor, Tensor]:
        """(rows, K) and (K, channels) of one group, as windows and filters; fewer where it has no more."""
        inputs, outputs = self.x.shape[1] // self.groups, self.channels // self.groups
        x = F.pad(self.x[:, :inputs], [p for pair in reversed(self.geometry.padding) for p in (pair, pair)])
        windows = x
        for d, (kernel, stride, dilation) in enumerate(
            zip(self.weight.shape[2:], self.geometry.stride, self.geometry.dilation, strict=True)
        ):
            windows = windows.unfold(2 + d, dilation * (kernel - 1) + 1, stride)[..., ::dilation]
        dims = self.x.dim() - 2
        images, positions = windows.shape[0], windows.shape[2 : 2 + dims]
        flat = windows.movedim(1, 1 + dims).flatten(0, dims)  # (images · positions, inputs, *kernel)
        picked = [flat[i].flatten() for i in evenly(images * positions.numel(), rows)]
        filters = self.weight[:outputs][evenly(outputs, channels)].flatten(1)
        return torch.stack(picked), filters.t()

    @property
    def groups(self) -> int:
        """Of channels."""
        return self.geometry.groups


Sample = MatrixSample | ConvSample


def joined(first: Sample, second: Sample) -> Sample | None:
    """Two samples of a product as one; None where their shapes differ in more than rows or batches.

    Of a weight, a matrix or filters, there is but one.
    """
    if isinstance(first, MatrixSample) and isinstance(second, MatrixSample):
        is_alike = first.a.shape[1:] == second.a.shape[1:] and first.b.dim() == second.b.dim()
        if first.b.dim() == 2:
            return replace(first, **_with_rows(first, second, "a")) if is_alike else None
        is_alike = is_alike and first.b.shape[1:] == second.b.shape[1:] and first.a.dim() == first.b.dim()
        return replace(first, **_with_rows(first, second, "a", "b")) if is_alike else None
    if isinstance(first, ConvSample) and isinstance(second, ConvSample):
        is_alike = first.x.shape[1:] == second.x.shape[1:] and first.geometry == second.geometry
        return replace(first, **_with_rows(first, second, "x")) if is_alike else None
    return None


def _with_rows(first: Sample, second: Sample, *names: str) -> dict[str, Any]:
    """Fields of both, one behind the other, and the share of all outputs."""
    parts = {name: torch.cat([getattr(first, name), getattr(second, name)]) for name in names}
    if first.powers is not None and second.powers is not None:
        parts["powers"] = torch.cat([first.powers, second.powers])
    of_all = first.outputs / first.share + second.outputs / second.share
    return {**parts, "share": (first.outputs + second.outputs) / of_all}


def unscaled(found: Sample, y: Tensor) -> Tensor:
    """Sums of a sample as they are, not in units of the tokens' exponents."""
    return y if found.powers is None else y / found.powers


def _columns(offset: Vector | Offset) -> Columns:
    return Columns(offset.tensor if isinstance(offset, Vector) else offset)


def sample(
    kind: str,
    operands: tuple[Tensor, ...],
    options: dict[str, Any],
    steps: int | None,
    rows: int,
    most: int,
    per_token: bool = False,
    with_largest: bool = False,
) -> Sample:
    """A part of a product that is to be emulated.

    Args:
        kind, operands, options, steps: of the product, see `fmaq.emulation.Product`.
        rows: outputs of a channel (or head) that are wanted at least.
        most: steps that are wanted at least, if there are more than those of `rows`.
        per_token: of operands scaled by token.
        with_largest: an eighth of a matrix's rows are those of the largest norms; else all are at even distances.
    """
    first, second = (x.detach().float() for x in operands)
    columns = Columns(per_token=per_token)
    if kind.startswith("conv"):
        return _conv_sample(kind, first, second, options, rows, most, columns)
    if kind.startswith("linear"):
        second = second.t() if second.dim() > 1 else second[:, None]
    elif steps != first.shape[-1]:  # addbmm sums over its batch as well
        first, second = first.transpose(0, 1).flatten(1), second.flatten(0, 1)
    picked = _matrix_sample(first, second if second.dim() > 1 else second[:, None], rows, most, with_largest)
    a, powers = columns.by_token(picked.a, (-1,))
    return replace(picked, a=a, powers=powers)


def _matrix_sample(a: Tensor, b: Tensor, rows: int, most: int, with_largest: bool) -> MatrixSample:
    """Some rows of a; where each matrix of a batch has its own b, some of the first dimension's batches, too."""
    a = a[None] if a.dim() == 1 else a
    depth, columns = b.shape[-2:]
    if b.dim() == 2:
        a = a.reshape(-1, depth)
        total = a.shape[0]
        wanted = max(rows, most // max(1, depth * columns))
        if wanted < total:
            a = a[spread(a.double().square().sum(-1), wanted) if with_largest else evenly(total, wanted)]
        return MatrixSample(a, b, a.shape[0] / max(1, total))
    batch = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = a.expand(*batch, *a.shape[-2:]), b.expand(*batch, *b.shape[-2:])
    heads = batch[-1] if len(batch) > 1 else 1
    total = a.shape[:-1].numel()
    wanted = max(-(-rows // columns) * heads, most // max(1, depth * columns))
    if wanted < total:
        of_first = total // batch[0]
        if wanted < of_first * batch[0] and batch[0] > 1:
            keep = evenly(batch[0], -(-wanted // of_first))
            a, b = a[keep], b[keep]
        others = a.shape[:-2].numel()
        a = a[..., evenly(a.shape[-2], max(1, wanted // others)), :]
    return MatrixSample(a, b, a.shape[:-1].numel() / max(1, total))


def _conv_sample(
    kind: str, x: Tensor, weight: Tensor, options: dict[str, Any], rows: int, most: int, columns: Columns
) -> ConvSample:
    """Some images; where one is enough and more, some lines of its outputs, each with the inputs it depends on."""
    x, weight, geometry = as_convolution(kind, x, weight, **options)
    x, powers = columns.by_token(x, tuple(range(1, x.dim())))
    out = geometry.out(x.shape[2:], weight.shape[2:])
    images, positions = x.shape[0], math.prod(out)
    wanted = max(rows, most // max(1, weight.numel()))
    lines = max(1, -(-wanted // (positions // out[0])))
    if wanted >= images * positions or not positions:
        return ConvSample(x, weight, geometry, 1.0, powers)
    picked_images = evenly(images, -(-lines // out[0]) if lines > images else lines)
    picked = evenly(out[0], -(-lines // len(picked_images)))
    share = len(picked_images) * len(picked) / (images * out[0])
    powers = None if powers is None else powers[picked_images]
    (stride, *strides), (padding, *paddings), (dilation, *dilations) = (
        geometry.stride,
        geometry.padding,
        geometry.dilation,
    )
    x = F.pad(x[picked_images], [*[0, 0] * (x.dim() - 3), padding, padding])
    if len(picked) == out[0]:
        return ConvSample(x, weight, replace(geometry, padding=(0, *paddings)), share, powers)
    starts = torch.tensor(picked)[:, None] * stride
    bands = x[:, :, starts + torch.arange(weight.shape[2]) * dilation]  # (N, C, lines, kernel, …)
    bands = bands.transpose(1, 2).flatten(0, 1)
    powers = None if powers is None else powers.repeat_interleave(len(picked), 0)
    of_band = Geometry((1, *strides), (0, *paddings), (1, *dilations), geometry.groups)
    return ConvSample(bands, weight, of_band, share, powers)


def is_finite(x: Tensor) -> bool:
    """Every value is finite."""
    x = x.float() if x.dtype.itemsize == 1 else x  # torch knows no extremes of float8
    low, high = torch.aminmax(x) if x.numel() else (x.sum(), x.sum())
    return bool(torch.isfinite(low) & torch.isfinite(high))
