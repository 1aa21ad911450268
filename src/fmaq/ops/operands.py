"""What a product accepts: dtypes that widen to float32 exactly, CPU tensors, known estimators; all else is refused."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from fmaq.numerics import Accumulator
from fmaq.numerics.reference import ESTIMATORS

AccumulatorLike = Accumulator | str | Mapping[str, Any]

FLOAT8 = tuple(
    getattr(torch, name)
    for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e5m2fnuz")
    if hasattr(torch, name)
)
OPERAND_DTYPES = (torch.float32, torch.bfloat16, torch.float16, *FLOAT8)


def widen(x: Tensor, name: str) -> Tensor:
    """The operand in float32, exactly; differentiable, the gradient in the operand's own dtype.

    Raises:
        TypeError: not a tensor, or of a dtype that float32 does not hold.
        ValueError: not dense, or not on the CPU.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if x.dtype not in OPERAND_DTYPES:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in OPERAND_DTYPES)
        raise TypeError(
            f"{name} has dtype {x.dtype}; products take {names}. Convert it first, with {name}.float(): what float32 "
            "does not hold is rounded there, to the nearest, and the accumulator then rounds products of rounded values"
        )
    if x.layout != torch.strided or x.is_nested:
        kind = "nested" if x.is_nested else str(x.layout).removeprefix("torch.")
        raise ValueError(f"{name} is a {kind} tensor; products take dense ones. Convert it with {name}.to_dense()")
    if not x.is_cpu:
        raise ValueError(
            f"{name} is on {x.device}; kernels are generated for the CPU so far. Move it with {name}.cpu()"
        )
    if x.dtype != torch.float32:
        x = x.to(torch.float32)
    if torch.compiler.is_dynamo_compiling() or not x.is_neg():  # an operator's operands are negated by its dispatch
        return x
    return x.resolve_neg()  # the imaginary part of a conjugate is negated only when it is read


def check(acc: AccumulatorLike, estimator: str) -> Accumulator:
    """The accumulator, fit for tensors, and an estimator that exists.

    Raises:
        ValueError: a template, a format that float32 cannot hold, or an unknown estimator.
    """
    if estimator not in ESTIMATORS:
        near = difflib.get_close_matches(str(estimator), ESTIMATORS, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}{hint}")
    parsed = Accumulator.parse(acc)
    parsed.check_float32()
    return parsed


def full_precision(device: str = "cpu") -> AbstractContextManager[object]:
    """A context in which torch's own products stay in float32, whatever autocast says."""
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()
