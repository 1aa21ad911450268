"""What the tests of kernels draw: accumulators that float32 tensors can hold, awkward operands, odd memory layouts.

An example draws the *description* of its operands (exponents, significant bits, spread, extremes) and a seed for NumPy:
that is fast, and a failure shrinks to a simple description. `FMAQ_HYPOTHESIS=thorough` makes `examples` draw many more,
different ones in every run.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from hypothesis import settings
from hypothesis import strategies as st
from torch import Tensor

from fmaq.kernels import available_targets, products, use_target
from fmaq.numerics import FLOAT32, ROUNDINGS, Accumulator, FixedFormat, FloatFormat

IS_THOROUGH = os.environ.get("FMAQ_HYPOTHESIS") == "thorough"
FINFO = np.finfo(np.float32)
EXTREMES = np.array(
    [2.0**-149, 3 * 2.0**-149, 2.0**-127, FINFO.tiny, 1.0, 3.0, 1e-30, 1e30, 1e38, FINFO.max], np.float32
)


def examples(count: int) -> settings:
    """A test's number of examples, in the profile that the environment chooses."""
    return settings(max_examples=count * 25 if IS_THOROUGH else count)


# --- Accumulators -----------------------------------------------------------------------------------------------------

CHUNKS = (1, 3, 16, 1000, None)
# Compiling a kernel takes longer than running it, so most examples share these.
POOL = tuple(
    Accumulator(name)
    for name in (
        "paper12",
        "M7E4b10 product=M7E4b12 chunk=16 underflow=False",
        "M7E4b10z product=M7E4b12z chunk=3",
        "M7E4b7 chunk=None",
        "M4E3b3 product=M4E3b4 chunk=16",
        "M3E2b0 product=M5E4b9 chunk=1000",
        "M10E5b15 product=M23E7b64 chunk=None",
        "M0E1b0 product=M0E5b16 chunk=3",
        "M23E7b100 product=M0E7b0 chunk=16",
        "M23E7b64 chunk=1",
        "M7E4b-110 product=M9E5b-60 chunk=16",
        "M7E4b125 product=M7E4b126 chunk=3 underflow=False",
        "M7E4b10 product=M7E4b12 chunk=16 rounding=nearest_even",
        "M4E3b3 product=M23E7b120z chunk=None rounding=nearest_even underflow=False",
        "M7E4b10 chunk=3 rounding=nearest_even",
        "M0E3b2 product=M0E4b8 chunk=3 rounding=nearest_even",
        "M7E4b10 product=M7E4b12 chunk=16 rounding=stochastic seed=7",
        "M7E4b10 product=M7E4b12 chunk=16 rounding=stochastic random_bits=4 seed=7 centred=True",
        "M5E4b9 product=M3E4b9 chunk=5 rounding=stochastic random_bits=16 seed=7 centred=True",
        "I12f4 product=I12f6 rounding=stochastic random_bits=3 centred=True",
        "M3E4b8 chunk=3 rounding=stochastic random_bits=1 seed=18446744073709551615",
        "M2E5b16 product=M1E5b20z chunk=None rounding=stochastic random_bits=16",
        "I16f4 product=I12f4 chunk=16",
        "I8f0w chunk=None",
        "I32f0 chunk=16",
        "I32f8w product=M7E4b12 chunk=3",
        "I12f2 product=M10E5b15 chunk=None rounding=nearest_even",
        "I16f6w product=I20f9 chunk=16 rounding=stochastic random_bits=4 seed=3",
        "M7E4b10 product=I8f6 chunk=3",
        "M5E4b10h product=M5E4b12h chunk=16",
        "M3E4b8zh product=M4E5b14h chunk=3",
        "M5E4b10h chunk=None outer=M10E5b16",
        "M4E4b9h product=M4E4b11h chunk=3 outer=(M10E5b16 rounding=nearest_even chunk=2 outer=fp32)",
        "M22E7b64h product=M0E4b8h chunk=16 underflow=False",
        "M7E4b10 product=M5E4b12h chunk=3 rounding=nearest_even",
        "M5E4b9 product=M5E4b11 chunk=16 outer=(M7E5b15h chunk=3 outer=M10E5b17h)",
        "M7E4b10 product=M7E4b12 chunk=16 rounding=nearest_away",
        "M3E4b8z chunk=3 rounding=nearest_away outer=M8E5b16",
        "M7E4b10 product=M5E4b12 chunk=3 product_rounding=nearest_away outer=fp32",
        "M7E4b10 product=M7E4b12 chunk=3 rounding=nearest_even outer=fp32",
        "M5E4b10 product=M5E4b12 chunk=3 rounding=half_up",
        "M5E4b10 product=M5E4b12 chunk=3 rounding=odd outer=M7E5b16",
        "M5E4b10 product=M5E4b12 chunk=16 rounding=floor",
        "M4E5b16 product=M3E5b18 chunk=3 rounding=stochastic outer=(M6E5b15 rounding=stochastic chunk=2 random_bits=5)",
        "I16f4 product=I12f4 chunk=16 rounding=half_up",
        "I12f5 product=I12f5 chunk=3 rounding=nearest_even outer=I20f5",
        "I10f4w product=I12f4w chunk=3 rounding=floor outer=(I12f6 chunk=2 outer=fp32)",
        "I12f3 product=I14f3 chunk=16 product_rounding=half_up outer=M10E5b16h",
        "I16f4 product=I12f4 chunk=16 rounding=nearest_away outer=I24f4w",
    )
)


