"""The instruction sets that kernels are generated for, and which of them this process uses.

Every target of the host's architecture that its processor can run is available at any time (`use_target`), which is how
the tests run AVX-512, AVX2 and SSE2 code on one machine. `FMAQ_TARGET` in the environment chooses another default.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Literal

import llvmlite.binding as llvm


@dataclass(frozen=True, eq=False)
class Target:
    """An instruction set.

    Attributes:
        name: what `use_target` and `FMAQ_TARGET` take.
        architecture: first part of LLVM's target triple.
        cpu: LLVM's name of the processor whose instructions may be used.
        needs: processor features without which this code does not run.
        vector_bytes: width of a vector register.
        tile: rows and vectors of the register tile of float32 lanes, by measurement.
        fused: has a fused multiply-add.
        control: the floating-point control register.
    """

    name: str
    architecture: str
    cpu: str
    needs: tuple[str, ...]
    vector_bytes: int
    tile: tuple[int, int]
    fused: bool
    control: Literal["mxcsr", "fpcr"]

    def lanes(self, element_bytes: int) -> int:
        """Elements in a vector."""
        return self.vector_bytes // element_bytes


TARGETS = {
    target.name: target
    for target in (
        Target(
            "avx512", "x86_64", "x86-64-v4", ("avx512f", "avx512dq", "avx512vl", "avx512bw"), 64, (4, 2), True, "mxcsr"
        ),
        Target("avx2", "x86_64", "x86-64-v3", ("avx2", "fma"), 32, (3, 2), True, "mxcsr"),
        Target("sse2", "x86_64", "x86-64", ("sse2",), 16, (2, 2), False, "mxcsr"),
        Target("neon", "aarch64", "generic", (), 16, (4, 2), True, "fpcr"),
    )
}

_chosen: ContextVar[Target | None] = ContextVar("fmaq_target", default=None)


@functools.cache
def available_targets() -> tuple[Target, ...]:
    """The targets that this machine runs, fastest first."""
    architecture = llvm.get_default_triple().split("-")[0].replace("arm64", "aarch64")
    features = llvm.get_host_cpu_features()
    fitting = [t for t in TARGETS.values() if t.architecture == architecture]
    return tuple(t for t in fitting if all(features.get(need, False) for need in t.needs))


@functools.cache
def default_target() -> Target:
    """The fastest available target, or that of `FMAQ_TARGET`."""
    name = os.environ.get("FMAQ_TARGET")
    if name is not None:
        return _available(name)
    if not available_targets():
        raise RuntimeError(f"fmaq generates code for x86-64 and AArch64, not for {llvm.get_default_triple()}")
    return available_targets()[0]


def current_target() -> Target:
    """The target that products are computed with in this context."""
    return _chosen.get() or default_target()


@contextmanager
def use_target(name: str) -> Iterator[Target]:
    """Compute with another target inside a `with` block: "avx512", "avx2", "sse2" or "neon".

    Raises:
        ValueError: this machine does not run it.
    """
    token = _chosen.set(_available(name))
    try:
        yield current_target()
    finally:
        _chosen.reset(token)


def _available(name: str) -> Target:
    for target in available_targets():
        if target.name == name:
            return target
    names = ", ".join(t.name for t in available_targets())
    raise ValueError(f"target {name!r} does not run on this machine; it runs {names}")
