"""Is a comparison of accumulators one of like with like? A short accumulator behind an exact product is not cheap."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import log2

from fmaq.hardware.unit import Unit
from fmaq.numerics import Accumulator, FloatFormat


def unlike(units: Sequence[Unit]) -> str | None:
    """What is wrong with comparing these units; None where nothing is.

    Float accumulators that round their products pay for a narrow adder. One without a product format adds products of
    all their bits, so that it may cost more than one with more mantissa bits. It is no fault where the accumulator has
    as many bits as the product, as 32-bit ones do.
    """
    exact = {str(unit.accumulator): unit for unit in units if _keeps_more(unit)}
    rounded = [str(unit.accumulator) for unit in units if isinstance(unit.product, FloatFormat)]
    if not exact or not rounded:
        return None
    first = next(iter(exact.values()))
    names = ", ".join(f'"{_short(unit)}"' for unit in exact.values())
    one = len(exact) == 1
    return (
        f"unlike comparison: {names} {'keeps' if one else 'keep'} products exact ({first.product_bits} bits), beside "
        f'accumulators that round them; to compare like with like, write "{with_product(first)}"'
    )


def with_product(unit: Unit) -> str:
    """A float accumulator with products of its own format, by the paper's rule: b_prod = b_acc + ½·log2(chunk)."""
    acc = unit.accumulator
    assert isinstance(acc, Accumulator) and isinstance(acc.format, FloatFormat) and acc.format.bias is not None
    format, more = acc.format, round(log2(acc.chunk or 1) / 2)
    return f"{format} product={replace(format, bias=acc.format.bias + more)}"


def _keeps_more(unit: Unit) -> bool:
    """A float accumulator whose exact products have more bits than it keeps."""
    acc = unit.accumulator
    if not isinstance(acc, Accumulator) or not isinstance(acc.format, FloatFormat) or acc.product is not None:
        return False
    return unit.significand_bits > acc.format.significant + 1


def _short(unit: Unit) -> str:
    return str(unit.accumulator).removesuffix(" chunk=16")
