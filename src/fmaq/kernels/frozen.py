"""Tensors that are promised not to change: what is made of one, or found out about it, is made and found out once.

A tensor is known by its storage, its place in that, and torch's count of the writes into it. So an ordinary write, such
as an optimizer's, is noticed, and so is a storage that takes another's place. A write that torch does not count is not:
through `.data`, NumPy or another library. That none happens is the promise.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn import Parameter

T = TypeVar("T")


class Store:
    """Storages, each with a tensor that keeps it, and what was made of their tensors, with the count of writes then."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        # Of what was made in inference mode, torch counts no writes.
        self.storages = {_storage(x): x for x in tensors if _is_ordinary(x) and not x.is_inference()}
        self._made: dict[Hashable, tuple[int, Any]] = {}

    def once(self, x: Tensor, how: Hashable, make: Callable[[], T]) -> T:
        """`make()`, or what it gave before in the same way of the same tensor. Tensors that it gives are frozen."""
        key = _storage(x), x.storage_offset(), x.shape, x.stride(), how
        writes = 0 if x.is_inference() else x._version
        known = self._made.get(key)
        if known is None or known[0] != writes:
            known = self._made[key] = writes, make()
            self.storages |= {_storage(y): y for y in _tensors(known[1])}
        made: Any = known[1]
        if isinstance(made, Tensor):
            return made.detach()  # type: ignore[return-value]
        return tuple(y.detach() for y in made) if _tensors(made) else made  # type: ignore[return-value]


_stores: list[Store] = []


@contextmanager
def freezing(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Promise that tensors do not change in a `with` block, in any thread."""
    store = Store(tensors)
    _stores.append(store)
    try:
        yield
    finally:
        _stores.remove(store)


def store_of(x: Tensor) -> Store | None:
    """Where what is made of a frozen tensor is kept; None of any other.

    None, too, where gradients are recorded, which what is made would be part of, and while a function is compiled,
    whose code may write into what it is given by an operator.
    """
    if not _stores or torch.compiler.is_compiling() or torch.is_grad_enabled() or not _is_ordinary(x):
        return None
    storage = _storage(x)
    return next((store for store in _stores if storage in store.storages), None)


def _is_ordinary(x: Tensor) -> bool:
    is_plain = type(x) in (Tensor, Parameter) and x.is_cpu and x.layout == torch.strided
    return is_plain and not torch._C._functorch.is_functorch_wrapped_tensor(x)


def _storage(x: Tensor) -> int:
    return x.untyped_storage().data_ptr()


def _tensors(made: Any) -> tuple[Tensor, ...]:
    parts = made if type(made) is tuple else (made,)
    return tuple(part for part in parts if isinstance(part, Tensor))
