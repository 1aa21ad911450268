"""Verilog to take away: names, notes, and test benches that check themselves."""

import re
import subprocess

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq.hardware import testbench as bench
from fmaq.hardware.unit import Unit, dot_products
from fmaq.hardware.vectors import random, vectors_for
from fmaq.hardware.verilog import verilog
from fmaq.numerics import reference

needs_iverilog = pytest.mark.skipif(
    not bench.has_iverilog(), reason="Icarus Verilog is not installed (Debian: apt-get install iverilog)"
)


def test_verilog_names_its_signals_and_its_formats():
    unit = Unit.of("paper12")
    text = verilog(unit)
    assert "// y = FMAq(x, w, s): accumulator M7E4b10 product=M7E4b12 chunk=16" in text
    assert "zero flag, sign, 4 exponent, 7 mantissa" in text
    assert "assign multiply_significand = { x_normal, x[3:0] } * { w_normal, w[3:0] };" in text
    assert "\\src" not in text and "attribute" not in text
    assert "input clk;" in verilog(unit, "mac")
    with pytest.raises(ValueError, match="part must be one of unit, mac, shared, got 'core'"):
        verilog(unit, "core")
    with pytest.raises(ValueError, match="has a unit, and no chunked"):
        verilog(Unit.of("ieee32"), "mac")


@pytest.mark.parametrize(
    ("part", "modules"),
    # Top, lane, unit, merge and two shift registers; lanes that share an adder have one module, and no random merges.
    [("unit", 1), ("mac", 6), ("shared", 7)],
)
def test_two_designs_have_no_module_name_in_common(part, modules):
    outer = "outer=(M4E3b4 chunk=None rounding=toward_zero)" if part == "shared" else ""
    unit = Unit.of(f"M3E3b4 rounding=stochastic random_bits=3 {outer}", "M1E2", "M1E2")
    names = [set(re.findall(r"^module (\S+?)\(", verilog(unit, part, name), re.MULTILINE)) for name in ("one", "two")]
    assert not names[0] & names[1]
    assert len(names[0]) == modules
    assert all(module == "one" or module.startswith("one_") for module in names[0])


@pytest.mark.parametrize("name", ["", "2fast", "a b", "wire", "module", "a.b", "a-b"])
def test_names_that_verilog_does_not_take_are_refused(name):
    with pytest.raises(ValueError, match="is no name of a Verilog module"):
        verilog(Unit.of("M3E3b4", "M1E2", "M1E2"), "unit", name)
    with pytest.raises(ValueError, match="is no name of a Verilog module"):
        bench.testbench(Unit.of("M3E3b4", "M1E2", "M1E2"), "unit", name)


@needs_iverilog
def test_two_multiply_accumulates_in_one_simulation(tmp_path):
    for name, accumulator in (("short", "M3E3b4"), ("long", "M5E4b10")):
        unit = Unit.of(accumulator, "M1E2", "M1E2")
        for file, text in bench.testbench(unit, "mac", name, 5).items():
            (tmp_path / file).write_text(text)
    sources = ["short.v", "long.v", "short_tb.v", "long_tb.v"]
    subprocess.run(["iverilog", "-g2012", "-Wall", "-o", "both", *sources], cwd=tmp_path, check=True)
    # The first to finish ends the simulation; the other has the same number of cycles.
    done = subprocess.run(["vvp", "-n", "both"], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert "PASS: 5 dot products" in done.stdout and "FAIL" not in done.stdout


DESCRIPTIONS = [
    ("paper12", "M4E3", "M4E3"),
    ("M5E4b10z product=M5E4b12", "int8", "M4E3"),
    ("I12f2 rounding=nearest_even", "M4E3", "int4"),
    ("I16f0", "int8", "int8"),
    ("M4E4b10 product=M3E4b12 chunk=4 rounding=stochastic random_bits=5", "M4E3", "M4E3"),
    ("M5E4b10h product=M5E4b12h outer=M10E5b16", "M4E3", "M4E3"),
    ("I10f6 product=I10f6 product_rounding=half_up outer=fp32", "M4E3", "M4E3"),
]


@needs_iverilog
@pytest.mark.parametrize("description", [*DESCRIPTIONS, ("ieee16", "M4E3", "M4E3b9")], ids=lambda d: d[0])
def test_the_bench_of_a_unit_passes(description):
    assert bench.mismatches(bench.testbench(Unit.of(*description), count=3000, name="dut")) == 0


@needs_iverilog
@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda d: d[0])
def test_the_bench_of_a_multiply_accumulate_passes(description):
    assert bench.mismatches(bench.testbench(Unit.of(*description), "mac", count=40, name="dut")) == 0


@needs_iverilog
@pytest.mark.parametrize("description", [d for d in DESCRIPTIONS if "chunk=4" not in d[0]], ids=lambda d: d[0])
def test_the_bench_of_a_shared_adder_passes(description):
    files = bench.testbench(Unit.of(*description), "shared", count=40, name="dut")
    assert "localparam COUNT = 48, " in files["dut_tb.v"]  # 16 lanes, three dot products each
    assert bench.mismatches(files) == 0


@needs_iverilog
@pytest.mark.parametrize("part", ["unit", "mac", "shared"])
def test_a_bench_finds_another_design(part):
    unit, other = Unit.of("M3E3b4", "M1E2", "M1E2"), Unit.of("M3E3b4 rounding=nearest_even", "M1E2", "M1E2")
    files = bench.testbench(unit, part, count=200) | {"fmaq.v": verilog(other, part)}
    assert bench.mismatches(files) > 5


