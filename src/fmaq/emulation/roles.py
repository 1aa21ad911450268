"""Which tensors of a forward are weights, and which activations: learnt from every torch function that it calls."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Mapping
from enum import IntEnum
from itertools import chain
from operator import methodcaller
from typing import Any

import torch
from torch import Tensor, nn

INDEX_DTYPES = (torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)

SHAPED_LIKE = {Tensor.to, Tensor.type_as, Tensor.expand_as, Tensor.view_as, Tensor.reshape_as}
"""Functions that take no more than a shape or a type from their second argument."""

FROM_DATA = {torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer}
"""Functions that make a tensor of data, which may be an input's: what a tokenizer gives, say."""


SIMPLE = (int, float, str, type(None), torch.dtype, torch.device)
"""Of arguments that hold no tensor, told before an abstract class is asked."""

VALUES = methodcaller("values")


class Role(IntEnum):
    """What a tensor is; what is computed from several is the greatest of theirs."""

    CONSTANT = 0
    WEIGHT = 1
    UNKNOWN = 2
    ACTIVATION = 3


class _Known:
    """Roles by tensors, which are not kept alive; asked for every argument of every function, so a plain `dict`."""

    def __init__(self) -> None:
        self._roles: dict[int, tuple[weakref.ref[Tensor], Role]] = {}

    def get(self, x: Tensor) -> Role | None:
        """Its role, if it is noted."""
        found = self._roles.get(id(x))
        return found[1] if found is not None and found[0]() is x else None

    def __setitem__(self, x: Tensor, role: Role) -> None:
        key, roles = id(x), self._roles

        def forget(reference: weakref.ref[Tensor]) -> None:
            if roles.get(key, (None,))[0] is reference:
                del roles[key]

        roles[key] = weakref.ref(x, forget), role

    def activations(self) -> list[Tensor]:
        """Those that are still alive."""
        found = [reference() for reference, role in list(self._roles.values()) if role is Role.ACTIVATION]
        return [x for x in found if x is not None]


_known_before: weakref.WeakKeyDictionary[nn.Module, _Known] = weakref.WeakKeyDictionary()
"""Of each model's last forward."""


class Roles:
    """The roles of the tensors of one forward of a model.

    `x @ w` is to have a weight in it as `F.linear(x, w)` has by definition. Weights are parameters, what a module has
    in a parameter's or a buffer's place when it is used (a frozen weight, a pruning mask, a tensor that was offloaded,
    or that `functional_call` puts there), and whatever is computed from weights and constants alone, products too. A
    constant is what the forward makes without being given a tensor (`torch.arange(n)`, a number), and an attribute of a
    module that is an index, a mask or a number. Activations are the model's inputs, the outputs of linear layers,
    convolutions, attention and other products, and all that one of these takes part in: `self.table[ids]`, or a running
    mean times an input. What a function writes into becomes what it wrote. A tensor of which nothing is known is
    quantized as an activation, unless it comes into a buffer's place. What is left of the activations of the forward
    before, such as keys and values in a cache, are activations, unless they are in a buffer's place by now.
    """

    def __init__(self, model: nn.Module) -> None:
        self._known = _Known()
        self._registered: list[Mapping[str, Tensor | None]] = []
        for module in model.modules():
            self._registered += [module._parameters, module._buffers]
            for value in vars(module).values():
                if isinstance(value, Tensor) and (value.dim() == 0 or value.dtype in INDEX_DTYPES):
                    self._known[value] = Role.CONSTANT
        self._take_over(_known_before.get(model))
        _known_before[model] = self._known

    def _take_over(self, before: _Known | None) -> None:
        """Note what is left of the activations of a forward before."""
        left = [] if before is None else before.activations()
        registered = set(self._registered_ids()) if left else set()
        for x in left:
            if id(x) not in registered and self._known.get(x) is None:
                self._known[x] = Role.ACTIVATION

    def is_weight(self, x: Any) -> bool:
        """A weight, or something that is no tensor and holds tensors that are weights."""
        return self.of(x) is Role.WEIGHT

    def is_activation(self, x: Any) -> bool:
        """An activation, or something of which nothing is known: neither a weight nor a constant."""
        return self.of(x) > Role.WEIGHT

    def of(self, given: Any) -> Role:
        """The role of a tensor, or of what is computed from those in arguments."""
        return self._greatest(tensors_in(given))

    def _greatest(self, tensors: Iterable[Tensor]) -> Role:
        return max(map(self._of, tensors), default=Role.CONSTANT)

    def _of(self, x: Tensor) -> Role:
        if type(x) is nn.Parameter or (type(x) is not Tensor and isinstance(x, nn.Parameter)):
            return Role.WEIGHT
        role = self._known.get(x)
        if role is None:
            role = Role.UNKNOWN
        if role is Role.ACTIVATION or role is Role.WEIGHT:
            return role
        if self._is_registered(x):
            role = self._known[x] = Role.WEIGHT
        return role

    def _is_registered(self, x: Tensor) -> bool:
        """It stands in a parameter's or a buffer's place now."""
        return id(x) in self._registered_ids()

    def _registered_ids(self) -> Iterable[int]:
        """Of what does; asked often, of all that a model has."""
        return map(id, chain.from_iterable(map(VALUES, filter(None, self._registered))))

    def set(self, x: Tensor, role: Role) -> None:
        """Note what a tensor is."""
        self._known[x] = role

    def note_inputs(self, given: Any) -> None:
        """Note the inputs of the model: activations, unless they are weights of its own."""
        for x in tensors_in(given):
            if self._of(x) is Role.UNKNOWN:
                self._known[x] = Role.ACTIVATION

    def learn(
        self,
        func: Callable[..., Any],
        result: Any,
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
        is_activation: bool,
    ) -> None:
        """Note what a function made or changed; `is_activation`: it gives activations, whatever it is given."""
        changed = tensors_in(args[:1] if result is None else result)  # None: x[i] = y, x.data = y
        if not changed:
            return
        if is_activation and all(x._base is None for x in changed):
            for x in changed:
                self._known[x] = Role.ACTIVATION
            return
        given = tensors_in(args[:1] if func in SHAPED_LIKE else (args, kwargs) if kwargs else args)
        role = Role.ACTIVATION if is_activation else self._greatest(given)
        for x in changed:
            is_of_data = not given and func in FROM_DATA and x.dim() > 0
            self._known[x] = Role.UNKNOWN if is_of_data else role
            if role > Role.WEIGHT and x._base is not None and any(x is other for other in given):
                self._known[x._base] = role


def tensors_in(given: Any) -> list[Tensor]:
    """The tensors in arguments or results, however deep in tuples, lists and mappings."""
    if isinstance(given, Tensor):
        return [given]
    if isinstance(given, (tuple, list)):
        parts: Iterable[Any] = given
    elif not isinstance(given, SIMPLE) and isinstance(given, Mapping):
        parts = given.values()
    else:
        return []
    found: list[Tensor] = []
    for part in parts:
        if isinstance(part, Tensor):
            found.append(part)
        elif not isinstance(part, SIMPLE):
            found += tensors_in(part)
    return found
