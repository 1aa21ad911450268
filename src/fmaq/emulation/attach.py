"""Attaching a policy to a model: hooks before and after every module, and little else: a model stays what it is.

The hooks are functions of this module and what they need is kept on the module they are called with. So copies, pickles
and replicas of an attached model are attached, and a submodule called on its own is emulated just the same.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from fmaq.emulation import calls, fast_path, traced
from fmaq.emulation.calls import STATE, Attachment, Call
from fmaq.emulation.layer_names import layer_names
from fmaq.emulation.mode import EmulationMode
from fmaq.emulation.noise import COUNT
from fmaq.emulation.operands import sums_codes
from fmaq.emulation.policy import Policy
from fmaq.emulation.products import FmaqCoverageWarning
from fmaq.emulation.saving import save_policies_with
from fmaq.numerics import Accumulator, FixedFormat
from fmaq.ops.operands import AccumulatorLike
from fmaq.ops.operators import summation

QUANTIZED_MODULES = ("torch.ao.nn.quantized", "torch.ao.nn.intrinsic.quantized", "torch.ao.nn.sparse")
PACKED = ("_packed", "_all_weight_values")
"""What the attributes are called in which quantized modules keep the weights of a kernel."""


def attach(model: nn.Module, policy: Policy | AccumulatorLike) -> nn.Module:
    """Emulate the matrix products of a model as a policy says, wherever in the model they are called; in place.

    No module is replaced, and parameters, `state_dict`, class and others' hooks stay as they are; a model's own
    `save_pretrained` writes the policy beside the weights, from where `fmaq.from_pretrained` restores both. Attaching
    again replaces the policy, also of a part of an attached model: the last `attach` counts for every module inside,
    and names are then relative to that part. A module that is added later, or takes another's place, has the rule that
    its name would have had; one that is no part of the model, that of its caller, without offsets, gains and shifts.

    Products are met while a module is *called*: `model(x)`, not `model.forward(x)`, runs the hooks. Those of other
    methods are met in a `with fmaq.emulating(model):` block.

    Where the policy says torch's own products, the bits are torch's own: a policy that emulates nothing adds no hook,
    and the fast paths of `nn.TransformerEncoder` and `nn.MultiheadAttention` are taken where torch takes them. An
    emulated `nn.TransformerEncoder` does what its fast path does to padded positions: it makes them zero.

    What others' forward hooks compute is emulated as well. A hook that wants torch's own product, to measure an error
    against it, say, asks for it inside `with torch._C.DisableTorchFunction():`.

    What cannot be emulated (TorchScript, quantized modules) is named in one `FmaqCoverageWarning`.

    Args:
        model: any module.
        policy: a `Policy`, a mapping of its fields, or an accumulator alone, such as `"paper12"`.

    Returns:
        The same model.

    Raises:
        TypeError: `model` is no module.
        ValueError: an entry of the policy matches no module, a format in it still needs a bias, or a rule has both
            `backward` and an estimator other than identity, or `per_token` where integer codes are summed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"attach takes a torch.nn.Module, got {type(model).__name__}")
    policy = Policy.parse(policy)
    attachments = _attachments(model, policy)
    for attachment in attachments.values():
        _check_kernels(attachment)
    _install(attachments)
    save_policies_with(attachments)
    _warn(attachments)
    _warn_of_values(attachments)
    return model


@contextmanager
def attached(model: nn.Module, policy: Policy, may_be_template: bool = False) -> Iterator[None]:
    """Attach a model for a `with` block; afterwards it is attached, or not, as it was.

    Args:
        may_be_template: allow formats without a bias, which whoever runs the model has to complete (`choosing`).

    Raises:
        ValueError, NotImplementedError: as `attach`.
    """
    attachments = _attachments(model, policy)
    for attachment in attachments.values():
        _check_kernels(attachment, may_be_template)
    with _installed(attachments):
        yield


@contextmanager
def hooked(model: nn.Module) -> Iterator[None]:
    """Also where nothing is emulated, the products of an attached model are met in a `with` block."""
    with _installed({m: m.__dict__[STATE][0] for m in model.modules() if STATE in m.__dict__}, everywhere=True):
        yield


