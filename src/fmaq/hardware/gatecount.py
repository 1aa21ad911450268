"""The analytic gate count: components of the datapath, each by a formula, as one counts gates on paper.

All counts are in NAND2 equivalents of static CMOS, a quarter of the transistors (`cells`). The bricks:

| brick | gates | source |
|---|---|---|
| full adder | 7 | the mirror adder's 28 transistors (Weste and Harris, "CMOS VLSI Design", 4th ed., 11.2.1) |
| half adder | 4 | XOR and AND |
| carry cell of a comparator | 3 | the carry half of the mirror adder, 12 transistors |
| multiplexer, XOR | 2.5 | 10 transistors |
| AND, OR | 1.5 | 6 transistors |

Depths are in FO4 inverter delays, of the same logical-effort model as the cell library, along the one path that is
taken to be critical: multiply, normalise, compare, align, add, normalise, saturate. What the count leaves out is what
synthesis finds: sharing, constants, and cells that do two things at once; and what it adds: buffers.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil, log2
from typing import Any

from fmaq.hardware.operands import FloatOperand, IntegerOperand, Operand
from fmaq.hardware.unit import IeeeFormat, Unit
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat

FULL_ADDER, HALF_ADDER, CARRY, MUX, XOR, AND = 7.0, 4.0, 3.0, 2.5, 2.5, 1.5
FO4_MUX, FO4_FULL_ADDER, FO4_GATE = 1.6, 3.0, 1.0
"""Depths: a multiplexer or XOR that drives two of itself, a full adder's sum, a two-input gate."""
ACTIVITY = 0.35
"""Energy of a gate and step, in an inverter input's C·V²: measured on synthesized units (docs/hardware.md)."""


@dataclass(frozen=True)
class Component:
    """A part of the datapath.

    Attributes:
        name: as in the table of docs/hardware.md.
        formula: how its gates are counted, with the widths filled in.
        gates: NAND2 equivalents.
        depth: on the critical path, in FO4 delays; 0 off it.
    """

    name: str
    formula: str
    gates: float
    depth: float


@dataclass(frozen=True)
class Estimate:
    """An analytic estimate, instant.

    Attributes:
        unit: operands and accumulator, as text.
        bits, product, product_bits: of the accumulator's code and of the products, as in `Synthesis`.
        library: `"gate count"`.
        area: NAND2 equivalents.
        delay: FO4 inverter delays along the critical path.
        energy: of one FMAq, as area times a constant activity: it says no more than the area does.
        cells: gates by component.
        components: the same with formulas and depths.
    """

    unit: str
    bits: int
    product: str
    product_bits: int
    library: str
    area: float
    delay: float
    energy: float
    cells: dict[str, float]
    components: tuple[Component, ...]
    delay_unit: str = "FO4"
    energy_unit: str = "C_inv V^2"


def estimate(
    accumulator: Accumulator | IeeeFormat | str | Mapping[str, Any],
    weight: Operand | str = "M4E3",
    activation: Operand | str = "M4E3",
) -> Estimate:
    """Count the gates of the FMAq unit of an accumulator.

    Args:
        accumulator: anything `Accumulator.parse` takes, or the baselines `"ieee32"` and `"ieee16"`.
        weight, activation: operand formats, `"M4E3"`, `"M4E3b5"` or `"int8"`.
    """
    unit = Unit.of(accumulator, weight, activation)
    parts = tuple(_components(unit))
    area = sum(part.gates for part in parts)
    cells = {part.name: part.gates for part in parts}
    return Estimate(
        unit=str(unit),
        bits=unit.format.bits,
        product="exact" if unit.product is None else str(unit.product),
        product_bits=unit.product_bits,
        library="gate count",
        area=area,
        delay=sum(part.depth for part in parts),
        energy=area * ACTIVITY,
        cells=cells,
        components=parts,
    )


def _components(unit: Unit) -> list[Component]:
    parts = _multiplier(unit)
    width = unit.significand_bits
    both_integers = isinstance(unit.weight, IntegerOperand) and isinstance(unit.activation, IntegerOperand)
    if both_integers and not isinstance(unit.format, FixedFormat):
        parts.append(_adder("sign of the product", width, per_bit=XOR + HALF_ADDER))
    if isinstance(unit.format, FixedFormat):
        return parts + _quantized_product(unit, width, normalise=isinstance(unit.product, FloatFormat)) + _fixed(unit)
    return parts + _quantized_product(unit, width, normalise=True) + _float(unit)


