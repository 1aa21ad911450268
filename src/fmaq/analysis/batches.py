"""From what a data loader gives to the arguments of a model's forward: labels are no inputs."""

from __future__ import annotations

import difflib
import inspect
import warnings
from collections.abc import Iterable, Mapping, Sequence
from inspect import Parameter
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

LABELS = ("label", "labels", "target", "targets", "y")
POSITIONAL = (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD)
NAMED = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


class CalibrationWarning(UserWarning):
    """Something that `calibrate` was given, or did not meet, may not be what was meant."""


def call(model: nn.Module, batch: Any) -> Any:
    """The model of a batch: a tensor, a tuple or list of arguments, or a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def inputs_of(model: nn.Module, batches: Iterable[Any]) -> list[Any]:
    """The batches as `call` takes them, without the labels that a loader gives beside the inputs.

    One part more than forward has parameters is taken for labels and left out, and so is a key called "labels" (or
    alike) that forward does not have; a warning says so.

    Raises:
        TypeError: `batches` is no iterable of batches.
        ValueError: a batch does not fit forward, or a part that may be labels would be given to an optional parameter.
    """
    is_iterable = isinstance(batches, Iterable) or hasattr(batches, "__getitem__")  # a data set has the latter alone
    if isinstance(batches, (Tensor, Mapping, str)) or not is_iterable:
        raise TypeError(f"batches must be an iterable of batches, such as [x], got {type(batches).__name__}")
    is_loader = isinstance(batches, (DataLoader, Dataset))
    while isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
        model = model.module
    parameters = _parameters(model)
    listed = list(batches)
    if parameters is None:
        return listed
    name, left_out = type(model).__name__, set[str]()
    fitting: list[Any] = []
    for batch in listed:
        if isinstance(batch, Mapping):
            fitting.append(_without_labels(batch, parameters, name, left_out))
        elif isinstance(batch, (tuple, list)):
            fitting.append(_arguments(batch, parameters, name, left_out, is_loader or isinstance(batch, list)))
        else:
            fitting.append(batch)
    for what in sorted(left_out):
        warnings.warn(f"calibrate leaves out {what}: taken for labels", CalibrationWarning, stacklevel=3)
    return fitting


def _parameters(model: nn.Module) -> list[Parameter] | None:
    """Those of forward; None where they cannot be known."""
    try:
        return list(inspect.signature(model.forward).parameters.values())
    except (TypeError, ValueError):
        return None


def _arguments(
    batch: Sequence[Any], parameters: list[Parameter], name: str, left_out: set[str], is_from_loader: bool
) -> tuple[Any, ...]:
    """A batch of positional arguments.

    Args:
        left_out: told what is.
        is_from_loader: its parts are those of a sample, of which any may be a label.
    """
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return tuple(batch)
    positional = [p for p in parameters if p.kind in POSITIONAL]
    takes = f"{name}.forward takes ({', '.join(p.name for p in positional)})"
    if len(batch) > len(positional) + 1:
        raise ValueError(f"{takes}, and a batch has {len(batch)} parts. {_how(positional)}")
    if len(batch) > len(positional):
        left_out.add(f"the last of the {len(batch)} parts of each batch, since {takes}")
        batch = batch[:-1]
    for parameter, part in zip(positional, batch, strict=False):
        if parameter.default is not Parameter.empty and (is_from_loader or _is_like_labels(part)):
            raise ValueError(
                f"{takes}, and a batch has a part for {parameter.name!r}, which is optional: this may be labels. "
                f"{_how(positional)}"
            )
    return tuple(batch)


def _how(positional: list[Parameter]) -> str:
    first = positional[0].name if positional else "x"
    return f'Give the inputs alone, [(x,) for x, *_ in loader], or by name, [{{"{first}": x, …}} for x, … in loader]'


def _is_like_labels(part: Any) -> bool:
    """Classes of a batch, or one."""
    if isinstance(part, Tensor):
        return part.dtype in INTEGERS and part.dim() <= 1
    return isinstance(part, int) and not isinstance(part, bool)


def _without_labels(
    batch: Mapping[str, Any], parameters: list[Parameter], name: str, left_out: set[str]
) -> Mapping[str, Any]:
    """A batch of keyword arguments."""
    known = [p.name for p in parameters if p.kind in NAMED]
    unknown = [key for key in batch if key not in known]
    if not unknown or any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return batch
    for key in unknown:
        if key not in LABELS:
            near = difflib.get_close_matches(str(key), known, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{name}.forward has no parameter {key!r}{hint} It has: {', '.join(known)}")
        left_out.add(f"{key!r}, which {name}.forward does not take")
    return {key: value for key, value in batch.items() if key in known}
