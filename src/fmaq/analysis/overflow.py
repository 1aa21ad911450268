"""A table of which output channels of a model cannot overflow, whatever the input, and what would prove the others."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn

from fmaq.analysis.bounds import ChannelBounds, RangeLike, channel_bounds, input_range
from fmaq.analysis.columns import in_columns
from fmaq.analysis.trace import TracedProduct, accumulator_of, traced_products
from fmaq.numerics import Accumulator
from fmaq.ops.columns import Columns
from fmaq.ops.operands import AccumulatorLike

INTEGER_CODES = re.compile(r"u?int(\d+)")
NO_WEIGHT = "no operand is a weight"
NOT_FINITE = "an input is not finite"


@dataclass(frozen=True, eq=False)
class OverflowRow:
    """One product of a layer.

    Attributes:
        layer: full name of the module; "" is the model itself.
        product: "linear", "conv2d", "attention_scores" ...
        steps: products in one dot product, K.
        low, high: range of the inputs that the bounds hold for.
        bounds: of its channels; None where nothing can be proven.
        reason: why not; "" where it can.
    """

    layer: str
    product: str
    steps: int
    low: float
    high: float
    bounds: ChannelBounds | None
    reason: str

    @property
    def channels(self) -> int:
        """How many there are; 0 where nothing can be proven."""
        return 0 if self.bounds is None else len(self.bounds.proven)

    @property
    def proven(self) -> int:
        """In how many no input in the range overflows anything."""
        return 0 if self.bounds is None else int(self.bounds.proven.sum())

    @property
    def bias(self) -> int | None:
        """The largest bias of the partial sums' float format that is proven for all channels."""
        return _extreme(self.bounds and self.bounds.biases, min)

    @property
    def product_bias(self) -> int | None:
        """The same of the products' format."""
        return _extreme(self.bounds and self.bounds.product_biases, min)

    @property
    def outer_biases(self) -> tuple[int | None, ...]:
        """The same of each outer level's format, the innermost first; None of fixed formats and float32."""
        return () if self.bounds is None else tuple(_extreme(biases, min) for biases in self.bounds.outer_biases)

    @property
    def width(self) -> int | None:
        """The least width of the partial sums' fixed format that is proven for all channels."""
        return _extreme(self.bounds and self.bounds.widths, max)


def _extreme(values: Any, choose: Any) -> int | None:
    return None if values is None or len(values) == 0 else int(choose(values.tolist()))


