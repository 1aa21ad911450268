"""Formats: names, ranges, codes and error messages, against exact definitions, `gfloat` and `ml_dtypes`."""

from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
import torch
from gfloat.formats import format_info_ocp_e4m3, format_info_ocp_e5m2
from hypothesis import given
from hypothesis import strategies as st

from fmaq.numerics import Accumulator, FixedFormat, FloatFormat, parse_format


@st.composite
def float_formats(draw):
    half_unit = draw(st.booleans())
    bias, zero = draw(st.integers(-700, 700)), draw(st.sampled_from(["flag", "exponent"]))
    return FloatFormat(draw(st.integers(0, 23 - half_unit)), draw(st.integers(1, 8)), bias, zero, half_unit)


floats = float_formats()
fixed = st.builds(
    FixedFormat,
    width=st.integers(2, 32),
    fraction=st.integers(-64, 64),
    overflow=st.sampled_from(["saturate", "wrap"]),
)

SMALL = [
    "M0E1b0",
    "M0E1b0z",
    "M3E4b7",
    "M3E4b7z",
    "M7E4b10",
    "M2E5b-3",
    "M1E2b700z",
    "M0E1b0h",
    "M3E4b7h",
    "M2E3b4zh",
    "I2f0",
    "I8f3",
    "I8f-5w",
    "I12f64",
]


def exact_values(format: FloatFormat) -> dict[Fraction, int]:
    """Every nonzero value of a format and its code, as the format is defined: sign, exponent, mantissa."""
    values = {}
    for sign in (0, 1):
        for code in range(format.zero == "exponent", 2**format.exponent):
            for i in range(2**format.mantissa):
                half = Fraction(1, 2) if format.half_unit else 0
                magnitude = Fraction(2) ** (code - format.bias) * (1 + (i + half) / 2**format.mantissa)
                values[-magnitude if sign else magnitude] = (sign << format.exponent | code) << format.mantissa | i
    return values


# --- Names ----------------------------------------------------------------------------------------------------------


@given(st.one_of(floats, fixed))
def test_a_name_reads_back(format):
    assert parse_format(str(format)) == format
    assert parse_format(f"  {format} ") == format
    assert parse_format(format) is format
    assert hash(parse_format(str(format))) == hash(format)


@pytest.mark.parametrize(
    ("name", "format"),
    [
        ("M7E4b10", FloatFormat(7, 4, 10, "flag")),
        ("M7E4b10z", FloatFormat(7, 4, 10, "exponent")),
        ("M23E8b-12", FloatFormat(23, 8, -12)),
        ("M7E4", FloatFormat(7, 4)),
        ("M7E4z", FloatFormat(7, 4, None, "exponent")),
        ("M5E4b10h", FloatFormat(5, 4, 10, "flag", True)),
        ("M5E4b10zh", FloatFormat(5, 4, 10, "exponent", True)),
        ("M5E4h", FloatFormat(5, 4, None, half_unit=True)),
        ("M22E1b-3zh", FloatFormat(22, 1, -3, "exponent", half_unit=True)),
        ("I16f4", FixedFormat(16, 4, "saturate")),
        ("I16f4w", FixedFormat(16, 4, "wrap")),
        ("I16f-4", FixedFormat(16, -4)),
        ("I16", FixedFormat(16, 0)),
    ],
)
def test_names(name, format):
    assert parse_format(name) == format
    assert type(format).parse(name) == format


@pytest.mark.parametrize(
    "name",
    [
        "",
        "M7",
        "E4M3",
        "m7e4b10",
        "M7E4b",
        "M7E4b10w",
        "M-1E4b3",
        "I16f4z",
        "I16f4h",
        "M5E4b10hz",
        "M5E4b10H",
        "I",
        "M7E4b10 M7E4b12",
    ],
)
def test_a_wrong_name_shows_itself_and_the_right_shape(name):
    with pytest.raises(
        ValueError, match=r"is not a format; write a float like \"M7E4b10\".*I<width>f<fraction>"
    ) as error:
        parse_format(name)
    assert repr(name) in str(error.value)


