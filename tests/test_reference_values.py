"""Rounding of single values and of tensors, against exact fractions (`exact.py`), `gfloat` and `ml_dtypes`."""

from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exact import floor_log2, in_register, on_grid, power
from fmaq.numerics import FLOAT32, ROUNDINGS, FloatFormat, parse_format, reference
from reference_cases import FLOAT32_MAX, accumulators, formats, operands

# --- Rounding ---------------------------------------------------------------------------------------------------------

wide_floats = st.builds(
    lambda significand, exponent: float(np.ldexp(significand, exponent)),
    st.one_of(st.integers(-(2**53), 2**53), st.integers(-40, 40)),
    st.integers(-300, 200),
)


@given(wide_floats, st.one_of(wide_floats, st.just(None)), st.integers(-60, 60))
def test_exact_sum_rounds_to_odd(s, p, shift):
    p = float(np.ldexp(s, shift)) if p is None else p
    exact = Fraction(s) + Fraction(p)
    total = float(reference.exact_sum(s, p))
    if total == exact:
        return
    bits = total.hex().split("p")[0]
    assert int(bits[-1], 16) % 2 == 1, "an inexact sum has an odd last bit"
    below, above = sorted((np.nextafter(total, -np.inf), np.nextafter(total, np.inf)))
    assert Fraction(below) < exact < Fraction(above)


@settings(max_examples=400)
@given(accumulators, st.data())
def test_quantize(acc, data):
    x = data.draw(operands(acc)) * data.draw(operands(acc))
    r = data.draw(st.integers(0, 2**acc.random_bits - 1))
    rounded = on_grid(Fraction(x), acc.format, acc.rounding, acc.random_bits, r)
    assert Fraction(float(reference.round_to_grid(x, acc.format, acc.rounding, acc.random_bits, r))) == rounded
    kept = reference.quantize(x, acc.format, acc.rounding, acc.underflow, acc.random_bits, r)
    assert Fraction(float(kept)) == in_register(rounded, acc.format, acc.underflow)


@settings(max_examples=60)
@given(formats, st.sampled_from(ROUNDINGS), st.data())
def test_values_of_a_format_stay(format, rounding, data):
    rounding = "toward_zero" if format.half_unit else rounding
    code = data.draw(st.integers(0, 2**format.bits - 1))
    value = format.decode(code)
    assert reference.quantize(value, format, rounding, True, 8, 255) == value


@pytest.mark.parametrize(
    ("name", "rounding", "x", "expected"),
    [
        ("M2E3b3", "toward_zero", 1.99, 1.75),
        ("M2E3b3", "toward_zero", -1.99, -1.75),
        ("M2E3b3", "nearest_even", 1.125, 1.0),  # ties
        ("M2E3b3", "nearest_even", 1.375, 1.5),
        ("M2E3b3", "nearest_even", -1.375, -1.5),
        ("M2E3b3", "nearest_even", 1.99, 2.0),  # into the next binade
        ("M0E3b3", "nearest_even", 1.5, 2.0),  # one digit only: a tie goes to the larger (IEEE 754-2019, 4.3.1)
        ("M2E3b3", "toward_zero", 1e30, 28.0),
        ("M2E3b3", "nearest_even", -1e30, -28.0),
        ("M2E3b3", "toward_zero", 0.1249, 0.0),
        ("M2E3b3", "nearest_even", 0.1249, 0.125),  # first to the grid, then below the smallest or not
        ("M2E3b3z", "toward_zero", 0.2499, 0.0),
        ("I4f1", "toward_zero", 1.99, 1.5),
        ("I4f1", "toward_zero", -1.99, -1.5),  # the magnitude's floor, not the number's
        ("I4f1", "nearest_even", 1.25, 1.0),
        ("I4f1", "nearest_even", -1.75, -2.0),
        ("I4f1", "toward_zero", 100.0, 3.5),
        ("I4f1", "toward_zero", -100.0, -4.0),
        ("I4f1w", "toward_zero", 4.0, -4.0),
        ("I4f1w", "toward_zero", -4.5, 3.5),
        ("I4f1w", "toward_zero", -4.0, -4.0),
        ("I4f1w", "toward_zero", 8.5, 0.5),
        ("I4f1w", "nearest_even", 3.75, -4.0),
        ("M2E3b3", "nearest_away", 1.125, 1.25),
        ("M2E3b3", "nearest_away", -1.125, -1.25),
        ("M2E3b3", "nearest_away", 1.12, 1.0),
        ("M2E3b3", "nearest_away", 0.1249, 0.125),
        ("M0E3b3", "nearest_away", 1.5, 2.0),
        ("M2E3b3", "floor", 1.99, 1.75),
        ("M2E3b3", "floor", -1.01, -1.25),
        ("M2E3b3", "floor", -1.9999, -2.0),
        ("M2E3b3", "floor", -1e-30, 0.0),  # to the grid, then below the smallest
        ("M2E3b3", "half_up", 1.125, 1.25),
        ("M2E3b3", "half_up", -1.125, -1.0),
        ("M2E3b3", "half_up", -1.126, -1.25),
        ("M2E3b3", "odd", 1.01, 1.25),
        ("M2E3b3", "odd", -1.26, -1.25),
        ("M2E3b3", "odd", 1.5, 1.5),
        ("M0E3b3", "odd", 1.99, 1.0),  # a significand of one bit is odd
        ("I4f1", "nearest_away", -1.25, -1.5),
        ("I4f1", "floor", -1.01, -1.5),
        ("I4f1", "floor", -1e-30, -0.5),
        ("I4f1", "half_up", -1.25, -1.0),
        ("I4f1", "half_up", 1.25, 1.5),
        ("I4f1", "half_up", -0.25 - 2**-40, -0.5),
        ("I4f1", "odd", 1.01, 1.5),
        ("I4f1", "odd", -2.01, -2.5),
        ("I4f1", "odd", 1e-30, 0.5),
        ("I4f1", "odd", 3.51, 3.5),
        ("M2E3b3h", "toward_zero", 1.0, 1.125),
        ("M2E3b3h", "toward_zero", -1.2499, -1.125),
        ("M2E3b3h", "toward_zero", 1.25, 1.375),
        ("M2E3b3h", "toward_zero", 0.125, 0.140625),
        ("M2E3b3h", "toward_zero", 0.1249, 0.0),
        ("M2E3b3zh", "toward_zero", 0.2499, 0.0),
        ("M2E3b3h", "toward_zero", 31.99, 30.0),
        ("M2E3b3h", "toward_zero", -1e9, -30.0),
        ("M2E3b3h", "toward_zero", 0.0, 0.0),
        ("M0E3b3h", "toward_zero", 1.99, 1.5),
    ],
)
def test_quantize_by_hand(name, rounding, x, expected):
    assert reference.quantize(x, parse_format(name), rounding) == expected


