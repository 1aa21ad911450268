"""Netlists, synthesis, energy, the analytic count and tables: figures, caching and errors."""

import importlib.util
import json
from dataclasses import FrozenInstanceError, replace

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq import hardware
from fmaq.hardware import streams, synthesis
from fmaq.hardware.comparison import unlike
from fmaq.hardware.cost import design
from fmaq.hardware.layers import Layer, energy_by_layer
from fmaq.hardware.liberty import find_library
from fmaq.hardware.netlist import Gate, Netlist, energy, pack, unpack
from fmaq.hardware.table import (
    FLOAT,
    INTEGER,
    PARTS,
    Study,
    columns,
    label,
    markdown,
    proven,
    record,
    run_study,
    study_of,
)
from fmaq.hardware.unit import Unit
from fmaq.numerics import Accumulator
from fmaq.numerics.accumulator import ROUNDINGS

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
    assert mac.levels > 20
    # The clock pins alone take C·V²/2 twice a cycle: 2 for each flip-flop's C = 2.
    assert mac.energy > unit.energy + 2 * mac.flip_flops
    assert mac.area == mac.front[0].area and mac.fastest.delay < mac.delay
    assert mac.area_within(mac.fastest.delay) == mac.fastest.area


@pytest.mark.parametrize(
    ("accumulator", "operands", "bits", "product", "product_bits"),
    [
        ("paper12", ("M4E3", "M4E3"), 12, "M7E4b12", 12),
        ("M5E4b10", ("M4E3", "M4E3"), 10, "exact", 1 + 4 + 10),  # exponents of products span 13 values
        ("I16f0", ("int8", "int8"), 16, "exact", 16),
        ("I20f0w", ("int8", "int4"), 20, "exact", 12),
        ("M7E4b10", ("int8", "M4E3"), 12, "exact", 1 + 3 + 13),
        ("ieee32", ("M4E3", "M4E3"), 32, "exact", 15),
    ],
)
def test_every_figure_says_bits_and_product(accumulator, operands, bits, product, product_bits):
    result = hardware.estimate(accumulator, *operands)
    assert (result.bits, result.product, result.product_bits) == (bits, product, product_bits)


def test_a_design_that_is_nothing_but_wires_costs_nothing():
    # Nine fraction bits of a four-bit accumulator: every product is a multiple of what it wraps at.
    result = hardware.synthesize("I4f9w", "int4", "int8")
    assert (result.area, result.delay, result.energy, result.cells) == (0, 0, 0, {})


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


def test_an_estimate_knows_what_each_rounding_takes():
    formats = "M5E4b10 product=M5E4b12"
    count = {
        rounding: {part.name: part.formula for part in hardware.estimate(f"{formats} rounding={rounding}").components}
        for rounding in ("toward_zero", "nearest_even", "nearest_away", "floor", "half_up", "odd")
    }
    wide = 10  # the sum's significand, its guard bit and two carries
    assert "rounding" not in count["toward_zero"] and "product's rounding" not in count["toward_zero"]
    assert count["nearest_even"]["rounding"] == f"10 HA + {wide} OR" == count["half_up"]["rounding"]
    assert count["nearest_away"]["rounding"] == "10 HA"
    assert count["floor"]["product's rounding"] == "10 HA + 10 OR"
    assert count["odd"]["product's rounding"] == "10 OR"
    mixed = hardware.estimate(f"{formats} product_rounding=nearest_even").cells
    assert "product's rounding" in mixed and "rounding" not in mixed


def test_a_half_unit_format_costs_a_bit_of_the_datapath_and_no_rounder():
    half = "M5E4b10h product=M5E4b12h"
    truncated, nearest = (f"M5E4b10 product=M5E4b12 rounding={r}" for r in ("toward_zero", "nearest_even"))
    assert not any("rounding" in name for name in hardware.estimate(half).cells)
    for figures in (hardware.estimate, hardware.synthesize):
        areas = [figures(text).area for text in (truncated, half, nearest)]
        assert areas == sorted(areas)
        assert areas[1] / areas[0] < 1.08
    assert hardware.synthesize(half).bits == hardware.synthesize(truncated).bits == 10


def test_half_up_products_of_fixed_point_cost_one_carry():
    plain, half_up = "I12f8 product=I12f8", "I12f8 product=I12f8 product_rounding=half_up"
    assert hardware.synthesize(half_up).area / hardware.synthesize(plain).area < 1.08


@pytest.mark.parametrize("accumulator", ["paper12", "M3E3b4 product=M3E3b6", "I16f10", "M5E4b10h product=M5E4b12h"])
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


