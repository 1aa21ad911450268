"""A model's energy by layer: its operations times the energy of one, for each layer's accumulator and operands."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fmaq.hardware import streams as operand_streams
from fmaq.hardware import synthesis
from fmaq.hardware.cost import design
from fmaq.hardware.liberty import Library
from fmaq.hardware.netlist import energy
from fmaq.hardware.streams import Streams
from fmaq.hardware.unit import Unit

FLOAT32 = "M23E8b127"
"""What a layer that is left in float32 is costed as: the 32-bit baseline, with the other layers' operands."""


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
        operation: energy of one multiply-accumulate, in the library's unit.
        baseline: the same with the 32-bit baseline, on the same operands.
        total, baseline_total: times the number of operations.
    """

    layer: Layer
    operation: float
    baseline: float

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
    return [
        LayerEnergy(layer, _operation(layer, layer.accumulator, library), _operation(layer, FLOAT32, library))
        for layer in layers
    ]


def _operation(layer: Layer, accumulator: str, library: Library) -> float:
    streams = layer.streams or operand_streams.gaussian()
    text = FLOAT32 if accumulator == "fp32" else accumulator
    unit = operand_streams.fit(Unit.of(text, layer.weight, layer.activation), streams)
    mapped = synthesis.map_to_cells(design(unit), library, synthesis.RECIPES[:1])[0]
    return energy(mapped.netlist(library), library, operand_streams.trace(unit, streams))
