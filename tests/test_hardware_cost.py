"""Liberty files, netlists, synthesis, energy and the analytic count: figures, caching and errors."""

import importlib.util
import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq import hardware
from fmaq.hardware import cells, streams, synthesis
from fmaq.hardware.cost import design
from fmaq.hardware.layers import Layer, energy_by_layer
from fmaq.hardware.liberty import LibertyError, compile_function, find_library
from fmaq.hardware.netlist import Gate, Netlist, energy, pack, unpack
from fmaq.hardware.table import Study, markdown, run_study
from fmaq.hardware.unit import Unit
from fmaq.numerics import Accumulator


@pytest.fixture(autouse=True, scope="module")
def _cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FMAQ_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


# --- Liberty ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("(!(A B))", lambda a, b, c: 1 - (a & b)),
        ("A*B+C", lambda a, b, c: (a & b) | c),
        ("A' + B^C", lambda a, b, c: (1 - a) | (b ^ c)),
        ("!A & (B | C)'", lambda a, b, c: (1 - a) & (1 - (b | c))),
        ("A !B", lambda a, b, c: a & (1 - b)),
        ("(((A B)+(B C))+(C A))", lambda a, b, c: int(a + b + c >= 2)),
        ("1", lambda a, b, c: 1),
    ],
)
def test_functions_of_cells(text, expected):
    function = compile_function(text)
    for index in range(8):
        pins = dict(zip("ABC", (index >> 2, index >> 1 & 1, index & 1), strict=True))
        assert function(pins) & 1 == expected(*pins.values())


def test_our_own_library_counts_transistors():
    library = find_library()
    assert library.name == "unit"
    assert library.nand2 == 1
    assert library.cells["INVX1"].area == 0.5
    assert library.cells["INVX4"].area == 2
    assert library.cells["DFFX1"].is_sequential
    assert library.cells["NOR2X2"].inputs == {
        "A": pytest.approx(10 / 3, abs=1e-3),
        "B": pytest.approx(10 / 3, abs=1e-3),
    }
    assert library.delay(cells.FO4) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "not a whole Liberty file"),
        ("library(x) { cell(A) {", "not a whole Liberty file"),
        ("module x(); endmodule", "not a whole Liberty file"),
        ("cell(x) { area : 1; }", "it starts with 'cell'"),
        ("library(x) { cell(INV) { area : 1; pin(A) { direction : input; } } }", "no two-input NAND"),
        ("library(x) { cell(INV) { area : big; } }", "area of INV is 'big', not a number"),
    ],
)
def test_a_broken_library_is_refused(tmp_path, text, message):
    file = tmp_path / "cells.lib"
    file.write_text(text)
    with pytest.raises(LibertyError, match=message):
        find_library(file)


def test_a_missing_library_is_refused(tmp_path, monkeypatch):
    with pytest.raises(
        LibertyError, match=r"there is no Liberty file .*nothing\.lib; give a file, or one of: unit, osu018"
    ):
        find_library(tmp_path / "nothing.lib")
    monkeypatch.setattr("fmaq.hardware.liberty.DEBIAN", tmp_path)
    with pytest.raises(LibertyError, match="apt-get install qflow-tech-osu018"):
        find_library("osu018")
    assert hardware.installed_libraries() == ["unit"]


def test_any_liberty_file_can_be_given(tmp_path):
    file = tmp_path / "mine.lib"
    file.write_text(cells.liberty().replace("library(unit)", "library(mine)"))
    result = hardware.synthesize("M2E2b2", "M1E2", "M1E2", library=file)
    assert result.library == "mine"
    assert result.delay_unit == "ns"


# --- Netlists ---------------------------------------------------------------------------------------------------------


def two_gates():
    gates = [Gate("INVX1", {"A": 4, "Y": 5}), Gate("NAND2X1", {"A": 2, "B": 3, "Y": 4})]
    return Netlist({"a": [2, 3]}, {"y": [5, "1"]}, gates, find_library().cells)


def test_a_netlist_is_simulated_in_the_order_of_its_gates():
    netlist = two_gates()
    codes = np.array([0, 1, 2, 3] * 40)
    assert np.array_equal(netlist.simulate({"a": codes})["y"], 2 + (codes == 3))
    assert netlist.levels == 2
    assert netlist.area == 1.5
    assert netlist.counts == {"INVX1": 1, "NAND2X1": 1}


