"""How each torch function that holds matrix products is emulated: a handler a family, and a table of all."""

from __future__ import annotations

import functools
import math
import operator
import string
import types
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function

from fmaq import ops
from fmaq.emulation import contractions, recurrent
from fmaq.emulation.calls import Call
from fmaq.emulation.contractions import BatchedProduct, CannotContract
from fmaq.emulation.met import Met
from fmaq.emulation.products import (
    announce,
    autocast_dtype,
    why_untouched,
)
from fmaq.emulation.rule import CHOSEN_FIELDS, heads_of
from fmaq.numerics import Accumulator
from fmaq.ops.attention import attend
from fmaq.ops.operands import full_precision

Handler = Callable[[Met], Any]


def _into(out: Tensor | None, result: Tensor) -> Tensor:
    """The result, in the tensor given as `out` where there is one."""
    if out is None:
        return result
    if out.shape != result.shape:
        out.resize_(result.shape)
    return out.copy_(result)


def _product(met: Met, second: str, kind: str = "matmul") -> Tensor:
    """matmul, mm, bmm, mv, dot, @."""
    bound, again = met.bind("input", second)
    a, b = bound["input"], bound[second]
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return met.by_torch()
    out = bound.get("out")
    result = met.product(kind, a, b, torch_product=lambda a, b: again(**{"input": a, second: b}))
    return result if result is out else _into(out, result)


def _reversed_product(met: Met) -> Tensor:
    """b.__rmatmul__(a) is a @ b."""
    b, a = met.args
    return met.product("matmul", a, b)


def _sum_and_product(
    met: Met, first: str, second: str, in_place: bool, over_batch: bool = False, kind: str = "matmul"
) -> Tensor:
    """addmm, addmv, baddbmm, addbmm: beta·input + alpha·(first · second), the sum in float32."""
    bound, again = met.bind("input", first, second, beta=1, alpha=1)
    start, out = bound["input"], bound.get("out")

    def emulated(a: Tensor, b: Tensor, accumulator: Accumulator, **how: Any) -> Tensor:
        if over_batch:
            a, b = a.transpose(0, 1).flatten(1), b.flatten(0, 1)
        product = ops.matmul(a, b, accumulator, **how)
        product = product if bound["alpha"] == 1 else bound["alpha"] * product
        return product if bound["beta"] == 0 else bound["beta"] * start + product

    a, b = bound[first], bound[second]
    steps = a.shape[-1] * (a.shape[0] if over_batch else 1)
    result = met.product(
        kind,
        a,
        b,
        steps=steps,
        torch_product=lambda a, b: again(**{first: a, second: b}),
        emulated_product=emulated,
    )
    out = start if in_place else out
    return result if result is out else _into(out, result)


def _linear(met: Met) -> Tensor:
    bound, again = met.bind("input", "weight", bias=None)
    x, weight = bound["input"], bound["weight"]
    return met.product(
        "linear",
        x,
        weight,
        is_weight=(False, True),
        torch_product=lambda x, weight: again(input=x, weight=weight),
        emulated_product=lambda x, weight, acc, **how: ops.linear(x, weight, bound["bias"], acc, **how),
    )


def _convolution(met: Met, kind: str, operation: Callable[..., Tensor], defaults: dict[str, Any]) -> Tensor:
    """conv1d … conv3d and their transposed forms; `operation` is ours."""
    bound, again = met.bind("input", "weight", bias=None, **defaults)
    x, weight = bound["input"], bound["weight"]
    options = {name: bound[name] for name in defaults}
    transposed = "output_padding" in defaults
    spatial = math.prod(weight.shape[2:])
    in_group = weight.shape[0] // options["groups"] if transposed else weight.shape[1]
    return met.product(
        kind,
        x,
        weight,
        is_weight=(False, True),
        steps=in_group * spatial,
        macs=x.numel() * weight.shape[1] * spatial if transposed else None,
        options=options,
        torch_product=lambda x, weight: again(input=x, weight=weight),
        emulated_product=lambda x, weight, acc, **how: operation(x, weight, bound["bias"], acc, **options, **how),
    )


def _general_convolution(met: Met) -> Tensor:
    """torch.convolution: the arguments say which."""
    names = ("input", "weight", "bias", "stride", "padding", "dilation", "transposed", "output_padding", "groups")
    bound, _ = met.bind(*names)
    kind = f"conv{'_transpose' if bound['transposed'] else ''}{bound['input'].dim() - 2}d"
    keep = [name for name in names if name != "transposed" and (bound["transposed"] or name != "output_padding")]
    function = getattr(F, kind)
    return HANDLERS[function](
        Met(met.call, function, (), {k: bound[k] for k in keep}, met.is_weight, met.is_activation, met.mode)
    )


