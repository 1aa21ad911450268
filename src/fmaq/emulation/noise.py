"""Which random numbers stochastic rounding draws in a model: a seed for every product of every call of every layer.

`Accumulator.seed` and a position (m, n, k) make a random number. Were that all, equal layers would round alike, and so
would all calls of one: averaging over them would gain nothing. So a product's seed is made of the accumulator's, of the
layer's name, of the number of the call, of the product's index in the call and, in distributed training, of the rank.

Calls are counted on the module, from `attach` on; a copy or a pickle goes on counting from there. `call_counts` and
`restart_calls` read and set the counts. Coverage and calibration leave them as they were. A call that
`torch.utils.checkpoint` repeats for the gradients has the number of the first.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import FrameType
from typing import Any

import torch
from torch import nn

from fmaq.numerics import Accumulator, random

COUNT = "_fmaq_calls"
CHECKPOINT_FILE = torch.utils.checkpoint.__file__
GENERATOR = "_checkpoint_without_reentrant_generator"

BY_CALL, REPEATED = "by_call", "repeated"
NOISE = (BY_CALL, REPEATED)
"""What a policy's `noise` may be: seeds as above, or the accumulator's own seed everywhere."""

_lock = threading.Lock()


def call_counts(model: nn.Module) -> dict[str, int]:
    """How many calls of each module have drawn random numbers of their own since `attach`: what a run resumes with.

    Returns:
        Counts by module name; modules of which none was counted are left out.
    """
    return {name: m.__dict__[COUNT] for name, m in model.named_modules() if m.__dict__.get(COUNT)}


def restart_calls(model: nn.Module, counts: Mapping[str, int] | None = None) -> None:
    """Count calls anew, from what `call_counts` gave or else from zero: the same calls then draw the same noise again.

    Raises:
        ValueError: the counts name a module that the model does not have.
    """
    modules = dict(model.named_modules())
    unknown = [name for name in counts or {} if name not in modules]
    if unknown:
        raise ValueError(f"counts are given for {unknown[0]!r}, which is no module of the model")
    for module in modules.values():
        module.__dict__.pop(COUNT, None)
    for name, count in (counts or {}).items():
        modules[name].__dict__[COUNT] = count


def keyed(
    accumulator: Accumulator, layer: str, call: int, index: int, purpose: str = "", repeat: int = 0
) -> Accumulator:
    """The accumulator with the seed of one product; as it is where its rounding is not stochastic.

    Args:
        repeat: how many products of that index the call had before: the time step of a recurrent layer.

    Raises:
        RuntimeError: the number of the call is not known, -1.
    """
    if not accumulator.is_stochastic:
        return accumulator
    if call < 0:
        raise RuntimeError(
            f"torch.utils.checkpoint repeats a forward in which {layer or 'the model itself'} was not called while it "
            "was attached: attach the model before the forward"
        )
    distributed = torch.distributed
    rank = distributed.get_rank() if distributed.is_available() and distributed.is_initialized() else 0
    again = (repeat,) if repeat else ()
    return accumulator.with_seed(random.derived_seed(accumulator.seed, layer, call, index, rank, purpose, *again))


def note_number(module: nn.Module, number: int) -> None:
    """Note the number of a call that may have begun before the checkpointed region that it is: a composed one."""
    own = _composed()
    if own is not None:
        own.starts.setdefault(module, number)


def number_of_call(module: nn.Module, frame: FrameType) -> int:
    """The number of a module's call that begins in a frame; a repeated call has that of the first, or -1 if unknown.

    Raises:
        RuntimeError: it is called while gradients are computed, and not by `torch.utils.checkpoint`.
    """
    first, repeated = _checkpoints(frame)
    if repeated is not None:
        number = repeated.number(module)
    elif torch._C._current_graph_task_id() != -1:
        raise RuntimeError(
            f"a module ({type(module).__name__}) that rounds stochastically is called while gradients are computed, by "
            "other code than torch.utils.checkpoint: whether that repeats a call, and which, cannot be told. Use "
            'torch.utils.checkpoint, or the policy\'s noise="repeated"'
        )
    else:
        with _lock:
            number = module.__dict__.get(COUNT, 0)
            module.__dict__[COUNT] = number + 1
    for region in first:
        region.starts.setdefault(module, number)
    return number


@dataclass(eq=False)
class _Region:
    """A checkpointed part of a forward, kept on what torch keeps of it.

    Attributes:
        starts: by module, the number of its first call in the region.
        task: of the gradients that the region was last repeated for.
        numbers: by module, that of its next call in this repetition.
    """

    starts: dict[nn.Module, int] = field(default_factory=dict)
    task: int = -1
    numbers: dict[nn.Module, int] = field(default_factory=dict)

    def number(self, module: nn.Module) -> int:
        """The number of a module's next call in a repetition of the region; -1 if it is not known."""
        task = torch._C._current_graph_task_id()
        if task != self.task:
            self.task, self.numbers = task, dict(self.starts)
        number = self.numbers.get(module, -1)
        if number < 0:
            return number
        self.numbers[module] = number + 1
        return number


def _checkpoints(frame: FrameType | None) -> tuple[list[_Region], _Region | None]:
    """The checkpointed regions around a frame that run for the first time, and the innermost that is repeated.

    Those outside of the repeated one are not told: their numbers are known.
    """
    first: list[_Region] = []
    own = _composed()
    if own is not None:
        first.append(own)
    while frame is not None:
        if frame.f_code.co_filename == CHECKPOINT_FILE:
            region, is_repeated = _region_of(frame)
            if is_repeated:
                return first, region
            if region is not None and region not in first:
                first.append(region)
        frame = frame.f_back
    return first, None


def _region_of(frame: FrameType) -> tuple[_Region | None, bool]:
    """The region that a frame of torch.utils.checkpoint stands for, and whether it is repeated."""
    code, names = frame.f_code, frame.f_locals
    function = torch.utils.checkpoint.CheckpointFunction
    if code in (function.forward.__code__, function.backward.__code__):
        return _kept_on(names["ctx"]), code is function.backward.__code__
    if code.co_name == "unpack_hook" and "frame" in names:
        return _kept_on(names["frame"]), True
    generator = names.get("gen") if code.co_name == "checkpoint" else None
    inside = getattr(generator, "gi_frame", None)
    if inside is not None and inside.f_code.co_name == GENERATOR:
        return _kept_on(inside.f_locals["new_frame"]), False
    return None, False


def _composed() -> _Region | None:
    """The region around a module that torch.distributed's composable `checkpoint` wraps: no frame tells of it."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    pack = hooks[0] if hooks else None
    code = getattr(pack, "__code__", None)
    if code is None or code.co_filename != CHECKPOINT_FILE or "frame" not in code.co_freevars:
        return None
    cells = getattr(pack, "__closure__", ())
    return _kept_on(cells[code.co_freevars.index("frame")].cell_contents)


def _kept_on(owner: Any) -> _Region:
    """The region that is kept on an object of torch's, new at first."""
    region = owner.__dict__.get("_fmaq_region")
    if region is None:
        region = owner._fmaq_region = _Region()
    return region
