"""The worst case of a sum, channel by channel: proof that no input in a range makes an accumulator overflow.

Rounding is monotone: a larger product, or a larger sum before it, never gives a smaller sum. So the input that makes
every product of a channel as large as the range allows makes each of its partial sums as large as any input can;
another makes them as small. The walk along those two inputs, rounded as the accumulator rounds but with no end to its
range, is the bound, whatever the formats, the rounding, the chunk or the levels: the growth by nearest rounding, by a
half-unit format's half, or by flooring what is negative is in it, as it happens.
No bound from norms is as tight. It is reached, by those inputs, unless terms below the smallest magnitude are flushed
(which only makes sums smaller), or rounding is stochastic (then it is the worst of all draws).
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fmaq.analysis.biases import AnyFormat, outer_formats
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat
from fmaq.numerics.accumulator import Level
from fmaq.numerics.reference import exact_sum, round_to_grid
from fmaq.ops import parse_tensor_format
from fmaq.ops.operands import AccumulatorLike, widen

Array = NDArray[np.float64]
RangeLike = float | tuple[float, float] | str | FloatFormat


@dataclass(frozen=True)
class Extremes:
    """The most negative and the most positive value that a channel's register would hold if its range had no end.

    Attributes:
        lowest, highest: (channels,), at most and at least 0.
    """

    lowest: Array
    highest: Array

    @property
    def largest(self) -> Array:
        """The largest magnitude, (channels,)."""
        return np.maximum(-self.lowest, self.highest)

    def fits(self, format: AnyFormat) -> NDArray[np.bool_]:
        """Neither is beyond the format's range, (channels,). A format without a bias has none, and fits nothing."""
        if format.is_template:
            return np.zeros(self.lowest.shape, bool)
        return (self.lowest >= format.min) & (self.highest <= format.max)

    def exponents(self) -> NDArray[np.int64]:
        """⌊log2⌋ of the largest magnitude, (channels,): the emax that a float needs. −1074 where that is zero."""
        largest = self.largest
        return np.where(largest > 0, np.frexp(largest)[1] - 1, -1074).astype(np.int64)

    def widths(self, fraction: int) -> NDArray[np.int64]:
        """Bits of the least two's complement of that fraction that holds both, (channels,), at least 2."""
        above = np.frexp(np.ldexp(self.highest, fraction))[1]  # the least n with highest < 2^n
        significand, exponent = np.frexp(np.ldexp(-self.lowest, fraction))
        below = np.where(significand == 0.5, exponent - 1, exponent)  # the least n with −lowest ≤ 2^n
        return np.maximum(np.maximum(above, below) + 1, 2).astype(np.int64)


@dataclass(frozen=True)
class ChannelBounds:
    """Worst cases of the output channels of one product.

    Attributes:
        accumulator: that sums it.
        low, high: the range of the inputs.
        sums: extremes of all partial sums, of chunks and, without an outer level, across them.
        products: of the rounded products; None where the accumulator keeps them exact.
        outer: of the sums of each outer level, the innermost first.
    """

    accumulator: Accumulator
    low: float
    high: float
    sums: Extremes
    products: Extremes | None
    outer: tuple[Extremes, ...] = ()

    @property
    def proven(self) -> NDArray[np.bool_]:
        """Channels in which no input in the range overflows anything, (channels,)."""
        proven = self.sums.fits(self.accumulator.format)
        if self.products is not None and self.accumulator.product is not None:
            proven = proven & self.products.fits(self.accumulator.product)
        for extremes, format in zip(self.outer, outer_formats(self.accumulator), strict=True):
            proven = proven & extremes.fits(format)
        return proven

    @property
    def biases(self) -> NDArray[np.int64] | None:
        """The largest bias of the partial sums' float format that is proven, (channels,); None for a fixed format."""
        return _largest_bias(self.sums, self.accumulator.format)

    @property
    def product_biases(self) -> NDArray[np.int64] | None:
        """The same of the products' format; None where that is fixed, or products are exact."""
        return None if self.products is None else _largest_bias(self.products, self.accumulator.product)

    @property
    def outer_biases(self) -> tuple[NDArray[np.int64] | None, ...]:
        """The same of each outer level's format; None where that is fixed, or float32."""
        return tuple(map(_largest_bias, self.outer, outer_formats(self.accumulator)))

    @property
    def widths(self) -> NDArray[np.int64] | None:
        """The least width of the partial sums' fixed format that is proven, (channels,); None for a float."""
        format = self.accumulator.format
        return self.sums.widths(format.fraction) if isinstance(format, FixedFormat) else None


