"""One matrix product met in a model: what it is, whether it is emulated, and those who listen to it."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor

from fmaq.emulation.calls import Call
from fmaq.emulation.noise import REPEATED, keyed, note_number
from fmaq.emulation.operands import Operands, multiplied
from fmaq.emulation.rule import FP32, Rule
from fmaq.numerics import Accumulator
from fmaq.ops.operands import OPERAND_DTYPES, full_precision

LEFT_ALONE = "left alone by the policy"
IN_FP32 = "fp32 by the policy"
ONE_STEP = "one step (K = 1): nothing is summed"
SUMMING = ("linear", "conv", "attention")
"""Kinds that are emulated however short; another one of a single step is an outer product, as of position angles,
unless it may be attention over one key."""


class FmaqCoverageWarning(UserWarning):
    """A policy wants a product emulated, and it cannot be."""


@dataclass(frozen=True, eq=False)
class Product:
    """One matrix product, as it is computed.

    Attributes:
        kind: "linear", "conv2d", "matmul", "attention_scores" ...
        layer: full name of the module whose forward calls it; "" is the model itself.
        index: counts the products of one call of that module, from 0.
        operands: the tensors multiplied, quantized where the policy says so, or their integer codes (see `scale`).
        options: of a convolution: stride, padding, dilation, groups, output_padding.
        steps: products in one dot product, K; None where unknown.
        macs: multiply-accumulates in all; None where unknown.
        rule: the layer's; None leaves it alone.
        reason: why the sums are torch's own; None where they are emulated.
        formats: of each operand, what it was quantized to; None where it stays as it was.
        scale: operands are codes, whose finished sums are multiplied by it: a number, or one an output channel.
    """

    kind: str
    layer: str
    index: int
    operands: tuple[Tensor, ...]
    options: dict[str, Any]
    steps: int | None
    macs: int | None
    rule: Rule | None
    reason: str | None
    formats: tuple[str | None, ...] = ()
    scale: Tensor | None = None


Listener = Callable[[Product], None]


class _Listeners(threading.local):
    def __init__(self) -> None:
        self.all: list[Listener] = []


_listeners = _Listeners()


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Call `listener(product)` after each product of an attached model in this thread, inside a `with` block.

    A model whose policy emulates nothing has no hooks, and is heard in `fmaq.coverage` alone.
    """
    _listeners.all.append(listener)
    try:
        yield
    finally:
        _listeners.all.remove(listener)


class Chooser(Protocol):
    """Who is asked for the rule of each product that is to be emulated or quantized."""

    def ranged(self, place: Place, request: Request, rule: Rule) -> Rule:
        """The rule before operands are quantized, with their ranges, perhaps."""

    def choose(self, place: Place, request: Request, rule: Rule) -> Rule:
        """The rule before products are emulated, which may be a template's until then.

        The request's operands are those multiplied, quantized where the rule says so.
        """

    def computed(self, place: Place, request: Request, result: Tensor) -> Tensor:
        """The product's result, which is what the module gets."""


def is_chosen() -> bool:
    """Somebody is asked for rules in this thread, and may change them from product to product."""
    return _choosers.current is not None


def is_heard() -> bool:
    """Somebody listens in this thread."""
    return bool(_listeners.all)


class _Choosers(threading.local):
    def __init__(self) -> None:
        self.current: Chooser | None = None


_choosers = _Choosers()


@contextmanager
def choosing(chooser: Chooser) -> Iterator[None]:
    """Ask a chooser for the rule of each product in this thread; a `with` block."""
    before, _choosers.current = _choosers.current, chooser
    try:
        yield
    finally:
        _choosers.current = before


@dataclass(frozen=True, slots=True)
class Place:
    """Where a product is met: full name of the module that calls it, its kind, and its index in the call."""

    layer: str
    kind: str
    index: int


@dataclass
class Request:
    """A product that a module asks for.

    Attributes:
        kind: see `Product`.
        operands: the two tensors; their shapes fit.
        is_weight: which of them are weights.
        steps: K.
        macs: in all; None: the elements of the result times K.
        torch_product: torch's own product of two such operands.
        emulated_product: ours, of the same two and an accumulator, with `Rule.how` as keywords.
        options: see `Product`.
        is_attention: the product may be one of attention's two, so that it is a sum also where it has one step.
        kept: of several products with the same second operand in one call: what that is multiplied as, once it is
            known; None makes it anew.
        repeat: how many products of that index the call had before.
    """

    kind: str
    operands: tuple[Tensor, Tensor]
    is_weight: tuple[bool, bool]
    steps: int
    torch_product: Callable[[Tensor, Tensor], Tensor]
    emulated_product: Callable[..., Tensor]
    macs: int | None = None
    options: dict[str, Any] | None = None
    is_attention: bool = False
    kept: list[Any] | None = None
    repeat: int = 0


def compute(call: Call, request: Request) -> Tensor:
    """The product as the layer's rule wants it; in the dtype that torch's own would have."""
    rule, operands = rule_of(call, request.kind), Operands(request.operands)
    is_outer = request.steps == 1 and not request.is_attention and not request.kind.startswith(SUMMING)
    reason = why_not(rule, request.operands, is_outer)
    if rule is None or _is_untouched(rule, reason):
        result = request.torch_product(*request.operands)
    else:
        rule = _by_head(rule, request)
        result, operands = _computed(call, request, rule)
    macs = result.numel() * request.steps if request.macs is None else request.macs
    announce(call, request.kind, operands, reason, request.steps, macs, request.options, rule)
    return result


def _by_head(rule: Rule, request: Request) -> Rule:
    """The rule for as many heads as attention has here: keys that are shared by a group may come repeated."""
    b = request.operands[1]
    return rule.for_heads(b.shape[-3]) if request.kind.startswith("attention") and b.dim() > 3 else rule