def test_each_kind_refuses_the_other_name():
    with pytest.raises(ValueError, match="'I16f4' is not a float format; write M<mantissa>E<exponent>b<bias>"):
        FloatFormat.parse("I16f4")
    with pytest.raises(ValueError, match="'M7E4b10' is not a fixed format; write I<width>f<fraction>"):
        FixedFormat.parse("M7E4b10")
    with pytest.raises(TypeError, match=r"a format is a name like.*got 12"):
        parse_format(12)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("M24E4b10", "mantissa must be from 0 to 23, got 24"),
        ("M23E4b10h", "mantissa of a half-unit format must be from 0 to 22, got 23"),
        ("M7E9b10", "exponent must be from 1 to 8, got 9"),
        ("M7E0b10", "exponent must be from 1 to 8, got 0"),
        ("M7E4b701", "bias must be from -700 to 700, got 701"),
        ("I1f0", "width must be from 2 to 32, got 1"),
        ("I33f0", "width must be from 2 to 32, got 33"),
        ("I16f65", "fraction must be from -64 to 64, got 65"),
    ],
)
def test_fields_out_of_range(name, message):
    with pytest.raises(ValueError, match=message):
        parse_format(name)


def test_fields_of_wrong_type():
    with pytest.raises(TypeError, match=r"mantissa must be an integer, got 7\.0"):
        FloatFormat(7.0, 4, 10)
    with pytest.raises(TypeError, match="exponent must be an integer, got True"):
        FloatFormat(7, True, 10)
    with pytest.raises(TypeError, match="width must be an integer, got '16'"):
        FixedFormat("16")
    with pytest.raises(TypeError, match="half_unit must be True or False, got 1"):
        FloatFormat(7, 4, 10, half_unit=1)
    with pytest.raises(ValueError, match='zero must be "flag" or "exponent", got \'z\''):
        FloatFormat(7, 4, 10, "z")
    with pytest.raises(ValueError, match='overflow must be "saturate" or "wrap", got \'clip\''):
        FixedFormat(16, 4, "clip")


def test_fields_from_numpy_become_plain_integers():
    format = FloatFormat(np.int64(7), np.uint8(4), np.int32(10))
    assert format == FloatFormat(7, 4, 10)
    assert all(type(value) is int for value in (format.mantissa, format.exponent, format.bias))


def test_formats_are_immutable():
    for format in (FloatFormat(7, 4, 10), FixedFormat(16)):
        with pytest.raises(AttributeError):
            format.bias = 3


@pytest.mark.parametrize(("name", "completed"), [("M7E4", "M7E4b10"), ("M7E4z", "M7E4b10z"), ("M7E4zh", "M7E4b10zh")])
def test_a_template_says_that_it_has_no_bias(name, completed):
    format = parse_format(name)
    assert format.is_template
    assert not parse_format(completed).is_template
    assert format.bits == parse_format(completed).bits == 12
    for use in (lambda: format.max, lambda: format.tiny, lambda: format.encode(1.0), lambda: format.decode(1)):
        with pytest.raises(ValueError, match=f'"{name}" is a template.*Write one, like "{completed}"'):
            use()


# --- Ranges and codes -------------------------------------------------------------------------------------------------


def test_the_ranges_in_the_design():
    format = parse_format("M7E4b10")
    assert (format.max, format.min, format.tiny, format.bits) == (63.75, -63.75, 2.0**-10, 12)
    assert (format.emin, format.emax) == (-10, 5)
    flushing = parse_format("M7E4b10z")
    assert (flushing.max, flushing.tiny, flushing.emin, flushing.emax) == (63.75, 2.0**-9, -9, 5)
    integer = parse_format("I16f4")
    assert (integer.max, integer.min, integer.tiny, integer.bits) == (32767 / 16, -2048.0, 1 / 16, 16)
    assert not integer.is_template


@given(floats)
def test_float_ranges(format):
    half = Fraction(1, 2 ** (format.mantissa + 1)) if format.half_unit else 0
    unit = Fraction(1, 2**format.mantissa)
    assert Fraction(format.max) == Fraction(2) ** (2**format.exponent - 1 - format.bias) * (2 - unit + half)
    assert Fraction(format.tiny) == Fraction(2) ** (-format.bias + (format.zero == "exponent")) * (1 + half)
    assert format.min == -format.max
    assert Fraction(2) ** format.emax <= Fraction(format.max) < Fraction(2) ** (format.emax + 1)
    assert 2.0**format.emin <= format.tiny < 2 * 2.0**format.emin
    assert format.bits == 1 + format.mantissa + format.exponent


