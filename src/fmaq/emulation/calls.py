"""Which attached module is running: a stack a thread, kept by a hook before and a hook after every attached module.

A module that is no part of what was attached (it came later, or replaced one) is noticed when it asks for a product. It
has the rule that its name would have; where it has none, what its caller hands down, without offsets and gains.

A call is known by the Python frame that runs it. So a forward that ended without its second hook (a Ctrl-C, say) is
noticed by whatever comes next, and what a product is called from (a module's forward, a gradient, a recomputation) can
be told apart.
"""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from fmaq.emulation.layer_names import name_inside
from fmaq.emulation.noise import CHECKPOINT_FILE, note_number, number_of_call
from fmaq.emulation.policy import Policy
from fmaq.emulation.rule import Rule

STATE = "_fmaq"
CALL_IMPL = ("_call_impl", nn.Module._call_impl.__code__.co_filename)
TORCH = str(Path(torch.__file__).parent)
COMPILED = (f"{TORCH}/_functorch/_aot_autograd/", f"{TORCH}/_inductor/")
"""How the names of files begin whose functions run code that torch.compile made."""
GRAPH, OF_DYNAMO = "<eval_with_key>", "compile_subgraph_reason"
"""The file of a graph's own code, and what dynamo notes on its graphs, and nobody else on theirs."""
GRADIENT = torch.autograd.function.BackwardCFunction.apply.__code__
MERGING = ("merge", "unmerge")
"""What PEFT's layers call methods that add products of weights to weights; some do so while they are called."""


@dataclass(frozen=True)
class Attachment:
    """What `attach` keeps on each module.

    Attributes:
        policy: of the whole model.
        name: the module's full name in it; "" is the model itself.
        rule: the policy's for this module; None leaves it alone.
        is_plain: every product of the module is torch's own, of operands as they are.
        is_noisy: the module's calls are counted: see `noise`.
    """

    policy: Policy
    name: str
    rule: Rule | None
    is_plain: bool = field(init=False)
    is_noisy: bool = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "is_plain", self.rule is None or self.rule.is_plain)
        object.__setattr__(self, "is_noisy", self.rule is not None and self.rule.is_noisy)


@dataclass(eq=False)
class Call:
    """An attached module's forward that is running.

    Attributes:
        frame: that runs it; it is over when the frame is, unless `is_block`.
        number: among the module's calls, where they are counted.
        products: asked for so far.
        finish: what is done to the forward's output.
        is_block: a `with emulating(...)` block, which ends when it says so.
    """

    module: nn.Module
    attachment: Attachment
    frame: FrameType
    number: int = 0
    products: int = 0
    finish: Callable[[Any], Any] | None = None
    is_block: bool = False


class ModelMode(TorchFunctionMode):
    """A mode made for one forward of a model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()

    def begin(self, inputs: Any) -> None:
        """Learn the inputs of the forward."""


class _Running(threading.local):
    """The calls of this thread, outermost first, and the mode that was entered with the first."""

    def __init__(self) -> None:
        self.calls: list[Call] = []
        self.mode: ModelMode | None = None
        self.handlers = 0
        self.late: WeakKeyDictionary[nn.Module, tuple[Attachment, Attachment]] = WeakKeyDictionary()


_running = _Running()


def enter(module: nn.Module, attachment: Attachment, mode: type[ModelMode], inputs: Any) -> Call:
    """Note that a module's forward begins; the outermost one enters a mode. Called from a forward pre-hook."""
    frame = _module_frame()
    _drop_interrupted(frame)
    caller = innermost_call()
    if attachment.is_noisy and caller is not None and caller.attachment.is_noisy:
        note_number(caller.module, caller.number)
    number = number_of_call(module, frame) if attachment.is_noisy else 0
    call = _begin(Call(module, attachment, frame, number), mode)
    if caller is None and _running.mode is not None:
        _running.mode.begin(inputs)
    return call


def leave(call: Call) -> None:
    """Note that a module's forward ends: that of the innermost call."""
    if _running.calls and _running.calls[-1] is call:
        _running.calls.pop()
        _leave_mode_if_done()


def enter_block(module: nn.Module, attachment: Attachment, mode: type[ModelMode], frame: FrameType) -> Call:
    """Note that a block begins in which products are those of a module."""
    _drop_interrupted(sys._getframe(1))
    number = number_of_call(module, frame) if attachment.is_noisy else 0
    return _begin(Call(module, attachment, frame, number, is_block=True), mode)


def leave_block(block: Call) -> None:
    """Note that a block ends, and whatever began in it and did not end."""
    if block in _running.calls:
        del _running.calls[_running.calls.index(block) :]
        _leave_mode_if_done()


def _begin(call: Call, mode: type[ModelMode]) -> Call:
    if not _running.calls:
        _leave_leftovers(mode)
        _running.mode = mode(call.module)
        _running.mode.__enter__()
    _running.calls.append(call)
    return call


def call_of_hook() -> Call | None:
    """The call whose forward hook calls this; None where `enter` was not reached."""
    frame = _module_frame()
    _drop_interrupted(frame)
    call = innermost_call()
    return call if call is not None and call.frame is frame else None


