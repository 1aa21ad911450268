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
from fmaq.numerics.accumulator import Accumulator
from fmaq.numerics.formats import FixedFormat, FloatFormat, Format

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
    error = (s - (total - p_part)) + (p - p_part)
    even = (total.view(np.int64) & 1) == 0
    outward = np.where(error > 0, np.inf, -np.inf)
    return np.where((error != 0) & even, np.nextafter(total, outward), total)


def _unit(magnitude: Array, format: Format) -> Array:
    """The unit in the last place of the format's grid at a magnitude, with exponents unbounded."""
    if isinstance(format, FixedFormat):
        return np.full_like(magnitude, np.ldexp(1.0, -format.fraction))
    _, e = np.frexp(magnitude)
    return np.ldexp(1.0, e - 1 - format.mantissa)


def round_to_grid(x: ArrayLike, format: Format, rounding: str, random_bits: int = 0, r: ArrayLike = 0) -> Array:
    """x rounded to the format's grid, its range unbounded.

    `stochastic`: with f the discarded fraction of a unit, away from zero if ⌊f·2^random_bits⌋ + r ≥ 2^random_bits.
    """
    x = np.asarray(x, np.float64)
    magnitude = np.abs(x)
    unit = _unit(magnitude, format)
    units = magnitude / unit  # exact: a unit is a power of two
    whole = np.floor(units)
    if rounding == "nearest_even":
        whole = np.rint(units)
    elif rounding == "stochastic":
        whole = whole + (np.floor((units - whole) * 2.0**random_bits) + r >= 2.0**random_bits)
    return np.copysign(whole * unit, x)


def _into_range(rounded: Array, format: Format, underflow: bool) -> Array:
    """What a register keeps of a value on the grid: flush below the smallest, saturate or wrap above the largest."""
    if isinstance(format, FixedFormat):
        if format.overflow == "wrap":
            span = np.ldexp(1.0, format.width - format.fraction)
            wrapped = np.fmod(rounded, span)  # exact
            wrapped = np.where(wrapped < format.min, wrapped + span, wrapped)
            return np.where(wrapped > format.max, wrapped - span, wrapped)
        return np.clip(rounded, format.min, format.max)
    tiny = format.tiny if underflow else FLOAT32_TINY
    kept = np.where(np.abs(rounded) < tiny, 0.0, rounded)
    return np.clip(kept, -format.max, format.max)


def quantize(
    x: ArrayLike,
    format: Format,
    rounding: str = "toward_zero",
    underflow: bool = True,
    random_bits: int = 0,
    r: ArrayLike = 0,
) -> Array:
    """Q(x): round to the grid, then flush what is below the smallest magnitude, then saturate (or wrap).

    Args:
        x: any shape, finite.
        r: the random integers of stochastic rounding, 0 to 2^random_bits − 1, of x's shape.
    Returns:
        float64 of x's shape.
    """
    return _into_range(round_to_grid(x, format, rounding, random_bits, r), format, underflow)


def _fold_for_wrap(p: Array, format: Format) -> Array:
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
        exact_product: x·w.
        p: Q_prod(x·w).
        before: s before the step.
        total: p + s, exact up to rounding to odd.
        after: s after the step.
        product_overflows: x·w rounds above the largest.
        sum_overflows: p + s rounds above the largest.
    """

    k: int
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


def _beyond(rounded: Array, format: Format) -> Mask:
    return (rounded > format.max) | (rounded < format.min)


def _add(
    acc: Accumulator, k: int, x_w: Array | None, p: Array, s: Array, product_overflows: Mask, r: ArrayLike
) -> Step:
    """Q_acc(p + s), as a step (or, without x·w, a merge)."""
    total = exact_sum(s, p)
    rounded = round_to_grid(total, acc.format, acc.rounding, acc.random_bits, r)
    overflows = _beyond(rounded, acc.format)
    folded = exact_sum(s, _fold_for_wrap(p, acc.format))
    after = quantize(folded, acc.format, acc.rounding, acc.underflow, acc.random_bits, r)
    return Step(k, x_w, p, s, total, after, product_overflows, overflows)


def _drawn(acc: Accumulator, word: random.Words, k: int) -> random.Words:
    """The random word of step k of outputs whose words are `word`."""
    drawn = random.step_word(word, k)
    return random.centred(drawn, acc.random_bits) if acc.centred else drawn


def steps(a: ArrayLike, b: ArrayLike, acc: Accumulator, rows: ArrayLike | None = None) -> Iterator[Step]:
    """Every step of a·b in order of k and, behind the last of each chunk, its merge (`after` is the result so far).

    Args:
        a: (M, K), finite. b: (K, N), finite.
        rows: (M,), the position m of each row for stochastic rounding; 0 … M−1 unless given.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    (m, depth), n = a.shape, b.shape[1]
    positions = np.arange(m) if rows is None else np.asarray(rows)
    word = random.base(acc.seed, positions[:, None], np.arange(n)[None, :])
    nowhere = np.zeros((m, n), bool)
    s, t = np.zeros((m, n)), np.zeros((m, n))
    for k in range(depth):
        step_word = _drawn(acc, word, k)
        sum_r = random.sum_bits(step_word, acc.random_bits)
        x_w = a[:, k, None] * b[None, k, :]  # exact: 24 bits times 24 bits
        p, product_overflows = x_w, nowhere
        if acc.product is not None:
            r = random.product_bits(step_word, acc.random_bits)
            p = quantize(x_w, acc.product, acc.rounding, acc.underflow, acc.random_bits, r)
            product_overflows = _beyond(round_to_grid(x_w, acc.product, acc.rounding, acc.random_bits, r), acc.product)
        step = _add(acc, k, x_w, p, s, product_overflows, sum_r)
        yield step
        s = step.after
        if k + 1 == depth or (acc.chunk is not None and (k + 1) % acc.chunk == 0):
            r = random.sum_bits(_drawn(acc, word ^ np.uint32(random.MERGE), k), acc.random_bits)
            merge = _add(acc, k, None, s, t, nowhere, r)
            yield merge
            s, t = np.zeros((m, n)), merge.after


def matmul(a: ArrayLike, b: ArrayLike, acc: Accumulator, rows: ArrayLike | None = None) -> Array:
    """(M, K) times (K, N): every output is the chunked dot product of a row and a column.

    A non-finite operand makes every output that depends on it NaN. Returns float64, every value one of `acc.format`.
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
    if acc.rounding == "stochastic":
        raise ValueError("one step has no position (m, n, k) for stochastic rounding; use dot or matmul")
    p = np.asarray(np.float64(x) * np.float64(w))
    if acc.product is not None:
        p = quantize(p, acc.product, acc.rounding, acc.underflow)
    return float(_add(acc, 0, None, p, np.asarray(s, np.float64), np.zeros((), bool), 0).after)


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
    """How often each event happens in the steps of a·b and, as `merge_…`, in its merges, and the totals of both."""
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
    also at everything its term passes through later: the rest of its chunk, its chunk's merge and all later merges.
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
    later_merges = np.ones(passes.shape[1:], bool)
    in_chunk = later_merges
    for step in reversed(trace):
        if step.exact_product is None:
            later_merges = later_merges & ~stops(step)
            in_chunk = later_merges
        else:
            in_chunk = in_chunk & ~stops(step)
            passes[step.k] = in_chunk
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
    """
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
