"""What was seen of one product while a model ran: how often each event happened, ranges, and noise."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from fmaq.numerics import Accumulator
from fmaq.numerics.reference import EVENTS

COUNTS = (*EVENTS, *(f"merge_{event}" for event in EVENTS))
PARTS = ("a", "b", "product", "sum", "output")
Histogram = dict[int | None, int]


@dataclass
class ProductEvents:
    """What was seen of one product of a layer, over all calls.

    Counts are attributes, too: `events["fc"].product_overflow`; `rate("full_swamping")` is one's share of the steps
    (or merges).

    Attributes:
        layer, kind, index: of the product, see `fmaq.emulation.Product`.
        accumulator: that computes it.
        counts: of `numerics.reference.EVENTS` in steps and, as merge_…, in merges, of all levels together.
        steps, merges: that were looked at.
        sampled: share of all steps that were.
        calls: how often the product was computed.
        exponents: how often ⌊log2|·|⌋ is what, of operands a and b, rounded products, partial sums and outputs, in a
            sample where there are many; None counts zeros.
        largest, smallest: magnitudes above zero, of each of these but products and partial sums; the smallest in the
            sample.
        signal, noise: sums of the squares of the exact outputs, and of their errors.
    """

    layer: str
    kind: str
    index: int
    accumulator: Accumulator
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(COUNTS, 0))
    steps: int = 0
    merges: int = 0
    all_steps: int = 0
    calls: int = 0
    exponents: dict[str, Histogram] = field(default_factory=lambda: {part: {} for part in PARTS})
    largest: dict[str, float] = field(default_factory=dict)
    smallest: dict[str, float] = field(default_factory=dict)
    signal: float = 0.0
    noise: float = 0.0

    def __getattr__(self, name: str) -> int:
        counts = self.__dict__.get("counts", {})
        if name not in counts:
            raise AttributeError(f"there is no event {name!r}; there are {', '.join(COUNTS)}, steps and merges")
        return counts[name]

    def __getitem__(self, name: str) -> int:
        return getattr(self, name)

    @property
    def sampled(self) -> float:
        return self.steps / self.all_steps if self.all_steps else 1.0

    def rate(self, event: str) -> float:
        """An event's share of the steps, or of the merges if its name starts with merge_."""
        total = self.merges if event.startswith("merge_") else self.steps
        return getattr(self, event) / total if total else 0.0

    @property
    def snr(self) -> float:
        """Signal-to-noise ratio of the outputs against float32's, in decibels; infinite where they are equal."""
        if self.noise == 0:
            return float("inf")
        return float(10 * np.log10(self.signal / self.noise)) if self.signal else float("-inf")