def _attention(met: Met) -> Tensor:
    """Two products, float32 between them; the probabilities are an activation, and quantized as such."""
    bound, again = met.bind(
        "query", "key", "value", attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
    )
    query, key, value = (bound.pop(name) for name in ("query", "key", "value"))
    reason = why_untouched(met.call.attachment.rule, (query, key, value))
    if reason is None:
        dtype = autocast_dtype(query) or query.dtype
        score = functools.partial(met.product, "attention_scores", is_weight=(False, False))
        if bound["enable_gqa"] and _is_by_query_head(met.call, query.shape[-3]):
            groups = query.shape[-3] // key.shape[-3]
            key, value = (x.repeat_interleave(groups, -3) for x in (key, value))
            bound["enable_gqa"] = False
        with full_precision(query.device.type):
            query, key, value = (x.to(dtype).float() for x in (query, key, value))
            mix = functools.partial(met.product, "attention_values", is_weight=(False, met.is_weight(value)))
            return attend(query, key, value, score, mix, **bound).to(dtype)
    result = again()
    width = query.shape[-1]
    scores = query.shape[:-1].numel() * key.shape[-2]
    probabilities = torch.empty(*query.shape[:-1], key.shape[-2], dtype=query.dtype, device="meta")  # torch keeps them
    announce(met.call, "attention_scores", (query, key.mT), reason, width, scores * width)
    announce(met.call, "attention_values", (probabilities, value), reason, key.shape[-2], scores * value.shape[-1])
    return result


def _is_by_query_head(call: Call, heads: int) -> bool:
    """A rule of attention's two products has numbers for so many heads: it was calibrated on repeated keys."""
    rule = call.attachment.rule
    if rule is None:
        return False
    both = [rule.for_product(f"attention_{what}", call.products + i) for i, what in enumerate(("scores", "values"))]
    return any(heads_of(getattr(one, name)) == heads for one in both for name in CHOSEN_FIELDS)


def _multi_head_attention(met: Met) -> Any:
    """Opened: torch's own definition, with every product in it met in its turn."""
    original = F.multi_head_attention_forward
    names = {**original.__globals__, "has_torch_function": lambda _: False, "torch": _TorchOfAttention()}
    opened = types.FunctionType(
        original.__code__, names, original.__name__, original.__defaults__, original.__closure__
    )
    opened.__kwdefaults__ = original.__kwdefaults__
    with met.mode:
        return opened(*met.args, **met.kwargs)


