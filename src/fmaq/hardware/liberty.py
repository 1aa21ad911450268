"""A cell library in Liberty format: the cells that logic can be made of, their areas, pins, capacitances, functions.

Delays are left to the mapper, which is given the same cells in plain text: what cannot be read here is not there for
it either. Cells that are no logic are left out in silence: latches and state tables, three-state and pad cells, and
those with `dont_use`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

from fmaq.hardware import cells
from fmaq.hardware.functions import FunctionError, compile_function, pins_of
from fmaq.hardware.liberty_text import Attribute, Group, LibertySyntaxError, read, write

DEBIAN = Path("/usr/share/qflow/tech")
"""Where Debian's qflow-tech-osu018 and -osu035 put their libraries."""
DEBIAN_NAMES = {"osu018": "osu018/osu018_stdcells.lib", "osu035": "osu035/osu035_stdcells.lib"}

FEMTOFARADS = {"ff": 1.0, "pf": 1e3, "nf": 1e6}
VOLTS = {"1v": 1.0, "100mv": 0.1, "10mv": 0.01, "1mv": 0.001}
STATE = ("ff", "latch", "ff_bank", "latch_bank", "statetable")


class LibertyError(ValueError):
    """A cell library that cannot be used; the message says which file and why."""


class _CellError(ValueError):
    """A cell that cannot be read; the message says why, without the cell's name."""


@dataclass(frozen=True)
class Register:
    """What a flip-flop keeps.

    Attributes:
        state, inverse: the names by which outputs' functions mean it and its inverse.
        next_state: the function that it takes over at a clock edge.
        clocked_on: the function whose rising edge that is.
    """

    state: str
    inverse: str
    next_state: str
    clocked_on: str


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        area: in the library's unit.
        inputs: input pins and their capacitance, in femtofarads.
        outputs: output pins and their Boolean function as Liberty writes it.
        register: of a flip-flop; None of a gate.
    """

    name: str
    area: float
    inputs: dict[str, float]
    outputs: dict[str, str]
    register: Register | None = None

    @property
    def is_sequential(self) -> bool:
        """A flip-flop."""
        return self.register is not None


@dataclass(frozen=True)
class Library:
    """A cell library.

    Attributes:
        name: as its text has it.
        text: the Liberty text of these cells, for the mapper.
        cells: by name, gates and flip-flops.
        voltage: nominal supply, in volts.
        nand2: area of the smallest two-input NAND.
        unread: cells that cannot be read, and why.
    """

    name: str
    text: str
    cells: dict[str, Cell]
    voltage: float
    nand2: float
    unread: dict[str, str]

    @property
    def is_unit(self) -> bool:
        """Our own library, whose delays are in τ and capacitances in inverter inputs."""
        return self.name == cells.NAME

    @property
    def delay_unit(self) -> str:
        """Of `Synthesis.delay`: FO4 inverter delays for our own library, else nanoseconds."""
        return "FO4" if self.is_unit else "ns"

    @property
    def energy_unit(self) -> str:
        """Of energies: charged inverter inputs (C·V²/2 of one is 1/2) for our own library, else femtojoules."""
        return "C_inv V^2" if self.is_unit else "fJ"

    def delay(self, picoseconds: float) -> float:
        """A mapper's delay in `delay_unit`."""
        return picoseconds / cells.FO4 if self.is_unit else picoseconds / 1000


def find_library(name: str | Path | None = None) -> Library:
    """The library of a name or a file.

    Args:
        name: None or `"unit"` is our own; `"osu018"` and `"osu035"` are Debian's, if installed; else a Liberty file.
    Raises:
        LibertyError: there is no such library, or it cannot be used.
    """
    if name is None or str(name) == cells.NAME:
        return _parsed(cells.liberty(), "fmaq's own cells")
    path = DEBIAN / DEBIAN_NAMES[str(name)] if str(name) in DEBIAN_NAMES else Path(name)
    if not path.is_file():
        if str(name) in DEBIAN_NAMES:
            raise LibertyError(f"library {name} is not installed; on Debian: apt-get install qflow-tech-{name}")
        raise LibertyError(
            f"there is no Liberty file {path}; give a file, or one of: {', '.join([cells.NAME, *DEBIAN_NAMES])}"
        )
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise LibertyError(f"Liberty file {path} cannot be read: {error.strerror}") from None
    return _parsed(text, str(path))


def installed_libraries() -> list[str]:
    """Our own library, then those of Debian's that are installed."""
    return [cells.NAME, *(name for name, file in DEBIAN_NAMES.items() if (DEBIAN / file).is_file())]


