"""What a model's sums need: predicted before anything runs. The names load on first use."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "MantissaTable": "mantissa",
    "OverflowTable": "overflow",
    "apply_orders": "order",
    "channel_bounds": "bounds",
    "channel_sizes": "order",
    "has_mantissas": "mantissa",
    "is_suitable": "retention",
    "input_range": "bounds",
    "least_mantissa": "retention",
    "mantissa_needed": "mantissa",
    "overflow_bounds": "overflow",
    "reorder": "order",
    "restore_order": "order",
    "retention_ratio": "retention",
    "simulate": "retention",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'fmaq.analysis' has no attribute {name!r}; it has: {', '.join(_HOME)}")
    return getattr(importlib.import_module(f"fmaq.analysis.{_HOME[name]}"), name)