@needs_iverilog
def test_a_bench_without_its_stimulus_fails():
    files = bench.testbench(Unit.of("I8f2", "int4", "int4"), count=50)
    files["fmaq_tb.hex"] = ""
    assert bench.mismatches(files) > 0


@needs_iverilog
@pytest.mark.parametrize("part", ["mac", "shared"])
def test_a_multiply_accumulate_that_is_never_done_fails(part):
    files = bench.testbench(Unit.of("M3E3b4", "M1E2", "M1E2"), part, count=5)
    files["fmaq.v"] = (
        files["fmaq.v"].replace("assign done = ", "assign done = 1'b0 & ").replace("done <=", "done <= 0 &")
    )
    assert bench.mismatches(files) > 0


def test_without_iverilog_the_error_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(bench, "has_iverilog", lambda: False)
    with pytest.raises(FileNotFoundError, match="apt-get install iverilog"):
        bench.mismatches({})


@pytest.mark.parametrize("accumulator", ["M5E4b10", "M5E4b10z", "I8f2", "ieee16"])
def test_expected_codes_and_their_masks_hold_for_every_code_of_a_value(accumulator):
    unit = Unit.of(accumulator, "M1E2", "M1E2")
    codes = np.arange(1 << unit.register_bits)
    values = unit.format.decode(codes)
    expected, care = bench.expected_codes(unit.format, values, codes)
    assert np.all((codes ^ expected) & care == 0)
    # And for no code of another value.
    for shift in (1, 2, 7, 31):
        other = np.roll(codes, shift)
        differs = values != np.roll(values, shift)
        both_nan = np.isnan(values) & np.isnan(np.roll(values, shift))
        assert np.all(((other ^ expected) & care != 0)[differs & ~both_nan])


@pytest.mark.parametrize(
    ("accumulator", "message"),
    [
        ("M5E4b10h outer=(M8E5b16 chunk=8 outer=fp32)", "has one level above its chunks, and .* has 2: give an outer"),
        ("M5E4b10h outer=(M8E5b16 chunk=8)", "like outer=M8E5b16"),
        ("M5E4b140 outer=fp32", "float32 does not hold the sums of M5E4b140"),
    ],
)
def test_levels_that_no_multiply_accumulate_has_are_refused(accumulator, message):
    unit = Unit.of(accumulator)  # the unit is a step, which no level changes
    assert unit.inputs == Unit.of(str(unit.format)).inputs
    with pytest.raises(ValueError, match=message):
        verilog(unit, "mac")
    with pytest.raises(ValueError, match=message):
        dot_products(unit, np.zeros((1, 3), int), np.zeros((1, 3), int))


def test_verilog_of_a_shared_adder_says_what_its_lanes_take():
    text = verilog(Unit.of("M3E3b4 chunk=4", "M1E2", "M1E2"), "shared", "core")
    assert "// dot products in chunks, by 4 lanes that share the adder of their chunks' sums" in text
    assert "// Lane i takes x_i and w_i i cycles later. A dot product has whole chunks" in text
    assert text.count("core_lane lane_") == 4 and text.count("module core_lane(") == 1
    with pytest.raises(ValueError, match="nothing to share in M3E3b4 chunk=None"):
        verilog(Unit.of("M3E3b4 chunk=None", "M1E2", "M1E2"), "shared")


def test_verilog_says_what_the_total_is():
    text = verilog(Unit.of("M5E4b10h product=I9f6 product_rounding=half_up outer=M10E5b16"), "mac")
    assert "4 exponent, 5 mantissa, and an implied half of the last place" in text
    assert "rounding: toward_zero, of products half_up" in text
    assert "codes of the total, M10E5b16, have 17 bits: zero flag, sign, 5 exponent, 10 mantissa" in text


@pytest.mark.parametrize(
    "levels",
    ["", "outer=M8E5b16", "outer=fp32", "rounding=nearest_away outer=I20f8", "outer=(M9E5b16 chunk=None rounding=odd)"],
)
def test_dot_products_are_the_references(levels):
    unit = Unit.of(f"M5E4b10 product=M5E4b12 chunk=5 {levels}")
    drawn = random(unit, 3 * 13 * 2)
    x, w = drawn["x"].reshape(3, 13, 2), drawn["w"].reshape(3, 13, 2)
    totals = dot_products(unit, x, w)
    for product in range(3):
        for lane in range(2):
            a, b = unit.activation.decode(x[product, :, lane]), unit.weight.decode(w[product, :, lane])
            assert totals[product, lane] == reference.dot(a, b, unit.accumulator)
    with pytest.raises(ValueError, match="no chunked multiply-accumulate"):
        dot_products(Unit.of("ieee32"), x, w)


def test_a_bench_has_as_many_vectors_as_asked():
    files = bench.testbench(Unit.of("paper12"), count=123)
    assert set(files) == {"fmaq.v", "fmaq_tb.v", "fmaq_tb.hex"}
    assert len(files["fmaq_tb.hex"].split()) == 123
    assert "localparam COUNT = 123;" in files["fmaq_tb.v"]
    every = bench.testbench(Unit.of("M2E2b2", "M1E1", "M1E1"), count=10)  # few inputs: all of them
    assert len(every["fmaq_tb.hex"].split()) == 1 << 12
    assert len(vectors_for(Unit.of("M2E2b2", "M1E1", "M1E1"))["x"]) == 1 << 12
