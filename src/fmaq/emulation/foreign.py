"""Operands that are no ordinary tensors: the classes by which other packages keep quantized weights and activations.

Two kinds: subclasses of Tensor that compute by themselves (torchao's weights, DTensor), and things that are no tensors
but are taken by torch functions (brevitas' QuantTensor, a named tuple). One that can tell the values it stands for, by
`dequantize()` or `value`, is multiplied by these; another one is left to itself, and named.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

OWN_DISPATCH = (torch._C._disabled_torch_dispatch_impl, Tensor.__torch_dispatch__)


ORDINARY = {Tensor, torch.nn.Parameter, int, float, bool, str, type(None), torch.dtype, torch.device, torch.Size}

PLAIN = (tuple, list, dict)


def is_foreign(x: Any) -> bool:
    """x computes by itself what torch functions make of it."""
    if type(x) in ORDINARY:
        return False
    if isinstance(x, Tensor):
        if type(x).__module__.startswith("torch._subclasses"):  # torch.export's own, without values
            return False
        return type(x) is not Tensor and type(x).__torch_dispatch__ not in OWN_DISPATCH and not x.is_nested
    return not isinstance(x, type) and hasattr(type(x), "__torch_function__")


def ordinary(x: Any) -> Tensor | None:
    """The values that a foreign operand stands for, or None where it cannot tell them."""
    for ask in (lambda: x.dequantize(), lambda: x.value):
        try:
            values = ask()
        except Exception:  # whatever a foreign class raises, it cannot
            continue
        if isinstance(values, Tensor) and not is_foreign(values) and values.shape == x.shape:
            return values
    return None


def found(given: Any) -> list[Any]:
    """The foreign operands in arguments, however deep in tuples, lists and mappings."""
    if type(given) not in PLAIN and is_foreign(given):
        return [given]
    if isinstance(given, (tuple, list)):
        return [x for part in given if type(part) not in ORDINARY for x in found(part)]
    return found(list(given.values())) if isinstance(given, Mapping) else []


def replaced(given: Any, values: Mapping[int, Tensor]) -> Any:
    """The arguments with foreign operands as their values, by `id`."""
    if id(given) in values:
        return values[id(given)]
    if isinstance(given, (tuple, list)) and not is_foreign(given):
        parts = [replaced(part, values) for part in given]
        return type(given)(*parts) if hasattr(given, "_fields") else type(given)(parts)
    if isinstance(given, dict):
        return {name: replaced(part, values) for name, part in given.items()}
    return given


def names(operands: list[Any]) -> str:
    """Their classes, as a reason why a product is not emulated."""
    classes = sorted({type(x).__name__ for x in operands})
    return f"operands of {', '.join(classes)}, which do not tell their values by dequantize()"