@lru_cache(maxsize=8)
def _parsed(text: str, where: str) -> Library:
    try:
        root = read(text)
    except LibertySyntaxError as error:
        raise LibertyError(f"{where} is not a whole Liberty file: {error}") from None
    if root.kind != "library":
        raise LibertyError(f"{where} is not a Liberty file: it starts with {root.kind[:40]!r}, not library(...)")
    try:
        unit, voltage = _capacitance_unit(root), _voltage(root)
    except _CellError as error:
        raise LibertyError(f"{where}: {error}") from None
    found, plain, unread = {}, [], {}
    for group in root.find("cell"):
        try:
            flat = _flat(group, root)
            cell = _cell(flat, unit)
        except (_CellError, FunctionError) as error:
            unread[_cell_name(group)] = str(error)
            continue
        if cell is not None:
            found[cell.name] = cell
            plain.append(flat)
    name = root.names[0] if root.names else Path(where).stem
    text = write(replace(root, statements=(*_header(root, unit), *plain)))
    smallest = _smallest_nand(found, unread, where)
    return Library(name.removesuffix("_stdcells"), text, found, voltage, smallest, unread)


NEEDED: tuple[tuple[str, int, Callable[..., int]], ...] = (
    ("two-input NAND, which areas are counted in", 2, lambda a, b: 1 - (a & b)),
    ("inverter", 1, lambda a: 1 - a),
    ("buffer", 1, lambda a: a),
)
"""Without these ABC maps nothing."""


def _smallest_nand(found: dict[str, Cell], unread: dict[str, str], where: str) -> float:
    """The area that areas are counted in.

    Raises:
        LibertyError: a gate that mapping needs is not there.
    """
    kinds = {what: [c for c in found.values() if _computes(c, function, pins)] for what, pins, function in NEEDED}
    for what, of_kind in kinds.items():
        if not of_kind:
            reasons = "; ".join(f"{name}: {why}" for name, why in list(unread.items())[:5])
            raise LibertyError(
                f"{where} has no {what}" + (f" (cells that cannot be read: {reasons})" if unread else "")
            )
    return min(cell.area for cell in kinds[NEEDED[0][0]])


# --- Units ------------------------------------------------------------------------------------------------------------


def _number(text: str | None, what: str) -> float:
    try:
        return float(text or "0")
    except ValueError:
        raise _CellError(f"{what} is {text!r}, not a number") from None


def _capacitance_unit(root: Group) -> float:
    """Femtofarads in a unit of capacitance, `(1,pf)`, in quotes or not; a picofarad where none is given."""
    text = root.get("capacitive_load_unit") or "1 pf"
    match = re.fullmatch(r"([\d.]+(?:e[+-]?\d+)?)[\s,]*([a-z]+)", text.strip().lower())
    if match is None or match[2] not in FEMTOFARADS:
        raise _CellError(f"capacitive_load_unit is {text!r}; it should be like (1,pf) or (1,ff)")
    return float(match[1]) * FEMTOFARADS[match[2]]


def _voltage(root: Group) -> float:
    """The nominal supply, or that of the first operating conditions, in volts; 1 V where neither is given."""
    conditions = [group.get("voltage") for group in root.find("operating_conditions")]
    text = root.get("nom_voltage") or next((voltage for voltage in conditions if voltage), "1")
    unit = (root.get("voltage_unit") or "1V").replace(" ", "").lower()
    if unit not in VOLTS:
        raise _CellError(f"voltage_unit is {unit!r}; it should be one of 1V, 100mV, 10mV, 1mV")
    return _number(text, "nom_voltage") * VOLTS[unit]


def _header(root: Group, unit: float) -> Iterator[Attribute | Group]:
    """Everything of a library but its cells, with the unit of capacitance as every reader takes it."""
    for statement in root.statements:
        is_unit = isinstance(statement, Attribute) and statement.name == "capacitive_load_unit"
        if not is_unit and not (isinstance(statement, Group) and statement.kind == "cell"):
            yield statement
    scale, name = (unit / 1e3, "pf") if unit >= 1e3 else (unit, "ff")
    yield Attribute("capacitive_load_unit", (f"{scale:g}", name), is_complex=True)


# --- Cells ------------------------------------------------------------------------------------------------------------


def _cell_name(group: Group) -> str:
    return group.names[0] if group.names else "?"


def _flat(cell: Group, root: Group) -> Group:
    """The cell with one group for each pin: those in a bus, in a bundle, and several in one group, apart."""
    statements: list[Attribute | Group] = []
    for statement in cell.statements:
        if isinstance(statement, Group) and statement.kind in ("pin", "bus", "bundle"):
            statements += _pins(statement, (*cell.find("type"), *root.find("type")))
        else:
            statements.append(statement)
    return replace(cell, statements=tuple(statements))


