"""Numbers by channel or by head, as a policy keeps them: immutable, hashable and compared by value."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from fmaq.ops.columns import LARGEST


class Vector:
    """An array of integers (offsets) or of float32 (gains, shifts, ranges) that cannot be changed.

    Args:
        values: numbers, nested sequences of them, an array or a tensor.
        whole: they are integers; otherwise they are rounded to float32.

    Raises:
        TypeError: not numbers, or not integers where those are wanted.
        ValueError: empty, ragged, not finite, or integers beyond an offset's ±126.
    """

    __slots__ = ("_tensor", "_values")

    def __init__(self, values: Any, whole: bool) -> None:
        if isinstance(values, Tensor):
            values = values.detach().cpu()
            array = (values.float() if values.is_floating_point() else values).numpy()
        else:
            array = np.array(values)
        if array.dtype.kind not in ("iu" if whole else "iuf") or not array.size:
            raise TypeError(f"expected {'integers' if whole else 'numbers'}, got {values!r}")
        if whole and not -LARGEST <= array.min() <= array.max() <= LARGEST:
            raise ValueError(f"every integer must be from {-LARGEST} to {LARGEST}, got {array.min()} … {array.max()}")
        array = array.astype(np.int32 if whole else np.float32)
        if not np.isfinite(array).all():
            raise ValueError("every number must be finite")
        array.setflags(write=False)
        self._values = array
        with torch.inference_mode(False):
            self._tensor = torch.from_numpy(array.copy())

    @property
    def array(self) -> np.ndarray:
        """The numbers, int32 or float32, read-only."""
        return self._values

    @property
    def shape(self) -> tuple[int, ...]:
        """() for one number."""
        return self._values.shape

    @property
    def size(self) -> int:
        """How many numbers there are."""
        return self._values.size

    @property
    def tensor(self) -> Tensor:
        """The numbers as a tensor, not to be written into."""
        return self._tensor

    def repeated(self, times: int) -> Vector:
        """Every entry of the last dimension but one so many times in a row: a head's for a group of heads."""
        return Vector(np.repeat(self._values, times, axis=-2), whole=self._values.dtype == np.int32)

    def to_plain(self) -> Any:
        """A number, or nested lists of them: float32 in its shortest decimal form, which reads back the same."""
        if self._values.dtype == np.int32:
            return self._values.tolist()
        shortest = np.array([float(str(value)) for value in self._values.ravel()])
        return shortest.reshape(self.shape).tolist()

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Vector)
            and self._values.dtype == other._values.dtype
            and np.array_equal(self._values, other._values)
        )

    def __hash__(self) -> int:
        return hash((self.shape, self._values.tobytes()))

    def __repr__(self) -> str:
        shown = np.array2string(self._values, threshold=8, edgeitems=3, separator=", ")
        return f"Vector({shown})"

    def __deepcopy__(self, memo: Any) -> Vector:
        return self

    def __copy__(self) -> Vector:
        return self

    def __reduce__(self) -> Any:
        return Vector, (np.array(self._values), self._values.dtype == np.int32)