@given(fixed)
def test_fixed_ranges(format):
    step = Fraction(2) ** -format.fraction
    assert Fraction(format.max) == (2 ** (format.width - 1) - 1) * step
    assert Fraction(format.min) == -(2 ** (format.width - 1)) * step
    assert Fraction(format.tiny) == step == Fraction(2) ** format.emin
    assert abs(Fraction(format.min)) == Fraction(2) ** format.emax
    assert format.bits == format.width


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("M")])
def test_every_float_code(name):
    format = parse_format(name)
    values = exact_values(format)
    assert max(values) == Fraction(format.max)
    assert min(v for v in values if v > 0) == Fraction(format.tiny)
    codes = format.encode(np.array([float(v) for v in values]))
    assert codes.tolist() == list(values.values())
    assert [Fraction(v) for v in format.decode(codes)] == list(values)
    zero = 0 if format.zero == "exponent" else 1 << format.bits
    assert format.encode(0.0) == format.encode(-0.0) == zero
    assert format.decode(zero) == 0.0


@pytest.mark.parametrize("name", [name for name in SMALL if name.startswith("I")])
def test_every_fixed_code(name):
    format = parse_format(name)
    half = 1 << (format.width - 1)
    values = [Fraction(2) ** -format.fraction * i for i in range(-half, half)]
    codes = [i % (2 * half) for i in range(-half, half)]
    assert format.encode(np.array([float(v) for v in values])).tolist() == codes
    assert [Fraction(v) for v in format.decode(codes)] == values


def test_zero_codes_of_the_exponent_convention_ignore_sign_and_mantissa():
    format = parse_format("M2E3b3z")
    assert format.decode([0, 1, 2, 3, 0b100000, 0b100011]).tolist() == [0.0] * 6


@given(floats, st.data())
def test_float_codes_read_back(format, data):
    code = data.draw(st.integers(0, 2**format.bits - 1))
    value = format.decode(code)
    assert isinstance(value, float)
    assert value == 0 or format.encode(value) == code
    assert value == 0 or format.tiny <= abs(value) <= format.max


@given(fixed, st.data())
def test_fixed_codes_read_back(format, data):
    code = data.draw(st.integers(0, 2**format.bits - 1))
    value = format.decode(code)
    assert format.encode(value) == code
    assert format.min <= value <= format.max


@pytest.mark.parametrize("name", ["M3E4b7", "I8f2"])
def test_codes_keep_shapes(name):
    format = parse_format(name)
    assert format.encode(np.ones((2, 0, 3))).shape == format.decode(np.ones((2, 0, 3), int)).shape == (2, 0, 3)
    assert format.encode([[1.0], [2.0]]).dtype == np.int64
    assert format.decode(np.array([[1], [2]], np.uint8)).dtype == np.float64
    assert type(format.encode(1.0)) is int
    assert format.decode([]).shape == (0,)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("M3E4b7", 1 + 2**-4),
        ("M3E4b7h", 1.0),
        ("M3E4b7h", 1 + 2**-5),
        ("M3E4b7h", 2.0**-7),
        ("M3E4b7", 512.0),
        ("M3E4b7", 2.0**-8),
        ("M3E4b7z", 2.0**-7),
        ("M3E4b7", np.inf),
        ("M3E4b7", np.nan),
        ("I8f2", 0.125),
        ("I8f2", 32.0),
        ("I8f2", -32.25),
        ("I8f2", np.nan),
        ("I8f2", -np.inf),
    ],
)
def test_encode_refuses_what_the_format_does_not_hold(name, value):
    with pytest.raises(ValueError, match=f"is not a value of {name}; quantize it first"):
        parse_format(name).encode([1.0, value])


