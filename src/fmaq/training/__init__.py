"""Fine-tuning under a low bit-width accumulator: the dual-stage schedule, the loop, exact resume, and metrics."""

from fmaq.training.examples import Examples, Pairs, Windows
from fmaq.training.loop import FinetuneResult, StageResult, finetune
from fmaq.training.schedule import Schedule, Stage
from fmaq.training.spans import Spans
from fmaq.training.tasks import evaluate

__all__ = [
    "Examples",
    "FinetuneResult",
    "Pairs",
    "Schedule",
    "Spans",
    "Stage",
    "StageResult",
    "Windows",
    "evaluate",
    "finetune",
]
