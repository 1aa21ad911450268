"""The mode that meets every torch function while an attached module runs, and hands the products to their handlers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload, OpOverloadPacket
from torch.utils.weak import WeakIdKeyDictionary

from fmaq.emulation.calls import ModelMode, current_call, handling, refuse_compilation
from fmaq.emulation.handlers import ATEN, HANDLERS, Met

KNOWN_NAMESPACES = ("prim", "prims")
INDEX_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

SHAPED_LIKE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
"""Functions that take no more than a shape or a type from their second argument."""

FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
"""Functions that make a tensor of data, which may be an input's: what a tokenizer gives, say."""


class EmulationMode(ModelMode):
    """Computes matrix products as the rule of the module that calls them wants; everything else passes through.

    Meanwhile it learns which tensors are weights, so that `x @ w` has a weight in it as `F.linear(x, w)` has by
    definition: parameters, buffers of the model that is called (a frozen weight, a pruning mask), and whatever is
    computed from weights and constants alone, products too. A constant is what the forward makes without being given a
    tensor (`torch.arange(n)`, a number), and an attribute of a module that is an index, a mask or a number. An unknown
    tensor is an activation, and so is all that one takes part in: `self.table[ids]`, or a running mean times an input.
    What a function writes into becomes what it wrote. Outputs of linear layers, convolutions and attention are
    activations, whatever goes in.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model)
        self._is_weight = WeakIdKeyDictionary()  # of what is no activation: a weight, or else a constant
        for module in model.modules():
            for value in vars(module).values():
                if isinstance(value, Tensor) and (value.dim() == 0 or value.dtype in INDEX_DTYPES):
                    self._is_weight[value] = False
        for buffer in model.buffers():
            self._is_weight[buffer] = True

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
        may_be_weight = True
        if handler is not None and call is not None:
            met = Met(call, func, args, kwargs, self.is_weight, self)
            with handling():
                result = handler(met)
            may_be_weight = met.of_weights
        else:
            result = func(*args, **kwargs)
        self._learn(func, result, args, kwargs, may_be_weight)
        return result

    def is_weight(self, x: Tensor) -> bool:
        """A parameter, a buffer, or computed from those and constants alone."""
        return self._role(x) is True

    def _role(self, x: Tensor) -> bool | None:
        """True of a weight, False of a constant, None of an activation."""
        return True if isinstance(x, nn.Parameter) else self._is_weight.get(x)

    def _learn(
        self,
        func: Callable[..., Any],
        result: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        may_be_weight: bool,
    ) -> None:
        changed = list(_tensors(args[:1] if result is None else result))  # None: x[i] = y, x.data = y
        if not changed:
            return
        given = list(_tensors(args[:1] if func in SHAPED_LIKE else (args, kwargs)))
        roles = [self._role(x) for x in given]
        is_known = may_be_weight and None not in roles
        for x in changed:
            if is_known and (given or func not in FROM_DATA or x.dim() == 0):
                self._is_weight[x] = any(roles)
                continue
            is_written = any(x is other for other in given)
            for y in (x, x._base) if is_written else (x,):
                if y is not None:
                    self._is_weight.pop(y, None)


def _tensors(given: Any) -> Iterator[Tensor]:
    """The tensors in arguments or results, however deep in tuples, lists and mappings."""
    if isinstance(given, Tensor):
        yield given
    elif isinstance(given, (tuple, list, Mapping)):
        for part in given.values() if isinstance(given, Mapping) else given:
            yield from _tensors(part)


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
