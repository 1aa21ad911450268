"""The arithmetic of fmaq once more, in exact fractions, one number at a time: what `test_reference` compares with.

Written from the specification, sharing no code with `fmaq.numerics` but the descriptions of formats and accumulators.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

from fmaq.numerics import Accumulator, FixedFormat, Float32Format, FloatFormat, Format

# --- Random words -----------------------------------------------------------------------------------------------------


def lowbias32(x: int) -> int:
    """The 32-bit mixer, in Python's integers."""
    x ^= x >> 16
    x = x * 0x7FEB352D % 2**32
    x ^= x >> 15
    x = x * 0x846CA68B % 2**32
    return x ^ x >> 16


def random_word(seed: int, m: int, n: int, k: int, level: int = 0) -> int:
    """The 32-bit word of step k of output (m, n), or of the merge behind it into a level from 1 on."""
    key = lowbias32(seed % 2**32) ^ lowbias32(seed >> 32 ^ 0x9E3779B9)
    base = lowbias32((lowbias32(key ^ m % 2**32) + n) % 2**32)
    return lowbias32(((base ^ level * 0x5BD1E995 % 2**32) + k * 0x9E3779B9) % 2**32)


# --- Rounding ---------------------------------------------------------------------------------------------------------


def power(e: int) -> Fraction:
    """2^e."""
    return Fraction(2) ** e


def floor_log2(x: Fraction) -> int:
    """⌊log2 x⌋ of x > 0."""
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if power(e) <= x else e - 1


def largest(format: Format | Float32Format) -> Fraction:
    """The format's largest value."""
    if isinstance(format, FixedFormat):
        return (2 ** (format.width - 1) - 1) * power(-format.fraction)
    if isinstance(format, Float32Format):
        return power(127) * (2 - power(-23))
    bits = format.mantissa + 1 if format.half_unit else format.mantissa
    return power(2**format.exponent - 1 - format.bias) * (2 - power(-bits))


def lowest(format: Format | Float32Format) -> Fraction:
    """The format's most negative value."""
    return -(2 ** (format.width - 1)) * power(-format.fraction) if isinstance(format, FixedFormat) else -largest(format)


