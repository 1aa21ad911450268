"""What the arithmetic is: formats, the accumulator, and the reference that defines both. NumPy alone."""

from fmaq.numerics import reference
from fmaq.numerics.accumulator import ROUNDINGS, Accumulator, Level, paper_bias
from fmaq.numerics.formats import FLOAT32, FixedFormat, Float32Format, FloatFormat, Format, parse_format

__all__ = [
    "FLOAT32",
    "ROUNDINGS",
    "Accumulator",
    "FixedFormat",
    "Float32Format",
    "FloatFormat",
    "Format",
    "Level",
    "paper_bias",
    "parse_format",
    "reference",
]
