"""Generated convolutions equal the unfolded image times the weights by the reference, bit for bit."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.lib.stride_tricks import sliding_window_view

from fmaq.kernels import Geometry, conv
from fmaq.numerics import Accumulator, reference
from strategies import Machine, accumulators, examples, machines, operands, pooled

SAME = Geometry((1, 1), (1, 1), (1, 1))


def unfolded(x: np.ndarray, kernel, geometry: Geometry) -> tuple[np.ndarray, tuple[int, ...]]:
    """Every window of an (N, C, *spatial) image as a row (channel, *kernel), and the spatial shape of the output."""
    dims, stride, dilation = range(2, x.ndim), geometry.stride, geometry.dilation
    x = np.pad(x, [(0, 0), (0, 0), *((p, p) for p in geometry.padding)])
    windows = sliding_window_view(x, [d * (k - 1) + 1 for k, d in zip(kernel, dilation, strict=True)], axis=tuple(dims))
    windows = windows[(slice(None), slice(None), *(slice(None, None, s) for s in stride))]
    windows = windows[(..., *(slice(None, None, d) for d in dilation))]
    out = windows.shape[2 : x.ndim]
    windows = np.moveaxis(windows, 1, x.ndim - 1)
    return windows.reshape(x.shape[0] * int(np.prod(out)), -1), out


def expected(x, weight, acc, geometry) -> np.ndarray:
    """Output channels are the columns n, images and positions the rows m, across all groups."""
    images, outputs, groups = x.shape[0], weight.shape[0], geometry.groups
    found = []
    for group in range(groups):
        mine = slice(group * outputs // groups, (group + 1) * outputs // groups)
        channels = slice(group * weight.shape[1], (group + 1) * weight.shape[1])
        a, out = unfolded(x[:, channels], weight.shape[2:], geometry)
        b = np.zeros((a.shape[1], outputs), np.float32)  # all columns, so that n counts through the groups
        b[:, mine] = weight[mine].reshape(mine.stop - mine.start, -1).T
        found.append(reference.matmul(a, b, acc)[:, mine].reshape(images, *out, -1))
    return np.moveaxis(np.concatenate(found, -1), -1, 1).astype(np.float32)


def assert_equal(x, weight, acc, geometry, machine) -> None:
    with machine.applied():
        found = conv(x, weight, acc, geometry)
    wanted = expected(x.numpy(), weight.numpy(), acc, geometry)
    np.testing.assert_array_equal(found.numpy(), wanted, err_msg=str(acc))


@st.composite
def geometries(draw: st.DrawFn):
    """Shapes of image and weight, and a geometry, that leave at least one output."""
    dims = draw(st.sampled_from([1, 2, 2, 2, 3]))
    groups = draw(st.sampled_from([1, 1, 2, 3, 6]))
    channels = draw(st.sampled_from([1, 1, 2, 5])) if groups < 6 else 1  # a group; 1 is depthwise
    outputs = groups * draw(st.sampled_from([1, 2, 5] if groups > 1 else [1, 3, 8, 17]))
    kernel = tuple(draw(st.integers(1, 4 if dims < 3 else 2)) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 3)) for _ in range(dims))
    dilation = tuple(draw(st.sampled_from([1, 1, 2, 3])) for _ in range(dims))
    padding = tuple(draw(st.integers(0, 3)) for _ in range(dims))
    size = []
    for k, d, p in zip(kernel, dilation, padding, strict=True):
        least = max(1, d * (k - 1) + 1 - 2 * p)
        size.append(least + draw(st.integers(0, {1: 40, 2: 9, 3: 4}[dims])))
    images = draw(st.sampled_from([1, 1, 2, 3]))
    x_shape, weight_shape = (images, groups * channels, *size), (outputs, channels, *kernel)
    return x_shape, weight_shape, Geometry(stride, padding, dilation, groups)


@examples(80)
@given(data=st.data(), acc=accumulators, product=geometries(), machine=machines)
def test_equals_unfold_and_the_reference(data, acc, product, machine):
    x_shape, weight_shape, geometry = product
    x, weight = data.draw(operands(acc)).tensors(x_shape, weight_shape)
    assert_equal(x, weight, acc, geometry, machine)


@examples(25)
@given(data=st.data(), acc=pooled, channels=st.sampled_from([3, 16]), machine=machines, kernel=st.sampled_from([1, 3]))
def test_channels_last_images(data, acc, channels, machine, kernel):
    x, weight = data.draw(operands(acc)).tensors((2, channels, 7, 9), (5, channels, kernel, kernel))
    x = x.contiguous(memory_format=torch.channels_last)
    weight = weight.contiguous(memory_format=torch.channels_last)
    assert_equal(x, weight, acc, SAME, machine)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conventions_are_those_of_torch(dims, groups):
    """Small integers in a wide accumulator are exact, in torch as well."""
    rng = np.random.default_rng(dims)
    x = torch.from_numpy(rng.integers(-4, 5, (2, 8, *(9, 8, 7)[:dims])).astype(np.float32))
    weight = torch.from_numpy(rng.integers(-4, 5, (12, 8 // groups, *(3, 2, 3)[:dims])).astype(np.float32))
    stride, padding, dilation = (2, 1, 3)[:dims], (1, 2, 0)[:dims], (1, 2, 1)[:dims]
    torch_conv = (torch.nn.functional.conv1d, torch.nn.functional.conv2d, torch.nn.functional.conv3d)[dims - 1]
    wanted = torch_conv(x, weight, None, stride, padding, dilation, groups)
    found = conv(x, weight, Accumulator("I32f0"), Geometry(stride, padding, dilation, groups))
    assert torch.equal(found, wanted)


@examples(40)
@given(data=st.data(), acc=pooled, product=geometries(), where=st.sampled_from(["x", "weight"]))
def test_a_non_finite_operand_spoils_what_depends_on_it_alone(data, acc, product, where):
    x_shape, weight_shape, geometry = product
    x, weight = (t.clone() for t in data.draw(operands(acc)).tensors(x_shape, weight_shape))
    spoiled = x if where == "x" else weight
    for value in (torch.nan, -torch.inf):
        spoiled[tuple(data.draw(st.integers(0, size - 1)) for size in spoiled.shape)] = value
    assert_equal(x, weight, acc, geometry, Machine(0, 1, None, False))


def test_a_batch_of_no_images():
    found = conv(torch.empty(0, 3, 8), torch.randn(4, 3, 3), Accumulator.paper12, Geometry((1,), (0,), (1,)))
    assert found.shape == (0, 4, 6)


@pytest.mark.parametrize("name", ["paper12", "M7E4b10 chunk=16 rounding=stochastic"])
def test_a_layer_of_usual_size_with_two_threads(name):
    rng = np.random.default_rng(2)
    x = torch.from_numpy(rng.normal(0, 1, (2, 16, 14, 14)).astype(np.float32))
    weight = torch.from_numpy(rng.normal(0, 1, (20, 16, 3, 3)).astype(np.float32))
    machine = Machine(0, 2, None, False)
    assert_equal(x, weight, Accumulator(name), SAME, machine)
