"""What a run of a model met, beside its products: which modules and weights took part, and what was left to chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fmaq.emulation.products import listening

ABOUT = ("__get__", "size", "dim", "numel", "stride", "__len__", "element_size")
"""Functions that tell of a weight, and compute nothing with it."""
MOST_SLICES = 1024
"""Of a weight, that are told apart."""


class Met(TorchFunctionMode):
    """Listens inside a `with` block.

    Attributes:
        products: of attached modules, each by the module's full name, kind and index.
        modules: that were called.
        weights: identities of the parameters that any function was given.
        slices: of a weight of which functions were given single slices alone (experts, say): which.
        by_mode: what was computed as in training, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: set[tuple[str, str, int]] = set()
        self.modules: set[nn.Module] = set()
        self.weights: set[int] = set()
        self.slices: dict[int, set[int]] = {}
        self.by_mode: set[str] = set()

    @contextmanager
    def running(self) -> Iterator[None]:
        """Listen to functions, products and calls of modules."""
        handle = register_module_forward_pre_hook(lambda module, _: self.modules.add(module))
        try:
            with self, listening(lambda product: self.products.add((product.layer, product.kind, product.index))):
                yield
        finally:
            handle.remove()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name not in ABOUT:
            self._note_weights(name, args, kwargs)
            self._note_mode(name, args, kwargs)
        return func(*args, **kwargs)

    def _note_weights(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        at = _index(args) if name == "__getitem__" else None
        for weight in _parameters((args, kwargs)):
            if at is None:
                self.slices.pop(id(weight), None)
            elif id(weight) not in self.weights or id(weight) in self.slices:
                self.slices.setdefault(id(weight), set()).add(at % len(weight))
            self.weights.add(id(weight))

    def _note_mode(self, name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        if "dropout" in name and kwargs.get("training") and kwargs.get("p", 0) > 0:
            self.by_mode.add(f"dropout (p = {kwargs['p']:g})")
        elif name == "scaled_dot_product_attention" and kwargs.get("dropout_p", 0) > 0:
            self.by_mode.add(f"dropout (p = {kwargs['dropout_p']:g})")
        elif name == "batch_norm" and kwargs.get("training") and args[1] is not None:
            self.by_mode.add("batch norm by each batch's own mean")

    def has_met(self, module: nn.Module) -> bool:
        """The module was called, or a weight of its own took part in something."""
        return module in self.modules or any(id(weight) in self.weights for weight in own_weights(module))

    def unmet_slices(self, weight: nn.Parameter) -> list[int]:
        """Matrices of a stack of them that none of the functions was given, which were given others."""
        met = self.slices.get(id(weight))
        is_stack = weight.dim() >= 3 and len(weight) <= MOST_SLICES
        return [] if met is None or not is_stack else [at for at in range(len(weight)) if at not in met]


def _index(args: tuple[Any, ...]) -> int | None:
    """Of weight[i]: i, where it is a number."""
    i = args[1] if len(args) == 2 else None
    if isinstance(i, Tensor) and i.dim() == 0 and i.dtype in (torch.int32, torch.int64):
        return int(i)
    return i if isinstance(i, int) and not isinstance(i, bool) else None


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of at least two dimensions, which a product may have as an operand."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() >= 2]


def _parameters(given: Any) -> Iterable[nn.Parameter]:
    if isinstance(given, nn.Parameter):
        yield given
    elif isinstance(given, (tuple, list, Mapping)) and not isinstance(given, Tensor):
        for part in given.values() if isinstance(given, Mapping) else given:
            yield from _parameters(part)
