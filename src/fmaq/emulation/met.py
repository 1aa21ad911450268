"""A function with matrix products in it, as an attached module calls it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from fmaq import ops
from fmaq.emulation.calls import Call
from fmaq.emulation.products import Request, announce, compute, is_heard, why_not
from fmaq.emulation.sizes import CountingMacs


@dataclass
class Met:
    """A function that an attached module calls.

    Attributes:
        call: the module's.
        func, args, kwargs: what it calls.
        is_weight, is_activation: tell weights and activations from constants.
        mode: to be entered again around functions that call others.
        of_weights: the product was of weights alone; true also where torch was left to compute something else.
    """

    call: Call
    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]
    is_weight: Callable[[Tensor], bool]
    is_activation: Callable[[Tensor], bool]
    mode: TorchFunctionMode
    of_weights: bool = False

    def by_torch(self) -> Any:
        """The call as it is."""
        self.of_weights = True
        return self.func(*self.args, **self.kwargs)

    def bind(self, *names: str, **defaults: Any) -> tuple[dict[str, Any], Callable[..., Any]]:
        """The arguments by name (those in `names` are required), and the call again with some of them replaced."""
        bound = {**defaults, **dict(zip((*names, *defaults), self.args, strict=False)), **self.kwargs}
        if "self" in bound:
            bound["input"] = bound.pop("self")

        def again(**replaced: Any) -> Any:
            order = (*names, *defaults)[: len(self.args)]
            args = [replaced.get(name, value) for name, value in zip(order, self.args, strict=True)]
            kwargs = {name: replaced.get("input" if name == "self" else name, v) for name, v in self.kwargs.items()}
            return self.func(*args, **kwargs)

        return bound, again

    def not_covered(self, kind: str, reason: str, macs: int | None = None) -> Any:
        """The call as it is, with the reason announced: the policy's, where that wants nothing else.

        Its multiply-accumulates are, where they are not given, those of torch's kernels in it, if anybody listens.
        """
        given = (*self.args, *self.kwargs.values())
        found = [x for arg in given for x in (arg if isinstance(arg, (tuple, list)) else (arg,))]
        tensors = tuple(x for x in found if isinstance(x, Tensor))
        with CountingMacs() if macs is None and is_heard() else contextlib.nullcontext() as counted:
            result = self.by_torch()
        macs = macs if counted is None else counted.total
        rule = self.call.attachment.rule
        reason = reason if rule is not None and not rule.is_plain else why_not(rule, ()) or reason
        announce(self.call, kind, tensors, reason, macs=macs)
        return result

    def product(
        self, kind: str, a: Tensor, b: Tensor, is_weight: tuple[bool, bool] | None = None, **changes: Any
    ) -> Tensor:
        """The product of two tensors as `torch.matmul` has it."""
        request = Request(
            kind,
            (a, b),
            is_weight or (self.is_weight(a), self.is_weight(b)),
            steps=a.shape[-1] if a.dim() else 1,
            torch_product=torch.matmul,
            emulated_product=ops.matmul,
            is_attention=a.dim() > 2 and a.shape[-1] == 1 and self.may_be_attention(a, b),
        )
        for name, value in changes.items():
            setattr(request, name, value)
        self.of_weights = all(request.is_weight)
        return compute(self.call, request)

    def may_be_attention(self, a: Tensor, b: Tensor) -> bool:
        """A batched product of activations: it may be attention's, and if it has one step, there is one key."""
        return min(a.dim(), b.dim()) > 2 and self.is_activation(a) and self.is_activation(b)
