"""The reference against exact fractions (`exact.py`), by equality, and against `gfloat` and `ml_dtypes`."""

from fractions import Fraction

import gfloat
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, reject, settings
from hypothesis import strategies as st

from exact import Dot, dot, floor_log2, in_register, on_grid, power, product_and_sum
from fmaq.numerics import FLOAT32, ROUNDINGS, Accumulator, FixedFormat, FloatFormat, parse_format, reference
from strategies import fresh_accumulators

FLOAT32_MAX = float(np.finfo(np.float32).max)
ESTIMATORS = ["identity", "immediate/of", "immediate/diff", "recursive/of", "recursive/diff"]

# --- What is drawn ----------------------------------------------------------------------------------------------------


@st.composite
def float_formats(draw):
    exponent = draw(st.integers(1, 8))
    near_one = st.integers(-2, 2**exponent + 1)
    bias = draw(st.one_of(near_one, near_one, near_one, st.integers(-140, 260), st.sampled_from([-700, 700])))
    half_unit = draw(st.booleans())
    mantissa, zero = draw(st.integers(0, 23 - half_unit)), draw(st.sampled_from(["flag", "exponent"]))
    return FloatFormat(mantissa, exponent, bias, zero, half_unit)


fixed_formats = st.builds(
    FixedFormat,
    width=st.integers(2, 32),
    fraction=st.one_of(st.integers(-4, 12), st.integers(-64, 64)),
    overflow=st.sampled_from(["saturate", "wrap"]),
)
formats = st.one_of(float_formats(), fixed_formats)
accumulators = fresh_accumulators(
    formats, st.one_of(st.none(), formats), st.sampled_from(ROUNDINGS), chunks=(1, 2, 3, 3, 16, None)
)


