"""Multiply-accumulates that share one merging adder: as many lanes as a chunk has steps, each a cycle behind the last.

Every lane merges once in c steps, at its own cycle, so that one adder serves c lanes without a queue. The operands of
lane i come i cycles after those of lane 0, as in a systolic array; a dot product has a whole number of chunks, the last
one filled up with zeros, which change no sum.
"""

from __future__ import annotations

from amaranth.hdl import ClockSignal, Elaboratable, Instance, Module, ResetSignal, Signal, Value

from fmaq.hardware.rtl import Lane, Merge
from fmaq.hardware.unit import Unit, register_bits


class SharedLane(Elaboratable):
    """A lane whose codes to add are zeros where it does not merge; it passes `valid` and `last` on a cycle later."""

    def __init__(self, unit: Unit) -> None:
        self.lane = Lane(unit)
        self.s, self.t = Signal(len(self.lane.s), name="s_out"), Signal(len(self.lane.t), name="t_out")
        self.next_valid, self.next_last = Signal(name="next_valid"), Signal(name="next_last")

    @property
    def ports(self) -> list[Signal]:
        """Inputs, then outputs; clk and rst join them."""
        lane = self.lane
        inputs = [lane.x, lane.w, lane.valid, lane.last, lane.y]
        return [*inputs, self.s, self.t, self.next_valid, self.next_last, lane.total, lane.done]

    def elaborate(self, platform: object) -> Module:
        """The lane and its gates."""
        module, lane = Module(), self.lane
        module.submodules.lane = lane
        module.d.comb += [
            self.s.eq(lane.s & lane.merges.replicate(len(lane.s))),
            self.t.eq(lane.t & lane.merges.replicate(len(lane.t))),
        ]
        module.d.sync += [self.next_valid.eq(lane.valid), self.next_last.eq(lane.last)]
        return module


class SharedMerge(Elaboratable):
    """The adder of `count` lanes, and the ORs that choose whose sums it adds. Ports: their `s` and `t`, and `y`."""

    def __init__(self, unit: Unit, count: int) -> None:
        self.merge = Merge(unit)
        self.s = [Signal(len(self.merge.s), name=f"s_{lane}") for lane in range(count)]
        self.t = [Signal(len(self.merge.t), name=f"t_{lane}") for lane in range(count)]
        self.y = Signal(len(self.merge.y), name="y")

    @property
    def ports(self) -> list[Signal]:
        """Inputs, then the output."""
        return [*self.s, *self.t, self.y]

    def elaborate(self, platform: object) -> Module:
        """The adder, and the ORs."""
        module = Module()
        module.submodules.merge = self.merge
        module.d.comb += [
            self.merge.s.eq(_any(self.s)),
            self.merge.t.eq(_any(self.t)),
            self.y.eq(self.merge.y),
        ]
        return module


class Shared(Elaboratable):
    """`count` lanes and their adder: nothing but wires between instances of the modules `lane` and `merge`.

    Ports of lane i: `x_i`, `w_i`, `total_i`, `done_i`; of lane 0 alone `valid` and `last`.
    """

    def __init__(self, unit: Unit, count: int, lane: str, merge: str) -> None:
        self.lane, self.merge, total = lane, merge, register_bits(unit.total)
        self.valid, self.last = Signal(name="valid"), Signal(name="last")
        self.y = Signal(total, name="y")
        widths = {"x": unit.activation.bits, "w": unit.weight.bits, "total": total, "done": 1}
        between = {"s": unit.register_bits, "t": total}
        self.of_lanes, self.to_merge = (
            [{name: Signal(bits, name=f"{name}_{i}") for name, bits in kind.items()} for i in range(count)]
            for kind in (widths, between)
        )

    @property
    def ports(self) -> list[Signal]:
        """Inputs and outputs; clk and rst join them."""
        return [self.valid, self.last, *(port for ports in self.of_lanes for port in ports.values())]

    def elaborate(self, platform: object) -> Module:
        """The lanes in a row, and their adder."""
        module, valid, last = Module(), self.valid, self.last
        for index, (ports, codes) in enumerate(zip(self.of_lanes, self.to_merge, strict=True)):
            inputs = {"clk": ClockSignal(), "rst": ResetSignal(), "valid": valid, "last": last, "y": self.y}
            valid, last = Signal(name=f"valid_{index + 1}"), Signal(name=f"last_{index + 1}")
            outputs = {"s_out": codes["s"], "t_out": codes["t"], "next_valid": valid, "next_last": last}
            inputs |= {name: ports[name] for name in ("x", "w")}
            outputs |= {name: ports[name] for name in ("total", "done")}
            module.submodules[f"lane_{index}"] = _instance(self.lane, inputs, outputs)
        codes = {f"{name}_{index}": code for index, pair in enumerate(self.to_merge) for name, code in pair.items()}
        module.submodules.merge = _instance(self.merge, codes, {"y": self.y})
        return module


def _instance(name: str, inputs: dict[str, Value], outputs: dict[str, Value]) -> Instance:
    return Instance(name, *(("i", *port) for port in inputs.items()), *(("o", *port) for port in outputs.items()))


def _any(codes: list[Signal]) -> Value:
    """The OR of codes, of which at most one is not zero, as a tree."""
    while len(codes) > 1:
        pairs = zip(codes[::2], codes[1::2], strict=False)
        codes = [a | b for a, b in pairs] + codes[len(codes) // 2 * 2 :]
    return codes[0]
