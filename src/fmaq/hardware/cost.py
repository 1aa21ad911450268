"""What a unit costs: area, delay and energy of synthesized netlists, with the front between area and delay."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmaq.hardware import streams as operand_streams
from fmaq.hardware import synthesis
from fmaq.hardware.liberty import Library, find_library
from fmaq.hardware.netlist import Netlist, energy
from fmaq.hardware.operands import Operand
from fmaq.hardware.streams import Streams
from fmaq.hardware.unit import IeeeFormat, Unit
from fmaq.numerics import Accumulator


@dataclass(frozen=True)
class Point:
    """One recipe's netlist: area in NAND2 equivalents, delay in the library's unit, gates on the longest path."""

    recipe: str
    area: float
    delay: float
    levels: int


@dataclass(frozen=True)
class Synthesis:
    """A synthesized unit. Area, delay, energy, cells and levels are those of its smallest netlist.

    Attributes:
        unit: operands and accumulator, as text.
        bits: of the accumulator's code.
        product: format of the products, `"exact"` where they are not rounded.
        product_bits: of the product as it enters the sum, see `Unit.product_bits`.
        library: the cell library's name.
        area: NAND2 equivalents.
        delay: of the longest path, without wires, in `delay_unit`.
        energy: of one FMAq, in `energy_unit`, over the operands `streams`; zero-delay, so without glitches.
        cells: how many of each type.
        levels: gates on the longest path.
        front: netlists that no other is both smaller and faster than, the smallest first.
    """

    unit: str
    bits: int
    product: str
    product_bits: int
    library: str
    area: float
    delay: float
    energy: float
    cells: dict[str, int]
    levels: int
    front: tuple[Point, ...]
    delay_unit: str
    energy_unit: str
    streams: str

    @property
    def fastest(self) -> Point:
        """The front's fastest netlist."""
        return self.front[-1]

    def area_within(self, delay: float) -> float | None:
        """Area of the smallest netlist that is at least so fast (iso-delay); None where there is none."""
        return min((point.area for point in self.front if point.delay <= delay), default=None)


@dataclass(frozen=True)
class MacSynthesis(Synthesis):
    """A synthesized multiply-accumulate: the unit, its registers, the chunk counter, and the second-level adder.

    Area, delay and energy are of all that: delay is of the longest path between registers, without their own; energy
    is of one cycle, with the flip-flops' clock pins.

    Attributes:
        flip_flops: how many bits of register.
        flip_flop_area: NAND2 equivalents of these.
        total: format of the dot products: of the second level, where it has one of its own (`outer=`).
    """

    flip_flops: int
    flip_flop_area: float
    total: str


@dataclass(frozen=True)
class SharedSynthesis(MacSynthesis):
    """A multiply-accumulate, a lane, that shares its merging adder with as many as a chunk has steps (`shared`).

    Lane and adder are synthesized each on its own. Area is the lane's and the adder's over the number of lanes, and so
    is the energy of one cycle; delay and levels are those of the slower of the two; cells and flip-flops are the
    lane's.

    Attributes:
        lanes: c, how many share an adder.
        merge_area: NAND2 equivalents of the adder with the ORs that choose whose sum it adds.
    """

    lanes: int
    merge_area: float


def synthesize(
    accumulator: Accumulator | IeeeFormat | str | Mapping[str, Any],
    weight: Operand | str = "M4E3",
    activation: Operand | str = "M4E3",
    library: Library | str | Path | None = None,
    streams: Streams | None = None,
) -> Synthesis:
    """Synthesize the FMAq unit of an accumulator: seconds the first time, then from the cache on disk.

    Args:
        accumulator: anything `Accumulator.parse` takes, or the baselines `"ieee32"` and `"ieee16"`.
        weight, activation: operand formats, `"M4E3"` (bias 2^E−1), `"M4E3b5"` or `"int8"`.
        library: None for our own cells, `"osu018"`, `"osu035"`, or a Liberty file.
        streams: operands for the energy; Gaussian ones unless given.
    Raises:
        TypeError, ValueError: formats or library are wrong; the message says which.
        SynthesisError: pyosys is not installed, or Yosys fails.
    """
    unit = Unit.of(accumulator, weight, activation)
    cells = library if isinstance(library, Library) else find_library(library)
    return synthesize_unit(unit, cells, streams or operand_streams.gaussian())


