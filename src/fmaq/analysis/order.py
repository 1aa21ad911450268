"""The order in which a layer sums its input channels: the small ones first, decided once.

A term that is added to a small partial sum loses few of its bits, and truncation shrinks a sum at every step by about
half a unit in its last place, so the longer a sum stays small, the less it loses. Sorting each dot product's terms does
that best and costs a sorter; the order here is fixed for a layer, by the size that each input channel's terms have on
average, which costs an index on the input: in hardware, nothing, where the producer writes its channels in that order.

Measured (docs/results.md): it pays where mantissa is what an accumulator lacks. Orders that balance positive and
negative terms gained less, and the opposite order lost as much as this one gains.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fmaq.emulation import policy_of

ORDER = "reduction_order"
HOOK = "_fmaq_order"
LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
TOLERANCE = 1e-3
"""Of the check after reordering, relative to the largest output: float32 sums in another order differ by far less."""


def reorder(model: nn.Module, *inputs: Any, **kwargs: Any) -> list[str]:
    """Let every linear layer and convolution sum its input channels from the smallest to the largest; in place.

    A channel's size is the root mean square of its inputs times the norm of its weights. The weight is permuted, and a
    hook permutes the layer's input; in float32 the model computes what it did, up to the order of its sums. The order
    is kept as a buffer, `reduction_order`, so that a saved model cannot be loaded without it. Convolutions in groups
    stay as they are, and so do weights shared by several modules (a tied embedding), weights that are computed, and
    layers that the forward does not call.

    Args:
        model: not attached to a policy; call `fmaq.attach` afterwards.
        inputs, kwargs: of its forward: a batch of data like those it will see.

    Returns:
        The names of the layers reordered.

    Raises:
        ValueError: the model is attached, or reordered already.
        RuntimeError: the model's outputs changed, because it uses a layer's weight apart from the layer; they are put
            back first.
    """
    with torch.no_grad():
        orders = {
            name: size.argsort(stable=True).to(_layers(model)[name].weight.device)
            for name, size in channel_sizes(model, *inputs, **kwargs).items()
        }
        before = _outputs(model, inputs, kwargs)
        apply_orders(model, orders)
        try:
            after = _outputs(model, inputs, kwargs)
        except BaseException:
            restore_order(model)
            raise
    for a, b in zip(before, after, strict=True):
        if a.numel() and float((a - b).abs().max()) > TOLERANCE * float(a.abs().max()):
            restore_order(model)
            raise RuntimeError(
                f"{type(model).__name__} uses the weight of one of its layers apart from the layer, so its outputs "
                "change when that is reordered; it is as it was. Leave the layer out: apply_orders takes orders by name"
            )
    return list(orders)


def channel_sizes(model: nn.Module, *inputs: Any, **kwargs: Any) -> dict[str, Tensor]:
    """The size of each input channel's terms, (channels,) in float64, of every layer that can be reordered.

    Args:
        model, inputs, kwargs: as for `reorder`.

    Raises:
        ValueError: the model is attached, or reordered already.
    """
    _check(model)
    squares: dict[str, Tensor] = {}
    counts: dict[str, int] = {}
    layers = _layers(model)
    names = {layer: name for name, layer in layers.items()}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        dim, name = _channel_dim(layer), names[layer]
        x = (args[0] if args else kwargs["input"]).detach().movedim(dim, -1).flatten(0, -2).double()
        squares[name] = squares.get(name, 0) + (x**2).sum(0)
        counts[name] = counts.get(name, 0) + len(x)

    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers.values()]
    try:
        _outputs(model, inputs, kwargs)
    finally:
        for handle in handles:
            handle.remove()
    sizes = {}
    for name, total in squares.items():
        norm = layers[name].weight.detach().double().movedim(1, 0).flatten(1).norm(dim=1)
        sizes[name] = (total / max(counts[name], 1)).sqrt() * norm
    return sizes


def apply_orders(model: nn.Module, orders: Mapping[str, Tensor]) -> None:
    """Let layers sum their input channels in given orders; in place. See `reorder`.

    Args:
        model: not attached.
        orders: a layer's name → a permutation of its input channels: which comes first, second …

    Raises:
        ValueError: the model is attached or reordered already, a name is no layer that can be reordered, or an order
            is no permutation of its channels.
    """
    _check(model)
    layers = _layers(model)
    for name, order in orders.items():
        if name not in layers:
            raise ValueError(f"{name!r} is no layer that can be reordered; there are {', '.join(layers)}")
        channels = layers[name].weight.shape[1]
        if not torch.equal(order.sort().values, torch.arange(channels, device=order.device)):
            raise ValueError(f"the order of {name!r} must be a permutation of its {channels} input channels")
    for name, order in orders.items():
        layer = layers[name]
        layer.register_buffer(ORDER, order)
        layer.weight.data = layer.weight.data.index_select(1, order)
        layer.__dict__[HOOK] = layer.register_forward_pre_hook(_permute, with_kwargs=True)


def restore_order(model: nn.Module) -> None:
    """Undo `reorder`: weights and sums are what they were, bit for bit."""
    for layer in model.modules():
        handle = layer.__dict__.pop(HOOK, None)
        if handle is not None:
            handle.remove()
            order = layer._buffers.pop(ORDER)
            layer.weight.data = layer.weight.data.index_select(1, order.argsort())  # type: ignore[union-attr, operator]


def _permute(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    x, *others = args or (kwargs["input"],)
    x = x.index_select(_channel_dim(layer), layer._buffers[ORDER])
    return ((x, *others), kwargs) if args else ((), {**kwargs, "input": x})


def _channel_dim(layer: nn.Module) -> int:
    """Of a layer's input, from the end: also right without a batch."""
    return -1 if isinstance(layer, nn.Linear) else -layer.weight.dim() + 1  # type: ignore[operator]


def _layers(model: nn.Module) -> dict[str, Any]:
    """The layers that can be reordered, by name."""
    owners: dict[Tensor, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners[parameter] = owners.get(parameter, 0) + 1
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, LAYERS)
        and getattr(module, "groups", 1) == 1
        and owners.get(module._parameters.get("weight")) == 1  # type: ignore[arg-type]
    }


def _check(model: nn.Module) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"an order of summation is that of a torch.nn.Module's layers, got {type(model).__name__}")
    if any(policy_of(module) is not None for module in model.modules()):
        raise ValueError("the model is attached to a policy: reorder it first, then call fmaq.attach")
    if any(HOOK in module.__dict__ for module in model.modules()):
        raise ValueError("the model is reordered already; call restore_order(model) before")


def _outputs(model: nn.Module, inputs: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Tensor]:
    """All tensors of numbers in what the model returns, in eval mode."""
    with _evaluating(model), torch.no_grad():
        leaves = tree_leaves(model(*inputs, **kwargs))
    return [x.double() for x in leaves if isinstance(x, Tensor) and x.is_floating_point()]


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
