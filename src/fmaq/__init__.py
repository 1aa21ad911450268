"""Neural networks whose dot products are summed in low bit-width accumulators (arXiv 2401.14110)."""

from fmaq.numerics import Accumulator, FixedFormat, FloatFormat

__version__ = "0.1.0"

__all__ = ["Accumulator", "FixedFormat", "FloatFormat"]
