"""Rows of text in columns, as tables print themselves."""

from __future__ import annotations

from collections.abc import Sequence


def in_columns(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Lines of left-aligned columns, a rule under the headings."""
    widths = [max(len(line[i]) for line in (headings, *rows)) for i in range(len(headings))]
    lines = [headings, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(line, widths, strict=True)).rstrip() for line in lines)