@st.composite
def operands(draw, acc: Accumulator):
    """A float32: zero, a short significand near the format's ends or near one, or anything at all."""
    end = acc.product or acc.format
    exponents = [0, 1, acc.format.emin, acc.format.emax, end.emin // 2, end.emax // 2, -126, 127]
    kind = draw(st.sampled_from(["zero", "short", "short", "short", "integer", "any", "huge", "subnormal"]))
    if kind == "zero":
        return 0.0
    if kind == "integer":
        return float(draw(st.integers(-16, 16)))
    if kind == "any":
        return draw(st.floats(width=32, allow_nan=False, allow_infinity=False))
    if kind == "huge":
        return draw(st.sampled_from([1e38, -1e38, FLOAT32_MAX, -FLOAT32_MAX, 2.0**127]))
    if kind == "subnormal":
        return draw(st.sampled_from([-1, 1])) * draw(st.integers(1, 2**23 - 1)) * 2.0**-149
    bits = draw(st.sampled_from([0, 1, acc.format.bits // 2, 11, 23]))
    significand = 1 + draw(st.integers(0, 2**bits - 1)) / 2**bits
    exponent = min(max(draw(st.sampled_from(exponents)) + draw(st.integers(-2, 2)), -126), 127)
    return draw(st.sampled_from([-1.0, 1.0])) * significand * 2.0**exponent


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


# --- Rounding ---------------------------------------------------------------------------------------------------------

wide_floats = st.builds(
    lambda significand, exponent: float(np.ldexp(significand, exponent)),
    st.one_of(st.integers(-(2**53), 2**53), st.integers(-40, 40)),
    st.integers(-300, 200),
)


@given(wide_floats, st.one_of(wide_floats, st.just(None)), st.integers(-60, 60))
def test_exact_sum_rounds_to_odd(s, p, shift):
    p = float(np.ldexp(s, shift)) if p is None else p
    exact = Fraction(s) + Fraction(p)
    total = float(reference.exact_sum(s, p))
    if total == exact:
        return
    bits = total.hex().split("p")[0]
    assert int(bits[-1], 16) % 2 == 1, "an inexact sum has an odd last bit"
    below, above = sorted((np.nextafter(total, -np.inf), np.nextafter(total, np.inf)))
    assert Fraction(below) < exact < Fraction(above)


@settings(max_examples=400)
@given(accumulators, st.data())
def test_quantize(acc, data):
    x = data.draw(operands(acc)) * data.draw(operands(acc))
    r = data.draw(st.integers(0, 2**acc.random_bits - 1))
    rounded = on_grid(Fraction(x), acc.format, acc.rounding, acc.random_bits, r)
    assert Fraction(float(reference.round_to_grid(x, acc.format, acc.rounding, acc.random_bits, r))) == rounded
    kept = reference.quantize(x, acc.format, acc.rounding, acc.underflow, acc.random_bits, r)
    assert Fraction(float(kept)) == in_register(rounded, acc.format, acc.underflow)


@settings(max_examples=60)
@given(formats, st.sampled_from(ROUNDINGS), st.data())
def test_values_of_a_format_stay(format, rounding, data):
    rounding = "toward_zero" if format.half_unit else rounding
    code = data.draw(st.integers(0, 2**format.bits - 1))
    value = format.decode(code)
    assert reference.quantize(value, format, rounding, True, 8, 255) == value


@pytest.mark.parametrize(
    ("name", "rounding", "x", "expected"),
    [
        ("M2E3b3", "toward_zero", 1.99, 1.75),
        ("M2E3b3", "toward_zero", -1.99, -1.75),
        ("M2E3b3", "nearest_even", 1.125, 1.0),  # ties
        ("M2E3b3", "nearest_even", 1.375, 1.5),
        ("M2E3b3", "nearest_even", -1.375, -1.5),
        ("M2E3b3", "nearest_even", 1.99, 2.0),  # into the next binade
        ("M0E3b3", "nearest_even", 1.5, 2.0),  # one digit only: a tie goes to the larger (IEEE 754-2019, 4.3.1)
        ("M2E3b3", "toward_zero", 1e30, 28.0),
        ("M2E3b3", "nearest_even", -1e30, -28.0),
        ("M2E3b3", "toward_zero", 0.1249, 0.0),
        ("M2E3b3", "nearest_even", 0.1249, 0.125),  # first to the grid, then below the smallest or not
        ("M2E3b3z", "toward_zero", 0.2499, 0.0),
        ("I4f1", "toward_zero", 1.99, 1.5),
        ("I4f1", "toward_zero", -1.99, -1.5),  # the magnitude's floor, not the number's
        ("I4f1", "nearest_even", 1.25, 1.0),
        ("I4f1", "nearest_even", -1.75, -2.0),
        ("I4f1", "toward_zero", 100.0, 3.5),
        ("I4f1", "toward_zero", -100.0, -4.0),
        ("I4f1w", "toward_zero", 4.0, -4.0),
        ("I4f1w", "toward_zero", -4.5, 3.5),
        ("I4f1w", "toward_zero", -4.0, -4.0),
        ("I4f1w", "toward_zero", 8.5, 0.5),
        ("I4f1w", "nearest_even", 3.75, -4.0),
        ("M2E3b3", "nearest_away", 1.125, 1.25),
        ("M2E3b3", "nearest_away", -1.125, -1.25),
        ("M2E3b3", "nearest_away", 1.12, 1.0),
        ("M2E3b3", "nearest_away", 0.1249, 0.125),
        ("M0E3b3", "nearest_away", 1.5, 2.0),
        ("M2E3b3", "floor", 1.99, 1.75),
        ("M2E3b3", "floor", -1.01, -1.25),
        ("M2E3b3", "floor", -1.9999, -2.0),
        ("M2E3b3", "floor", -1e-30, 0.0),  # to the grid, then below the smallest
        ("M2E3b3", "half_up", 1.125, 1.25),
        ("M2E3b3", "half_up", -1.125, -1.0),
        ("M2E3b3", "half_up", -1.126, -1.25),
        ("M2E3b3", "odd", 1.01, 1.25),
        ("M2E3b3", "odd", -1.26, -1.25),
        ("M2E3b3", "odd", 1.5, 1.5),
        ("M0E3b3", "odd", 1.99, 1.0),  # a significand of one bit is odd
        ("I4f1", "nearest_away", -1.25, -1.5),
        ("I4f1", "floor", -1.01, -1.5),
        ("I4f1", "floor", -1e-30, -0.5),
        ("I4f1", "half_up", -1.25, -1.0),
        ("I4f1", "half_up", 1.25, 1.5),
        ("I4f1", "half_up", -0.25 - 2**-40, -0.5),
        ("I4f1", "odd", 1.01, 1.5),
        ("I4f1", "odd", -2.01, -2.5),
        ("I4f1", "odd", 1e-30, 0.5),
        ("I4f1", "odd", 3.51, 3.5),
        ("M2E3b3h", "toward_zero", 1.0, 1.125),
        ("M2E3b3h", "toward_zero", -1.2499, -1.125),
        ("M2E3b3h", "toward_zero", 1.25, 1.375),
        ("M2E3b3h", "toward_zero", 0.125, 0.140625),
        ("M2E3b3h", "toward_zero", 0.1249, 0.0),
        ("M2E3b3zh", "toward_zero", 0.2499, 0.0),
        ("M2E3b3h", "toward_zero", 31.99, 30.0),
        ("M2E3b3h", "toward_zero", -1e9, -30.0),
        ("M2E3b3h", "toward_zero", 0.0, 0.0),
        ("M0E3b3h", "toward_zero", 1.99, 1.5),
    ],
)
def test_quantize_by_hand(name, rounding, x, expected):
    assert reference.quantize(x, parse_format(name), rounding) == expected


def test_a_half_unit_format_only_truncates():
    with pytest.raises(ValueError, match=r'the half-unit format M2E3b3h only takes "toward_zero", got \'floor\''):
        reference.quantize(1.0, parse_format("M2E3b3h"), "floor")
    with pytest.raises(ValueError, match=r"rounding must be one of toward_zero.*got 'up'"):
        reference.quantize(1.0, parse_format("M2E3b3"), "up")


def test_half_unit_truncation_is_rounding_to_the_nearest():
    """Of numbers that are no ties, and one bit more: the values with an odd last bit are the only ones there are."""
    x = np.random.default_rng(0).uniform(1, 2, 1000)
    kept = reference.quantize(x, parse_format("M5E4b7h"))
    assert np.all(np.abs(kept - x) <= 2.0**-6)
    assert abs(np.mean(kept - x)) < 2.0**-10 < abs(np.mean(reference.quantize(x, parse_format("M5E4b7")) - x))


@given(st.floats(width=32, allow_nan=False, allow_infinity=False), st.integers(0, 2**53))
def test_float32_is_numpys(x, extra):
    x = float(x) * (1 + extra * 2.0**-53)
    rounded = reference.quantize(x, FLOAT32, "nearest_even")
    with np.errstate(over="ignore"):
        np.testing.assert_array_equal(rounded, np.float64(np.float32(x)))


def test_without_underflow_the_smallest_is_that_of_float32():
    x = np.array([2.0**-50, 1.5 * 2.0**-126, 2.0**-126, 2.0**-127, -(2.0**-126)])
    kept = reference.quantize(x, parse_format("M7E4b10"), underflow=False)
    np.testing.assert_array_equal(kept, [2.0**-50, 1.5 * 2.0**-126, 2.0**-126, 0, -(2.0**-126)])
    np.testing.assert_array_equal(reference.quantize(x, parse_format("M7E4b10")), np.zeros(5))
    assert reference.quantize(1e9, parse_format("M7E4b10"), underflow=False) == 63.75
    assert reference.quantize(0.4, parse_format("I8f0"), underflow=False) == 0


def test_quantize_keeps_shapes():
    assert reference.quantize(np.ones((2, 0, 3)), parse_format("M7E4b10")).shape == (2, 0, 3)
    assert reference.quantize([[0.3, 7.0]], parse_format("I8f2")).tolist() == [[0.25, 7.0]]


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


# --- Second opinions --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["M3E4b7z", "M2E5b15z", "M7E8b127z", "M4E3b3z", "M1E2b1z"])
@pytest.mark.parametrize("rounding", ["toward_zero", "nearest_even", "stochastic"])
def test_quantize_is_gfloats_rounding(name, rounding):
    format = parse_format(name)
    info = gfloat.FormatInfo(
        name,
        k=format.bits,
        precision=1 + format.mantissa,
        bias=format.bias,
        is_signed=True,
        domain=gfloat.Domain.Finite,
        has_nz=True,
        num_high_nans=0,
        has_subnormals=True,
        is_twos_complement=False,
    )
    assert info.max == format.max
    mode = {"toward_zero": "TowardZero", "nearest_even": "TiesToEven", "stochastic": "StochasticFastest"}[rounding]
    generator = np.random.default_rng(4)
    low, high = max(format.emin, -120), min(format.emax + 2, 120)
    fractions = generator.random(500)
    ties = 2 * generator.integers(0, 2**format.mantissa, 250) + 1
    fractions[::2] = ties / 2.0 ** (format.mantissa + 1)
    x = generator.choice([-1, 1], 500) * np.ldexp(1 + fractions, generator.integers(low, high, 500))
    x = x[np.abs(x) >= format.tiny]
    r = generator.integers(0, 256, x.size)
    theirs = [gfloat.round_float(info, v, gfloat.RoundMode[mode], True, int(c), 8) for v, c in zip(x, r, strict=True)]
    np.testing.assert_array_equal(reference.quantize(x, format, rounding, True, 8, r), theirs)


def test_float32_products_are_torchs_where_nothing_is_lost():
    """Small integers are exact in M23: any accumulator wide enough is the ordinary product."""
    generator = np.random.default_rng(5)
    a, b = generator.integers(-20, 21, (4, 60)), generator.integers(-20, 21, (60, 3))
    for rounding in ("toward_zero", "nearest_even", "stochastic"):
        np.testing.assert_array_equal(reference.matmul(a, b, Accumulator("M23E5b5", rounding=rounding)), a @ b)


# --- Tensor quantization ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("M3E4b7", ml_dtypes.float8_e4m3),
        ("M3E4b7", ml_dtypes.float8_e4m3fn),
        ("M3E4b11", ml_dtypes.float8_e4m3b11fnuz),
        ("M4E3b3", ml_dtypes.float8_e3m4),
        ("M2E5b15", ml_dtypes.float8_e5m2),
        ("M3E2b1", ml_dtypes.float6_e2m3fn),
        ("M2E3b3", ml_dtypes.float6_e3m2fn),
        ("M1E2b1", ml_dtypes.float4_e2m1fn),
        ("M7E8b127", ml_dtypes.bfloat16),
        ("M10E5b15", np.float16),
    ],
)
def test_quantize_tensor_with_a_bias_is_a_cast_of_ml_dtypes(name, dtype):
    format = FloatFormat.parse(name)
    generator = np.random.default_rng(6)
    limit = float(np.finfo(dtype).max if dtype is np.float16 else ml_dtypes.finfo(dtype).max)
    lowest = 1 - format.bias - format.mantissa - 3
    x = np.ldexp(generator.standard_normal(4000), generator.integers(lowest, floor_log2(Fraction(limit)) + 1, 4000))
    half_steps = np.ldexp(np.arange(-99.0, 100), 1 - format.bias - format.mantissa - 1)  # ties among subnormals
    x = np.concatenate([x, half_steps, np.rint(4 * generator.standard_normal(500)) / 4, [limit, -limit]])
    x = x.astype(np.float32)
    x = x[np.abs(x) <= limit]
    np.testing.assert_array_equal(reference.quantize_tensor(x, format), x.astype(dtype).astype(np.float64))


def test_quantize_tensor_saturates_as_fp6_and_fp4_do():
    x = np.array([1e9, -7.9, 7.6, 5.1, np.float64(FLOAT32_MAX)])
    for name, dtype in (("M1E2b1", ml_dtypes.float4_e2m1fn), ("M3E2b1", ml_dtypes.float6_e2m3fn)):
        theirs = x.astype(np.float32).astype(dtype).astype(np.float64)
        np.testing.assert_array_equal(reference.quantize_tensor(x, FloatFormat.parse(name)), theirs)


@given(
    st.integers(0, 10),
    st.integers(1, 6),
    st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False), min_size=1),
)
def test_quantize_tensor_with_a_flexible_bias(mantissa, exponent, values):
    quantized = reference.quantize_tensor(values, FloatFormat(mantissa, exponent))
    top = max(abs(Fraction(v)) for v in values)
    if top == 0:
        assert not np.any(quantized)
        return
    bias = 2**exponent - 1 - floor_log2(top)
    most = power(2**exponent - 1 - bias) * (2 - power(-mantissa))
    assert power(floor_log2(top)) <= most < 2 * power(floor_log2(top)), "the largest magnitude is just representable"
    for value, mine in zip(values, quantized, strict=True):
        x = abs(Fraction(value))
        binade = floor_log2(x) if x else 1 - bias
        unit = power(max(binade, 1 - bias) - mantissa)
        expected = min(round(x / unit) * unit, most)  # Python rounds fractions half to even
        assert abs(Fraction(mine)) == expected
        assert mine * value >= 0


