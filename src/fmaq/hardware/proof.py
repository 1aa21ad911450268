"""Is the hardware the reference, bit for bit? RTL, every synthesized netlist and the Verilog, compared.

A unit is tried on vectors; the chunked multiply-accumulate around it on dot products, one after another; as many of
these as share a merging adder on as many at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmaq.hardware import synthesis, testbench
from fmaq.hardware.cost import DESIGNS, check_part, shared_designs, shared_top, sharing
from fmaq.hardware.liberty import Library, find_library
from fmaq.hardware.netlist import Netlist
from fmaq.hardware.unit import RegisterFormat, Unit, dot_products
from fmaq.hardware.vectors import Vectors, is_exhaustive, random, vectors_for

Codes = NDArray[np.int64]

DOTS = 2
"""Dot products that a multiply-accumulate does one after another: the second starts in the cycle after the first."""
VERILOG_DOTS = 500
"""The same in Icarus Verilog, which is slow."""


@dataclass(frozen=True)
class Proof:
    """What a comparison found.

    Attributes:
        unit: as text.
        vectors: how many inputs were tried; of a multiply-accumulate, steps.
        exhaustive: whether these are all there are.
        mismatches: by what was tried: `"rtl"`, each library's netlists as `"osu018/smallest"`, or `"iverilog"`. Of a
            multiply-accumulate, dot products that differ.
    """

    unit: str
    vectors: int
    exhaustive: bool
    mismatches: dict[str, int]

    @property
    def holds(self) -> bool:
        """Whether everything equals the reference."""
        return not any(self.mismatches.values())


def prove(
    unit: Unit,
    libraries: list[Library] | None = None,
    count: int = 100_000,
    seed: int = 0,
    iverilog: bool = False,
    part: str = "unit",
) -> Proof:
    """Compare RTL and synthesized netlists with `fmaq.numerics.reference`.

    Args:
        libraries: our own unless given.
        count: vectors, where trying all inputs is too much; steps of the dot products of a multiply-accumulate.
        iverilog: simulate the Verilog too, by Icarus Verilog, which must be installed.
        part: `"unit"`; `"mac"`, the chunked multiply-accumulate; or `"shared"`, as many of these as a chunk has steps,
            with one merging adder.
    """
    comparisons = {"unit": _units, "mac": _macs, "shared": _shared}
    compare, tried, exhaustive, bench = comparisons[check_part(part)](unit, count, seed)
    wrong = {"rtl": compare(synthesis.lower(DESIGNS[part](unit)))}
    for library in libraries if libraries is not None else [find_library()]:
        for recipe, netlist in _netlists(unit, part, library):
            wrong[f"{library.name}/{recipe}"] = compare(netlist)
    if iverilog:
        wrong["iverilog"] = testbench.mismatches(bench())
    return Proof(str(unit), tried, exhaustive, wrong)


def _netlists(unit: Unit, part: str, library: Library) -> Iterator[tuple[str, Netlist]]:
    """Every recipe's netlist; lanes and the adder that they share are synthesized each on its own, then connected."""
    if part != "shared":
        for mapped in synthesis.map_to_cells(DESIGNS[part](unit), library):
            yield mapped.recipe, mapped.netlist(library)
        return
    top, (lanes, merges) = shared_top(unit), (synthesis.map_to_cells(d, library) for d in shared_designs(unit))
    for lane, merge in zip(lanes, merges, strict=True):
        inside = {"lane": lane.netlist(library), "merge": merge.netlist(library)}
        yield lane.recipe, synthesis.assemble(top, {f"{synthesis.TOP}_{name}": n for name, n in inside.items()})


Comparison = tuple[Callable[[Netlist], int], int, bool, Callable[[], dict[str, str]]]
"""How a netlist is compared, on how many inputs, whether these are all, and the test bench that does the same."""


def _units(unit: Unit, count: int, seed: int) -> Comparison:
    vectors = vectors_for(unit, count, seed)
    expected = unit.golden(vectors)
    return (
        lambda netlist: mismatches(unit.format, netlist.simulate(vectors)["y"], expected),
        len(expected),
        is_exhaustive(unit),
        lambda: testbench.bench_of_unit(unit, vectors),
    )


