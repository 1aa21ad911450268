"""What tests of the reference draw: formats, accumulators and operands, awkward ones among them."""

import numpy as np
from hypothesis import strategies as st

from fmaq.numerics import ROUNDINGS, Accumulator, FixedFormat, FloatFormat
from strategies import fresh_accumulators

FLOAT32_MAX = float(np.finfo(np.float32).max)


@st.composite
def float_formats(draw):
    exponent = draw(st.integers(1, 8))
    near_one = st.integers(-2, 2**exponent + 1)
    bias = draw(st.one_of(near_one, near_one, near_one, st.integers(-140, 260), st.sampled_from([-700, 700])))
    half_unit = draw(st.booleans())
    mantissa, zero = draw(st.integers(0, 23 - half_unit)), draw(st.sampled_from(["flag", "exponent"]))
    return FloatFormat(mantissa, exponent, bias, zero, half_unit)


fixed_formats = st.builds(
    FixedFormat,
    width=st.integers(2, 32),
    fraction=st.one_of(st.integers(-4, 12), st.integers(-64, 64)),
    overflow=st.sampled_from(["saturate", "wrap"]),
)
formats = st.one_of(float_formats(), fixed_formats)
accumulators = fresh_accumulators(
    formats, st.one_of(st.none(), formats), st.sampled_from(ROUNDINGS), chunks=(1, 2, 3, 3, 16, None)
)


@st.composite
def operands(draw, acc: Accumulator):
    """A float32: zero, a short significand near the format's ends or near one, or anything at all."""
    end = acc.product or acc.format
    exponents = [0, 1, acc.format.emin, acc.format.emax, end.emin // 2, end.emax // 2, -126, 127]
    kind = draw(st.sampled_from(["zero", "short", "short", "short", "integer", "any", "huge", "subnormal"]))
    if kind == "zero":
        return 0.0
    if kind == "integer":
        return float(draw(st.integers(-16, 16)))
    if kind == "any":
        return draw(st.floats(width=32, allow_nan=False, allow_infinity=False))
    if kind == "huge":
        return draw(st.sampled_from([1e38, -1e38, FLOAT32_MAX, -FLOAT32_MAX, 2.0**127]))
    if kind == "subnormal":
        return draw(st.sampled_from([-1, 1])) * draw(st.integers(1, 2**23 - 1)) * 2.0**-149
    bits = draw(st.sampled_from([0, 1, acc.format.bits // 2, 11, 23]))
    significand = 1 + draw(st.integers(0, 2**bits - 1)) / 2**bits
    exponent = min(max(draw(st.sampled_from(exponents)) + draw(st.integers(-2, 2)), -126), 127)
    return draw(st.sampled_from([-1.0, 1.0])) * significand * 2.0**exponent
