"""Estimators and low-precision gradients in the public operations, against the reference and torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fmaq
from fmaq.emulation import Policy, attach
from fmaq.kernels import Geometry
from fmaq.numerics import Accumulator, reference
from ops_cases import EXACT, accumulators, reference_matmul, same, torch_gradients, values
from test_kernels_conv import unfolded
from test_kernels_gradients import NARROW, expected_of_conv, small_integers

ESTIMATORS = reference.ESTIMATORS[1:]
estimators = st.sampled_from(ESTIMATORS)
LOW = Accumulator("M4E3b3 product=M4E3b4 chunk=3")


def close(mine, theirs) -> None:
    np.testing.assert_allclose(mine.numpy(), theirs, rtol=1e-5, atol=1e-5)


# --- Estimators -------------------------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(accumulators, estimators, st.tuples(*[st.integers(1, 40)] * 3), st.integers(0, 2**32 - 1))
def test_linear_is_the_reference(acc, estimator, sizes, seed):
    rng = np.random.default_rng(seed)
    m, depth, n = sizes
    x, weight, bias = (values(rng, s).requires_grad_() for s in ((m, depth), (n, depth), (n,)))
    y = fmaq.linear(x, weight, bias, acc, estimator)
    assert torch.equal(y, fmaq.linear(x, weight, bias, acc))
    grad = values(rng, (m, n))
    of_x, of_weight, of_bias = torch_gradients(y, (x, weight, bias), grad)
    wanted_x, wanted_weight = reference.gradients(x.detach(), weight.detach().T, grad, acc, estimator)
    close(of_x, wanted_x)
    close(of_weight, wanted_weight.T)
    close(of_bias, grad.sum(0).numpy())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_batches_that_broadcast_add_up(estimator):
    rng = np.random.default_rng(1)
    a, b = values(rng, (2, 1, 7, 30)).requires_grad_(), values(rng, (3, 30, 5)).requires_grad_()
    grad = values(rng, (2, 3, 7, 5))
    of_a, of_b = torch_gradients(fmaq.matmul(a, b, LOW, estimator), (a, b), grad)
    wanted_a, wanted_b = np.zeros(a.shape), np.zeros(b.shape)
    for i in range(2):
        for j in range(3):
            first, second = reference.gradients(a.detach()[i, 0], b.detach()[j], grad[i, j], LOW, estimator)
            wanted_a[i, 0] += first
            wanted_b[j] += second
    close(of_a, wanted_a)
    close(of_b, wanted_b)


@pytest.mark.parametrize(
    "shapes", [((5,), (5,)), ((3, 5), (5,)), ((5,), (2, 5, 4)), ((0, 5), (5, 4)), ((3, 0), (0, 4))]
)
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_shapes_and_layouts_of_gradients(shapes, estimator):
    rng = np.random.default_rng(2)
    a, b = (values(rng, shape).requires_grad_() for shape in shapes)
    y = fmaq.matmul(a, b, EXACT, estimator)
    theirs = torch_gradients(torch.matmul(a, b), (a, b), torch.ones(y.shape))
    for mine, other in zip(torch_gradients(y, (a, b), torch.ones(y.shape)), theirs, strict=True):
        torch.testing.assert_close(mine, other)


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_are_unfold_and_the_reference(estimator, dims, groups):
    rng = np.random.default_rng(3)
    x, weight = small_integers(rng, 2, 4, *(9, 8, 7)[:dims]), small_integers(rng, 8, 4 // groups, *(3, 2, 3)[:dims])
    stride, padding, dilation = (2, 1, 3)[:dims], (1, 2, 0)[:dims], (1, 2, 1)[:dims]
    geometry = Geometry(stride, padding, dilation, groups)
    of_x, of_weight, grad = expected_of_conv(rng, x, weight, NARROW[1], estimator, geometry)
    operation = (fmaq.conv1d, fmaq.conv2d, fmaq.conv3d)[dims - 1]
    x.requires_grad_()
    weight.requires_grad_()
    y = operation(x, weight, None, NARROW[1], stride, padding, dilation, groups, estimator)
    mine = torch_gradients(y, (x, weight), grad)
    np.testing.assert_array_equal(mine[0].numpy(), of_x)
    np.testing.assert_array_equal(mine[1].numpy(), of_weight)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_transposed_convolution_is_that_of_the_zero_stuffed_input(estimator):
    rng = np.random.default_rng(4)
    x, weight = small_integers(rng, 2, 3, 5).requires_grad_(), small_integers(rng, 3, 4, 3).requires_grad_()
    y = fmaq.conv_transpose1d(x, weight, None, NARROW[0], stride=2, padding=1, estimator=estimator)
    grad = small_integers(rng, *y.shape)
    stuffed = torch.zeros(2, 3, 9)
    stuffed[..., ::2] = x.detach()
    stuffed.requires_grad_()
    flipped = weight.detach().flip(2).transpose(0, 1).clone().requires_grad_()
    same = fmaq.conv1d(stuffed, flipped, None, NARROW[0], padding=1, estimator=estimator)
    assert torch.equal(y, same)
    of_x, of_weight = torch_gradients(y, (x, weight), grad)
    of_stuffed, of_flipped = torch_gradients(same, (stuffed, flipped), grad)
    assert torch.equal(of_x, of_stuffed[..., ::2])
    assert torch.equal(of_weight, of_flipped.transpose(0, 1).flip(2))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_attention_is_two_products(estimator):
    rng = np.random.default_rng(5)
    q, k, v = (values(rng, (2, 3, n, 8)).requires_grad_() for n in (6, 7, 7))
    grad = values(rng, (2, 3, 6, 8))
    y = fmaq.scaled_dot_product_attention(q, k, v, LOW, estimator=estimator)
    scores = fmaq.matmul(q, k.mT, LOW, estimator) * 8**-0.5
    by_hand = fmaq.matmul(torch.softmax(scores, -1), v, LOW, estimator)
    assert torch.equal(y, by_hand)
    straight = fmaq.scaled_dot_product_attention(q, k, v, LOW)
    mine, theirs, others = (torch_gradients(out, (q, k, v), grad) for out in (y, by_hand, straight))
    assert all(torch.equal(x, z) for x, z in zip(mine, theirs, strict=True))
    assert not all(torch.equal(x, z) for x, z in zip(mine, others, strict=True))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_an_offset_moves_what_passes_and_a_gain_scales_it(estimator):
    rng = np.random.default_rng(6)
    a, b = values(rng, (6, 20)).requires_grad_(), values(rng, (20, 3)).requires_grad_()
    offset, gain, grad = torch.tensor([2, -3, 0]), torch.tensor([1.5, 2.0, 1.0]), values(rng, (6, 3))
    of_a, of_b = torch_gradients(fmaq.matmul(a, b, LOW, estimator, offset=offset, gain=gain), (a, b), grad)
    power = 2.0 ** offset.float()
    scaled = (b * power).detach()
    wanted_a, wanted_b = reference.gradients(a.detach(), scaled, grad * gain / power, LOW, estimator)
    close(of_a, wanted_a)
    close(of_b, wanted_b * power.numpy())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_nan_where_outputs_are_and_count(estimator):
    rng = np.random.default_rng(7)
    a, b, grad = values(rng, (6, 20)), values(rng, (20, 5)), torch.ones(6, 5)
    a[2, 3], b[4, 1] = torch.inf, torch.nan
    grad[2, 3:], grad[0, 1] = 0, 0  # NaN, but they do not count
    a.requires_grad_()
    b.requires_grad_()
    of_a, of_b = torch_gradients(fmaq.matmul(a, b, LOW, estimator), (a, b), grad)
    assert of_a.isnan().any(1).tolist() == of_a.isnan().all(1).tolist() == [False, True, True, True, True, True]
    assert of_b.isnan().any(0).tolist() == of_b.isnan().all(0).tolist() == [True, True, True, False, False]


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_of_a_convolution_are_nan_where_outputs_are(estimator):
    x, weight = torch.ones(2, 4, 5, 5), torch.ones(6, 2, 3, 3)
    x[0, 3, 0, 0] = torch.inf
    x.requires_grad_()
    weight.requires_grad_()
    of_x, of_weight = torch_gradients(
        fmaq.conv2d(x, weight, None, LOW, padding=1, groups=2, estimator=estimator), (x, weight), torch.ones(2, 6, 5, 5)
    )
    assert of_weight.isnan().flatten(1).all(1).tolist() == [False] * 3 + [True] * 3
    spoiled = of_x.isnan()
    assert spoiled[0, 2:, :3, :3].all()
    assert spoiled.sum() == 2 * 9


@pytest.mark.parametrize("estimator", ["immediate/diff", "recursive/of"])
def test_per_example_gradients(estimator):
    rng = np.random.default_rng(8)
    weight, x = values(rng, (5, 4)), values(rng, (6, 3, 5))
    filters, images = values(rng, (4, 2, 3)), values(rng, (6, 1, 2, 9))

    def of_product(weight, x):
        return fmaq.matmul(x, weight, LOW, estimator).pow(2).sum()

    def of_convolution(filters, images):
        return fmaq.conv1d(images, filters, None, LOW, estimator=estimator).pow(2).sum()

    for loss, parameter, examples in ((of_product, weight, x), (of_convolution, filters, images)):
        gradient = torch.func.grad(loss)
        each = torch.func.vmap(gradient, (None, 0))(parameter, examples)
        torch.testing.assert_close(each, torch.stack([gradient(parameter, example) for example in examples]))


def test_second_derivatives_are_refused():
    a, b = torch.ones(2, 3, requires_grad=True), torch.ones(3, 2)
    (first,) = torch.autograd.grad(fmaq.matmul(a, b, LOW, "immediate/diff").pow(2).sum(), a, create_graph=True)
    with pytest.raises(RuntimeError, match=r'estimator "immediate/diff" have no derivative; use "identity"'):
        first.sum().backward()


TRAINED = (
    "M2E3b6h product=M2E3b7h chunk=4 outer=M5E4b9",
    "M1E3b6h chunk=3 outer=(M3E3b6h chunk=2 outer=fp32)",
    "I5f2 product=I5f2 product_rounding=half_up chunk=4 outer=M5E4b7",
)
"""Half-unit formats, fixed point to the nearest, and outer levels, in which some steps below overflow or are lost."""


@pytest.mark.parametrize("underflow", [True, False])
@pytest.mark.parametrize("estimator", reference.ESTIMATORS)
@pytest.mark.parametrize("accumulator", TRAINED)
def test_both_stages_of_a_model_train_by_the_reference(accumulator, estimator, underflow):
    rng = np.random.default_rng(9)
    x, grad, layer = values(rng, (16, 30)).requires_grad_(), values(rng, (16, 5)), nn.Linear(30, 5, bias=False)
    layer.weight.data = values(rng, (5, 30))
    policy = Policy(accumulator=accumulator, estimator=estimator)
    model = attach(nn.Sequential(layer), policy.replace(underflow=underflow))
    acc = Accumulator.parse(Accumulator.parse(accumulator).to_mapping() | {"underflow": underflow})
    y = model(x)
    same(y, reference_matmul(x, layer.weight.mT, acc))
    of_x, of_weight = torch_gradients(y, (x, layer.weight), grad)
    wanted_x, wanted_weight = reference.gradients(x.detach(), layer.weight.detach().T, grad, acc, estimator)
    close(of_x, wanted_x)
    close(of_weight, wanted_weight.T)
    masks = reference.estimator_masks(x.detach(), layer.weight.detach().T, acc, estimator)
    assert masks.all() == (estimator == "identity")


# --- Identity ---------------------------------------------------------------------------------------------------------


def _attention(q, k, v):
    return fmaq.scaled_dot_product_attention(q, k, v, EXACT)


@pytest.mark.parametrize(
    ("function", "shapes", "step", "tolerance"),
    [
        (lambda a, b: fmaq.matmul(a, b, EXACT), [(2, 3, 4), (4, 5)], 1.0, 1e-4),
        (lambda x, w, b: fmaq.linear(x, w, b, EXACT), [(3, 4), (5, 4), (5,)], 1.0, 1e-4),
        (lambda x, w: fmaq.conv2d(x, w, None, EXACT, 2, 1, groups=2), [(2, 4, 5, 5), (4, 2, 3, 3)], 1.0, 1e-4),
        (lambda x, w: fmaq.conv_transpose2d(x, w, None, EXACT, 2, 1), [(1, 3, 3, 4), (3, 2, 3, 3)], 1.0, 1e-4),
        (_attention, [(2, 3, 4), (2, 5, 4), (2, 5, 4)], 2.0**-6, 5e-3),
    ],
    ids=["matmul", "linear", "conv2d", "conv_transpose2d", "attention"],
)
def test_identity_is_the_derivative(function, shapes, step, tolerance):
    """Differences along random directions, of functions that are linear in each operand, or nearly so."""
    rng = np.random.default_rng(9)
    inputs = [values(rng, shape).requires_grad_() for shape in shapes]
    y = function(*inputs)
    grad = values(rng, y.shape)
    for i, of_input in enumerate(torch_gradients(y, inputs, grad)):
        direction = values(rng, shapes[i])
        moved = [
            function(*(x.detach() + (sign * step * direction if j == i else 0) for j, x in enumerate(inputs)))
            for sign in (1, -1)
        ]
        difference = ((moved[0] - moved[1]).double() * grad / (2 * step)).sum()
        torch.testing.assert_close((of_input * direction).double().sum(), difference, rtol=tolerance, atol=tolerance)


# --- Gradients in an accumulator --------------------------------------------------------------------------------------


@settings(max_examples=40)
@given(accumulators, st.tuples(*[st.integers(0, 20)] * 4), st.integers(0, 2**32 - 1))
def test_the_two_gradient_products_run_in_their_accumulator(backward, sizes, seed):
    rng = np.random.default_rng(seed)
    batch, m, depth, n = sizes
    a, b = values(rng, (batch, m, depth)).requires_grad_(), values(rng, (batch, depth, n)).requires_grad_()
    grad = values(rng, (batch, m, n))
    of_a, of_b = torch_gradients(fmaq.matmul(a, b, "paper12", backward=backward), (a, b), grad)
    assert torch.equal(of_a, fmaq.matmul(grad, b.detach().mT, backward))
    assert torch.equal(of_b, fmaq.matmul(a.detach().mT, grad, backward))


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
def test_convolutions_sum_their_gradients_in_an_accumulator(dims, groups):
    rng = np.random.default_rng(10)
    x = values(rng, (2, 4, *(9, 8, 7)[:dims])).requires_grad_()
    weight = values(rng, (8, 4 // groups, *(3, 2, 3)[:dims])).requires_grad_()
    stride, padding, dilation = (2, 1, 3)[:dims], (1, 2, 0)[:dims], (1, 2, 1)[:dims]
    operation = (fmaq.conv1d, fmaq.conv2d, fmaq.conv3d)[dims - 1]
    transposed = (fmaq.conv_transpose1d, fmaq.conv_transpose2d, fmaq.conv_transpose3d)[dims - 1]
    y = operation(x, weight, None, "paper12", stride, padding, dilation, groups, backward=LOW)
    grad = values(rng, y.shape)
    of_x, of_weight = torch_gradients(y, (x, weight), grad)
    spans = zip(y.shape[2:], stride, padding, dilation, weight.shape[2:], strict=True)
    reached = [(o - 1) * s - 2 * p + d * (k - 1) + 1 for o, s, p, d, k in spans]
    extra = [size - end for size, end in zip(x.shape[2:], reached, strict=True)]
    back = transposed(grad, weight.detach(), None, LOW, stride, padding, extra, groups, dilation)
    assert torch.equal(of_x, back)
    geometry, per_group = Geometry(stride, padding, dilation, groups), 8 // groups
    for g in range(groups):
        channels = slice(g * weight.shape[1], (g + 1) * weight.shape[1])
        windows, _ = unfolded(x.detach()[:, channels].numpy(), weight.shape[2:], geometry)
        mine = grad[:, g * per_group : (g + 1) * per_group].movedim(1, 0).flatten(1)  # over (image, position)
        wanted = reference.matmul(mine.numpy(), windows, LOW).reshape(per_group, *weight.shape[1:])
        np.testing.assert_array_equal(of_weight[g * per_group : (g + 1) * per_group].numpy(), wanted)


def test_a_wide_accumulator_gives_torchs_gradients():
    rng = np.random.default_rng(11)
    x, weight = values(rng, (2, 4, 10, 9)).requires_grad_(), values(rng, (6, 2, 3, 2)).requires_grad_()
    grad = values(rng, (2, 6, 4, 9))
    mine = fmaq.conv2d(x, weight, None, EXACT, (2, 1), (0, 1), (1, 2), 2, backward=EXACT)
    theirs = F.conv2d(x, weight, None, (2, 1), (0, 1), (1, 2), 2)
    pairs = zip(torch_gradients(mine, (x, weight), grad), torch_gradients(theirs, (x, weight), grad), strict=True)
    for ours, other in pairs:
        torch.testing.assert_close(ours, other, rtol=1e-4, atol=1e-4)


def test_attention_passes_it_on():
    rng = np.random.default_rng(12)
    q, k, v = (values(rng, (2, n, 8)).requires_grad_() for n in (6, 7, 7))
    grad = values(rng, (2, 6, 8))
    y = fmaq.scaled_dot_product_attention(q, k, v, LOW, backward="paper12")
    scores = fmaq.matmul(q, k.mT, LOW, backward="paper12") * 8**-0.5
    by_hand = fmaq.matmul(torch.softmax(scores, -1), v, LOW, backward="paper12")
    pairs = zip(torch_gradients(y, (q, k, v), grad), torch_gradients(by_hand, (q, k, v), grad), strict=True)
    assert all(torch.equal(mine, theirs) for mine, theirs in pairs)


def test_a_model_whose_policy_says_so():
    rng = np.random.default_rng(13)
    x, layer = values(rng, (5, 20)), nn.Linear(20, 4)
    for how in ({"estimator": "recursive/diff"}, {"backward": LOW}):
        model = attach(nn.Sequential(layer), Policy(accumulator=LOW, layers={"0": how}))
        (of_weight,) = torch.autograd.grad(model(x).sum(), layer.weight)
        fmaq.detach(model)
        (wanted,) = torch.autograd.grad(fmaq.linear(x, layer.weight, layer.bias, LOW, **how).sum(), layer.weight)
        assert torch.equal(of_weight, wanted)


def test_a_policy_keeps_it_in_its_file(tmp_path):
    policy = Policy(accumulator=LOW, backward="paper12", layers={"head": {"backward": "fp32"}})
    policy.save(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy
    assert policy.for_layer("body").backward == Accumulator.paper12
    assert policy.for_layer("head").backward is None


@pytest.mark.parametrize("operation", [fmaq.matmul, lambda a, b, acc, **how: fmaq.linear(a, b.mT, None, acc, **how)])
def test_an_accumulator_beside_another_estimator_is_refused(operation):
    with pytest.raises(ValueError, match=r'two gradient products of "identity"; estimator "recursive/of" sums'):
        operation(torch.ones(2, 3), torch.ones(3, 2), LOW, estimator="recursive/of", backward=LOW)
    with pytest.raises(ValueError, match='"M7E4" is a template'):
        operation(torch.ones(2, 3), torch.ones(3, 2), LOW, backward="M7E4")
