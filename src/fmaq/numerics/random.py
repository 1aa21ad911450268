"""The counter-based generator of stochastic rounding: a random word from a seed and a position, without any state.

A word depends on the seed and on (m, n, k) alone, so tiling, threads and devices never change a result. The 32-bit
mixer is the two-multiply, three-shift "lowbias32" permutation found by search by C. Wellons (hash-prospector, 2018).
A step takes all of it: after one multiplication alone, the words of steps k and k + 34 of an output visibly depend.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
from numpy.typing import NDArray

MULTIPLIER_1 = 0x7FEB352D
MULTIPLIER_2 = 0x846CA68B
STEP = 0x9E3779B9  # 2^32 divided by the golden ratio: odd, so k below 2^32 never meet; consecutive ones fall far apart
MERGE = 0x5BD1E995  # sets the merges of chunks apart from the steps
MAX_RANDOM_BITS = 16  # a word's low half rounds the product, its high half the sum

Words = NDArray[np.uint32]


@np.errstate(over="ignore")
def mix(x: Any) -> Words:
    """The permutation of 32-bit words, elementwise."""
    x = np.asarray(x, np.uint32)
    x = (x ^ (x >> np.uint32(16))) * np.uint32(MULTIPLIER_1)
    x = (x ^ (x >> np.uint32(15))) * np.uint32(MULTIPLIER_2)
    return x ^ (x >> np.uint32(16))


@functools.lru_cache(maxsize=4096)
def key(seed: int) -> int:
    """A 32-bit key from a seed of up to 64 bits."""
    with np.errstate(over="ignore"):
        return int(mix(np.uint32(seed & 0xFFFFFFFF)) ^ mix(np.uint32((seed >> 32) & 0xFFFFFFFF) ^ np.uint32(STEP)))


def derived_seed(seed: int, *parts: str | int) -> int:
    """A seed of 64 bits for a product among others: a hash (BLAKE2b) of their common seed and what tells it apart."""
    text = "\0".join(map(str, (seed, *parts)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


@np.errstate(over="ignore")
def base(seed: int, m: Any, n: Any) -> Words:
    """The word of an output (m, n), from which those of its steps follow. m and n broadcast."""
    row = mix(np.uint32(key(seed)) ^ np.asarray(m, np.int64).astype(np.uint32))
    return mix(row + np.asarray(n, np.int64).astype(np.uint32))


@np.errstate(over="ignore")
def step_word(base: Words, k: int) -> Words:
    """The random word of step k of outputs whose words are `base`."""
    return mix(base + np.uint32((k * STEP) & 0xFFFFFFFF))


def lowest_bits(bits: int) -> int:
    """Where the last bits of both R are in a word: centred rounding sets them.

    ⌊f·2^bits⌋ + R ≥ 2^bits then is so with the probability f, on average over f. With R of all integers it is
    ⌊f·2^bits⌋/2^bits, half a unit less on average. An odd R = 2R' + 1 is the middle of the interval that the R' of one
    bit less stands for.
    """
    return 1 << (16 - bits) | 1 << (32 - bits)


def product_bits(word: Words, bits: int) -> NDArray[np.int64]:
    """R for the product of a step: `bits` random bits from the low half of its word."""
    return ((word & np.uint32(0xFFFF)) >> np.uint32(16 - bits)).astype(np.int64)


def sum_bits(word: Words, bits: int) -> NDArray[np.int64]:
    """R for the sum of a step, or for a merge: `bits` random bits from the high half of the word."""
    return (word >> np.uint32(32 - bits)).astype(np.int64)
