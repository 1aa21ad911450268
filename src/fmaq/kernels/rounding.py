"""Rounding a tensor to a float format with subnormals, in one pass: what quantized weights and activations need."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import torch
from llvmlite import ir
from torch import Tensor

from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.ir_blocks import F32, I64, POINTER, Value, element, for_range, i64
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.targets import Target, current_target


def _module(mantissa: int, target: Target) -> ir.Module:
    """`round(values, results, count, smallest normal, 2^23 subnormal steps, limit)`, to the nearest, ties to even.

    A normal number is rounded on its bits. A smaller one is added to a number whose unit in the last place is the step.
    """
    module = ir.Module("rounding")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, POINTER, I64, F32, F32, F32]), "round")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    values, results, count, *numbers = function.args
    v = Lanes(b, target, 4)
    smallest, anchor, limit = (v.splat(number) for number in numbers)
    dropped = 23 - mantissa

    def rounded(x: Value) -> Value:
        magnitude = v.magnitude(x)
        bits = v.bits(magnitude)
        if dropped:
            one = v.bit_constant(1)  # without a mantissa the last bit kept is the leading one
            last = b.and_(b.lshr(bits, v.bit_constant(dropped)), one) if mantissa else one
            bits = b.add(b.add(bits, v.bit_constant(2 ** (dropped - 1) - 1)), last)
        normal = v.keep_bits(v.from_bits(bits), dropped)
        subnormal = v.sub(v.add(magnitude, anchor), anchor)
        y = b.select(b.fcmp_ordered("<", magnitude, smallest), subnormal, normal)
        return v.copy_sign(b.select(b.fcmp_ordered("<", y, limit), y, limit), x)

    def whole(i: Value, _: list[Value]) -> list[Value]:
        v.store(rounded(v.load(element(b, values, i, F32))), element(b, results, i, F32))
        return []

    def single(i: Value, _: list[Value]) -> list[Value]:
        y = rounded(v.load_splat(element(b, values, i, F32)))
        b.store(b.extract_element(y, i64(0)), element(b, results, i, F32))
        return []

    in_vectors = b.and_(count, i64(-v.count))
    for_range(b, i64(0), in_vectors, [], whole, step=v.count)
    for_range(b, in_vectors, count, [], single)
    b.ret_void()
    return module


@functools.cache
def _round(mantissa: int, target: Target) -> tuple[Any, Compiled]:
    compiled = compile_module(_module(mantissa, target), target)
    arguments = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int64, *[ctypes.c_float] * 3)
    return compiled.function("round", *arguments), compiled


def round_to_float(x: Tensor, mantissa: int, emin: int, emax: int) -> Tensor:
    """x to the nearest of ±2^e·(1 + i/2^mantissa), emin ≤ e ≤ emax, and of multiples of 2^(emin − mantissa) below.

    Args:
        x: float32, finite, any strides.
        emin: at least mantissa − 126, so that a step is a normal float32, and at most 100. emax: at most 127.

    Returns:
        float32 of x's shape and memory order, saturated at the largest magnitude.
    """
    y = torch.empty_like(x)  # in x's order of dimensions, where x is dense
    if x.stride() != y.stride():
        x, y = x.contiguous(), x.new_empty(x.shape)
    limit = 2.0**emax * (2 - 2.0**-mantissa)
    anchor = 2.0 ** (23 + emin - mantissa)
    _round(mantissa, current_target())[0](x.data_ptr(), y.data_ptr(), x.numel(), 2.0**emin, anchor, limit)
    return y
