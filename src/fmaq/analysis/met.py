"""What a run of a model met, beside its products: which modules and weights took part, and what was left to chance."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_pre_hook
from torch.overrides import TorchFunctionMode

from fmaq.emulation.products import listening


class Met(TorchFunctionMode):
    """Listens inside a `with` block.

    Attributes:
        products: of attached modules, each by the module's full name, kind and index.
        modules: that were called.
        weights: identities of the parameters that any function was given.
        by_mode: what was computed as in training, in words.
    """

    def __init__(self) -> None:
        super().__init__()
        self.products: set[tuple[str, str, int]] = set()
        self.modules: set[nn.Module] = set()
        self.weights: set[int] = set()
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
        if name != "__get__":  # of a weight's dtype, say, which computes nothing
            self.weights.update(id(x) for x in _parameters((args, kwargs)))
            self._note_mode(name, args, kwargs)
        return func(*args, **kwargs)

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


def own_weights(module: nn.Module) -> list[nn.Parameter]:
    """Parameters of at least two dimensions, which a product may have as an operand."""
    return [parameter for parameter in module.parameters(recurse=False) if parameter.dim() >= 2]


def _parameters(given: Any) -> Iterable[nn.Parameter]:
    if isinstance(given, nn.Parameter):
        yield given
    elif isinstance(given, (tuple, list, Mapping)) and not isinstance(given, Tensor):
        for part in given.values() if isinstance(given, Mapping) else given:
            yield from _parameters(part)
