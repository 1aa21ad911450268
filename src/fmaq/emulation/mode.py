"""The mode that meets every torch function while an attached module runs, and hands the products to their handlers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn
from torch._ops import OpOverload, OpOverloadPacket

from fmaq.emulation import foreign, traced
from fmaq.emulation.calls import Call, ModelMode, current_call, handling
from fmaq.emulation.handlers import ATEN, HANDLERS, Handler, handler_of_kind, of_kind
from fmaq.emulation.met import Met
from fmaq.emulation.roles import Roles

WITHOUT_PRODUCTS = {
    *("prim", "prims", "rngprims", "debugprims", "inductor_prims", "profiler", "debug_mode_ops", "export", "onnx"),
    *("fmaq", "c10d", "c10d_functional", "_c10d_functional", "_c10d_functional_autograd", "_dtensor", "fsdp"),
}
"""Namespaces of operators that multiply no matrices: the profiler's marks, random numbers, collectives and copies; and
our own, whose products are emulated already."""

NAMED_BY_PRODUCT = {
    *("quantized", "_quantized", "mkldnn", "mkldnn_prepacked", "mkl", "onednn", "sparse", "inductor", "symm_mem"),
    *("_native", "static_runtime", "quantization", "torchvision", "torchaudio"),
}
"""Namespaces of which some operators do, whose names then say so."""

PRODUCT_WORDS = ("mm", "matmul", "linear", "conv", "attention", "lstm", "gru", "rnn")


class EmulationMode(ModelMode):
    """Computes matrix products as the rule of the module that calls them wants; everything else passes through.

    Meanwhile it learns which tensors are weights: see `Roles`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self.roles = Roles(model)

    def begin(self, inputs: Any) -> None:
        self.roles.note_inputs(inputs)

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        if torch.compiler.is_dynamo_compiling():
            traced.check_inside_mode(func)  # a part is compiled: it has a mode of its own
            return func(*args, **kwargs)
        handler = _handler(func)
        call = current_call() if handler is not None else None
        is_activation = False
        if handler is not None and call is not None:
            with handling:
                handler, met = self._met(handler, call, func, args, kwargs)
                result = handler(met)
            is_activation = not met.of_weights
        else:
            result = func(*args, **kwargs)
        self.roles.learn(func, result, args, kwargs, is_activation)
        return result

    def _met(
        self,
        handler: Handler,
        call: Call,
        func: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> tuple[Handler, Met]:
        """What is met, with the values of foreign operands in their place, and what handles it."""
        operands = foreign.found((args, kwargs))
        if operands:
            told = {} if call.attachment.is_plain else {id(x): foreign.ordinary(x) for x in operands}
            values = {key: value for key, value in told.items() if value is not None}
            if not values or len(values) < len(told):
                handler = functools.partial(_left_to_itself, reason=foreign.names(operands))
            else:
                for x in operands:
                    self.roles.set(values[id(x)], min(self.roles.of(x), self.roles.of(values[id(x)])))
                args, kwargs = foreign.replaced((args, dict(kwargs)), values)
        return handler, Met(call, func, args, kwargs, self.roles.is_weight, self.roles.is_activation, self)


def _handler(func: Callable[..., Any]) -> Handler | None:
    """What computes a function under emulation; None where it holds no matrix product."""
    if isinstance(func, functools.partial) and func.func is of_kind:
        return handler_of_kind(func)
    return _known_handler(func)


@functools.lru_cache(maxsize=4096)
def _known_handler(func: Callable[..., Any]) -> Handler | None:
    if func in HANDLERS:
        return HANDLERS[func]
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        namespace, operator = str(func).split(".")[:2]
        if namespace == "aten":
            return ATEN.get(operator)
        if _may_multiply(namespace, operator):
            return functools.partial(_unknown, name=f"{namespace}::{operator}")
    return None


def _may_multiply(namespace: str, operator: str) -> bool:
    """An operator that is not torch's own may hold a product of matrices."""
    if namespace in WITHOUT_PRODUCTS:
        return False
    has_word = any(word in operator for word in PRODUCT_WORDS) and not any(w in operator for w in ("pack", "reorder"))
    return has_word or namespace not in NAMED_BY_PRODUCT


def _left_to_itself(met: Met, reason: str) -> Any:
    return met.not_covered(met.func.__name__, reason)


def _unknown(met: Met, name: str) -> Any:
    """A custom operator may hold a product: it is named, and left to itself."""
    return met.not_covered(name, "what a custom operator computes is unknown")