def test_a_half_unit_format_only_truncates():
    with pytest.raises(ValueError, match=r'the half-unit format M2E3b3h only takes "toward_zero", got \'floor\''):
        reference.quantize(1.0, parse_format("M2E3b3h"), "floor")
    with pytest.raises(ValueError, match=r"rounding must be one of toward_zero.*got 'up'"):
        reference.quantize(1.0, parse_format("M2E3b3"), "up")


def test_half_unit_truncation_is_rounding_to_the_nearest():
    """Of numbers that are no ties, and one bit more: the values with an odd last bit are the only ones there are."""
    x = np.random.default_rng(0).uniform(1, 2, 1000)
    kept = reference.quantize(x, parse_format("M5E4b7h"))
    assert np.all(np.abs(kept - x) <= 2.0**-6)
    assert abs(np.mean(kept - x)) < 2.0**-10 < abs(np.mean(reference.quantize(x, parse_format("M5E4b7")) - x))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**53))
def test_float32_is_numpys(x, extra):
    x = float(x) * (1 + extra * 2.0**-53)
    rounded = reference.quantize(x, FLOAT32, "nearest_even")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded, np.float64(np.float32(x)))


def test_without_underflow_the_smallest_is_that_of_float32():
    x = np.array([2.0**-50, 1.5 * 2.0**-126, 2.0**-126, 2.0**-127, -(2.0**-126)])
    kept = reference.quantize(x, parse_format("M7E4b10"), underflow=False)
    np.testing.assert_array_equal(kept, [2.0**-50, 1.5 * 2.0**-126, 2.0**-126, 0, -(2.0**-126)])
    np.testing.assert_array_equal(reference.quantize(x, parse_format("M7E4b10")), np.zeros(5))
    assert reference.quantize(1e9, parse_format("M7E4b10"), underflow=False) == 63.75
    assert reference.quantize(0.4, parse_format("I8f0"), underflow=False) == 0


def test_quantize_keeps_shapes():
    assert reference.quantize(np.ones((2, 0, 3)), parse_format("M7E4b10")).shape == (2, 0, 3)
    assert reference.quantize([[0.3, 7.0]], parse_format("I8f2")).tolist() == [[0.25, 7.0]]


# --- Second opinions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["M3E4b7z", "M2E5b15z", "M7E8b127z", "M4E3b3z", "M1E2b1z"])
@pytest.mark.parametrize("rounding", ["toward_zero", "nearest_even", "stochastic"])
def test_quantize_is_gfloats_rounding(name, rounding):
    format = parse_format(name)
    info = gfloat.FormatInfo(
        name,
        k=format.bits,
        precision=1 + format.mantissa,
        bias=format.bias,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )
    assert info.max == format.max
    mode = {"toward_zero": "TowardZero", "nearest_even": "TiesToEven", "stochastic": "StochasticFastest"}[rounding]
    generator = np.random.default_rng(4)
    low, high = max(format.emin, -120), min(format.emax + 2, 120)
    fractions = generator.random(500)
    ties = 2 * generator.integers(0, 2**format.mantissa, 250) + 1
    fractions[::2] = ties / 2.0 ** (format.mantissa + 1)
    x = generator.choice([-1, 1], 500) * np.ldexp(1 + fractions, generator.integers(low, high, 500))
    x = x[np.abs(x) >= format.tiny]
    r = generator.integers(0, 256, x.size)
    theirs = [gfloat.round_float(info, v, gfloat.RoundMode[mode], True, int(c), 8) for v, c in zip(x, r, strict=True)]
    np.testing.assert_array_equal(reference.quantize(x, format, rounding, True, 8, r), theirs)


