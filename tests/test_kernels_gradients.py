"""Gradients by estimators that look inside the accumulation: every mask is the reference's, and so are exact sums.

Where the gradient of the outputs has a single 1 in a row and in a column, a gradient is one operand times α: equality
tells every bit of the masks, whatever the operands. Where operands are small integers, float32 sums them exactly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fmaq.kernels import Geometry, available_targets, backward, conv_gradients, matmul_gradients, use_target
from fmaq.numerics import Accumulator, reference
from strategies import (
    Machine,
    accumulators,
    depths,
    examples,
    machines,
    operands,
    pooled,
    sizes,
    stochastic,
    truncating,
)
from test_kernels_conv import geometries, unfolded

ESTIMATORS = reference.ESTIMATORS[1:]
estimators = st.sampled_from(ESTIMATORS)
NARROW = tuple(
    Accumulator(name)
    for name in (
        "M2E2b0 product=M3E3b2 chunk=3",
        "M3E3b2 chunk=5",
        "M1E3b1 product=M2E2b-1 chunk=None",
        "M2E3b1 product=M2E3b1 chunk=4 rounding=nearest_even",
        "M2E3b1 product=M3E3b1 chunk=4 rounding=stochastic seed=9",
        "I6f0 chunk=4",
        "I5f0w product=I6f0 chunk=3",
        "I6f1w chunk=4",
    )
)
"""Small integers overflow them, and are swamped and flushed in them."""

narrow = st.sampled_from(NARROW)


@contextmanager
def divided(machine: Machine) -> Iterator[None]:
    """Computed so, and cut into parts however small the product is."""
    sizes = {"SMALL": 0, "PANELS": 1, "TILES": 1}
    sizes |= {} if machine.block_bytes is None else {"BLOCK_BYTES": machine.block_bytes}
    with machine.applied(), patch.multiple(backward, **sizes):
        yield


def masks(a: torch.Tensor, b: torch.Tensor, acc: Accumulator, estimator: str) -> np.ndarray:
    """α of (B, M, K) times (B, K, N), as (B, K, M, N); rows are counted through the batches."""
    found = []
    for i, (x, w) in enumerate(zip(a.numpy(), b.numpy(), strict=True)):
        above = np.zeros((i * len(x), x.shape[1]), np.float32)  # so that the rows of this batch are counted on
        found.append(reference.estimator_masks(np.concatenate([above, x]), w, acc, estimator)[:, i * len(x) :])
    return np.stack(found)


def expected(a, b, grad, alpha) -> tuple[np.ndarray, np.ndarray]:
    a, b, grad = (x.numpy().astype(np.float64) for x in (a, b, grad))
    return np.einsum("bkmn,bmn,bkn->bmk", alpha, grad, b), np.einsum("bkmn,bmn,bmk->bkn", alpha, grad, a)


def assert_masks_equal(a, b, acc, estimator, machine, rng, times=2) -> None:
    """Equal for cells that lie as a permutation, scattered over the outputs."""
    batches, m, n = a.shape[0], a.shape[1], b.shape[2]
    alpha = masks(a, b, acc, estimator)
    for _ in range(times):
        grad = torch.zeros(batches, m, n)
        for i in range(batches):
            count = min(m, n)
            grad[i, torch.from_numpy(rng.permutation(m)[:count]), torch.from_numpy(rng.permutation(n)[:count])] = 1.0
        with divided(machine):
            found = matmul_gradients(a, b, grad, acc, estimator)
        if found is None:
            terms = (a.numpy() != 0).any() and (b.numpy() != 0).any()
            assert alpha.all() or not terms
            return
        for mine, theirs in zip(found, expected(a, b, grad, alpha), strict=True):
            np.testing.assert_array_equal(mine.numpy(), theirs, err_msg=f"{acc} {estimator}")


@examples(120)
@given(data=st.data(), acc=accumulators, machine=machines, estimator=estimators, batches=st.sampled_from([1, 1, 2]))
def test_masks_are_those_of_the_reference(data, acc, machine, estimator, batches):
    m, n, depth = data.draw(sizes), data.draw(sizes), data.draw(depths)
    drawn = data.draw(operands(acc))
    a, b = drawn.tensors((batches, m, depth), (batches, depth, n))
    if 0 in (m, n, depth):
        assert matmul_gradients(a, b, torch.zeros(batches, m, n), acc, estimator) is None
        return
    assert_masks_equal(a, b, acc, estimator, machine, np.random.default_rng(drawn.seed))


@examples(60)
@given(data=st.data(), acc=truncating, machine=machines, estimator=estimators)
def test_masks_of_any_format_toward_zero(data, acc, machine, estimator):
    """The float32 arithmetic, on tiles that some chunks saturate, and with operands that are flushed on packing."""
    drawn = data.draw(operands(acc))
    a, b = drawn.tensors((1, 19, 37), (1, 37, 35))
    for x in (a, a * (torch.arange(37) < 16)):
        assert_masks_equal(x, b, acc, estimator, machine, np.random.default_rng(drawn.seed))


@examples(25)
@given(data=st.data(), acc=stochastic, machine=machines, estimator=estimators)
def test_masks_of_stochastic_rounding(data, acc, machine, estimator):
    batches, m, n = data.draw(st.sampled_from([(1, 9, 33), (2, 33, 9), (3, 1, 20)]))
    drawn = data.draw(operands(acc))
    a, b = drawn.tensors((batches, m, 21), (batches, 21, n))
    assert_masks_equal(a, b, acc, estimator, machine, np.random.default_rng(drawn.seed), times=1)


def small_integers(rng: np.random.Generator, *shape: int) -> torch.Tensor:
    return torch.from_numpy(rng.integers(-3, 4, shape).astype(np.float32))


@examples(60)
@given(
    acc=narrow, machine=machines, estimator=estimators, seed=st.integers(0, 2**32 - 1),
    batches=st.sampled_from([1, 1, 3]), m=sizes, n=sizes, depth=depths,
)  # fmt: skip
def test_sums_of_small_integers_are_exact(acc, machine, estimator, seed, batches, m, n, depth):
    rng = np.random.default_rng(seed)
    a, b, grad = small_integers(rng, batches, m, depth), small_integers(rng, batches, depth, n), None
    grad = small_integers(rng, batches, m, n)
    with divided(machine):
        found = matmul_gradients(a, b, grad, acc, estimator)
    if found is None:
        assert 0 in (m, n, depth) or not a.any() or not b.any()
        return
    for mine, theirs in zip(found, expected(a, b, grad, masks(a, b, acc, estimator)), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs, err_msg=f"{acc} {estimator}")


@examples(60)
@given(acc=narrow, product=geometries(), machine=machines, estimator=estimators, seed=st.integers(0, 2**32 - 1))
def test_convolutions_are_unfold_and_the_reference(acc, product, machine, estimator, seed):
    x_shape, weight_shape, geometry = product
    rng = np.random.default_rng(seed)
    x, weight = small_integers(rng, *x_shape), small_integers(rng, *weight_shape)
    of_x, of_weight, grad = expected_of_conv(rng, x, weight, acc, estimator, geometry)
    with divided(machine):
        found = conv_gradients(x, weight, grad, acc, estimator, geometry)
    if found is None:
        assert not x.any() or not weight.any()
        return
    np.testing.assert_array_equal(found[0].numpy(), of_x, err_msg=f"{acc} {estimator}")
    np.testing.assert_array_equal(found[1].numpy(), of_weight, err_msg=f"{acc} {estimator}")


def expected_of_conv(rng, x, weight, acc, estimator, geometry):
    """The gradients of image and weight by the reference, on windows of the image, and a gradient of the output."""
    images, outputs, inputs, groups = x.shape[0], *weight.shape[:2], geometry.groups
    per_group = outputs // groups
    places = torch.arange(1, x.numel() + 1).reshape(x.shape).double()  # 0 is padding
    of_x, of_weight, grads = np.zeros(x.numel() + 1), np.zeros(weight.shape), []
    for group in range(groups):
        mine, channels = (slice(group * n, (group + 1) * n) for n in (per_group, inputs))
        a, out = unfolded(x[:, channels].numpy(), weight.shape[2:], geometry)
        at, _ = unfolded(places[:, channels].numpy(), weight.shape[2:], geometry)
        b = np.zeros((a.shape[1], outputs), np.float32)  # all columns, so that n counts through the groups
        b[:, mine] = weight[mine].reshape(per_group, -1).T
        grad = np.zeros((a.shape[0], outputs), np.float32)
        grad[:, mine] = small_integers(rng, a.shape[0], per_group).numpy()
        of_windows, of_columns = reference.gradients(a, b, grad, acc, estimator)
        np.add.at(of_x, at.astype(int), of_windows)
        of_weight[mine] = of_columns[:, mine].T.reshape(per_group, *weight.shape[1:])
        grads.append(grad[:, mine].reshape(images, *out, per_group))
    grad = torch.from_numpy(np.moveaxis(np.concatenate(grads, -1), -1, 1).copy())
    return of_x[1:].reshape(x.shape), of_weight, grad


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("target", [t.name for t in available_targets()])
def test_channels_last_images(estimator, target):
    rng = np.random.default_rng(1)
    x = small_integers(rng, 2, 16, 7, 9).contiguous(memory_format=torch.channels_last)
    weight = small_integers(rng, 5, 16, 3, 3).contiguous(memory_format=torch.channels_last)
    geometry = Geometry((2, 1), (1, 2), (1, 2))
    of_x, of_weight, grad = expected_of_conv(rng, x, weight, NARROW[1], estimator, geometry)
    for output in (grad, grad.contiguous(memory_format=torch.channels_last)):
        found = conv_gradients(x, weight, output, NARROW[1], estimator, geometry)
        np.testing.assert_array_equal(found[0].numpy(), of_x)
        np.testing.assert_array_equal(found[1].numpy(), of_weight)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "every second"])
def test_strides_of_the_outputs_gradient(layout):
    rng = np.random.default_rng(2)
    a, b = small_integers(rng, 2, 9, 20), small_integers(rng, 2, 20, 40)
    grad = small_integers(rng, 2, 40, 9).mT
    if layout == "expanded":
        grad = torch.ones(1, 1, 1).expand(2, 9, 40)
    elif layout == "every second":
        grad = small_integers(rng, 2, 9, 80)[:, :, ::2]
    found = matmul_gradients(a, b, grad, NARROW[0], "recursive/diff")
    for mine, theirs in zip(found, expected(a, b, grad, masks(a, b, NARROW[0], "recursive/diff")), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs)


@pytest.mark.parametrize("wanted", [(True, False), (False, True)])
@pytest.mark.parametrize("shape", [(40, 20, 9), (9, 20, 40)])
def test_only_the_gradient_that_is_wanted(wanted, shape):
    m, depth, n = shape
    rng = np.random.default_rng(3)
    a, b, grad = small_integers(rng, 1, m, depth), small_integers(rng, 1, depth, n), small_integers(rng, 1, m, n)
    both = matmul_gradients(a, b, grad, NARROW[0], "immediate/diff")
    one = matmul_gradients(a, b, grad, NARROW[0], "immediate/diff", *wanted)
    for is_wanted, mine, theirs in zip(wanted, one, both, strict=True):
        assert (mine is not None and torch.equal(mine, theirs)) if is_wanted else mine is None


@examples(20)
@given(acc=pooled, estimator=estimators, seed=st.integers(0, 2**32 - 1), target=st.integers(0, 2))
def test_random_gradients_to_the_error_of_float32_sums(acc, estimator, seed, target):
    rng = np.random.default_rng(seed)
    a, b, grad = (
        torch.from_numpy(rng.normal(0, 1, s).astype(np.float32)) for s in ((1, 45, 33), (1, 33, 70), (1, 45, 70))
    )
    with divided(Machine(target, 1, None, False)):
        found = matmul_gradients(a, b, grad, acc, estimator)
    alpha = masks(a, b, acc, estimator)
    magnitudes = expected(a.abs(), b.abs(), grad.abs(), alpha)
    for mine, theirs, size, terms in zip(found, expected(a, b, grad, alpha), magnitudes, (70, 45), strict=True):
        assert (np.abs(mine.numpy() - theirs) <= terms * 2.0**-24 * size).all()


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("shape", [(1, 150, 130, 300), (5, 70, 40, 33), (1, 600, 40, 20)])
def test_threads_do_not_change_a_bit(estimator, shape):
    batches, m, depth, n = shape
    rng = np.random.default_rng(5)
    a, b, grad = (
        torch.from_numpy(rng.normal(0, 1, s).astype(np.float32))
        for s in ((batches, m, depth), (batches, depth, n), (batches, m, n))
    )
    found = []
    for threads in (1, 2):
        with Machine(0, threads, None, False).applied():
            found.append(matmul_gradients(a, b, grad, Accumulator.paper12, estimator))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_threads_do_not_change_a_bit_of_a_convolution(estimator):
    rng = np.random.default_rng(6)
    x, weight, grad = (
        torch.from_numpy(rng.normal(0, 1, s).astype(np.float32))
        for s in ((5, 16, 14, 14), (20, 8, 3, 3), (5, 20, 14, 14))
    )
    found = []
    for threads in (1, 2):
        with Machine(0, threads, None, False).applied():
            geometry = Geometry((1, 1), (1, 1), (1, 1), groups=2)
            found.append(conv_gradients(x, weight, grad, Accumulator.paper12, estimator, geometry))
    for first, second in zip(*found, strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("target", [t.name for t in available_targets()])
@pytest.mark.parametrize("estimator", ["immediate/diff", "recursive/diff"])
def test_an_operand_that_packing_flushes_is_lost_and_a_zero_is_not(target, estimator):
    """2^−140 times anything is far below the product format; the gradient of a zero passes, that of 2^−140 does not."""
    a = torch.tensor([[[1.0, 2.0**-140, 0.0, 1.0]]]).expand(1, 4, 4)
    b = torch.tensor([1.0, 1.0, 3.0, 2.0**-149])[None, :, None].expand(1, 4, 40)
    machine = Machine([t.name for t in available_targets()].index(target), 1, None, False)
    assert_masks_equal(a, b, Accumulator.paper12, estimator, machine, np.random.default_rng(7))
    with machine.applied():
        of_a, of_b = matmul_gradients(a, b, torch.ones(1, 4, 40), Accumulator.paper12, estimator)
    # Recursively, the last step, which is lost, stops all earlier ones.
    is_immediate = estimator == "immediate/diff"
    assert of_a[0, 0].tolist() == ([40.0, 0.0, 120.0, 0.0] if is_immediate else [0.0] * 4)
    assert of_b[0, :, 0].tolist() == ([4.0, 0.0, 0.0, 0.0] if is_immediate else [0.0] * 4)


@pytest.mark.parametrize("target", [t.name for t in available_targets()])
@pytest.mark.parametrize("name", ["I6f0 chunk=4", "I7f1 product=I9f1 chunk=4", "M2E2b0 product=M3E3b2 chunk=3"])
@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_every_vector_of_a_tile_has_its_own_masks(target, name, estimator):
    """Also where several vectors' masks share a byte: four lanes, two vectors a row."""
    rng, acc = np.random.default_rng(0), Accumulator(name)
    a, b, grad = small_integers(rng, 1, 5, 33), small_integers(rng, 1, 33, 40), small_integers(rng, 1, 5, 40)
    with use_target(target):
        found = matmul_gradients(a, b, grad, acc, estimator)
    for mine, theirs in zip(found, expected(a, b, grad, masks(a, b, acc, estimator)), strict=True):
        np.testing.assert_array_equal(mine.numpy(), theirs)
