"""Convolutions: the reference over unfolded images by equality, torch's own gradients, and messages."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import fmaq
from fmaq.numerics import Accumulator
from ops_cases import ACCUMULATORS, EXACT, accumulators, reference_conv, same, spoiled, torch_gradients, values

OURS = {1: fmaq.conv1d, 2: fmaq.conv2d, 3: fmaq.conv3d}
TORCHS = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}


@st.composite
def convolutions(draw, dims):
    """Shapes and arguments that fit: (x shape, weight shape, stride, padding, dilation, groups)."""

    def each(low, high):
        return tuple(draw(st.integers(low, high)) for _ in range(dims))

    groups = draw(st.integers(1, 2))
    kernel, stride, padding, dilation = each(1, 3), each(1, 2), each(0, 2), each(1, 2)
    spans = [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)]
    least = [max(1, span - 2 * p) for span, p in zip(spans, padding, strict=True)]
    sizes = [low + draw(st.integers(0, 3)) for low in least]
    inputs, outputs = draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    return (
        (draw(st.integers(0, 2)), groups * inputs, *sizes),
        (outputs, inputs, *kernel),
        stride,
        padding,
        dilation,
        groups,
    )


def check(case, acc, bad, seed):
    x_shape, weight_shape, stride, padding, dilation, groups = case
    rng = np.random.default_rng(seed)
    x, weight = spoiled(rng, values(rng, x_shape), bad), spoiled(rng, values(rng, weight_shape), bad // 2)
    y = OURS[len(stride)](x, weight, None, acc, stride, padding, dilation, groups)
    same(y, reference_conv(x, weight, acc, stride, [(p, p) for p in padding], dilation, groups))


@settings(max_examples=60)
@given(st.sampled_from([1, 2, 2]).flatmap(convolutions), accumulators, st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_one_and_two_dimensions(case, acc, bad, seed):
    check(case, acc, bad, seed)


@settings(max_examples=15)
@given(convolutions(3), accumulators, st.integers(0, 2), st.integers(0, 2**32 - 1))
def test_three_dimensions(case, acc, bad, seed):
    check(case, acc, bad, seed)


@pytest.mark.filterwarnings("ignore:Using padding='same'")
@pytest.mark.parametrize("acc", ACCUMULATORS, ids=str)
@pytest.mark.parametrize("padding", ["same", "valid"])
@pytest.mark.parametrize("kernel", [(3, 2), (4, 1)])
@pytest.mark.parametrize("dilation", [1, 3])
def test_padding_by_name(padding, kernel, dilation, acc):
    rng = np.random.default_rng(1)
    x, weight = values(rng, (2, 3, 10, 6)), values(rng, (2, 3, *kernel))
    totals = [dilation * (k - 1) if padding == "same" else 0 for k in kernel]
    pairs = [(total // 2, total - total // 2) for total in totals]
    y = fmaq.conv2d(x, weight, None, acc, padding=padding, dilation=dilation)
    assert y.shape == torch.nn.Conv2d(3, 2, kernel, padding=padding, dilation=dilation)(x).shape
    same(y, reference_conv(x, weight, acc, (1, 1), pairs, (dilation,) * 2, 1))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_without_a_batch_in_another_layout_and_dtype(dims, dtype):
    rng = np.random.default_rng(2)
    x, weight = values(rng, (*[5] * dims, 3)).movedim(-1, 0).to(dtype), values(rng, (4, 3, *[2] * dims)).to(dtype)
    bias = values(rng, (4,))
    y = OURS[dims](x, weight, bias, "paper12")
    ones, none = (1,) * dims, [(0, 0)] * dims
    product = reference_conv(x[None], weight, Accumulator.paper12, ones, none, ones, 1)[0].astype(np.float32)
    same(y, product + bias.numpy().reshape(-1, *ones))


def test_padding_never_becomes_nan_and_a_spoiled_pixel_only_where_it_is_seen():
    x, weight = torch.ones(1, 2, 5, 5), torch.ones(4, 1, 3, 3)
    x[0, 1, 0, 0] = torch.inf
    y = fmaq.conv2d(x, weight, None, EXACT, padding=1, groups=2)
    assert y.isnan().nonzero().tolist() == [[0, c, i, j] for c in (2, 3) for i in (0, 1) for j in (0, 1)]


def test_no_channels_give_zeros_and_no_images_nothing():
    assert fmaq.conv1d(torch.ones(0, 2, 5), torch.ones(3, 2, 2), None, "paper12").shape == (0, 3, 4)
    same(fmaq.conv1d(torch.ones(2, 0, 5), torch.ones(3, 0, 2), None, "paper12"), np.zeros((2, 3, 4)))


# --- Gradients --------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(st.sampled_from([1, 2, 3]).flatmap(convolutions), st.booleans(), st.integers(0, 2**32 - 1))
def test_gradients_are_those_of_torch(case, is_under_autocast, seed):
    x_shape, weight_shape, stride, padding, dilation, groups = case
    rng = np.random.default_rng(seed)
    x, weight, bias = (values(rng, s).requires_grad_() for s in (x_shape, weight_shape, weight_shape[:1]))
    dims = len(stride)
    y = TORCHS[dims](x, weight, bias, stride, padding, dilation, groups)
    grad = values(rng, y.shape)
    theirs = torch_gradients(y, (x, weight, bias), grad)
    with torch.autocast("cpu", enabled=is_under_autocast):
        mine = OURS[dims](x, weight, bias, "paper12", stride, padding, dilation, groups)
        gradients = torch_gradients(mine, (x, weight, bias), grad)
    assert mine.dtype == torch.float32
    for ours, other in zip(gradients, theirs, strict=True):
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_gradients_with_uneven_padding_and_half_precision():
    rng = np.random.default_rng(3)
    x = values(rng, (2, 3, 6, 6)).bfloat16().requires_grad_()
    weight = values(rng, (4, 3, 2, 4)).requires_grad_()
    wide = x.detach().float().requires_grad_()
    grad = values(rng, (2, 4, 6, 6))
    mine = torch_gradients(fmaq.conv2d(x, weight, None, "paper12", padding="same"), (x, weight), grad)
    theirs = torch_gradients(F.conv2d(wide, weight, padding="same"), (wide, weight), grad)
    assert mine[0].dtype == torch.bfloat16
    torch.testing.assert_close(mine[0].float(), theirs[0], rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(mine[1], theirs[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
def test_only_the_gradient_that_is_wanted(wanted):
    x = torch.ones(1, 2, 4, requires_grad=wanted[0])
    weight = torch.ones(3, 2, 2, requires_grad=wanted[1])
    fmaq.conv1d(x, weight, None, "paper12").sum().backward()
    assert (x.grad is not None, weight.grad is not None) == wanted


def test_second_derivatives():
    rng = np.random.default_rng(4)
    x, weight = values(rng, (2, 2, 5)).requires_grad_(), values(rng, (3, 2, 2)).requires_grad_()

    def curvature(convolution):
        (first,) = torch.autograd.grad(convolution(x, weight).pow(2).sum(), x, create_graph=True)
        return torch_gradients(first.pow(2).sum(), (x, weight), torch.ones(()))

    mine = curvature(lambda x, w: fmaq.conv1d(x, w, None, EXACT, stride=2, padding=1))
    theirs = curvature(lambda x, w: F.conv1d(x, w, stride=2, padding=1))
    torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-3)


def test_vmap_over_images_weights_and_gradients():
    rng = np.random.default_rng(5)
    x, weights = values(rng, (3, 2, 2, 4, 4)), values(rng, (3, 3, 2, 2, 2))

    def convolve(x, weight):
        return fmaq.conv2d(x, weight, None, "paper12")

    one_weight = torch.func.vmap(convolve, (0, None))(x, weights[0])
    assert torch.equal(one_weight, torch.stack([convolve(v, weights[0]) for v in x]))
    one_each = torch.func.vmap(convolve)(x, weights)
    assert torch.equal(one_each, torch.stack([convolve(v, w) for v, w in zip(x, weights, strict=True)]))
    gradients = torch.func.vmap(torch.func.grad(lambda w, x: convolve(x, w).sum()), (None, 0))(weights[0], x)
    expected = torch.func.vmap(torch.func.grad(lambda w, x: F.conv2d(x, w).sum()), (None, 0))(weights[0], x)
    torch.testing.assert_close(gradients, expected, rtol=1e-4, atol=1e-4)


# --- Messages ---------------------------------------------------------------------------------------------------------

X, W = torch.ones(1, 4, 5, 5), torch.ones(2, 4, 3, 3)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((X[0, 0], W, None), ValueError, r"over 2 dimension\(s\) takes x of 3 or 4 .* got x \(5, 5\) and weight"),
        ((X, W[:, :3], None), ValueError, r"weight \(2, 3, 3, 3\) does not fit x \(1, 4, 5, 5\) in 1 group"),
        ((X, W, None, 1, 0, 1, 3), ValueError, r"in 3 group\(s\)"),
        ((X, W, None, 1, 0, 1, 0), ValueError, r"in 0 group\(s\)"),
        ((X, W[:0], None), ValueError, "has no outputs or an empty kernel"),
        ((X, W, torch.ones(3)), ValueError, r"bias must be \(2,\), got \(3,\)"),
        ((X, W, [1.0, 2.0]), TypeError, "bias must be a tensor, got list"),
        ((X, W, None, 0), ValueError, "stride must be an integer of at least 1, or 2 of them, got 0"),
        ((X, W, None, (1, 2, 1)), ValueError, r"stride must .* got \(1, 2, 1\)"),
        ((X, W, None, 1, -1), ValueError, "padding must be an integer of at least 0"),
        ((X, W, None, 1, "sama"), ValueError, 'padding must be a number, "same" or "valid", got \'sama\''),
        ((X, W, None, 2, "same"), ValueError, r'padding="same" needs stride 1, got \(2, 2\)'),
        ((X, W, None, 1, 0, 3), ValueError, r"kernel \(3, 3\) with dilation \(3, 3\) is larger than the padded .*5, 5"),
        ((X.double(), W, None), TypeError, "x has dtype torch.float64"),
    ],
)
def test_messages(arguments, error, message):
    x, weight, bias, *rest = arguments
    with pytest.raises(error, match=message):
        fmaq.conv2d(x, weight, bias, "paper12", *rest)