def test_what_is_subnormal_in_a_tensors_format_is_encoded_by_the_operands():
    import fmaq
    from fmaq.hardware import parse_operand

    values = fmaq.quantize(torch.tensor([1.0, 2.0**-8, 3 * 2.0**-10]), "M4E3b7").double().numpy()
    with pytest.raises(ValueError, match=r"below the smallest magnitude, 0.0078125. .*parse_operand encodes those"):
        FloatFormat.parse("M4E3b7").encode(values)
    operand = parse_operand("M4E3b7")
    assert operand.decode(operand.encode(values)).tolist() == values.tolist() == [1.0, 2.0**-8, 3 * 2.0**-10]


@pytest.mark.parametrize(("name", "top"), [("M3E4b7", 511), ("M3E4b7z", 255), ("I8f2", 255)])
def test_decode_refuses_what_is_no_code(name, top):
    format = parse_format(name)
    format.decode(top)
    for code in (-1, top + 1, 2**40, 2**63 - 1):
        with pytest.raises(ValueError, match=f"codes of {name} are from 0 to {top}"):
            format.decode([0, code])
    with pytest.raises(TypeError, match=f"codes of {name} are integers, got an array of float64"):
        format.decode([1.5])


def test_a_half_unit_format_holds_the_ties_of_the_plain_one():
    """The half that it implies is the bit behind: its values are those of one bit more whose last bit is 1."""
    plain, half = parse_format("M4E3b3"), parse_format("M3E3b3h")
    codes = np.arange(2**half.bits)
    np.testing.assert_array_equal(half.decode(codes), plain.decode(2 * codes + 1))
    assert half.bits == 7 and (half.max, half.tiny, half.emin, half.emax) == (31.0, 0.1328125, -3, 4)
    assert str(half) == "M3E3b3h"


# --- Second opinions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("M3E4b7z", ml_dtypes.float8_e4m3),
        ("M3E4b11z", ml_dtypes.float8_e4m3b11fnuz),
        ("M4E3b3z", ml_dtypes.float8_e3m4),
        ("M2E5b15z", ml_dtypes.float8_e5m2),
        ("M3E2b1z", ml_dtypes.float6_e2m3fn),
        ("M2E3b3z", ml_dtypes.float6_e3m2fn),
        ("M1E2b1z", ml_dtypes.float4_e2m1fn),
        ("M7E8b127z", ml_dtypes.bfloat16),
    ],
)
def test_normal_values_have_the_codes_of_ml_dtypes(name, dtype):
    format = parse_format(name)
    stored = np.uint16 if format.bits > 8 else np.uint8
    codes = np.arange(2**format.bits, dtype=stored)
    with np.errstate(invalid="ignore"):  # ml_dtypes warns of its NaNs
        theirs = codes.view(dtype).astype(np.float64)
    common = np.isfinite(theirs) & (np.abs(theirs) >= format.tiny)
    assert common.sum() > 2 ** (format.bits - 2)
    np.testing.assert_array_equal(format.decode(codes)[common], theirs[common])
    np.testing.assert_array_equal(format.encode(theirs[common]), codes[common])


@pytest.mark.parametrize(
    ("name", "info", "normal"), [("M3E4b7z", format_info_ocp_e4m3, 238), ("M2E5b15z", format_info_ocp_e5m2, 240)]
)
def test_normal_values_have_the_codes_of_gfloat(name, info, normal):
    format = parse_format(name)
    compared = 0
    for code in range(256):
        theirs = gfloat.decode_float(info, code)
        if theirs.fclass == gfloat.FloatClass.NORMAL:
            assert format.decode(code) == theirs.fval
            assert format.encode(theirs.fval) == code
            compared += 1
    assert compared == normal


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("E4M3", "M3E4"),
        ("E5M2b15", "M2E5b15"),
        ("float8_e4m3fn", "M3E4"),
        ("fp8_e5m2", "M2E5"),
        ("m7e4B10", "M7E4b10"),
        ("i16F4w", "I16f4w"),
        ("bfloat16", "M7E8"),
    ],
)
def test_the_name_that_was_meant_is_named(given, meant):
    with pytest.raises(ValueError, match=f'{given}.*; did you mean "{meant}"'):
        parse_format(given)
    with pytest.raises(ValueError, match=f'; did you mean "{meant}"'):
        (FixedFormat if meant.startswith("I") else FloatFormat).parse(given)
    with pytest.raises(ValueError, match=f'; did you mean "{meant}"'):
        Accumulator(f"M7E4b10 product={given}")
    assert parse_format(meant)
