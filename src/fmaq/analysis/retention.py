"""How much of a long sum's variance a short mantissa keeps: the variance retention ratio, and a simulation beside it.

The ratio (VRR) is that of Sakr et al., "Accumulation Bit-Width Scaling For Ultra-Low Precision Training Of Deep
Networks", ICLR 2019, arXiv 1901.06588: the variance of a sum of n independent terms of mean zero as an accumulator
forms it, rounding to the nearest, by that of the exact sum. Too long a sum swamps its own terms, and the ratio falls.

The formulas were taken at second hand and checked against the actual arithmetic (`simulate`; docs/analysis.md has the
figures, tests/test_analysis_retention.py repeats some). As given, they

- find the mantissa from which a length is suitable, or one bit too many (two, in one case of 24); never too few. A
  likely reason: full swamping is assumed beyond 2^a standard deviations of a term, where rounding to the nearest still
  takes it; it ends at 2^(a+1).
- are wrong by up to 0.37 as a *ratio* where a length is not suitable. Measured, in one chunk the ratio depends on n/4^a
  alone: 0.97 at 1, 0.86 at 4, 0.54 at 16, 0.22 at 64; the formula has 0.56 at n = 4096 and a = 5 instead of 0.85. Its
  events are weighted by how long they last, all but the last of them, and so are no probabilities.
- say nothing about truncation, which shrinks every sum by about the same factor: the variance kept is 0.88 where the
  formula says 0.999 (n = 576, chunks of 16, 7 bits), and most of that is undone by one constant. `simulate` tells the
  constant and the noise that is left.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from fmaq import ops
from fmaq.analysis.biases import AnyFormat, mapped
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat
from fmaq.numerics.formats import _whole
from fmaq.ops.operands import AccumulatorLike

SUITABLE = 50.0
"""A length is suitable where e^(n·(1 − VRR)) is below this (arXiv 1901.06588, section 4.4)."""

LARGEST_MANTISSA = 23


def _two_tails(x: float) -> float:
    """2·Q(x), the probability of a standard normal variable beyond ±x."""
    return math.erfc(x / math.sqrt(2))


def _within(x: float) -> float:
    """1 − 2·Q(x)."""
    return math.erf(x / math.sqrt(2))


def _lost(accumulator: int, product: int, bits: int) -> float:
    """α: how many terms' worth of variance is lost while the last 1 … `bits` bits of the terms are swamped."""
    discarded = sum(2**j * (2**j - 1) * (2 ** (j + 1) - 1) for j in range(1, bits + 1))
    return 2.0 ** (accumulator - 3 * product) / 3 * discarded


@functools.cache
def _ratio(a: int, p: int, n: int) -> float:
    """VRR of one chunk (arXiv 1901.06588, theorem 1)."""
    weights, kept = 0.0, 0.0
    lost = _lost(a, p, p)
    for i in range(max(2, math.floor(lost) + 1), n):  # swamped whole for the first time by term i
        weight = _two_tails(2.0**a / math.sqrt(i)) * _within(2.0**a / math.sqrt(i - 1))
        weights += weight
        kept += (i - lost) * weight
    for r in range(2, p + 1):  # swamped in part, at most r − 1 bits
        lost = _lost(a, p, r - 1)
        if n > lost:
            edge = 2.0 ** (a - p + r) / math.sqrt(n)
            weight = 2.0 ** (a - p + r) * _two_tails(edge / 2) * _within(edge)
            weights += weight
            kept += (n - lost) * weight
    untouched = _within(2.0 ** (a - p + 1) / math.sqrt(n))
    return (kept + n * untouched) / (n * (weights + untouched))


Outer = Sequence[tuple[int, int | None]]
"""Mantissa and chunk of each outer level, the innermost first."""