def test_energy_is_that_of_the_pins_that_change():
    # Over 0, 3, 3: both inputs of the NAND change once, then the inverter's.
    lanes = np.array([[0, 0], [3, 3], [3, 3]])
    expected = 0.5 * (2 * 4 / 3 + 1) / 2
    assert energy(two_gates(), find_library(), {"a": lanes}) == pytest.approx(expected, rel=1e-3)


def test_packing_and_unpacking_are_inverse():
    bits = np.random.default_rng(0).random(1000) < 0.5
    assert pack(bits).dtype == np.uint64
    assert np.array_equal(unpack(pack(bits), 1000), bits)


def test_a_netlist_of_other_cells_is_refused():
    module = {"ports": {}, "cells": {"g": {"type": "LUT4", "connections": {}}}}
    with pytest.raises(ValueError, match="'LUT4', which the library does not have"):
        Netlist.from_yosys(module, find_library().cells)


# --- Synthesis --------------------------------------------------------------------------------------------------------


def test_a_synthesized_unit_has_figures_and_a_front():
    result = hardware.synthesize("M4E3b4 product=M4E3b6")
    assert result.area == result.front[0].area == pytest.approx(533, rel=0.15)
    assert sum(result.cells.values()) > 200
    assert result.levels == result.front[0].levels > 20
    assert result.energy > 50
    assert [p.area for p in result.front] == sorted(p.area for p in result.front)
    assert [p.delay for p in result.front] == sorted((p.delay for p in result.front), reverse=True)
    assert result.area_within(result.delay) == result.area
    assert result.area_within(result.fastest.delay) == result.fastest.area
    assert result.area_within(0.0) is None
    with pytest.raises(FrozenInstanceError):
        result.area = 0


def test_a_multiply_accumulate_has_registers():
    unit, mac = hardware.synthesize("M3E3b4", "M1E2", "M1E2"), hardware.synthesize_mac("M3E3b4", "M1E2", "M1E2")
    # s, t, total: 8 bits each with the zero flag; the position in a chunk of 16; and four bits of state.
    assert mac.flip_flops == 3 * 8 + 4 + 4
    assert mac.flip_flop_area == 6 * mac.flip_flops
    assert mac.area > unit.area + mac.flip_flop_area


def test_the_second_time_comes_from_the_cache(monkeypatch):
    unit = Unit.of("M3E3b4", "M1E2", "M1E2")
    first = synthesis.map_to_cells(design(unit), find_library())

    def fail(*_):
        raise AssertionError("Yosys ran again")

    monkeypatch.setattr(synthesis, "run_yosys", fail)
    assert synthesis.map_to_cells(design(unit), find_library()) == first
    with pytest.raises(AssertionError):
        synthesis.map_to_cells(design(unit), find_library(), synthesis.RECIPES[:2])


def test_a_damaged_cache_is_thrown_away(tmp_path, monkeypatch):
    monkeypatch.setenv("FMAQ_CACHE", str(tmp_path))
    rtlil, recipes = design(Unit.of("M2E2b2", "M1E2", "M1E2")), synthesis.RECIPES[:1]
    good = synthesis.map_to_cells(rtlil, find_library(), recipes)
    (file,) = (tmp_path / "hardware").iterdir()
    file.write_bytes(b"not a netlist")
    with pytest.raises(hardware.SynthesisError, match="damaged and is removed"):
        synthesis.map_to_cells(rtlil, find_library(), recipes)
    assert synthesis.map_to_cells(rtlil, find_library(), recipes) == good


def test_without_pyosys_the_error_says_how_to_get_it(monkeypatch):
    there = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "pyosys" else there(name))
    with pytest.raises(hardware.SynthesisError, match=r'pip install "fmaq\[hardware\]"'):
        hardware.synthesize("paper12")


def test_what_yosys_says_is_passed_on(tmp_path):
    with pytest.raises(hardware.SynthesisError, match="No such command: nonsense"):
        synthesis.run_yosys(["nonsense"], tmp_path)


def test_verilog_names_its_signals_and_its_formats():
    from fmaq.hardware.verilog import verilog

    unit = Unit.of("paper12")
    text = verilog(unit)
    assert "// y = FMAq(x, w, s): accumulator M7E4b10 product=M7E4b12 chunk=16" in text
    assert "zero flag, sign, 4 exponent, 7 mantissa" in text
    assert "assign multiply_significand = { x_normal, x[3:0] } * { w_normal, w[3:0] };" in text
    assert "\\src" not in text and "attribute" not in text
    assert "input clk;" in verilog(unit, "mac")
    with pytest.raises(ValueError, match="part must be one of unit, mac, got 'core'"):
        verilog(unit, "core")
    with pytest.raises(ValueError, match="has a unit, and no chunked"):
        verilog(Unit.of("ieee32"), "mac")


