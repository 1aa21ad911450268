"""The mode that meets every torch function while an attached module runs, and hands the products to their handlers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakIdKeyDictionary

from fmaq.emulation.calls import current_call, handling, refuse_compilation
from fmaq.emulation.handlers import ATEN, HANDLERS, Met

KNOWN_NAMESPACES = ("prim", "prims")


class EmulationMode(TorchFunctionMode):
    """Computes matrix products as the rule of the module that calls them wants; everything else passes through.

    Meanwhile it learns which tensors are weights: parameters, and whatever is computed from weights alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self._weights = WeakIdKeyDictionary()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = _handler(func)
        if handler is not None:
            refuse_compilation()
        call = current_call() if handler is not None else None
        if handler is not None and call is not None:
            with handling():
                return handler(Met(call, func, args, kwargs, self.is_weight, self))
        result = func(*args, **kwargs)
        if isinstance(result, Tensor):
            self._learn(result, args)
        elif isinstance(result, (tuple, list)):
            for part in result:
                if isinstance(part, Tensor):
                    self._learn(part, args)
        return result

    def is_weight(self, x: Tensor) -> bool:
        """A parameter, or computed from parameters alone."""
        return isinstance(x, nn.Parameter) or x in self._weights

    def _learn(self, result: Tensor, args: tuple[Any, ...]) -> None:
        found = False
        for arg in args:
            for x in arg if isinstance(arg, (tuple, list)) else (arg,):
                if isinstance(x, Tensor):
                    if not self.is_weight(x):
                        return
                    found = True
        if found:
            self._weights[result] = True


@functools.lru_cache(maxsize=4096)
def _handler(func: Callable[..., Any]) -> Callable[[Met], Any] | None:
    """What computes a function under emulation; None where it holds no matrix product."""
    if func in HANDLERS:
        return HANDLERS[func]
    if isinstance(func, (OpOverload, OpOverloadPacket)):
        namespace, operator = str(func).split(".")[:2]
        if namespace == "aten":
            return ATEN.get(operator)
        if namespace not in KNOWN_NAMESPACES:
            return functools.partial(_unknown, name=f"{namespace}::{operator}")
    return None


def _unknown(met: Met, name: str) -> Any:
    """A custom operator may hold a product: it is named, and left to itself."""
    return met.not_covered(name, "what a custom operator computes is unknown")
