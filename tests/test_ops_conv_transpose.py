"""Transposed convolutions: the reference over zero-stuffed image and flipped kernel, torch's gradients, messages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fmaq
from ops_cases import EXACT, accumulators, reference_conv, same, spoiled, torch_gradients, values

OURS = {1: fmaq.conv_transpose1d, 2: fmaq.conv_transpose2d, 3: fmaq.conv_transpose3d}
TORCHS = {1: F.conv_transpose1d, 2: F.conv_transpose2d, 3: F.conv_transpose3d}


@st.composite
def cases(draw, dims):
    """Shapes and arguments that leave an output: (x shape, weight shape, stride, padding, extra, groups, dilation)."""

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.integers(1, 2))
    kernel, stride, dilation, sizes = each(1, 3), each(1, 3), each(1, 2), each(1, 3)
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    full = [
        (n - 1) * s + d * (k - 1) + e + 1 for n, s, d, k, e in zip(sizes, stride, dilation, kernel, extra, strict=True)
    ]
    padding = tuple(draw(st.integers(0, (size - 1) // 2)) for size in full)
    inputs, outputs = groups * draw(st.integers(1, 2)), draw(st.integers(1, 2))
    x_shape = (draw(st.integers(0, 2)), inputs, *sizes)
    return x_shape, (inputs, outputs, *kernel), stride, padding, extra, groups, dilation


def by_definition(x, weight, acc, stride, padding, extra, groups, dilation):
    """The convolution of the zero-stuffed image with the flipped kernel, stuffed and flipped element by element."""
    dims = len(stride)
    margins = [d * (k - 1) - p for d, k, p in zip(dilation, weight.shape[2:], padding, strict=True)]
    spans = [(n - 1) * s + 1 for n, s in zip(x.shape[2:], stride, strict=True)]
    stuffed = torch.zeros(*x.shape[:2], *[n + 2 * m + e for n, m, e in zip(spans, margins, extra, strict=True)])
    for at in np.ndindex(*x.shape[2:]):
        target = [i * s + m for i, s, m in zip(at, stride, margins, strict=True)]
        if all(0 <= t < size for t, size in zip(target, stuffed.shape[2:], strict=True)):
            stuffed[(..., *target)] = x[(..., *at)]
    per_group = weight.shape[0] // groups
    parts = [weight[g * per_group : (g + 1) * per_group].transpose(0, 1) for g in range(groups)]
    flipped = torch.cat(parts).flip(list(range(2, 2 + dims)))
    return reference_conv(stuffed, flipped, acc, (1,) * dims, [(0, 0)] * dims, dilation, groups)


@settings(max_examples=60)
@given(st.sampled_from([1, 2, 2, 3]).flatmap(cases), accumulators, st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_equals_the_definition(case, acc, bad, seed):
    x_shape, weight_shape, *options = case
    rng = np.random.default_rng(seed)
    x, weight = spoiled(rng, values(rng, x_shape), bad), spoiled(rng, values(rng, weight_shape), bad // 2)
    stride, padding, extra, groups, dilation = options
    y = OURS[len(stride)](x, weight, None, acc, stride, padding, extra, groups, dilation)
    assert y.shape == TORCHS[len(stride)](x.nan_to_num(), weight.nan_to_num(), None, *options).shape
    same(y, by_definition(x, weight, acc, *options))


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 3]).flatmap(cases), st.booleans(), st.integers(0, 2**32 - 1))
def test_values_and_gradients_are_those_of_torch_when_nothing_is_lost(case, is_under_autocast, seed):
    x_shape, weight_shape, *options = case
    rng = np.random.default_rng(seed)
    bias_shape = (weight_shape[1] * options[3],)
    x, weight, bias = (values(rng, s).requires_grad_() for s in (x_shape, weight_shape, bias_shape))
    dims = len(options[0])
    y = TORCHS[dims](x, weight, bias, *options)
    grad = values(rng, y.shape)
    theirs = torch_gradients(y, (x, weight, bias), grad)
    with torch.autocast("cpu", enabled=is_under_autocast):
        mine = OURS[dims](x, weight, bias, EXACT, *options)
        gradients = torch_gradients(mine, (x, weight, bias), grad)
    torch.testing.assert_close(mine, y, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(gradients, theirs, rtol=1e-4, atol=1e-4)


def test_without_a_batch():
    rng = np.random.default_rng(1)
    x, weight = values(rng, (3, 4, 4)), values(rng, (3, 2, 2, 2))
    y = fmaq.conv_transpose2d(x, weight, None, "paper12", 2)
    assert torch.equal(y, fmaq.conv_transpose2d(x[None], weight, None, "paper12", 2)[0])


def test_stuffed_zeros_never_become_nan():
    x, weight = torch.ones(1, 1, 4), torch.ones(1, 1, 2)
    x[0, 0, 1] = torch.nan
    y = fmaq.conv_transpose1d(x, weight, None, EXACT, stride=3, output_padding=2)
    assert y[0, 0].isnan().nonzero().flatten().tolist() == [3, 4]


X, W = torch.ones(1, 4, 5, 5), torch.ones(4, 2, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((X[0, 0], W), r"over 2 dimension\(s\) takes x of 3 or 4 .* got x \(5, 5\)"),
        ((X, W[:3]), r"weight \(3, 2, 3, 3\) does not fit x \(1, 4, 5, 5\) in 1 group"),
        ((X, W, None, 1, 0, 0, 3), r"in 3 group\(s\): it must be \(channels, outputs / groups"),
        ((X, W, torch.ones(5)), r"bias must be \(2,\), got \(5,\)"),
        ((X, W, None, 2, 0, 2), r"output_padding \(2, 2\) must be smaller than stride \(2, 2\) or dilation"),
        ((X, W, None, 1, 9), r"leave no output: its size would be \(-11, -11\)"),
        ((X[..., :0], W), r"x \(1, 4, 5, 0\) and weight .* leave no output"),
    ],
)
def test_messages(arguments, message):
    x, weight, *rest = arguments
    with pytest.raises(ValueError, match=message):
        fmaq.conv_transpose2d(x, weight, *(rest[:1] or [None]), "paper12", *rest[1:])