def _multiplier(unit: Unit) -> list[Component]:
    """An array multiplier: n·m ANDs and (m − 1)·n full adders (Weste and Harris, 11.9.1)."""
    n, m = (o.mantissa + 1 if isinstance(o, FloatOperand) else o.width for o in (unit.activation, unit.weight))
    exponents = [o.exponent for o in (unit.activation, unit.weight) if isinstance(o, FloatOperand)]
    gates = n * m * AND + (min(n, m) - 1) * max(n, m) * FULL_ADDER
    tree = ceil(log2(max(min(n, m), 2))) + 1
    parts = [Component("multiplier", f"{n}*{m} AND + {min(n, m) - 1}*{max(n, m)} FA", gates, tree * FO4_FULL_ADDER)]
    if exponents:
        decode = sum((e - 1) * AND for e in exponents)
        parts.append(Component("operand decoding", f"{sum(exponents) - len(exponents)} OR", decode, 0))
    if len(exponents) == 2:
        wide = max(exponents)
        parts.append(Component("exponent adder", f"{wide} FA", wide * FULL_ADDER, 0))
    return parts


def _quantized_product(unit: Unit, width: int, normalise: bool) -> list[Component]:
    """Normalisation of the product (its operands have subnormals), and Q_prod."""
    parts = [_zeros("product's leading zeros", width), _shifter("product's normalisation", width)] if normalise else []
    how = unit.product_rounding, unit.inputs.get("r_product", 0)
    if isinstance(unit.product, FloatFormat):
        parts += _rounding("product's rounding", *how, unit.product, width)
        parts.append(_range("product's saturation", unit.product))
    elif isinstance(unit.product, FixedFormat):
        parts += [
            _shifter("product's alignment", unit.product.width),
            # One carry: −(m + 1) is ~m.
            _adder("product's rounding and two's complement", unit.product.width, per_bit=XOR + HALF_ADDER),
            _saturation("product's saturation", unit.product),
        ]
    return parts


def _float(unit: Unit) -> list[Component]:
    format = unit.format
    assert not isinstance(format, FixedFormat)
    kept = format.mantissa + 1
    product = unit.product.significant + 1 if isinstance(unit.product, FloatFormat) else unit.significand_bits
    half = isinstance(format, FloatFormat) and format.half_unit
    n, e = max(kept + half, product), format.exponent + 1
    extra = unit.inputs.get("r_sum", unit.rounding.startswith(("nearest", "half")))
    guard = max(1, kept + 1 + extra - n)
    wide = n + guard + 2
    prefix = ceil(log2(wide)) * FO4_GATE * 2
    parts = [
        Component("magnitude comparator", f"{n + e} carry cells", (n + e) * CARRY, ceil(log2(n + e)) * 2 * FO4_GATE),
        Component("exponent difference", f"{e} FA", e * FULL_ADDER, ceil(log2(e)) * 2 * FO4_GATE),
        Component("swap", f"{2 * n + 2 * e + 1} MUX", (2 * n + 2 * e + 1) * MUX, FO4_MUX),
        _shifter("alignment shifter", n + guard, sticky=True),
        Component("adder", f"{wide} (FA + XOR)", wide * (FULL_ADDER + XOR), prefix + FO4_MUX),
        _zeros("leading-zero detector", wide),
        _shifter("normalisation shifter", wide),
        Component("exponent adjustment", f"{e} FA", e * FULL_ADDER, 0),
        *_rounding("rounding", unit.rounding, unit.inputs.get("r_sum", 0), format, wide),
    ]
    if isinstance(format, IeeeFormat):
        clamp = f"{e} (carry + FA + MUX)"
        parts.append(
            Component("gradual underflow", clamp, e * (CARRY + FULL_ADDER + MUX), ceil(log2(e)) * 2 * FO4_GATE)
        )
    return [*parts, _range("saturation and underflow", format)]


