"""Generated matrix products equal the reference, bit for bit: every format, rounding, shape, layout and target."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fmaq
from fmaq.kernels import available_targets, matmul, use_target
from fmaq.kernels.products import count_events
from fmaq.numerics import ROUNDINGS, Accumulator, FixedFormat, reference
from strategies import (
    Machine,
    Operands,
    Values,
    accumulators,
    depths,
    examples,
    fresh_accumulators,
    machines,
    operands,
    pooled,
    sizes,
    stochastic,
    truncating,
)


def expected(a: torch.Tensor, b: torch.Tensor, acc: Accumulator) -> np.ndarray:
    """(B, M, K) times (B, K, N) by the reference, rounded to float32; rows are counted through the batches."""
    batches, m, _ = a.shape
    result = np.empty((batches, m, b.shape[2]), np.float32)
    for i in range(batches):
        result[i] = reference.matmul(a[i].numpy(), b[i].numpy(), acc, rows=i * m + np.arange(m))
    return result


def assert_equal(a: torch.Tensor, b: torch.Tensor, acc: Accumulator, machine: Machine) -> None:
    with machine.applied():
        found = matmul(a, b, acc)
    assert found.dtype == torch.float32
    np.testing.assert_array_equal(found.numpy(), expected(a, b, acc), err_msg=str(acc))


@examples(90)
@given(data=st.data(), acc=accumulators, machine=machines, batches=st.sampled_from([1, 1, 2, 3]))
def test_equals_the_reference(data, acc, machine, batches):
    m, n, depth = data.draw(sizes), data.draw(sizes), data.draw(depths)
    drawn = data.draw(operands(acc))
    assert_equal(*drawn.tensors((batches, m, depth), (batches, depth, n)), acc, machine)


@examples(60)
@given(data=st.data(), acc=truncating, machine=machines)
def test_truncation_of_any_format_equals_the_reference(data, acc, machine):
    """The float32 arithmetic, with what operands make needless left out, on tiles that some chunks saturate."""
    drawn = data.draw(operands(acc))
    a, b = drawn.tensors((1, 19, 37), (1, 37, 35))
    assert_equal(a, b, acc, machine)
    assert_equal(a * (torch.arange(37) < 16), b, acc, machine)


@examples(25)
@given(data=st.data(), acc=stochastic, layout=st.sampled_from([(1, 9, 33), (2, 33, 9), (3, 1, 20)]))
def test_stochastic_rounding_is_the_same_however_computed(data, acc, layout):
    batches, m, n = layout
    a, b = data.draw(operands(acc)).tensors((batches, m, 21), (batches, 21, n))
    wanted = expected(a, b, acc)
    for target in range(len(available_targets())):
        for threads, block_bytes in ((1, None), (2, 1)):
            with Machine(target, threads, block_bytes, False).applied():
                np.testing.assert_array_equal(matmul(a, b, acc).numpy(), wanted, err_msg=str(acc))


fixed = st.builds(
    FixedFormat,
    width=st.integers(2, 32),
    fraction=st.integers(0, 4),
    overflow=st.sampled_from(["saturate", "wrap"]),
)
whole = fresh_accumulators(fixed, st.one_of(st.none(), st.none(), fixed), st.sampled_from(ROUNDINGS))


@examples(60)
@given(acc=whole, machine=machines, largest=st.sampled_from([1, 7, 127, 2000]), seed=st.integers(0, 2**32 - 1))
def test_whole_numbers_into_fixed_point(acc, machine, largest, seed):
    """Integer operands, whose products need no rounding: sums that saturate, wrap, or do neither, by tile and chunk."""
    rng = np.random.default_rng(seed)
    a, b = (
        torch.from_numpy(rng.integers(-largest, largest + 1, s).astype(np.float32)) for s in ((1, 19, 37), (1, 37, 35))
    )
    assert_equal(a, b, acc, machine)
    assert_equal(a * (torch.arange(37) < 16), b.abs(), acc, machine)


def test_bounds_know_that_rounding_grows_sums():
    """Sums whose exact values stay just inside the range, and that rounding up takes beyond it, step by step."""
    for name in ("M2E4b8h chunk=16", "M2E4b8 chunk=16 rounding=nearest_away", "I8f0 product=I8f0 rounding=half_up"):
        acc = Accumulator(name)
        for share in np.linspace(0.5, 1.0, 11):
            term = acc.format.max * share / 16
            a = torch.full((1, 16, 16), float(np.float32(term)))
            assert_equal(a, torch.ones(1, 16, 16), acc, Machine(0, 1, None, True))
            assert_equal(-a, torch.ones(1, 16, 16), acc, Machine(0, 1, None, True))


@pytest.mark.parametrize("target", range(len(available_targets())))
@pytest.mark.parametrize("m", [1, 2, 5])
def test_bounds_of_some_columns_say_nothing_of_the_next(target, m):
    """Few rows, whose sums saturate in one panel of columns and not in those before it."""
    a, b = torch.ones(1, m, 16), torch.full((1, 16, 160), 0.01)
    b[:, :12, 40::7], b[:, 12:, 40::7] = 7.0, -7.0
    assert_equal(a, b, Accumulator.paper12, Machine(target, 1, None, True))


@examples(40)
@given(data=st.data(), acc=pooled, m=sizes, n=sizes, depth=depths)
def test_target_and_threads_do_not_matter(data, acc, m, n, depth):
    a, b = data.draw(operands(acc)).tensors((2, m, depth), (2, depth, n))
    first, *others = [
        _computed(a, b, acc, Machine(target, threads, block_bytes, shares))
        for target in range(len(available_targets()))
        for threads, block_bytes, shares in ((1, None, False), (2, 1, True))
    ]
    for other in others:
        torch.testing.assert_close(other, first, rtol=0, atol=0)


def _computed(a: torch.Tensor, b: torch.Tensor, acc: Accumulator, machine: Machine) -> torch.Tensor:
    with machine.applied():
        return matmul(a, b, acc)


@examples(60)
@given(data=st.data(), acc=st.one_of(pooled, truncating), machine=machines, m=sizes, n=sizes, depth=depths)
def test_events_are_those_of_the_reference(data, acc, machine, m, n, depth):
    a, b = data.draw(operands(acc)).tensors((1, m, depth), (1, depth, n))
    with machine.applied():
        found = count_events(a, b, acc)
    counted = reference.count_events(a[0].numpy(), b[0].numpy(), acc)
    events = [f"{prefix}{event}" for prefix in ("", "merge_") for event in reference.EVENTS]
    assert dict(zip(events, found, strict=True)) == {event: counted[event] for event in events}


@pytest.mark.parametrize("shape", [(0, 3, 4, 5), (2, 0, 4, 5), (2, 3, 0, 5), (2, 3, 4, 0), (2, 0, 0, 0)])
def test_empty_dimensions_give_what_torch_gives(shape):
    batches, m, depth, n = shape
    a, b = torch.randn(batches, m, depth), torch.randn(batches, depth, n)
    found = matmul(a, b, Accumulator.paper12)
    assert found.shape == torch.bmm(a, b).shape
    assert torch.equal(found, torch.zeros(batches, m, n))


@pytest.mark.parametrize("target", [t.name for t in available_targets()])
@pytest.mark.parametrize("name", ["paper12", "M7E4b10 chunk=16 rounding=nearest_even", "I16f4w chunk=16"])
def test_a_product_with_threads_of_its_own_size(target, name):
    """Large enough for the usual division among threads, with panels and tiles left over."""
    acc = Accumulator(name)
    rng = np.random.default_rng(5)
    a, b = (torch.from_numpy(rng.normal(0, 3, s).astype(np.float32)) for s in ((1, 150, 130), (1, 130, 141)))
    with use_target(target):
        found = matmul(a, b, acc)
    np.testing.assert_array_equal(found.numpy(), expected(a, b, acc))


def test_one_saturating_chunk_among_safe_ones():
    """Bounds are taken for a tile and a chunk: the only one that saturates must be seen wherever it is."""
    acc = Accumulator("M7E4b10", product="M7E4b12", chunk=16)
    rng = np.random.default_rng(11)
    for row, k, column in rng.integers((0, 0, 0), (70, 96, 70), (12, 3)):
        a, b = (torch.from_numpy(rng.normal(0, 0.1, s).astype(np.float32)) for s in ((1, 70, 96), (1, 96, 70)))
        a[0, row, k], b[0, k, column] = 9.0, -9.0
        assert_equal(a, b, acc, Machine(0, 1, None, True))


def test_sums_that_reach_the_largest_exactly():
    """A sum equal to the largest does not saturate; the next step does, and negative terms leave it again."""
    acc = Accumulator("M3E3b4", product=None, chunk=None)
    x = torch.tensor([8.0, 7.0, 1.0, 1.0, -4.0, -20.0, -1.0])
    a = x.expand(1, 32, 7)
    assert acc.format.max == 15.0
    assert_equal(a, torch.ones(1, 7, 32), acc, Machine(0, 1, None, True))
    assert matmul(a[:, :1, :4], torch.ones(1, 4, 1), acc).item() == 15.0


@pytest.mark.parametrize("target", [t.name for t in available_targets()])
def test_ties_without_a_mantissa_go_up(target):
    """A significand of one bit is odd; the bit below it in a register is the exponent's and says nothing."""
    acc = Accumulator("M0E4b4", rounding="nearest_even")
    x = torch.tensor([1.5, -3.0, 0.75, -0.375, 1.25, 0.0])[None, :, None]
    with use_target(target):
        found = matmul(x, torch.ones(1, 1, 1), acc)
    assert found.flatten().tolist() == [2.0, -4.0, 1.0, -0.5, 1.0, 0.0]


