"""The arithmetic of fmaq once more, in exact fractions, one number at a time: what `test_reference` compares with.

Written from the specification, sharing no code with `fmaq.numerics` but the descriptions of formats and accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fmaq.numerics import Accumulator, FixedFormat, FloatFormat, Format

# --- Random words -----------------------------------------------------------------------------------------------------


def lowbias32(x: int) -> int:
    """The 32-bit mixer, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def random_word(seed: int, m: int, n: int, k: int, merge: bool = False) -> int:
    """The 32-bit word of step k of output (m, n), or of the merge behind it."""
    key = lowbias32(seed % 2**32) ^ lowbias32(seed >> 32 ^ 0x9E3779B9)
    base = lowbias32((lowbias32(key ^ m % 2**32) + n) % 2**32)
    return lowbias32(((base ^ (0x5BD1E995 if merge else 0)) + k * 0x9E3779B9) % 2**32)


# --- Rounding ---------------------------------------------------------------------------------------------------------


def power(e: int) -> Fraction:
    """2^e."""
    return Fraction(2) ** e


def floor_log2(x: Fraction) -> int:
    """⌊log2 x⌋ of x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if power(e) <= x else e - 1


def largest(format: Format) -> Fraction:
    """The format's largest value."""
    if isinstance(format, FixedFormat):
        return (2 ** (format.width - 1) - 1) * power(-format.fraction)
    return power(2**format.exponent - 1 - format.bias) * (2 - power(-format.mantissa))


def lowest(format: Format) -> Fraction:
    """The format's most negative value."""
    return -(2 ** (format.width - 1)) * power(-format.fraction) if isinstance(format, FixedFormat) else -largest(format)


def on_grid(x: Fraction, format: Format, acc: Accumulator, r: int) -> Fraction:
    """x rounded to the format's grid."""
    if x == 0:
        return x
    if isinstance(format, FixedFormat):
        unit = power(-format.fraction)
    else:
        unit = power(floor_log2(abs(x)) - format.mantissa)
    whole, discarded = divmod(abs(x) / unit, 1)
    if acc.rounding == "nearest_even":
        up = discarded > Fraction(1, 2) or (discarded == Fraction(1, 2) and whole % 2 == 1)
    elif acc.rounding == "stochastic":
        up = discarded * 2**acc.random_bits // 1 + r >= 2**acc.random_bits
    else:
        up = False
    return (whole + up) * unit * (1 if x > 0 else -1)


def overflows(rounded: Fraction, format: Format) -> bool:
    """A number on the grid is beyond the format's range."""
    return rounded > largest(format) or rounded < lowest(format)


def in_register(rounded: Fraction, format: Format, underflow: bool) -> Fraction:
    """What a register keeps of a number on the grid."""
    if isinstance(format, FloatFormat):
        smallest = power(-format.bias + (1 if format.zero == "exponent" else 0)) if underflow else power(-126)
        if abs(rounded) < smallest:
            return Fraction(0)
    elif format.overflow == "wrap":
        span = power(format.width - format.fraction)
        return (rounded - lowest(format)) % span + lowest(format)
    return min(max(rounded, lowest(format)), largest(format))


# --- The dot product --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Term:
    """A step, or a merge of a chunk: `term` is x·w, or s_chunk."""

    term: Fraction
    p: Fraction
    before: Fraction
    after: Fraction
    product_overflows: bool
    sum_overflows: bool

    @property
    def overflows(self) -> bool:
        return self.product_overflows or self.sum_overflows

    @property
    def is_lost(self) -> bool:
        return self.term != 0 and self.after == self.before

    def events(self, is_merge: bool) -> set[str]:
        """The names of what happened."""
        total = self.p + self.before
        seen = {
            "product_overflow": self.product_overflows,
            "product_underflow": not is_merge and self.term != 0 and self.p == 0,
            "accumulator_overflow": self.sum_overflows,
            "accumulator_underflow": total != 0 and self.after == 0,
        }
        if self.p != 0 and not any(seen.values()):
            seen["full_swamping"] = self.after == self.before
            seen["partial_swamping"] = self.after != self.before and self.after != total
        return {name for name, happened in seen.items() if happened}


@dataclass(frozen=True)
class Dot:
    """A dot product with all that happened: its steps, its merges, and the first k of each chunk."""

    steps: list[Term]
    merges: list[Term]
    starts: list[int]

    @property
    def result(self) -> Fraction:
        return self.merges[-1].after if self.merges else Fraction(0)

    def alpha(self, k: int, estimator: str) -> bool:
        """α_k: whether the gradient of step k passes."""
        if estimator == "identity":
            return True
        when, what = estimator.split("/")

        def stops(term: Term) -> bool:
            return term.overflows if what == "of" else term.is_lost

        if when == "immediate":
            return not stops(self.steps[k])
        chunk = max(c for c, start in enumerate(self.starts) if start <= k)
        end = [*self.starts, len(self.steps)][chunk + 1]
        return not any(stops(term) for term in self.steps[k:end] + self.merges[chunk:])


def add(acc: Accumulator, term: Fraction, p: Fraction, s: Fraction, product_overflows: bool, r: int) -> Term:
    rounded = on_grid(p + s, acc.format, acc, r)
    after = in_register(rounded, acc.format, acc.underflow)
    return Term(term, p, s, after, product_overflows, overflows(rounded, acc.format))


def dot(x: Sequence[float], w: Sequence[float], acc: Accumulator, m: int = 0, n: int = 0) -> Dot:
    """The chunked dot product of output (m, n)."""
    depth = len(x)
    chunk = acc.chunk or max(depth, 1)
    result = Dot([], [], list(range(0, depth, chunk)))
    t = Fraction(0)
    for start in result.starts:
        s = Fraction(0)
        end = min(start + chunk, depth)
        for k in range(start, end):
            bits = random_word(acc.seed, m, n, k)
            p = x_w = Fraction(x[k]) * Fraction(w[k])
            product_overflows = False
            if acc.product is not None:
                rounded = on_grid(x_w, acc.product, acc, bits % 2**16 >> (16 - acc.random_bits) | acc.centred)
                product_overflows = overflows(rounded, acc.product)
                p = in_register(rounded, acc.product, acc.underflow)
            step = add(acc, x_w, p, s, product_overflows, bits >> (32 - acc.random_bits) | acc.centred)
            result.steps.append(step)
            s = step.after
        r = random_word(acc.seed, m, n, end - 1, merge=True) >> (32 - acc.random_bits) | acc.centred
        merge = add(acc, s, s, t, False, r)
        result.merges.append(merge)
        t = merge.after
    return result
