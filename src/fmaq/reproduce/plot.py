"""The plot of an experiment: the first metric of every cell, mean and range over seeds, and what float32 reaches."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fmaq.emulation.rule import FP32
from fmaq.numerics import Accumulator
from fmaq.recipes.record import PERCENT
from fmaq.report.plot import INK, MUTED, accumulator_labels, rc_style
from fmaq.report.tables import name_of
from fmaq.reproduce.results import Key, Results, Spread
from fmaq.reproduce.tables import NAMES, series, series_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#3b6fb6", "#d1622b", "#3f8f5f", "#8a5aa8", "#b08a1e", "#4aa3b5")
MARKERS = ("o", "^", "D", "s", "v", "P")


@dataclass(frozen=True)
class _Panel:
    """A panel's places from left to right, its lines, and the key of the cell of each line and place."""

    title: str
    places: list[str]
    lines: list[str]
    keys: list[list[Key]]
    xlabel: str


def draw(results: Results) -> Figure:
    """The figure; a panel for each network, where there are several."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(rc_style()):
        panels = _panels(results)
        columns = max(len(panel.places) for panel in panels)
        width = max(6.4, 0.95 * columns + 1.6)
        figure = Figure(figsize=(width * (1 if len(panels) == 1 else 0.75 * len(panels)), 4.2), layout="constrained")
        for index, panel in enumerate(panels):
            axes = figure.add_subplot(1, len(panels), index + 1)
            _draw_panel(axes, results, panel)
        figure.canvas.draw_idle()
    return figure


def _panels(results: Results) -> list[_Panel]:
    accumulators = [name for name in dict.fromkeys(r.cell.accumulator for r in results.cells) if name != FP32]
    emulated = [r.cell for r in results.cells if r.cell.accumulator != FP32]
    labels = accumulator_labels(accumulators)
    if results.across == "variant":
        variants = list(dict.fromkeys(cell.variant for cell in emulated))
        estimators = list(dict.fromkeys(cell.estimator for cell in emulated))
        pairs = [(acc, estimator) for acc in accumulators for estimator in estimators]
        names = [f"{name_of(Accumulator.parse(acc))}{f', {e}' if len(estimators) > 1 else ''}" for acc, e in pairs]
        keys = [[(acc, estimator, variant) for variant in variants] for acc, estimator in pairs]
        return [_Panel("", variants, names, keys, results.variants_are)]
    pairs = [pair for pair in series(results) if any(_is_of(cell, pair) for cell in emulated)]
    names = series_names(pairs)
    networks = results.variants_are == "network"
    return [
        _Panel(
            network,
            labels,
            names,
            [[(acc, estimator, variant or network) for acc in accumulators] for estimator, variant in pairs],
            "accumulator",
        )
        for network in (dict.fromkeys(cell.variant for cell in emulated) if networks else [""])
    ]


def _is_of(cell: Any, pair: tuple[str, str]) -> bool:
    return cell.estimator == pair[0] and pair[1] in ("", cell.variant)


def _draw_panel(axes: Axes, results: Results, panel: _Panel) -> None:
    metric = results.metrics[0]
    scale = 100 if metric in PERCENT else 1
    spread = results.spread(metric)
    twins = {key[2]: found for key, found in spread.items() if key[0] == FP32 and panel.title in ("", key[2])}
    if set(twins) <= set(panel.places):
        _line(axes, "float32", [(panel.places.index(name), found) for name, found in twins.items()], scale, None)
    elif twins:
        variant = list(twins)[-1]  # the one that was trained longest
        _baseline(axes, metric, scale, twins[variant], f"float32, {variant}" if len(twins) > 1 else "float32")
    for index, (name, keys) in enumerate(zip(panel.lines, panel.keys, strict=True)):
        shift = 0.09 * (index - (len(panel.lines) - 1) / 2)
        points = [(place + shift, spread[key]) for place, key in enumerate(keys) if key in spread]
        _line(axes, name, [(x, found) for x, found in points if found.values], scale, index)
    axes.set_xticks(range(len(panel.places)), panel.places)
    axes.set_xlim(-0.5, len(panel.places) - 0.5)
    axes.set_xlabel(panel.xlabel)
    axes.set_ylabel(f"{metric} (%)" if metric in PERCENT else NAMES.get(metric, metric))
    axes.set_title(panel.title, loc="left", fontsize=10)
    axes.grid(axis="y", color=MUTED, alpha=0.22, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    axes.legend(frameon=False, loc="best", fontsize=9)


def _line(axes: Axes, name: str, points: Sequence[tuple[float, Spread]], scale: float, index: int | None) -> None:
    """One line: the means, and the range of each over its seeds; without an index in grey."""
    xs = [x for x, _ in points]
    means = [scale * sum(found.values) / len(found.values) for _, found in points]
    below = [mean - scale * found.low for mean, (_, found) in zip(means, points, strict=True)]
    above = [scale * found.high - mean for mean, (_, found) in zip(means, points, strict=True)]
    look: dict[str, Any] = {"color": MUTED, "linestyle": (0, (4, 3))}
    if index is not None:
        again = index // len(COLOURS)  # with a colour that is there already, another marker
        look = {"color": COLOURS[index % len(COLOURS)], "marker": MARKERS[(index + again) % len(MARKERS)]}
    # Rounding must not make a length negative.
    errors = [[max(0.0, length) for length in lengths] for lengths in (below, above)]
    axes.errorbar(xs, means, yerr=errors, label=name, linewidth=1.5, markersize=5.5, capsize=3, **look)


def _baseline(axes: Axes, metric: str, scale: float, found: Spread, name: str) -> None:
    if not found.values:
        return
    mean = scale * sum(found.values) / len(found.values)
    shown = f"{name}: {mean:.2f}{' %' if metric in PERCENT else ''}"
    axes.axhline(mean, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    place = axes.get_yaxis_transform()
    axes.text(1, mean, shown, ha="right", va="bottom", color=INK, fontsize=8.5, transform=place)
