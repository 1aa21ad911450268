"""Area, delay and energy by accumulator, beside the 32- and 16-bit baselines, by library: the tables of the docs."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

from fmaq.hardware.comparison import unlike
from fmaq.hardware.cost import SYNTHESES, Synthesis, check_part
from fmaq.hardware.gatecount import Estimate, estimate
from fmaq.hardware.liberty import Library
from fmaq.hardware.operands import IntegerOperand
from fmaq.hardware.streams import Streams, gaussian
from fmaq.hardware.unit import IEEE, Unit
from fmaq.numerics import Accumulator, FixedFormat

ISO_RECIPE = "fast"
"""Iso-delay figures are at the delay of the 32-bit baseline by this recipe."""


@dataclass(frozen=True)
class Study:
    """Accumulators to compare.

    Attributes:
        weight, activation: formats of the operands.
        accumulators: descriptions, in the order of the table.
        wide, half: the 32-bit and the 16-bit baseline among them.
    """

    weight: str
    activation: str
    accumulators: tuple[str, ...]
    wide: str
    half: str

    @property
    def operands(self) -> str:
        """The formats of the operands, for titles."""
        return self.weight if self.weight == self.activation else f"{self.weight} x {self.activation}"

    def unit(self, accumulator: str) -> Unit:
        """The unit of one of them."""
        return Unit.of(accumulator, self.weight, self.activation)

    @property
    def warning(self) -> str | None:
        """What is unlike among them, if anything is."""
        return unlike([self.unit(text) for text in self.accumulators])


def _paper(mantissa: int, exponent: int, bias: int) -> str:
    """A float accumulator with the paper's rule for chunks of 16: the product's bias is two more."""
    return f"M{mantissa}E{exponent}b{bias} product=M{mantissa}E{exponent}b{bias + 2}"


HALF, WIDE = _paper(10, 5, 16), "M23E8b127"
INTEGER_HALF, INTEGER_WIDE = "I16f0", "I32f0"
FLOAT = Study(
    "M4E3",
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
INTEGER = Study("int8", "int8", ("I16f0", "I16f0w", "I20f0", "I24f0", "I32f0", "I32f0w"), INTEGER_WIDE, INTEGER_HALF)
OUTER = "outer=M10E5b16"
LEVELS = Study(
    "M4E3",
    "M4E3",
    (
        _paper(7, 4, 10),
        *(f"{text} {OUTER}" for text in (_paper(7, 4, 10), f"{_paper(7, 4, 10)} rounding=nearest_even")),
        *(f"M{m}E4b10h product=M{m}E4b12h {OUTER}" for m in (7, 6, 5, 4, 3)),
        *(f"M{m}E3b4h product=M{m}E3b6h {OUTER}" for m in (3, 2)),
        *(
            f"I{width}f{width - 2} product=I{width}f{width - 2} rounding=half_up {outer}"
            for width in (16, 14, 12, 10, 8, 7)
            for outer in (OUTER, f"outer=I{width + 6}f{width - 2}")
        ),
        *(HALF, WIDE),
    ),
    WIDE,
    HALF,
)
"""The paper's format, half-unit formats and rounded fixed point, with an outer level."""
ROUNDINGS = Study(
    "M4E3",
    "M4E3",
    (
        *(
            f"{format}{kind} product={product}{kind}{rounding}"
            for format, product in (
                *(("M7E8b127", "M7E8b129"), ("M10E5b16", "M10E5b18"), ("M7E4b10", "M7E4b12")),
                *(("M5E4b10", "M5E4b12"), ("M3E3b4", "M3E3b6")),
            )
            for kind, rounding in (("", ""), ("h", ""), ("", " rounding=nearest_away"), ("", " rounding=nearest_even"))
        ),
        WIDE,
    ),
    WIDE,
    HALF,
)
"""What rounding to the nearest costs, beside a half-unit format of as many bits."""
STUDIES = {"M4E3": FLOAT, "int8": INTEGER, "levels": LEVELS, "roundings": ROUNDINGS}
OTHERS = Study(
    "M4E3",
    "M4E3",
    (
        *(f"{_paper(7, 4, 10)} rounding={rounding}" for rounding in ("floor", "half_up", "odd", "stochastic")),
        f"{_paper(5, 4, 10)} product_rounding=nearest_away {OUTER}",
        f"M5E4b10h product=I12f8 product_rounding=half_up {OUTER}",
        "M5E4b10 product=M5E4b12h outer=(M10E5b16 rounding=nearest_even chunk=None)",
        *(f"I12f6 product=I12f6 rounding={rounding} outer=fp32" for rounding in ("toward_zero", "floor", "odd")),
    ),
    WIDE,
    HALF,
)
"""In no table: what is left of the ways to round."""
BLOCKS = Study(
    "M4E3",
    "M4E3",
    (
        f"{_paper(7, 4, 10)} rounding=nearest_even {OUTER}",
        f"M4E4b10h product=M4E4b12h {OUTER}",
        f"I8f6 product=I8f6 rounding=half_up {OUTER}",
        "I12f10 product=I12f10 rounding=half_up outer=I18f10",
        "M5E4b10 product=M5E4b12 product_rounding=odd outer=fp32",
    ),
    WIDE,
    HALF,
)
"""A few of all, for blocks of sixteen that share an adder."""
PROVEN = {"unit": (*STUDIES.values(), OTHERS), "mac": (INTEGER, LEVELS, OTHERS), "shared": (BLOCKS,)}
"""What `fmaq hardware prove` tries without accumulators."""


