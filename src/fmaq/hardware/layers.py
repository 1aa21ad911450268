"""A model's energy by layer: its operations times the energy of one, for each layer's accumulator and operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from fmaq.hardware import streams as operand_streams
from fmaq.hardware import synthesis
from fmaq.hardware.cost import design
from fmaq.hardware.liberty import Library
from fmaq.hardware.netlist import energy
from fmaq.hardware.operands import IntegerOperand, has_bias
from fmaq.hardware.streams import Streams
from fmaq.hardware.unit import Unit
from fmaq.numerics import FixedFormat

FLOAT32 = "M23E8b127"
"""What a layer that is left in float32 is costed as, with the other layers' operands, and the 32-bit baseline."""
INT32 = "I32f0"
"""The baseline of an integer engine: integer operands, and an accumulator of whole numbers."""


@dataclass(frozen=True)
class Layer:
    """A product of a model.

    Attributes:
        name: of the module.
        macs: multiply-accumulates of one inference.
        accumulator: as text; `"fp32"` for float32.
        weight, activation: operand formats.
        streams: recorded operands; Gaussian ones without.
    """

    name: str
    macs: int
    accumulator: str
    weight: str = "M4E3"
    activation: str = "M4E3"
    streams: Streams | None = None


@dataclass(frozen=True)
class LayerEnergy:
    """What a layer costs.

    Attributes:
        layer: the layer.
        unit: what does its operations.
        operation: energy of one multiply-accumulate, in the library's unit.
        baseline: the same with the 32-bit baseline, on the same operands.
        baseline_accumulator: that baseline: I32f0 for integer engines, else M23E8b127.
        total, baseline_total: times the number of operations.
    """

    layer: Layer
    unit: Unit
    operation: float
    baseline: float
    baseline_accumulator: str

    @property
    def total(self) -> float:
        """Energy of the layer."""
        return self.layer.macs * self.operation

    @property
    def baseline_total(self) -> float:
        """Energy of the layer with the 32-bit baseline."""
        return self.layer.macs * self.baseline


def energy_by_layer(layers: Iterable[Layer], library: Library) -> list[LayerEnergy]:
    """Energy of each layer on the smallest netlist of its unit.

    The unit's operands have the biases of the layer's own tensors, so its products meet the accumulator's format at the
    magnitudes that they have in the model.
    """
    return [_cost(layer, library) for layer in layers]


def _cost(layer: Layer, library: Library) -> LayerEnergy:
    streams = layer.streams or operand_streams.gaussian()
    unit = _unit(layer, FLOAT32 if layer.accumulator == "fp32" else layer.accumulator, streams)
    are_integers = isinstance(unit.weight, IntegerOperand) and isinstance(unit.activation, IntegerOperand)
    is_engine = are_integers and isinstance(unit.format, FixedFormat) and unit.format.fraction == 0
    baseline = INT32 if is_engine else FLOAT32
    wide = _operation(_unit(layer, baseline, streams), streams, library)
    return LayerEnergy(layer, unit, _operation(unit, streams, library), wide, baseline)


def _unit(layer: Layer, accumulator: str, streams: Streams) -> Unit:
    """The layer's unit, its operands' biases those of the tensors where the formats name none."""
    unit = Unit.of(accumulator, layer.weight, layer.activation)
    fitted = operand_streams.fit(unit, streams)
    return replace(
        unit,
        weight=unit.weight if has_bias(layer.weight) else fitted.weight,
        activation=unit.activation if has_bias(layer.activation) else fitted.activation,
    )


def _operation(unit: Unit, streams: Streams, library: Library) -> float:
    mapped = synthesis.map_to_cells(design(unit), library, synthesis.RECIPES[:1])[0]
    return energy(mapped.netlist(library), library, operand_streams.trace(unit, streams, rescale=False))
