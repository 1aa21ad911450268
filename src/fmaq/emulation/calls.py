"""Which attached module is running: a stack a thread, kept by a hook before and a hook after every attached module.

A call is known by the Python frame that runs it. So a forward that ended without its second hook (a Ctrl-C, say) is
noticed by whatever comes next, and what a product is called from (a module's forward, a gradient, a recomputation) can
be told apart.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fmaq.emulation.policy import Policy, Rule

CALL_IMPL = ("_call_impl", nn.Module._call_impl.__code__.co_filename)
CHECKPOINT_FILE = torch.utils.checkpoint.__file__
GRADIENT = torch.autograd.function.BackwardCFunction.apply.__code__


@dataclass(frozen=True)
class Attachment:
    """What `attach` keeps on each module.

    Attributes:
        policy: of the whole model.
        name: the module's full name in it; "" is the model itself.
        rule: the policy's for this module; None leaves it alone.
    """

    policy: Policy
    name: str
    rule: Rule | None


@dataclass
class Call:
    """An attached module's forward that is running."""

    module: nn.Module
    attachment: Attachment
    frame: FrameType
    products: int = 0


class ModelMode(TorchFunctionMode):
    """A mode made for one forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()


class _Running(threading.local):
    """The calls of this thread, outermost first, and the mode that was entered with the first."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.mode: ModelMode | None = None
        self.handlers = 0


_running = _Running()


def enter(module: nn.Module, attachment: Attachment, mode: type[ModelMode]) -> None:
    """Note that a module's forward begins; the outermost one enters a mode. Called from a forward pre-hook."""
    frame = _module_frame()
    _drop_interrupted(frame)
    if not _running.calls:
        _leave_leftovers(mode)
        _running.mode = mode(module)
        _running.mode.__enter__()
    _running.calls.append(Call(module, attachment, frame))


def leave() -> None:
    """Note that a module's forward ends; does nothing where `enter` was not reached. Called from a forward hook."""
    frame = _module_frame()
    _drop_interrupted(frame)
    if _running.calls and _running.calls[-1].frame is frame:
        _running.calls.pop()
        _leave_mode_if_done()


def forget_interrupted() -> None:
    """Forget calls that ended without `leave` (a Ctrl-C, say), and leave the mode that was entered with the first."""
    _drop_interrupted(sys._getframe(1))


def current_call() -> Call | None:
    """The innermost attached module whose forward calls this, or None where torch's own product is meant.

    That is in the gradient of something, or after an interrupted forward.

    Raises:
        RuntimeError: a checkpointed function that is no module is running: its recomputation could not be told from
            any other product, and its gradients would silently be another network's.
    """
    frame: FrameType | None = sys._getframe(1)
    frames = {id(call.frame) for call in _running.calls}
    is_checkpointed = False
    while frame is not None and id(frame) not in frames:
        if frame.f_code is GRADIENT:
            return None
        is_checkpointed |= frame.f_code.co_filename == CHECKPOINT_FILE
        frame = frame.f_back
    _drop_interrupted(frame)
    call = innermost_call()
    if is_checkpointed and call is not None and call.attachment.rule is not None and not call.attachment.rule.is_plain:
        raise RuntimeError(
            "a function given to torch.utils.checkpoint calls a matrix product itself, outside of any module: fmaq "
            "cannot emulate its recomputation. Give checkpoint a module, or leave the layer alone in the policy"
        )
    return call


def refuse_compilation() -> None:
    """Refuse to be compiled, or to run where whatever comes next would be.

    Raises:
        RuntimeError: by torch.compile.
    """
    if torch.compiler.is_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback()):
        raise RuntimeError("an attached model cannot run inside torch.compile: call fmaq.detach(model) before")


def innermost_call() -> Call | None:
    """The innermost attached module that runs in this thread, whatever it calls."""
    return _running.calls[-1] if _running.calls else None


@contextmanager
def handling() -> Iterator[None]:
    """A handler computes a product inside this `with` block."""
    _running.handlers += 1
    try:
        yield
    finally:
        _running.handlers -= 1


def is_handling() -> bool:
    """A handler computes a product in this thread."""
    return _running.handlers > 0


def _module_frame() -> FrameType:
    """The frame of `nn.Module._call_impl` that calls the hook that calls this."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            break
        if (frame.f_code.co_name, frame.f_code.co_filename) == CALL_IMPL:
            return frame
        frame = frame.f_back
    raise RuntimeError("a hook of fmaq was called from elsewhere than torch.nn.Module.__call__")


def _drop_interrupted(frame: FrameType | None) -> None:
    """Forget calls whose frames are no longer running, as seen from a frame that is."""
    while _running.calls and not _runs_inside(frame, _running.calls[-1].frame):
        _running.calls.pop()
        _leave_mode_if_done()


def _runs_inside(frame: FrameType | None, outer: FrameType) -> bool:
    while frame is not None and frame is not outer:
        frame = frame.f_back
    return frame is not None


def _leave_mode_if_done() -> None:
    """Leave the mode with the last call; one that cannot be left now finds no call, until the next `enter`."""
    if _running.calls or _running.mode is None:
        return
    modes = torch.overrides._get_current_function_mode_stack()
    if modes and modes[-1] is _running.mode:
        _running.mode.__exit__(None, None, None)
    _running.mode = None


def _leave_leftovers(mode: type[ModelMode]) -> None:
    for leftover in reversed(torch.overrides._get_current_function_mode_stack()):
        if not isinstance(leftover, mode):
            break
        leftover.__exit__(None, None, None)
