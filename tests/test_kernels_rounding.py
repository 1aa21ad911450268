"""Rounding a tensor to a float with subnormals: equal to the reference, in any memory order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmaq import kernels
from fmaq.numerics import FloatFormat, reference


@given(st.integers(0, 23), st.integers(1, 6), st.integers(-20, 40), st.integers(1, 70), st.integers(0, 2**31))
def test_rounding_equals_the_reference(mantissa, exponent, bias, count, seed):
    format = FloatFormat(mantissa, exponent, bias)
    generator = np.random.default_rng(seed)
    x = np.ldexp(generator.standard_normal(count), generator.integers(-40, 40, count)).astype(np.float32)
    ties = format.tiny * (generator.integers(-40, 40, count) + 0.5) * 2.0**-mantissa
    x = np.concatenate([x, ties.astype(np.float32), [0.0, 1e38, -1e38, 1e-45]]).astype(np.float32)
    y = kernels.round_to_float(torch.from_numpy(x), mantissa, 1 - bias, 2**exponent - 1 - bias)
    assert np.array_equal(y.numpy(), reference.quantize_tensor(x, format).astype(np.float32))


@pytest.mark.parametrize("target", [t.name for t in kernels.available_targets()])
def test_targets_and_memory_orders_agree(target):
    x = torch.randn(5, 6, 7, generator=torch.Generator().manual_seed(0))
    expected = kernels.round_to_float(x, 3, -6, 2)
    with kernels.use_target(target):
        for view in (x.permute(2, 0, 1), x[::2], x[:, :1].expand(5, 4, 7), x.to(memory_format=torch.contiguous_format)):
            same = torch.equal(
                kernels.round_to_float(view, 3, -6, 2), kernels.round_to_float(view.contiguous(), 3, -6, 2)
            )
            assert same
        assert torch.equal(kernels.round_to_float(x, 3, -6, 2), expected)