class _TorchOfAttention:
    """`torch`, whose first batched product is that of an attention's scores, and the second that of its values.

    `F.multi_head_attention_forward` computes both so where it is to return the weights.
    """

    def __init__(self) -> None:
        self._kinds = iter(("attention_scores", "attention_values"))

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    def bmm(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._met(torch.bmm, args, kwargs)

    def baddbmm(self, *args: Any, **kwargs: Any) -> Tensor:
        return self._met(torch.baddbmm, args, kwargs)

    def _met(self, func: Callable[..., Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
        named = functools.partial(of_kind, func, next(self._kinds))
        result: Tensor = handle_torch_function(named, args, *args, **kwargs)
        return result


def of_kind(func: Callable[..., Tensor], kind: str, *args: Any, **kwargs: Any) -> Tensor:
    """A torch function, whose product is known to be of a kind."""
    return func(*args, **kwargs)


def handler_of_kind(partial: functools.partial[Any]) -> Handler:
    """What computes `partial(of_kind, func, kind)` under emulation."""
    func, kind = partial.args
    handler: Callable[..., Any] = HANDLERS[func]
    return lambda met: handler(replace(met, func=func), kind=kind)


def _contraction(
    met: Met, kind: str, tensors: Sequence[Tensor], run: Callable[[BatchedProduct], Tensor], macs: int | None = None
) -> Tensor:
    """einsum and its relatives, through batched products; `macs` where they stay torch's own."""
    reason = why_untouched(met.call.attachment.rule, tensors)
    if reason is not None:
        return met.not_covered(kind, reason, macs)

    def product(left: Tensor, right: Tensor, a: Tensor, b: Tensor) -> Tensor:
        flags = (met.is_weight(a), met.is_weight(b))
        is_attention = left.shape[-1] == 1 and met.may_be_attention(a, b)
        return met.product(kind, left, right, is_weight=flags, is_attention=is_attention)

    try:
        return run(product)
    except CannotContract as why:
        return met.not_covered(kind, str(why))


def _einsum(met: Met) -> Tensor:
    equation, *operands = met.args
    if len(operands) == 1 and isinstance(operands[0], (tuple, list)):
        operands = list(operands[0])
    if not isinstance(equation, str):
        return met.not_covered("einsum", "an equation in sublist form")
    if len(operands) < 2:
        return met.by_torch()
    macs = contractions.macs(equation, operands) if len(operands) == 2 else None
    return _contraction(met, "einsum", operands, lambda product: contractions.einsum(equation, operands, product), macs)


def _tensordot(met: Met) -> Tensor:
    bound, _ = met.bind("a", "b", dims=2, out=None)
    a, b, dims = bound["a"], bound["b"], bound["dims"]
    if isinstance(dims, Tensor):
        dims = dims.tolist()
    if isinstance(dims, int):
        dims = (range(a.dim() - dims, a.dim()), range(dims))
    pairs = [(i % a.dim(), j % b.dim()) for i, j in zip(*dims, strict=True)]
    a_labels, b_labels = list(LETTERS[: a.dim()]), list(LETTERS[a.dim() : a.dim() + b.dim()])
    for i, j in pairs:
        b_labels[j] = a_labels[i]
    output = "".join(c for c in a_labels + b_labels if not (c in a_labels and c in b_labels))
    labels = "".join(a_labels), "".join(b_labels)
    result = _contraction(
        met, "tensordot", (a, b), lambda product: contractions.contract(labels[0], a, labels[1], b, output, product)
    )
    return result if result is bound["out"] else _into(bound["out"], result)


def _inner(met: Met) -> Tensor:
    bound, _ = met.bind("input", "other")
    a, b = bound["input"], bound["other"]
    if a.dim() == 0 or b.dim() == 0:
        return met.by_torch()
    rows, columns = LETTERS[1 : a.dim()], LETTERS[a.dim() : a.dim() + b.dim() - 1]
    run = functools.partial(contractions.contract, f"{rows}z", a, f"{columns}z", b, rows + columns)
    result = _contraction(met, "inner", (a, b), run)
    out = bound.get("out")
    return result if result is out else _into(out, result)


def _vecdot(met: Met) -> Tensor:
    bound, _ = met.bind("x", "y", dim=-1)
    a, b = (x.movedim(bound["dim"], -1) for x in torch.broadcast_tensors(bound["x"], bound["y"]))
    labels = LETTERS[1 : a.dim()]
    run = functools.partial(contractions.contract, f"{labels}z", a, f"{labels}z", b, labels)
    result = _contraction(met, "vecdot", (a, b), run)
    out = bound.get("out")
    return result if result is out else _into(out, result)


def _bilinear(met: Met) -> Tensor:
    """y_o = Σ_j (Σ_i x1_i W_oij) x2_j + bias_o: two products."""
    bound, _ = met.bind("input1", "input2", "weight", bias=None)
    operands = (bound["input1"], bound["weight"], bound["input2"])
    covered = why_untouched(met.call.attachment.rule, operands) is None
    result = _contraction(
        met, "bilinear", operands, lambda product: contractions.einsum("...i,oij,...j->...o", operands, product)
    )
    return result + bound["bias"] if covered and bound["bias"] is not None else result


def _grouped(met: Met) -> Tensor:
    """grouped_mm of rows: those up to each offset with that group's matrix, as mixtures of experts do."""
    bound, _ = met.bind("mat_a", "mat_b", offs=None, bias=None, out_dtype=None)
    a, b, offsets = bound["mat_a"], bound["mat_b"], bound["offs"]
    reason = why_untouched(met.call.attachment.rule, (a, b))
    if reason is not None:
        return met.not_covered("grouped_mm", reason)
    if a.dim() != 2 or b.dim() != 3 or offsets is None or bound["bias"] is not None:
        return met.not_covered("grouped_mm", "only rows in groups, without a bias, are known")
    ends = offsets.tolist()
    flags = (met.is_weight(a), met.is_weight(b))
    parts = [
        met.product("grouped_mm", a[start:end], b[group], is_weight=flags)
        for group, (start, end) in enumerate(zip([0, *ends], ends, strict=False))
    ]
    rest = a.new_zeros(a.shape[0] - ends[-1], b.shape[2])
    return torch.cat([*parts, rest.to(parts[0].dtype)]).to(bound["out_dtype"] or parts[0].dtype)


def _not_covered(met: Met, kind: str, reason: str) -> Any:
    return met.not_covered(kind, reason)


def _embedding_bag(met: Met) -> Any:
    """Rows times weights of their own, summed by bag; without such weights nothing is multiplied."""
    weights = next((x for x in (met.kwargs.get("per_sample_weights"), *met.args[6:]) if isinstance(x, Tensor)), None)
    if weights is None:
        return met.by_torch()
    given = [x for x in (*met.args, *met.kwargs.values()) if isinstance(x, Tensor)]
    table = next(x for x in given if x.is_floating_point() and x is not weights)
    return met.not_covered("embedding_bag", "a fused kernel computes it as a whole", weights.numel() * table.shape[-1])


def _cosine_similarity(met: Met) -> Any:
    """The product of two vectors, by their lengths."""
    bound, _ = met.bind("x1", "x2", dim=1, eps=1e-8)
    size = torch.broadcast_shapes(bound["x1"].shape, bound["x2"].shape).numel()
    return met.not_covered("cosine_similarity", "a fused kernel computes it as a whole", size)


def _table() -> tuple[dict[Callable[..., Any], Handler], dict[str, Handler]]:
    """Handlers by torch function, and by name for `torch.ops.aten`."""
    named: dict[str, Handler] = {}
    for name, second in {
        "matmul": "other",
        "mm": "mat2",
        "bmm": "mat2",
        "mv": "vec",
        "dot": "tensor",
        "vdot": "other",
    }.items():
        named[name] = functools.partial(_product, second=second)
    for name, (first, second) in {
        "addmm": ("mat1", "mat2"),
        "addmv": ("mat", "vec"),
        "baddbmm": ("batch1", "batch2"),
        "addbmm": ("batch1", "batch2"),
    }.items():
        sums = functools.partial(_sum_and_product, first=first, second=second, over_batch=name == "addbmm")
        named[name] = functools.partial(sums, in_place=False)
        named[f"{name}_"] = functools.partial(sums, in_place=True)
    for d in (1, 2, 3):
        convolution = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
        transposed = {"stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}
        for kind, defaults in ((f"conv{d}d", convolution), (f"conv_transpose{d}d", transposed)):
            operation = getattr(ops, kind)
            named[kind] = functools.partial(_convolution, kind=kind, operation=operation, defaults=defaults)
    named |= {
        "linear": _linear,
        "convolution": _general_convolution,
        "scaled_dot_product_attention": _attention,
        "multi_head_attention_forward": _multi_head_attention,
        "einsum": _einsum,
        "tensordot": _tensordot,
        "inner": _inner,
        "vecdot": _vecdot,
        "linalg_vecdot": _vecdot,
        "bilinear": _bilinear,
        "embedding_bag": _embedding_bag,
        "cosine_similarity": _cosine_similarity,
        "grouped_mm": _grouped,
        "_grouped_mm": _grouped,
    }
    for name in recurrent.STEPS:
        cell, quantized = f"{name}_cell", f"quantized_{name}_cell"
        named[name] = functools.partial(recurrent.layer, kind=name)
        named[cell] = functools.partial(recurrent.cell, kind=cell)
        named[quantized] = functools.partial(recurrent.quantized_cell, kind=quantized)
    for reason, names in NOT_COVERED.items():
        named |= {name: functools.partial(_not_covered, kind=name, reason=reason) for name in names}
    by_function: dict[Callable[..., Any], Handler] = {torch.Tensor.__rmatmul__: _reversed_product}
    by_function |= dict.fromkeys((operator.matmul, torch.Tensor.__matmul__), named["matmul"])  # @ in an export
    for name, handler in named.items():
        for place in (torch, torch.Tensor, torch.linalg, torch.sparse, F, torch._C._nn):
            function = getattr(place, name, None)
            if callable(function):
                by_function[function] = handler
    return by_function, named


LETTERS = string.ascii_letters[:25] + string.ascii_letters[26:]

NOT_COVERED = {
    "a fused kernel computes it as a whole": (
        *(
            "_native_multi_head_attention",
            "_transformer_encoder_layer_fwd",
            "linear_cross_entropy",
            "_addmm_activation",
        ),
        *("conv_tbc", "cdist", "multi_dot", "chain_matmul", "matrix_power", "matrix_exp", "_convolution", "_trilinear"),
        *("cov", "corrcoef", "affine_grid", "pinv", "pinverse"),
        *("scaled_mm", "_scaled_mm", "scaled_grouped_mm", "_scaled_grouped_mm", "_int_mm", "_foreach_mm"),
        *("_weight_int4pack_mm", "_weight_int8pack_mm", "_scaled_dot_product_flash_attention_for_cpu"),
        *("_scaled_dot_product_flash_attention", "_scaled_dot_product_efficient_attention"),
    ),
    "a sparse product": ("smm", "hspmm", "sspaddmm", "_sparse_mm", "sampled_addmm", "_sparse_semi_structured_linear"),
}

HANDLERS, ATEN = _table()
