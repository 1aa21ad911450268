"""The random words of stochastic rounding: pinned for ever, uniform, and independent of one another."""

import warnings

import numpy as np
import pytest

from exact import lowbias32, random_word
from fmaq.numerics import Accumulator, FloatFormat, random, reference

M, N, K = 48, 64, 320


def words(seed: int = 5) -> np.ndarray:
    """The words of all steps of all outputs, (K, M, N)."""
    base = random.base(seed, np.arange(M)[:, None], np.arange(N)[None, :])
    return np.stack([random.step_word(base, k) for k in range(K)])


def merge_words(seed: int = 5) -> np.ndarray:
    base = random.base(seed, np.arange(M)[:, None], np.arange(N)[None, :])
    return np.stack([random.step_word(base ^ np.uint32(random.MERGE), k) for k in range(K)])


def chi_square(values: np.ndarray, cells: int) -> float:
    """How far counts are from uniform, in standard deviations of the chi-square statistic."""
    counts = np.bincount(values.ravel(), minlength=cells)
    assert counts.size == cells
    expected = values.size / cells
    assert expected >= 20
    return (((counts - expected) ** 2 / expected).sum() - (cells - 1)) / np.sqrt(2 * (cells - 1))


# --- The definition ---------------------------------------------------------------------------------------------------


# (seed, m, n, k): word of the step, word of the merge. Never change these: results depend on them.
PINNED = {
    (0, 0, 0, 0): (0x41F39E5E, 0x18890D3D),
    (0, 0, 0, 1): (0xDB104D37, 0x9A504F3D),
    (0, 0, 1, 0): (0x9FBEEF9D, 0x807DE3CB),
    (0, 1, 0, 0): (0x13F967EB, 0x97165257),
    (1, 0, 0, 0): (0xC31D1687, 0x1FAB61F4),
    (4294967296, 0, 0, 0): (0x0B6C72DF, 0xEE8CAA0C),
    (18446744073709551615, 7, 11, 13): (0xBA525824, 0x50DEE88C),
    (123456789, 1000, 2147483648, 40000): (0x92EC0435, 0xDC0F4292),
    (42, 4294967295, 4294967295, 2147483648): (0x044F3A1B, 0x89C957CD),
}


@pytest.mark.parametrize(("position", "expected"), PINNED.items())
def test_pinned_words(position, expected):
    seed, m, n, k = position
    base = random.base(seed, m, n)
    merge = random.step_word(base ^ np.uint32(random.MERGE), k)
    assert (int(random.step_word(base, k)), int(merge)) == expected
    assert (random_word(seed, m, n, k), random_word(seed, m, n, k, level=1)) == expected


def test_parts_of_a_word():
    w = np.array([0xABCD1234], np.uint32)
    assert random.sum_bits(w, 16) == 0xABCD
    assert random.product_bits(w, 16) == 0x1234
    assert random.sum_bits(w, 4) == 0xA
    assert random.product_bits(w, 4) == 0x1
    assert random.sum_bits(w, 1) == 1
    assert random.product_bits(w, 1) == 0


def test_the_mixer_is_a_permutation():
    xs = np.concatenate([np.arange(1 << 16), np.arange(1 << 16) << 16]).astype(np.uint32)
    mixed = random.mix(xs)
    assert np.unique(mixed).size == np.unique(xs).size
    assert [int(v) for v in mixed[:300]] == [lowbias32(x) for x in range(300)]


def test_scalars_and_arrays_agree_without_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = words(seed=2**64 - 1)
        for m, n, k in ((0, 0, 0), (1, 2, 3), (M - 1, N - 1, K - 1)):
            base = random.base(2**64 - 1, m, n)
            assert random.step_word(base, k) == whole[k, m, n]
        assert random.key(0) != random.key(1)


def test_both_halves_of_a_seed_matter():
    keys = {random.key(low | high << 32) for low in range(100) for high in range(100)}
    assert len(keys) > 9990


# --- Randomness -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("draw", [random.product_bits, random.sum_bits])
@pytest.mark.parametrize("bits", [1, 4, 10])
def test_uniform(draw, bits):
    for w in (words(), merge_words()):
        drawn = draw(w, bits)
        assert drawn.min() == 0
        assert drawn.max() == 2**bits - 1
        assert abs(chi_square(drawn, 2**bits)) < 4


@pytest.mark.parametrize("draw", [random.product_bits, random.sum_bits])
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("lag", [1, 2, 3, 8, 13, 16, 21, 34])
def test_positions_are_independent(draw, axis, lag):
    drawn = np.moveaxis(draw(words(), 4), axis, 0)
    assert abs(chi_square(drawn[lag:] * 16 + drawn[:-lag], 256)) < 4.5


def test_sums_over_k_spread_like_independent_draws():
    for draw in (random.product_bits, random.sum_bits):
        sums = (draw(words(), 8) - 127.5).sum(axis=0)
        ratio = sums.var() / (K * (256**2 - 1) / 12)
        assert abs(ratio - 1) < 4 * np.sqrt(2 / (M * N))


