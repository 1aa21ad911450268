"""Attention: the two products by equality with the reference, torch's own where nothing is lost, and messages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fmaq
from fmaq.numerics import Accumulator
from ops_cases import ACCUMULATORS, EXACT, accumulators, reference_matmul, same, torch_gradients, values


def operands(rng, lead=(2, 3), lengths=(4, 5), width=6, value_width=3):
    queries, keys = lengths
    shapes = (*lead, queries, width), (*lead, keys, width), (*lead, keys, value_width)
    return [values(rng, shape) for shape in shapes]


def by_reference(q, k, v, acc, mask=None, scale=None):
    """Both products by the reference; between them, float32 in torch."""
    scores = torch.from_numpy(reference_matmul(q, k.mT, acc).astype(np.float32))
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    return reference_matmul(scores.softmax(-1).nan_to_num(0.0), v, acc)


@settings(max_examples=30)
@given(
    st.sampled_from([(), (2,), (2, 3)]),
    st.tuples(st.integers(1, 4), st.integers(1, 5)),
    st.integers(1, 6),
    accumulators,
    st.sampled_from([None, "bool", "float", "causal"]),
    st.sampled_from([None, 0.3]),
    st.integers(0, 2**32 - 1),
)
def test_equals_the_reference(lead, lengths, width, acc, kind, scale, seed):
    rng = np.random.default_rng(seed)
    q, k, v = operands(rng, lead, lengths, width)
    mask = {"bool": torch.from_numpy(rng.random(lengths) > 0.4), "float": values(rng, lengths)}.get(kind)
    y = fmaq.scaled_dot_product_attention(q, k, v, acc, mask, is_causal=kind == "causal", scale=scale)
    if kind == "causal":
        mask = torch.ones(lengths, dtype=torch.bool).tril()
    same(y, by_reference(q, k, v, acc, mask, scale))


@pytest.mark.parametrize("acc", ACCUMULATORS, ids=str)
def test_grouped_queries_equal_repeated_keys(acc):
    rng = np.random.default_rng(1)
    q = values(rng, (2, 6, 4, 8))
    k, v = values(rng, (2, 3, 5, 8)), values(rng, (2, 3, 5, 7))
    mask = torch.from_numpy(rng.random((2, 1, 4, 5)) > 0.3)
    y = fmaq.scaled_dot_product_attention(q, k, v, acc, mask, enable_gqa=True)
    repeated = [x.repeat_interleave(2, -3) for x in (k, v)]
    assert torch.equal(y, fmaq.scaled_dot_product_attention(q, *repeated, acc, mask))
    same(y, by_reference(q, *repeated, acc, mask))


def mask_cases():
    nowhere = torch.ones(4, 5, dtype=torch.bool)
    nowhere[1] = False
    return {
        "none": {},
        "causal": {"is_causal": True},
        "bool": {"attn_mask": nowhere},
        "float": {"attn_mask": torch.zeros(4, 5).masked_fill(~nowhere, -torch.inf)},
        "by head": {"attn_mask": torch.arange(60.0).reshape(3, 4, 5) / 30},
        "scale": {"scale": 0.1},
        "one key": {"attn_mask": nowhere[:, :1]},
    }


@pytest.mark.parametrize("name", mask_cases())
def test_values_and_gradients_are_those_of_torch_when_nothing_is_lost(name):
    options = mask_cases()[name]
    rng = np.random.default_rng(2)
    inputs = [x.requires_grad_() for x in operands(rng)]
    mine = fmaq.scaled_dot_product_attention(*inputs, EXACT, **options)
    theirs = F.scaled_dot_product_attention(*inputs, **options)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)
    grad = values(rng, mine.shape)
    expected = torch_gradients(theirs, inputs, grad)
    torch.testing.assert_close(torch_gradients(mine, inputs, grad), expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_grouped_queries():
    rng = np.random.default_rng(3)
    shapes = (2, 4, 3, 5), (2, 2, 6, 5), (2, 2, 6, 3)
    inputs = [values(rng, shape).requires_grad_() for shape in shapes]
    mine = fmaq.scaled_dot_product_attention(*inputs, EXACT, is_causal=True, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(*inputs, is_causal=True, enable_gqa=True)
    grad = values(rng, mine.shape)
    expected = torch_gradients(theirs, inputs, grad)
    torch.testing.assert_close(torch_gradients(mine, inputs, grad), expected, rtol=1e-4, atol=1e-4)


def test_a_mask_with_a_gradient():
    rng = np.random.default_rng(4)
    inputs, mask = operands(rng), values(rng, (4, 5)).requires_grad_()
    (mine,) = torch_gradients(fmaq.scaled_dot_product_attention(*inputs, EXACT, mask).pow(2).sum(), [mask], None)
    (theirs,) = torch_gradients(F.scaled_dot_product_attention(*inputs, mask).pow(2).sum(), [mask], None)
    torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("shapes", [((0, 6), (5, 6), (5, 3)), ((4, 6), (0, 6), (0, 3)), ((4, 0), (5, 0), (5, 3))])
def test_empty_dimensions(shapes):
    inputs = [torch.ones(2, *shape) for shape in shapes]
    mine, theirs = fmaq.scaled_dot_product_attention(*inputs, EXACT), F.scaled_dot_product_attention(*inputs)
    torch.testing.assert_close(mine, theirs)


def test_dropout_drops_probabilities_and_scales_the_rest():
    rng = np.random.default_rng(5)
    q, k, _ = operands(rng, (), (40, 30))
    torch.manual_seed(0)
    y = fmaq.scaled_dot_product_attention(q, k, torch.eye(30), EXACT, dropout_p=0.25)
    whole = fmaq.scaled_dot_product_attention(q, k, torch.eye(30), EXACT)
    kept = y != 0
    assert 0.7 < kept.float().mean() < 0.8
    torch.testing.assert_close(y[kept], whole[kept] / 0.75, rtol=1e-4, atol=1e-6)
    assert not fmaq.scaled_dot_product_attention(q, k, torch.eye(30), EXACT, dropout_p=1.0).any()


def test_half_precision_and_autocast():
    rng = np.random.default_rng(6)
    inputs = [x.bfloat16().requires_grad_() for x in operands(rng)]
    y = fmaq.scaled_dot_product_attention(*inputs, "paper12", is_causal=True)
    mask = torch.ones(4, 5, dtype=torch.bool).tril()
    same(y, by_reference(*(x.float() for x in inputs), Accumulator.paper12, mask))
    with torch.autocast("cpu"):
        under = fmaq.scaled_dot_product_attention(*inputs, "paper12", is_causal=True)
    assert torch.equal(under, y)
    assert [g.dtype for g in torch_gradients(under.sum(), inputs, None)] == [torch.bfloat16] * 3


Q, K, V = torch.ones(2, 4, 6), torch.ones(2, 5, 6), torch.ones(2, 5, 3)


@pytest.mark.parametrize(
    ("inputs", "options", "error", "message"),
    [
        (
            (Q, K[..., :5], V),
            {},
            ValueError,
            r"q and k must have the same last dimension, got q \(2, 4, 6\), k \(2, 5, 5\)",
        ),
        ((Q, K, V[:, :4]), {}, ValueError, "k and v must have the same last dimension but one"),
        ((Q[0, 0], K, V), {}, ValueError, "at least 2 dimensions"),
        ((Q[0], K[0], V[0]), {"enable_gqa": True}, ValueError, "at least 3 dimensions"),
        ((torch.ones(3, 4, 6), K, V), {"enable_gqa": True}, ValueError, "q a multiple of them"),
        ((Q, K, V), {"attn_mask": torch.ones(4, 5), "is_causal": True}, ValueError, "either attn_mask or is_causal"),
        (
            (Q, K, V),
            {"attn_mask": torch.ones(5, 4)},
            ValueError,
            r"broadcast to \(…, L, S\) = \(…, 4, 5\), got \(5, 4\)",
        ),
        ((Q, K, V), {"attn_mask": torch.ones(4, 5).int()}, TypeError, "attn_mask must be bool .* got torch.int32"),
        ((Q, K, V), {"dropout_p": 1.5}, ValueError, "dropout_p must be from 0 to 1, got 1.5"),
        ((Q.double(), K, V), {}, TypeError, "q has dtype torch.float64"),
    ],
)
def test_messages(inputs, options, error, message):
    with pytest.raises(error, match=message):
        fmaq.scaled_dot_product_attention(*inputs, "paper12", **options)
