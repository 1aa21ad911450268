"""Differentiable products whose dot products are summed in low bit-width accumulators, and tensor quantization."""

from fmaq.ops.attention import scaled_dot_product_attention
from fmaq.ops.conv import conv1d, conv2d, conv3d, conv_transpose1d, conv_transpose2d, conv_transpose3d
from fmaq.ops.events import Events, Exponents, count_events, count_events_by_rows, count_exponents
from fmaq.ops.matmul import linear, matmul
from fmaq.ops.quantize import integer_codes, parse_tensor_format, quantize

__all__ = [
    "Events",
    "Exponents",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "count_events",
    "count_events_by_rows",
    "count_exponents",
    "integer_codes",
    "linear",
    "matmul",
    "parse_tensor_format",
    "quantize",
    "scaled_dot_product_attention",
]
