"""Is the hardware the reference, bit for bit? RTL, every synthesized netlist and the Verilog, compared.

A unit is tried on vectors; the chunked multiply-accumulate around it on dot products, one after another.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from fmaq.hardware import synthesis, testbench
from fmaq.hardware.cost import DESIGNS, check_part
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
        part: `"unit"`, or `"mac"`, the chunked multiply-accumulate.
    """
    compare, tried, exhaustive, bench = (_units if check_part(part) == "unit" else _macs)(unit, count, seed)
    rtlil = DESIGNS[part](unit)
    wrong = {"rtl": compare(synthesis.lower(rtlil))}
    for library in libraries if libraries is not None else [find_library()]:
        for mapped in synthesis.map_to_cells(rtlil, library):
            wrong[f"{library.name}/{mapped.recipe}"] = compare(mapped.netlist(library))
    if iverilog:
        wrong["iverilog"] = testbench.mismatches(bench())
    return Proof(str(unit), tried, exhaustive, wrong)


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


def _column(values: NDArray[np.bool_], lanes: int) -> Codes:
    return np.repeat(values.astype(np.int64)[:, None], lanes, axis=1)
