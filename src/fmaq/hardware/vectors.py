"""Input vectors that would show a wrong unit: all of them where that is possible, else random and adversarial ones."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from fmaq.hardware.unit import IeeeFormat, Unit
from fmaq.numerics.reference import quantize

Codes = NDArray[np.int64]
Vectors = dict[str, Codes]

EXHAUSTIVE_BITS = 20
"""Up to a million vectors, a unit is tried on all."""


def is_exhaustive(unit: Unit) -> bool:
    """Whether `vectors_for` gives every input there is."""
    return sum(unit.inputs.values()) <= EXHAUSTIVE_BITS


def vectors_for(unit: Unit, count: int = 100_000, seed: int = 0) -> Vectors:
    """Codes of every input port, arrays of one length: all inputs, or `count`, half of them adversarial."""
    if is_exhaustive(unit):
        return exhaustive(unit)
    plain, awkward = random(unit, count - count // 2, seed), adversarial(unit, count // 2, seed + 1)
    return {name: np.concatenate([plain[name], awkward[name]]) for name in plain}


def exhaustive(unit: Unit) -> Vectors:
    """Every combination of codes."""
    index = np.arange(1 << sum(unit.inputs.values()))
    vectors, shift = {}, 0
    for name, width in unit.inputs.items():
        vectors[name] = (index >> shift) & ((1 << width) - 1)
        shift += width
    return vectors


def random(unit: Unit, count: int, seed: int = 0) -> Vectors:
    """Uniform codes."""
    rng = np.random.default_rng(seed)
    return {name: rng.integers(0, 1 << width, count) for name, width in unit.inputs.items()}


def adversarial(unit: Unit, count: int, seed: int = 1) -> Vectors:
    """Sums that cancel, or nearly; exponents a few places apart; ties; both ends of the range; and zeros.

    s is the product, or its negative, times 2^−3 … 2^3 or as far as the mantissa reaches, on the accumulator's grid and
    then a few units in the last place away. An eighth of all codes are extreme ones.
    """
    rng = np.random.default_rng(seed)
    vectors = random(unit, count, seed + 1000)
    for name, width in unit.inputs.items():
        if name != "s":
            _extremes(rng, vectors[name], width)
    p = unit.activation.decode(vectors["x"]) * unit.weight.decode(vectors["w"])
    reach = getattr(unit.format, "mantissa", unit.format.bits) + 3
    near = rng.integers(-3, 4, count)
    shift = np.where(rng.random(count) < 0.25, rng.integers(-reach, reach + 1, count), near * (rng.random(count) < 0.7))
    target = np.ldexp(p, shift) * rng.choice([-1.0, -1.0, 1.0], count)
    codes = _encode(unit, target) + rng.integers(-3, 4, count) * (rng.random(count) < 0.6)
    vectors["s"] = codes & ((1 << unit.register_bits) - 1)
    _extremes(rng, vectors["s"], unit.register_bits)
    return vectors


def _encode(unit: Unit, values: NDArray[np.float64]) -> Codes:
    format = unit.format
    if isinstance(format, IeeeFormat):
        return format.encode(np.clip(format.round(values), -format.max, format.max))
    return format.encode(quantize(values, format))


def _extremes(rng: np.random.Generator, codes: Codes, width: int) -> None:
    """Put codes at the ends, and one bit from all zeros and all ones, in an eighth of the places."""
    ends = np.array([0, 1, 1 << (width - 1), (1 << (width - 1)) - 1, (1 << width) - 1, (1 << width) - 2])
    chosen = rng.random(len(codes)) < 0.125
    codes[chosen] = rng.choice(ends & ((1 << width) - 1), int(chosen.sum()))
