"""Exponents of products and partial sums equal the reference's, step by step."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmaq.kernels import Geometry, conv, count_conv_exponents, count_exponents
from fmaq.kernels.histograms import BINS, LOWEST
from fmaq.numerics import Accumulator, reference
from strategies import depths, examples, machines, operands, pooled, sizes
from test_kernels_conv import unfolded


def expected(a: np.ndarray, b: np.ndarray, acc: Accumulator) -> np.ndarray:
    bins = np.zeros((2, BINS), np.int64)
    for step in reference.steps(a, b, acc):
        if step.exact_product is not None:
            for row, values in zip(bins, (step.p, step.after), strict=True):
                exponents = np.clip(np.frexp(values)[1] - 1 - LOWEST + 1, 1, BINS - 1)
                np.add.at(row, np.where(values == 0, 0, exponents), 1)
    return bins


@examples(40)
@given(data=st.data(), acc=pooled, machine=machines, m=sizes, n=sizes, depth=depths)
def test_exponents_are_those_of_the_reference(data, acc, machine, m, n, depth):
    a, b = data.draw(operands(acc)).tensors((1, m, depth), (1, depth, n))
    with machine.applied():
        found = count_exponents(a, b, acc)
    np.testing.assert_array_equal(found, expected(a[0].numpy(), b[0].numpy(), acc))


def test_exponents_of_a_convolution():
    torch.manual_seed(0)
    x, weight, acc = torch.randn(2, 3, 7, 6), torch.randn(5, 3, 3, 3), Accumulator.paper12
    geometry = Geometry((2, 1), (1, 0), (1, 1))
    windows, _ = unfolded(x.numpy(), (3, 3), geometry)
    found = count_conv_exponents(x, weight, acc, geometry)
    np.testing.assert_array_equal(found, expected(windows, weight.flatten(1).T.numpy(), acc))
    assert found.sum() == 2 * conv(x, weight, acc, geometry).numel() * 27
