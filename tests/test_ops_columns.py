"""Offsets and gains by output channel: exact against the reference, and refused where they cannot be."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import fmaq
from fmaq.numerics import Accumulator, reference

ACC = Accumulator.paper12


def test_an_offset_is_the_product_with_scaled_columns():
    torch.manual_seed(0)
    a, b = torch.randn(7, 40), torch.randn(40, 5) * 0.01
    offset = torch.tensor([0, 3, -2, 7, 5])
    power = 2.0 ** offset.double().numpy()
    expected = reference.matmul(a.numpy(), b.double().numpy() * power, ACC) / power
    assert np.array_equal(fmaq.matmul(a, b, ACC, offset=offset).double().numpy(), expected)
    assert np.array_equal(fmaq.linear(a, b.T, None, ACC, offset=offset).double().numpy(), expected)


def test_an_offset_equals_another_bias():
    torch.manual_seed(1)
    a, b = torch.randn(6, 33), torch.randn(33, 4)
    shifted = Accumulator("M7E4b7", product="M7E4b9")
    assert torch.equal(fmaq.matmul(a, b, ACC, offset=-3), fmaq.matmul(a, b, shifted))


def test_offsets_and_gains_may_be_lists_and_arrays():
    torch.manual_seed(1)
    a, b = torch.randn(6, 33), torch.randn(33, 2)
    expected = fmaq.matmul(a, b, ACC, offset=torch.tensor([1, -2]), gain=torch.tensor([1.5, 0.75]))
    for offset, gain in (([1, -2], [1.5, 0.75]), (np.array([1, -2]), np.array([1.5, 0.75]))):
        assert torch.equal(fmaq.matmul(a, b, ACC, offset=offset, gain=gain), expected)


def test_convolutions_take_one_offset_and_gain_a_channel():
    torch.manual_seed(2)
    x, weight, bias = torch.randn(2, 4, 6, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
    offset, gain = torch.tensor([1, -4, 2]), torch.tensor([1.0, 1.5, 0.75])
    y = fmaq.conv2d(x, weight, bias, ACC, padding=1, offset=offset, gain=gain)
    power = (2.0**offset)[:, None, None]
    plain = fmaq.conv2d(x, weight * power[..., None], None, ACC, padding=1) / power
    assert torch.equal(y, plain * gain[:, None, None] + bias[:, None, None])
    back = weight.transpose(0, 1).flip(2, 3)
    transposed = fmaq.conv_transpose2d(x, back, bias, ACC, padding=1, offset=offset, gain=gain)
    assert torch.equal(transposed, y)


def test_gain_multiplies_before_the_bias_and_has_a_gradient():
    x, weight, bias = torch.randn(3, 8), torch.randn(2, 8, requires_grad=True), torch.randn(2)
    gain = torch.tensor([1.25, 2.0], requires_grad=True)
    y = fmaq.linear(x, weight, bias, ACC, gain=gain)
    plain = fmaq.linear(x, weight, None, ACC).detach()
    assert torch.equal(y, plain * gain + bias)
    y.sum().backward()
    assert torch.equal(gain.grad, plain.sum(0))
    assert torch.allclose(weight.grad, gain.detach()[:, None] * x.sum(0))


def test_offsets_leave_the_identity_gradient_alone():
    torch.manual_seed(3)
    grads = []
    for offset in (None, torch.tensor([4, -4])):
        a, b = torch.ones(3, 5, requires_grad=True), torch.full((5, 2), 0.5, requires_grad=True)
        fmaq.matmul(a, b, ACC, offset=offset).sum().backward()
        grads.append((a.grad, b.grad))
    assert all(torch.equal(x, y) for x, y in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"offset": 1.5}, TypeError, "offset must be an integer"),
        ({"offset": torch.tensor([1, 2, 3])}, ValueError, r"offset must be an integer or \(2,\)"),
        ({"offset": 127}, ValueError, "offset must be from -126 to 126"),
        ({"offset": torch.tensor(-128, dtype=torch.int8)}, ValueError, "offset must be from -126 to 126"),
        ({"gain": torch.ones(3)}, ValueError, r"gain must be a number or \(2,\)"),
    ],
)
def test_wrong_offsets_and_gains_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fmaq.matmul(torch.ones(3, 4), torch.ones(4, 2), ACC, **options)


def test_an_offset_that_leaves_float32_is_refused():
    with pytest.raises(ValueError, match="out of float32's range"):
        fmaq.matmul(torch.ones(1, 1), torch.tensor([[2.0**100]]), ACC, offset=100)
    with pytest.raises(ValueError, match="out of float32's range"):
        fmaq.matmul(torch.ones(1, 1), torch.tensor([[2.0**-90]]), ACC, offset=-60)
    tiny = torch.tensor([[1.0], [3 * 2.0**-149]])  # what is so small beside the rest may lose bits
    assert float(fmaq.matmul(torch.ones(1, 2), tiny, ACC, offset=-1)) == 1


def test_offsets_gains_and_shifts_by_head():
    torch.manual_seed(4)
    a, b = torch.randn(2, 3, 5, 20), torch.randn(2, 3, 20, 4) * 0.03
    offset = torch.tensor([0, 3, 6])[:, None] + torch.tensor([0, 1, 0, 2])
    gain, shift = torch.tensor([[1.5], [1.0], [0.5]]), torch.tensor([[0.0], [1.0], [2.0]])
    y = fmaq.matmul(a, b, ACC, offset=offset, gain=gain, shift=shift)
    for batch in range(2):
        for head in range(3):
            one = fmaq.matmul(a[batch, head], b[batch, head], ACC, offset=offset[head])
            assert torch.equal(y[batch, head], one * gain[head] + shift[head])
    shared = fmaq.matmul(a, b[0, 0], ACC, offset=offset[:, :1])
    assert all(torch.equal(shared[:, i], fmaq.matmul(a[:, i], b[0, 0], ACC, offset=offset[i, 0])) for i in range(3))
    vectors = fmaq.matmul(a, b[0, 0, :, 0], ACC, offset=offset[:, :1])
    assert vectors.shape == (2, 3, 5) and torch.equal(vectors, shared[..., 0])
    with pytest.raises(ValueError, match=r"or have the batch's dimensions before that or before 1, got \(4, 1\)"):
        fmaq.matmul(a, b, ACC, gain=torch.ones(4, 1))


@pytest.mark.parametrize("per_token", [False, True])
def test_vmap_over_weights_with_offsets(per_token):
    torch.manual_seed(6)
    x, weights = torch.randn(5, 12), torch.randn(3, 4, 12)
    options = {
        "offset": torch.tensor([1, -2, 0, 3]),
        "gain": torch.tensor([1.0, 1.5, 2.0, 0.5]),
        "per_token": per_token,
    }
    found = torch.vmap(lambda w: fmaq.linear(x, w, None, ACC, **options))(weights)
    assert torch.equal(found, torch.stack([fmaq.linear(x, w, None, ACC, **options) for w in weights]))
    both = torch.vmap(lambda a, w: fmaq.linear(a, w, None, ACC, **options), (None, 2))(x, weights.movedim(0, 2))
    assert torch.equal(both, found)


def test_by_token_each_row_has_another_bias():
    torch.manual_seed(5)
    exponents = torch.tensor([-9, 0, 4, 11, -30])
    a = torch.rand(5, 40).sub(0.5) * 2.0 ** exponents[:, None]
    b = torch.randn(40, 6)
    y = fmaq.matmul(a, b, ACC, per_token=True)
    for row, found in zip(a, y, strict=True):
        e = int(torch.frexp(row.abs().max())[1]) - 1
        own = Accumulator(f"M7E4b{10 - e}", product=f"M7E4b{12 - e}")
        assert torch.equal(found, fmaq.matmul(row[None], b, own)[0])
        assert torch.equal(fmaq.matmul(row, b, ACC, per_token=True), found)
    assert torch.equal(fmaq.linear(a, b.T, None, ACC, per_token=True), y)
    assert torch.equal(fmaq.matmul(a, b[:, 0], ACC, per_token=True), y[:, 0])
    batched = fmaq.matmul(a.reshape(5, 1, 40), b.expand(3, 5, 40, 6), ACC, per_token=True)
    assert torch.equal(batched, y[:, None].expand(3, 5, 1, 6))


def test_by_token_an_image_is_one():
    torch.manual_seed(6)
    images = torch.randn(3, 4, 6, 6) * torch.tensor([1e-4, 1.0, 300.0])[:, None, None, None]
    weight, bias, offset = torch.randn(3, 4, 3, 3), torch.randn(3), torch.tensor([0, 2, -1])
    y = fmaq.conv2d(images, weight, bias, ACC, padding=1, offset=offset, per_token=True)
    power = 2.0 ** -torch.frexp(images.abs().amax((1, 2, 3), keepdim=True))[1].sub(1).float()
    scaled = fmaq.conv2d(images * power, weight, None, ACC, padding=1, offset=offset)
    assert torch.equal(y, scaled / power + bias[:, None, None])
    assert torch.equal(fmaq.conv2d(images[2], weight, bias, ACC, padding=1, offset=offset, per_token=True), y[2])
    back = weight.transpose(0, 1).flip(2, 3)
    assert torch.equal(fmaq.conv_transpose2d(images, back, bias, ACC, padding=1, offset=offset, per_token=True), y)


def test_by_token_shift_and_gradient_are_those_of_the_product():
    torch.manual_seed(7)
    a = (torch.randn(4, 8) * 100).requires_grad_()
    b = torch.randn(8, 3, requires_grad=True)
    shift = torch.tensor([1.0, 2.0, 3.0])
    y = fmaq.matmul(a, b, ACC, per_token=True, shift=shift)
    assert torch.equal(y - fmaq.matmul(a, b, ACC, per_token=True), (y - (y - shift)).expand(4, 3))
    grad = torch.randn(4, 3)
    y.backward(grad)
    for found, left, right in ((a.grad, grad, b.detach().T), (b.grad, a.detach().T, grad)):
        exact, terms = left.double() @ right.double(), left.double().abs() @ right.double().abs()
        assert bool(((found - exact).abs() <= 2.0**-21 * terms).all())  # float32 sums, whose order is torch's


def test_by_token_of_zeros_and_of_what_is_not_finite():
    a, b = torch.tensor([[0.0, 0.0], [torch.inf, 1.0], [1e-36, 0.0], [3.0, 1e30]]), torch.ones(2, 2)
    y = fmaq.matmul(a, b, ACC, per_token=True)
    assert torch.equal(y[0], torch.zeros(2)) and y[1].isnan().all()
    assert y[2].allclose(torch.tensor(1e-36), rtol=0.01, atol=0) and y[3].allclose(torch.tensor(1e30), rtol=0.01)
    assert fmaq.matmul(torch.ones(0, 2), b, ACC, per_token=True).shape == (0, 2)
    assert torch.equal(fmaq.matmul(torch.ones(3, 0), torch.ones(0, 2), ACC, per_token=True), torch.zeros(3, 2))
