"""Packed panels of weights, kept from call to call: where few rows share a panel, packing takes longer than computing.

Panels are found by what the operand holds, not by where it lies: the pass over its values that measures its range makes
a fingerprint along. So a weight that changes, however that is done, is packed anew, and one that is quantized or scaled
in every call to the same values is not. An operand is kept when it is met for the second time.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

CAPACITY = 1 << 30  # bytes, of all panels together
REMEMBERED = 4096  # operands that were met once
ALIGNMENT = 64


@dataclass
class Panels:
    """Memory for the panels of an operand; `is_packed` once they are in it."""

    size: int
    is_packed: bool = False
    memory: np.ndarray = field(init=False, repr=False)

    def __post_init__(self) -> None:
        self.memory = np.empty(self.size + ALIGNMENT, np.uint8)

    @property
    def address(self) -> int:
        """Of the first panel, aligned."""
        return -(-int(self.memory.ctypes.data) // ALIGNMENT) * ALIGNMENT


class PanelCache:
    """The panels that were used last, up to a capacity in bytes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.size = 0  # bytes of all panels that are kept
        self._kept: OrderedDict[Hashable, Panels] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()

    def find(self, key: Hashable, size: int) -> Panels | None:
        """The operand's panels, to be packed unless they are; None where it is new, or too large to keep."""
        with self._lock:
            if key in self._kept:
                self._kept.move_to_end(key)
                return self._kept[key]
            if size > self.capacity:
                return None
            if key not in self._met:
                self._met[key] = None
                if len(self._met) > REMEMBERED:
                    self._met.popitem(last=False)
                return None
            del self._met[key]
            while self._kept and self.size + size > self.capacity:
                self.size -= self._kept.popitem(last=False)[1].size
            panels = self._kept[key] = Panels(size)
            self.size += size
            return panels

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self.size = 0
            self._met.clear()


kept = PanelCache()
