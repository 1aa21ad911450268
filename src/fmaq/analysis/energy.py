"""What a model's products cost in hardware: energy by layer, over its own weights and activations.

    print(fmaq.analysis.model_energy(model, "paper12", x))

The model runs once. Each product's operands are drawn from, its steps and the merges of its chunks counted, and a unit
for its accumulator and formats and the adder of the merges synthesized (`fmaq.hardware`), whose energies for one on
those operands are multiplied by their numbers.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn

from fmaq.emulation.attach import attached, policy_of
from fmaq.emulation.coverage import undisturbed
from fmaq.emulation.policy import AccumulatorLike, Policy
from fmaq.emulation.products import Product, listening
from fmaq.hardware.layers import Layer, LayerEnergy, energy_by_layer, merges
from fmaq.hardware.liberty import Library, find_library
from fmaq.hardware.streams import MAX_STEPS, Streams, of_layer

if TYPE_CHECKING:
    import pandas as pd

ROWS = 64
"""Rows of activations that are kept of a layer's first call."""
OPERANDS = "M4E3"
"""The format of operands that neither the policy nor the caller names."""
HEADS = (
    *("layer", "accumulator", "bits", "product", "its bits", "outer", "weight", "activation", "drawn", "area"),
    *("steps", "of one", "merges", "of one", "energy", "to 32-bit"),
)


