"""Number formats: what a register of the accumulator can hold, its name, and its integer codes.

A format is a description, immutable and hashable. `FloatFormat` is the small custom float of arXiv 2401.14110;
`FixedFormat` is two's complement, the accumulator of integer engines. Rounding to a format is in `reference`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

FLOAT_NAME = re.compile(r"M(\d+)E(\d+)(?:b(-?\d+))?(z?)(h?)")
FIXED_NAME = re.compile(r"I(\d+)(?:f(-?\d+))?(w?)")
EXPONENT_FIRST = re.compile(r"(?:torch\.)?(?:fp|float)?\d*_?e(\d+)m(\d+)(b-?\d+)?(?:z|fn|fnuz|b11fnuz)?", re.IGNORECASE)
MANTISSA_FIRST = re.compile(r"m(\d+)e(\d+)(b-?\d+)?(z?h?)", re.IGNORECASE)
TYPES = {
    "M10E5": ("fp16", "float16", "half", "torch.float16"),
    "M7E8": ("bf16", "bfloat16", "torch.bfloat16"),
    "M10E8": ("tf32",),
}
"""Formats of as many bits as a type that goes by another name."""


def meant_by(name: Any) -> str:
    """What a wrong name of a format probably means, as the end of a message: "; did you mean …", or nothing."""
    text = str(name).strip()
    if match := EXPONENT_FIRST.fullmatch(text):
        exponent, mantissa, bias = match.groups()
        return f'; did you mean "M{mantissa}E{exponent}{(bias or "").lower()}"? Here the mantissa stands first'
    if match := MANTISSA_FIRST.fullmatch(text):
        mantissa, exponent, bias, ending = match.groups()
        return f'; did you mean "M{mantissa}E{exponent}{(bias or "").lower()}{ending.lower()}"?'
    for own in (text.lower(), text[:1].upper() + text[1:].lower()):
        if FIXED_NAME.fullmatch(own) or re.fullmatch(r"int\d+", own):
            return f'; did you mean "{own}"?'
    known = next((format for format, names in TYPES.items() if text.lower() in names), None)
    return "" if known is None else f'; did you mean "{known}", which has as many bits?'


def _whole(value: Any, what: str, low: int, high: int) -> int:
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{what} must be an integer, got {value!r}")
    if not low <= value <= high:
        raise ValueError(f"{what} must be from {low} to {high}, got {value}")
    return int(value)


def _codes(codes: ArrayLike, bits: int, format: Format) -> NDArray[np.int64]:
    """Codes as int64, refused where they are not integers from 0 to 2^bits − 1."""
    c = np.asarray(codes)
    if c.size and c.dtype.kind not in "iu":
        raise TypeError(f"codes of {format} are integers, got an array of {c.dtype}")
    if np.any((c < 0) | (c >= 1 << bits)):
        raise ValueError(f"codes of {format} are from 0 to {(1 << bits) - 1}")
    return c.astype(np.int64)


@dataclass(frozen=True)
class FloatFormat:
    """Sign and magnitude ±2^e·(1+i/2^M), 0 ≤ i < 2^M, and zero; no infinities, NaN or subnormals.

    A *half-unit biased* format (Hormigo and Villalba, "New formats for computing with real-numbers under
    round-to-nearest", IEEE Transactions on Computers 65(7), 2016) holds ±2^e·(1+(i+½)/2^M) instead: the register keeps
    i, the half is implied. Dropping bits then leaves the middle of the interval that they told apart, which is rounding
    to the nearest at the price of truncation.

    Args:
        mantissa: M, explicit bits of the significand, 0 to 23 (22 with half_unit).
        exponent: E, bits of the exponent, 1 to 8.
        bias: b, −700 to 700, so that an exponent code c means e = c − b. None makes a *template*, whose
            bias is still to be chosen.
        zero: `"flag"`, zero is known apart from the code and e starts at −b (arXiv 2401.14110);
            `"exponent"`, exponent code 0 means zero and e starts at 1 − b (flush-to-zero hardware).
        half_unit: a half of the last place is implied behind it, `"M5E4b10h"`. Such a register truncates; a magnitude
            below 2^emin is flushed, one of 2^(emax+1) or more overflows.

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of its range.
    """

    mantissa: int
    exponent: int
    bias: int | None = None
    zero: Literal["flag", "exponent"] = "flag"
    half_unit: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.half_unit, bool):
            raise TypeError(f"half_unit must be True or False, got {self.half_unit!r}")
        what = "mantissa of a half-unit format" if self.half_unit else "mantissa"
        object.__setattr__(self, "mantissa", _whole(self.mantissa, what, 0, 23 - self.half_unit))
        object.__setattr__(self, "exponent", _whole(self.exponent, "exponent", 1, 8))
        if self.bias is not None:
            object.__setattr__(self, "bias", _whole(self.bias, "bias", -700, 700))
        if self.zero not in ("flag", "exponent"):
            raise ValueError(f'zero must be "flag" or "exponent", got {self.zero!r}')

    @classmethod
    def parse(cls, name: str) -> FloatFormat:
        """The format of a name such as `"M7E4b10"`, or the template `"M7E4"`.

        Behind it, "z" means zero="exponent" and "h" half_unit: `"M7E4b10z"`, `"M5E4b10h"`, `"M5E4b10zh"`.
        """
        match = FLOAT_NAME.fullmatch(name.strip())
        if match is None:
            how = 'write M<mantissa>E<exponent>b<bias>, like "M7E4b10"'
            raise ValueError(f"{name!r} is not a float format; {how}{meant_by(name)}")
        mantissa, exponent, b, z, h = match.groups()
        bias = None if b is None else int(b)
        return cls(int(mantissa), int(exponent), bias, "exponent" if z else "flag", bool(h))

    def __str__(self) -> str:
        bias = "" if self.bias is None else f"b{self.bias}"
        return f"M{self.mantissa}E{self.exponent}{bias}{'z' * (self.zero == 'exponent')}{'h' * self.half_unit}"

    @property
    def is_template(self) -> bool:
        """True where the bias is still to be chosen."""
        return self.bias is None

    @property
    def bits(self) -> int:
        """Width of a code: 1 + M + E. With zero="flag" a register keeps one more bit, the flag."""
        return 1 + self.mantissa + self.exponent

    def _bias(self) -> int:
        if self.bias is None:
            raise ValueError(
                f'format "{self}" is a template: it has no bias. Write one, like "{replace(self, bias=10)}"'
            )
        return self.bias

    @property
    def emin(self) -> int:
        """The smallest exponent of a nonzero value."""
        return -self._bias() + (self.zero == "exponent")

    @property
    def emax(self) -> int:
        """The largest exponent, 2^E − 1 − b."""
        return 2**self.exponent - 1 - self._bias()

    @property
    def significant(self) -> int:
        """Bits behind the leading one that values have: M, and the implied half."""
        return self.mantissa + self.half_unit

    @property
    def tiny(self) -> float:
        """The smallest magnitude above zero, 2^emin (and half a unit)."""
        return float(np.ldexp(1.0 + self.half_unit * 2.0**-self.significant, self.emin))

    @property
    def max(self) -> float:
        """The largest magnitude, 2^emax·(2 − 2^−M), or of half-unit formats 2^emax·(2 − 2^−(M+1))."""
        return float(np.ldexp(2.0 - 2.0**-self.significant, self.emax))

    @property
    def min(self) -> float:
        """The most negative value, −max."""
        return -self.max

    def encode(self, values: ArrayLike) -> Any:
        """Integer codes of values of this format: sign, exponent, mantissa from the top bit down.

        Zero is the flag bit above the code, `1 << bits`, with zero="flag", and code 0 with zero="exponent".

        Args:
            values: numbers, any shape.
        Returns:
            int64 of the same shape (a Python int for a scalar).
        Raises:
            ValueError: a value is not one of this format's.
        """
        v = np.asarray(values, np.float64)
        significand, e = np.frexp(np.abs(v))
        i = np.ldexp(2 * significand - 1, self.mantissa) - 0.5 * self.half_unit
        e = e.astype(np.int64) - 1
        fits = (v == 0) | ((e >= self.emin) & (e <= self.emax) & (i == np.floor(i)))
        if not np.all(fits & np.isfinite(v)):
            wrong = v[~(fits & np.isfinite(v))].flat[0]
            is_small = 0 < abs(wrong) < 2.0**self.emin
            hint = (
                f": it is below the smallest magnitude, {self.tiny:g}. A tensor's format of that name has subnormals "
                "there; fmaq.hardware.parse_operand encodes those"
            )
            raise ValueError(f"{wrong!r} is not a value of {self}; quantize it first{hint if is_small else ''}")
        sign = np.signbit(v).astype(np.int64) << (self.bits - 1)
        code = sign | (e + self._bias()) << self.mantissa | np.where(v == 0, 0, i).astype(np.int64)
        code = np.where(v == 0, 0 if self.zero == "exponent" else 1 << self.bits, code)
        return int(code) if code.ndim == 0 else code

    def decode(self, codes: ArrayLike) -> Any:
        """Values of integer codes, the inverse of `encode`.

        Args:
            codes: integers, any shape; bit `bits` is the zero flag of zero="flag".
        Returns:
            float64 of the same shape (a Python float for a scalar).
        Raises:
            TypeError, ValueError: a code is not an integer, or has bits beyond the format's.
        """
        c = _codes(codes, self.bits + (self.zero == "flag"), self)
        field = (c >> self.mantissa) & ((1 << self.exponent) - 1)
        i = (c & ((1 << self.mantissa) - 1)) + 0.5 * self.half_unit
        magnitude = np.ldexp(1 + np.ldexp(i, -self.mantissa), field - self._bias())
        is_zero = (c >> self.bits) == 1 if self.zero == "flag" else field == 0
        value = np.where(is_zero, 0.0, np.where((c >> (self.bits - 1)) & 1, -magnitude, magnitude))
        return float(value) if value.ndim == 0 else value


@dataclass(frozen=True)
class FixedFormat:
    """Two's complement: multiples of 2^−F in [−2^(W−1), 2^(W−1) − 1]·2^−F.

    Args:
        width: W, bits in all, 2 to 32.
        fraction: F, bits behind the point, −64 to 64. 0 is the integer accumulator of int8 engines.
        overflow: `"saturate"` or `"wrap"` (keep the low W bits, as A2Q and WrapNet's accumulators do).

    Raises:
        TypeError, ValueError: a field is of the wrong type or out of its range.
    """

    width: int
    fraction: int = 0
    overflow: Literal["saturate", "wrap"] = "saturate"

    def __post_init__(self) -> None:
        object.__setattr__(self, "width", _whole(self.width, "width", 2, 32))
        object.__setattr__(self, "fraction", _whole(self.fraction, "fraction", -64, 64))
        if self.overflow not in ("saturate", "wrap"):
            raise ValueError(f'overflow must be "saturate" or "wrap", got {self.overflow!r}')

    @classmethod
    def parse(cls, name: str) -> FixedFormat:
        """The format of a name such as `"I16f4"` or `"I16f4w"` (wrap)."""
        match = FIXED_NAME.fullmatch(name.strip())
        if match is None:
            how = 'write I<width>f<fraction>, like "I16f4" or "I16f4w"'
            raise ValueError(f"{name!r} is not a fixed format; {how}{meant_by(name)}")
        width, fraction, w = match.groups()
        return cls(int(width), int(fraction or 0), "wrap" if w else "saturate")

    def __str__(self) -> str:
        return f"I{self.width}f{self.fraction}{'w' if self.overflow == 'wrap' else ''}"

    @property
    def is_template(self) -> bool:
        """Always False: a fixed format has no bias to choose."""
        return False

    @property
    def half_unit(self) -> bool:
        """Always False: only float formats are."""
        return False

    @property
    def significant(self) -> int:
        """Bits behind the leading one that values have at most, W − 2."""
        return self.width - 2

    @property
    def bits(self) -> int:
        """Width of a code, W."""
        return self.width

    @property
    def tiny(self) -> float:
        """The smallest magnitude above zero, the step 2^−F."""
        return float(np.ldexp(1.0, -self.fraction))

    @property
    def max(self) -> float:
        """The largest value, (2^(W−1) − 1)·2^−F."""
        return float(np.ldexp(2.0 ** (self.width - 1) - 1, -self.fraction))

    @property
    def min(self) -> float:
        """The most negative value, −2^(W−1)·2^−F."""
        return float(np.ldexp(-(2.0 ** (self.width - 1)), -self.fraction))

    @property
    def emin(self) -> int:
        """The exponent of the smallest magnitude, −F."""
        return -self.fraction

    @property
    def emax(self) -> int:
        """The exponent of the largest magnitude, W − 1 − F (that of the most negative value)."""
        return self.width - 1 - self.fraction

    def encode(self, values: ArrayLike) -> Any:
        """Two's-complement codes, 0 to 2^W − 1, of values of this format (see `FloatFormat.encode`)."""
        steps = np.ldexp(np.asarray(values, np.float64), self.fraction)
        half = 2.0 ** (self.width - 1)
        fits = (steps == np.floor(steps)) & (steps >= -half) & (steps < half)
        if not np.all(fits):
            wrong = np.asarray(values, np.float64)[~fits].flat[0]
            raise ValueError(f"{wrong!r} is not a value of {self}; quantize it first")
        code = steps.astype(np.int64) & ((1 << self.width) - 1)
        return int(code) if code.ndim == 0 else code

    def decode(self, codes: ArrayLike) -> Any:
        """Values of two's-complement codes, the inverse of `encode`."""
        c = _codes(codes, self.width, self)
        signed = c - ((c >> (self.width - 1)) << self.width)
        value = np.ldexp(signed.astype(np.float64), -self.fraction)
        return float(value) if value.ndim == 0 else value


Format = FloatFormat | FixedFormat


@dataclass(frozen=True)
class Float32Format:
    """IEEE 754's float32, written `"fp32"`, as the outermost level of a sum: to the nearest even, with subnormals.

    What rounds above the largest becomes infinite.
    """

    mantissa = 23
    significant = 23
    emin = -126
    emax = 127
    bits = 32
    half_unit = False
    is_template = False
    tiny = 2.0**-149
    max = 2.0**128 - 2.0**104
    min = -max

    def __str__(self) -> str:
        return "fp32"


FLOAT32 = Float32Format()


def parse_format(name: str | Format) -> Format:
    """A format from its name: `"M7E4b10"`, `"M7E4b10z"`, `"M5E4b10h"`, `"M7E4"` (template), `"I16f4"`, `"I16f4w"`.

    Raises:
        TypeError: not a name nor a format.
        ValueError: not a name of either kind, or a field out of its range.
    """
    if isinstance(name, (FloatFormat, FixedFormat)):
        return name
    if not isinstance(name, str):
        known = 'a format is a name like "M7E4b10" or "I16f4", or a FloatFormat or FixedFormat'
        raise TypeError(f"{known}; got {name!r}{meant_by(name)}")
    if FLOAT_NAME.fullmatch(name.strip()):
        return FloatFormat.parse(name)
    if FIXED_NAME.fullmatch(name.strip()):
        return FixedFormat.parse(name)
    raise ValueError(
        f'{name!r} is not a format; write a float like "M7E4b10" (M<mantissa>E<exponent>b<bias>, "z" behind it for '
        f'zero at exponent code 0, "h" for half-unit) or a fixed one like "I16f4" (I<width>f<fraction>, "w" behind it '
        f"to wrap){meant_by(name)}"
    )