@pytest.mark.parametrize(
    ("layer", "baseline"),
    [
        (Layer("engine", 1, "I16f0", "int8", "int8"), "I32f0"),
        (Layer("float of integers", 1, "M7E4b2", "int8", "int8"), "M23E8b127"),
        (Layer("mixed", 1, "M7E4b10", "int8", "M4E3"), "M23E8b127"),
        (Layer("left alone", 1, "fp32", "int4", "int4"), "M23E8b127"),
        (Layer("scaled", 1, "I16f4", "int8", "int8"), "M23E8b127"),
    ],
    ids=lambda value: getattr(value, "name", value),
)
def test_integer_layers_have_an_energy_and_a_baseline(layer, baseline):
    (cost,) = energy_by_layer([layer], find_library())
    assert cost.baseline_accumulator == baseline
    assert 50 < cost.operation <= cost.baseline
    assert (cost.operation == cost.baseline) == (layer.accumulator == "fp32")


def test_a_bias_in_a_format_is_a_constant_of_the_layers_unit():
    drawn = hardware.of_layer("fc", np.full((4, 8), 0.25), np.full((4, 8), 0.25))
    fixed, flexible = energy_by_layer(
        [
            Layer("fc", 1, "M3E3b4", "M1E2b5", "M1E2b5", drawn),
            Layer("fc", 1, "M3E3b4", "M1E2", "M1E2", drawn),
        ],
        find_library(),
    )
    assert str(fixed.unit.weight) == "M1E2b5"
    assert str(flexible.unit.weight) == "M1E2b5".replace("5", str(2**2 + 1))  # 0.25 = 2^(3 − b)
    codes = streams.trace(fixed.unit, drawn, rescale=False)
    assert np.all(fixed.unit.weight.decode(codes["w"]) == 0.25)
    small = replace(fixed.unit, weight=replace(fixed.unit.weight, bias=7))
    assert np.all(small.weight.decode(streams.trace(small, drawn, rescale=False)["w"]) == small.weight.decode(7).max())


# --- Tables -----------------------------------------------------------------------------------------------------------


def test_a_table_compares_with_its_baselines():
    study = Study("M1E2", "M1E2", ("M2E2b2", "M3E3b4", "M5E3b4"), wide="M5E3b4", half="M3E3b4")
    done = []
    rows = run_study(study, find_library(), progress=done.append)
    assert sorted(done) == sorted(study.accumulators)
    assert rows[2].area_to_wide == rows[2].area_iso_to_wide == 1
    assert rows[1].area_to_half == 1
    assert rows[0].area_to_wide < rows[1].area_to_wide < 1
    text = markdown(study, find_library(), {"unit": rows})
    assert text.splitlines()[0].startswith("**M1E2 operands, library unit**")
    assert len(text.splitlines()) == 7
    heads = [cell.strip() for cell in text.splitlines()[2].strip("|").split("|")]
    assert heads == list(columns())
    assert heads[:4] == ["accumulator", "bits", "product", "its bits"]
    assert [cell.strip() for cell in text.splitlines()[4].strip("|").split("|")][:4] == ["M2E2b2", "5", "exact", "8"]
    assert json.dumps([row.estimate.cells for row in rows])
    assert record(study, rows[0])["area_to_wide"] == rows[0].area_to_wide


def test_a_table_of_multiply_accumulates():
    study = study_of(["M2E2b2", "ieee16"], "M1E2", "M1E2", wide="M5E3b4", half="M3E3b4")
    rows = run_study(study, find_library(), part="mac")
    assert [row.accumulator for row in rows] == ["M2E2b2", "M3E3b4", "M5E3b4"]  # the IEEE unit has no chunks
    mac = hardware.synthesize_mac("M2E2b2", "M1E2", "M1E2")
    assert rows[0].synthesis == mac
    assert rows[0].area_to_wide == mac.area / hardware.synthesize_mac("M5E3b4", "M1E2", "M1E2").area
    assert "gates" not in columns("mac")
    text = markdown(study, find_library(), {"mac": rows})
    assert text.startswith("**M1E2 operands, chunked multiply-accumulate, library unit**")
    assert len(text.splitlines()[4].split("|")) == len(columns("mac")) + 2
    with pytest.raises(ValueError, match="part must be one of unit, mac, shared, got 'core'"):
        run_study(study, find_library(), part="core")