def test_all_zero_operands_and_zeros_of_both_signs():
    a = torch.tensor([0.0, -0.0, 0.0]).expand(1, 5, 3)
    b = torch.tensor([-3.0, 1e38, -0.0]).expand(1, 4, 3).transpose(1, 2)
    for name in ("paper12", "I8f0w", "M7E4b10 rounding=stochastic"):
        assert torch.equal(matmul(a, b, Accumulator(name)), torch.zeros(1, 5, 4))


def test_wide_fixed_sums_are_rounded_once_to_float32():
    """The accumulator keeps all 32 bits; only the output is a float32, the nearest."""
    acc = Accumulator("I32f0", chunk=None)
    terms = torch.tensor([2.0**24, 1.0, 2.0])  # 2^24 + 3 lies between float32's 2^24 + 2 and 2^24 + 4: a tie
    for target in available_targets():
        with use_target(target.name):
            assert matmul(terms[None, None], torch.ones(1, 3, 1), acc).item() == 2.0**24 + 4
            assert matmul(terms[None, None, :2], torch.ones(1, 2, 1), acc).item() == 2.0**24


@pytest.mark.parametrize("overflow, wanted", [("", 127.0), ("w", -56.0)])
def test_fixed_overflow(overflow, wanted):
    acc = Accumulator(f"I8f0{overflow}", chunk=None)
    assert matmul(torch.full((1, 1, 2), 10.0), torch.full((1, 2, 1), 10.0), acc).item() == wanted