def synthesize_mac(
    accumulator: Accumulator | str | Mapping[str, Any],
    weight: Operand | str = "M4E3",
    activation: Operand | str = "M4E3",
    library: Library | str | Path | None = None,
    streams: Streams | None = None,
) -> MacSynthesis:
    """Synthesize the chunked multiply-accumulate of an accumulator; arguments and errors as of `synthesize`.

    Raises:
        ValueError: also for the IEEE baselines, which have a unit alone.
    """
    unit = Unit.of(accumulator, weight, activation)
    cells = library if isinstance(library, Library) else find_library(library)
    return synthesize_mac_unit(unit, cells, streams or operand_streams.gaussian())


def synthesize_shared(
    accumulator: Accumulator | str | Mapping[str, Any],
    weight: Operand | str = "M4E3",
    activation: Operand | str = "M4E3",
    library: Library | str | Path | None = None,
    streams: Streams | None = None,
) -> SharedSynthesis:
    """Synthesize multiply-accumulates that share their merging adder; arguments and errors as of `synthesize_mac`.

    Raises:
        ValueError: also where a chunk is the whole sum, or merges are rounded stochastically.
    """
    unit = Unit.of(accumulator, weight, activation)
    cells = library if isinstance(library, Library) else find_library(library)
    return synthesize_shared_unit(unit, cells, streams or operand_streams.gaussian())


def synthesize_unit(unit: Unit, library: Library, streams: Streams) -> Synthesis:
    """`synthesize`, of a unit and a library that are there already."""
    figures, smallest = _figures(unit, library, design(unit))
    trace = operand_streams.trace(unit, streams)
    return Synthesis(**figures, energy=energy(smallest, library, trace), streams=streams.source)


def synthesize_mac_unit(unit: Unit, library: Library, streams: Streams) -> MacSynthesis:
    """`synthesize_mac`, of a unit and a library that are there already."""
    figures, smallest = _figures(unit, library, mac_design(unit))
    trace = operand_streams.mac_trace(unit, streams)
    areas = [library.cells[gate.cell].area for gate in smallest.registers]
    return MacSynthesis(
        **figures,
        energy=energy(smallest, library, trace),
        streams=streams.source,
        flip_flops=len(areas),
        flip_flop_area=sum(areas) / library.nand2,
        total=str(unit.total),
    )


def synthesize_shared_unit(unit: Unit, library: Library, streams: Streams) -> SharedSynthesis:
    """`synthesize_shared`, of a unit and a library that are there already."""
    lane_design, merge_design = shared_designs(unit)
    lanes = sharing(unit)
    of_lane, of_merge = operand_streams.shared_traces(unit, streams)
    (lane_points, lane), (merge_points, merge) = _netlists(lane_design, library), _netlists(merge_design, library)
    points = [
        Point(a.recipe, a.area + b.area / lanes, max(a.delay, b.delay), max(a.levels, b.levels))
        for a, b in zip(lane_points, merge_points, strict=True)
    ]
    best = min(points, key=lambda point: point.area)
    areas = [library.cells[gate.cell].area for gate in lane.registers]
    return SharedSynthesis(
        **_described(unit, library, points, best, lane.counts),
        energy=energy(lane, library, of_lane) + energy(merge, library, of_merge) / lanes,
        streams=streams.source,
        flip_flops=len(areas),
        flip_flop_area=sum(areas) / library.nand2,
        total=str(unit.total),
        lanes=lanes,
        merge_area=merge.area / library.nand2,
    )


def _figures(unit: Unit, library: Library, rtlil: str) -> tuple[dict[str, Any], Netlist]:
    """Fields of a `Synthesis` but those of the energy, and the smallest netlist."""
    points, smallest = _netlists(rtlil, library)
    best = min(points, key=lambda point: point.area)
    return _described(unit, library, points, best, smallest.counts), smallest


def _netlists(rtlil: str, library: Library) -> tuple[list[Point], Netlist]:
    """Every recipe's figures, and the smallest netlist."""
    mapped = synthesis.map_to_cells(rtlil, library)
    netlists = [m.netlist(library) for m in mapped]
    points = [
        Point(m.recipe, netlist.area / library.nand2, library.delay(m.picoseconds), netlist.levels)
        for m, netlist in zip(mapped, netlists, strict=True)
    ]
    return points, netlists[min(range(len(points)), key=lambda index: points[index].area)]


