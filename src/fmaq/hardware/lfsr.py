"""Random bits of the multiply-accumulate: a 32-bit linear-feedback shift register, as its RTL makes them, in Python."""

from __future__ import annotations

TAPS = (31, 21, 1, 0)
"""x^32 + x^22 + x^2 + x + 1 is primitive: a shift register with these feedback bits repeats after 2^32 − 1 steps."""
STEP_SEED, MERGE_SEED = 0x5EED_0001, 0x5EED_0002
"""Of the register for the roundings of steps, and of that for merges."""


def lfsr_sequence(bits: int, seed: int, count: int) -> list[int]:
    """What the register puts out in its first cycles, `bits` a cycle."""
    state, out = seed, []
    for _ in range(count):
        out.append(state & ((1 << bits) - 1))
        for _ in range(bits):
            feedback = sum(state >> tap for tap in TAPS) & 1
            state = (state << 1 | feedback) & 0xFFFFFFFF
    return out
