"""A netlist of gates and flip-flops, simulated 64 vectors at a time: one NumPy word of bits for each net."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fmaq.hardware.functions import compile_function, pins_of, statement
from fmaq.hardware.liberty import Cell, Library, Register

Words = NDArray[np.uint64]
Codes = NDArray[np.int64]

GENERIC = {
    name: Cell(name, 0.0, dict.fromkeys(pins, 0.0), {"Y": function})
    for name, pins, function in (
        ("$_BUF_", "A", "A"),
        ("$_NOT_", "A", "!A"),
        ("$_AND_", "AB", "A*B"),
        ("$_OR_", "AB", "A+B"),
        ("$_XOR_", "AB", "A^B"),
        ("$_XNOR_", "AB", "!(A^B)"),
        ("$_MUX_", "ABS", "S*B+!S*A"),
    )
} | {"$_DFF_P_": Cell("$_DFF_P_", 0.0, {"C": 0.0, "D": 0.0}, {"Q": "IQ"}, Register("IQ", "IQN", "D", "C"))}
"""Yosys's own gates, and its flip-flop, which a design is lowered to before any optimisation."""

POPULATION = np.array([bin(byte).count("1") for byte in range(256)], np.uint8)


@dataclass(frozen=True)
class Gate:
    """An instance of a cell: the net on each pin. Nets are numbers; "0" and "1" are constants."""

    cell: str
    pins: dict[str, int | str]


