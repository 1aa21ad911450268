"""Reading a cell library in Liberty format: areas, pins, capacitances and functions. Delays are left to the mapper."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from fmaq.hardware import cells

DEBIAN = Path("/usr/share/qflow/tech")
"""Where Debian's qflow-tech-osu018 and -osu035 put their libraries."""
DEBIAN_NAMES = {"osu018": "osu018/osu018_stdcells.lib", "osu035": "osu035/osu035_stdcells.lib"}

TOKEN = re.compile(r'"(?:\\.|[^"\\])*"|[{}();:,]|[^\s{}();:,"]+')
FARADS = {"ff": 1e-15, "pf": 1e-12}
SECONDS = {"ps": 1e-12, "ns": 1e-9, "us": 1e-6}


class LibertyError(ValueError):
    """A cell library that cannot be used; the message says which file and why."""


@dataclass(frozen=True)
class Cell:
    """One cell.

    Attributes:
        area: in the library's unit.
        inputs: input pins and their capacitance, in femtofarads.
        outputs: output pins and their Boolean function as Liberty writes it.
        is_sequential: a flip-flop or latch.
    """

    name: str
    area: float
    inputs: dict[str, float]
    outputs: dict[str, str]
    is_sequential: bool


@dataclass(frozen=True)
class Library:
    """A cell library.

    Attributes:
        name: as its text has it.
        text: the Liberty text.
        cells: by name.
        voltage: nominal supply, in volts.
        nand2: area of the smallest two-input NAND.
    """

    name: str
    text: str
    cells: dict[str, Cell]
    voltage: float
    nand2: float

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


@dataclass
class _Group:
    kind: str
    arguments: list[str]
    attributes: dict[str, str]
    groups: list[_Group]

    def find(self, *kinds: str) -> list[_Group]:
        return [group for group in self.groups if group.kind in kinds]


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
    bare = re.sub(r"/\*.*?\*/|//[^\n]*|\\\n", " ", text, flags=re.DOTALL)
    try:
        root = _root(bare)
    except IndexError:
        raise LibertyError(f"{where} is not a whole Liberty file: a group is malformed or does not end") from None
    if root.kind != "library":
        raise LibertyError(f"{where} is not a Liberty file: it starts with {root.kind[:40]!r}, not library(...)")
    unit = _capacitance_unit(root)
    found = {cell.name: cell for cell in (_cell(group, unit, where) for group in root.find("cell"))}
    nands = [cell.area for cell in found.values() if _is_nand2(cell)]
    if not nands:
        raise LibertyError(f"{where} has no two-input NAND, which areas are counted in")
    name = root.arguments[0] if root.arguments else Path(where).stem
    voltage = _number(root.attributes.get("nom_voltage", "1"), "nom_voltage", where)
    return Library(name.removesuffix("_stdcells"), text, found, voltage, min(nands))


class _Tokens:
    """The words of a file, one at a time, with a look at the next."""

    def __init__(self, text: str) -> None:
        self.words, self.position = TOKEN.findall(text), 0

    def peek(self) -> str:
        return self.words[self.position]

    def take(self, expected: str | None = None) -> str:
        word = self.peek()
        if expected is not None and word != expected:
            raise IndexError
        self.position += 1
        return word

    def until(self, end: str) -> list[str]:
        """Words up to a mark, which is taken too, without quotes and commas."""
        found = []
        while (word := self.take()) != end:
            if word != ",":
                found.append(word.strip('"'))
        return found


def _group(kind: str, arguments: list[str], tokens: _Tokens) -> _Group:
    """The group whose opening brace comes next."""
    tokens.take("{")
    group = _Group(kind, arguments, {}, [])
    while tokens.peek() != "}":
        word = tokens.take()
        if word == ";":
            continue
        if tokens.peek() == ":":
            tokens.take()
            group.attributes[word] = " ".join(tokens.until(";"))
            continue
        tokens.take("(")
        values = tokens.until(")")
        if tokens.peek() == "{":
            group.groups.append(_group(word, values, tokens))
        else:
            group.attributes[word] = " ".join(values)
    tokens.take("}")
    return group


def _root(text: str) -> _Group:
    tokens = _Tokens(text)
    kind = tokens.take()
    tokens.take("(")
    return _group(kind, tokens.until(")"), tokens)