@contextmanager
def _installed(attachments: dict[nn.Module, Attachment], everywhere: bool = False) -> Iterator[None]:
    before = {module: module.__dict__.get(STATE) for module in attachments}
    _install(attachments, everywhere)
    try:
        yield
    finally:
        calls.forget_interrupted()
        for module, state in before.items():
            _, handles = module.__dict__.pop(STATE, (None, ()))
            was_hooked = state is not None and state[1]
            if state is not None:
                module.__dict__[STATE] = (state[0], handles if was_hooked else ())
            if not was_hooked:
                _remove(handles)


def _attachments(model: nn.Module, policy: Policy) -> dict[nn.Module, Attachment]:
    """What each module of the model is told.

    Raises:
        ValueError: an entry of the policy matches no module.
    """
    names = layer_names(model)
    policy.check_names(name for aliases in names.values() for name in aliases)
    return {module: Attachment(policy, alias[0], policy.for_layer(*alias)) for module, alias in names.items()}


def _install(attachments: dict[nn.Module, Attachment], everywhere: bool = False) -> None:
    """Keep on each module what it is told, and hooks unless nothing at all is emulated: torch looks for them."""
    wants_hooks = everywhere or not all(attachment.is_plain for attachment in attachments.values())
    for module, attachment in attachments.items():
        if isinstance(module, torch.jit.ScriptModule):
            continue
        module.__dict__.pop(COUNT, None)
        _, handles = module.__dict__.get(STATE, (None, ()))
        if wants_hooks and not handles:
            handles = (
                module.register_forward_pre_hook(_before, prepend=True, with_kwargs=True),
                module.register_forward_hook(_after, always_call=True),
            )
            _forget_compiled()
        module.__dict__[STATE] = (attachment, handles)


def _remove(handles: Iterable[RemovableHandle]) -> None:
    for handle in handles:
        handle.remove()
        _forget_compiled()


def _forget_compiled() -> None:
    """Code that torch.compile made before hooks came or went is not for a model that has them, or has not."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.convert_frame.output_codes.seen:
        dynamo.reset()


def detach(model: nn.Module) -> nn.Module:
    """Undo `attach`: the model computes what it did before, bit for bit. A model that is not attached stays as it is.

    Returns:
        The same model.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"detach takes a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        module.__dict__.pop(COUNT, None)
        _, handles = module.__dict__.pop(STATE, (None, ()))
        _remove(handles)
    save_policies_with(model.modules())
    return model


class emulating:
    """Products inside a `with fmaq.emulating(model):` block are emulated as those of the model's own forward are.

    For what is called otherwise than by `model(x)`: a method such as `training_step`, or a function that multiplies by
    the model's parameters. Modules called inside have their own rules, as ever. A block counts as a call of the model.

    Args:
        model: attached, itself and not only a part of it.

    Raises:
        TypeError: `model` is no module.
        ValueError: it is not attached.
    """

    def __init__(self, model: nn.Module) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"emulating takes a torch.nn.Module, got {type(model).__name__}")
        if STATE not in model.__dict__:
            raise ValueError(
                "the model is attached to no policy; call fmaq.attach(model, policy) before fmaq.emulating"
            )
        self._model = model
        self._blocks: list[Call] = []

    def __enter__(self) -> None:
        if torch.compiler.is_dynamo_compiling():
            raise RuntimeError("emulating is no block of a function that is compiled: call the model itself there")
        attachment = self._model.__dict__[STATE][0]
        frame = _running_body(sys._getframe(1))
        self._blocks.append(calls.enter_block(self._model, attachment, EmulationMode, frame))

    def __exit__(self, *_: object) -> None:
        calls.leave_block(self._blocks.pop())


def _running_body(frame: FrameType) -> FrameType:
    """The frame that runs a block's body: contextlib's, and those of generators that it drives, are over before it."""
    outer = frame.f_back
    while outer is not None and contextlib.__file__ in (frame.f_code.co_filename, outer.f_code.co_filename):
        frame, outer = outer, outer.f_back
    return frame


def policy_of(model: nn.Module) -> Policy | None:
    """The policy that a model is attached to, or None."""
    state = model.__dict__.get(STATE)
    return None if state is None else state[0].policy