# --- Tensor quantization ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("M3E4b7", ml_dtypes.float8_e4m3),
        ("M3E4b7", ml_dtypes.float8_e4m3fn),
        ("M3E4b11", ml_dtypes.float8_e4m3b11fnuz),
        ("M4E3b3", ml_dtypes.float8_e3m4),
        ("M2E5b15", ml_dtypes.float8_e5m2),
        ("M3E2b1", ml_dtypes.float6_e2m3fn),
        ("M2E3b3", ml_dtypes.float6_e3m2fn),
        ("M1E2b1", ml_dtypes.float4_e2m1fn),
        ("M7E8b127", ml_dtypes.bfloat16),
        ("M10E5b15", np.float16),
    ],
)
def test_quantize_tensor_with_a_bias_is_a_cast_of_ml_dtypes(name, dtype):
    format = FloatFormat.parse(name)
    generator = np.random.default_rng(6)
    limit = float(np.finfo(dtype).max if dtype is np.float16 else ml_dtypes.finfo(dtype).max)
    lowest = 1 - format.bias - format.mantissa - 3
    x = np.ldexp(generator.standard_normal(4000), generator.integers(lowest, floor_log2(Fraction(limit)) + 1, 4000))
    half_steps = np.ldexp(np.arange(-99.0, 100), 1 - format.bias - format.mantissa - 1)  # ties among subnormals
    x = np.concatenate([x, half_steps, np.rint(4 * generator.standard_normal(500)) / 4, [limit, -limit]])
    x = x.astype(np.float32)
    x = x[np.abs(x) <= limit]
    np.testing.assert_array_equal(reference.quantize_tensor(x, format), x.astype(dtype).astype(np.float64))


def test_quantize_tensor_saturates_as_fp6_and_fp4_do():
    x = np.array([1e9, -7.9, 7.6, 5.1, np.float64(FLOAT32_MAX)])
    for name, dtype in (("M1E2b1", ml_dtypes.float4_e2m1fn), ("M3E2b1", ml_dtypes.float6_e2m3fn)):
        theirs = x.astype(np.float32).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(reference.quantize_tensor(x, FloatFormat.parse(name)), theirs)


@given(
    st.integers(0, 10),
    st.integers(1, 6),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_quantize_tensor_with_a_flexible_bias(mantissa, exponent, values):
    quantized = reference.quantize_tensor(values, FloatFormat(mantissa, exponent))
    top = max(abs(Fraction(v)) for v in values)
    if top == 0:
        assert not np.any(quantized)
        return
    bias = 2**exponent - 1 - floor_log2(top)
    most = power(2**exponent - 1 - bias) * (2 - power(-mantissa))
    assert power(floor_log2(top)) <= most < 2 * power(floor_log2(top)), "the largest magnitude is just representable"
    for value, mine in zip(values, quantized, strict=True):
        x = abs(Fraction(value))
        binade = floor_log2(x) if x else 1 - bias
        unit = power(max(binade, 1 - bias) - mantissa)
        expected = min(round(x / unit) * unit, most)  # Python rounds fractions half to even
        assert abs(Fraction(mine)) == expected
        assert mine * value >= 0


def test_quantize_tensor_by_hand():
    """M4E3 of a tensor up to 1.9: b = 7, largest 1.9375, normal from 2^−6, subnormal step 2^−10."""
    x = np.array([[1.9, -1.0, 0.03125], [2.0**-10, 2.0**-11, 1.5 * 2.0**-10]])
    expected = np.array([[1.875, -1.0, 0.03125], [2.0**-10, 0.0, 2.0**-9]])
    np.testing.assert_array_equal(reference.quantize_tensor(x, FloatFormat.parse("M4E3")), expected)
    assert reference.quantize_tensor(np.zeros((2, 0)), FloatFormat.parse("M4E3")).shape == (2, 0)
    np.testing.assert_array_equal(reference.quantize_tensor([0.0, -0.0], FloatFormat.parse("M4E3")), [0, 0])
    np.testing.assert_array_equal(reference.quantize_tensor([1.99], FloatFormat.parse("M4E3")), [1.9375])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantize_integer(bits):
    top = 2 ** (bits - 1) - 1
    x = np.arange(-4 * top, 4 * top + 1) / 4.0  # quarters of a step, the largest magnitude `top` steps
    np.testing.assert_array_equal(reference.quantize_integer(x, bits), np.rint(x))
    np.testing.assert_array_equal(reference.quantize_integer(8 * x, bits), 8 * np.rint(x))
    assert not np.any(reference.quantize_integer(np.zeros(3), bits))
    assert reference.quantize_integer(np.zeros((0, 2)), bits).shape == (0, 2)
