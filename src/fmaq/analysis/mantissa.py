"""A table of the mantissa that each layer's sums need by their length, and what the accumulator's own does to them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any

from torch import nn

from fmaq.analysis.biases import formats_of
from fmaq.analysis.columns import in_columns
from fmaq.analysis.retention import (
    LARGEST_MANTISSA,
    Outer,
    Simulated,
    is_suitable,
    least_mantissa,
    retention_ratio,
    simulate,
)
from fmaq.analysis.trace import TracedProduct, accumulator_of, traced_products
from fmaq.numerics import Accumulator, FixedFormat, FloatFormat
from fmaq.ops.operands import AccumulatorLike


@dataclass(frozen=True)
class MantissaRow:
    """One product of a layer.

    Attributes:
        layer: full name of the module; "" is the model itself.
        product: "linear", "conv2d", "attention_scores" ...
        steps: products in one dot product, K.
        accumulator: that was asked about.
        needed: mantissa of the partial sums that suits K, in the accumulator's chunks and beside its outer levels (see
            `least_mantissa`); None where an outer level's own does not.
        needed_in_one_chunk: the same without chunks.
        ratio: variance retention ratio of the accumulator's own mantissas, rounding to the nearest.
        suitable: that ratio is.
        simulated: what the accumulator's own rounding leaves of Gaussian terms; None where that was not asked for.
    """

    layer: str
    product: str
    steps: int
    accumulator: str
    needed: int | None
    needed_in_one_chunk: int
    ratio: float
    suitable: bool
    simulated: Simulated | None


class MantissaTable:
    """A row a product, in the order of the forward pass. It prints itself."""

    def __init__(self, rows: list[MantissaRow]) -> None:
        self.rows = rows

    def __iter__(self) -> Iterator[MantissaRow]:
        return iter(self.rows)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def needed(self) -> int:
        """The mantissa that suits every row; 0 of an empty table."""
        return max((row.needed for row in self.rows if row.needed is not None), default=0)

    def to_dicts(self) -> list[dict[str, Any]]:
        """The rows as plain mappings."""
        return [asdict(row) for row in self.rows]

    def headings(self) -> tuple[str, ...]:
        """Of the columns that `cells` fills."""
        return ("layer", "product", "K", "needed", "in one chunk", "VRR", "suitable", "variance kept", "gain", "noise")

    def cells(self) -> list[tuple[str, ...]]:
        """The rows as text."""
        return [_cells(row) for row in self.rows]

    def total(self) -> str:
        """A line that sums up."""
        short = sum(not row.suitable for row in self.rows)
        return f"{len(self)} products; {self.needed} bits of mantissa suit all; {short} have fewer than they need"

    def __str__(self) -> str:
        return "\n".join([in_columns(self.headings(), self.cells()), self.total()])

    __repr__ = __str__


def mantissa_needed(
    model: nn.Module,
    *inputs: Any,
    accumulator: AccumulatorLike | None = None,
    simulated: bool = True,
    **kwargs: Any,
) -> MantissaTable:
    """The mantissa that each product of a model needs, by the length of its sums alone (arXiv 1901.06588).

    The model runs once for its shapes; the values in it do not matter. Where products are kept exact, they count as
    23 bits. Products that the attached policy sums in a fixed format are left out.

    Args:
        model: any module, attached or not.
        inputs, kwargs: of its forward.
        accumulator: of every product, in place of the attached policy's. Biases do not matter: `"M7E4"` will do.
        simulated: also form sums of Gaussian terms with the accumulator's arithmetic, see `simulate`.

    Raises:
        TypeError, ValueError: no accumulator is given, nor attached; or one has no mantissa.
    """
    traced = traced_products(model, *inputs, **kwargs)
    return MantissaTable([row for product in traced if (row := _row(product, accumulator, simulated)) is not None])


def _row(product: TracedProduct, given: AccumulatorLike | None, simulated: bool) -> MantissaRow | None:
    acc = accumulator_of(product, given)
    if acc is None or (given is None and not has_mantissas(acc)):
        return None
    a, p, outer = mantissas(acc)
    ratio = retention_ratio(a, p, product.steps, acc.chunk, outer)
    return MantissaRow(
        layer=product.layer,
        product=product.kind,
        steps=product.steps,
        accumulator=str(acc),
        needed=_needed(p, product.steps, acc.chunk, outer),
        needed_in_one_chunk=least_mantissa(p, product.steps),
        ratio=ratio,
        suitable=is_suitable(ratio, product.steps),
        simulated=simulate(acc, product.steps) if simulated else None,
    )


def _needed(product: int, steps: int, chunk: int | None, outer: Outer) -> int | None:
    if outer and not is_suitable(retention_ratio(LARGEST_MANTISSA, product, steps, chunk, outer), steps):
        return None
    return least_mantissa(product, steps, chunk, outer)


def has_mantissas(acc: Accumulator) -> bool:
    """All formats are floats."""
    return not any(isinstance(format, FixedFormat) for format in formats_of(acc))


def mantissas(acc: Accumulator) -> tuple[int, int, Outer]:
    """Of the partial sums, of the products, and with its chunk of each outer level.

    Exact products count as 23 bits. A half-unit format counts as its explicit bits: it is as good as those rounded to
    the nearest.

    Raises:
        ValueError: a format is fixed.
    """
    product = FloatFormat(LARGEST_MANTISSA, 8) if acc.product is None else acc.product
    outer = [] if acc.outer is None else [(level.format, level.chunk) for level in acc.levels]
    for format in (acc.format, product, *(format for format, _ in outer)):
        if isinstance(format, FixedFormat):
            raise ValueError(f"a mantissa is what floats have, and {acc} has a fixed format; see overflow_bounds")
    assert isinstance(acc.format, FloatFormat) and isinstance(product, FloatFormat)
    own = [(format.mantissa, chunk) for format, chunk in outer if not isinstance(format, FixedFormat)]
    return acc.format.mantissa, product.mantissa, own


def _cells(row: MantissaRow) -> tuple[str, ...]:
    kept = row.simulated
    return (
        row.layer or "(model)",
        row.product,
        str(row.steps),
        "–" if row.needed is None else str(row.needed),
        str(row.needed_in_one_chunk),
        f"{row.ratio:.4f}",
        "yes" if row.suitable else "no",
        *(("", "", "") if kept is None else (f"{kept.retained:.4f}", f"{kept.gain:.3f}", f"{kept.noise:.1e}")),
    )
