"""What happens in the sums of a model while it runs: `with observe(model) as events: model(x)`.

Every product of an attached model is looked at after it was computed, layer by layer: which steps overflowed,
underflowed or were swamped, how large operands, products, partial sums and outputs are, and how far the outputs are
from float32's.
Events are counted in all of a small product, and in an even sample of the outputs of a large one.
"""

from __future__ import annotations

import difflib
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from fmaq import kernels
from fmaq.analysis import events_shown
from fmaq.analysis.product_events import COUNTS, Histogram, ProductEvents
from fmaq.analysis.samples import Sample, is_finite, sample, unscaled
from fmaq.emulation.attach import policy_of
from fmaq.emulation.coverage import OUTSIDE, CoverageRow, meeting_the_rest
from fmaq.emulation.products import FmaqCoverageWarning, Product, listening
from fmaq.emulation.rule import FP32
from fmaq.emulation.unmet import names_of, unmet_products
from fmaq.kernels.histograms import BINS, LOWEST
from fmaq.numerics import Accumulator
from fmaq.ops.columns import Columns
from fmaq.ops.operands import full_precision

if TYPE_CHECKING:
    import pandas as pd
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.table import Table

STEPS = 1 << 23  # that are counted of a product, unless there are fewer
HISTOGRAM_STEPS = 1 << 17  # whose products and sums get into the histograms
ELEMENTS = 1 << 16  # of a tensor that get into its histogram, at even distances
SHOWN = 6  # names in a repr or an error


class Observed(Mapping[str, ProductEvents]):
    """What was observed, by layer: of a layer with one product its events, of one with more, `"layer:kind"` each.

    Attributes:
        outside: products, torch's own, that were met outside of every attached module's call.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.products: dict[tuple[str, str, int], ProductEvents] = {}
        self.outside: list[CoverageRow] = []

    def _names(self) -> dict[str, ProductEvents]:
        layers = [layer for layer, _, _ in self.products]
        kinds = [(layer, kind) for layer, kind, _ in self.products]
        names = {}
        for (layer, kind, index), found in self.products.items():
            if layers.count(layer) == 1:
                names[layer] = found
            elif kinds.count((layer, kind)) == 1:
                names[f"{layer}:{kind}"] = found
            else:
                names[f"{layer}:{kind}:{index}"] = found
        return names

    def __getitem__(self, name: str) -> ProductEvents:
        names = self._names()
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.3)
            known = f"; did you mean {near[0]!r}? There are" if near else "; there are"
            known += f" {_listed(list(names)) or 'none: call the model inside the with block'}"
            raise KeyError(f"no product of {name!r} was observed{known}")
        return names[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names())

    def __len__(self) -> int:
        return len(self.products)

    def __repr__(self) -> str:
        return f"{type(self).__name__} of {len(self)} products: {_listed(list(self))}"

    def __str__(self) -> str:
        from rich.console import Console

        shown = self.table(shutil.get_terminal_size().columns)
        console = Console(width=Console(width=1000).measure(shown).maximum, color_system=None)
        with console.capture() as captured:
            console.print(shown)
        return captured.get()

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        yield self.table(options.max_width)

    def table(self, width: int | None = None) -> Table:
        """One line a product: rates of events in per cent of the steps, and the signal-to-noise ratio.

        Args:
            width: to be kept by shortening names, as far as these keep 16 characters; None: names are whole.
        """
        return events_shown.table(self, width)

    def to_dataframe(self) -> pd.DataFrame:
        """A tidy table: a row for each product (by its name here, and by layer, kind and index) and event."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    **_place(name, found),
                    "accumulator": str(found.accumulator),
                    "event": event,
                    "count": found.counts[event],
                    "of": found.merges if event.startswith("merge_") else found.steps,
                    "rate": found.rate(event),
                    "snr_db": found.snr,
                    "sampled": found.sampled,
                }
                for name, found in self.items()
                for event in COUNTS
            ]
        )

    def histograms(self) -> pd.DataFrame:
        """A tidy table: a row for each product, part (a, b, product, sum, output) and exponent (empty: zeros)."""
        import pandas as pd

        return pd.DataFrame(
            [
                {**_place(name, found), "part": part, "exponent": exponent, "count": count}
                for name, found in self.items()
                for part, histogram in found.exponents.items()
                for exponent, count in histogram.items()
            ]
        )

    def plot(self, path: str | Path) -> Path:
        """Rates of events, noise and exponents by product, as a PNG (or SVG), at most 12 by 11 inches.

        Of more than 40 products those with the lowest signal-to-noise ratio are shown.
        """
        events_shown.draw(self).savefig(path, dpi=110)
        return Path(path)


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(repr(name) for name in names[:SHOWN]) + (f" and {more} more" if more > 0 else "")


def _place(name: str, found: ProductEvents) -> dict[str, Any]:
    """The columns by which tables know a product."""
    return {"product": name, "layer": found.layer, "kind": found.kind, "index": found.index}


