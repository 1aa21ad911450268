"""Vector instructions a step, counted in the assembly of the kernel that a product ran, and the bound they set.

The unit is one step of one vector of lanes: a kernel whose step is multiply, and, fused multiply-add, and has 4. Loads,
stores and copies are counted apart, since they do not take the units that compute.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from fmaq.kernels import products
from fmaq.kernels.compile import assembly
from fmaq.kernels.gemm import Gemm
from fmaq.kernels.products import Kernel, Launch

LABEL = re.compile(r"^([.\w$]+):")
FUNCTION = re.compile(r"^_?tile\w*$")
VECTOR = re.compile(r"%(?:[xyz]mm\d+|k[0-7])")
# Whole registers to, from or between registers and memory; a broadcast from memory is done by the load.
MOVE = re.compile(r"^v?mov(?:[au]p[sd]|dq[au]\d*|s[sd]|[dq]|nt\w+)$")
BROADCAST = re.compile(r"^v(?:p?broadcast\w+)$")
INCREMENT = re.compile(r"^(?:(?P<one>inc|dec)|add|sub)q?$")


@dataclass(frozen=True)
class Loop:
    """An innermost loop: instructions of one turn, and how many steps of k a turn takes."""

    computing: int
    moving: int
    steps: int


@dataclass(frozen=True)
class Count:
    """Instructions a step and vector of lanes.

    Attributes:
        computing: those that take a unit which computes on vectors.
        moving: loads, stores and copies.
        lanes: multiply-accumulates that such a step does.
    """

    computing: float
    moving: float
    lanes: int

    def bound(self, rate: float) -> float:
        """GMAC/s where `rate` vector instructions retire a second."""
        return self.lanes * rate / self.computing / 1e9


def inner_loops(text: str) -> list[Loop]:
    """The innermost loops of the functions `tile…` in x86 assembly, AT&T syntax, in order.

    An innermost loop is a block that ends in a jump to its own start.
    """
    loops = []
    in_tile, label, block = False, "", list[tuple[str, str]]()
    for line in text.splitlines():
        found = LABEL.match(line)
        if found:
            label, block = found[1], []
            if not label.lstrip(".").startswith("L"):
                in_tile = FUNCTION.match(label) is not None
            continue
        name, _, operands = line.split("#")[0].strip().partition("\t")
        if not in_tile or not name or name.startswith("."):
            continue
        if name.startswith("j"):
            if operands.strip() == label and name != "jmp":
                loops.append(_loop(block))
            label, block = "", []
        else:
            block.append((name, operands))
    return loops


def _loop(block: list[tuple[str, str]]) -> Loop:
    vectors = [(name, operands) for name, operands in block if VECTOR.search(operands)]
    moving = sum(_is_move(name, operands) for name, operands in vectors)
    return Loop(len(vectors) - moving, moving, _steps(block))


def _is_move(name: str, operands: str) -> bool:
    if "{%k" in operands:
        return False  # a blend
    return MOVE.match(name) is not None or (BROADCAST.match(name) is not None and "(" in operands)


def _steps(block: list[tuple[str, str]]) -> int:
    """By how much the counter moves that the last comparison looks at; 1 where it is not a constant."""
    compared = next((operands for name, operands in reversed(block) if name.startswith("cmp")), "")
    for name, operands in block:
        found = INCREMENT.match(name)
        *amount, register = [part.strip() for part in operands.split(",")]
        if found and register.startswith("%") and register in compared:
            if found["one"]:
                return 1
            if amount and amount[0].startswith("$"):
                return abs(int(amount[0][1:], 0))
    return 1


@functools.cache
def loops_of(gemm: Gemm) -> tuple[Loop, ...]:
    """The inner loops of a kernel that has been built; none where the assembly is not x86."""
    if gemm.target.architecture != "x86_64":
        return ()
    return tuple(inner_loops(assembly(gemm.module, gemm.target)))


def count(gemm: Gemm, is_checked: bool) -> Count | None:
    """The instructions of a kernel's loop over the steps of a chunk.

    Args:
        is_checked: the loop that checks for saturation, where the kernel has one with and one without.

    Returns:
        None where the assembly is not understood: it is not x86, or no loop has an instruction a step and vector.
    """
    cells = gemm.tile.rows * gemm.tile.vectors
    found = [loop for loop in loops_of(gemm) if loop.computing >= loop.steps * cells]
    if not found:
        return None
    loop = (max if is_checked else min)(found, key=lambda loop: loop.computing / loop.steps)
    steps = loop.steps * cells
    return Count(loop.computing / steps, loop.moving / steps, gemm.width // gemm.tile.vectors)


def launched(work: Callable[[], object]) -> list[Kernel]:
    """The kernels that `work` runs, in order."""
    kernels: list[Kernel] = []
    launch_of = products.launch_of

    @functools.wraps(launch_of)
    def noting(*arguments: Any, **named: Any) -> Launch:
        launch = launch_of(*arguments, **named)
        kernels.append(launch.kernel)
        return launch

    products.launch_of = noting  # type: ignore[assignment]
    try:
        work()
    finally:
        products.launch_of = launch_of
    return kernels