def _largest_bias(extremes: Extremes, format: AnyFormat | None) -> NDArray[np.int64] | None:
    return 2**format.exponent - 1 - extremes.exponents() if isinstance(format, FloatFormat) else None


def input_range(given: RangeLike) -> tuple[float, float]:
    """The range of inputs that a description means, always with zero in it (padding is zeros).

    Args:
        given: the largest magnitude; a pair (low, high); `"int8"`, the codes −128 … 127; `"uint8"`, 0 … 255; or a
            tensor format with a bias, such as `"M4E3b5"`: ± its largest value.

    Raises:
        TypeError, ValueError: none of these, not finite, or a format whose bias depends on the data.
    """
    hint = 'a largest magnitude, a pair (low, high), "int8", "uint8" or a format with a bias like "M4E3b5"'
    if isinstance(given, (str, FloatFormat)):
        return _range_of_format(given, hint)
    pair = given if isinstance(given, tuple) else (-abs(given), abs(given)) if _is_number(given) else None
    if pair is None or len(pair) != 2 or not all(map(_is_number, pair)):
        raise TypeError(f"the range of the inputs is {hint}; got {given!r}")
    low, high = (float(x) for x in pair)
    if not (math.isfinite(low) and math.isfinite(high) and low <= high):
        raise ValueError(f"the range of the inputs must be finite, its low end first; got {given!r}")
    return min(low, 0.0), max(high, 0.0)


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _range_of_format(given: str | FloatFormat, hint: str) -> tuple[float, float]:
    unsigned = isinstance(given, str) and given.strip().startswith("u")
    try:
        parsed = parse_tensor_format(given.strip()[1:] if isinstance(given, str) and unsigned else given)
    except ValueError as error:
        raise ValueError(f"the range of the inputs is {hint}; got {given!r}") from error
    if isinstance(parsed, int):
        return (0.0, 2.0**parsed - 1) if unsigned else (-(2.0 ** (parsed - 1)), 2.0 ** (parsed - 1) - 1)
    if unsigned:
        raise ValueError(f"the range of the inputs is {hint}; got {given!r}")
    if parsed.bias is None:
        raise ValueError(
            f"the range of {parsed} is not known before its data are: its bias fits them. Give a bias, like "
            f'"{parsed}b{2 ** (parsed.exponent - 1) - 1}", or the largest magnitude'
        )
    return -parsed.max, parsed.max


def channel_bounds(weight: Tensor, accumulator: AccumulatorLike, input_max: RangeLike) -> ChannelBounds:
    """The worst case of every output channel of a linear layer or convolution, over all inputs in a range.

    Args:
        weight: (channels, K), or a convolution's (channels, in, *kernel), in float32 or narrower: as it is multiplied,
            so quantized already where it will be.
        accumulator: an Accumulator, or what `Accumulator.parse` takes. Formats without biases (`"M7E4"`) prove nothing,
            but `biases` tells which ones would.
        input_max: see `input_range`.

    Raises:
        TypeError, ValueError: the weight has no dimension, or values that are not finite; or of the other arguments.
    """
    acc, (low, high) = Accumulator.parse(accumulator), _within_float32(*input_range(input_max))
    wide = widen(weight, "weight")
    if wide.dim() < 2:
        raise ValueError(f"weight must be (channels, K) or (channels, in, *kernel), got {tuple(weight.shape)}")
    if not bool(torch.isfinite(wide).all()):
        raise ValueError("weight has values that are not finite; no sum of theirs has a bound")
    w = wide.detach().flatten(1).t().double().numpy()
    ends = (w * low, w * high)  # exact: 24 bits times 24 bits
    found = map(Extremes, _walk(np.minimum(*ends), acc), _walk(np.maximum(*ends), acc))
    products, sums, *outer = found
    return ChannelBounds(acc, low, high, sums, None if acc.product is None else products, tuple(outer))