@dataclass(frozen=True)
class Netlist:
    """A netlist. All flip-flops have one clock; their states at the first step are all zeros.

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
    def from_yosys(
        cls, module: Mapping[str, Any], cells: Mapping[str, Cell], inside: Mapping[str, Netlist] | None = None
    ) -> Netlist:
        """From a module of Yosys's write_json.

        Args:
            inside: netlists, over the same cells, of modules that it has instances of.
        Raises:
            ValueError: a cell is neither of the library nor one of these.
        """
        ports: dict[str, dict[str, list[int | str]]] = {"input": {}, "output": {}}
        for name, port in module["ports"].items():
            ports[port["direction"]][name] = _bits(port["bits"])
        gates: list[Gate] = []
        driven: dict[int | str, int | str] = {}
        for cell in module["cells"].values():
            connections = {port: _bits(bits) for port, bits in cell["connections"].items() if bits}
            if cell["type"] == "$scopeinfo":  # a note of the hierarchy before it was flattened
                continue
            if inside and cell["type"] in inside:
                more, sources = inside[cell["type"]]._instance(connections, f"{len(gates)}.")
                gates, driven = gates + more, driven | sources
                continue
            if cell["type"] not in cells:
                raise ValueError(f"the netlist has a cell {cell['type']!r}, which the library does not have")
            gates.append(Gate(cell["type"], {pin: bits[0] for pin, bits in connections.items()}))

        def source(net: int | str) -> int | str:
            while net in driven:
                net = driven[net]
            return net

        gates = [Gate(gate.cell, {pin: source(net) for pin, net in gate.pins.items()}) for gate in gates]
        outputs = {name: [source(net) for net in nets] for name, nets in ports["output"].items()}
        return cls(ports["input"], outputs, gates, cells)

    def _instance(
        self, connections: Mapping[str, list[int | str]], prefix: str
    ) -> tuple[list[Gate], dict[int | str, int | str]]:
        """Its gates as part of another netlist, all names of nets inside made its own; and what drives nets outside."""
        outside: dict[int | str, int | str] = {"0": "0", "1": "1"}
        for port, nets in self.inputs.items():
            outside |= dict(zip(nets, connections[port], strict=True))
        gates = [
            Gate(gate.cell, {pin: outside.get(net, f"{prefix}{net}") for pin, net in gate.pins.items()})
            for gate in self.gates
        ]
        driven = {
            name: outside.get(net, f"{prefix}{net}")
            for port, nets in self.outputs.items()
            for net, name in zip(nets, connections.get(port, []), strict=False)
        }
        return gates, driven

    @property
    def area(self) -> float:
        """Sum of the cells' areas, in the library's unit."""
        return sum(self.cells[gate.cell].area for gate in self.gates)

    @property
    def counts(self) -> dict[str, int]:
        """Cells by type, the commonest first."""
        return dict(Counter(gate.cell for gate in self.gates).most_common())

    @cached_property
    def registers(self) -> list[Gate]:
        """The flip-flops."""
        return [gate for gate in self.gates if self.cells[gate.cell].is_sequential]

    @cached_property
    def _order(self) -> tuple[list[Gate], int]:
        """Gates, each behind those that drive it, and the largest number of gates on a path (Kahn's algorithm)."""
        logic = [gate for gate in self.gates if not self.cells[gate.cell].is_sequential]
        drivers = {net: gate for gate in logic for net in self._driven(gate)}
        levels: dict[int, int] = {}
        order: list[Gate] = []
        for root in logic:
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

    def nets(self, vectors: Mapping[str, Codes], wanted: Iterable[int | str] | None = None) -> dict[int | str, Words]:
        """Nets' bits, packed along the last axis of the vectors: every net's, or at least those wanted.

        Args:
            vectors: codes of every input port but the clock, arrays of one shape; (steps, lanes) with flip-flops.
        """
        shape = next(iter(vectors.values())).shape
        zeros = pack(np.zeros(shape, bool))
        nets: dict[int | str, Words] = {"0": zeros, "1": ~zeros}
        for name, bits in self.inputs.items():
            for position, net in enumerate(bits) if name in vectors else ():
                nets[net] = pack((vectors[name] >> position) & 1 == 1)
        if not self.registers:
            self._settle(nets)
            return nets
        steps: list[dict[int | str, Words]] = []
        states = {id(register): zeros[0] for register in self.registers}
        for index in range(shape[0]):
            steps.append({net: words[index] for net, words in nets.items()})
            states = self._step(steps[-1], states)
        return {net: np.stack([step[net] for step in steps]) for net in (steps[0] if wanted is None else wanted)}

    @cached_property
    def _settle(self) -> Callable[[dict[int | str, Words]], None]:
        """Adds what the gates make of the inputs, and of the flip-flops' outputs: a function with a line for each."""
        lines = ["def settle(nets):", "    pass"]
        for gate in self._order[0]:
            names = {pin: f"nets[{net!r}]" for pin, net in (gate.pins | {"0": "0", "1": "1"}).items()}
            outputs = self.cells[gate.cell].outputs
            lines += [f"    {statement(f, names[pin], names)}" for pin, f in outputs.items() if pin in gate.pins]
        scope: dict[str, Any] = {}
        exec("\n".join(lines), scope)  # our own rendering of checked words
        settle: Callable[[dict[int | str, Words]], None] = scope["settle"]
        return settle

    def _step(self, nets: dict[int | str, Words], states: dict[int, Words]) -> dict[int, Words]:
        """Add every net of one clock cycle; the flip-flops' states in the next."""
        for gate in self.registers:
            cell, state = self.cells[gate.cell], states[id(gate)]
            assert cell.register is not None
            inside = {cell.register.state: state, cell.register.inverse: ~state, "0": nets["0"], "1": nets["1"]}
            for pin, function in self._outputs[gate.cell]:
                if pin in gate.pins:
                    nets[gate.pins[pin]] = function(inside)
        self._settle(nets)
        return {id(gate): self._next_states[gate.cell](self._seen(gate, nets, states)) for gate in self.registers}

    def _seen(self, gate: Gate, nets: Mapping[int | str, Words], states: Mapping[int, Words]) -> dict[str, Words]:
        """What a flip-flop's next state may depend on: its pins and its state."""
        register = self.cells[gate.cell].register
        assert register is not None
        pins = {pin: nets[net] for pin, net in gate.pins.items() if net in nets}
        return pins | {register.state: states[id(gate)], register.inverse: ~states[id(gate)]}

    @cached_property
    def _outputs(self) -> dict[str, list[tuple[str, Any]]]:
        """Of each type of flip-flop, its outputs: pin and function."""
        used = [self.cells[name] for name in {gate.cell for gate in self.registers}]
        return {c.name: [(pin, compile_function(f)) for pin, f in c.outputs.items()] for c in used}

    @cached_property
    def _next_states(self) -> dict[str, Any]:
        """Of each type of flip-flop, the function that it takes over."""
        registers = {name: self.cells[name].register for name in self.counts}
        return {name: compile_function(r.next_state) for name, r in registers.items() if r is not None}

    def simulate(self, vectors: Mapping[str, Codes]) -> dict[str, Codes]:
        """Codes of every output port, in the shape of the vectors that `nets` takes."""
        nets = self.nets(vectors, {net for bits in self.outputs.values() for net in bits})
        count = next(iter(vectors.values())).shape[-1]
        return {
            name: np.sum([unpack(nets[net], count).astype(np.int64) << i for i, net in enumerate(bits)], axis=0)
            for name, bits in self.outputs.items()
        }

    def switched_capacitance(self, vectors: Mapping[str, Codes]) -> float:
        """Capacitance of the pins whose level changes, a step: cells' inputs alone, no wires, no glitches.

        A clock pin rises and falls in every step.

        Args:
            vectors: codes of every input port but the clock, (steps, lanes): a lane is one unit, in the order of time.
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
        registers = [self.cells[gate.cell] for gate in self.registers]
        clocked = sum(2 * cell.inputs[pin] for cell in registers for pin in clock_pins(cell))
        return total / ((steps - 1) * lanes) + clocked


def energy(netlist: Netlist, library: Library, vectors: Mapping[str, Codes]) -> float:
    """Mean energy of a step on streams of operands: C·V²/2 for each change of each gate input.

    It is a zero-delay simulation: no glitches, no wires, no short-circuit current, no leakage. The clock drives the
    flip-flops' pins, and no tree.

    Args:
        vectors: as `Netlist.switched_capacitance` takes them.
    Returns:
        in `library.energy_unit`.
    """
    return 0.5 * netlist.switched_capacitance(vectors) * library.voltage**2


def clock_pins(cell: Cell) -> set[str]:
    """The pins that clock a flip-flop."""
    return pins_of(cell.register.clocked_on) if cell.register else set()


def _bits(bits: list[int | str]) -> list[int | str]:
    """Nets of a port or pin; what is not known is 0."""
    return ["0" if bit == "x" else bit for bit in bits]


def pack(bits: NDArray[np.bool_]) -> Words:
    """Bits along the last axis in words of 64; the last word is filled with zeros."""
    packed = np.packbits(bits, axis=-1)
    padding = [(0, 0)] * (bits.ndim - 1) + [(0, -packed.shape[-1] % 8)]
    return np.ascontiguousarray(np.pad(packed, padding)).view(np.uint64)


def unpack(words: Words, count: int) -> NDArray[np.uint8]:
    """The first `count` bits along the last axis of packed words."""
    return np.unpackbits(words.view(np.uint8), axis=-1, count=count)
