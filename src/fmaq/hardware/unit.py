"""One FMAq unit: its operands and accumulator, its ports, and what it must compute, vector by vector.

The golden model is `fmaq.numerics.reference`; only the IEEE baselines, which no low bit-width format describes, have
their own rounding here.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmaq.hardware.lfsr import MERGE_SEED, STEP_SEED, lfsr_sequence
from fmaq.hardware.operands import FloatOperand, IntegerOperand, Operand, parse_operand
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat
from fmaq.numerics.accumulator import Level
from fmaq.numerics.formats import Float32Format
from fmaq.numerics.reference import exact_sum, quantize

Codes = NDArray[np.int64]
Values = NDArray[np.float64]

MAX_WINDOW = 48
"""Bits between the largest product and a fixed accumulator's step: beyond, the formats hardly overlap."""


@dataclass(frozen=True)
class IeeeFormat:
    """An IEEE 754 interchange format as an accumulator: subnormals, infinities, to the nearest, products exact (fused).

    A baseline, not a format of `fmaq.numerics`: no kernel emulates it.
    """

    name: str
    mantissa: int
    exponent: int

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    @property
    def emin(self) -> int:
        """The exponent of the smallest normal number."""
        return 2 - 2 ** (self.exponent - 1)

    @property
    def emax(self) -> int:
        """The largest exponent of a finite number."""
        return 2 ** (self.exponent - 1) - 1

    @property
    def max(self) -> float:
        """The largest finite magnitude."""
        return float(np.ldexp(2.0 - 2.0**-self.mantissa, self.emax))

    def decode(self, codes: ArrayLike) -> Values:
        """Values of codes, infinities and NaN included."""
        c = np.asarray(codes, np.int64)
        field = (c >> self.mantissa) & ((1 << self.exponent) - 1)
        i = c & ((1 << self.mantissa) - 1)
        significand = np.where(field > 0, i + (1 << self.mantissa), i).astype(np.float64)
        magnitude = np.ldexp(significand, np.maximum(field, 1) + self.emin - 1 - self.mantissa)
        special = np.where(i == 0, np.inf, np.nan)
        magnitude = np.where(field == (1 << self.exponent) - 1, special, magnitude)
        return np.where((c >> (self.bits - 1)) & 1, -magnitude, magnitude)

    def encode(self, values: ArrayLike) -> Codes:
        """Codes of finite values of this format."""
        return FloatOperand(self.mantissa, self.exponent, 1 - self.emin).encode(values)

    def round(self, x: ArrayLike) -> Values:
        """To the nearest, ties to even; what rounds beyond the largest is infinite."""
        x = np.asarray(x, np.float64)
        _, e = np.frexp(x)
        unit = np.ldexp(1.0, np.maximum(e - 1, self.emin) - self.mantissa)
        rounded = np.where(np.isfinite(x), np.rint(x / unit) * unit, x)
        return np.where(np.abs(rounded) > self.max, np.copysign(np.inf, x), rounded)


RegisterFormat = FloatFormat | FixedFormat | IeeeFormat
"""What a register of the hardware can hold."""

IEEE = {"ieee32": IeeeFormat("ieee32", 23, 8), "ieee16": IeeeFormat("ieee16", 10, 5)}


