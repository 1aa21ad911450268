"""The Verilog to take away: a unit, or the chunked multiply-accumulate around it, with a note of what it computes."""

from __future__ import annotations

import re

from fmaq.hardware import synthesis
from fmaq.hardware.cost import DESIGNS, check_part, sharing
from fmaq.hardware.unit import RegisterFormat, Unit, register_bits
from fmaq.numerics import FixedFormat

PORTS = {
    "unit": "",
    "mac": """clk, rst (synchronous); x and w are taken where valid; last comes with the last step of a dot product.
Two cycles later done is set for one cycle, with the dot product in total.""",
    "shared": """clk, rst (synchronous); x_0 and w_0 are taken where valid; last comes with a dot product's last step.
Lane i takes x_i and w_i i cycles later. A dot product has whole chunks: fill it up with zeros.
Two cycles behind the last step of lane i, done_i is set for one cycle, with its dot product in total_i.""",
}
NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
KEYWORDS = """
always and assign automatic begin buf case cell config deassign default defparam design disable edge else end
endcase endmodule event for force forever fork function generate genvar if initial inout input instance integer
join library logic localparam macromodule module nand negedge nor not or output parameter posedge primitive real
reg release repeat signed specify supply0 supply1 table task time tri unsigned use wait wand while wire wor xnor
xor
"""


def verilog(unit: Unit, part: str = "unit", name: str = synthesis.TOP) -> str:
    """A unit's Verilog.

    Args:
        part: `"unit"`, combinational; `"mac"`, with registers, chunk counter and second-level accumulator; or
            `"shared"`, as many of these as a chunk has steps, with one second-level adder.
        name: of the top module; those inside it have names that start with it, so that two designs of different names
            can be simulated together.
    Raises:
        ValueError: there is no such part, or the name is none in Verilog.
    """
    body = synthesis.verilog(_flat_names(DESIGNS[check_part(part)](unit, check_name(name)), name))
    return "\n".join(f"// {line}".rstrip() for line in note(unit, part)) + "\n" + body


def check_name(name: str) -> str:
    """The name, if Verilog takes it for a module; ValueError otherwise."""
    if NAME.fullmatch(name) is None or name in KEYWORDS.split():
        raise ValueError(f"{name!r} is no name of a Verilog module: it needs letters, digits and _, and no keyword")
    return name


def _flat_names(rtlil: str, name: str) -> str:
    """Modules inside the top one as `name_lane_fmaq`, which needs no escape in Verilog, not `name.lane.fmaq`."""
    inside = rf"^(?:module|  cell) \\{name}\S*\.\S+"
    return re.sub(inside, lambda match: match[0].replace(".", "_"), rtlil, flags=re.MULTILINE)


def note(unit: Unit, part: str) -> list[str]:
    """What a part computes, and what its codes are."""
    product = "exact" if unit.product is None else str(unit.product)
    what = {"unit": "y = FMAq(x, w, s)", "mac": "a dot product in chunks"}.get(part, "")
    what = what or f"dot products in chunks, by {sharing(unit)} lanes that share the adder of their chunks' sums"
    lines = [
        f"{what}: accumulator {unit.accumulator}",
        f"x: {unit.activation}, w: {unit.weight}, product: {product}, rounding: {_roundings(unit)}",
        f"accumulator codes have {unit.register_bits} bits: {_layout(unit.format)}",
    ]
    if part == "unit":
        return lines
    if unit.total != unit.format:
        lines.append(f"codes of the total, {unit.total}, have {register_bits(unit.total)} bits: {_layout(unit.total)}")
    return [*lines, *PORTS[part].split("\n")]


def _roundings(unit: Unit) -> str:
    """Of sums and, where it differs, of products."""
    differs = unit.product is not None and unit.product_rounding != unit.rounding
    return f"{unit.rounding}, of products {unit.product_rounding}" if differs else unit.rounding


def _layout(format: RegisterFormat) -> str:
    """What the bits of a register's code are, from the top."""
    if isinstance(format, FixedFormat):
        return "two's complement"
    flag = "zero flag, " if register_bits(format) > format.bits else ""
    half = ", and an implied half of the last place" if getattr(format, "half_unit", False) else ""
    return f"{flag}sign, {format.exponent} exponent, {format.mantissa} mantissa{half}"
