"""A small cell library of our own, so that synthesis needs nothing installed: static CMOS by counting transistors.

Area: a quarter of the cell's transistors, so that NAND2 (four) counts 1. A cell of drive d counts d times.
Delay: logical effort (Sutherland, Sproull and Harris, "Logical Effort", 1999, chapters 1 and 4): p + g·h in units of τ,
an inverter's delay per unit of electrical effort. The input of effort g loads its driver with g·d inverter inputs, and
the output has a resistance of 1/d: so delay = p + load/d. A compound cell (AND = NAND and inverter) is the sum of its
stages. An inverter that drives four of itself takes FO4 = 5 τ.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

NAME = "unit"
FO4 = 5.0
"""Delay in τ of an inverter that drives four of itself: p + 4 = 5."""


@dataclass(frozen=True)
class _Cell:
    name: str
    function: str
    transistors: int
    effort: dict[str, float]
    parasitic: float
    drives: tuple[int, ...] = (1, 2)


def _same(pins: str, effort: float) -> dict[str, float]:
    return dict.fromkeys(pins, effort)


CELLS = (
    _Cell("INV", "!A", 2, _same("A", 1), 1, (1, 2, 4, 8)),
    _Cell("BUF", "A", 4, _same("A", 1), 3, (2, 4)),
    _Cell("NAND2", "!(A*B)", 4, _same("AB", 4 / 3), 2),
    _Cell("NAND3", "!(A*B*C)", 6, _same("ABC", 5 / 3), 3),
    _Cell("NAND4", "!(A*B*C*D)", 8, _same("ABCD", 2), 4, (1,)),
    _Cell("NOR2", "!(A+B)", 4, _same("AB", 5 / 3), 2),
    _Cell("NOR3", "!(A+B+C)", 6, _same("ABC", 7 / 3), 3, (1,)),
    _Cell("AND2", "A*B", 6, _same("AB", 4 / 3), 4),
    _Cell("OR2", "A+B", 6, _same("AB", 5 / 3), 4),
    _Cell("AOI21", "!(A*B+C)", 6, {"A": 2, "B": 2, "C": 5 / 3}, 7 / 3),
    _Cell("OAI21", "!((A+B)*C)", 6, {"A": 2, "B": 2, "C": 4 / 3}, 8 / 3),
    _Cell("AOI22", "!(A*B+C*D)", 8, _same("ABCD", 2), 4, (1,)),
    _Cell("OAI22", "!((A+B)*(C+D))", 8, _same("ABCD", 2), 4, (1,)),
    _Cell("XOR2", "A^B", 10, _same("AB", 4), 4),
    _Cell("XNOR2", "!(A^B)", 10, _same("AB", 4), 4),
    _Cell("MUXI2", "!(S*B+!S*A)", 10, {"A": 2, "B": 2, "S": 4}, 4),
)
FLIP_FLOP_TRANSISTORS = 24
LOADS = (0, 4, 16, 64)
SLEWS = (0, 10, 100, 1000)
"""Points of the delay tables, which are straight lines and do not depend on the slew; ABC wants more than two."""


def liberty() -> str:
    """The library as Liberty text: 1 ps is τ, 1 fF is an inverter's input."""
    return "\n".join([_header(), *(_cell(cell, drive) for cell in CELLS for drive in cell.drives), _flip_flop(), "}"])


def _header() -> str:
    return f"""library({NAME}) {{
  delay_model : table_lookup;
  time_unit : "1ps";
  voltage_unit : "1V";
  current_unit : "1mA";
  leakage_power_unit : "1nW";
  pulling_resistance_unit : "1kohm";
  capacitive_load_unit (1,ff);
  nom_process : 1;
  nom_voltage : 1;
  nom_temperature : 25;
  lu_table_template(linear) {{
    variable_1 : total_output_net_capacitance;
    variable_2 : input_net_transition;
    index_1 ("{_numbers(LOADS)}");
    index_2 ("{_numbers(SLEWS)}");
  }}"""


def _numbers(values: Iterable[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def _table(kind: str, at_no_load: float, drive: int) -> str:
    rows = (f'"{_numbers([at_no_load + load / drive] * len(SLEWS))}"' for load in LOADS)
    return f"      {kind}(linear) {{ values ({', '.join(rows)}); }}"


def _timing(pin: str, parasitic: float, drive: int, extra: str = "") -> str:
    rows = [_table(kind, parasitic, drive) for kind in ("cell_rise", "cell_fall")]
    rows += [_table(kind, 1, drive) for kind in ("rise_transition", "fall_transition")]
    return "\n".join([f'    timing() {{ related_pin : "{pin}"; {extra}', *rows, "    }"])


def _cell(cell: _Cell, drive: int) -> str:
    lines = [f"  cell({cell.name}X{drive}) {{", f"    area : {cell.transistors * drive / 4:g};"]
    lines += [
        f"    pin({pin}) {{ direction : input; capacitance : {effort * drive:.4f}; }}"
        for pin, effort in cell.effort.items()
    ]
    lines.append(f'    pin(Y) {{ direction : output; function : "{cell.function}"; max_capacitance : {LOADS[-1]};')
    lines += [_timing(pin, cell.parasitic, drive) for pin in cell.effort]
    return "\n".join([*lines, "    }", "  }"])


def _flip_flop() -> str:
    return f"""  cell(DFFX1) {{
    area : {FLIP_FLOP_TRANSISTORS / 4:g};
    ff(IQ, IQN) {{ clocked_on : "CK"; next_state : "D"; }}
    pin(D) {{ direction : input; capacitance : 1; }}
    pin(CK) {{ direction : input; capacitance : 2; clock : true; }}
    pin(Q) {{ direction : output; function : "IQ"; max_capacitance : {LOADS[-1]};
{_timing("CK", 4, 1, "timing_type : rising_edge;")}
    }}
  }}"""
