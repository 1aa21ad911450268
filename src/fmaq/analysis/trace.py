"""The products of one forward pass as static analysis wants them: their lengths, weights and input ranges."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fmaq.emulation import Policy, Product, coverage, listening, policy_of
from fmaq.emulation.attach import attached
from fmaq.emulation.operands import is_integer
from fmaq.emulation.rule import RECURRENT_KINDS, Rule
from fmaq.numerics import Accumulator
from fmaq.ops.operands import AccumulatorLike


@dataclass(eq=False)
class TracedProduct:
    """A product that a layer computes, once or several times in the forward.

    Attributes:
        layer: full name of the module whose forward calls it; "" is the model itself.
        kind: "linear", "conv2d", "attention_scores" ...
        steps: products in one dot product, K.
        calls: how often it is computed.
        weight: (channels, K), in the order of summation, as it was multiplied; None where neither operand is a weight.
        weight_format: what the weight was quantized to; None where it was not.
        is_codes: the operands are the codes of an integer engine.
        rule: of the product in the attached policy; None where that leaves it alone.
        low, high: the smallest and the largest value of the other operand.
        is_attached: the model was attached to a policy.
    """

    layer: str
    kind: str
    steps: int
    calls: int
    weight: Tensor | None
    weight_format: str | None
    low: float
    high: float
    rule: Rule | None
    is_attached: bool
    is_codes: bool = False

    @property
    def accumulator(self) -> Accumulator | None:
        """Of the rule; None where that leaves the sums to torch."""
        acc = None if self.rule is None else self.rule.accumulator
        return acc if isinstance(acc, Accumulator) else None


def traced_products(
    model: nn.Module, *inputs: Any, given: AccumulatorLike | None = None, **kwargs: Any
) -> list[TracedProduct]:
    """Run a model once, and list its products in the order of their first calls; those of one step are left out.

    An attached model runs as it is, its operands quantized and its sums emulated; another one runs in float32. Nothing
    of it is changed.

    Args:
        model: any module.
        inputs, kwargs: of its forward.
        given: an accumulator to be asked about in place of the attached ones. One that sums integers meets the codes of
            operands that the attached policy quantizes to integers, and runs in the place of the policy's own.

    Raises:
        TypeError: `model` is no module.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"the analysis of a model takes a torch.nn.Module, got {type(model).__name__}")
    found: dict[tuple[Any, ...], TracedProduct] = {}
    is_attached = any(policy_of(module) is not None for module in model.modules())
    with _run_as(model, given), listening(lambda product: _note(product, found, is_attached)):
        coverage(model, *inputs, **kwargs)
    return list(found.values())


def _run_as(model: nn.Module, given: AccumulatorLike | None) -> AbstractContextManager[None]:
    """The model attached as it is; to nothing, where it is not; or to an accumulator that sums integers."""
    policy = policy_of(model)
    if given is not None and policy is not None and is_integer(Accumulator.parse(given)):
        return attached(model, policy.replace(accumulator=given))
    is_attached = any(policy_of(module) is not None for module in model.modules())
    return nullcontext() if is_attached else attached(model, Policy())


def _note(product: Product, found: dict[tuple[Any, ...], TracedProduct], is_attached: bool) -> None:
    if product.steps is None or product.steps <= 1:
        return
    weight = _weight(product)
    other = product.operands[0]
    low, high = (0.0, 0.0) if other.numel() == 0 or other.is_meta else map(float, torch.aminmax(other.float()))
    key = (product.layer, product.kind, product.index, product.steps)
    if key not in found:
        about = (product.layer, product.kind, product.steps, 1)
        weight_format = product.formats[1] if len(product.formats) > 1 else None
        found[key] = TracedProduct(
            *about, weight, weight_format, low, high, product.rule, is_attached, product.scale is not None
        )
        return
    known = found[key]
    known.calls += 1
    known.low, known.high = min(known.low, low), max(known.high, high)


def _weight(product: Product) -> Tensor | None:
    """The second operand as (channels, K), where it is a weight."""
    rows = _ROWS.get(product.kind)
    second = product.operands[1]
    if rows is not None:
        return rows(second.detach(), product.options)
    if isinstance(second, nn.Parameter) and second.dim() == 2:
        return second.detach().t()
    return None


def _transposed_rows(weight: Tensor, options: dict[str, Any]) -> Tensor:
    """(C, O/groups, *kernel) as the weight of the convolution that a transposed one is."""
    spatial, groups = list(range(2, weight.dim())), options["groups"]
    grouped = weight.flip(spatial).unflatten(0, (groups, -1)).transpose(1, 2)
    return grouped.flatten(0, 1).flatten(1)


def _rows(weight: Tensor, options: dict[str, Any]) -> Tensor:
    return weight[None] if weight.dim() == 1 else weight.flatten(1)


_ROWS: dict[str, Callable[[Tensor, dict[str, Any]], Tensor]] = {
    **dict.fromkeys(("linear", *RECURRENT_KINDS), _rows),
    **{f"conv{d}d": _rows for d in (1, 2, 3)},
    **{f"conv_transpose{d}d": _transposed_rows for d in (1, 2, 3)},
}


def accumulator_of(product: TracedProduct, given: AccumulatorLike | None) -> Accumulator | None:
    """The accumulator given in place of all, or the product's own; None where the attached policy leaves it to torch.

    Raises:
        ValueError: none is given, and the model is attached to none.
    """
    if given is not None:
        return Accumulator.parse(given)
    if not product.is_attached:
        raise ValueError('the model is attached to no policy: give an accumulator, such as accumulator="M7E4"')
    return product.accumulator