def proven(part: str) -> list[tuple[str, str, str]]:
    """Accumulators and formats of weights and activations of `PROVEN`, each once; an outer level changes no unit."""
    found: dict[object, tuple[str, str, str]] = {}
    for study in PROVEN[check_part(part)]:
        for text in study.accumulators:
            unit = study.unit(text)
            acc = unit.accumulator
            key = replace(acc, outer=None) if part == "unit" and isinstance(acc, Accumulator) else acc
            found.setdefault((key, unit.weight, unit.activation), (text, study.weight, study.activation))
    return list(found.values())


PARTS = {
    "unit": "",
    "mac": "chunked multiply-accumulate",
    "shared": "chunked multiply-accumulate with its share of a merging adder",
}
"""What a part is called in titles."""
ALL = "all"
"""The parts side by side: each accumulator's unit, and its multiply-accumulate with an adder of its own and shared."""


def study_of(
    accumulators: Sequence[str], weight: str = "M4E3", activation: str = "M4E3", wide: str = "", half: str = ""
) -> Study:
    """A study of these accumulators and, behind them, the baselines that they are compared with.

    Args:
        wide, half: the baselines; without, M23E8b127 and M10E5b16, or I32f0 and I16f0 where operands and accumulators
            are all integers.
    """
    units = [Unit.of(text, weight, activation) for text in accumulators]
    are_integers = all(
        isinstance(unit.format, FixedFormat) and {type(unit.weight), type(unit.activation)} == {IntegerOperand}
        for unit in units
    )
    wide = wide or (INTEGER_WIDE if are_integers else WIDE)
    half = half or (INTEGER_HALF if are_integers else HALF)
    found: dict[Unit, str] = {}
    for text in (*accumulators, half, wide):
        found.setdefault(Unit.of(text, weight, activation), text)
    named = {text: found[Unit.of(text, weight, activation)] for text in (wide, half)}
    return Study(weight, activation, tuple(found.values()), named[wide], named[half])


def label(accumulator: str) -> str:
    """An accumulator's description without its product, which has a column of its own."""
    return " ".join(word for word in accumulator.split() if not word.startswith("product="))


@dataclass(frozen=True)
class Row:
    """One accumulator by one library.

    Attributes:
        accumulator: as it was described.
        synthesis, estimate: its figures; the estimate is of the unit, also where the rest is of the whole
            multiply-accumulate.
        area_iso: NAND2 equivalents of the smallest netlist as fast as the 32-bit baseline's; None where none is.
        area_to_wide, area_iso_to_wide, energy_to_wide: ratios to the 32-bit baseline.
        area_to_half, energy_to_half: ratios to the 16-bit baseline.
        estimate_to_wide: the same ratio of the analytic gate counts.
    """

    accumulator: str
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
    part: str = "unit",
) -> list[Row]:
    """Synthesize a study's accumulators by one library, some at a time.

    Args:
        streams: operands for the energy; Gaussian ones unless given.
        progress: called with an accumulator when it is done.
        part: `"unit"`; `"mac"`, the chunked multiply-accumulate, without the IEEE units, which have none; or
            `"shared"`, one that shares its merging adder with as many as a chunk has steps.
    """
    operands = streams or gaussian()
    synthesize = SYNTHESES[check_part(part)]
    chosen = [text for text in study.accumulators if part == "unit" or text not in IEEE]

    def one(accumulator: str) -> Synthesis:
        result = synthesize(study.unit(accumulator), library, operands)
        progress(accumulator)
        return result

    # Yosys runs in processes of its own, so threads are enough.
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        results = dict(zip(chosen, pool.map(one, chosen), strict=True))
    counts = {text: estimate(text, study.weight, study.activation) for text in chosen}
    return [_row(study, text, results, counts) for text in chosen]