@st.composite
def float_formats(draw: st.DrawFn) -> FloatFormat:
    """Any float format that float32 holds; most of them hold 1."""
    exponent = draw(st.integers(1, 7))
    zero = draw(st.sampled_from(["flag", "exponent"]))
    lowest, highest = 2**exponent - 1 - 127, 126 + (zero == "exponent")
    near_one = st.integers(max(lowest, -2), min(highest, 2**exponent + 1))
    bias = draw(st.one_of(near_one, near_one, st.integers(lowest, highest)))
    half_unit = draw(st.booleans())
    return FloatFormat(draw(st.integers(0, 23 - half_unit)), exponent, bias, zero, half_unit)


fixed_formats = st.builds(
    FixedFormat,
    width=st.integers(2, 32),
    fraction=st.one_of(st.integers(0, 8), st.integers(-64, 64)),
    overflow=st.sampled_from(["saturate", "wrap"]),
)
formats = st.one_of(float_formats(), float_formats(), fixed_formats)


@st.composite
def outers(draw: st.DrawFn, formats: st.SearchStrategy, rounding: st.SearchStrategy):
    """How sums of chunks are merged: mostly as by default, else one to three levels."""
    kind = draw(st.sampled_from(["none", "none", "none", "format", "fp32", "accumulator"]))
    if kind == "none":
        return None
    if kind == "fp32":
        return FLOAT32
    format = draw(formats)
    if kind == "format":
        return format
    return Accumulator(
        format,
        chunk=draw(st.sampled_from([1, 2, 3, 8, None])),
        rounding="toward_zero" if format.half_unit else draw(rounding),
        random_bits=draw(st.integers(1, 16)),
        centred=draw(st.booleans()),
        outer=draw(outers(formats, rounding)),
    )


@st.composite
def fresh_accumulators(
    draw: st.DrawFn,
    formats: st.SearchStrategy,
    products: st.SearchStrategy,
    rounding: st.SearchStrategy,
    chunks: tuple[int | None, ...] = CHUNKS,
) -> Accumulator:
    """Accumulators of drawn fields, whose roundings go with their formats."""
    format, product = draw(formats), draw(products)
    has_own = product is not None and not product.half_unit and draw(st.sampled_from([False, False, True]))
    return Accumulator(
        format,
        product=product,
        chunk=draw(st.sampled_from(chunks)),
        rounding="toward_zero" if format.half_unit else draw(rounding),
        underflow=draw(st.booleans()),
        random_bits=draw(st.integers(1, 16)),
        seed=draw(st.integers(0, 2**64 - 1)),
        centred=draw(st.booleans()),
        product_rounding=draw(rounding) if has_own else None,
        outer=draw(outers(formats, rounding)),
    )


truncating = fresh_accumulators(float_formats(), st.one_of(st.none(), float_formats()), st.just("toward_zero"))
stochastic = fresh_accumulators(formats, st.one_of(st.none(), formats), st.just("stochastic"))
anything = fresh_accumulators(formats, st.one_of(st.none(), formats), st.sampled_from(ROUNDINGS))
pooled = st.sampled_from(POOL)
accumulators = st.one_of(truncating, anything) if IS_THOROUGH else st.one_of(pooled, pooled, truncating, anything)


