"""Attached models under torch.compile: which module runs, and which tensors are weights, in terms that it can trace.

While dynamo traces a model, it traces our hooks and our mode, too. So the graph has fmaq's operators where the model
has products, and nothing of this file is left at run time. Here are no frames, no threads and no weak references, but a
stack of calls, and lists of tensors that are compared by identity; they live as long as the outermost module's trace.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fmaq.emulation.calls import STATE, Attachment, is_compiled_code
from fmaq.emulation.handlers import HANDLERS
from fmaq.emulation.met import Met
from fmaq.emulation.products import is_heard
from fmaq.emulation.roles import FROM_DATA, SHAPED_LIKE, Role, tensors_in

CONSTANT, WEIGHT, ACTIVATION = (int(role) for role in (Role.CONSTANT, Role.WEIGHT, Role.ACTIVATION))


MULTI_HEAD_ATTENTION = types.FunctionType(
    F.multi_head_attention_forward.__code__,
    F.multi_head_attention_forward.__globals__,
    argdefs=F.multi_head_attention_forward.__defaults__,
)
"""The same under another name, which dynamo does not hand to the mode once more."""


class TracedCall:
    """A call of an attached module; see `calls.Call`.

    Attributes:
        constants: tensors that it made without being given a tensor.
        kinds: of the batched products that it asks for next.
    """

    def __init__(self, module: nn.Module, attachment: Attachment) -> None:
        self.module = module
        self.attachment = attachment
        self.number = 0
        self.products = 0
        self.constants: list[Tensor] = []
        self.kinds: list[str] = []


class Trace:
    """What is known while a model is traced: the calls that run, outermost first, and tensors that are weights.

    The rules are those of `roles.Roles`, but that a module knows its own buffers and constants alone.
    """

    def __init__(self) -> None:
        self.calls: list[TracedCall] = []
        self.weights: list[Tensor] = []

    def role(self, given: Any) -> int:
        """What a tensor is, or what is computed from those in arguments."""
        role = CONSTANT
        for x in tensors_in(given):
            of_x = self._of(x)
            if of_x == ACTIVATION:
                return ACTIVATION
            role = max(role, of_x)
        return role

    def _of(self, x: Tensor) -> int:
        if isinstance(x, nn.Parameter):
            return WEIGHT
        call = self.calls[-1]
        for known, role in (
            (call.module._buffers.values(), WEIGHT),
            (call.module._parameters.values(), WEIGHT),
            (self.weights, WEIGHT),
            (call.constants, CONSTANT),
        ):
            for y in known:  # dynamo knows `is`, but no `in` of tensors
                if x is y:
                    return role
        base = x._base  # dynamo does not ask the mode for x.mT
        return ACTIVATION if base is None else self._of(base)

    def learn(self, func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        """Note what a function made, or changed in place."""
        role = self.role(args[:1] if func in SHAPED_LIKE else (args, kwargs))
        call = self.calls[-1]
        if result is None or (args and result is args[0]):
            self.weights = [x for x in self.weights if x is not args[0]]
            call.constants = [x for x in call.constants if x is not args[0]]
        if role == ACTIVATION or (role == CONSTANT and func in FROM_DATA):
            return
        known = self.weights if role == WEIGHT else call.constants
        for x in tensors_in(args[:1] if result is None else result):
            known.append(x)


class TracedMode(TorchFunctionMode):
    """As `mode.EmulationMode`."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        handler = HANDLERS.get(func)
        if not torch.compiler.is_dynamo_compiling() and handler is not None and is_compiled_code():
            return func(*args, **kwargs)  # it was asked for while the code was made
        if func is F.multi_head_attention_forward:
            return self._opened(args, kwargs)
        if handler is None:
            if getattr(func, "__name__", "") == "unflatten":  # it calls super(), which dynamo cannot trace here
                func = torch.unflatten
            result = func(*args, **kwargs)
            TRACE.learn(func, result, args, kwargs)
            return result
        if is_heard():
            raise RuntimeError(
                "what observes an attached model (observe, coverage, calibrate) runs the model itself: give it the "
                "model that torch.compile was given, not what it made"
            )
        call = TRACE.calls[-1]
        if call.kinds and func in (torch.bmm, torch.baddbmm):
            handler = functools.partial(handler, kind=call.kinds.pop(0))  # type: ignore[call-arg]
        met = Met(call, func, args, kwargs, _is_weight, _is_activation, self)  # type: ignore[arg-type]
        result = handler(met)
        if met.of_weights:
            TRACE.learn(func, result, args, kwargs)
        return result

    def _opened(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """`nn.MultiheadAttention`'s function, with every product in it met in its turn; see `handlers`."""
        call = TRACE.calls[-1]
        call.kinds = ["attention_scores", "attention_values"]
        with self:
            result = MULTI_HEAD_ATTENTION(*args, **kwargs)
        call.kinds = []
        return result


def _is_weight(x: Any) -> bool:
    return TRACE.role(x) == WEIGHT


def _is_activation(x: Any) -> bool:
    return TRACE.role(x) == ACTIVATION


TRACE = Trace()
MODE = TracedMode()


def check_inside_mode(func: Callable[..., Any]) -> None:
    """Refuse a product of a function that is compiled on its own, whose rule nobody would ask for.

    Raises:
        RuntimeError: it is one.
    """
    if not TRACE.calls and func in HANDLERS:
        raise RuntimeError(
            "a compiled function multiplies matrices in the forward of an attached model, and is no module of it: "
            "compile the module that calls it, or the model, or leave that layer alone in the policy"
        )


def enter(module: nn.Module, attachment: Attachment) -> None:
    """Note that a module's forward begins; the outermost one enters the mode.

    Raises:
        RuntimeError: the module has one inside that came after `attach`, or counts its calls.
    """
    if attachment.is_noisy:
        raise RuntimeError(
            f"stochastic rounding of {attachment.name or 'the model itself'} draws other numbers at every call, which "
            'torch.compile would freeze: write noise: "repeated" in the policy, or leave this model uncompiled'
        )
    for name, child in module._modules.items():
        if child is not None and STATE not in child.__dict__:
            raise RuntimeError(
                f"{name} in {attachment.name or 'the model itself'} came after attach: call fmaq.attach(model, policy) "
                "once more before it is compiled"
            )
    if not TRACE.calls:
        torch._C._push_on_torch_function_stack(MODE)
    TRACE.calls.append(TracedCall(module, attachment))


def leave() -> None:
    """Note that a module's forward ends."""
    if not TRACE.calls:
        return
    TRACE.calls.pop()
    if not TRACE.calls:
        torch._C._pop_torch_function_stack()
        TRACE.weights = []


def is_innermost(module: nn.Module) -> bool:
    """The module was entered last, and not left."""
    return bool(TRACE.calls) and TRACE.calls[-1].module is module


def is_near() -> bool:
    """Dynamo traces this, or would trace a function that is called next."""
    return torch.compiler.is_dynamo_compiling() or callable(torch._C._dynamo.eval_frame.get_eval_frame_callback())


def run_as_it_is(function: Callable[..., Any], recursively: bool = False) -> None:
    """Where nobody traces the caller of a function, dynamo is not to trace the function on its own, either.

    Args:
        recursively: nor what it calls.
    """
    frames = torch._C._dynamo.eval_frame
    rest = frames._FrameAction.SKIP if recursively else frames._FrameAction.DEFAULT
    strategy = frames._FrameExecStrategy(frames._FrameAction.SKIP, rest)
    frames.set_code_exec_strategy(function.__code__, strategy)


for function in (enter, leave, is_innermost, is_near, TracedCall.__init__):
    run_as_it_is(function)
run_as_it_is(TracedMode.__torch_function__, recursively=True)