def _number(text: str, what: str, where: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise LibertyError(f"{where}: {what} is {text!r}, not a number") from None


def _capacitance_unit(root: _Group) -> float:
    """Femtofarads in a unit of capacitance."""
    words = root.attributes.get("capacitive_load_unit", "1 pf").split()
    scale = FARADS.get(words[-1].lower(), 1e-12)
    return float(words[0]) * scale / 1e-15


def _cell(group: _Group, unit: float, where: str) -> Cell:
    name = group.arguments[0] if group.arguments else "?"
    inputs, outputs = {}, {}
    for pin in group.find("pin"):
        if pin.attributes.get("direction") == "input":
            capacitance = _number(pin.attributes.get("capacitance", "0"), f"capacitance in {name}", where)
            inputs[pin.arguments[0]] = capacitance * unit
        elif "function" in pin.attributes:
            outputs[pin.arguments[0]] = pin.attributes["function"]
    area = _number(group.attributes.get("area", "0"), f"area of {name}", where)
    return Cell(name, area, inputs, outputs, bool(group.find("ff", "latch", "ff_bank", "latch_bank")))


def _is_nand2(cell: Cell) -> bool:
    if len(cell.inputs) != 2 or len(cell.outputs) != 1 or cell.is_sequential or cell.area <= 0:
        return False
    a, b = cell.inputs
    evaluate = compile_function(next(iter(cell.outputs.values())))
    return all(evaluate({a: x, b: y}) & 1 == 1 - (x & y) for x in (0, 1) for y in (0, 1))


# --- Boolean functions ------------------------------------------------------------------------------------------------


def compile_function(text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A Liberty function as a Python function from {pin: words} to words; it works on ints and on NumPy arrays.

    Liberty writes NOT as !A or A', AND as a space, * or &, OR as + or |, XOR as ^. NOT binds tightest,
    then XOR, AND, OR.
    """
    source = to_python(text)
    names = sorted(set(re.findall(r"p_(\w+)", source)))
    arguments = ", ".join(f"p_{name}" for name in names)
    evaluate = eval(f"lambda {arguments}: {source}")  # our own rendering of a checked expression
    return lambda values: evaluate(*(values[name] for name in names))


def to_python(text: str) -> str:
    """A Liberty function as a Python expression over names p_<pin>.

    Raises:
        LibertyError: it is not a Boolean expression.
    """
    tokens = re.findall(r"[A-Za-z_]\w*|[01]|[!'*&+|^()]|\S", text)
    expression, rest = _alternatives(tokens)
    if rest:
        raise LibertyError(f"function {text!r} is not a Boolean expression near {rest[0]!r}")
    return expression


def _alternatives(tokens: list[str]) -> tuple[str, list[str]]:
    left, tokens = _conjunction(tokens)
    while tokens and tokens[0] in "+|":
        right, tokens = _conjunction(tokens[1:])
        left = f"({left} | {right})"
    return left, tokens


def _conjunction(tokens: list[str]) -> tuple[str, list[str]]:
    left, tokens = _exclusive(tokens)
    while tokens and tokens[0] not in "+|)":
        right, tokens = _exclusive(tokens[1:] if tokens[0] in "*&" else tokens)
        left = f"({left} & {right})"
    return left, tokens


def _exclusive(tokens: list[str]) -> tuple[str, list[str]]:
    left, tokens = _factor(tokens)
    while tokens and tokens[0] == "^":
        right, tokens = _factor(tokens[1:])
        left = f"({left} ^ {right})"
    return left, tokens


def _factor(tokens: list[str]) -> tuple[str, list[str]]:
    if not tokens:
        raise LibertyError("a function ends where a pin is missing")
    head, tokens = tokens[0], tokens[1:]
    if head == "!":
        inner, tokens = _factor(tokens)
        return f"(~{inner})", tokens
    if head == "(":
        inner, tokens = _alternatives(tokens)
        if not tokens or tokens[0] != ")":
            raise LibertyError("a function has an unmatched parenthesis")
        tokens = tokens[1:]
    elif head in "01":
        inner = "(-1)" if head == "1" else "0"
    elif re.fullmatch(r"[A-Za-z_]\w*", head):
        inner = f"p_{head}"
    else:
        raise LibertyError(f"a function has {head!r} where a pin should be")
    while tokens and tokens[0] == "'":
        inner, tokens = f"(~{inner})", tokens[1:]
    return inner, tokens