def retention_ratio(accumulator: int, product: int, steps: int, chunk: int | None = None, outer: Outer = ()) -> float:
    """The variance retention ratio of arXiv 1901.06588, 0 to 1, of a sum rounded to the nearest.

    With chunks, it is that of a chunk times that of the sum of chunks, whose terms have min(a, p + ⌊log2 chunk⌋) bits,
    in the mantissa of the outer level if there is one.

    Args:
        accumulator: a, bits of mantissa of the partial sums, 0 to 23.
        product: p, of the products, 0 to 23.
        steps: n, products in the sum, at least 1.
        chunk: products in a chunk, at least 1; None sums in one chunk.
        outer: of the levels that chunks' sums go to.

    Raises:
        TypeError, ValueError: an argument is no integer, or out of its range.
    """
    a = _whole(accumulator, "accumulator", 0, LARGEST_MANTISSA)
    p = _whole(product, "product", 0, LARGEST_MANTISSA)
    n = _whole(steps, "steps", 1, 2**31 - 1)
    if chunk is None or _whole(chunk, "chunk", 1, 2**31 - 1) >= n:
        return _ratio(a, p, n)
    terms, sums = min(a, p + int(math.log2(chunk))), math.ceil(n / chunk)
    if not outer:
        return _ratio(a, p, chunk) * _ratio(a, terms, sums)
    (mantissa, its_chunk), *others = outer
    return _ratio(a, p, chunk) * retention_ratio(mantissa, terms, sums, its_chunk, others)


def is_suitable(ratio: float, steps: int) -> bool:
    """e^(n·(1 − VRR)) < 50: the sum of n terms has lost no more than is known to be harmless in training."""
    return steps * (1 - ratio) < math.log(SUITABLE)


def least_mantissa(product: int, steps: int, chunk: int | None = None, outer: Outer = ()) -> int:
    """The least mantissa of the innermost sums that is suitable for `steps` products; see `retention_ratio`.

    Raises:
        TypeError, ValueError: as `retention_ratio`; and where no mantissa up to 23 suffices.
    """
    for a in range(LARGEST_MANTISSA + 1):
        if is_suitable(retention_ratio(a, product, steps, chunk, outer), steps):
            return a
    beside = f" beside outer levels of {', '.join(str(bits) for bits, _ in outer)} bits" if outer else ""
    raise ValueError(f"no mantissa up to {LARGEST_MANTISSA} bits is suitable for a sum of {steps} terms{beside}")


@dataclass(frozen=True)
class Simulated:
    """What is left of sums of independent Gaussian terms.

    Attributes:
        retained: their variance by that of the exact sums. (The mean of both is 0.)
        gain: the constant that brings them nearest to the exact sums.
        noise: the mean squared error after that gain, by the variance of the exact sums.
    """

    retained: float
    gain: float
    noise: float


def simulate(accumulator: AccumulatorLike, steps: int, sums: int = 256, seed: int = 0) -> Simulated:
    """Sum Gaussian terms with the actual arithmetic: an accumulator's mantissas, chunks, levels and rounding.

    Its exponents are ignored: what range costs depends on data. One term is a normal float32 times ±1.

    Args:
        accumulator: an Accumulator of float formats, biases or not, or what `Accumulator.parse` takes.
        steps: terms of a sum, at least 1.
        sums: sums², not all independent, are formed: `sums` rows of terms with `sums` patterns of signs.
        seed: of the terms.

    Raises:
        TypeError, ValueError: the formats are not floats, or a count is out of its range.
    """
    steps, sums = _whole(steps, "steps", 1, 2**24), _whole(sums, "sums", 2, 2**14)
    wide = _wide(Accumulator.parse(accumulator))
    generator = torch.Generator().manual_seed(seed)
    terms = torch.randn(sums, steps, generator=generator)
    signs = torch.randint(0, 2, (steps, sums), generator=generator).mul_(2).sub_(1).float()
    exact = terms.double() @ signs.double()
    found = ops.matmul(terms, signs, wide).double()
    variance, both = float((exact**2).mean()), float((exact * found).mean())
    own = variance + float(((found - exact) * (found + exact)).mean())  # their difference is known best
    if own == 0:
        return Simulated(0.0, 1.0, 1.0)
    return Simulated(own / variance, both / own, max(0.0, 1 - both**2 / (own * variance)))


def _wide(acc: Accumulator) -> Accumulator:
    """The accumulator with formats of so large a range that nothing saturates or vanishes."""
    return mapped(acc, lambda format: _wide_format(format, acc))


def _wide_format(format: AnyFormat | None, acc: Accumulator) -> AnyFormat | None:
    if isinstance(format, FloatFormat):
        return FloatFormat(format.mantissa, 7, 63, half_unit=format.half_unit)
    if isinstance(format, FixedFormat):
        raise ValueError(f"a mantissa is what floats have, and {format} of {acc} is a fixed format")
    return format
