"""What was observed, to be looked at: a table as wide as the terminal, and a figure of a bounded height.

Both have a line for each product, and short names where the names are long. The figure shows the worst products of a
model that has many, and says so.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from fmaq.numerics.reference import EVENTS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from rich.table import Table

    from fmaq.analysis.product_events import Histogram, ProductEvents

MOST_ROWS = 40
"""Of the figure."""
LONGEST_NAME = 40
"""Of the figure."""
SHORTEST_NAME = 16
"""Of the table."""
LEAST_SHARE, WHOLE = 1e-4, 100.0
"""Per cent, at either end of the colours."""
PARTS = {"product": "#3b6fb6", "sum": "#d1622b", "output": "#3f8f5f"}
HEADS = {
    "product_overflow": "prod.\nover",
    "product_underflow": "prod.\nunder",
    "accumulator_overflow": "sum\nover",
    "accumulator_underflow": "sum\nunder",
    "full_swamping": "swamp\nfull",
    "partial_swamping": "swamp\npart",
}


def table(observed: Mapping[str, ProductEvents], width: int | None = None) -> Table:
    """One line a product: rates of events in per cent of the steps, and the signal-to-noise ratio.

    Args:
        width: that it is to have at most, as long as the names keep 16 characters.
    """
    from rich.console import Console

    longest = max(map(len, observed), default=0)
    whole = _table(observed, longest)
    beyond = 0 if width is None else Console(width=1000).measure(whole).maximum - width
    return _table(observed, max(SHORTEST_NAME, longest - beyond)) if beyond > 0 else whole


def _table(observed: Mapping[str, ProductEvents], longest: int) -> Table:
    from rich import box
    from rich.table import Table

    formats = {str(found.accumulator.format) for found in observed.values()}
    has_formats = len(formats) > 1
    is_sampled = any(found.sampled < 1 for found in observed.values())
    about = "per cent of the steps, over: overflow, under: underflow; merges, of all levels, are counted apart"
    shown = Table(
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        caption=f"sums in {min(formats)}; {about}" if len(formats) == 1 else about,
    )
    shown.add_column("product", overflow="ellipsis", min_width=SHORTEST_NAME)
    if has_formats:
        shown.add_column("sums in", no_wrap=True)
    for heading in (*(HEADS[event] for event in EVENTS), "SNR\ndB", *(["looked\nat"] if is_sampled else [])):
        shown.add_column(heading, justify="right", no_wrap=True)
    for name, (full, found) in zip(short_names(list(observed), longest), observed.items(), strict=True):
        cells = [name if full else "(the model)", *([str(found.accumulator.format)] if has_formats else [])]
        cells += [_per_cent(found.rate(event)) for event in EVENTS]
        shown.add_row(*cells, _decibels(found.snr), *([f"{100 * found.sampled:.3g} %"] if is_sampled else []))
    return shown


def _per_cent(rate: float) -> str:
    share = 100 * rate
    if 0 < share < 1e-3:
        return "<.001"
    return f"{share:.1f}" if share >= 10 else f"{share:.2g}"


def _decibels(snr: float) -> str:
    return f"{snr:.1f}" if math.isfinite(snr) else "exact" if snr > 0 else "–∞"


def short_names(names: Sequence[str], longest: int) -> list[str]:
    """Dotted names with their first parts cut to a letter, or else without their middle, where they are too long.

    They are as much longer as it takes to tell them apart.
    """
    for length in range(longest, max(map(len, names), default=0)):
        short = [_short(name, length) for name in names]
        if len(set(short)) == len(names):
            return short
    return list(names)


def _short(name: str, longest: int) -> str:
    parts = name.split(".")
    for at, part in enumerate(parts[:-1]):
        if len(".".join(parts)) <= longest:
            break
        parts[at] = part if part.isdigit() else part[:1]
    name = ".".join(parts)
    tail = (longest - 1) // 2
    return name if len(name) <= longest else f"{name[: longest - 1 - tail]}…{name[len(name) - tail :]}"


def draw(observed: Mapping[str, ProductEvents]) -> Figure:
    """Rates of events, signal-to-noise ratios, and exponents of products, partial sums and outputs, by product."""
    from matplotlib.figure import Figure

    shown = worst(observed, MOST_ROWS)
    names = [name or "(the model)" for name in short_names(list(shown), LONGEST_NAME)]
    figure = Figure(figsize=(12, 1.7 + 0.23 * max(4, len(names))), layout="constrained")
    rates, noise, ranges = figure.subplots(1, 3, sharey=True, width_ratios=(5, 1.6, 4))
    _draw_rates(rates, list(shown.values()))
    _draw_noise(noise, list(shown.values()))
    _draw_ranges(ranges, list(shown.values()))
    rates.set_yticks(range(len(names)), names, fontsize=8)
    rates.set_ylim(len(names) - 0.5, -0.5)
    for axes in (rates, noise, ranges):
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    if len(shown) < len(observed):
        figure.suptitle(
            f"{len(shown)} of {len(observed)} products, those with the lowest signal-to-noise ratio", fontsize=10
        )
    return figure


def worst(observed: Mapping[str, ProductEvents], count: int) -> dict[str, ProductEvents]:
    """The products with the lowest signal-to-noise ratios, in the order of the model."""
    chosen = set(sorted(observed, key=lambda name: observed[name].snr)[:count])
    return {name: found for name, found in observed.items() if name in chosen}


def _draw_rates(axes: Axes, products: Sequence[ProductEvents]) -> None:
    """A cell for each product and event, with its per cent; white where it did not happen."""
    from matplotlib.colors import LogNorm

    shares = np.array([[100 * found.rate(event) for event in EVENTS] for found in products])
    shares = shares.reshape(len(products), len(EVENTS))
    scale = LogNorm(LEAST_SHARE, WHOLE, clip=True)
    axes.imshow(np.ma.masked_equal(shares, 0), norm=scale, cmap="YlOrRd", aspect="auto", interpolation="none")
    for (row, column), share in np.ndenumerate(shares):
        if share:
            ink = "white" if scale(share) > 0.7 else "black"
            axes.text(column, row, _per_cent(share / 100), ha="center", va="center", fontsize=7, color=ink)
    heads = [event.replace("accumulator", "sum").replace("_", "\n") for event in EVENTS]
    axes.set_xticks(range(len(EVENTS)), heads, fontsize=8)
    axes.set_xlabel("per cent of the steps; colour: its logarithm", fontsize=9)


def _draw_noise(axes: Axes, products: Sequence[ProductEvents]) -> None:
    finite = [found.snr if math.isfinite(found.snr) else 0.0 for found in products]
    axes.barh(range(len(products)), finite, color="#9aa7b5", height=0.7)
    for row, (found, length) in enumerate(zip(products, finite, strict=True)):
        axes.text(max(length, 0), row, f" {_decibels(found.snr)}", va="center", fontsize=7)
    axes.margins(x=0.35)
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("signal to noise, dB", fontsize=9)


def _draw_ranges(axes: Axes, products: Sequence[ProductEvents]) -> None:
    from matplotlib.ticker import MaxNLocator

    held = [(found.accumulator.format.emin, found.accumulator.format.emax) for found in products]
    widths = [high - low + 1 for low, high in held]
    axes.barh(
        range(len(held)), widths, left=[low for low, _ in held], color="#e3e6ea", height=0.9, label="accumulator holds"
    )
    for at, (part, colour) in enumerate(PARTS.items()):
        spans = [_span(found.exponents[part]) for found in products]
        rows = np.arange(len(products)) + 0.28 * (at - 1)
        lows, highs = ([span[end] for span in spans] for end in (0, 1))
        axes.hlines(rows, lows, [high + 1 for high in highs], color=colour, lw=2, label=f"{part}s")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.tick_params(axis="x", labelsize=8)
    axes.set_xlabel("exponents, 0.1st to 99.9th percentile", fontsize=9)
    axes.legend(fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=4, frameon=False, columnspacing=1)


def _span(histogram: Histogram) -> tuple[float, float]:
    """The exponents between which all but a thousandth at either end lie; NaN where there are only zeros."""
    pairs = sorted((e, n) for e, n in histogram.items() if e is not None)
    if not pairs:
        return float("nan"), float("nan")
    exponents, counts = np.array([e for e, _ in pairs]), np.cumsum([n for _, n in pairs])
    first, last = np.searchsorted(counts, [0.001 * counts[-1], 0.999 * counts[-1]])
    return float(exponents[first]), float(exponents[min(int(last), len(exponents) - 1)])