# --- Estimates, streams, tables ---------------------------------------------------------------------------------------


def test_an_estimate_adds_its_components_up():
    result = hardware.estimate("paper12")
    assert result.area == pytest.approx(sum(part.gates for part in result.components))
    assert result.cells["multiplier"] == 5 * 5 * 1.5 + 4 * 5 * 7
    assert {"alignment shifter", "leading-zero detector", "normalisation shifter"} <= set(result.cells)
    assert "rounding" not in result.cells
    assert "rounding" in hardware.estimate("M7E4b10 rounding=nearest_even").cells
    assert "gradual underflow" in hardware.estimate("ieee16").cells
    assert (
        hardware.estimate(Accumulator("I32f0"), "int8", "int8").area > hardware.estimate("I16f0w", "int8", "int8").area
    )


@pytest.mark.parametrize("accumulator", ["paper12", "M3E3b4 product=M3E3b6", "I16f10"])
def test_estimates_are_within_a_factor_of_synthesis(accumulator):
    count, real = hardware.estimate(accumulator), hardware.synthesize(accumulator)
    assert 1.0 < count.area / real.area < 1.7
    assert 0.6 < count.energy / real.energy < 1.7
    assert count.delay < real.delay


def test_streams_of_a_layer_are_its_operands():
    rng = np.random.default_rng(0)
    activations, weights = rng.standard_normal((3, 20)), rng.standard_normal((5, 20))
    drawn = hardware.of_layer("conv1", activations, weights)
    assert drawn.activations.shape == drawn.weights.shape == (20, 15)
    pairs = {(tuple(a), tuple(w)) for a, w in zip(drawn.activations.T, drawn.weights.T, strict=True)}
    assert pairs == {(tuple(a), tuple(w)) for a in activations for w in weights}
    with pytest.raises(
        ValueError, match=r"activations \(M, K\) and weights \(N, K\) are needed, got \(3, 20\) and \(5, 19\)"
    ):
        hardware.of_layer("conv1", activations, weights[:, :19])


def test_a_trace_is_the_references_partial_sums():
    unit = Unit.of("M7E4b10 product=M7E4b12 chunk=4")
    drawn = streams.gaussian(steps=6, lanes=10)
    fitted = streams.fit(unit, drawn)
    vectors = streams.trace(fitted, drawn)
    s = fitted.format.decode(vectors["s"])
    assert not s[0].any() and not s[4].any()
    step = {name: codes[2] for name, codes in vectors.items()}
    assert np.array_equal(s[3], fitted.golden(step))
    x = fitted.activation.decode(vectors["x"])
    assert np.array_equal(x == 0, drawn.activations < 2.0**-14 * np.abs(drawn.activations).max())


def test_constant_operands_cost_less_than_changing_ones():
    noisy = streams.gaussian()
    still = replace(noisy, activations=np.zeros_like(noisy.activations))
    changing = hardware.synthesize("M3E3b4 product=M3E3b6", streams=noisy)
    assert hardware.synthesize("M3E3b4 product=M3E3b6", streams=still).energy < 0.8 * changing.energy


def test_energy_by_layer_is_operations_times_energy():
    layers = [Layer("conv1", 1000, "M3E3b4 product=M3E3b6"), Layer("head", 10, "fp32")]
    conv, head = energy_by_layer(layers, find_library())
    assert conv.total == 1000 * conv.operation
    assert conv.operation < conv.baseline
    assert head.total == head.baseline_total


def test_a_table_compares_with_its_baselines():
    study = Study("M1E2", ("M2E2b2", "M3E3b4", "M5E3b4"), wide="M5E3b4", half="M3E3b4")
    done = []
    rows = run_study(study, find_library(), progress=done.append)
    assert sorted(done) == sorted(study.accumulators)
    assert rows[2].area_to_wide == rows[2].area_iso_to_wide == 1
    assert rows[1].area_to_half == 1
    assert rows[0].area_to_wide < rows[1].area_to_wide < 1
    text = markdown(study, find_library(), rows)
    assert text.splitlines()[0].startswith("**M1E2 operands, library unit**")
    assert len(text.splitlines()) == 7
    assert json.dumps([row.estimate.cells for row in rows])
