"""Multiply-accumulates that share a merging adder: equal to the reference, and what a share costs."""

import numpy as np
import pytest

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

from fmaq import hardware
from fmaq.hardware import cost, proof, streams, synthesis
from fmaq.hardware.liberty import find_library
from fmaq.hardware.unit import Unit, dot_products

pytestmark = pytest.mark.usefixtures("own_cache")


def wrong_totals(netlist, unit, dots=2, chunks=2, blocks=64):
    """How many totals differ of dot products that all lanes do one after another, each lane a cycle behind the last."""
    lanes = unit.accumulator.chunk
    steps, rng = chunks * lanes, np.random.default_rng(0)
    x = rng.integers(0, 1 << unit.activation.bits, (dots, steps, blocks, lanes))
    w = rng.integers(0, 1 << unit.weight.bits, (dots, steps, blocks, lanes))
    busy = dots * steps
    cycle = np.arange(busy + lanes + 4)
    last = (cycle % steps == 0) & (cycle > 0) & (cycle <= busy)
    ports = {"rst": cycle == 0, "valid": (cycle > 0) & (cycle <= busy), "last": last}
    ports = {name: np.repeat(values.astype(np.int64)[:, None], blocks, axis=1) for name, values in ports.items()}
    for lane in range(lanes):
        for name, codes in (("x", x), ("w", w)):
            port = np.zeros((len(cycle), blocks), np.int64)
            port[1 + lane : 1 + lane + busy] = codes.reshape(busy, blocks, lanes)[:, :, lane]
            ports[f"{name}_{lane}"] = port
    out, expected, wrong = netlist.simulate(ports), dot_products(unit, x, w), 0
    for lane in range(lanes):
        due = np.flatnonzero(last) + 2 + lane
        assert np.array_equal(out[f"done_{lane}"][:, 0], np.isin(cycle, due))
        wrong += proof.mismatches(unit.total, out[f"total_{lane}"][due], expected[..., lane])
    return wrong


@pytest.mark.parametrize(
    "accumulator",
    [
        "M5E4b10h product=M5E4b12h chunk=4 outer=M10E5b16",
        "I10f4 product=I10f4 product_rounding=half_up chunk=4 outer=I16f4",
        "M3E3b4h product=M3E3b6h chunk=3 outer=fp32",
        "M3E3b4z chunk=1",
    ],
)
def test_rtl_of_a_shared_adder(accumulator):
    unit = Unit.of(accumulator)
    assert wrong_totals(synthesis.lower(cost.shared_design(unit)), unit) == 0


def test_netlists_of_a_shared_adder():
    unit = Unit.of("M2E3b4h product=M2E3b6h chunk=2 outer=M4E3b4", "M1E2", "M1E2")
    for mapped in synthesis.map_to_cells(cost.shared_design(unit), find_library()):
        assert wrong_totals(mapped.netlist(find_library()), unit) == 0


def test_another_adder_is_found():
    one, other = (Unit.of(f"M3E3b4 chunk=4 outer={outer}") for outer in ("M6E4b8", "M6E4b8h"))
    assert wrong_totals(synthesis.lower(cost.shared_design(other)), one) > 50


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
    with pytest.raises(ValueError, match=message):
        hardware.synthesize_shared(accumulator)
