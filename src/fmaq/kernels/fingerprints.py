"""A fingerprint of a tensor's values: by it, packed panels of a weight are found, and its range, in one quick pass."""

from __future__ import annotations

import ctypes
import functools
import threading
from collections import OrderedDict
from typing import Any

from llvmlite import ir
from torch import Tensor

from fmaq.kernels.compile import Compiled, compile_module
from fmaq.kernels.frozen import store_of
from fmaq.kernels.ir_blocks import F32, I32, I64, POINTER, Value, element, for_range, i32, i64
from fmaq.kernels.lanes import Lanes
from fmaq.kernels.ranges import Measured, in_memory_order, measured
from fmaq.kernels.targets import Target

CHAINS = 4  # of vectors, so that one need not wait for the other
TURN = 5  # bits by which a word is rotated before the next is added
REMEMBERED = 4096  # ranges


def _module(target: Target) -> ir.Module:
    """`fingerprint(values, count, result)`: a word a lane and chain. Bits are added to what is there, rotated."""
    module = ir.Module("fingerprints")
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [POINTER, I64, POINTER]), "fingerprint")
    b = ir.IRBuilder(function.append_basic_block("entry"))
    values, count, result = function.args
    v = Lanes(b, target, 4)
    rotate = v.declare(f"llvm.fshl.v{v.count}i32", v.words, [v.words] * 3)

    def added(word: Value, bits: Value) -> Value:
        return b.add(b.call(rotate, [word, word, v.word(TURN)]), bits)

    def loaded(i: Value) -> Value:
        return b.load(element(b, values, i, F32), typ=v.words, align=4)

    def whole(i: Value, words: list[Value]) -> list[Value]:
        return [added(word, loaded(b.add(i, i64(n * v.count)))) for n, word in enumerate(words)]

    def single(i: Value, words: list[Value]) -> list[Value]:
        bits = v.splat(b.load(element(b, values, i, F32), typ=I32, align=4))
        return [added(words[0], bits), *words[1:]]

    step = CHAINS * v.count
    in_steps = b.and_(count, i64(-step))
    words = for_range(b, i64(0), in_steps, [v.word(0)] * CHAINS, whole, step=step)
    words = for_range(b, in_steps, count, words, single)
    for n, word in enumerate(words):
        b.store(word, b.gep(result, [i32(n * v.count)], source_etype=I32), align=4)
    b.ret_void()
    return module


@functools.cache
def _fingerprint(target: Target) -> tuple[Any, Compiled]:
    compiled = compile_module(_module(target), target)
    return compiled.function("fingerprint", ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p), compiled


def fingerprint(x: Tensor, target: Target) -> bytes:
    """Of all values of a float32 tensor, of any strides, in the order of memory."""
    x = in_memory_order(x)
    words = (ctypes.c_uint32 * (CHAINS * target.lanes(4)))()
    _fingerprint(target)[0](x.data_ptr(), x.numel(), ctypes.addressof(words))
    return bytes(words)


_ranges: OrderedDict[tuple[bytes, int], Measured] = OrderedDict()
_lock = threading.Lock()


def recognized(x: Tensor, target: Target) -> tuple[bytes, Measured]:
    """The fingerprint, and the range, which is measured where the fingerprint is new."""
    store = store_of(x)
    if store is None:
        return _recognized(x, target)
    return store.once(x, ("recognized", target), lambda: _recognized(x, target))


def _recognized(x: Tensor, target: Target) -> tuple[bytes, Measured]:
    mark = fingerprint(x, target)
    key = mark, x.numel()
    found = _ranges.get(key)
    if found is None:
        found = measured(x, target)
        with _lock:
            _ranges[key] = found
            if len(_ranges) > REMEMBERED:
                _ranges.popitem(last=False)
    return mark, found
