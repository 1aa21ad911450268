"""The Verilog to take away: a unit, or the chunked multiply-accumulate around it, with a note of what it computes."""

from __future__ import annotations

from fmaq.hardware import synthesis
from fmaq.hardware.cost import design, mac_design
from fmaq.hardware.unit import Unit
from fmaq.numerics import FixedFormat

PARTS = {"unit": design, "mac": mac_design}
MAC_PORTS = """clk, rst (synchronous); x and w are taken where valid; last comes with the last step of a dot product.
Two cycles later done is set for one cycle, with the dot product in total."""


def verilog(unit: Unit, part: str = "unit") -> str:
    """A unit's Verilog; the top module is `fmaq`.

    Args:
        part: `"unit"`, combinational, or `"mac"`, with registers, chunk counter and second-level accumulator.
    Raises:
        ValueError: there is no such part.
    """
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    body = synthesis.verilog(PARTS[part](unit))
    return "\n".join(f"// {line}".rstrip() for line in _note(unit, part)) + "\n" + body


def _note(unit: Unit, part: str) -> list[str]:
    product = "exact" if unit.product is None else str(unit.product)
    what = "y = FMAq(x, w, s)" if part == "unit" else "a dot product in chunks"
    lines = [
        f"{what}: accumulator {unit.accumulator}",
        f"x: {unit.activation}, w: {unit.weight}, product: {product}, rounding: {unit.rounding}",
        f"accumulator codes have {unit.register_bits} bits: {_layout(unit)}",
    ]
    return lines + (MAC_PORTS.split("\n") if part == "mac" else [])


def _layout(unit: Unit) -> str:
    """What the bits of an accumulator's code are, from the top."""
    format = unit.format
    if isinstance(format, FixedFormat):
        return "two's complement"
    flag = "zero flag, " if unit.register_bits > format.bits else ""
    return f"{flag}sign, {format.exponent} exponent, {format.mantissa} mantissa"