@dataclass(frozen=True)
class Unit:
    """FMAq(x, w, s) = Q_acc(Q_prod(x·w) + s) as a block of logic: ports of codes, and the values they must give.

    Ports: `x` and `w` are operands' codes; `s` and `y` the accumulator's (bit `bits` is the zero flag of
    zero="flag"); `r_product` and `r_sum`, with stochastic rounding only, the random integers of the two roundings.

    Attributes:
        accumulator: the formats, rounding and chunk, or an IEEE baseline. Levels (`outer=`) are no part of the unit,
            but of the multiply-accumulate around it.
        weight, activation: the formats of w and x.
    """

    accumulator: Accumulator | IeeeFormat
    weight: Operand
    activation: Operand

    @classmethod
    def of(
        cls,
        accumulator: Accumulator | IeeeFormat | str | Mapping[str, Any],
        weight: Operand | str = "M4E3",
        activation: Operand | str = "M4E3",
    ) -> Unit:
        """The unit that names describe.

        Args:
            accumulator: anything `Accumulator.parse` takes, or the baselines `"ieee32"` and `"ieee16"`.
            weight, activation: `"M4E3"`, `"M4E3b5"`, `"int8"`.
        Raises:
            TypeError, ValueError: a name is wrong, or the formats do not fit together.
        """
        if isinstance(accumulator, str) and accumulator.strip() in IEEE:
            accumulator = IEEE[accumulator.strip()]
        if not isinstance(accumulator, IeeeFormat):
            accumulator = Accumulator.parse(accumulator)
        unit = cls(accumulator, parse_operand(weight, "weight"), parse_operand(activation, "activation"))
        unit._check()
        return unit

    def _check(self) -> None:
        acc = self.accumulator
        if isinstance(acc, IeeeFormat):
            if not (isinstance(self.weight, FloatOperand) and isinstance(self.activation, FloatOperand)):
                raise ValueError(f"the baseline {acc} takes float operands, not {self.weight} and {self.activation}")
            if self.unnormalised_range[0] < acc.emin:
                raise ValueError(
                    f"products of {self.weight} and {self.activation} have exponents down to "
                    f"{self.unnormalised_range[0]}, below the {acc.emin} of {acc}: give the operands smaller biases"
                )
            return
        if acc.is_template:
            raise ValueError(f'accumulator "{acc}" is a template: hardware needs a bias, like "{acc.format}b10"')
        if not acc.underflow:
            raise ValueError("underflow=False is a stage of training, and no hardware does it: leave it out")
        for format in (acc.format, acc.product):
            if isinstance(format, FixedFormat) and self.product_range[1] + format.fraction + 1 > MAX_WINDOW:
                raise ValueError(
                    f"products of {self.weight} and {self.activation} reach 2^{self.product_range[1] + 1}, more than "
                    f"2^{MAX_WINDOW} steps of {format}: choose fewer fraction bits, or operands of larger bias"
                )

    def __str__(self) -> str:
        return f"{self.accumulator} weight={self.weight} activation={self.activation}"

    @property
    def format(self) -> RegisterFormat:
        """The format of s and y."""
        return self.accumulator if isinstance(self.accumulator, IeeeFormat) else self.accumulator.format

    @property
    def product(self) -> FloatFormat | FixedFormat | None:
        """The format of the product, None where it stays exact."""
        return None if isinstance(self.accumulator, IeeeFormat) else self.accumulator.product

    @property
    def product_bits(self) -> int:
        """Bits of the product as it enters the sum: its format's code; where it stays exact, those of its value.

        An exact product of two integers is an integer of both widths; any other has sign, exponent and significand.
        """
        if self.product is not None:
            return self.product.bits
        if isinstance(self.weight, IntegerOperand) and isinstance(self.activation, IntegerOperand):
            return self.significand_bits
        low, top = self.unnormalised_range
        return 1 + (top - low).bit_length() + self.significand_bits

    @property
    def rounding(self) -> str:
        """How the sum is rounded."""
        return "nearest_even" if isinstance(self.accumulator, IeeeFormat) else self.accumulator.rounding

    @property
    def product_rounding(self) -> str:
        """How the product is rounded, where it has a format."""
        return "nearest_even" if isinstance(self.accumulator, IeeeFormat) else self.accumulator.rounding_of_products

    @property
    def random_bits(self) -> int:
        """Width of each random integer; 0 without stochastic rounding of the unit's."""
        return max(self.inputs.get("r_product", 0), self.inputs.get("r_sum", 0))

    @property
    def centred(self) -> bool:
        """Random integers are odd."""
        return not isinstance(self.accumulator, IeeeFormat) and self.accumulator.centred

    @property
    def register_bits(self) -> int:
        """Wires of s and y, see `register_bits`."""
        return register_bits(self.format)

    @cached_property
    def merge(self) -> Level:
        """How a multiply-accumulate adds sums of chunks. The unit itself makes steps, which no level changes.

        Raises:
            ValueError: there is none, of an IEEE baseline; there are two or more; or float32 does not hold the sums.
        """
        acc = self.accumulator
        if isinstance(acc, IeeeFormat):
            raise ValueError(f"the baseline {acc} has a unit, and no chunked multiply-accumulate")
        first, *more = acc.levels
        if more:
            raise ValueError(
                f"a multiply-accumulate has one level above its chunks, and {acc} has {1 + len(more)}: give an outer "
                f"format, or an outer accumulator in one chunk, like outer={first.format}"
            )
        if isinstance(first.format, Float32Format) and (acc.format.emin < -126 or acc.format.emax > 127):
            raise ValueError(
                f"float32 does not hold the sums of {acc.format}, which outer=fp32 adds: choose another bias"
            )
        return first

    @property
    def merge_random_bits(self) -> int:
        """Width of the random integers of merges; 0 where they are not stochastic."""
        return self.merge.random_bits if self.merge.rounding == "stochastic" else 0

    @property
    def total(self) -> RegisterFormat:
        """The format of a multiply-accumulate's dot products; errors as of `merge`."""
        format = self.merge.format
        return IEEE["ieee32"] if isinstance(format, Float32Format) else format

    @property
    def unnormalised_range(self) -> tuple[int, int]:
        """Exponents of the multiplier's top bit, before any normalisation: smallest and largest."""
        lows, tops = zip(*(_exponents(operand) for operand in (self.weight, self.activation)), strict=True)
        return sum(lows) + 1, sum(tops) + 1

    @property
    def product_range(self) -> tuple[int, int]:
        """Exponents of the nonzero products: smallest and largest."""
        low, top = self.unnormalised_range
        return low - self.significand_bits + 1, top

    @property
    def significand_bits(self) -> int:
        """Width of the product of the two significands."""
        return sum(o.mantissa + 1 if isinstance(o, FloatOperand) else o.width for o in (self.weight, self.activation))

    @cached_property
    def inputs(self) -> dict[str, int]:
        """Input ports and their widths."""
        ports = {"x": self.activation.bits, "w": self.weight.bits, "s": self.register_bits}
        if isinstance(self.accumulator, IeeeFormat):
            return ports
        bits = self.accumulator.random_bits
        ports |= {"r_product": bits} if self.product is not None and self.product_rounding == "stochastic" else {}
        return ports | ({"r_sum": bits} if self.rounding == "stochastic" else {})

    def golden(self, vectors: Mapping[str, Codes]) -> Values:
        """The values y must have.

        Args:
            vectors: codes of every input port, arrays of one shape.
        Returns:
            float64 of that shape; compare with `format.decode(y)`, since a zero has several codes.
        """
        x, w = self.activation.decode(vectors["x"]), self.weight.decode(vectors["w"])
        s = self.format.decode(vectors["s"])
        acc, p = self.accumulator, x * w
        if isinstance(acc, IeeeFormat):
            with np.errstate(invalid="ignore"):
                total = np.where(np.isfinite(s), exact_sum(np.where(np.isfinite(s), s, 0), p), s)
            return acc.round(total)
        of_product, of_sum = (np.asarray(vectors.get(name, 0)) | acc.centred for name in ("r_product", "r_sum"))
        if acc.product is not None:
            p = quantize(p, acc.product, acc.rounding_of_products, True, acc.random_bits, of_product)
        return quantize(exact_sum(s, p), acc.format, acc.rounding, True, acc.random_bits, of_sum)