def test_a_long_sum_in_one_chunk():
    """Bounds over very many small terms: the sum saturates by their number alone."""
    acc = Accumulator("M23E4b12", product=None, chunk=None)
    values = Values(exponent=-4, bits=12, spread=2, zeros=0.0, extremes=0.0, is_positive=True)
    a, b = Operands(values, values, 3, False).tensors((1, 16, 3000), (1, 3000, 16))
    assert_equal(a, b, acc, Machine(0, 1, None, True))
    assert_equal(a, b / 64, acc, Machine(0, 1, None, True))


@examples(30)
@given(
    data=st.data(), acc=pooled, machine=machines, m=sizes, n=sizes, count=st.integers(1, 4), where=st.sampled_from("ab")
)
def test_a_non_finite_operand_spoils_what_depends_on_it_alone(data, acc, machine, m, n, count, where):
    a, b = data.draw(operands(acc)).tensors((2, m, 18), (2, 18, n))
    a, b = a.clone(), b.clone()
    rng = np.random.default_rng(count)
    spoiled = a if where == "a" else b
    for value in rng.choice([np.nan, np.inf, -np.inf], count if spoiled.numel() else 0):
        spoiled[tuple(rng.integers(spoiled.shape))] = float(value)
    assert_equal(a, b, acc, machine)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("special", [None, "nan", "inf"])
def test_the_public_product_takes_every_dtype(dtype, special):
    """A number of a narrower type is the same number in float32."""
    if special == "inf" and dtype == torch.float8_e4m3fn:
        pytest.skip("float8_e4m3fn has no infinity")
    rng = np.random.default_rng(6)
    a, b = (torch.from_numpy(rng.normal(0, 2, s).astype(np.float32)).to(dtype) for s in ((9, 20), (20, 11)))
    if special is not None:
        wide = a.float()
        wide[4, 7] = float(special)
        a = wide.to(dtype)
    found = fmaq.matmul(a, b, "paper12")
    wanted = expected(a.float()[None], b.float()[None], Accumulator.paper12)[0]
    np.testing.assert_array_equal(found.numpy(), wanted)
    assert np.isnan(wanted).sum() == (0 if special is None else 11)
