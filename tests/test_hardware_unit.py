"""Units and operands: codes, golden values against other definitions, and errors."""

import subprocess
import sys

import numpy as np
import pytest

from fmaq.hardware.operands import FloatOperand, IntegerOperand, parse_operand
from fmaq.hardware.unit import IEEE, Unit
from fmaq.hardware.vectors import adversarial, exhaustive, random, vectors_for
from fmaq.numerics import Accumulator, FloatFormat, reference


@pytest.mark.parametrize("name", ["M4E3", "M3E4b7", "M0E2", "M10E5b15", "int8", "int4"])
def test_codes_and_values_of_operands_are_inverse(name):
    operand = parse_operand(name)
    codes = np.arange(1 << operand.bits)
    values = operand.decode(codes)
    assert np.array_equal(operand.decode(operand.encode(values)), values)
    # Only the two zeros of a float share a value.
    assert len(np.unique(values)) == len(codes) - isinstance(operand, FloatOperand)


def test_a_float_operand_is_what_tensors_are_quantized_to():
    operand = FloatOperand(4, 3, 7)
    x = np.random.default_rng(0).standard_normal(10_000) * 0.7
    quantized = reference.quantize_tensor(x, FloatFormat(4, 3, 7))
    assert np.array_equal(operand.decode(operand.encode(quantized)), quantized)
    every_value = operand.decode(np.arange(256))
    assert np.array_equal(reference.quantize_tensor(every_value, FloatFormat(4, 3, 7)), every_value)


def test_operands_refuse_values_they_do_not_have():
    with pytest.raises(ValueError, match="quantize the tensor first"):
        FloatOperand(4, 3, 7).encode([0.3])
    with pytest.raises(ValueError, match="an integer from -128 to 127"):
        IntegerOperand(8).encode([128.0])


@pytest.mark.parametrize(
    "accumulator",
    [
        "M5E4b10 product=M4E4b12 rounding=nearest_even",
        "M5E4b10h product=M4E4b12h",
        "M5E4b10h product=M4E4b12 product_rounding=odd",
        "M4E4b10 product=I9f5 rounding=nearest_away product_rounding=floor",
        "I12f6 product=I10f5 product_rounding=half_up",
    ],
)
def test_golden_is_the_reference_fmaq(accumulator):
    unit = Unit.of(accumulator)
    vectors = adversarial(unit, 400)
    x, w = unit.activation.decode(vectors["x"]), unit.weight.decode(vectors["w"])
    s = unit.format.decode(vectors["s"])
    expected = [reference.fmaq(*step, unit.accumulator) for step in zip(x, w, s, strict=True)]
    assert np.array_equal(unit.golden(vectors), expected)


@pytest.mark.parametrize(
    ("name", "dtype", "integer"), [("ieee32", np.float32, np.int32), ("ieee16", np.float16, np.int16)]
)
def test_the_ieee_baselines_are_ieee(name, dtype, integer):
    format = IEEE[name]
    rng = np.random.default_rng(1)
    codes = rng.integers(0, 1 << format.bits, 50_000)
    with np.errstate(invalid="ignore"):  # signalling NaN
        theirs = codes.astype(integer).view(dtype).astype(np.float64)
    assert np.array_equal(format.decode(codes), theirs, equal_nan=True)
    values = np.concatenate(
        [rng.standard_normal(50_000) * 2.0 ** rng.integers(-160, 140, 50_000), [65519.9, 65520.0, 0.0]]
    )
    with np.errstate(over="ignore"):
        assert np.array_equal(format.round(values), values.astype(dtype).astype(np.float64))
    finite = theirs[np.isfinite(theirs)]
    assert np.array_equal(format.decode(format.encode(finite)), finite)


def test_vectors_are_all_there_are_or_as_many_as_asked():
    small, large = Unit.of("M3E3b4", "M1E2", "M1E2"), Unit.of("paper12")
    vectors = exhaustive(small)
    assert len(np.unique(vectors["x"] + (vectors["w"] << 4) + (vectors["s"] << 8))) == 1 << 16
    assert all(len(codes) == 1000 for codes in vectors_for(large, 1000).values())
    assert not np.array_equal(random(large, 50, 1)["s"], random(large, 50, 2)["s"])


def test_adversarial_vectors_cancel_saturate_and_underflow():
    unit = Unit.of("M7E4b10 product=M7E4b12")
    vectors = adversarial(unit, 20_000)
    s, y = unit.format.decode(vectors["s"]), unit.golden(vectors)
    p = unit.activation.decode(vectors["x"]) * unit.weight.decode(vectors["w"])
    assert np.mean((y == 0) & (s != 0)) > 0.02
    assert np.mean((s != 0) & (np.abs(y) < np.abs(s) / 8)) > 0.02
    assert np.mean(np.abs(y) == unit.format.max) > 0.01
    assert np.mean((p != 0) & (y == s)) > 0.02


@pytest.mark.parametrize(
    ("accumulator", "weight", "activation", "message"),
    [
        ("paper12", "M11E3", "M4E3", "weight format 'M11E3' does not fit"),
        ("paper12", "M4E3", "int17", "activation format 'int17' does not fit the unit: integers have 2 to 16 bits"),
        ("paper12", "M4E3", "fp8", "activation format 'fp8' is not one of the unit's"),
        ("paper12", "I8f0", "M4E3", "weight format 'I8f0' is not one of the unit's"),
        ("M7E4", "M4E3", "M4E3", "is a template: hardware needs a bias"),
        ("M7E4b10 underflow=false", "M4E3", "M4E3", "underflow=False is a stage of training"),
        ("paper12", "M4E3h", "M4E3", "weight format 'M4E3h' is not one of the unit's"),
        ("I16f60", "M4E3", "M4E3", "choose fewer fraction bits"),
        ("ieee32", "int8", "M4E3", "takes float operands"),
        ("ieee16", "M4E3b20", "M4E3b20", "give the operands smaller biases"),
        ("M7E", "M4E3", "M4E3", "is not a format"),
    ],
)
def test_formats_that_do_not_fit_are_refused(accumulator, weight, activation, message):
    with pytest.raises(ValueError, match=message):
        Unit.of(accumulator, weight, activation)


def test_ports_follow_the_formats():
    unit = Unit.of("M7E4b10 product=M7E4b12 rounding=stochastic random_bits=6", "int8", "M4E3")
    assert unit.inputs == {"x": 8, "w": 8, "s": 13, "r_product": 6, "r_sum": 6}
    assert Unit.of("M7E4b10z").inputs == {"x": 8, "w": 8, "s": 12}
    assert Unit.of("M5E4b10h").inputs == Unit.of("M5E4b10").inputs  # the half is implied
    of_product = Unit.of("I16f4 product=I16f4 product_rounding=stochastic random_bits=3")
    assert of_product.inputs == {"x": 8, "w": 8, "s": 16, "r_product": 3}
    assert (of_product.rounding, of_product.product_rounding) == ("toward_zero", "stochastic")
    assert Unit.of(Accumulator.paper12).register_bits == 13


def test_hardware_imports_neither_torch_nor_amaranth():
    code = "import sys, fmaq.hardware; print(sorted({'torch', 'amaranth', 'pyosys'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