def _macs(unit: Unit, count: int, seed: int) -> Comparison:
    lanes = max(1, count // (DOTS * testbench.STEPS))
    drawn = random(unit, DOTS * testbench.STEPS * lanes, seed)
    x, w = (drawn[name].reshape(DOTS, testbench.STEPS, lanes) for name in ("x", "w"))
    expected = dot_products(unit, x, w)
    x_dots, w_dots = (c.transpose(2, 0, 1).reshape(-1, testbench.STEPS)[:VERILOG_DOTS] for c in (x, w))
    return (
        lambda netlist: mismatches(unit.total, simulate_mac(netlist, x, w), expected),
        x.size,
        False,
        lambda: testbench.bench_of_mac(unit, x_dots, w_dots),
    )


def _shared(unit: Unit, count: int, seed: int) -> Comparison:
    lanes = sharing(unit)
    steps = testbench.whole_chunks(unit)
    blocks = max(1, count // (DOTS * steps * lanes))
    x, w = testbench.filled_up(unit, DOTS * blocks * lanes, seed)
    x, w = (codes.reshape(DOTS, blocks, lanes, steps).transpose(0, 3, 1, 2) for codes in (x, w))
    expected = dot_products(unit, x, w)
    rounds = max(1, VERILOG_DOTS // lanes)
    x_dots, w_dots = (c.transpose(2, 0, 1, 3).reshape(-1, steps, lanes)[:rounds] for c in (x, w))
    return (
        lambda netlist: mismatches(unit.total, simulate_shared(netlist, x, w), expected),
        x.size,
        False,
        lambda: testbench.bench_of_shared(unit, x_dots, w_dots),
    )


def mismatches(format: RegisterFormat, codes: Codes, expected: NDArray[np.float64]) -> int:
    """How many codes are not the expected values; NaN equals NaN, and the zeros are one."""
    values = format.decode(codes)
    return int(np.sum((values != expected) & ~(np.isnan(values) & np.isnan(expected))))


def simulate_mac(netlist: Netlist, x: Codes, w: Codes) -> Codes:
    """Totals of dot products, (products, units), by the netlist of a multiply-accumulate, without a pause between them.

    Args:
        x, w: codes of the operands, (products, steps, units).
    Raises:
        RuntimeError: `done` comes at other times than it should.
    """
    count, steps, lanes = x.shape
    busy = count * steps
    cycle = np.arange(busy + 4)  # a reset first; a total comes out two cycles behind its last step
    last = (cycle % steps == 0) & (cycle >= steps) & (cycle <= busy)
    ports: Vectors = {
        "x": np.zeros((len(cycle), lanes), np.int64),
        "w": np.zeros((len(cycle), lanes), np.int64),
        "rst": _column(cycle == 0, lanes),
        "valid": _column((cycle > 0) & (cycle <= busy), lanes),
        "last": _column(last, lanes),
    }
    ports["x"][1 : busy + 1], ports["w"][1 : busy + 1] = x.reshape(busy, lanes), w.reshape(busy, lanes)
    out = netlist.simulate(ports)
    due = np.flatnonzero(last) + 2
    if not np.array_equal(out["done"], _column(np.isin(cycle, due), lanes)):
        raise RuntimeError("the multiply-accumulate is not done two cycles after the last step")
    return out["total"][due]


def simulate_shared(netlist: Netlist, x: Codes, w: Codes) -> Codes:
    """Totals of dot products, (products, blocks, lanes), by lanes and the adder that they share, without a pause.

    Args:
        x, w: codes of the operands, (products, steps, blocks, lanes), of whole chunks.
    Raises:
        RuntimeError: `done` comes at other times than it should.
    """
    count, steps, blocks, lanes = x.shape
    busy = count * steps
    cycle = np.arange(busy + lanes + 3)  # the last lane is as many cycles behind as there are others
    last = (cycle % steps == 0) & (cycle >= steps) & (cycle <= busy)
    ports: Vectors = {
        "rst": _column(cycle == 0, blocks),
        "valid": _column((cycle > 0) & (cycle <= busy), blocks),
        "last": _column(last, blocks),
    }
    for lane in range(lanes):
        for name, codes in (("x", x), ("w", w)):
            ports[f"{name}_{lane}"] = port = np.zeros((len(cycle), blocks), np.int64)
            port[1 + lane : 1 + lane + busy] = codes[..., lane].reshape(busy, blocks)
    out, totals = netlist.simulate(ports), []
    for lane in range(lanes):
        due = np.flatnonzero(last) + 2 + lane
        if not np.array_equal(out[f"done_{lane}"], _column(np.isin(cycle, due), blocks)):
            raise RuntimeError(f"lane {lane} is not done two cycles after its last step")
        totals.append(out[f"total_{lane}"][due])
    return np.stack(totals, axis=-1)


def _column(values: NDArray[np.bool_], lanes: int) -> Codes:
    return np.repeat(values.astype(np.int64)[:, None], lanes, axis=1)
