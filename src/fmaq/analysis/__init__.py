"""What happens in the sums of a model, and which accumulator they need: observe, calibrate, and static analysis."""

from __future__ import annotations

import importlib
from typing import Any

_HOME = {
    "Observed": "observation",
    "ProductEvents": "observation",
    "calibrate": "calibration",
    "observe": "observation",
}

__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
