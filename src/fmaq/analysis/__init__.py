"""What happens in the sums of a model, and which accumulator they need: observe, calibrate, and static analysis."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "CalibrationWarning": "batches",
    "MantissaTable": "mantissa",
    "ModelEnergy": "energy",
    "Observed": "observation",
    "OverflowTable": "overflow",
    "ProductEvents": "observation",
    "a2q_width": "bounds",
    "apply_orders": "order",
    "calibrate": "calibration",
    "channel_bounds": "bounds",
    "channel_sizes": "order",
    "has_mantissas": "mantissa",
    "input_range": "bounds",
    "is_suitable": "retention",
    "least_mantissa": "retention",
    "likelihood": "importance",
    "mantissa_needed": "mantissa",
    "model_energy": "energy",
    "observe": "observation",
    "overflow_bounds": "overflow",
    "projection": "importance",
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