def register_bits(format: RegisterFormat) -> int:
    """Wires of a register: the format's code, and the zero flag of zero="flag"."""
    return format.bits + (getattr(format, "zero", None) == "flag")


def dot_products(unit: Unit, x: Codes, w: Codes) -> Values:
    """The totals of the chunked multiply-accumulate, for dot products that come one after another.

    Args:
        x, w: codes of the operands, (products, steps), or with further axes: units that work side by side.
    Returns:
        (products, ...); stochastic rounding takes the integers of the hardware's own shift registers.
    Raises:
        ValueError: as `Unit.merge`.
    """
    acc, level = unit.accumulator, unit.merge
    assert isinstance(acc, Accumulator)
    count, steps, *units = x.shape
    chunk = min(acc.chunk or steps, steps)
    of_steps, of_merges = _shift_registers(unit, count, steps, -(-steps // chunk))

    def each(randoms: Codes) -> Codes:
        return np.broadcast_to(randoms.reshape(-1, *(1 for _ in units)), (count, *units))

    s, t = np.zeros((count, *units)), np.zeros((count, *units))
    for k in range(steps):
        randoms = {name: each(values[:, k]) for name, values in of_steps.items()}
        s = unit.golden({"x": x[:, k], "w": w[:, k], "s": unit.format.encode(s), **randoms})
        if (k + 1) % chunk == 0 or k == steps - 1:
            r = each(of_merges[:, k // chunk]) | level.centred
            with np.errstate(invalid="ignore"):  # infinities of float32
                t = quantize(exact_sum(t, s), level.format, level.rounding, True, level.random_bits, r)
            s = np.zeros_like(s)
    return t


def _shift_registers(unit: Unit, count: int, steps: int, merges: int) -> tuple[dict[str, Codes], Codes]:
    """The random integers of every step, (count, steps) by port, and of every merge, (count, merges)."""
    bits, names = unit.random_bits, [name for name in unit.inputs if name.startswith("r_")]
    words = _words(bits * len(names), STEP_SEED, count, steps)
    ports = {name: words >> index * bits & (1 << bits) - 1 for index, name in enumerate(names)}
    return ports, _words(unit.merge_random_bits, MERGE_SEED, count, merges)


def _words(bits: int, seed: int, *shape: int) -> Codes:
    """What a shift register gives, one after another; zeros where there is none."""
    count = int(np.prod(shape))
    return np.array(lfsr_sequence(bits, seed, count) if bits else [0] * count).reshape(shape)


def _exponents(operand: Operand) -> tuple[int, int]:
    """Exponents of the top bit of an operand's significand."""
    if isinstance(operand, FloatOperand):
        return 1 - operand.bias, 2**operand.exponent - 1 - operand.bias
    return operand.width - 1, operand.width - 1