class OverflowTable:
    """A row a product, in the order of the forward pass. It prints itself."""

    def __init__(self, rows: list[OverflowRow]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[OverflowRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def channels(self) -> int:
        """Of all products that have weights."""
        return sum(row.channels for row in self.rows)

    @property
    def proven(self) -> int:
        """In how many of them no input in its range overflows anything."""
        return sum(row.proven for row in self.rows)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain mappings, bounds as their numbers of channels and what proves all of them."""
        about = ("layer", "product", "steps", "low", "high", "channels", "proven")
        names = (*about, "bias", "product_bias", "outer_biases", "width")
        return [{name: getattr(row, name) for name in (*names, "reason")} for row in self.rows]

    def headings(self) -> tuple[str, ...]:
        """Of the columns that `cells` fills."""
        return ("layer", "product", "K", "inputs", "proven", "proves all", "not analysed")

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text."""
        return [_cells(row) for row in self.rows]

    def total(self) -> str:
        """A line that sums up."""
        return f"{self.proven} of {self.channels} channels cannot overflow"

    def __str__(self) -> str:
        return "\n".join([in_columns(self.headings(), self.cells()), self.total()])

    __repr__ = __str__


def overflow_bounds(
    model: nn.Module,
    *inputs: Any,
    accumulator: AccumulatorLike | None = None,
    input_max: RangeLike | Mapping[str, RangeLike] | None = None,
    **kwargs: Any,
) -> OverflowTable:
    """Which channels of a model's products cannot overflow, and the bias or width that would prove the rest.

    Weights are taken as they are multiplied: quantized, if the model is attached to a policy that says so, and with the
    policy's offsets, if its accumulators are taken. Of an integer engine (an accumulator without a fraction, a policy
    with integer operands) all is of codes. So it is with integer codes as range ("int8"), whatever the accumulator.

    Args:
        model: any module, attached or not.
        inputs, kwargs: of its forward.
        accumulator: of every product, in place of the attached policy's; biases may be left out (`"M7E4"`).
        input_max: the range of every product's input, see `channel_bounds`, or by globs over layers' names, of which
            the first that matches counts. None, or a layer that no glob names: the range seen in this forward pass, and
            the proof then holds for that range alone.

    Raises:
        TypeError, ValueError: no accumulator is given, nor attached; a range is none; or a glob names no layer.
    """
    traced = traced_products(model, *inputs, given=accumulator, **kwargs)
    if isinstance(input_max, Mapping):
        for glob in input_max:
            if not any(fnmatchcase(product.layer, glob) for product in traced):
                names = ", ".join(dict.fromkeys(product.layer for product in traced))
                raise ValueError(f"input_max: {glob!r} matches no layer with products; there are {names}")
    rows = (_row(product, accumulator, input_max) for product in traced)
    return OverflowTable([row for row in rows if row is not None])


def _row(
    product: TracedProduct, given: AccumulatorLike | None, input_max: RangeLike | Mapping[str, RangeLike] | None
) -> OverflowRow | None:
    acc = accumulator_of(product, given)
    if acc is None:
        return None
    if isinstance(input_max, Mapping):
        input_max = next((r for glob, r in input_max.items() if fnmatchcase(product.layer, glob)), None)
    limits = (product.low, product.high) if input_max is None else input_max
    about = (product.layer, product.kind, product.steps)
    if product.weight is None:
        return OverflowRow(*about, product.low, product.high, None, NO_WEIGHT)
    if input_max is None and not (math.isfinite(product.low) and math.isfinite(product.high)):
        return OverflowRow(*about, product.low, product.high, None, NOT_FINITE)
    weight, limits = _as_summed(product, acc if given is None else None, limits)
    bounds = channel_bounds(weight, acc, limits)
    return OverflowRow(*about, bounds.low, bounds.high, bounds, "")


def _as_summed(product: TracedProduct, own: Accumulator | None, limits: RangeLike) -> tuple[Tensor, RangeLike]:
    """The weight and the inputs' range as the accumulator meets them.

    With the policy's own accumulator the weight has its offsets, and by token an input is below 2 in magnitude. A range
    of integer codes is that of a product of codes.
    """
    weight, rule = product.weight, product.rule
    assert weight is not None
    if not product.is_codes and isinstance(limits, str) and (codes := INTEGER_CODES.fullmatch(limits.strip())):
        bits = INTEGER_CODES.fullmatch(product.weight_format or "")
        if bits is None and not torch.equal(weight, weight.round()):
            raise ValueError(
                f"{limits!r} is a range of integer codes, and the weight of {product.layer or 'the model itself'} is "
                f'none: attach the model to a policy with weight="{codes[0].removeprefix("u")}", or give the range in '
                "the units of the inputs"
            )
        if bits is not None:
            largest = weight.double().abs().max().clamp(min=1e-300)
            weight = (weight.double() / largest * (2 ** (int(bits[1]) - 1) - 1)).round().float()
    if own is None or rule is None:
        return weight, limits
    weight = Columns(rule.how.get("offset")).scale(weight, 0)
    if rule.per_token:
        low, high = input_range(limits)
        limits = (-2.0 if low < 0 else 0.0, 2.0 if high > 0 else 0.0)
    return weight, limits


def _cells(row: OverflowRow) -> tuple[str, ...]:
    biases = row.outer_biases
    outer = {f"outer {i} bias" if len(biases) > 1 else "outer bias": bias for i, bias in enumerate(biases, 1)}
    proves = {"bias": row.bias, "product bias": row.product_bias, **outer, "width": row.width}
    return (
        row.layer or "(model)",
        row.product,
        str(row.steps),
        *(("", "") if row.bounds is None else (f"{row.low:.4g} … {row.high:.4g}", f"{row.proven} of {row.channels}")),
        ", ".join(f"{name} {value}" for name, value in proves.items() if value is not None),
        row.reason,
    )
