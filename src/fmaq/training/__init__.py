"""Fine-tuning under a low bit-width accumulator: the dual-stage schedule, exact resume, and recipes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fmaq.training.examples import Examples, Pairs, Windows
    from fmaq.training.loop import FinetuneResult, StageResult, finetune
    from fmaq.training.recipe import Recipe
    from fmaq.training.schedule import Schedule, Stage
    from fmaq.training.tasks import evaluate

_HOME = {
    "Examples": "examples",
    "FinetuneResult": "loop",
    "Pairs": "examples",
    "Recipe": "recipe",
    "Schedule": "schedule",
    "Stage": "schedule",
    "StageResult": "loop",
    "Windows": "examples",
    "evaluate": "tasks",
    "finetune": "loop",
}

__all__ = [
    "Examples",
    "FinetuneResult",
    "Pairs",
    "Recipe",
    "Schedule",
    "Stage",
    "StageResult",
    "Windows",
    "evaluate",
    "finetune",
]


def __getattr__(name: str) -> Any:
    # Lazily, since recipes need pydantic, which an installation without the command line may lack.
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
