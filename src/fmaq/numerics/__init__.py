"""What the arithmetic is: formats, the accumulator, and the reference that defines both. NumPy alone."""

from fmaq.numerics import reference
from fmaq.numerics.accumulator import Accumulator, paper_bias
from fmaq.numerics.formats import FixedFormat, FloatFormat, Format, parse_format

__all__ = ["Accumulator", "FixedFormat", "FloatFormat", "Format", "paper_bias", "parse_format", "reference"]
