"""fmaq's operators in torch: how one is defined, and how an accumulator is said to it.

Every product, and whatever else is computed outside of torch, is an operator of the library `fmaq` (`torch.ops.fmaq`),
with an implementation on "fake" tensors, gradients, and rules for vmap and autocast. So torch.compile and torch.export
keep it as one node, and an exported program runs wherever `import fmaq.ops` was. Its arguments are tensors and plain
values; an accumulator is its description, as `str(accumulator)` gives it, and its seed.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from types import NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import Parameter

from fmaq.numerics import Accumulator
from fmaq.ops.operands import AccumulatorLike, check

LIBRARY = torch.library.Library("fmaq", "DEF")
DEVICES = ("CPU",)
_OWN_DEVICES = {torch.device(device.lower()) for device in DEVICES}

Operator = Callable[..., Any]
InDims = tuple[int | None, ...]
"""Where vmap's dimension is in each argument."""


def operator(
    schema: str,
    kernel: Callable[..., Any],
    fake: Callable[..., Any],
    setup_context: Callable[..., None],
    backward: Callable[..., Any],
    vmap: Callable[..., Any],
) -> Operator:
    """Define an operator, and give what calls it with all of its arguments, by position.

    Args:
        schema: as torch writes it, with the name in front.
        kernel: what computes it.
        fake: what makes an empty tensor of the result's shape.
        setup_context, backward: as the static methods of a `torch.autograd.Function`.
        vmap: likewise; it is given in front what calls the operator.
    """
    name = schema.partition("(")[0]
    LIBRARY.define(schema)
    defined = getattr(torch.ops.fmaq, name).default
    for device in DEVICES:
        LIBRARY.impl(name, kernel, device)
        torch.library.register_autocast(f"fmaq::{name}", device.lower(), torch.float32, lib=LIBRARY)
    torch.library.register_fake(f"fmaq::{name}", fake, lib=LIBRARY)
    torch.library.register_autograd(f"fmaq::{name}", backward, setup_context=setup_context, lib=LIBRARY)
    torch.library.register_vmap(f"fmaq::{name}", functools.partial(vmap, defined), lib=LIBRARY)

    def call(*args: Any) -> Any:
        if torch.compiler.is_compiling():
            return defined(*args)
        if torch._C._are_functorch_transforms_active():
            return transformable.apply(*args)
        return kernel(*args) if _is_seen_by_nobody(args) else defined(*args)

    # An operator's gradients are out of reach of torch.func's transforms, which want a function of this kind.
    methods: dict[str, Callable[..., Any]] = {
        "forward": lambda *args: defined(*args),
        "vmap": functools.partial(vmap, call),
    }
    methods |= {"setup_context": setup_context, "backward": backward}
    transformable: Any = type(name, (torch.autograd.Function,), {k: staticmethod(v) for k, v in methods.items()})
    return call


def _is_seen_by_nobody(args: tuple[Any, ...]) -> bool:
    """No gradient, mode, tracer or profiler wants to know of the operator: torch's dispatcher, which takes longer than
    a small product, would do no more than call the kernel."""
    for x in args:
        if isinstance(x, Tensor):
            if type(x) not in (Tensor, Parameter) or x.device not in _OWN_DEVICES or x.is_neg():
                return False
            if x.requires_grad and torch.is_grad_enabled():
                return False
    return not (
        torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
        or torch.autograd.forward_ad._current_level >= 0
    )


class Summation(NamedTuple):
    """How a product is summed, and its gradients are computed, in plain values.

    Attributes:
        accumulator, seed: its description without the seed, and that, as a signed number.
        estimator: one of `numerics.reference.ESTIMATORS`.
        backward, backward_seed: of the two products of `identity`'s gradients; None is float32.
    """

    accumulator: str
    seed: int
    estimator: str = "identity"
    backward: str | None = None
    backward_seed: int = 0


SCHEMA = 'str accumulator, int seed, str estimator="identity", str? backward=None, int backward_seed=0'
"""Of the arguments that a `Summation` is."""


def summation(acc: AccumulatorLike, estimator: str = "identity", backward: AccumulatorLike | None = None) -> Summation:
    """Checked; a constant to torch.compile.

    Raises:
        ValueError: an unknown estimator, an accumulator that is not fit for tensors, or `backward` beside an estimator
            other than identity.
    """
    if not isinstance(acc, (Accumulator, str)) or not isinstance(backward, (Accumulator, str, NoneType)):
        return _summation.__wrapped__(acc, estimator, backward)
    return _summation(acc, estimator, backward)


summation._dynamo_marked_constant = True  # type: ignore[attr-defined]  # torch.compiler's mark, without its import


@functools.lru_cache(maxsize=4096)
def _summation(acc: AccumulatorLike, estimator: str, backward: AccumulatorLike | None) -> Summation:
    of_sums = _described(check(acc, estimator))
    if backward is None:
        return Summation(*of_sums, estimator)
    of_gradients = _described(check(backward, estimator))
    check_backward(estimator)
    return Summation(*of_sums, estimator, *of_gradients)


def _described(acc: Accumulator) -> tuple[str, int]:
    seed = acc.seed if acc.is_stochastic else 0
    return str(acc.with_seed(0)), seed - (seed >> 63 << 64)


def described(accumulator: str, seed: int) -> Accumulator:
    """The accumulator that a `Summation` says."""
    return _parsed(accumulator).with_seed(seed % 2**64)


_parsed = functools.lru_cache(maxsize=4096)(Accumulator)


def check_backward(estimator: str) -> None:
    """Refuse an accumulator for the gradients of an estimator other than identity.

    Raises:
        ValueError: it is not identity.
    """
    if estimator != "identity":
        raise ValueError(
            f'backward is the accumulator of the two gradient products of "identity"; estimator "{estimator}" sums its '
            f"gradients in float32. Give one of the two"
        )


def examples_in_front(info: Any, in_dims: InDims, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors with vmap's dimension in front, those that have none repeated."""
    return tuple(
        x.expand(info.batch_size, *x.shape) if at is None else x.movedim(at, 0)
        for x, at in zip(tensors, in_dims, strict=False)
    )