def on_grid(x: Fraction, format: Format | Float32Format, rounding: str, random_bits: int, r: int) -> Fraction:
    """x rounded to the format's grid."""
    if x == 0:
        return x
    if isinstance(format, FixedFormat):
        unit = power(-format.fraction)
    elif isinstance(format, Float32Format):
        unit = power(max(floor_log2(abs(x)), -126) - 23)
    else:
        unit = power(floor_log2(abs(x)) - format.mantissa)
    if getattr(format, "half_unit", False):
        middle = (abs(x) // unit + Fraction(1, 2)) * unit
        return middle if x > 0 else -middle
    if rounding == "floor":
        return x // unit * unit
    if rounding == "half_up":
        return (x / unit + Fraction(1, 2)) // 1 * unit
    whole, discarded = divmod(abs(x) / unit, 1)
    if rounding == "nearest_even":
        up = discarded > Fraction(1, 2) or (discarded == Fraction(1, 2) and whole % 2 == 1)
    elif rounding == "nearest_away":
        up = discarded >= Fraction(1, 2)
    elif rounding == "odd":
        up = discarded > 0 and whole % 2 == 0
    elif rounding == "stochastic":
        up = discarded * 2**random_bits // 1 + r >= 2**random_bits
    else:
        assert rounding == "toward_zero"
        up = False
    return (whole + up) * unit * (1 if x > 0 else -1)


def overflows(rounded: Fraction, format: Format | Float32Format) -> bool:
    """A number on the grid is beyond the format's range."""
    return rounded > largest(format) or rounded < lowest(format)


def in_register(rounded: Fraction, format: Format | Float32Format, underflow: bool) -> Fraction:
    """What a register keeps of a number on the grid."""
    if isinstance(format, Float32Format):
        if overflows(rounded, format):
            raise OverflowError("infinite")
        return rounded
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
    """A step, or a merge of a chunk into a level from 1 on: `term` is x·w, or s_chunk."""

    k: int
    level: int

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
    """A dot product with all that happened."""

    trace: list[Term]
    """In the order in which things happen."""

    @property
    def steps(self) -> list[Term]:
        return [term for term in self.trace if term.level == 0]

    @property
    def merges(self) -> list[Term]:
        return [term for term in self.trace if term.level > 0]

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
        mine, level = self.trace.index(self.steps[k]), 0
        for term in self.trace[mine:]:
            if term.level == level and stops(term):
                return False
            if term.level == level + 1:  # the sum that the term is in becomes a term of the next level
                level += 1
                if stops(term):
                    return False
        return True


def add(acc: Accumulator, k: int, level: int, term: Fraction, p: Fraction, s: Fraction, how: tuple, r: int) -> Term:
    """A step or merge, of a product that overflows or not."""
    format, rounding, random_bits, product_overflows = how
    rounded = on_grid(p + s, format, rounding, random_bits, r)
    after = in_register(rounded, format, acc.underflow)
    return Term(k, level, term, p, s, after, product_overflows, overflows(rounded, format))


def ladder(acc: Accumulator) -> list[tuple[Format | Float32Format, str, int, int | None, bool]]:
    """Of each level of merges: format, rounding, random bits, how many sums it adds up to one, and whether R is odd."""
    outer = acc.outer
    if outer is None:
        return [(acc.format, acc.rounding, acc.random_bits, None, acc.centred)]
    if isinstance(outer, Float32Format):
        return [(outer, "nearest_even", 0, None, False)]
    if not isinstance(outer, Accumulator):
        return [(outer, acc.rounding, acc.random_bits, None, acc.centred)]
    mine = (outer.format, outer.rounding, outer.random_bits, outer.chunk, outer.centred)
    is_last = outer.chunk is None and outer.outer is None
    return [mine] if is_last else [mine, *ladder(outer)]


def dot(x: Sequence[float], w: Sequence[float], acc: Accumulator, m: int = 0, n: int = 0) -> Dot:
    """The chunked dot product of output (m, n)."""
    result = Dot([])
    levels = ladder(acc)

    def total(level: int, ks: list[int]) -> Fraction:
        """The sum of a level over some positions: level 0 adds products, the others sums of the level below."""
        s = Fraction(0)
        if level == 0:
            for k in ks:
                step = product_and_sum(acc, k, x[k], w[k], s, random_word(acc.seed, m, n, k))
                result.trace.append(step)
                s = step.after
            return s
        format, rounding, random_bits, _, is_odd = levels[level - 1]
        size = acc.chunk
        for _, _, _, chunk, _ in levels[: level - 1]:
            size = None if size is None or chunk is None else size * chunk
        size = size or max(len(ks), 1)
        for start in range(0, len(ks), size):
            mine = ks[start : start + size]
            term = total(level - 1, mine)
            r = random_word(acc.seed, m, n, mine[-1], level) >> (32 - random_bits) | is_odd
            merge = add(acc, mine[-1], level, term, term, s, (format, rounding, random_bits, False), r)
            result.trace.append(merge)
            s = merge.after
        return s

    total(len(levels), list(range(len(x))))
    return result


def product_and_sum(acc: Accumulator, k: int, x: float, w: float, s: Fraction, bits: int) -> Term:
    """One FMAq, with the random word of its step."""
    p = x_w = Fraction(x) * Fraction(w)
    product_overflows = False
    if acc.product is not None:
        r = bits % 2**16 >> (16 - acc.random_bits) | acc.centred
        rounded = on_grid(x_w, acc.product, acc.product_rounding or acc.rounding, acc.random_bits, r)
        product_overflows = overflows(rounded, acc.product)
        p = in_register(rounded, acc.product, acc.underflow)
    how = (acc.format, acc.rounding, acc.random_bits, product_overflows)
    return add(acc, k, 0, x_w, p, s, how, bits >> (32 - acc.random_bits) | acc.centred)
