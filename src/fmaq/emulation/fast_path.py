"""What torch's fast path of transformer encoders does, kept where the modules are attached.

In eval mode, without gradients, `nn.TransformerEncoder`, its layers and `nn.MultiheadAttention` call one fused kernel,
unless they see a hook or a torch function mode: an attached module shows both. Where nothing in such a module is
emulated, its output is that of a copy without our hooks, outside of the mode: torch's own bits. And where something is,
the one thing that the fast path changes by more than rounding is done too: a `TransformerEncoder` that packs its input
by its padding mask gives zeros at the padded positions.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from fmaq.emulation import calls
from fmaq.emulation.calls import STATE, Attachment

FAST = (nn.TransformerEncoder, nn.TransformerEncoderLayer, nn.MultiheadAttention)
HOOKS = ("_forward_hooks", "_forward_pre_hooks")
Finish = Callable[[Any], Any]


def finish(module: nn.Module, attachment: Attachment, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Finish | None:
    """What is to be done to the output of a module whose forward begins; None for nothing."""
    if not isinstance(module, FAST) or module.training or not _may_be_fast(module):
        return None
    if _is_plain(module):
        if any(isinstance(call.finish, _Replaced) for call in calls.running()):
            return None
        with torch._C.DisableTorchFunction():
            return _Replaced(_unhooked(module).forward(*args, **kwargs))
    padding = kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None)
    if isinstance(module, nn.TransformerEncoder) and padding is not None and _packs(module, args, kwargs):
        return lambda output: _with_zeros(module, output, padding)
    return None


@dataclass(frozen=True, eq=False)
class _Replaced:
    """Puts an output in the place of the forward's own."""

    output: Any

    def __call__(self, _: Any) -> Any:
        return self.output


def _may_be_fast(module: nn.Module) -> bool:
    """Torch's classes alone are inside, no others' hooks, and no gradient is wanted: a second forward does no harm."""
    if not torch.backends.mha.get_fastpath_enabled():
        return False
    if torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()):
        return False
    return all(type(m).__module__.startswith("torch.nn.") and not _other_hooks(m) for m in module.modules())


def _other_hooks(module: nn.Module) -> int:
    _, handles = module.__dict__.get(STATE, (None, ()))
    return sum(len(getattr(module, name)) for name in HOOKS) - len(handles)


def _is_plain(module: nn.Module) -> bool:
    """Nothing inside is emulated."""
    states = [m.__dict__.get(STATE) for m in module.modules()]
    return all(state is not None and state[0].is_plain for state in states)


def _unhooked(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers, without hooks."""
    copy = module.__new__(type(module))
    copy.__dict__ = module.__dict__ | {name: OrderedDict() for name in HOOKS}
    copy._modules = {name: child and _unhooked(child) for name, child in module._modules.items()}
    return copy


class _Packs(BaseException):
    """The encoder packs its input by its padding mask."""


class _DoesNotPack(BaseException):
    """It does not: it goes on to its layers."""


class _UntilItPacks(TorchDispatchMode):
    """Stops an encoder as soon as it is known whether it packs its input."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name == "_nested_tensor_from_mask":
            raise _Packs
        if "linear" in name or "mm" in name or "norm" in name or "attention" in name:
            raise _DoesNotPack
        return func(*args, **(kwargs or {}))


def _packs(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether torch itself would take the fast path with a packed input."""
    try:
        with torch._C.DisableTorchFunction(), _UntilItPacks():
            _unhooked(module).forward(*args, **kwargs)
    except _Packs:
        return True
    except _DoesNotPack:
        pass
    return False


def _with_zeros(module: nn.Module, output: Tensor, padding: Tensor) -> Tensor:
    """Zeros at the padded positions, or what the last norm makes of zeros."""
    filling = output.new_zeros(1, 1, output.shape[-1])
    if isinstance(module.norm, nn.Module):
        filling = module.norm(filling)
    return torch.where(padding.bool()[..., None], filling, output)