def test_quantize_tensor_by_hand():
    """M4E3 of a tensor up to 1.9: b = 7, largest 1.9375, normal from 2^−6, subnormal step 2^−10."""
    x = np.array([[1.9, -1.0, 0.03125], [2.0**-10, 2.0**-11, 1.5 * 2.0**-10]])
    expected = np.array([[1.875, -1.0, 0.03125], [2.0**-10, 0.0, 2.0**-9]])
    np.testing.assert_array_equal(reference.quantize_tensor(x, FloatFormat.parse("M4E3")), expected)
    assert reference.quantize_tensor(np.zeros((2, 0)), FloatFormat.parse("M4E3")).shape == (2, 0)
    np.testing.assert_array_equal(reference.quantize_tensor([0.0, -0.0], FloatFormat.parse("M4E3")), [0, 0])
    np.testing.assert_array_equal(reference.quantize_tensor([1.99], FloatFormat.parse("M4E3")), [1.9375])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_quantize_integer(bits):
    top = 2 ** (bits - 1) - 1
    x = np.arange(-4 * top, 4 * top + 1) / 4.0  # quarters of a step, the largest magnitude `top` steps
    np.testing.assert_array_equal(reference.quantize_integer(x, bits), np.rint(x))
    np.testing.assert_array_equal(reference.quantize_integer(8 * x, bits), 8 * np.rint(x))
    assert not np.any(reference.quantize_integer(np.zeros(3), bits))
    assert reference.quantize_integer(np.zeros((0, 2)), bits).shape == (0, 2)
