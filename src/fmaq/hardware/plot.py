"""The plot of a table: area against delay, a front for each accumulator, one panel a library."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fmaq.hardware.table import Row, label


def save_plot(rows: Mapping[str, Sequence[Row]], path: Path) -> None:
    """Write the figure as PNG.

    Args:
        rows: of each library, by its name.
    """
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.6 * len(rows), 5.2), layout="constrained")
    for index, (library, table) in enumerate(rows.items()):
        axes = figure.add_subplot(1, len(rows), index + 1)
        for position, row in enumerate(table):
            delays, areas = zip(*((point.delay, point.area) for point in row.synthesis.front), strict=True)
            colour = colormaps["turbo"](0.05 + 0.9 * position / max(len(table) - 1, 1))
            axes.plot(
                delays, areas, marker="o", markersize=3.5, linewidth=1.2, color=colour, label=label(row.accumulator)
            )
        axes.set_xlabel(f"delay ({table[0].synthesis.delay_unit})")
        axes.set_ylabel("area (NAND2 equivalents)")
        axes.set_title(library, loc="left")
        axes.set_ylim(bottom=0)
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    figure.get_axes()[-1].legend(frameon=False, fontsize=7, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.savefig(path, dpi=160, facecolor="white")
