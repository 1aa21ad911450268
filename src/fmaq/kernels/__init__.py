"""From an accumulator to machine code: products of float32 tensors, equal bit for bit to `numerics.reference`."""

from fmaq.kernels.backward import conv_gradients, matmul_gradients
from fmaq.kernels.frozen import Store, freezing, store_of
from fmaq.kernels.geometry import Geometry, torch_conv
from fmaq.kernels.products import (
    conv,
    count_conv_events,
    count_conv_exponents,
    count_events,
    count_exponents,
    matmul,
    spoiled_outputs,
)
from fmaq.kernels.ranges import largest_magnitude
from fmaq.kernels.rounding import round_to_float
from fmaq.kernels.targets import available_targets, current_target, use_target

__all__ = [
    "Geometry",
    "Store",
    "available_targets",
    "conv",
    "conv_gradients",
    "count_conv_events",
    "count_conv_exponents",
    "count_events",
    "count_exponents",
    "current_target",
    "freezing",
    "largest_magnitude",
    "matmul",
    "matmul_gradients",
    "round_to_float",
    "spoiled_outputs",
    "store_of",
    "torch_conv",
    "use_target",
]
