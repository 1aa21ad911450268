"""The plot of a run: the metric of each accumulator, before and after fine-tuning, against the float32 baseline."""

from __future__ import annotations

import io
import re
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fmaq.numerics import Accumulator
from fmaq.recipes.record import AS_GIVEN, PERCENT, Record, Row
from fmaq.training.files import write_bytes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK = "#1c1e21"
"""Text and axes; in the page's SVG it becomes the page's own text colour."""
MUTED = "#7c828a"
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
"""Of Okabe and Ito's, which colour-blind people tell apart; lines and points differ in their markers, too."""
MARKERS = ("o", "^", "D", "s")
STROKES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1)), (0, (5, 1, 1, 1)))


def rc_style() -> dict[Any, Any]:
    """matplotlib's settings for the project's figures."""
    inked = ("text.color", "axes.labelcolor", "xtick.color", "ytick.color")
    return {"font.family": "sans-serif", "font.size": 9.5, "axes.edgecolor": MUTED, **dict.fromkeys(inked, INK)}


def draw(record: Record) -> Figure:
    """The figure: a column for each accumulator, widest first; a line for each format of weights and activations.

    Where kinds of accumulators are compared, a column for each width and a line for each kind.
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(rc_style()):
        compared = [row for row in record.rows if row.series == record.series[0]] if record.series else record.rows
        columns = list(dict.fromkeys(row.accumulator for row in compared))
        figure = Figure(figsize=(max(6.4, 0.78 * len(columns) + 1.6), 3.9), layout="constrained")
        axes = figure.add_subplot()
        scale = 100 if record.metric in PERCENT else 1
        base = record.baseline.metrics[record.metric] * scale
        axes.axhline(base, color=MUTED, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        if record.series:
            _series(axes, record, [row.bits for row in compared], scale)
        else:
            _lines(axes, record, columns, scale)
            _stages(axes, record, columns, scale)
        _dress(axes, record, accumulator_labels(columns), base)
        figure.canvas.draw_idle()
    return figure


def accumulator_labels(accumulators: list[str]) -> list[str]:
    """What stands below each column: the format without its bias, or more where that does not tell columns apart."""
    parsed = [None if name == "fp32" else Accumulator.parse(name) for name in accumulators]
    short = ["float32" if acc is None else _unbiased(acc.format) for acc in parsed]
    biased = ["float32" if acc is None else str(acc.format) for acc in parsed]
    levels = [
        name if acc is None or acc.outer is None else f"{name}\nouter {_unbiased(acc.outer)}"
        for name, acc in zip(short, parsed, strict=True)
    ]
    full = ["float32" if acc is None else "\n".join(str(acc).split()) for acc in parsed]
    names = next((n for n in (short, biased, levels) if len(set(n)) == len(n)), full)
    return [f"{name}\n{32 if acc is None else acc.bits} bits" for name, acc in zip(names, parsed, strict=True)]


def _unbiased(described: Any) -> str:
    return re.sub(r"(E\d+)b-?\d+", r"\1", str(described))


def _value(row: Row, metric: str, scale: float) -> float:
    return row.metrics.get(metric, float("nan")) * scale


def _lines(axes: Axes, record: Record, columns: list[str], scale: float) -> None:
    """A series for each format of the operands, as given and as calibrated: a line from wide to narrow, else points."""
    names = list(dict.fromkeys((row.operands, row.chosen) for row in record.rows))
    for index, (operands, chosen) in enumerate(names):
        rows = [row for row in record.rows if (row.operands, row.chosen) == (operands, chosen)]
        bits = [row.bits for row in rows]
        falling = len(bits) > 1 and all(a >= b for a, b in pairwise(bits))
        shift = 0.0 if falling else 0.16 * (index - (len(names) - 1) / 2)
        x = [columns.index(row.accumulator) + shift for row in rows]
        y = [_value(row, record.metric, scale) for row in rows]
        ranges = f", {chosen or AS_GIVEN}" if record.is_calibrated else ""
        name = "zero-shot" if record.stages else f"{operands} weights and activations{ranges}"
        marker = MARKERS[(index + index // 4) % 4]  # another beside each colour, when the colours begin again
        look: dict[str, Any] = {"color": COLOURS[index % 4], "marker": marker, "markersize": 5.5}
        axes.plot(x, y, label=name, linewidth=1.6, linestyle="-" if falling else "none", zorder=3, **look)


def _series(axes: Axes, record: Record, columns: list[int], scale: float) -> None:
    """A line for each kind of accumulator, from wide to narrow, and an arrow to what fine-tuning reached."""
    for index, name in enumerate(record.series):
        rows = [row for row in record.rows if row.series == name]
        look: dict[str, Any] = {"color": COLOURS[index % 4], "marker": MARKERS[index % 4], "zorder": 4}
        x, y = [columns.index(row.bits) for row in rows], [_value(row, record.metric, scale) for row in rows]
        axes.plot(x, y, label=name, linewidth=1.8, linestyle=STROKES[index % 4], markersize=5.5, **look)
        for row, place, start in zip(rows, x, y, strict=True):
            last = row.after(record.stages - 1, record.metric) if row.tuned else None
            if last is not None:
                shifted = place + 0.14 * (index - (len(record.series) - 1) / 2)
                _arrow(axes, shifted, start, last * scale)
                axes.plot([shifted], [last * scale], markersize=8, markerfacecolor="none", markeredgewidth=1.6, **look)
    if record.stages:
        hollow: dict[str, Any] = {"markerfacecolor": "none", "markersize": 8, "linestyle": "none"}
        axes.plot([], [], label="the same, fine-tuned", color=MUTED, marker="o", **hollow)


def _arrow(axes: Axes, x: float, start: float, end: float) -> None:
    arrow = {"arrowstyle": "-|>", "color": MUTED, "linewidth": 1, "shrinkA": 5, "shrinkB": 7}
    axes.annotate("", xy=(x, end), xytext=(x, start), arrowprops=arrow, zorder=2)


def _stages(axes: Axes, record: Record, columns: list[str], scale: float) -> None:
    """Fine-tuned accumulators: a thin line up from the zero-shot point, and a marker for each stage."""
    for stage in range(record.stages):
        tuned = [
            (columns.index(r.accumulator), r.after(stage, record.metric)) for r in record.rows if r.tuned and r.parsed
        ]
        points = [(x, y * scale) for x, y in tuned if y is not None]
        if points:
            xs, ys = zip(*points, strict=True)
            # Side by side, since the stages often end at nearly the same height.
            shifted = [x + 0.22 * (stage + 1 - (record.stages + 1) / 2) for x in xs]
            colour, marker = COLOURS[(stage + 1) % 4], MARKERS[(stage + 1) % 4]
            name = f"after stage {('one', 'two', 'three')[stage] if stage < 3 else stage + 1}"
            axes.plot(shifted, ys, linestyle="none", color=colour, marker=marker, markersize=7, label=name, zorder=5)
    for row in record.rows:
        last = row.after(record.stages - 1, record.metric) if row.tuned and row.parsed else None
        if last is not None:
            _arrow(axes, columns.index(row.accumulator), _value(row, record.metric, scale), last * scale)


def _dress(axes: Axes, record: Record, labels: list[str], base: float) -> None:
    unit = " (%)" if record.metric in PERCENT else ""
    shown = f"{base:.2f} %" if record.metric in PERCENT else f"{base:.3f}"
    axes.set_xticks(range(len(labels)), labels)
    axes.set_xlim(-0.5, len(labels) - 0.5)
    axes.set_ylabel(f"{record.metric}{unit}")
    axes.set_xlabel("accumulator")
    if record.metric in PERCENT:
        axes.set_ylim(0, 106)
        axes.set_yticks(range(0, 101, 20))
    elif record.metric == "perplexity":
        axes.set_yscale("log")
    axes.grid(axis="y", color=MUTED, alpha=0.22, linewidth=0.8)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
    text = f"float32 network: {shown}"
    place = {"xy": (0, base), "xycoords": ("axes fraction", "data"), "textcoords": "offset points"}
    axes.annotate(text, xytext=(0, 4), ha="left", va="bottom", color=MUTED, fontsize=8.5, **place)  # type: ignore[arg-type]
    axes.legend(frameon=False, loc="best", fontsize=9)


def save_png(figure: Figure, path: Path) -> None:
    """Write the figure at 200 dots an inch on white, atomically."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=200, facecolor="white")
    write_bytes(path, buffer.getvalue())


def to_svg(figure: Figure) -> str:
    """The figure as an SVG element for a page: transparent, text and axes in the page's colour, no fixed size."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace(INK, "currentColor")
    # Width and height go, so that the page's style decides; the view box keeps the shape.
    return re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"([^>]*?) (?:width|height)="[^"]*"', r"\1\2", svg, count=1)
