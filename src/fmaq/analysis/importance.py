"""What an error of each channel's sums matters to the model's output: `calibrate`'s `importance`."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from fmaq.analysis.batches import call
from fmaq.emulation.attach import attached
from fmaq.emulation.coverage import undisturbed
from fmaq.emulation.policy import Policy
from fmaq.emulation.products import Place, Request, choosing
from fmaq.emulation.rule import FP32, Rule

Scalar = Callable[[Any], Tensor]
"""Of a model's output, a scalar: a loss, or one of the two below."""


def likelihood(output: Any) -> Tensor:
    """The log-probability of classes drawn from the logits themselves, (…, classes): no labels are needed.

    The expected square of its gradient is Fisher's information: by how much an error changes the distribution.
    """
    logits = _first(output).float()
    drawn = torch.distributions.Categorical(logits=logits.detach()).sample()
    return nn.functional.log_softmax(logits, -1).gather(-1, drawn[..., None]).sum()


def projection(output: Any) -> Tensor:
    """The sum of the output's numbers, each with a sign at random: on average, errors of all of them matter alike."""
    x = _first(output).float()
    return (x * torch.randint_like(x, 0, 2).mul(2).sub(1)).sum()


def scalar_named(name: str | None) -> Scalar | None:
    """One of the two above by its name; None for none.

    Raises:
        ValueError: there is no such.
    """
    scalars: dict[str | None, Scalar | None] = {None: None, "likelihood": likelihood, "projection": projection}
    if name not in scalars:
        raise ValueError(f'importance must be "likelihood" or "projection", got {name!r}')
    return scalars[name]


def gradients(model: nn.Module, policy: Policy, batches: Sequence[Any], scalar: Scalar) -> dict[Place, Tensor]:
    """The sum of squares of a scalar's gradient by each channel's sums, or each head's, of every product, in float32.

    Raises:
        ValueError: the scalar is none, or depends on no product.
    """
    found = _Gradients()
    with undisturbed(model), torch.enable_grad(), attached(model, policy, may_be_template=True), choosing(found):
        torch.manual_seed(0)
        for batch in batches:
            value = scalar(call(model, batch))
            if not (isinstance(value, Tensor) and value.numel() == 1 and value.requires_grad):
                raise ValueError(f"importance must give one number that depends on the model's output, got {value!r}")
            torch.autograd.grad(value, found.zero)
    return found.squares


@dataclass
class _Gradients:
    """Adds a zero to the results of all products, which float32 computes, and learns the gradients by them."""

    squares: dict[Place, Tensor] = field(default_factory=dict)
    zero: Tensor = field(default_factory=lambda: torch.zeros((), requires_grad=True))

    def ranged(self, place: Place, request: Request, rule: Rule) -> Rule:
        return replace(rule, accumulator=FP32)

    def choose(self, place: Place, request: Request, rule: Rule) -> Rule:
        raise AssertionError("float32 sums have no accumulator to choose")

    def computed(self, place: Place, request: Request, result: Tensor) -> Tensor:
        def learn(gradient: Tensor) -> None:
            squares = _of_groups(request, gradient.double().square())
            before = self.squares.get(place)
            if before is None or before.shape == squares.shape:
                self.squares[place] = squares if before is None else before + squares

        result = result + self.zero
        result.register_hook(learn)
        return result


def _of_groups(request: Request, squares: Tensor) -> Tensor:
    """Sums by channel where the product has a weight, else by head, (heads, 1), where it has several; else of all."""
    first, second = request.operands
    if request.is_weight[1]:
        if second.dim() == 1:
            return squares.sum().reshape(1)
        channel = 1 if request.kind.startswith("conv") and squares.dim() == first.dim() == second.dim() else -1
        return squares.movedim(channel, -1).flatten(0, -2).sum(0) if squares.dim() > 1 else squares
    if second.dim() > 2 and squares.dim() >= 4 and squares.shape[-3] > 1:
        return squares.movedim(-3, -1).flatten(0, -2).sum(0)[:, None]
    return squares.sum()


def _first(output: Any) -> Tensor:
    """The logits of an output, or its first tensor of floating point."""
    logits = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if isinstance(logits, Tensor):
        return logits
    parts = (
        output.values() if isinstance(output, Mapping) else output if isinstance(output, (tuple, list)) else [output]
    )
    for part in parts:
        if isinstance(part, Tensor) and part.is_floating_point():
            return part
    raise ValueError(f"importance finds no floating-point tensor in the model's output, a {type(output).__name__}")
