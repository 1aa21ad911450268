"""Kept panels: found by what a weight holds, never stale, bounded in memory, and the same bits as without them."""

from __future__ import annotations

import itertools

import pytest
import torch

from fmaq.kernels import available_targets, matmul, use_target
from fmaq.kernels.panels import ALIGNMENT, SLAB, PanelCache, Slabs, kept
from fmaq.numerics import Accumulator

PAPER = Accumulator.paper12


@pytest.fixture(autouse=True)
def nothing_kept():
    kept.clear()
    yield
    kept.clear()


def operands(m: int = 3, depth: int = 150, n: int = 200) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(m + depth + n)
    return torch.randn(1, m, depth, generator=generator), torch.randn(1, n, depth, generator=generator).mT


def without_panels(a: torch.Tensor, b: torch.Tensor, acc: Accumulator) -> torch.Tensor:
    """More rows than panels are kept for."""
    rows = torch.cat([a, torch.zeros(a.shape[0], 100, a.shape[2])], 1)
    return matmul(rows, b, acc)[:, : a.shape[1]]


@pytest.mark.parametrize("target", [t.name for t in available_targets()])
@pytest.mark.parametrize("m", [1, 2, 3, 8, 40])
@pytest.mark.parametrize("rounding", ["toward_zero", "nearest_even", "stochastic"])
def test_same_bits_the_first_time_and_every_time(target, m, rounding):
    a, b = operands(m)
    acc = Accumulator("M4E3b3", product="M4E3b5", rounding=rounding)
    with use_target(target):
        wanted = without_panels(a, b, acc)
        for _ in range(4):
            assert torch.equal(matmul(a, b, acc), wanted)
    assert kept.size > 0


def test_a_weight_that_changes_is_packed_anew_however_it_changed():
    a, b = operands()
    weight = torch.nn.Parameter(b.detach().clone())
    for change in (
        lambda: weight.data.mul_(2),  # leaves the version counter as it is
        lambda: weight.data[0, 0].fill_(3.0),
        lambda: weight.detach().numpy().__setitem__((0, 1, 1), 5.0),
        lambda: weight.data.copy_(weight.data.flip(1)),
    ):
        for _ in range(3):
            matmul(a, weight.detach(), PAPER)
        change()
        assert torch.equal(matmul(a, weight.detach(), PAPER), without_panels(a, weight.detach(), PAPER))


def test_operands_of_the_same_memory_and_other_strides_differ():
    a, _ = operands(2, 160, 160)
    square = torch.randn(1, 160, 160)
    for _ in range(3):
        for b in (square, square.mT):
            assert torch.equal(matmul(a, b, PAPER), without_panels(a, b, PAPER))


def test_other_accumulators_and_operands_of_another_scale_have_panels_of_their_own():
    a, b = operands()
    for _ in range(3):
        for acc in (PAPER, Accumulator("M7E4b2 product=M7E4b4"), Accumulator("I16f8 product=I16f8")):
            for scale in (1.0, 2.0**-20):
                assert torch.equal(matmul(a * scale, b, acc), without_panels(a * scale, b, acc))


def test_an_operand_is_kept_when_it_is_met_again():
    a, b = operands()
    matmul(a, b, PAPER)
    assert kept.size == 0
    matmul(a, b, PAPER)
    assert kept.size >= b.numel() * 4
    size = kept.size
    for _ in range(3):
        matmul(a, torch.randn_like(b), PAPER)  # activations, say
    assert kept.size == size


def test_rows_few_and_many_share_the_panels_of_a_weight():
    _, b = operands()
    size = 0
    for m in (1, 2, 3, 8, 40):
        for scale in (1.0, 2.0**-9, 2.0**9):
            a, _ = operands(m)
            for _ in range(3):
                assert torch.equal(matmul(a * scale, b, PAPER), without_panels(a * scale, b, PAPER))
            size = size or kept.size
            assert kept.size == size > 0


def test_panels_that_are_used_no_more_make_room_and_others_stay():
    cache = PanelCache(capacity=250)
    for key in ("first", "second", "first", "second"):
        cache.find(key, 100)
    assert cache.size == 200
    first, second = cache.find("first", 100), cache.find("second", 100)
    assert first is not None and first.address % 64 == 0 and not first.is_packed
    for _ in range(20):  # none is used again before all have been, and the third has to do without
        assert (cache.find("first", 100), cache.find("second", 100)) == (first, second)
        assert cache.find("third", 100) is None
    found = [cache.find("third", 100) for _ in range(20) if cache.find("second", 100) is second]
    assert found[0] is None and found[-1] is not None, "the first is not used any more"
    assert cache.size == 200
    assert cache.find("first", 100) is None
    assert cache.find("huge", 300) is None and cache.find("huge", 300) is None


def test_panels_start_aligned_and_as_zeros():
    slabs = Slabs()
    parts = [slabs.part(size) for size in (100, 64, SLAB, 1)]
    assert all(part.ctypes.data % ALIGNMENT == 0 and not part.any() for part in parts)
    assert [part.size for part in parts] == [100, 64, SLAB, 1]
    starts = sorted((part.ctypes.data, part.size) for part in parts)
    assert all(start + size <= after for (start, size), (after, _) in itertools.pairwise(starts))
