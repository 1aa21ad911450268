"""Neural networks whose dot products are summed in low bit-width accumulators (arXiv 2401.14110).

The names below load on first use, so that `import fmaq` is quick and nothing is compiled by it.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from fmaq.numerics import Accumulator, FixedFormat, FloatFormat

if TYPE_CHECKING:
    from fmaq import analysis, emulation, hardware, ops
    from fmaq.analysis import calibrate, observe
    from fmaq.emulation import Policy, attach, coverage, detach, emulating, from_pretrained, frozen  # type: ignore[no-redef]
    from fmaq.ops import (  # type: ignore[no-redef]
        conv1d,
        conv2d,
        conv3d,
        conv_transpose1d,
        conv_transpose2d,
        conv_transpose3d,
        count_events,
        linear,
        matmul,
        quantize,
        scaled_dot_product_attention,
    )

__version__ = "0.1.0"

__all__ = [
    "Accumulator",
    "FixedFormat",
    "FloatFormat",
    "Policy",
    "analysis",
    "attach",
    "calibrate",
    "conv1d",
    "conv2d",
    "conv3d",
    "conv_transpose1d",
    "conv_transpose2d",
    "conv_transpose3d",
    "count_events",
    "coverage",
    "detach",
    "emulating",
    "emulation",
    "from_pretrained",
    "frozen",
    "hardware",
    "linear",
    "matmul",
    "observe",
    "ops",
    "quantize",
    "scaled_dot_product_attention",
]

_PACKAGES = ("analysis", "emulation", "hardware", "ops")
_HOME = {
    **dict.fromkeys(
        ("Policy", "attach", "coverage", "detach", "emulating", "from_pretrained", "frozen"), "fmaq.emulation"
    ),
    **dict.fromkeys(("calibrate", "observe"), "fmaq.analysis"),
}


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"fmaq.{name}")
    if name not in __all__:
        raise AttributeError(f"module 'fmaq' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME.get(name, "fmaq.ops")), name)


def __dir__() -> list[str]:
    return sorted(__all__)
