"""count_events: equal to the reference's counts, on every target and any number of threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmaq
from fmaq import kernels
from fmaq.numerics import Accumulator, reference
from fmaq.ops import count_events_by_rows, count_exponents

ACCUMULATORS = (
    "paper12",
    "M3E3b3 product=M3E3b4 chunk=3",
    "M7E4b10 chunk=None",
    "M4E3b4 product=M4E3b6 rounding=nearest_even",
    "M4E3b4 product=M4E3b6 rounding=stochastic seed=5",
    "M2E2b2z product=M3E4b4 underflow=False",
    "I8f3 product=I8f2w",
    "I8f3w chunk=5",
    "I8f3w product=M4E3b4",
    "M4E3b4h product=M4E3b6zh chunk=3",
    "M4E3b4h product=M3E3b6h outer=(M6E4b7 chunk=2 outer=M3E4b6h)",
    "M4E3b4 product=M4E3b6 chunk=2 rounding=half_up outer=fp32",
)


@given(
    st.sampled_from(ACCUMULATORS),
    st.tuples(st.integers(1, 4), st.integers(1, 40), st.integers(1, 25)),
    st.sampled_from([0.01, 1.0, 30.0, 1e25]),
    st.integers(0, 2**31),
)
def test_counts_equal_the_reference(spec, shape, scale, seed):
    m, depth, n = shape
    generator = torch.Generator().manual_seed(seed)
    a = torch.randn(m, depth, generator=generator) * scale
    b = torch.randn(depth, n, generator=generator)
    assert dict(fmaq.count_events(a, b, spec)) == reference.count_events(a.numpy(), b.numpy(), Accumulator.parse(spec))


@pytest.mark.parametrize("target", [t.name for t in kernels.available_targets()])
def test_counts_are_the_same_on_every_target_and_thread(target):
    torch.manual_seed(0)
    a, b = torch.randn(3, 50, 30), torch.randn(30, 70)
    expected = fmaq.count_events(a, b, "M4E3b4 product=M4E3b6")
    threads = torch.get_num_threads()
    try:
        with kernels.use_target(target):
            for count in (1, 2):
                torch.set_num_threads(count)
                assert fmaq.count_events(a, b, "M4E3b4 product=M4E3b6") == expected
    finally:
        torch.set_num_threads(threads)
    assert expected.steps == 150 * 30 * 70 and expected.merges == 150 * 2 * 70
    assert expected.partial_swamping > 0


def test_counts_by_rows_add_up_to_the_total():
    torch.manual_seed(0)
    a, b = torch.randn(70, 50), torch.randn(50, 30)
    total = fmaq.count_events(a, b, "M4E3b4 product=M4E3b6")
    blocks = count_events_by_rows(a, b, "M4E3b4 product=M4E3b6", rows=32)
    assert [block.steps for block in blocks] == [32 * 1500, 32 * 1500, 6 * 1500]
    assert blocks[1] == fmaq.count_events(a[32:64], b, "M4E3b4 product=M4E3b6")
    assert {name: sum(block[name] for block in blocks) for name in total} == dict(total)
    with pytest.raises(ValueError, match=r"at least 1 row a block.*rows=0"):
        count_events_by_rows(a, b, "paper12", rows=0)


def test_exponents_are_those_of_products_and_sums():
    found = count_exponents(torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[4.0], [1.0], [1.0]]), "paper12")
    assert found.products == {None: 1, 1: 1, 2: 1}  # 4, 0, 3
    assert found.sums == {2: 3}  # 4, 4, 7


def test_nothing_to_sum_has_no_events():
    events = fmaq.count_events(torch.ones(2, 0), torch.ones(0, 3), "paper12")
    assert events.steps == 0 and events.merges == 0 and not any(events.values())


def test_bad_input_is_named():
    with pytest.raises(ValueError, match="b has values that are not finite"):
        fmaq.count_events(torch.ones(1, 1), torch.tensor([[float("nan")]]), "paper12")
    with pytest.raises(AttributeError, match="no event 'overflow'"):
        _ = fmaq.count_events(torch.ones(1, 1), torch.ones(1, 1), "paper12").overflow
