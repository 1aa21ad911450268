"""Packed panels of weights, kept from call to call: where few rows share a panel, packing takes longer than computing.

Panels are found by what the operand holds, not by where it lies: the pass over its values that measures its range makes
a fingerprint along. So a weight that changes, however that is done, is packed anew, and one that is quantized or scaled
in every call to the same values is not. An operand is kept when it is met for the second time. Of a network whose
weights do not all find room, some stay, rather than that each has to go before it is used again.
"""

from __future__ import annotations

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass, field

import numpy as np

CAPACITY = 1 << 30  # bytes, of all panels together
REMEMBERED = 4096  # operands that were met once
PATIENCE = 8  # times as often as panels are kept, others have to be looked for before unused ones may go
ALIGNMENT = 64
SLAB = 1 << 25


@dataclass
class Panels:
    """Memory for the panels of an operand, aligned; `is_packed` once they are in it.

    Attributes:
        used: when they were last found, in operands looked for until then.
    """

    memory: np.ndarray = field(repr=False)
    is_packed: bool = False
    used: int = 0
    address: int = field(init=False)

    def __post_init__(self) -> None:
        self.address = self.memory.ctypes.data

    @property
    def size(self) -> int:
        """In bytes."""
        return self.memory.size


class Slabs:
    """Zeros, in pieces so large that the system maps them by large pages (NumPy asks for them), which reading wants.

    A slab is freed with the last of its parts.
    """

    def __init__(self) -> None:
        self._rest = np.empty(0, np.uint8)

    def part(self, size: int) -> np.ndarray:
        """So many bytes, aligned."""
        whole = -(-size // ALIGNMENT) * ALIGNMENT
        if whole > self._rest.size:
            slab = np.zeros(max(SLAB, whole) + ALIGNMENT, np.uint8)
            self._rest = slab[-int(slab.ctypes.data) % ALIGNMENT :]
        found, self._rest = self._rest[:size], self._rest[whole:]
        return found


class PanelCache:
    """The panels of operands that are met again and again, up to a capacity in bytes."""

    def __init__(self, capacity: int = CAPACITY) -> None:
        self.capacity = capacity
        self.size = 0  # bytes of all panels that are kept
        self._looked_for = 0
        self._kept: OrderedDict[Hashable, Panels] = OrderedDict()
        self._met: OrderedDict[Hashable, None] = OrderedDict()
        self._lock = threading.Lock()
        self._slabs = Slabs()

    def find(self, key: Hashable, size: int) -> Panels | None:
        """The operand's panels, to be packed unless they are; None where it is new, or there is no room for it."""
        with self._lock:
            self._looked_for += 1
            found = self._kept.get(key)
            if found is not None:
                found.used = self._looked_for
                self._kept.move_to_end(key)
                return found
            if size > self.capacity:
                return None
            if key not in self._met:
                self._met[key] = None
                if len(self._met) > REMEMBERED:
                    self._met.popitem(last=False)
                return None
            if not self._make_room(size):
                return None
            del self._met[key]
            panels = self._kept[key] = Panels(self._slabs.part(size), used=self._looked_for)
            self.size += size
            return panels

    def _make_room(self, size: int) -> bool:
        """Drop panels that have not been used for long, the longest unused first; whether that was enough."""
        while self.size + size > self.capacity:
            key, oldest = next(iter(self._kept.items()))
            if self._looked_for - oldest.used <= PATIENCE * len(self._kept):
                return False
            del self._kept[key]
            self.size -= oldest.size
        return True

    def clear(self) -> None:
        """Keep nothing."""
        with self._lock:
            self._kept.clear()
            self.size = 0
            self._met.clear()


kept = PanelCache()
