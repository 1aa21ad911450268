"""Dot products and gradients of the reference against exact fractions (`exact.py`), by equality."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from exact import Dot, dot, product_and_sum
from fmaq.numerics import Accumulator, reference
from reference_cases import accumulators, operands

ESTIMATORS = ["identity", "immediate/of", "immediate/diff", "recursive/of", "recursive/diff"]


def as_float32(values, *shape):
    array = np.array(values, np.float32).reshape(shape)
    assert np.all(np.isfinite(array))
    return array


@st.composite
def products(draw):
    """An accumulator, and (M, K) and (K, N) operands."""
    acc = draw(accumulators)
    m, n, depth = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 9))
    pool = draw(st.lists(operands(acc), min_size=2, max_size=8))
    of_pool = st.sampled_from(pool)
    a = draw(st.lists(of_pool, min_size=m * depth, max_size=m * depth))
    b = draw(st.lists(of_pool, min_size=n * depth, max_size=n * depth))
    return acc, as_float32(a, m, depth), as_float32(b, depth, n)


def exact_dots(a, b, acc) -> dict[tuple[int, int], Dot]:
    """The exact dot product of every output."""
    rows, columns = range(a.shape[0]), range(b.shape[1])
    try:
        return {(m, n): dot(a[m].tolist(), b[:, n].tolist(), acc, m, n) for m in rows for n in columns}
    except OverflowError:
        reject()  # sums that become infinite are tested by hand


# --- Dot products -----------------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(products())
def test_matmul_and_all_that_happens_in_it(drawn):
    acc, a, b = drawn
    dots = exact_dots(a, b, acc)
    y = reference.matmul(a, b, acc)
    assert y.dtype == np.float64
    assert y.shape == (a.shape[0], b.shape[1])
    trace = list(reference.steps(a, b, acc))
    steps = [step for step in trace if step.exact_product is not None]
    merges = [step for step in trace if step.exact_product is None]
    masks = {estimator: reference.estimator_masks(a, b, acc, estimator) for estimator in ESTIMATORS}
    for (m, n), expected in dots.items():
        assert Fraction(y[m, n]) == expected.result
        assert Fraction(reference.dot(a[0], b[:, 0], acc)) == dots[0, 0].result
        for mine, theirs in ((steps, expected.steps), (merges, expected.merges)):
            assert len(mine) == len(theirs)
            for step, term in zip(mine, theirs, strict=True):
                assert (step.k, step.level) == (term.k, term.level)
                assert Fraction(step.p[m, n]) == term.p
                assert Fraction(step.before[m, n]) == term.before
                assert Fraction(step.after[m, n]) == term.after
                assert step.overflows[m, n] == term.overflows
                assert step.is_lost[m, n] == term.is_lost
                seen = {name for name, mask in reference.step_events(step).items() if mask[m, n]}
                assert seen == term.events(is_merge=mine is merges)
        for estimator, mask in masks.items():
            assert mask[:, m, n].tolist() == [expected.alpha(k, estimator) for k in range(a.shape[1])]


@settings(max_examples=60)
@given(products())
def test_count_events_adds_them_up(drawn):
    acc, a, b = drawn
    dots = list(exact_dots(a, b, acc).values())
    expected = dict.fromkeys(reference.EVENTS, 0) | {f"merge_{name}": 0 for name in reference.EVENTS}
    for each in dots:
        for prefix, terms in (("", each.steps), ("merge_", each.merges)):
            for term in terms:
                for name in term.events(is_merge=bool(prefix)):
                    expected[prefix + name] += 1
    expected["steps"] = a.size * b.shape[1]
    expected["merges"] = sum(len(each.merges) for each in dots)
    assert reference.count_events(a, b, acc) == expected
    assert acc.merges(a.shape[1]) == len(dots[0].merges)


def test_each_event_by_hand():
    acc = Accumulator("M2E3b3", product="M2E3b3", chunk=4)  # 0.125 to 28, 3 significant bits

    def events(*terms: float) -> dict[str, int]:
        counts = reference.count_events(np.array([terms]), np.ones((len(terms), 1)), acc)
        return {name: count for name, count in counts.items() if count and name not in ("steps", "merges")}

    assert events(1, 2) == {}
    assert events(32, 0) == {"product_overflow": 1}
    assert events(0.1) == {"product_underflow": 1}
    assert events(28, 28) == {"accumulator_overflow": 1}
    assert events(0.25, -0.21875) == {"accumulator_underflow": 1}
    assert events(16, 0.5) == {"full_swamping": 1}
    assert events(4, 1.25) == {"partial_swamping": 1}
    assert events(1.3, 0) == {}, "bits lost in the product's rounding are no event"
    assert events(16, 0, 0, 0, 0.5) == {"merge_full_swamping": 1}
    assert events(28, 0, 0, 0, 28) == {"merge_accumulator_overflow": 1}


def test_a_sum_just_below_a_power_of_two_truncates_below_it():
    """1 − 2^−60 is 1 in float64, and the number below 1 in every format."""
    acc = Accumulator("M7E8b127", chunk=None)
    assert reference.dot([1.0, -(2.0**-60)], [1.0, 1.0], acc) == 1 - 2.0**-8
    assert reference.dot([1.0, 2.0**-60], [1.0, 1.0], acc) == 1
    halfway = 1 + 2.0**-8
    nearest = Accumulator("M7E8b127", chunk=None, rounding="nearest_even")
    assert reference.dot([1.0, halfway, 2.0**-60], [0.0, 1.0, 1.0], nearest) == 1, "steps round one by one"
    assert reference.dot([-(2.0**-60), halfway], [1.0, 1.0], nearest) == 1
    assert reference.dot([2.0**-60, halfway], [1.0, 1.0], nearest) == 1 + 2.0**-7


def test_chunks_by_hand():
    """Seven ones into two significant bits: 4 + 1 is swamped, 3 + 3 + 1 is not until the end."""
    ones = np.ones(7)
    assert reference.dot(ones, ones, Accumulator("M1E4b8", chunk=None)) == 4
    assert reference.dot(ones, ones, Accumulator("M1E4b8", chunk=1)) == 4
    assert reference.dot(ones, ones, Accumulator("M1E4b8", chunk=3)) == 6
    assert reference.dot(ones, ones, Accumulator("M1E4b8", chunk=100)) == 4
    assert reference.dot(ones, ones, Accumulator("M2E4b8", chunk=4)) == 7


def test_levels_by_hand():
    """Ones into two significant bits, in chunks of 3: their sums of 3 go exactly into the next level."""
    ones = np.ones(21)

    def total(outer: str) -> float:
        return reference.dot(ones, ones, Accumulator(f"M1E4b8 chunk=3 outer={outer}"))

    assert reference.dot(ones, ones, Accumulator("M1E4b8 chunk=3")) == 8  # 3, 6, 8 (9), 8 (11), …
    assert total("M4E4b8") == total("fp32") == total("I8") == 21
    assert total("M2E4b8") == 16  # 3, 6, 8 (9), 10 (11), 12 (13), 14 (15), 16 (17)
    assert total("(M2E4b8 rounding=nearest_even chunk=2 outer=fp32)") == 3 * 6 + 3
    assert total("(M1E4b8 chunk=None outer=M4E4b8h)") == 8.25
    assert total("I4") == 7


def test_a_format_outside_rounds_as_the_sums_do():
    x = np.array([1.0, 0.0, 0.125, 0.0])
    for rounding, wanted in (("toward_zero", 1.0), ("nearest_away", 1.25), ("nearest_even", 1.0), ("odd", 1.25)):
        acc = Accumulator("M4E4b8", chunk=2, rounding=rounding, outer="M2E4b8")
        assert reference.dot(x, np.ones(4), acc) == wanted
    half = Accumulator("M4E4b8", chunk=2, rounding="nearest_even", outer="M2E4b8h")
    assert reference.dot(x, np.ones(4), half) == 1.375  # 1 enters as 1.125


def test_float32_outside_becomes_infinite():
    acc = Accumulator("M7E4b-112", chunk=1, outer="fp32")
    huge = np.full(3, 2.0**63)
    for last, wanted in ((1, np.inf), (-1, np.inf)):
        assert reference.dot([*huge, last * 2.0**63], np.full(4, 2.0**64), acc) == wanted
    counts = reference.count_events([huge], np.full((3, 1), 2.0**64), acc)
    assert (counts["merges"], counts["merge_accumulator_overflow"], counts["steps"]) == (3, 2, 3)


def test_merges_are_judged_by_the_level_that_makes_them():
    acc = Accumulator("M2E3b3 chunk=2 outer=(M3E4b3 chunk=2 outer=M1E2b-1)")  # to 28; to 15·2^9; from 2 to 24

    def events(*terms: float) -> dict[str, int]:
        counts = reference.count_events(np.array([terms]), np.ones((len(terms), 1)), acc)
        return {name: count for name, count in counts.items() if count and name.startswith("merge_")}

    assert events(28, 0, 28) == {"merge_accumulator_overflow": 1}  # 56 is above 24, in the outermost alone
    assert events(1) == {"merge_accumulator_underflow": 1}  # below 2
    assert events(4, 0, 0.5, 0) == {"merge_partial_swamping": 1}  # 4.5 is 4 there
    assert events(16, 0, 1, 0) == {"merge_full_swamping": 1}  # 17 is 16 in the middle
    assert acc.merges(9) == 5 + 3


def test_an_integer_accumulator_wraps_as_integers_do():
    generator = np.random.default_rng(0)
    a, b = generator.integers(-128, 128, (5, 700)), generator.integers(-128, 128, (700, 4))
    wrapped = (a @ b).astype(np.int16)
    assert np.any(wrapped != a @ b)
    for chunk in (16, None):
        np.testing.assert_array_equal(reference.matmul(a, b, Accumulator("I16f0w", chunk=chunk)), wrapped)
    np.testing.assert_array_equal(reference.matmul(a, b, Accumulator("I32f0")), a @ b)


@pytest.mark.parametrize("rounding", ["toward_zero", "nearest_even"])
def test_products_far_beyond_a_wrapping_sum(rounding):
    """Products of 48 bits and of 2^40 to 2^60 steps, with and without fractions of a step, of either sign."""
    generator = np.random.default_rng(7)
    acc = Accumulator("I30f3w", chunk=None, rounding=rounding)
    for scale in range(40, 61):
        x = np.ldexp(generator.integers(2**23, 2**24, 12) * generator.choice([-1, 1], 12), scale - 26 - 24)
        w = np.ldexp(generator.integers(2**23, 2**24, 12) | 1, -1)
        small = np.array([0.125, -3.375, 7.625])
        x, w = np.concatenate([small, x]), np.concatenate([np.ones(3), w])
        assert Fraction(reference.dot(x, w, acc)) == dot(x.tolist(), w.tolist(), acc).result


@settings(max_examples=40)
@given(accumulators.filter(lambda acc: "stochastic" not in (acc.rounding, acc.rounding_of_products)), st.data())
def test_one_fmaq(acc, data):
    x, w = (float(np.float32(data.draw(operands(acc)))) for _ in range(2))
    s = acc.format.decode(data.draw(st.integers(0, 2**acc.format.bits - 1)))
    expected = product_and_sum(acc, 0, x, w, Fraction(s), 0).after
    assert Fraction(reference.fmaq(x, w, s, acc)) == expected


def test_one_fmaq_has_no_position():
    with pytest.raises(ValueError, match=r"no position .* for stochastic rounding; use dot or matmul"):
        reference.fmaq(1, 1, 1, Accumulator("M7E4b10", rounding="stochastic"))


@pytest.mark.parametrize("bad", [np.inf, -np.inf, np.nan])
def test_non_finite_operands_spoil_what_depends_on_them(bad):
    generator = np.random.default_rng(1)
    a, b = generator.standard_normal((4, 20)), generator.standard_normal((20, 5))
    clean = reference.matmul(a, b, Accumulator.paper12)
    a[1, 7], b[:, 2], b[3, 4] = bad, 0.0, bad
    y = reference.matmul(a, b, Accumulator.paper12)
    depends = np.zeros((4, 5), bool)
    depends[1, :] = depends[:, 4] = True  # a zero times infinity included
    np.testing.assert_array_equal(np.isnan(y), depends)
    untouched = ~depends & (np.arange(5) != 2)
    np.testing.assert_array_equal(y[untouched], clean[untouched])
    np.testing.assert_array_equal(y[[0, 2, 3], 2], 0)


@pytest.mark.parametrize("shape", [(0, 3, 2), (3, 0, 2), (3, 2, 0), (0, 0, 0)])
def test_empty_dimensions(shape):
    m, depth, n = shape
    a, b = np.ones((m, depth)), np.ones((depth, n))
    np.testing.assert_array_equal(reference.matmul(a, b, Accumulator.paper12), a @ b)
    assert reference.estimator_masks(a, b, Accumulator.paper12, "recursive/diff").shape == (depth, m, n)
    assert reference.count_events(a, b, Accumulator.paper12)["steps"] == m * depth * n


def test_rows_keep_their_random_words_wherever_they_are_computed():
    generator = np.random.default_rng(2)
    a, b = generator.standard_normal((6, 33)), generator.standard_normal((33, 3))
    acc = Accumulator("M3E5b12", rounding="stochastic", seed=8)
    whole = reference.matmul(a, b, acc)
    np.testing.assert_array_equal(reference.matmul(a[[4, 1]], b, acc, rows=[4, 1]), whole[[4, 1]])
    assert np.any(reference.matmul(a[[4, 1]], b, acc) != whole[[4, 1]])
    assert np.any(reference.matmul(a, b, Accumulator("M3E5b12", rounding="stochastic", seed=9)) != whole)


def test_a_template_cannot_compute():
    with pytest.raises(ValueError, match='"M7E4" is a template: it has no bias'):
        reference.matmul(np.ones((1, 1)), np.ones((1, 1)), Accumulator("M7E4"))


# --- Gradients --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_are_sums_of_what_passes(estimator):
    generator = np.random.default_rng(3)
    acc = Accumulator("M2E3b6", product="M2E3b5", chunk=4)  # sums to 3.5, products to 7
    a, b = generator.integers(-9, 9, (3, 10)) / 4, generator.integers(-9, 9, (10, 2)) / 4
    grad = generator.integers(-5, 6, (3, 2)).astype(float)
    dots = exact_dots(a, b, acc)
    of_a, of_b = np.zeros_like(a), np.zeros_like(b)
    stopped = 0
    for (m, n), each in dots.items():
        for k in range(10):
            alpha = each.alpha(k, estimator)
            stopped += not alpha
            of_a[m, k] += grad[m, n] * alpha * b[k, n]
            of_b[k, n] += grad[m, n] * alpha * a[m, k]
    mine = reference.gradients(a, b, grad, acc, estimator)
    np.testing.assert_array_equal(mine[0], of_a)
    np.testing.assert_array_equal(mine[1], of_b)
    assert (stopped > 0) == (estimator != "identity")


def test_estimators_by_hand():
    """Chunks of two: 28 saturates at its second step, later steps and merges decide for the recursive ones."""
    acc = Accumulator("M2E3b3", product="M2E3b3", chunk=2)
    a, b = np.array([[28.0, 28, 1, 0.1, 1, 1]]), np.ones((6, 1))

    def alpha(estimator: str) -> list[int]:
        return reference.estimator_masks(a, b, acc, estimator)[:, 0, 0].astype(int).tolist()

    assert alpha("identity") == [1, 1, 1, 1, 1, 1]
    assert alpha("immediate/of") == [1, 0, 1, 1, 1, 1]
    assert alpha("immediate/diff") == [1, 0, 1, 0, 1, 1]
    assert alpha("recursive/of") == [0, 0, 1, 1, 1, 1]  # 28 + 1 truncates back to 28: no overflow
    assert alpha("recursive/diff") == [0, 0, 0, 0, 0, 0]  # the last merge, 28 + 2, is lost
    with pytest.raises(ValueError, match=r"estimator must be one of identity, immediate/of.*, got 'straight'"):
        alpha("straight")


def test_float32_products_are_torchs_where_nothing_is_lost():
    """Small integers are exact in M23: any accumulator wide enough is the ordinary product."""
    generator = np.random.default_rng(5)
    a, b = generator.integers(-20, 21, (4, 60)), generator.integers(-20, 21, (60, 3))
    for rounding in ("toward_zero", "nearest_even", "stochastic"):
        np.testing.assert_array_equal(reference.matmul(a, b, Accumulator("M23E5b5", rounding=rounding)), a @ b)
