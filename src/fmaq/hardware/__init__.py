"""The hardware of an accumulator: RTL of its FMAq unit, proven, synthesized and costed. Stands on `numerics` alone.

`estimate` is instant and analytic; `synthesize` makes a netlist, in seconds. The energy of a whole model, which needs
torch, is `fmaq.analysis.model_energy`.
"""

from __future__ import annotations

from fmaq.hardware.cost import (
    MacSynthesis,
    Point,
    SharedSynthesis,
    Synthesis,
    synthesize,
    synthesize_mac,
    synthesize_shared,
)
from fmaq.hardware.gatecount import Estimate, estimate
from fmaq.hardware.liberty import LibertyError, Library, find_library, installed_libraries
from fmaq.hardware.operands import parse_operand
from fmaq.hardware.proof import Proof, prove
from fmaq.hardware.streams import Streams, gaussian, of_layer
from fmaq.hardware.synthesis import SynthesisError
from fmaq.hardware.unit import Unit

__all__ = [
    "Estimate",
    "LibertyError",
    "Library",
    "MacSynthesis",
    "Point",
    "Proof",
    "SharedSynthesis",
    "Streams",
    "Synthesis",
    "SynthesisError",
    "Unit",
    "estimate",
    "find_library",
    "gaussian",
    "installed_libraries",
    "of_layer",
    "parse_operand",
    "prove",
    "synthesize",
    "synthesize_mac",
    "synthesize_shared",
]
