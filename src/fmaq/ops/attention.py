"""Scaled dot-product attention as two emulated products; scale, mask and softmax between them are float32."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fmaq.ops.matmul import matmul
from fmaq.ops.operands import AccumulatorLike, widen

Product = Callable[[Tensor, Tensor], Tensor]


def scaled_dot_product_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    acc: AccumulatorLike,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    estimator: str = "identity",
    backward: AccumulatorLike | None = None,
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` whose two products are summed in `acc`.

    Args:
        q: (…, L, E). k: (…, S, E). v: (…, S, Ev).
        attn_mask: boolean (True takes part) or float (added to the scores), broadcastable to (…, L, S).
        scale: of the scores, after the product; 1/√E unless given.
        enable_gqa: heads of k and v, the third dimension from the end, serve several of q's each.
        acc, estimator, backward: see `matmul`.

    Returns:
        (…, L, Ev) in float32. A row that is masked everywhere is zero, as in torch.

    Raises:
        TypeError: an operand's or the mask's dtype.
        ValueError: shapes that do not fit, or a mask together with is_causal.
    """
    q, k, v = widen(q, "q"), widen(k, "k"), widen(v, "v")

    def product(a: Tensor, b: Tensor) -> Tensor:
        return matmul(a, b, acc, estimator, backward=backward)

    return attend(q, k, v, product, product, attn_mask, dropout_p, is_causal, scale, enable_gqa)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    score: Product,
    mix: Product,
    attn_mask: Tensor | None,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
    enable_gqa: bool,
) -> Tensor:
    """`scaled_dot_product_attention` over any products: score(q, kᵀ), then mix(probabilities, v)."""
    _check_shapes(q, k, v, enable_gqa)
    _check_mask(attn_mask, (q.shape[-2], k.shape[-2]), dropout_p, is_causal)
    heads, length = k.shape[-3] if enable_gqa else 0, q.shape[-2]
    scores = _ungrouped(score(_grouped(q, heads), k.transpose(-2, -1)), heads, length)
    scores = scores * (max(1, q.shape[-1]) ** -0.5 if scale is None else scale)
    weights = _probabilities(scores, attn_mask, is_causal)
    if dropout_p > 0:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return _ungrouped(mix(_grouped(weights, heads), v), heads, length)


def _probabilities(scores: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """Softmax over the keys that take part; zeros in a row where none does."""
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is None:
        return torch.softmax(scores, -1)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros(attn_mask.shape, dtype=torch.float32, device=attn_mask.device).masked_fill_(
            ~attn_mask, -torch.inf
        )
    scores = scores + widen(attn_mask, "attn_mask")
    is_masked = (scores == -torch.inf).all(-1, keepdim=True)
    # Zeroed before the softmax too: the gradient of a row of NaN would be NaN.
    return torch.softmax(scores.masked_fill(is_masked, 0.0), -1).masked_fill(is_masked, 0.0)


def _grouped(x: Tensor, heads: int) -> Tensor:
    """(…, H, L, E) as (…, heads, H/heads · L, E), so that no key is copied; 0 heads: x itself.

    A row's position for stochastic rounding, counted over the whole batch, stays what it was.
    """
    if heads == 0:
        return x
    return x.reshape(*x.shape[:-3], heads, x.shape[-3] // heads * x.shape[-2], x.shape[-1])


def _ungrouped(x: Tensor, heads: int, length: int) -> Tensor:
    """The inverse of `_grouped`, L being `length`."""
    if heads == 0:
        return x
    return x.reshape(*x.shape[:-3], heads * (x.shape[-2] // length if length else 1), length, x.shape[-1])


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, enable_gqa: bool) -> None:
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)} and v {tuple(v.shape)}"
    least = 3 if enable_gqa else 2
    if min(x.dim() for x in (q, k, v)) < least:
        raise ValueError(f"attention takes q, k and v of at least {least} dimensions, got {shapes}")
    if q.shape[-1] != k.shape[-1]:
        raise ValueError(f"q and k must have the same last dimension, got {shapes}")
    if k.shape[-2] != v.shape[-2]:
        raise ValueError(f"k and v must have the same last dimension but one, got {shapes}")
    if enable_gqa and (k.shape[-3] == 0 or k.shape[-3] != v.shape[-3] or q.shape[-3] % k.shape[-3]):
        raise ValueError(f"k and v must have as many heads, and q a multiple of them, got {shapes}")


def _check_mask(mask: Tensor | None, scores: tuple[int, int], dropout_p: float, is_causal: bool) -> None:
    if not 0 <= dropout_p <= 1:
        raise ValueError(f"dropout_p must be from 0 to 1, got {dropout_p}")
    if mask is None:
        return
    if is_causal:
        raise ValueError("give either attn_mask or is_causal=True, not both")
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise TypeError(f"attn_mask must be bool (True takes part) or float (added to the scores), got {mask.dtype}")
    if any(size not in (1, want) for size, want in zip((1, 1, *mask.shape)[-2:], scores, strict=True)):
        raise ValueError(
            f"attn_mask must broadcast to (…, L, S) = (…, {scores[0]}, {scores[1]}), got {tuple(mask.shape)}"
        )
