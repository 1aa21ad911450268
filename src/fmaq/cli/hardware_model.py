"""`fmaq hardware model`: the products of a recipe's model, recorded as it runs, as plain data for `fmaq.hardware`."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fmaq.emulation import attach, detach, listening
from fmaq.hardware.layers import FLOAT32, Layer
from fmaq.hardware.streams import MAX_STEPS, Streams, of_layer
from fmaq.training.progress import Bars
from fmaq.training.run import prepare
from fmaq.training.tasks import evaluate

if TYPE_CHECKING:
    from fmaq.emulation import Product
    from fmaq.training.recipe import Recipe

ROWS = 64
"""Rows of activations that are kept of a layer's first call."""


@dataclass(frozen=True)
class Recording:
    """A model's layers, in the order of their first products, and the examples that the operations are counted over."""

    layers: list[Layer]
    examples: int


def record_model(recipe: Recipe, weight: str = "M4E3", activation: str = "M4E3") -> Recording:
    """Run a recipe's model on its first test examples, attached to its policy.

    Args:
        recipe: its data's `limit` says how many examples.
        weight, activation: formats where the policy leaves operands in float32: what hardware would be built for.
    """
    ready = prepare(recipe, bars=Bars(False))
    found: dict[tuple[str, str], Layer] = {}

    def hear(product: Product) -> None:
        key = (product.layer, product.kind)
        macs = product.macs or 0
        if key in found:
            found[key] = replace(found[key], macs=found[key].macs + macs)
            return
        rule = product.rule
        emulated = rule is not None and product.reason is None
        name = product.layer if product.kind in ("linear", "conv2d") else f"{product.layer} {product.kind}".strip()
        found[key] = Layer(
            name=name or "(model)",
            macs=macs,
            accumulator=str(rule.accumulator) if emulated and rule is not None else "fp32",
            weight=(rule.weight if rule is not None else None) or weight,
            activation=(rule.activation if rule is not None else None) or activation,
            streams=_streams(product),
        )

    attach(ready.model, ready.policy)
    try:
        with listening(hear):
            evaluate(ready.model, ready.test, ready.task, batch_size=recipe.data.batch_size, progress=False)
    finally:
        detach(ready.model)
    if not any(layer.accumulator not in ("fp32", FLOAT32) for layer in found.values()):
        raise ValueError("the recipe's policy emulates nothing: give it an accumulator, or -a paper12")
    return Recording(list(found.values()), len(ready.test))


def _streams(product: Product) -> Streams | None:
    """The operands as rows of a matrix product, where that is plain to see; None otherwise."""
    pair = _rows(product)
    if pair is None or 0 in (*pair[0].shape, *pair[1].shape):
        return None
    a, b = (x.detach()[:, :MAX_STEPS].double().cpu().numpy() for x in pair)
    return of_layer(product.layer or product.kind, a, b)


def _rows(product: Product) -> tuple[Tensor, Tensor] | None:
    x, w = product.operands[:2]
    if product.kind == "linear":
        return _spread(x.reshape(-1, x.shape[-1])), w.reshape(-1, w.shape[-1])
    if product.kind == "conv2d" and product.options.get("groups", 1) == 1 and x.dim() == 4:
        options = product.options
        padding = options.get("padding", 0)
        if isinstance(padding, str):
            return None
        columns = torch.nn.functional.unfold(
            x[:1].float(),
            w.shape[-2:],
            dilation=options.get("dilation", 1),
            padding=padding,
            stride=options.get("stride", 1),
        )
        return _spread(columns[0].T), w.flatten(1)
    if product.kind == "matmul" and x.dim() >= 2 and w.dim() >= 2:
        return _spread(x.reshape(-1, *x.shape[-2:])[0]), w.reshape(-1, *w.shape[-2:])[0].T
    return None


def _spread(rows: Tensor) -> Tensor:
    """Some of the rows, evenly from the first to the last."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), ROWS)).long()]