def _pins(group: Group, types: tuple[Group, ...]) -> Iterator[Group]:
    """The pins of a pin, bus or bundle group; what a bus says holds for those pins that do not say it themselves."""
    if group.kind == "pin":
        for name in group.names:
            yield from (Group("pin", (bit,), group.statements) for bit in _bits(name))
        return
    shared = [s for s in group.statements if _name_of(s) not in ("pin", "bus_type", "members")]
    inner = [pin for pin in group.find("pin") for pin in _pins(pin, types)]
    for pin in inner:
        own = {_name_of(s) for s in pin.statements}
        yield replace(pin, statements=(*(s for s in shared if _name_of(s) not in own), *pin.statements))
    there = {pin.names[0] for pin in inner}
    yield from (Group("pin", (name,), tuple(shared)) for name in _members(group, types) if name not in there)


def _name_of(statement: Attribute | Group) -> str:
    return statement.name if isinstance(statement, Attribute) else statement.kind


def _bits(name: str) -> list[str]:
    """`A[3:0]` as its bits."""
    match = re.fullmatch(r"(.+)\[(\d+):(\d+)\]", name)
    if match is None:
        return [name]
    first, last = int(match[2]), int(match[3])
    return [f"{match[1]}[{index}]" for index in range(min(first, last), max(first, last) + 1)]


def _members(group: Group, types: tuple[Group, ...]) -> list[str]:
    """The pins that a bundle lists, or that a bus has by its type."""
    if group.kind == "bundle":
        return (group.get("members") or "").replace(",", " ").split()
    kind = next((t for t in types if t.names[:1] == [group.get("bus_type")]), None)
    if kind is None:
        return []
    ends = f"{kind.get('bit_from') or 0}:{kind.get('bit_to') or 0}"
    return [bit for name in group.names for bit in _bits(f"{name}[{ends}]")]


def _cell(group: Group, unit: float) -> Cell | None:
    """A gate or flip-flop; None for what is neither.

    Raises:
        _CellError, FunctionError: it cannot be read.
    """
    name = _cell_name(group)
    pins = group.find("pin")
    register = _register(group)
    if _is_no_logic(group, pins) or (group.find(*STATE) and register is None):
        return None
    inputs, outputs = {}, {}
    for pin in pins:
        if pin.get("direction") == "input":
            inputs[pin.names[0]] = _number(pin.get("capacitance"), f"capacitance in {name}") * unit
        elif (function := pin.get("function")) is not None:
            outputs[pin.names[0]] = function
    if not outputs:
        return None
    known = {*inputs, *((register.state, register.inverse) if register else ())}
    for function in (*outputs.values(), *((register.next_state, register.clocked_on) if register else ())):
        unknown = sorted(pins_of(function) - known)
        if unknown:
            raise _CellError(f"function {function!r} is of {', '.join(unknown)}, which is no input")
    if inputs and register is None and not any(_has_delays(pin) for pin in pins):
        raise _CellError("it has no delay tables (cell_rise, cell_fall)")
    return Cell(name, _number(group.get("area"), f"area of {name}"), inputs, outputs, register)


def _register(group: Group) -> Register | None:
    """What a flip-flop keeps; None for gates and for what keeps its state otherwise."""
    for ff in group.find("ff"):
        clock, data = ff.get("clocked_on"), ff.get("next_state")
        if clock is not None and data is not None and len(ff.names) >= 1:
            return Register(ff.names[0], ff.names[1] if len(ff.names) > 1 else "", data, clock)
    return None


def _has_delays(pin: Group) -> bool:
    return any(timing.find("cell_rise", "cell_fall") for timing in pin.find("timing"))


def _is_no_logic(group: Group, pins: list[Group]) -> bool:
    """Cells that are not to be used, pads, and what can let go of its output or has an output inside."""
    if "true" in (group.get("dont_use"), group.get("pad_cell")):
        return True
    inner = ("three_state", "internal_node", "is_pad")
    return any(pin.get("direction") in ("internal", "inout") for pin in pins) or any(
        pin.get(name) not in (None, "false") for pin in pins for name in inner
    )


def _computes(cell: Cell, function: Callable[..., int], count: int) -> bool:
    """Whether a cell has one output, this function of its so many inputs."""
    if len(cell.inputs) != count or len(cell.outputs) != 1 or cell.is_sequential or cell.area <= 0:
        return False
    evaluate = compile_function(next(iter(cell.outputs.values())))
    tries = (tuple(index >> place & 1 for place in range(count)) for index in range(1 << count))
    return all(evaluate(dict(zip(cell.inputs, bits, strict=True))) & 1 == function(*bits) for bits in tries)
