"""Operand formats of a hardware unit: the floats of quantized tensors, and integers, as codes on wires.

A float operand is what `fmaq.quantize(x, "M4E3")` makes of a tensor: sign, exponent and mantissa from the top bit
down, normal numbers from 2^(1−b), and subnormals below, where the exponent's code is 0. No infinities, no NaN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmaq.numerics import FloatFormat, parse_format
from fmaq.numerics.formats import meant_by

Codes = NDArray[np.int64]

INTEGER_NAME = re.compile(r"int(\d+)")
MAX_MANTISSA, MAX_EXPONENT, MAX_INTEGER = 10, 6, 16


@dataclass(frozen=True)
class FloatOperand:
    """(1 + i/2^M)·2^(c−b) for exponent codes c ≥ 1, and (i/2^M)·2^(1−b) for c = 0.

    Attributes:
        mantissa: M, 0 to 10 bits.
        exponent: E, 1 to 6 bits.
        bias: b; a tensor's flexible bias scales its products by a power of two, which the accumulator's bias takes up.
    """

    mantissa: int
    exponent: int
    bias: int

    def __str__(self) -> str:
        return f"M{self.mantissa}E{self.exponent}b{self.bias}"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return 1 + self.exponent + self.mantissa

    def decode(self, codes: ArrayLike) -> NDArray[np.float64]:
        """Values of codes 0 to 2^bits − 1, any shape."""
        c = np.asarray(codes, np.int64)
        field = (c >> self.mantissa) & ((1 << self.exponent) - 1)
        i = c & ((1 << self.mantissa) - 1)
        significand = np.where(field > 0, i + (1 << self.mantissa), i).astype(np.float64)
        magnitude = np.ldexp(significand, np.maximum(field, 1) - self.bias - self.mantissa)
        return np.where((c >> (self.bits - 1)) & 1, -magnitude, magnitude)

    def encode(self, values: ArrayLike) -> Codes:
        """Codes of values of this format.

        Raises:
            ValueError: a value is not one of this format's.
        """
        v = np.asarray(values, np.float64)
        _, e = np.frexp(v)
        field = np.where(v == 0, 0, np.maximum(e - 1 + self.bias, 0))
        significand = np.abs(np.ldexp(v, self.mantissa + self.bias - np.maximum(field, 1)))
        i = np.where(field > 0, significand - (1 << self.mantissa), significand).astype(np.int64)
        codes = (np.signbit(v).astype(np.int64) << (self.bits - 1)) | (field << self.mantissa) | i
        in_range = (significand < 2 << self.mantissa) & (field < 1 << self.exponent) & np.isfinite(v)
        if not np.all(in_range & (self.decode(codes & ((1 << self.bits) - 1)) == v)):
            raise ValueError(f"not every value is one of {self}; quantize the tensor first")
        return codes.astype(np.int64)


@dataclass(frozen=True)
class IntegerOperand:
    """Two's complement, −2^(width−1) to 2^(width−1) − 1.

    Attributes:
        width: 2 to 16 bits.
    """

    width: int

    def __str__(self) -> str:
        return f"int{self.width}"

    @property
    def bits(self) -> int:
        """Width of a code."""
        return self.width

    def decode(self, codes: ArrayLike) -> NDArray[np.float64]:
        """Values of codes 0 to 2^width − 1, any shape."""
        c = np.asarray(codes, np.int64)
        return (c - ((c >> (self.width - 1)) << self.width)).astype(np.float64)

    def encode(self, values: ArrayLike) -> Codes:
        """Codes of integers in range.

        Raises:
            ValueError: a value is not one of this format's.
        """
        v = np.asarray(values, np.float64)
        half = 1 << (self.width - 1)
        if not np.all((v == np.floor(v)) & (v >= -half) & (v < half)):
            raise ValueError(f"not every value is an {self}, an integer from {-half} to {half - 1}")
        return v.astype(np.int64) & ((1 << self.width) - 1)


Operand = FloatOperand | IntegerOperand


def parse_operand(name: Any, role: str = "operand") -> Operand:
    """The operand format of a name: `"M4E3"`, `"M4E3b5"` or `"int8"`.

    Without a bias in the name, b = 2^E − 1: the largest exponent is 0, and every magnitude is below 2.

    Args:
        role: what the operand is, for the error.
    Raises:
        TypeError, ValueError: it is no operand format, or one too wide for the unit.
    """
    if isinstance(name, (FloatOperand, IntegerOperand)):
        return name
    text = str(name).strip()
    match = INTEGER_NAME.fullmatch(text)
    if match:
        width = int(match[1])
        if not 2 <= width <= MAX_INTEGER:
            raise ValueError(f"{role} format {text!r} does not fit the unit: integers have 2 to {MAX_INTEGER} bits")
        return IntegerOperand(width)
    try:
        format = parse_format(name)
    except ValueError:
        format = None
    if not isinstance(format, FloatFormat) or format.zero != "flag" or format.half_unit:
        how = 'write a float like "M4E3" or "int8"'
        raise ValueError(f"{role} format {text!r} is not one of the unit's; {how}{meant_by(text)}")
    if format.mantissa > MAX_MANTISSA or format.exponent > MAX_EXPONENT:
        raise ValueError(
            f"{role} format {text!r} does not fit the unit: float operands have at most {MAX_MANTISSA} mantissa "
            f"and {MAX_EXPONENT} exponent bits"
        )
    bias = 2**format.exponent - 1 if format.bias is None else format.bias
    return FloatOperand(format.mantissa, format.exponent, bias)


def has_bias(name: str) -> bool:
    """Whether a float format's name fixes the bias; an integer has none."""
    return re.fullmatch(r"\s*M\d+E\d+b-?\d+z?\s*", name) is not None
