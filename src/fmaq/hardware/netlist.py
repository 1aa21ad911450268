"""A netlist of gates, simulated 64 vectors at a time: one NumPy word of bits for each net."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmaq.hardware.functions import compile_function
from fmaq.hardware.liberty import Cell, Library

Words = NDArray[np.uint64]
Codes = NDArray[np.int64]

GENERIC = {
    name: Cell(name, 0.0, dict.fromkeys(pins, 0.0), {"Y": function}, False)
    for name, pins, function in (
        ("$_BUF_", "A", "A"),
        ("$_NOT_", "A", "!A"),
        ("$_AND_", "AB", "A*B"),
        ("$_OR_", "AB", "A+B"),
        ("$_XOR_", "AB", "A^B"),
        ("$_XNOR_", "AB", "!(A^B)"),
        ("$_MUX_", "ABS", "S*B+!S*A"),
    )
}
"""Yosys's own gates, which a design is lowered to before any optimisation."""

POPULATION = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class Gate:
    """An instance of a cell: the net on each pin. Nets are numbers; "0" and "1" are constants."""

    cell: str
    pins: dict[str, int | str]


@dataclass(frozen=True)
class Netlist:
    """A netlist; one with flip-flops has areas and counts, and only a combinational one can be simulated.

    Attributes:
        inputs, outputs: nets of each port, lowest bit first.
        gates: in any order.
        cells: the cells that gates are instances of.
    """

    inputs: dict[str, list[int | str]]
    outputs: dict[str, list[int | str]]
    gates: list[Gate]
    cells: Mapping[str, Cell]

    @classmethod
    def from_yosys(cls, module: Mapping[str, Any], cells: Mapping[str, Cell]) -> Netlist:
        """From a module of Yosys's write_json.

        Raises:
            ValueError: a cell is not of the library.
        """
        ports: dict[str, dict[str, list[int | str]]] = {"input": {}, "output": {}}
        for name, port in module["ports"].items():
            ports[port["direction"]][name] = ["0" if bit == "x" else bit for bit in port["bits"]]
        gates = []
        for cell in module["cells"].values():
            if cell["type"] == "$scopeinfo":  # a note of the hierarchy before it was flattened
                continue
            if cell["type"] not in cells:
                raise ValueError(f"the netlist has a cell {cell['type']!r}, which the library does not have")
            pins = {pin: "0" if bits[0] == "x" else bits[0] for pin, bits in cell["connections"].items() if bits}
            gates.append(Gate(cell["type"], pins))
        return cls(ports["input"], ports["output"], gates, cells)

    @property
    def area(self) -> float:
        """Sum of the cells' areas, in the library's unit."""
        return sum(self.cells[gate.cell].area for gate in self.gates)

    @property
    def counts(self) -> dict[str, int]:
        """Cells by type, the commonest first."""
        return dict(Counter(gate.cell for gate in self.gates).most_common())

    @cached_property
    def _order(self) -> tuple[list[Gate], int]:
        """Gates, each behind those that drive it, and the largest number of gates on a path (Kahn's algorithm)."""
        drivers = {net: gate for gate in self.gates for net in self._driven(gate)}
        levels: dict[int, int] = {}
        order: list[Gate] = []
        for root in self.gates:
            stack = [root]
            while stack:
                gate = stack[-1]
                if id(gate) in levels:
                    stack.pop()
                    continue
                sources = [drivers[gate.pins[pin]] for pin in self.cells[gate.cell].inputs if gate.pins[pin] in drivers]
                waiting = [source for source in sources if id(source) not in levels]
                if waiting:
                    stack += waiting
                    continue
                levels[id(gate)] = 1 + max((levels[id(source)] for source in sources), default=0)
                order.append(gate)
        return order, max(levels.values(), default=0)

    @property
    def levels(self) -> int:
        """Gates on the longest path."""
        return self._order[1]

    def _driven(self, gate: Gate) -> list[int | str]:
        return [gate.pins[pin] for pin in self.cells[gate.cell].outputs if pin in gate.pins]

    def nets(self, vectors: Mapping[str, Codes]) -> dict[int | str, Words]:
        """Every net's bits, packed along the last axis of the vectors.

        Args:
            vectors: codes of every input port, arrays of one shape.
        """
        shape = next(iter(vectors.values())).shape
        zeros = pack(np.zeros(shape, bool))
        constants: dict[int | str, Words] = {"0": zeros, "1": ~zeros}
        nets = dict(constants)
        for name, bits in self.inputs.items():
            for position, net in enumerate(bits):
                nets[net] = pack((vectors[name] >> position) & 1 == 1)
        functions = {name: _functions(self.cells[name]) for name in self.counts}
        for gate in self._order[0]:
            for pin, inputs, function in functions[gate.cell]:
                if pin in gate.pins:
                    nets[gate.pins[pin]] = function({**constants, **{name: nets[gate.pins[name]] for name in inputs}})
        return nets

    def simulate(self, vectors: Mapping[str, Codes]) -> dict[str, Codes]:
        """Codes of every output port for vectors of codes, one axis."""
        nets = self.nets(vectors)
        count = len(next(iter(vectors.values())))
        return {
            name: np.sum([unpack(nets[net], count).astype(np.int64) << i for i, net in enumerate(bits)], axis=0)
            for name, bits in self.outputs.items()
        }

    def switched_capacitance(self, vectors: Mapping[str, Codes]) -> float:
        """Capacitance of the pins whose level changes, a step: gates' inputs alone, no wires, no glitches.

        Args:
            vectors: codes of every input port, (steps, lanes): a lane is one unit, in the order of time.
        Returns:
            the mean over steps and lanes, in the unit of `Cell.inputs`.
        """
        load: Counter[int | str] = Counter()
        for gate in self.gates:
            for pin, capacitance in self.cells[gate.cell].inputs.items():
                load[gate.pins[pin]] += capacitance  # type: ignore[assignment]
        steps, lanes = next(iter(vectors.values())).shape
        total = 0.0
        for net, words in self.nets(vectors).items():
            if load[net]:
                toggles = POPULATION[(words[1:] ^ words[:-1]).view(np.uint8)].sum(dtype=np.int64)
                total += float(toggles) * load[net]
        return total / ((steps - 1) * lanes)


def energy(netlist: Netlist, library: Library, vectors: Mapping[str, Codes]) -> float:
    """Mean energy of a step on streams of operands: C·V²/2 for each change of each gate input.

    It is a zero-delay simulation: no glitches, no wires, no short-circuit current, no leakage, no clock.

    Args:
        vectors: as `Netlist.switched_capacitance` takes them.
    Returns:
        in `library.energy_unit`.
    """
    return 0.5 * netlist.switched_capacitance(vectors) * library.voltage**2


def _functions(cell: Cell) -> list[tuple[str, list[str], Any]]:
    return [(pin, list(cell.inputs), compile_function(text)) for pin, text in cell.outputs.items()]


def pack(bits: NDArray[np.bool_]) -> Words:
    """Bits along the last axis in words of 64; the last word is filled with zeros."""
    packed = np.packbits(bits, axis=-1)
    padding = [(0, 0)] * (bits.ndim - 1) + [(0, -packed.shape[-1] % 8)]
    return np.ascontiguousarray(np.pad(packed, padding)).view(np.uint64)


def unpack(words: Words, count: int) -> NDArray[np.uint8]:
    """The first `count` bits of packed words."""
    return np.unpackbits(words.view(np.uint8), count=count)