@contextmanager
def observe(model: nn.Module, steps: int | None = STEPS) -> Iterator[Observed]:
    """Look at every emulated product that an attached model computes inside a `with` block.

    The outputs stay what they are. Looking costs about as much again as computing. Warnings name what the policy says
    of products, by index or kind, that no call had, and products outside of every attached module's call, as in a
    method such as `training_step`.

    Args:
        model: attached, see `fmaq.attach`.
        steps: count events in so many steps of each call of a product, those of outputs at even distances, if it has
            more (with stochastic rounding, these are then steps of other positions); None counts all.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is not attached, or `steps` is no positive number.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"observe takes a torch.nn.Module, got {type(model).__name__}")
    if policy_of(model) is None:
        raise ValueError("observe takes an attached model: call fmaq.attach(model, policy) before")
    if steps is not None and (not isinstance(steps, int) or isinstance(steps, bool) or steps < 1):
        raise ValueError(f"steps must be a positive number, or None for all, got {steps!r}")
    observed = Observed(model)

    def listener(product: Product) -> None:
        if product.reason is None and product.rule is not None:
            with torch.no_grad(), full_precision(), torch._C.DisableTorchFunction():
                _look(observed, product, steps)

    def note(row: CoverageRow) -> None:
        if row.reason == OUTSIDE:
            observed.outside.append(row)

    met: set[tuple[str, str, int]] = set()
    heard = listening(lambda product: met.add((product.layer, product.kind, product.index)))
    with listening(listener), heard, meeting_the_rest(note):
        yield observed
    policy = policy_of(model)
    if met and policy is not None:
        for entry in unmet_products(policy, names_of(model), met):
            warnings.warn(f"observe: no call had {entry}", UserWarning, stacklevel=3)
    if observed.outside:
        kinds = ", ".join(sorted({row.product for row in observed.outside}))
        warnings.warn(
            f"{len(observed.outside)} products ({kinds}) were computed by torch, outside of every attached module's "
            "call; inside `with fmaq.emulating(model):` they are the model's",
            FmaqCoverageWarning,
            stacklevel=3,
        )


def _look(observed: Observed, product: Product, steps: int | None) -> None:
    """Add what a product shows."""
    assert product.rule is not None
    rule = product.rule
    if rule.accumulator == FP32 or any(not operand.numel() for operand in product.operands):
        return
    acc = Accumulator.parse(rule.accumulator)
    key = product.layer, product.kind, product.index
    found = observed.products.setdefault(key, ProductEvents(*key, acc))
    found.calls += 1
    for part, operand in zip(("a", "b"), product.operands, strict=False):
        _measure(found, part, operand.detach().float())
    how = rule.how
    scale = 1.0 if product.scale is None else product.scale  # of codes
    columns = Columns(how.get("offset"), how.get("gain", 1.0) * scale, how.get("shift"))
    part_of_it = sample(
        product.kind, product.operands, product.options, product.steps, 1, steps or 1 << 62, rule.per_token
    )
    scaled = part_of_it.scaled(columns.offset)
    found.all_steps += round(scaled.outputs * scaled.depth / max(scaled.share, 1e-12))
    if all(is_finite(operand) for operand in product.operands):
        _count(found, scaled, acc)
        _histograms(found, scaled, acc)
    y = part_of_it.finished(unscaled(part_of_it, part_of_it.exact()), Columns(gain=scale))
    emulated = part_of_it.finished(unscaled(part_of_it, scaled.emulated(acc)), columns)
    _measure(found, "output", emulated)
    found.signal += float(y.double().square().sum())
    found.noise += float((y.double() - emulated.double()).square().sum())


def _count(found: ProductEvents, part: Sample, acc: Accumulator) -> None:
    counts = part.count(acc)
    for name, count in zip(COUNTS, counts, strict=True):
        found.counts[name] += count
    outputs = part.outputs
    found.steps += outputs * part.depth
    found.merges += outputs * acc.merges(part.depth)


def _histograms(found: ProductEvents, part: Sample, acc: Accumulator) -> None:
    """Exponents of the products and partial sums of a few outputs."""
    side = max(1, int((HISTOGRAM_STEPS / max(1, part.depth)) ** 0.5))
    a, b = part.few(side, side)
    for name, bins in zip(("product", "sum"), kernels.count_exponents(a[None], b[None], acc), strict=True):
        exponents = [None, *range(LOWEST, LOWEST + BINS - 1)]
        _add(found.exponents[name], {e: int(n) for e, n in zip(exponents, bins, strict=True) if n})


def _measure(found: ProductEvents, part: str, x: Tensor) -> None:
    """The range and the exponents of a tensor, of a large one those of some elements, and the largest."""
    x = x.flatten()
    if x.numel() > ELEMENTS:
        x = torch.cat([x[:: -(-x.numel() // ELEMENTS)], *(end[None] for end in torch.aminmax(x))])
    finite = x[torch.isfinite(x)]
    magnitudes = finite[finite != 0].abs()
    zeros = finite.numel() - magnitudes.numel()
    histogram: Histogram = {None: zeros} if zeros else {}
    if magnitudes.numel():
        exponents = torch.frexp(magnitudes)[1] - 1
        lowest = int(exponents.min())
        counts = torch.bincount(exponents - lowest)
        histogram |= {lowest + i: int(n) for i, n in enumerate(counts.tolist()) if n}
        low, high = float(magnitudes.min()), float(magnitudes.max())
        found.smallest[part] = min(low, found.smallest.get(part, low))
        found.largest[part] = max(high, found.largest.get(part, high))
    _add(found.exponents[part], histogram)


def _add(total: Histogram, more: Histogram) -> None:
    for exponent, count in more.items():
        total[exponent] = total.get(exponent, 0) + count