def _row(study: Study, text: str, results: dict[str, Synthesis], counts: dict[str, Estimate]) -> Row:
    mine, wide, half = results[text], results[study.wide], results[study.half]
    limit = iso_delay(wide)
    area_iso, wide_iso = mine.area_within(limit), wide.area_within(limit)
    return Row(
        accumulator=text,
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


def columns(part: str = "unit") -> tuple[str, ...]:
    """Names of the columns: `iso` is the area at the 32-bit baseline's delay, `gates` the unit's analytic count."""
    if part == ALL:
        kinds = (f"{name} {figure}" for name in ("unit", "own", "shared") for figure in ("area", "delay", "energy"))
        return ("accumulator", "bits", "product", *kinds)
    gates, ratio = (("gates",), ("gates/32",)) if part == "unit" else ((), ())
    names = ("accumulator", "bits", "product", "its bits", "area", "iso", *gates, "delay", "energy")
    return (*names, "area/32", "iso/32", *ratio, "energy/32", "area/16", "energy/16")


def lines(rows: Mapping[str, Sequence[Row]]) -> list[list[str]]:
    """A table's lines as text, in the order of `columns`.

    Args:
        rows: of one part, by its name; or of all parts, of which accumulators that have them all are shown.
    """
    if len(rows) == 1:
        return [cells(row, part) for part, of_part in rows.items() for row in of_part]
    found = {part: {row.accumulator: row.synthesis for row in of_part} for part, of_part in rows.items()}
    return [
        [label(row.accumulator), str(row.synthesis.bits), row.synthesis.product]
        + [
            text
            for of_part in found.values()
            for s in [of_part[row.accumulator]]
            for text in (f"{s.area:.0f}", f"{s.delay:.1f}", f"{s.energy:.0f}")
        ]
        for row in rows["shared"]
    ]


def cells(row: Row, part: str = "unit") -> list[str]:
    """A row as text, in the order of `columns`."""
    s, is_unit = row.synthesis, part == "unit"
    return [
        *(label(row.accumulator), str(s.bits), s.product, str(s.product_bits)),
        *(f"{s.area:.0f}", _number(row.area_iso)),
        *([f"{row.estimate.area:.0f}"] if is_unit else []),
        *(f"{s.delay:.1f}", f"{s.energy:.0f}"),
        *(_ratio(row.area_to_wide), _ratio(row.area_iso_to_wide)),
        *([_ratio(row.estimate_to_wide)] if is_unit else []),
        *map(_ratio, (row.energy_to_wide, row.area_to_half, row.energy_to_half)),
    ]


def record(study: Study, row: Row, part: str = "unit") -> dict[str, Any]:
    """A row as plain values under names that a spreadsheet can have."""
    s = row.synthesis
    fields = ("area_to_wide", "area_iso_to_wide", "energy_to_wide", "area_to_half", "energy_to_half")
    return {
        "library": s.library,
        "part": part,
        "weight": study.weight,
        "activation": study.activation,
        "accumulator": row.accumulator,
        **{name: getattr(s, name) for name in ("bits", "product", "product_bits", "area")},
        "area_iso": row.area_iso,
        "unit_gates": row.estimate.area,
        **{name: getattr(s, name) for name in ("delay", "delay_unit", "levels", "energy", "energy_unit")},
        **{name: getattr(row, name) for name in fields},
    }


def title(study: Study, library: Library, part: str) -> str:
    """What a table shows."""
    what = (
        "units, and multiply-accumulates with a merging adder of their own and shared" if part == ALL else PARTS[part]
    )
    return ", ".join(filter(None, (f"{study.operands} operands", what, f"library {library.name}")))


def units(library: Library) -> str:
    """What a table's figures are in."""
    return f"area in NAND2 equivalents, delay in {library.delay_unit}, energy in {library.energy_unit}"


def markdown(study: Study, library: Library, rows: Mapping[str, Sequence[Row]]) -> str:
    """A study's table; rows as for `lines`."""
    part = ALL if len(rows) > 1 else next(iter(rows))
    names = columns(part)
    head = [f"**{title(study, library, part)}** ({units(library)})", ""]
    head += ["| " + " | ".join(names) + " |", "|---" * len(names) + "|"]
    return "\n".join([*head, *("| " + " | ".join(line) + " |" for line in lines(rows))])


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.0f}"


def _ratio(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