def _before(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    if traced.is_near():
        traced.enter(module, module.__dict__[STATE][0])
        return
    if torch._C._get_tracing_state() is not None:
        raise RuntimeError(
            "an attached model cannot be traced by torch.jit: use torch.export, or call fmaq.detach before"
        )
    call = calls.enter(module, module.__dict__[STATE][0], EmulationMode, (args, kwargs))
    call.finish = fast_path.finish(module, call.attachment, args, kwargs)


def _after(module: nn.Module, args: Any, output: Any) -> Any:
    """Torch's hook: what it returns, unless that is None, takes the output's place."""
    if traced.is_near() or traced.is_innermost(module):  # or nobody traces any more: an error ended that
        traced.leave()
        return None
    call = calls.call_of_hook()
    if call is None:
        return None
    try:
        return None if call.finish is None or output is None else call.finish(output)
    finally:
        calls.leave(call)


for hook in (_before, _after):
    traced.run_as_it_is(hook)


def _check_kernels(attachment: Attachment, may_be_template: bool = False) -> None:
    """Refuse before the first forward what no product could be computed with."""
    if attachment.rule is None:
        return
    for rule in (attachment.rule, *attachment.rule.of_products()):
        if not isinstance(accumulator := rule.accumulator, Accumulator):
            continue
        if rule.per_token and sums_codes(accumulator, (rule.weight, rule.activation)):
            raise ValueError(
                f"per_token is of float exponents, and {attachment.name or 'the model itself'} sums integer codes in "
                f"{accumulator.format}: leave it out there"
            )
        if accumulator.is_template:
            if may_be_template:
                continue
            raise ValueError(
                f"accumulator {accumulator} of {attachment.name or 'the model itself'} is a template: it has no bias. "
                'Calibrate it, policy = fmaq.calibrate(model, policy, batches), or write a bias, like "M7E4b10"'
            )
        summation(accumulator, rule.estimator, rule.backward)


def _warn(attachments: dict[nn.Module, Attachment]) -> None:
    found = []
    for module, attachment in attachments.items():
        what = _not_coverable(module)
        if what is not None and attachment.rule is not None and not attachment.rule.is_plain:
            found.append(f"{attachment.name or 'the model itself'} ({what})")
    if found:
        message = f"the products inside these modules cannot be emulated and stay torch's own: {', '.join(found)}"
        warnings.warn(message, FmaqCoverageWarning, stacklevel=3)


def _warn_of_values(attachments: dict[nn.Module, Attachment]) -> None:
    """Values of integer operands keep their scales, which a fixed-point format without offsets is hardly made for."""
    rules = [attachment.rule for attachment in attachments.values() if attachment.rule is not None]
    if any(rule.offset is not None or rule.products for rule in rules):
        return
    for rule in rules:
        name = next((name for name in (rule.weight, rule.activation) if name and name.startswith("int")), None)
        format = rule.accumulator.format if isinstance(rule.accumulator, Accumulator) else None
        of_codes = sums_codes(rule.accumulator, (rule.weight, rule.activation))
        if name is not None and isinstance(format, FixedFormat) and not of_codes:
            warnings.warn(
                f"{format} sums operands in {name} at their scale, not their codes, and holds multiples of "
                f"{format.tiny:g}: let fmaq.calibrate choose offsets that fit it, or have codes summed, by integer "
                f'weights and activations and formats without a fraction, like "I{format.width}f0"',
                UserWarning,
                stacklevel=3,
            )
            return


def _not_coverable(module: nn.Module) -> str | None:
    """What a module is whose products are out of reach, or None."""
    if isinstance(module, torch.jit.ScriptModule):
        return "TorchScript"
    if type(module).__module__.startswith(QUANTIZED_MODULES) and _multiplies(module):
        return f"{type(module).__name__}, a quantized module"
    return None


def _multiplies(module: nn.Module) -> bool:
    """A quantized module that hands packed weights to a kernel; others call torch's ordinary products, or none."""
    names = (*vars(module), *module._modules)
    return any(name.startswith(PACKED) for name in names) and type(module).__name__ != "Embedding"