def _computed(call: Call, request: Request, rule: Rule) -> tuple[Tensor, Operands]:
    """A product that is quantized, or emulated, or both; and what was multiplied."""
    chooser, place = _choosers.current, Place(call.attachment.name, request.kind, call.products)
    if chooser is not None:
        rule = chooser.ranged(place, request, rule)
    if rule.accumulator == FP32:
        operands = _multiplied(place, request, request.operands, rule)
        own = zip(operands.tensors, request.operands, strict=True)
        operands = operands._replace(tensors=tuple(x.to(given.dtype) for x, given in own))
        result = request.torch_product(*operands.tensors)
        return result if chooser is None else chooser.computed(place, request, result), operands
    first, second = request.operands
    dtype = autocast_dtype(first) or first.dtype
    with full_precision(first.device.type):
        operands = _multiplied(place, request, (_as(dtype, first), _as(dtype, second)), rule)
        if chooser is not None:
            a, b = operands.tensors
            rule = chooser.choose(place, replace(request, operands=(a, b)), rule)
        accumulator, how = keyed_for(call, rule, request.repeat), _how(call, rule, request.repeat)
        if operands.scale is not None:
            how["gain"] = (operands.scale * how.get("gain", 1)).float()
        with _Named(place):
            result = _as(dtype, request.emulated_product(*operands.tensors, accumulator, **how))
    return result if chooser is None else chooser.computed(place, request, result), operands


def _as(dtype: torch.dtype, x: Tensor) -> Tensor:
    return x if x.dtype == dtype else x.to(dtype)


def _multiplied(place: Place, request: Request, operands: tuple[Tensor, Tensor], rule: Rule) -> Operands:
    with _Named(place):
        return multiplied(rule, request.kind, operands, request.is_weight, request.options, request.kept)


class _Named:
    """Says in an error inside a `with` block in which product it came up."""

    def __init__(self, place: Place) -> None:
        self._place = place

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, ValueError):
            raise ValueError(f"{self._place.kind} in {self._place.layer or 'the model itself'}: {error}") from error


def keyed_for(call: Call, rule: Rule, repeat: int = 0) -> Accumulator:
    """A rule's accumulator, with the seed of the product that a module asks for next.

    Args:
        repeat: how many products of that index the call had before.
    """
    accumulator = Accumulator.parse(rule.accumulator)
    if rule.noise == REPEATED or not accumulator.is_stochastic:
        return accumulator
    note_number(call.module, call.number)
    return keyed(accumulator, call.attachment.name, call.number, call.products, repeat=repeat)


def _how(call: Call, rule: Rule, repeat: int) -> dict[str, Any]:
    how = rule.how
    if rule.backward is not None and rule.noise != REPEATED and rule.backward.is_stochastic:
        how["backward"] = keyed(rule.backward, call.attachment.name, call.number, call.products, "backward", repeat)
    return how


def rule_of(call: Call, kind: str) -> Rule | None:
    """The rule of the product that a module asks for next; None leaves it alone."""
    rule = call.attachment.rule
    return None if rule is None else rule.for_product(kind, call.products)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast turns a matrix product's operands into, or None outside of autocast."""
    if x.dtype == torch.float64 or not torch.is_autocast_enabled(x.device.type):
        return None
    return torch.get_autocast_dtype(x.device.type)


def why_not(rule: Rule | None, operands: Sequence[Tensor], is_outer: bool = False) -> str | None:
    """The reason why the sums are torch's own, or None."""
    if rule is None:
        return LEFT_ALONE
    if rule.is_plain:
        return IN_FP32
    for x in operands:
        if x.is_nested or x.layout != torch.strided or x.is_quantized:
            return "nested, sparse or quantized operands"
        if x.is_meta:
            return "meta tensors have no values"
        if x.dtype not in OPERAND_DTYPES:
            return f"{str(x.dtype).removeprefix('torch.')} operands"
    if is_outer:
        return ONE_STEP
    if len({x.dtype for x in operands}) > 1 and autocast_dtype(operands[0]) is None:
        return "operands of different dtypes"
    return IN_FP32 if rule.accumulator == FP32 else None


def why_untouched(rule: Rule | None, operands: Sequence[Tensor], is_outer: bool = False) -> str | None:
    """The reason why torch's own function takes the operands as they are; None where there is anything to emulate."""
    reason = why_not(rule, operands, is_outer)
    return reason if _is_untouched(rule, reason) else None


def _is_untouched(rule: Rule | None, reason: str | None) -> bool:
    """Operands are not even quantized."""
    return reason is not None and (reason != IN_FP32 or rule is None or rule.is_plain)


def announce(
    call: Call,
    kind: str,
    operands: Operands | tuple[Tensor, ...],
    reason: str | None,
    steps: int | None = None,
    macs: int | None = None,
    options: dict[str, Any] | None = None,
    rule: Rule | None = None,
) -> None:
    """Tell the listeners of a product that was computed, and warn of one that the policy wants emulated and is not.

    Args:
        rule: that it was computed by, where that is not simply the layer's.
    """
    rule, name = rule or rule_of(call, kind), call.attachment.name
    index = call.products
    call.products += 1
    found = operands if isinstance(operands, Operands) else Operands(operands)
    about = found.tensors, options or {}, steps, macs, rule, reason, found.formats, found.scale
    for listener in list(_listeners.all):
        listener(Product(kind, name, index, *about))
    if reason not in (None, LEFT_ALONE, IN_FP32, ONE_STEP):
        warnings.warn(
            f"{kind} in {name or 'the model itself'} is not emulated: {reason}", FmaqCoverageWarning, stacklevel=2
        )