def _within_float32(low: float, high: float) -> tuple[float, float]:
    """The largest range of float32 values inside a range: inputs are float32."""
    ends = []
    for end in (low, high):
        nearest = np.float32(end)
        ends.append(float(np.nextafter(nearest, np.float32(0))) if abs(float(nearest)) > abs(end) else float(nearest))
    return ends[0], ends[1]


def _walk(terms: Array, acc: Accumulator) -> list[Array]:
    """The furthest product, and the furthest sum in each register, on the way along terms (K, channels) of one sign.

    The registers are that of the sums and one a level; two levels of one format share theirs.
    """
    depth, channels = terms.shape
    products = terms
    if acc.product is not None:
        products = _rounded(terms, Level(acc.product, acc.rounding_of_products, acc.random_bits))
    levels = [Level(acc.format, acc.rounding, acc.random_bits, acc.chunk), *acc.levels]
    sums, furthest = ([np.zeros(channels) for _ in levels] for _ in range(2))
    counts = [0] * len(levels)
    for k, p in enumerate(products):
        term = p
        for i, level in enumerate(levels):
            sums[i] = _rounded(exact_sum(sums[i], term), level)
            furthest[i] = _further(furthest[i], sums[i])
            counts[i] += 1
            if k + 1 < depth and counts[i] != level.chunk:
                break
            term, sums[i], counts[i] = sums[i], np.zeros(channels), 0
    registers = len(outer_formats(acc)) + 1
    furthest[registers - 1] = functools.reduce(_further, furthest[registers - 1 :])
    return [functools.reduce(_further, products, np.zeros(channels)), *furthest[:registers]]


def _further(one: Array, other: Array) -> Array:
    return np.where(np.abs(other) > np.abs(one), other, one)


def _rounded(x: Array, level: Level) -> Array:
    """The furthest that rounding can take numbers, the format's range unbounded."""
    return round_to_grid(x, level.format, level.rounding, level.random_bits, 2**level.random_bits - 1)


def a2q_width(l1_norm: float, input_bits: int, is_signed: bool) -> int:
    """The width of an integer accumulator that A2Q's bound proves: P ≥ β + log2(1 + 2^−β) + 1 (arXiv 2308.13504).

    β = log2‖w‖₁ + N − [signed], so 2^(P−1) − 1 ≥ ‖w‖₁·2^(N−[signed]). `channel_bounds` never needs more, and up to
    three bits less: inputs without a sign reach 2^N − 1 only, weights of both signs do not add up under them, and a
    register holds one more value below zero.

    Args:
        l1_norm: ‖w‖₁ of a channel's integer weights.
        input_bits: N, of the inputs.
        is_signed: whether they have a sign.

    Raises:
        ValueError: the norm is negative or not finite, or N below 1.
    """
    if not (math.isfinite(l1_norm) and l1_norm >= 0):
        raise ValueError(f"l1_norm must be finite and at least 0, got {l1_norm!r}")
    if input_bits < 1:
        raise ValueError(f"input_bits must be at least 1, got {input_bits}")
    if l1_norm == 0:
        return 1
    beta = math.log2(l1_norm) + input_bits - is_signed
    return math.ceil(beta + math.log2(1 + 2.0**-beta) + 1)