def test_products_sums_merges_and_seeds_are_independent():
    w, other, merges = words(), words(seed=6), merge_words()
    product, total = random.product_bits(w, 4), random.sum_bits(w, 4)
    for partner in (product, random.sum_bits(other, 4), random.sum_bits(merges, 4), random.product_bits(other, 4)):
        assert abs(chi_square(total * 16 + partner, 256)) < 4.5


# --- What it is for ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rounded", ["sum", "product"])
@pytest.mark.parametrize("fraction", [0.0, 1 / 16, 0.3, 0.5, 15 / 16])
def test_stochastic_rounding_is_unbiased(rounded, fraction):
    """One step of x = 1 + fraction/8 in M3, in 40,000 positions: up with the probability of its fraction."""
    coarse, fine = "M3E5b10", "M20E5b10"
    product, total = (coarse, fine) if rounded == "product" else (fine, coarse)
    acc = Accumulator(total, product=product, rounding="stochastic", random_bits=12, seed=3)
    x = 1 + fraction / 8
    step = next(reference.steps(np.full((200, 1), x), np.ones((1, 200)), acc))
    values = step.p if rounded == "product" else step.after
    assert set(np.unique(values)) <= {1.0, 1.125}
    up = (values > 1).mean()
    assert abs(up - fraction) < 2**-12 + 4 * np.sqrt(fraction * (1 - fraction) / values.size)


def test_a_long_sum_is_unbiased_where_truncation_stands_still():
    """400 steps of 1/100 onto M3: truncation is swamped at 1/8; stochastic rounding arrives at 4 on average."""
    a, b = np.full((100, 400), 0.01), np.ones((400, 20))
    swamped = reference.matmul(a, b, Accumulator("M3E5b16", chunk=None))
    assert np.all(swamped < 0.2)
    y = reference.matmul(a, b, Accumulator("M3E5b16", chunk=None, rounding="stochastic", random_bits=16))
    assert abs(y.mean() - 4) < 4 * y.std() / np.sqrt(y.size)


@pytest.mark.parametrize("bits", [1, 2, 3, 8])
def test_what_few_random_bits_lose_on_average_and_centred_ones_do_not(bits):
    """Over all fractions of a unit, in steps of 2^-(bits + 4), and all R: half of 2^-bits toward zero, or nothing."""
    fractions = np.arange(0, 1, 2.0 ** -(bits + 4))
    x = 1 + fractions[:, None] / 8  # in M3
    drawn = np.arange(2**bits)
    grid = FloatFormat(3, 5, 10)

    def mean_error(r):
        rounded = reference.round_to_grid(x, grid, "stochastic", bits, r)
        return float((rounded - x).mean() * 8)

    step = 2.0 ** -(bits + 4)  # of the fractions, whose own mean is half a step below a half
    assert mean_error(drawn) == -(2.0**-bits) / 2 + step / 2
    assert mean_error(drawn | 1) == step / 2
    exact = reference.round_to_grid(np.array([[1.0]]), grid, "stochastic", bits, drawn | 1)
    assert np.all(exact == 1.0)


@pytest.mark.parametrize("rounded", ["sum", "product"])
def test_centred_random_numbers_are_odd_and_otherwise_the_same(rounded):
    """Two random bits of three: up for R = 1, 3, 5, 7 alone."""
    coarse, fine = "M3E5b10", "M20E5b10"
    product, total = (coarse, fine) if rounded == "product" else (fine, coarse)
    words = dict(product=product, rounding="stochastic", random_bits=3, seed=3)
    ones, w = np.ones((1, 200)), random.step_word(random.base(3, np.arange(200)[:, None], np.arange(200)[None]), 0)
    r = (random.product_bits if rounded == "product" else random.sum_bits)(w, 3)
    for fraction in (1 / 16, 1 / 8, 0.3, 3 / 8, 15 / 16):
        x = np.full((200, 1), 1 + fraction / 8)
        for centred in (False, True):
            step = next(reference.steps(x, ones, Accumulator(total, **words, centred=centred)))
            value = step.p if rounded == "product" else step.after
            assert np.array_equal(value > 1, np.floor(fraction * 8) + (r | centred) >= 8)


def test_a_long_sum_of_few_random_bits_is_right_on_average_if_they_are_centred():
    """Toward zero it loses half of 1/32 of a unit in the last place a step: here about a thirtieth of all."""
    rng = np.random.default_rng(0)
    a, b = rng.uniform(0.2, 1, (100, 64)).astype(np.float32), np.ones((64, 30), np.float32)
    exact = a.astype(np.float64) @ b

    def shrinkage(centred):
        acc = Accumulator("M4E6b31", chunk=None, rounding="stochastic", random_bits=5, centred=centred)
        return float((reference.matmul(a, b, acc) / exact).mean()) - 1

    assert shrinkage(False) < -0.02
    assert abs(shrinkage(True)) < 0.005