def test_all_parts_side_by_side():
    study = study_of(["M2E2b2 chunk=2", "ieee16"], "M1E2", "M1E2", wide="M3E3b4 chunk=2", half="M3E3b4 chunk=2")
    rows = {part: run_study(study, find_library(), part=part) for part in PARTS}
    text = markdown(study, find_library(), rows).splitlines()
    assert text[0].startswith("**M1E2 operands, units, and multiply-accumulates with a merging adder of their own and")
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in text[2:]]
    assert tuple(table[0]) == columns("all") and len(table) == 4  # heads, rule, and those that have all parts
    assert table[2][:3] == ["M2E2b2 chunk=2", "5", "exact"]
    parts = [synthesize("M2E2b2 chunk=2", "M1E2", "M1E2") for synthesize in SYNTHESIZE]
    assert table[2][3::3] == [f"{part.area:.0f}" for part in parts]
    assert table[2][5::3] == [f"{part.energy:.0f}" for part in parts]


SYNTHESIZE = (hardware.synthesize, hardware.synthesize_mac, hardware.synthesize_shared)


def test_what_is_proven_without_a_list():
    units = [Unit.of(*names) for names in proven("unit")]
    plain = [unit.accumulator for unit in units if isinstance(unit.accumulator, Accumulator)]
    assert {acc.rounding for acc in plain} == set(ROUNDINGS)
    assert sum(replace(acc, outer=None) == replace(plain[0], outer=None) for acc in plain) == 1  # once, whatever outer
    assert any(getattr(acc.format, "half_unit", False) for acc in plain)
    assert any(acc.product_rounding not in (None, acc.rounding) for acc in plain)
    for part in ("mac", "shared"):
        accumulators = [Unit.of(*names).accumulator for names in proven(part)]
        assert {"M10E5b16", "fp32"} <= {str(acc.outer).split()[0] for acc in accumulators}
        assert any(getattr(acc.format, "half_unit", False) for acc in accumulators)
    with pytest.raises(ValueError, match="part must be one of"):
        proven("core")


@pytest.mark.parametrize(
    ("accumulators", "operands", "wide", "half"),
    [
        (["paper12"], ("M4E3", "M4E3"), "M23E8b127", "M10E5b16 product=M10E5b18"),
        (["I14f0", "I18f0w"], ("int8", "int4"), "I32f0", "I16f0"),
        (["I14f0", "M7E4b2"], ("int8", "int8"), "M23E8b127", "M10E5b16 product=M10E5b18"),
        (["I14f0"], ("int8", "M4E3"), "M23E8b127", "M10E5b16 product=M10E5b18"),
    ],
)
def test_a_list_of_ones_own_has_baselines_of_its_kind(accumulators, operands, wide, half):
    study = study_of(accumulators, *operands)
    assert (study.wide, study.half) == (wide, half)
    assert study.accumulators == (*accumulators, half, wide)


def test_a_baseline_that_is_in_the_list_is_not_there_twice():
    study = study_of(["M7E4b10 product=M7E4b12 chunk=16", "M23E8b127 chunk=16", "paper12"])
    assert study.wide == "M23E8b127 chunk=16"
    assert study.accumulators == (
        "M7E4b10 product=M7E4b12 chunk=16",
        "M23E8b127 chunk=16",
        "M10E5b16 product=M10E5b18",
    )


def test_labels_tell_accumulators_apart():
    assert label("M5E4b10 product=M5E4b12") == "M5E4b10"
    assert label("M5E4b10 product=M5E4b12 rounding=nearest_even") == "M5E4b10 rounding=nearest_even"


@pytest.mark.parametrize(
    ("accumulators", "operands", "advice"),
    [
        (["paper12", "M5E4b10"], "M4E3", "M5E4b10 product=M5E4b12"),
        (["M5E4b10 chunk=64", "paper12"], "M4E3", "M5E4b10 product=M5E4b13"),
        (["paper12", "M5E4b10z"], "M4E3", "M5E4b10z product=M5E4b12z"),
        (["paper12", "M7E4b10"], "int8", "M7E4b10 product=M7E4b12"),
        (["paper12", "M23E8b127"], "int16", "M23E8b127 product=M23E8b129"),
        (["paper12", "M23E8b127", "I16f10", "ieee32"], "M4E3", None),
        (["M5E4b10", "M7E4b10"], "M4E3", None),
        (["M5E4b10", "I16f10"], "M4E3", None),
        (["paper12", "M9E5b16"], "M4E3", None),  # an exact product has ten bits, and so has it
        (["paper12", "M8E5b16"], "M4E3", "M8E5b16 product=M8E5b18"),
    ],
)
def test_an_exact_product_beside_a_rounded_one_is_an_unlike_comparison(accumulators, operands, advice):
    message = unlike([Unit.of(text, operands, operands) for text in accumulators])
    if advice is None:
        assert message is None
    else:
        assert f'write "{advice}"' in message
        Accumulator(advice)


def test_the_tables_of_the_documentation_compare_like_with_like():
    assert FLOAT.warning is None
    assert INTEGER.warning is None