def _described(unit: Unit, library: Library, points: list[Point], best: Point, cells: dict[str, int]) -> dict[str, Any]:
    """Fields of a `Synthesis` but those of the energy."""
    return {
        "unit": str(unit),
        "bits": unit.format.bits,
        "product": "exact" if unit.product is None else str(unit.product),
        "product_bits": unit.product_bits,
        "library": library.name,
        "area": best.area,
        "delay": best.delay,
        "cells": cells,
        "levels": best.levels,
        "front": _front(points),
        "delay_unit": library.delay_unit,
        "energy_unit": library.energy_unit,
    }


def _front(points: list[Point]) -> tuple[Point, ...]:
    front: list[Point] = []
    for point in sorted(points, key=lambda p: (p.area, p.delay)):
        if not front or point.delay < front[-1].delay:
            front.append(point)
    return tuple(front)


@lru_cache(maxsize=64)
def design(unit: Unit, name: str = synthesis.TOP) -> str:
    """A unit's RTL in Yosys's intermediate language.

    Args:
        name: of its top module; those inside are called after it, too.
    """
    back, rtl = _amaranth()
    top = rtl.FmaqUnit(unit)
    return _rtlil(back, top, name)


@lru_cache(maxsize=64)
def mac_design(unit: Unit, name: str = synthesis.TOP) -> str:
    """The same of the chunked multiply-accumulate around the unit.

    Raises:
        ValueError: as `Unit.merge`.
    """
    _ = unit.merge
    back, rtl = _amaranth()
    top = rtl.Mac(unit)
    return _rtlil(back, top, name)


@lru_cache(maxsize=64)
def merge_design(unit: Unit) -> str:
    """The RTL of the merging adder alone; errors as of `mac_design`."""
    _ = unit.merge
    back, rtl = _amaranth()
    return _rtlil(back, rtl.Merge(unit), synthesis.TOP)


def sharing(unit: Unit) -> int:
    """How many multiply-accumulates can share a merging adder: as many as a chunk has steps.

    Raises:
        ValueError: there are no chunks, or the merges are rounded stochastically.
    """
    if unit.merge_random_bits:
        raise ValueError(f"merges of {unit.accumulator} are stochastic, and a shared adder has no random bits")
    chunk = unit.accumulator.chunk  # type: ignore[union-attr]
    if chunk is None:
        raise ValueError(f"chunk=None sums in one chunk, so there is nothing to share in {unit.accumulator}")
    return chunk


@lru_cache(maxsize=64)
def shared_designs(unit: Unit, lane: str = synthesis.TOP, merge: str = synthesis.TOP) -> tuple[str, str]:
    """The RTL of a lane, and that of the merging adder of as many lanes as a chunk has steps.

    Args:
        lane, merge: names of their top modules.
    """
    count = sharing(unit)
    back, _ = _amaranth()
    from fmaq.hardware import shared

    return _rtlil(back, shared.SharedLane(unit), lane), _rtlil(back, shared.SharedMerge(unit, count), merge)


def shared_top(unit: Unit, name: str = synthesis.TOP) -> str:
    """The RTL that connects instances of `NAME_lane` and `NAME_merge`, which `shared_designs` makes."""
    back, _ = _amaranth()
    from fmaq.hardware import shared

    return _rtlil(back, shared.Shared(unit, sharing(unit), f"{name}_lane", f"{name}_merge"), name)


def shared_design(unit: Unit, name: str = synthesis.TOP) -> str:
    """The RTL of them all together."""
    return "\n".join([*shared_designs(unit, f"{name}_lane", f"{name}_merge"), shared_top(unit, name)])


SYNTHESES: dict[str, Callable[[Unit, Library, Streams], Synthesis]] = {
    "unit": synthesize_unit,
    "mac": synthesize_mac_unit,
    "shared": synthesize_shared_unit,
}
DESIGNS: dict[str, Callable[..., str]] = {"unit": design, "mac": mac_design, "shared": shared_design}
"""What is synthesized of each part, and its RTL."""


def check_part(part: str) -> str:
    """The part, if there is one of this name; ValueError otherwise."""
    if part not in DESIGNS:
        raise ValueError(f"part must be one of {', '.join(DESIGNS)}, got {part!r}")
    return part


def _rtlil(back: Any, top: Any, name: str) -> str:
    return str(back.convert(top, ports=top.ports, name=name))


def _amaranth() -> tuple[Any, Any]:
    """Amaranth's RTLIL back end, and our RTL, which needs Amaranth."""
    try:
        from amaranth.back import rtlil

        from fmaq.hardware import rtl
    except ImportError as error:
        raise synthesis.SynthesisError('RTL needs amaranth: pip install "fmaq[hardware]"') from error
    return rtlil, rtl
