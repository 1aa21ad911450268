"""The definition of fmaq's arithmetic, in plain NumPy and float64. Every kernel on every device equals it bit for bit.

Read it from the top: rounding, one step, the dot product, the matrix product, what each step lost, the gradients.
Shapes: (M, K) times (K, N) is (M, N). Everything is exact, whatever the format; nothing is fast.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fmaq.numerics import random
from fmaq.numerics.accumulator import ROUNDINGS, Accumulator, Level
from fmaq.numerics.formats import FixedFormat, Float32Format, FloatFormat, Format

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]

FLOAT32_TINY = 2.0**-126
ESTIMATORS = ("identity", "immediate/of", "immediate/diff", "recursive/of", "recursive/diff")


# --- Rounding ---------------------------------------------------------------------------------------------------------


def exact_sum(s: ArrayLike, p: ArrayLike) -> Array:
    """s + p rounded to odd at float64's 53 bits: rounding it once more to at most 51 bits is rounding the exact sum.

    The error of the float64 sum is itself a float64 (Knuth's TwoSum). Where it is not zero, the exact sum lies between
    two neighbours, and the result is the one whose last bit is 1, which no shorter format holds
    (Boldo and Melquiond, "Emulation of FMA and correctly rounded sums", 2008).
    """
    s, p = np.asarray(s, np.float64), np.asarray(p, np.float64)
    total = s + p
    p_part = total - s
    error = np.where(np.isfinite(total), (s - (total - p_part)) + (p - p_part), 0.0)
    even = (total.view(np.int64) & 1) == 0
    outward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, outward), total)


def _unit(magnitude: Array, format: Format | Float32Format) -> Array:
    """The unit in the last place of the format's grid at a magnitude, with exponents unbounded."""
    if isinstance(format, FixedFormat):
        return np.full_like(magnitude, np.ldexp(1.0, -format.fraction))
    _, e = np.frexp(magnitude)
    unit = np.ldexp(1.0, e - 1 - format.mantissa)
    return np.maximum(unit, format.tiny) if isinstance(format, Float32Format) else unit  # float32's subnormals


def _goes_away(
    whole: Array, discarded: Array, is_negative: Mask, rounding: str, random_bits: int, r: ArrayLike
) -> Mask:
    """Which magnitudes of `whole` units and a discarded fraction of one are rounded away from zero.

    `stochastic`: with f the discarded fraction of a unit, if ⌊f·2^random_bits⌋ + r ≥ 2^random_bits.

    Raises:
        ValueError: an unknown rounding.
    """
    match rounding:
        case "toward_zero":
            return np.zeros_like(is_negative)
        case "nearest_even":
            return (discarded > 0.5) | ((discarded == 0.5) & (whole % 2 == 1))
        case "nearest_away":
            return discarded >= 0.5
        case "floor":
            return is_negative & (discarded > 0)
        case "half_up":
            return (discarded > 0.5) | ((discarded == 0.5) & ~is_negative)
        case "odd":
            return (discarded > 0) & (whole % 2 == 0)
        case "stochastic":
            return np.floor(discarded * 2.0**random_bits) + np.asarray(r) >= 2.0**random_bits
    raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {rounding!r}")


def round_to_grid(
    x: ArrayLike, format: Format | Float32Format, rounding: str, random_bits: int = 0, r: ArrayLike = 0
) -> Array:
    """x rounded to the format's grid, its range unbounded; to a half-unit format, toward zero, and half a unit added.

    Raises:
        ValueError: an unknown rounding, or one that a half-unit format does not take.
    """
    if format.half_unit and rounding != "toward_zero":
        raise ValueError(f'the half-unit format {format} only takes "toward_zero", got {rounding!r}')
    x = np.asarray(x, np.float64)
    magnitude = np.abs(x)
    unit = _unit(magnitude, format)
    units = magnitude / unit  # exact: a unit is a power of two
    whole = np.floor(units)
    away = _goes_away(whole, units - whole, np.signbit(x), rounding, random_bits, r)
    half = np.where(magnitude > 0, 0.5, 0.0) if format.half_unit else 0.0
    return np.copysign((whole + away + half) * unit, x)


def _into_range(rounded: Array, format: Format | Float32Format, underflow: bool) -> Array:
    """What a register keeps of a value on the grid: flush below the smallest, saturate or wrap above the largest."""
    if isinstance(format, Float32Format):
        return np.where(np.abs(rounded) > format.max, np.copysign(np.inf, rounded), rounded)
    if isinstance(format, FixedFormat):
        if format.overflow == "wrap":
            span = np.ldexp(1.0, format.width - format.fraction)
            wrapped = np.fmod(rounded, span)  # exact
            wrapped = np.where(wrapped < format.min, wrapped + span, wrapped)
            return np.where(wrapped > format.max, wrapped - span, wrapped)
        return np.clip(rounded, format.min, format.max)
    smallest = np.ldexp(1.0, format.emin) if underflow else FLOAT32_TINY
    kept = np.where(np.abs(rounded) < smallest, 0.0, rounded)
    return np.clip(kept, -format.max, format.max)


def quantize(
    x: ArrayLike,
    format: Format | Float32Format,
    rounding: str = "toward_zero",
    underflow: bool = True,
    random_bits: int = 0,
    r: ArrayLike = 0,
) -> Array:
    """Q(x): round to the grid, then flush what is below 2^emin, then saturate (or wrap; float32 becomes infinite).

    Args:
        x: any shape, finite.
        r: the random integers of stochastic rounding, 0 to 2^random_bits − 1, of x's shape.
    Returns:
        float64 of x's shape.
    """
    return _into_range(round_to_grid(x, format, rounding, random_bits, r), format, underflow)


def _fold_for_wrap(p: Array, format: Format | Float32Format) -> Array:
    """A huge product, modulo the span of a wrapping sum, so that adding it loses nothing.

    A product has at most 48 significant bits, so one of 2^48 steps or more is a whole number of steps: no rounding
    changes.
    """
    if not (isinstance(format, FixedFormat) and format.overflow == "wrap"):
        return p
    huge = np.abs(p) >= np.ldexp(1.0, 48 - format.fraction)
    return np.where(huge, np.fmod(p, np.ldexp(1.0, format.width - format.fraction)), p)


# --- One step, and the dot product ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Step:
    """One FMAq, or one merge of a chunk (then `exact_product` is None and `p` the chunk's sum). Arrays are (M, N).

    Attributes:
        k: position of the step; of a merge, that of its chunk's last step.
        level: 0 of a step; of a merge, which of `Accumulator.levels` makes it, counted from 1.
        exact_product: x·w.
        p: Q_prod(x·w).
        before: s before the step.
        total: p + s, exact up to rounding to odd.
        after: s after the step.
        product_overflows: x·w rounds above the largest.
        sum_overflows: p + s rounds above the largest.
    """

    k: int
    level: int
    exact_product: Array | None
    p: Array
    before: Array
    total: Array
    after: Array
    product_overflows: Mask
    sum_overflows: Mask

    @property
    def overflows(self) -> Mask:
        """The product or the sum overflows."""
        return self.product_overflows | self.sum_overflows

    @property
    def is_lost(self) -> Mask:
        """The term is not zero and the sum did not change: underflow, full swamping, a saturated accumulator."""
        term = self.p if self.exact_product is None else self.exact_product
        return (term != 0) & (self.after == self.before)


def _beyond(rounded: Array, format: Format | Float32Format) -> Mask:
    return (rounded > format.max) | (rounded < format.min)


def _of_sums(acc: Accumulator) -> Level:
    """How a step's sum is rounded."""
    return Level(acc.format, acc.rounding, acc.random_bits, acc.chunk, acc.centred)


@np.errstate(invalid="ignore")  # float32 sums of infinities
def _add(level: Level, underflow: bool, p: Array, s: Array, r: ArrayLike) -> tuple[Array, Array, Mask]:
    """p + s, exact up to rounding to odd; Q(p + s) of a level; and where it overflows."""
    total = exact_sum(s, p)
    overflows = _beyond(round_to_grid(total, level.format, level.rounding, level.random_bits, r), level.format)
    folded = exact_sum(s, _fold_for_wrap(p, level.format))
    return total, quantize(folded, level.format, level.rounding, underflow, level.random_bits, r), overflows


def _product(acc: Accumulator, x_w: Array, r: ArrayLike) -> tuple[Array, Mask]:
    """Q_prod(x·w), and where it overflows."""
    if acc.product is None:
        return x_w, np.zeros(x_w.shape, bool)
    rounding, random_bits = acc.rounding_of_products, acc.random_bits
    overflows = _beyond(round_to_grid(x_w, acc.product, rounding, random_bits, r), acc.product)
    return quantize(x_w, acc.product, rounding, acc.underflow, random_bits, r), overflows


def steps(a: ArrayLike, b: ArrayLike, acc: Accumulator, rows: ArrayLike | None = None) -> Iterator[Step]:
    """Every step of a·b in order of k and, behind the last of each chunk, its merge (`after` is the result so far).

    A merge that completes a level's sum is followed by the merge of that sum into the next level. The last one of all
    has the result.

    Args:
        a: (M, K), finite. b: (K, N), finite.
        rows: (M,), the position m of each row for stochastic rounding; 0 … M−1 unless given.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    (m, depth), n = a.shape, b.shape[1]
    positions = np.arange(m) if rows is None else np.asarray(rows)
    word = random.base(acc.seed, positions[:, None], np.arange(n)[None, :])
    nowhere = np.zeros((m, n), bool)
    levels = (_of_sums(acc), *acc.levels)
    sums = [np.zeros((m, n)) for _ in levels]
    counts = [0] * len(levels)  # of terms in each sum
    chunks = [acc.chunk, *(level.chunk for level in acc.levels)]
    for k in range(depth):
        step_word = random.step_word(word, k)
        x_w = a[:, k, None] * b[None, k, :]  # exact: 24 bits times 24 bits
        p, product_overflows = _product(acc, x_w, random.product_bits(step_word, acc.random_bits) | acc.centred)
        r = random.sum_bits(step_word, acc.random_bits) | acc.centred
        total, after, overflows = _add(levels[0], acc.underflow, p, sums[0], r)
        yield Step(k, 0, x_w, p, sums[0], total, after, product_overflows, overflows)
        sums[0] = after
        counts[0] += 1
        for i, level in enumerate(levels[1:], 1):
            if k + 1 < depth and counts[i - 1] != chunks[i - 1]:
                break
            salted = word ^ np.uint32(random.MERGE * i & 0xFFFFFFFF)
            r = random.sum_bits(random.step_word(salted, k), level.random_bits) | level.centred
            p = sums[i - 1]
            total, after, overflows = _add(level, acc.underflow, p, sums[i], r)
            yield Step(k, i, None, p, sums[i], total, after, nowhere, overflows)
            sums[i - 1], counts[i - 1] = np.zeros((m, n)), 0
            sums[i] = after
            counts[i] += 1


def matmul(a: ArrayLike, b: ArrayLike, acc: Accumulator, rows: ArrayLike | None = None) -> Array:
    """(M, K) times (K, N): every output is the chunked dot product of a row and a column.

    A non-finite operand makes every output that depends on it NaN. Returns float64, every value one of the outermost
    format.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    finite_a, finite_b = np.isfinite(a), np.isfinite(b)
    result = np.zeros((a.shape[0], b.shape[1]))
    for step in steps(np.where(finite_a, a, 0), np.where(finite_b, b, 0), acc, rows):
        result = step.after  # the last one is the last chunk's merge
    depends_on_non_finite = ~(finite_a.all(axis=1)[:, None] & finite_b.all(axis=0)[None, :])
    return np.where(depends_on_non_finite, np.nan, result)


def dot(x: ArrayLike, w: ArrayLike, acc: Accumulator) -> float:
    """The dot product of two vectors of K elements."""
    return float(matmul(np.asarray(x)[None, :], np.asarray(w)[:, None], acc)[0, 0])


def fmaq(x: float, w: float, s: float, acc: Accumulator) -> float:
    """One FMAq(x, w, s) = Q_acc(Q_prod(x·w) + s); rounding is not stochastic, which needs a position."""
    if "stochastic" in (acc.rounding, acc.rounding_of_products):
        raise ValueError("one step has no position (m, n, k) for stochastic rounding; use dot or matmul")
    p, _ = _product(acc, np.asarray(np.float64(x) * np.float64(w)), 0)
    return float(_add(_of_sums(acc), acc.underflow, p, np.asarray(s, np.float64), 0)[1])


# --- What each step lost ----------------------------------------------------------------------------------------------

EVENTS = (
    "product_overflow",
    "product_underflow",
    "accumulator_overflow",
    "accumulator_underflow",
    "full_swamping",
    "partial_swamping",
)


def step_events(step: Step) -> dict[str, Mask]:
    """Which outputs see which event in a step or a merge, each (M, N); a merge has none of the product's."""
    product_underflow = np.zeros_like(step.p, bool)
    if step.exact_product is not None:
        product_underflow = (step.exact_product != 0) & (step.p == 0)
    accumulator_underflow = (step.total != 0) & (step.after == 0)
    none_of_these = (step.p != 0) & ~(step.overflows | product_underflow | accumulator_underflow)
    unchanged = step.after == step.before
    return {
        "product_overflow": step.product_overflows,
        "product_underflow": product_underflow,
        "accumulator_overflow": step.sum_overflows,
        "accumulator_underflow": accumulator_underflow,
        "full_swamping": none_of_these & unchanged,
        "partial_swamping": none_of_these & ~unchanged & (step.after != step.total),
    }


def count_events(a: ArrayLike, b: ArrayLike, acc: Accumulator) -> dict[str, int]:
    """How often each event happens in the steps of a·b and, as `merge_…`, in its merges, and the totals of both.

    A merge, of whichever level, is judged by the level that makes it.
    """
    counts = {name: 0 for name in (*EVENTS, *(f"merge_{event}" for event in EVENTS), "steps", "merges")}
    for step in steps(a, b, acc):
        prefix, total = ("", "steps") if step.exact_product is not None else ("merge_", "merges")
        counts[total] += step.after.size
        for name, mask in step_events(step).items():
            counts[prefix + name] += int(mask.sum())
    return counts


# --- Gradients --------------------------------------------------------------------------------------------------------


def estimator_masks(a: ArrayLike, b: ArrayLike, acc: Accumulator, estimator: str) -> Mask:
    """α of every step, (K, M, N): 1 where the gradient passes (arXiv 2401.14110, section 4).

    `of` stops at steps that overflow, `diff` at steps that are lost; `immediate` looks at the step alone, `recursive`
    also at everything its term passes through later: the rest of its chunk, its chunk's merge and all later merges into
    the same sum, the merge of that sum into the next level, and so on.
    """
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {', '.join(ESTIMATORS)}, got {estimator!r}")
    trace = list(steps(a, b, acc))
    mine = [step for step in trace if step.exact_product is not None]
    passes = np.ones((len(mine), np.shape(a)[0], np.shape(b)[1]), bool)
    if estimator == "identity":
        return passes

    def stops(step: Step) -> Mask:
        return step.overflows if estimator.endswith("/of") else step.is_lost

    if estimator.startswith("immediate"):
        for step in mine:
            passes[step.k] = ~stops(step)
        return passes
    later = [np.ones(passes.shape[1:], bool)] * (len(acc.levels) + 1)  # of each level, in its sum and those above
    for step in reversed(trace):
        later[step.level] = later[step.level] & ~stops(step)
        if step.level:
            later[step.level - 1] = later[step.level]  # where a sum of the level below ends
        else:
            passes[step.k] = later[0]
    return passes


def gradients(
    a: ArrayLike, b: ArrayLike, grad: ArrayLike, acc: Accumulator, estimator: str = "identity"
) -> tuple[Array, Array]:
    """∂L/∂a (M, K) and ∂L/∂b (K, N) from ∂L/∂y (M, N), by brute force: ∂y/∂x_k = α_k·w_k and ∂y/∂w_k = α_k·x_k."""
    a, b, grad = (np.asarray(v, np.float64) for v in (a, b, grad))
    alpha = estimator_masks(a, b, acc, estimator).astype(np.float64)
    return np.einsum("kmn,mn,kn->mk", alpha, grad, b), np.einsum("kmn,mn,mk->kn", alpha, grad, a)


# --- Tensor quantization ----------------------------------------------------------------------------------------------


def quantize_tensor(x: ArrayLike, format: FloatFormat, amax: float | None = None) -> Array:
    """Weights and activations in a float of flexible bias: to the nearest (ties to even), saturating, with subnormals.

    Without a bias in the format, b = 2^E − 1 − ⌊log2 amax⌋, amax = max|x| unless it is given: the largest magnitude is
    just representable (arXiv 2401.14110, section 3). Normal numbers start at 2^(1−b); below, the step is 2^(1−b−M).

    Raises:
        ValueError: the format is half-unit, which is one of sums and products.
    """
    if format.half_unit:
        raise ValueError(f"{format} is a half-unit format, which is none of weights and activations")
    x = np.asarray(x, np.float64)
    largest = np.abs(x).max(initial=0.0) if amax is None else amax
    if largest == 0 and not x.any():
        return x.copy()
    bias = format.bias if format.bias is not None else 2**format.exponent - int(np.frexp(largest)[1])
    _, e = np.frexp(x)
    unit = np.ldexp(1.0, np.maximum(e - 1, 1 - bias) - format.mantissa)
    limit = np.ldexp(2.0 - 2.0**-format.mantissa, 2**format.exponent - 1 - bias)
    return np.clip(np.rint(x / unit) * unit, -limit, limit)


def quantize_integer(x: ArrayLike, bits: int, amax: float | None = None) -> Array:
    """Symmetric integers of a tensor: multiples of amax / (2^(bits−1) − 1), to the nearest (ties to even), saturating.

    amax = max|x| unless it is given; of zeros the scale is 1.
    """
    codes, scale = integer_codes(x, bits, amax)
    return codes * scale


def integer_codes(x: ArrayLike, bits: int, amax: float | None = None) -> tuple[Array, float]:
    """The codes that an integer engine multiplies, −(2^(bits−1) − 1) … 2^(bits−1) − 1, and what a code is worth."""
    x = np.asarray(x, np.float64)
    most = 2 ** (bits - 1) - 1
    largest = float(np.abs(x).max(initial=0.0)) if amax is None else amax
    scale = largest / most or 1.0
    return np.clip(np.rint(x / scale), -most, most), scale
