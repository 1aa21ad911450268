"""Area, delay and energy by accumulator, beside the 32- and 16-bit baselines, by library: the tables of the docs."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from fmaq.hardware.cost import Synthesis, synthesize_unit
from fmaq.hardware.gatecount import Estimate, estimate
from fmaq.hardware.liberty import Library
from fmaq.hardware.streams import Streams, gaussian
from fmaq.hardware.unit import Unit

ISO_RECIPE = "fast"
"""Iso-delay figures are at the delay of the 32-bit baseline by this recipe."""


@dataclass(frozen=True)
class Study:
    """Accumulators to compare.

    Attributes:
        operands: format of weights and activations.
        accumulators: descriptions, in the order of the table.
        wide, half: the 32-bit and the 16-bit baseline among them.
    """

    operands: str
    accumulators: tuple[str, ...]
    wide: str
    half: str


def _paper(mantissa: int, exponent: int, bias: int) -> str:
    """A float accumulator with the paper's rule for chunks of 16: the product's bias is two more."""
    return f"M{mantissa}E{exponent}b{bias} product=M{mantissa}E{exponent}b{bias + 2}"


HALF, WIDE = _paper(10, 5, 16), "M23E8b127"
FLOAT = Study(
    "M4E3",
    (
        *(_paper(m, 3, 4) for m in (3, 4)),
        *(_paper(m, 4, 10) for m in (3, 4, 5, 6, 7)),
        *(_paper(m, 5, 16) for m in (5, 6, 7, 8, 9)),
        *(HALF, WIDE, "ieee16", "ieee32"),
        *("I12f6", "I16f10", "I20f14", "I24f16", "I32f20"),
    ),
    WIDE,
    HALF,
)
INTEGER = Study("int8", ("I16f0", "I16f0w", "I20f0", "I24f0", "I32f0", "I32f0w"), "I32f0", "I16f0")
STUDIES = {"M4E3": FLOAT, "int8": INTEGER}


@dataclass(frozen=True)
class Row:
    """One accumulator by one library.

    Attributes:
        accumulator: as it was described.
        bits: of its register's code.
        synthesis, estimate: its figures.
        area_iso: NAND2 equivalents of the smallest netlist as fast as the 32-bit baseline's; None where none is.
        area_to_wide, area_iso_to_wide, energy_to_wide: ratios to the 32-bit baseline.
        area_to_half, energy_to_half: ratios to the 16-bit baseline.
        estimate_to_wide: the same ratio of the analytic gate counts.
    """

    accumulator: str
    bits: int
    synthesis: Synthesis
    estimate: Estimate
    area_iso: float | None
    area_to_wide: float
    area_iso_to_wide: float | None
    energy_to_wide: float
    area_to_half: float
    energy_to_half: float
    estimate_to_wide: float


def run_study(
    study: Study,
    library: Library,
    streams: Streams | None = None,
    progress: Callable[[str], None] = lambda accumulator: None,
) -> list[Row]:
    """Synthesize a study's accumulators by one library, some at a time.

    Args:
        streams: operands for the energy; Gaussian ones unless given.
        progress: called with an accumulator when it is done.
    """
    operands = streams or gaussian()

    def one(accumulator: str) -> Synthesis:
        result = synthesize_unit(Unit.of(accumulator, study.operands, study.operands), library, operands)
        progress(accumulator)
        return result

    # Yosys runs in processes of its own, so threads are enough.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(study.accumulators, pool.map(one, study.accumulators), strict=True))
    counts = {text: estimate(text, study.operands, study.operands) for text in study.accumulators}
    return [_row(study, text, results, counts) for text in study.accumulators]


def _row(study: Study, text: str, results: dict[str, Synthesis], counts: dict[str, Estimate]) -> Row:
    mine, wide, half = results[text], results[study.wide], results[study.half]
    limit = iso_delay(wide)
    area_iso, wide_iso = mine.area_within(limit), wide.area_within(limit)
    return Row(
        accumulator=text,
        bits=Unit.of(text, study.operands, study.operands).format.bits,
        synthesis=mine,
        estimate=counts[text],
        area_iso=area_iso,
        area_to_wide=mine.area / wide.area,
        area_iso_to_wide=None if area_iso is None or wide_iso is None else area_iso / wide_iso,
        energy_to_wide=mine.energy / wide.energy,
        area_to_half=mine.area / half.area,
        energy_to_half=mine.energy / half.energy,
        estimate_to_wide=counts[text].area / counts[study.wide].area,
    )


def iso_delay(wide: Synthesis) -> float:
    """The delay that iso-delay figures are at."""
    return next((point.delay for point in wide.front if point.recipe == ISO_RECIPE), wide.fastest.delay)


COLUMNS = ("accumulator", "bits", "area", "iso", "gates", "delay", "energy")
"""`iso` is the area at the 32-bit baseline's delay, `gates` the analytic count."""
RATIOS = ("area/32", "iso/32", "gates/32", "energy/32", "area/16", "energy/16")
"""To the 32-bit and the 16-bit baseline."""


def cells(row: Row) -> list[str]:
    """A row as text, in the order of COLUMNS and RATIOS."""
    s = row.synthesis
    figures = [f"{s.area:.0f}", _number(row.area_iso), f"{row.estimate.area:.0f}", f"{s.delay:.1f}", f"{s.energy:.0f}"]
    ratios = (row.area_to_wide, row.area_iso_to_wide, row.estimate_to_wide, row.energy_to_wide)
    return [
        row.accumulator.split()[0],
        str(row.bits),
        *figures,
        *map(_ratio, (*ratios, row.area_to_half, row.energy_to_half)),
    ]


def markdown(study: Study, library: Library, rows: Sequence[Row]) -> str:
    """A study's table."""
    units = f"area in NAND2 equivalents, delay in {library.delay_unit}, energy in {library.energy_unit}"
    lines = [f"**{study.operands} operands, library {library.name}** ({units})", ""]
    lines += ["| " + " | ".join((*COLUMNS, *RATIOS)) + " |", "|---" * (len(COLUMNS) + len(RATIOS)) + "|"]
    lines += ["| " + " | ".join(cells(row)) + " |" for row in rows]
    return "\n".join(lines)


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
