"""Scaled dot-product attention as two emulated products; scale, mask and softmax between them are float32."""

from __future__ import annotations

import torch
from torch import Tensor

from fmaq.ops.matmul import matmul
from fmaq.ops.operands import AccumulatorLike, widen


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
) -> Tensor:
    """`torch.nn.functional.scaled_dot_product_attention` whose two products are summed in `acc`.

    Args:
        q: (…, L, E). k: (…, S, E). v: (…, S, Ev).
        attn_mask: boolean (True takes part) or float (added to the scores), broadcastable to (…, L, S).
        scale: of the scores, after the product; 1/√E unless given.
        enable_gqa: heads of k and v, the third dimension from the end, serve several of q's.
        acc, estimator: see `matmul`.

    Returns:
        (…, L, Ev) in float32. A row that is masked everywhere is zero, as in torch.

    Raises:
        ValueError: shapes that do not fit, or a mask together with is_causal.
    """
    if attn_mask is not None and is_causal:
        raise ValueError("give either attn_mask or is_causal=True, not both")
    if enable_gqa:
        k, v = (_serve_heads(x, q.shape[-3]) for x in (k, v))
    scores = matmul(q, k.transpose(-2, -1), acc, estimator) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool, device=q.device).tril()
    if attn_mask is not None:
        is_choice = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if is_choice else scores + widen(attn_mask, "attn_mask")
    is_masked = (scores == -torch.inf).all(-1, keepdim=True)
    weights = torch.softmax(scores.masked_fill(is_masked, 0.0), -1).masked_fill(is_masked, 0.0)
    if dropout_p > 0:
        weights = torch.nn.functional.dropout(weights, dropout_p)
    return matmul(weights, v, acc, estimator)


def _serve_heads(x: Tensor, heads: int) -> Tensor:
    if heads % x.shape[-3]:
        raise ValueError(f"q's {heads} heads are not a multiple of the {x.shape[-3]} heads of k and v")
    return x.repeat_interleave(heads // x.shape[-3], -3)