# --- Operands ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Values:
    """A description of float32 numbers: signed significands of at most `bits` bits times 2^(exponent ± spread).

    Attributes:
        zeros: the fraction of zeros.
        extremes: the fraction of float32's own extremes: subnormal, tiny and huge numbers.
        is_positive: no negative ones, so that sums grow until they saturate.
    """

    exponent: int
    bits: int
    spread: int
    zeros: float
    extremes: float
    is_positive: bool

    def array(self, rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
        """Such numbers, float32 and finite."""
        significands = rng.integers(2 ** (self.bits - 1), 2**self.bits, shape)
        exponents = self.exponent + rng.integers(-self.spread, self.spread + 1, shape)
        magnitudes = np.ldexp(significands.astype(np.float64), exponents - self.bits + 1)
        magnitudes = np.where(rng.random(shape) < self.extremes, rng.choice(EXTREMES, shape), magnitudes)
        magnitudes = np.where(rng.random(shape) < self.zeros, 0.0, magnitudes)
        signs = 1.0 if self.is_positive else rng.choice([-1.0, 1.0], shape)
        return (signs * np.minimum(magnitudes, FINFO.max)).astype(np.float32)


@dataclass(frozen=True)
class Operands:
    """Descriptions of both operands of a product, and the seed of the numbers."""

    a: Values
    b: Values
    seed: int
    is_odd_layout: bool

    def tensors(self, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
        """Both operands; in an odd layout, their strides are of any order, with gaps, or zero."""
        rng = np.random.default_rng(self.seed)
        a, b = (torch.from_numpy(v.array(rng, s)) for v, s in ((self.a, a_shape), (self.b, b_shape)))
        return (laid_out(rng, a), laid_out(rng, b)) if self.is_odd_layout else (a, b)


@st.composite
def operands(draw: st.DrawFn, acc: Accumulator) -> Operands:
    """Operands whose products lie about an end of the accumulator's or the product's range, or anywhere."""
    ends = [format for format in (acc.format, acc.product) if format is not None]
    ends = [end for format in ends for end in (format.emin, format.emax, (format.emin + format.emax) // 2)]
    product = draw(st.sampled_from(ends)) + draw(st.integers(-6, 2))
    a_exponent = draw(st.one_of(st.integers(-4, 4), st.integers(-4, 4), st.integers(-140, 120)))
    positive = draw(st.booleans())

    def values(exponent: int) -> Values:
        return Values(
            exponent,
            bits=draw(st.sampled_from([1, 2, 4, 6, 8, 12, 24])),
            spread=draw(st.sampled_from([0, 1, 3, 10, 60])),
            zeros=draw(st.sampled_from([0.0, 0.1, 0.9])),
            extremes=draw(st.sampled_from([0.0, 0.0, 0.0, 0.1])),
            is_positive=positive,
        )

    return Operands(
        values(a_exponent), values(product - a_exponent), draw(st.integers(0, 2**32 - 1)), draw(st.booleans())
    )


def laid_out(rng: np.random.Generator, x: Tensor) -> Tensor:
    """x in another memory layout: dimensions in any order, gaps (of NaN) between elements, perhaps one of stride 0."""
    order = [int(d) for d in rng.permutation(x.dim())]
    steps = [int(step) for step in rng.choice([1, 1, 2], x.dim())]
    storage = torch.full([x.shape[d] * steps[d] for d in order], torch.nan)
    view = storage.permute([order.index(d) for d in range(x.dim())])
    view = view[tuple(slice(None, None, step) for step in steps)].copy_(x)
    if rng.random() < 0.2:
        d = int(rng.integers(x.dim()))
        view = view.narrow(d, 0, min(1, x.shape[d])).expand(x.shape)
    return view


SIZES = (0, 1, 2, 3, 4, 5, 7, 13, 16, 17, 31, 33, 64, 67)
DEPTHS = (0, 1, 2, 3, 7, 15, 16, 17, 31, 33, 48, 53)
sizes = st.sampled_from(SIZES[1:] * 3 + SIZES[:1])
depths = st.sampled_from(DEPTHS[1:] * 3 + DEPTHS[:1])


# --- How a product is computed ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Machine:
    """What must not change a bit: the instruction set, the threads, and the sizes at which a kernel divides its work.

    Attributes:
        target: position among the available targets.
        block_bytes: of A that a thread packs at a time; None for the usual.
        shares_bounds: bounds of chunks are taken for small products too.
    """

    target: int
    threads: int
    block_bytes: int | None
    shares_bounds: bool

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Products inside a `with` block are computed so; a second thread helps however small they are."""
        targets = available_targets()
        sizes = {"SMALL": 0}
        sizes |= {} if self.block_bytes is None else {"BLOCK_BYTES": self.block_bytes}
        sizes |= {"SHARED": 1} if self.shares_bounds else {}
        before = torch.get_num_threads()
        with use_target(targets[self.target % len(targets)].name), patch.multiple(products, **sizes):
            torch.set_num_threads(self.threads)
            products.launch_of.cache_clear()  # what was decided by other sizes
            try:
                yield
            finally:
                torch.set_num_threads(before)
                products.launch_of.cache_clear()


machines = st.builds(
    Machine,
    target=st.integers(0, 2),
    threads=st.integers(1, 2),
    block_bytes=st.sampled_from([None, None, 1, 2000]),
    shares_bounds=st.booleans(),
)
