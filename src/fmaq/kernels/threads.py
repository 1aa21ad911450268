"""Running a kernel's tasks on as many threads as torch uses. Kernels release the interpreter lock."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import numpy as np
import torch

RANGES = 4  # a thread, of the tasks of a product

T = TypeVar("T")
_local = threading.local()
_pools: dict[tuple[int, int], ThreadPoolExecutor] = {}
_lock = threading.Lock()


def scratch(size: int) -> int:
    """The address of this thread's scratch memory, of at least `size` bytes, aligned to 64; kept for the next call."""
    if getattr(_local, "size", -1) < size:
        _local.size, _local.buffer = size, np.empty(size + 64, np.uint8)
        _local.address = -(-int(_local.buffer.ctypes.data) // 64) * 64
    address: int = _local.address
    return address


def _pool(threads: int) -> ThreadPoolExecutor:
    """A pool of this process (a forked child has its own), one a number of threads."""
    key = (os.getpid(), threads)
    with _lock:
        if key not in _pools:
            _pools[key] = ThreadPoolExecutor(threads - 1, thread_name_prefix="fmaq")
        return _pools[key]


def run_tasks(tasks: int, work: Callable[[int, int], T], is_small: bool) -> list[T]:
    """The results of `work(first, last)` over ranges that cover 0 … tasks − 1; a small job stays whole, on this thread.

    Threads take the next range when they are done with one, so that one on a busy core does not hold up the rest.
    """
    threads = 1 if is_small else max(1, min(torch.get_num_threads(), tasks))
    if threads == 1:
        return [work(0, tasks)]
    pieces = min(tasks, RANGES * threads)
    ranges = iter(list(itertools.pairwise([tasks * i // pieces for i in range(pieces + 1)])))

    def take() -> list[T]:
        return [work(first, last) for first, last in ranges]

    others = [_pool(threads).submit(take) for _ in range(threads - 1)]
    return [*take(), *itertools.chain.from_iterable(other.result() for other in others)]
