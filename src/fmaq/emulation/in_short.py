"""A policy or a rule in a few lines, however many layers and channels it speaks of."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import MISSING, fields
from typing import Any

from fmaq.emulation.vectors import Vector
from fmaq.numerics import Accumulator

ENTRIES = 4
"""Of a mapping, that are shown; of layers that are more, a count says what the rest have."""
NUMBERS = 4
"""Of a vector, that are shown; of one that is longer, its shape and range."""


def in_short(value: Any) -> str:
    """A dataclass as its constructor would be called, with the fields that differ from their defaults."""
    shown = []
    for f in fields(value):
        given = getattr(value, f.name)
        default = {} if f.default is MISSING else f.default
        if given != default:
            shown.append(f"{f.name}={_layers(given) if f.name == 'layers' else _shown(given)}")
    return f"{type(value).__name__}({', '.join(shown)})"


def _shown(value: Any) -> str:
    if isinstance(value, Accumulator):
        return repr(str(value))
    if isinstance(value, Vector):
        if value.size <= NUMBERS:
            return repr(value.to_plain())
        low, high = value.array.min(), value.array.max()
        return f"<{' × '.join(map(str, value.shape))} numbers, {low:.4g} … {high:.4g}>"
    if isinstance(value, Mapping):
        entries = [f"{key!r}: {_shown(entry)}" for key, entry in list(value.items())[:ENTRIES]]
        more = [f"and {len(value) - ENTRIES} more"] if len(value) > ENTRIES else []
        return "{" + ", ".join(entries + more) + "}"
    return repr(value)


def _layers(layers: Mapping[str, Any]) -> str:
    if len(layers) <= ENTRIES:
        return _shown(layers)
    return f"{_shown(layers)[:-1]}; of all {len(layers)}: {_census(layers)}}}"


def _census(layers: Mapping[str, Any]) -> str:
    """How many layers have which format."""
    counts = Counter("left alone" if entry is None else _format_of(entry) for entry in layers.values())
    shown = [f"{count} {what}" for what, count in counts.most_common(ENTRIES)]
    rest = sum(counts.values()) - sum(count for _, count in counts.most_common(ENTRIES))
    return ", ".join(shown + ([f"{rest} others"] if rest else []))


def _format_of(entry: Mapping[str, Any]) -> str:
    accumulator = entry.get("accumulator", "with the policy's accumulator")
    return str(accumulator.format) if isinstance(accumulator, Accumulator) else accumulator
