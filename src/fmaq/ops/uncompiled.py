"""Functions that torch.compile leaves as they are: a break in its graph, as what they give are no tensors but counts.

Nothing is imported for it: whoever compiles has imported torch._dynamo already, which takes seconds.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

P = ParamSpec("P")
T = TypeVar("T")

WHY = "fmaq counts in plain numbers: torch.compile breaks the graph here and counts outside of it"


def uncompiled(function: Callable[P, T]) -> Callable[P, T]:
    """The function, run outside of torch.compile; with fullgraph=True that refuses, and says why."""
    disabled: list[Callable[P, T]] = []

    @functools.wraps(function)
    def run(*args: P.args, **kwargs: P.kwargs) -> T:
        if "torch._dynamo" not in sys.modules:
            return function(*args, **kwargs)
        if not disabled:
            disabled.append(torch.compiler.disable(function, reason=WHY))
        return disabled[0](*args, **kwargs)

    run._torchdynamo_disable = True  # type: ignore[attr-defined]
    run._torchdynamo_disable_msg = WHY  # type: ignore[attr-defined]
    return run
