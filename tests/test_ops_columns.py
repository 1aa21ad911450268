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
        ({"gain": torch.ones(3)}, ValueError, r"gain must be a number or \(2,\)"),
    ],
)
def test_wrong_offsets_and_gains_are_refused(options, error, message):
    with pytest.raises(error, match=message):
        fmaq.matmul(torch.ones(3, 4), torch.ones(4, 2), ACC, **options)


def test_an_offset_that_leaves_float32_is_refused():
    with pytest.raises(ValueError, match="out of float32's range"):
        fmaq.matmul(torch.ones(1, 1), torch.tensor([[2.0**100]]), ACC, offset=100)


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