def forget_interrupted() -> None:
    """Forget calls that ended without `leave` (a Ctrl-C, say), and leave the mode that was entered with the first."""
    _drop_interrupted(sys._getframe(1))


def current_call() -> Call | None:
    """The innermost attached module whose forward calls this, or None where torch's own product is meant.

    That is in code that torch.compile made, in the gradient of something, where an adapter is merged into weights, or
    after an interrupted forward.

    Raises:
        RuntimeError: a checkpointed function that is no attached module is running: its recomputation could not be told
            from any other product, and its gradients would silently be another network's.
    """
    frame: FrameType | None = sys._getframe(1)
    frames = {id(call.frame) for call in _running.calls}
    is_checkpointed, late = False, None
    while frame is not None and id(frame) not in frames:
        if _is_compiled(frame):
            return None
        if frame.f_code is GRADIENT or (frame.f_code.co_name in MERGING and _is_of_peft(frame)):
            return None
        is_checkpointed |= frame.f_code.co_filename == CHECKPOINT_FILE
        if late is None and frame.f_code.co_name == CALL_IMPL[0] and frame.f_code.co_filename == CALL_IMPL[1]:
            late = frame
        frame = frame.f_back
    _drop_interrupted(frame)
    call = innermost_call()
    if late is not None and call is not None:
        module = late.f_locals["self"]
        attachment = _late_attachment(call, module)
        number = number_of_call(module, late) if attachment.is_noisy else 0
        call = Call(module, attachment, late, number)
        _running.calls.append(call)
    if is_checkpointed and call is not None and not call.attachment.is_plain:
        raise RuntimeError(
            "a function given to torch.utils.checkpoint calls a matrix product itself, outside of any attached module: "
            "fmaq cannot emulate its recomputation. Give checkpoint a module (if it came after attach, call attach "
            "again), or leave the layer alone in the policy"
        )
    return call


def is_compiled_code() -> bool:
    """The function that calls this is called from code that torch.compile made, and by no attached module in it."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and not _is_compiled(frame):
        if (frame.f_code.co_name, frame.f_code.co_filename) == CALL_IMPL and STATE in frame.f_locals["self"].__dict__:
            return False
        frame = frame.f_back
    return frame is not None


def _is_compiled(frame: FrameType) -> bool:
    kind = _kind_of_file(frame.f_code.co_filename)
    return kind == COMPILED or (kind == GRAPH and OF_DYNAMO in frame.f_locals["self"].__dict__)


@functools.lru_cache(maxsize=4096)
def _kind_of_file(name: str) -> Any:
    """COMPILED, GRAPH or None; asked of every frame between a product and its module."""
    return next((kind for kind in (COMPILED, GRAPH) if name.startswith(kind)), None)


def _is_of_peft(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__")).startswith("peft.")


def _late_attachment(caller: Call, module: nn.Module) -> Attachment:
    """What a module is told that came after `attach`: by its name in what was attached, else what is handed down."""
    known = _running.late.get(module)
    if known is not None and known[0] is caller.attachment:
        return known[1]
    own, handles = module.__dict__.get(STATE, (None, ()))
    found: Attachment | None = own
    if handles:  # it is not running: a hook of others is, before or after it
        found = replace(own, rule=own.rule and own.rule.handed_down())
    for outer in reversed(_running.calls) if found is None else ():
        attachment = outer.attachment
        path = next((path for path, inner in outer.module.named_modules() if inner is module), None)
        if path is not None:
            name = name_inside(attachment.name, outer.module, path)
            found = Attachment(attachment.policy, name, attachment.policy.for_layer(name))
            break
    if found is None:
        attachment, rule = caller.attachment, caller.attachment.rule
        found = Attachment(attachment.policy, attachment.name, rule and rule.handed_down())
    _running.late[module] = caller.attachment, found
    return found


def innermost_call() -> Call | None:
    """The innermost attached module that runs in this thread, whatever it calls."""
    return _running.calls[-1] if _running.calls else None


def running() -> tuple[Call, ...]:
    """The calls of this thread, outermost first."""
    return tuple(_running.calls)


class Handling:
    """A handler computes a product inside a `with` block."""

    def __enter__(self) -> None:
        _running.handlers += 1

    def __exit__(self, *_: object) -> None:
        _running.handlers -= 1


handling = Handling()


def is_handling() -> bool:
    """A handler computes a product in this thread."""
    return _running.handlers > 0


def _module_frame() -> FrameType:
    """The frame of `nn.Module._call_impl` that calls the hook that calls this."""
    frame: FrameType | None = sys._getframe(2)
    for _ in range(8):
        if frame is None:
            break
        code = frame.f_code
        if code.co_name == CALL_IMPL[0] and code.co_filename == CALL_IMPL[1]:
            return frame
        frame = frame.f_back
    raise RuntimeError("a hook of fmaq was called from elsewhere than torch.nn.Module.__call__")


def _drop_interrupted(frame: FrameType | None) -> None:
    """Forget calls whose frames are no longer running, as seen from a frame that is."""
    while _running.calls and not _running.calls[-1].is_block and not _runs_inside(frame, _running.calls[-1].frame):
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