def _fixed(unit: Unit) -> list[Component]:
    format = unit.format
    assert isinstance(format, FixedFormat)
    low, top = unit.product_range
    aligned = max(1, min(top + format.fraction + 1, format.width + unit.significand_bits))
    parts = []
    if any(isinstance(o, FloatOperand) for o in (unit.weight, unit.activation)) and unit.product is None:
        window = max(aligned, unit.significand_bits)
        steps = ceil(log2(max(top - low - unit.significand_bits + 2, 2)))
        gates = window * steps * MUX
        parts.append(Component("alignment shifter", f"{window}*{steps} MUX", gates, steps * FO4_MUX))
        parts.append(Component("two's complement", f"{window} XOR", window * XOR, FO4_MUX))
    wide = max(format.width, aligned) + 1
    prefix = ceil(log2(wide)) * 2 * FO4_GATE + FO4_MUX
    parts.append(Component("adder", f"{wide} FA", wide * FULL_ADDER, prefix))
    step = -unit.product.fraction if isinstance(unit.product, FixedFormat) else low - unit.significand_bits
    if -format.fraction > step and unit.rounding == "toward_zero":
        parts.append(_adder("rounding toward zero", wide))
    elif -format.fraction > step and unit.rounding != "floor":
        parts += _rounding("rounding", unit.rounding, unit.inputs.get("r_sum", 0), format, wide)
    return [*parts, _saturation("saturation", format)]


def _adder(name: str, width: int, per_bit: float = HALF_ADDER) -> Component:
    return Component(name, f"{width} x {per_bit:g}", width * per_bit, ceil(log2(width)) * FO4_GATE)


def _zeros(name: str, width: int) -> Component:
    """By halves: a node over 2^i bits is an OR, an inverter and i − 1 multiplexers (Oklobdzija 1994)."""
    levels = ceil(log2(max(width, 2)))
    gates = sum(ceil(width / 2**i) * (AND + 0.5 + (i - 1) * MUX) for i in range(1, levels + 1))
    return Component(name, f"{levels} levels over {width} bits", gates, levels * FO4_MUX)


def _shifter(name: str, width: int, sticky: bool = False) -> Component:
    """A multiplexer for each bit and each binary digit of the distance; the sticky bit adds an OR for each bit."""
    digits = ceil(log2(max(width, 2)))
    gates = width * digits * MUX + (width * AND if sticky else 0)
    return Component(name, f"{width}*{digits} MUX" + (f" + {width} OR" if sticky else ""), gates, digits * FO4_MUX)


def _rounding(
    name: str, rounding: str, random_bits: int, format: FloatFormat | FixedFormat | IeeeFormat, width: int
) -> list[Component]:
    """An incrementer over the code, and the decision: ORs of what is dropped, or an adder of random bits.

    Truncation needs neither, and a half-unit format truncates; rounding to odd needs the ORs alone, and ties away from
    zero the incrementer alone.
    """
    if rounding == "toward_zero":
        return []
    incrementer = 0 if rounding == "odd" else format.bits
    ors = 0 if rounding == "nearest_away" or random_bits else width
    gates = incrementer * HALF_ADDER + ors * AND + random_bits * FULL_ADDER
    counts = {"HA": incrementer, "OR": ors, "FA": random_bits}
    formula = " + ".join(f"{count} {brick}" for brick, count in counts.items() if count)
    depth = ceil(log2(format.bits)) * FO4_GATE * (1 if rounding == "odd" else 2)
    return [Component(name, formula, gates, depth)]


def _range(name: str, format: FloatFormat | IeeeFormat) -> Component:
    """A bias adder for the exponent, an OR for each bit to saturate, and an AND for each to clear."""
    e, bits = format.exponent + 1, format.bits
    return Component(name, f"{e} HA + {bits} (AND + OR)", e * HALF_ADDER + bits * 2 * AND, 2 * FO4_GATE)


def _saturation(name: str, format: FixedFormat) -> Component:
    if format.overflow == "wrap":
        return Component(name, "none: it wraps", 0.0, 0.0)
    return Component(name, f"{format.width} MUX", format.width * MUX, FO4_MUX)