@dataclass(frozen=True)
class ModelEnergy:
    """Energy by layer, in the order of the layers' first products. It prints itself.

    Attributes:
        layers: what each product costs, over all examples.
        examples: that the model ran on.
        library: the cell library's name.
        unit: of the energies.
        adder: of the chunks' sums: `"own"` or `"shared"`.
    """

    layers: tuple[LayerEnergy, ...]
    examples: int
    library: str
    unit: str
    adder: str = "own"

    def __iter__(self) -> Iterator[LayerEnergy]:
        return iter(self.layers)

    def __len__(self) -> int:
        return len(self.layers)

    @property
    def total(self) -> float:
        """Energy of one example."""
        return sum(cost.total for cost in self.layers) / self.examples

    @property
    def ratio(self) -> float:
        """Of the total to what 32-bit accumulators of the same operands would take."""
        return sum(cost.total for cost in self.layers) / sum(cost.baseline_total for cost in self.layers)

    def to_dicts(self) -> list[dict[str, Any]]:
        """A row for each product: plain values, operations and energy of one example."""
        return [
            {
                "layer": cost.layer.name,
                "accumulator": cost.layer.accumulator,
                "bits": cost.unit.format.bits,
                "product": "exact" if cost.unit.product is None else str(cost.unit.product),
                "product_bits": cost.unit.product_bits,
                "outer": str(cost.unit.total) if cost.layer.merges else None,
                "weight": cost.layer.weight,
                "activation": cost.layer.activation,
                "operands": "recorded" if cost.layer.streams else "gaussian",
                "area": cost.area,
                "operations": cost.layer.macs / self.examples,
                "operation": cost.operation,
                "merges": cost.layer.merges / self.examples,
                "merge": cost.merge,
                "energy": cost.total / self.examples,
                "baseline": cost.baseline_accumulator,
                "to_32_bit": cost.total / cost.baseline_total if cost.baseline_total else None,
                "area_to_32_bit": cost.area / cost.baseline_area if cost.baseline_area else None,
                "energy_unit": self.unit,
            }
            for cost in self.layers
        ]

    def to_dataframe(self) -> pd.DataFrame:
        """`to_dicts` as a table of pandas."""
        import pandas as pd

        return pd.DataFrame(self.to_dicts())

    def cells(self) -> list[list[str]]:
        """The table as text: a row for each product under `HEADS`, then their sum."""
        rows = [
            [
                *(str(row["layer"]), str(row["accumulator"]).split()[0], str(row["bits"]), str(row["product"])),
                *(str(row["product_bits"]), str(row["outer"] or "–"), str(row["weight"]), str(row["activation"])),
                *(str(row["operands"]), f"{row['area']:.0f}"),
                *(f"{row['operations']:,.0f}", f"{row['operation']:.0f}"),
                *((f"{row['merges']:,.0f}", f"{row['merge']:.0f}") if row["merges"] else ("–", "–")),
                f"{row['energy']:.3g}",
                "–" if row["to_32_bit"] is None else f"{row['to_32_bit']:.2f}",
            ]
            for row in self.to_dicts()
        ]
        return [*rows, ["all", *[""] * (len(HEADS) - 3), f"{self.total:.3g}", f"{self.ratio:.2f}"]]

    @property
    def title(self) -> str:
        """What the figures are."""
        what = f"Energy of one example in {self.unit}, library {self.library}, area in NAND2 equivalents"
        return f"{what}; adder of chunks' sums {self.adder}; no glitches, wires, memory, registers"

    def __str__(self) -> str:
        rows = [HEADS, *self.cells()]
        widths = [max(len(row[column]) for row in rows) for column in range(len(HEADS))]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        return "\n".join([self.title, lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    __repr__ = __str__


def model_energy(
    model: nn.Module,
    policy: Policy | AccumulatorLike | None,
    *inputs: Any,
    weight: str | None = None,
    activation: str | None = None,
    library: Library | str | Path | None = None,
    examples: int | None = None,
    adder: str = "own",
    **kwargs: Any,
) -> ModelEnergy:
    """Run a model once and say what its products cost in hardware, layer by layer.

    The model, its buffers and torch's random state are afterwards as they were.

    Args:
        model: any module.
        policy: as `fmaq.attach` takes it; None for a model that is attached.
        inputs, kwargs: of its forward; a batch of examples.
        weight, activation: formats of operands that the policy leaves in float32, `"M4E3"` unless given: what the
            hardware would be built for. A warning names layers for which the policy has formats of its own.
        library: cells, as for `fmaq.hardware.synthesize`.
        examples: that the inputs are; the first tensor's length unless given.
        adder: of the chunks' sums: `"own"`, each unit has one, in which nothing changes between merges; or `"shared"`,
            as many units as a chunk has steps have one, which merges in every cycle.

    Raises:
        TypeError, ValueError: the policy, a format, the adder or the library is wrong, or nothing is emulated; or there
            is no hardware for an accumulator, such as one of more than two levels.
        SynthesisError: pyosys is not installed, or Yosys fails.
    """
    given = [x for x in (*inputs, *kwargs.values()) if isinstance(x, Tensor) and x.dim()]
    count = examples or (len(given[0]) if given else 1)
    with undisturbed(model):
        run = lambda: model(*inputs, **kwargs)  # noqa: E731
        return energy_of_run(model, policy, run, count, weight, activation, library, adder)


def energy_of_run(
    model: nn.Module,
    policy: Policy | AccumulatorLike | None,
    run: Callable[[], Any],
    examples: int,
    weight: str | None = None,
    activation: str | None = None,
    library: Library | str | Path | None = None,
    adder: str = "own",
) -> ModelEnergy:
    """The same of whatever `run` makes the model do on so many examples; arguments and errors as of `model_energy`."""
    if policy is None and all(policy_of(module) is None for module in model.modules()):
        raise ValueError("the model is attached to no policy; give one, such as paper12")
    cells = library if isinstance(library, Library) else find_library(library)
    recorder = _Recorder(weight, activation)
    with nullcontext() if policy is None else attached(model, Policy.parse(policy)), listening(recorder):
        run()
    layers = tuple(energy_by_layer(recorder.layers(), cells, adder))
    return ModelEnergy(layers, examples, cells.name, cells.energy_unit, adder)


class _Recorder:
    """Hears products, and makes layers of them: the operations of all calls, the operands of the first."""

    def __init__(self, weight: str | None, activation: str | None) -> None:
        self.asked = {"weight": weight, "activation": activation}
        self.found: dict[tuple[str, str], Layer] = {}
        self.kept: dict[str, dict[str, str]] = {"weight": {}, "activation": {}}

    def __call__(self, product: Product) -> None:
        key, macs = (product.layer, product.kind), product.macs or 0
        is_emulated = product.rule is not None and product.reason is None
        accumulator = str(product.rule.accumulator) if is_emulated and product.rule is not None else "fp32"
        merged = macs // product.steps * merges(accumulator, product.steps) if product.steps else 0
        if key in self.found:
            known = self.found[key]
            self.found[key] = replace(known, macs=known.macs + macs, merges=known.merges + merged)
            return
        name = product.layer if product.kind in ("linear", "conv2d") else f"{product.layer} {product.kind}".strip()
        first, second = (product.formats or (None, None))[:2]
        self.found[key] = Layer(
            name=name or "(model)",
            macs=macs,
            accumulator=accumulator,
            weight=self._format("weight", second, name),
            activation=self._format("activation", first, name),
            streams=_streams(product),
            merges=merged,
            offset=_offset(product),
        )

    def _format(self, role: str, format: str | None, name: str) -> str:
        asked = self.asked[role]
        if format is not None and asked is not None and format != asked:
            self.kept[role][name] = format
        return format or asked or OPERANDS

    def layers(self) -> list[Layer]:
        """What was heard.

        Raises:
            ValueError: nothing of it was emulated.
        """
        if not any(layer.accumulator != "fp32" for layer in self.found.values()):
            raise ValueError("the policy emulates nothing here: give it an accumulator, such as paper12")
        for role, formats in self.kept.items():
            if formats:
                warnings.warn(_kept(role, self.asked[role], formats, len(self.found)), stacklevel=4)
        return list(self.found.values())


def _kept(role: str, asked: str | None, formats: Mapping[str, str], count: int) -> str:
    """The word on a format that was asked for where the policy has its own."""
    names = ", ".join(list(formats)[:3]) + (", …" if len(formats) > 3 else "")
    return (
        f"{role} {asked} is for operands that the policy leaves in float32: {len(formats)} of {count} layers ({names}) "
        f"keep the policy's {', '.join(sorted(set(formats.values())))}; change the policy to cost them otherwise"
    )


def _offset(product: Product) -> int:
    """The middle one of the output channels' offsets: a unit that serves one of them has it as a constant."""
    offset = None if product.rule is None else product.rule.offset
    return 0 if offset is None else int(np.sort(offset.array, axis=None)[offset.size // 2])


def _streams(product: Product) -> Streams | None:
    """The operands as rows of a matrix product, where that is plain to see; None otherwise."""
    pair = _rows(product)
    if pair is None or 0 in (*pair[0].shape, *pair[1].shape):
        return None
    a, b = (x.detach()[:, :MAX_STEPS].double().cpu().numpy() for x in pair)
    return of_layer(product.layer or product.kind, a, b, are_codes=product.scale is not None)


def _rows(product: Product) -> tuple[Tensor, Tensor] | None:
    x, w = product.operands[:2]
    if product.kind.startswith("linear"):
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
