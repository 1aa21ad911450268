"""Multiply-accumulates that share a merging adder: equal to the reference, and what a share costs."""

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq import hardware
from fmaq.hardware import cost, proof, streams, synthesis, testbench
from fmaq.hardware.liberty import find_library
from fmaq.hardware.netlist import Gate, Netlist
from fmaq.hardware.unit import Unit
from fmaq.hardware.verilog import verilog

SHARING = [
    ("M5E4b10h product=M5E4b12h chunk=4 outer=M10E5b16", "M4E3", "M4E3"),
    ("I10f4 product=I10f4 product_rounding=half_up chunk=4 outer=I16f4", "M4E3", "M4E3"),
    ("M3E3b4h product=M3E3b6h chunk=3 outer=fp32", "int4", "int4"),
    ("M4E4b10 product=M3E4b12 chunk=2 product_rounding=stochastic random_bits=3 outer=M5E5b16h", "M4E3", "M4E3"),
    ("M3E3b4z chunk=1", "M1E2", "M1E2"),
]


@pytest.mark.parametrize("description", SHARING, ids=lambda d: d[0].replace(" ", ","))
def test_rtl_of_a_shared_adder(description):
    found = proof.prove(Unit.of(*description), [], 8_000, part="shared", iverilog=testbench.has_iverilog())
    assert found.holds and found.vectors > 7_000 and "rtl" in found.mismatches


@pytest.mark.parametrize(
    "description",
    # In the second, bits of a lane's total are constants.
    [("M2E3b4h product=M2E3b6h chunk=2 outer=M4E3b4", "M1E2", "M1E2"), ("I6f2 chunk=3 outer=I9f4", "M1E2", "M1E2")],
    ids=lambda d: d[0].replace(" ", ","),
)
def test_netlists_of_lanes_and_of_their_adder(description):
    found = proof.prove(Unit.of(*description), [find_library()], 10_000, part="shared")
    assert set(found.mismatches) == {"rtl", *(f"unit/{recipe.name}" for recipe in synthesis.RECIPES)}
    assert found.holds


def test_another_adder_is_found(monkeypatch):
    one, other = (Unit.of(f"M2E2b2 chunk=2 outer={outer}", "M1E2", "M1E2") for outer in ("M4E3b4", "M4E3b4h"))
    monkeypatch.setattr(proof, "shared_designs", lambda _: cost.shared_designs(other))
    found = proof.prove(one, [find_library()], 10_000, part="shared").mismatches
    assert found.pop("rtl") == 0 and all(count > 50 for count in found.values())


def test_an_instance_has_nets_of_its_own():
    cell = {"type": "one", "connections": {"a": [2, 3], "y": [4], "z": [5]}}
    inner = Netlist(
        {"a": [2, 3]}, {"y": [4], "z": [2]}, [Gate("NAND2X1", {"A": 2, "B": 3, "Y": 4})], find_library().cells
    )
    second = {"type": "one", "connections": {"a": [4, 5], "y": [6], "z": [7]}}
    ports = {"i": {"direction": "input", "bits": [2, 3]}, "o": {"direction": "output", "bits": [6, 7, 5]}}
    module = {"ports": ports, "cells": {"first": cell, "second": second}}
    both = Netlist.from_yosys(module, inner.cells, {"one": inner})
    codes = np.arange(4)
    a, b = codes & 1, codes >> 1
    nand = 1 - (a & b)
    assert np.array_equal(both.simulate({"i": codes})["o"], (1 - (nand & a)) | nand << 1 | a << 2)
    assert len(both.gates) == 2


def test_the_traces_are_what_lane_and_adder_see():
    unit = Unit.of("M4E3b4h product=M4E3b6h chunk=4 outer=M7E4b8")
    lane_design, merge_design = cost.shared_designs(unit)
    drawn = streams.gaussian(steps=14, lanes=8)
    lane, adder = streams.shared_traces(unit, drawn)
    seen = synthesis.lower(lane_design).simulate(lane)
    # Twelve steps are whole chunks. Behind the reset, a sum goes out in the cycle after each chunk's last step.
    merging = np.isin(np.arange(13), [5, 9])
    assert np.array_equal((seen["s_out"] != 0).any(axis=1), merging)
    assert np.array_equal((seen["t_out"] != 0).any(axis=1), merging)
    # Lane 0 is the first of the first adder's four, which merge one after another.
    sums = unit.total.decode(synthesis.lower(merge_design).simulate(adder)["y"])
    assert np.array_equal(sums[[0, 4], 0], unit.total.decode(lane["y"][[5, 9], 0]))
    for name in ("s", "t"):
        assert np.array_equal(seen[f"{name}_out"][[5, 9], 0], adder[f"{name}_0"][[0, 4], 0])
        assert np.array_equal(adder[f"{name}_0"].any(axis=1), np.arange(12) % 4 == 0)
    assert np.array_equal(unit.total.decode(adder["t_0"][4]), sums[0])


def test_a_share_costs_less_than_an_adder_of_ones_own():
    text = "M3E3b4h product=M3E3b6h chunk=4 outer=M7E4b8"
    own, share = hardware.synthesize_mac(text), hardware.synthesize_shared(text)
    assert share.lanes == 4 and share.total == own.total == "M7E4b8"
    assert share.flip_flops == own.flip_flops + 2  # it passes valid and last on
    assert share.area < own.area
    # All of the adder but a share is what a lane saves, and it pays for gates that choose.
    assert share.area + 0.75 * share.merge_area == pytest.approx(own.area, rel=0.15)
    assert share.area == share.front[0].area


@pytest.mark.parametrize(
    ("accumulator", "message"),
    [
        ("M3E3b4 chunk=None", "chunk=None sums in one chunk, so there is nothing to share"),
        ("M3E3b4 rounding=stochastic", "are stochastic, and a shared adder has no random bits"),
        ("M3E3b4 outer=(M5E4b10 chunk=3)", "has one level above its chunks"),
        ("ieee32", "has a unit, and no chunked multiply-accumulate"),
    ],
)
def test_what_cannot_share_is_refused(accumulator, message):
    unit = Unit.of(accumulator)
    for what in (cost.synthesize_shared, lambda _: verilog(unit, "shared"), lambda _: proof.prove(unit, part="shared")):
        with pytest.raises(ValueError, match=message):
            what(accumulator)
    with pytest.raises(ValueError, match=message):
        testbench.testbench(unit, "shared")
