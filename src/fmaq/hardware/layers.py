"""A model's energy by layer: its steps and merges times the energy of one, for each layer's unit and operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fmaq.hardware import streams as operand_streams
from fmaq.hardware import synthesis
from fmaq.hardware.cost import design, merge_design, shared_designs, sharing
from fmaq.hardware.liberty import Library
from fmaq.hardware.netlist import Netlist, energy
from fmaq.hardware.operands import FloatOperand, IntegerOperand, has_bias
from fmaq.hardware.streams import Streams
from fmaq.hardware.unit import Unit
from fmaq.numerics import Accumulator, FixedFormat

FLOAT32 = "M23E8b127 chunk=none"
"""What a layer that is left in float32 is costed as, with the other layers' operands, and the 32-bit baseline."""
INT32 = "I32f0 chunk=none"
"""The baseline of an integer engine: integer operands, and an accumulator of whole numbers."""
ADDERS = ("own", "shared")
"""Whose the adder of chunks' sums is: each unit's own, or that of as many units as a chunk has steps."""


def merges(accumulator: str, steps: int) -> int:
    """How often a dot product of so many steps is merged: once in a chunk; never in one chunk without another level."""
    if accumulator == "fp32":
        return 0
    acc = Accumulator.parse(accumulator)
    if acc.chunk is None:
        return int(acc.outer is not None)
    return -(-steps // acc.chunk)


@dataclass(frozen=True)
class Layer:
    """A product of a model.

    Attributes:
        name: of the module.
        macs: multiply-accumulates of one inference, the steps.
        accumulator: as text; `"fp32"` for float32.
        weight, activation: operand formats.
        streams: recorded operands; Gaussian ones without.
        merges: of one inference, see `merges`.
        offset: by how many powers of two the products are larger than those of the streams.
    """

    name: str
    macs: int
    accumulator: str
    weight: str = "M4E3"
    activation: str = "M4E3"
    streams: Streams | None = None
    merges: int = 0
    offset: int = 0


@dataclass(frozen=True)
class LayerEnergy:
    """What a layer costs.

    Attributes:
        layer: the layer.
        unit: what does its steps.
        operation: energy of one step, in the library's unit.
        merge: energy of one merge; 0 where there is none.
        area: of the unit and of its merging adder, or its share of one: NAND2 equivalents.
        baseline: energy of one step of the 32-bit baseline, on the same operands; it sums in one chunk.
        baseline_area: of that unit.
        baseline_accumulator: that baseline: I32f0 for integer engines, else M23E8b127.
        total, baseline_total: of all steps and merges.
    """

    layer: Layer
    unit: Unit
    operation: float
    merge: float
    area: float
    baseline: float
    baseline_area: float
    baseline_accumulator: str

    @property
    def total(self) -> float:
        """Energy of the layer."""
        return self.layer.macs * self.operation + self.layer.merges * self.merge

    @property
    def baseline_total(self) -> float:
        """Energy of the layer with the 32-bit baseline."""
        return self.layer.macs * self.baseline


def energy_by_layer(layers: Iterable[Layer], library: Library, adder: str = "own") -> list[LayerEnergy]:
    """Energy of each layer on the smallest netlists of its unit and of the adder of its chunks' sums.

    The unit's operands have the biases of the layer's own tensors, so its products meet the accumulator's format at the
    magnitudes that they have in the model.

    Args:
        adder: one of `ADDERS`.
    Raises:
        ValueError: there is no such adder; or, of a layer with merges, as `Unit.merge` and `sharing`.
    """
    if adder not in ADDERS:
        raise ValueError(f"adder must be {' or '.join(ADDERS)}, got {adder!r}")
    return [_cost(layer, library, adder) for layer in layers]


def _cost(layer: Layer, library: Library, adder: str) -> LayerEnergy:
    streams = layer.streams or operand_streams.gaussian()
    unit, streams = _unit(layer, FLOAT32 if layer.accumulator == "fp32" else layer.accumulator, streams)
    are_integers = isinstance(unit.weight, IntegerOperand) and isinstance(unit.activation, IntegerOperand)
    is_engine = are_integers and isinstance(unit.format, FixedFormat) and unit.format.fraction == 0
    baseline = INT32 if is_engine else FLOAT32
    wide_area, wide = _step(replace(unit, accumulator=Accumulator.parse(baseline)), streams, library)
    area, operation = _step(unit, streams, library)
    more, merge = _merge(unit, streams, library, adder) if layer.merges else (0.0, 0.0)
    return LayerEnergy(layer, unit, operation, merge, area + more, wide, wide_area, baseline.split()[0])


def _step(unit: Unit, streams: Streams, library: Library) -> tuple[float, float]:
    """Area of a unit, and energy of a step."""
    netlist = _smallest(design(unit), library)
    trace = operand_streams.trace(unit, streams, rescale=False)
    return netlist.area / library.nand2, energy(netlist, library, trace)


def _merge(unit: Unit, streams: Streams, library: Library, adder: str) -> tuple[float, float]:
    """Area of a merging adder or of a unit's share of one, and energy of a merge."""
    if adder == "own":  # it takes up a sum, and lets go of it
        netlist = _smallest(merge_design(unit), library)
        trace = operand_streams.merge_trace(unit, streams, rescale=False)
        return netlist.area / library.nand2, 2 * energy(netlist, library, trace)
    netlist = _smallest(shared_designs(unit)[1], library)
    trace = operand_streams.shared_merge_trace(unit, streams, rescale=False)
    return netlist.area / library.nand2 / sharing(unit), energy(netlist, library, trace)


def _smallest(rtlil: str, library: Library) -> Netlist:
    return synthesis.map_to_cells(rtlil, library, synthesis.RECIPES[:1])[0].netlist(library)


def _unit(layer: Layer, accumulator: str, streams: Streams) -> tuple[Unit, Streams]:
    """The layer's unit, its operands' biases those of the tensors where the formats name none, and what it works on.

    An offset is one of the weights' exponents, which integers have none of.
    """
    unit = Unit.of(accumulator, layer.weight, layer.activation)
    fitted = operand_streams.fit(unit, streams)
    unit = replace(
        unit,
        weight=unit.weight if has_bias(layer.weight) else fitted.weight,
        activation=unit.activation if has_bias(layer.activation) else fitted.activation,
    )
    if not layer.offset or not isinstance(unit.weight, FloatOperand):
        return unit, streams
    weight = replace(unit.weight, bias=unit.weight.bias - layer.offset)
    return replace(unit, weight=weight), replace(streams, weights=streams.weights * 2.0**layer.offset)
