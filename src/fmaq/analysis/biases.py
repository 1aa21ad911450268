"""The biases of an accumulator, of all its levels at once: where its formats lie among the exponents.

The formats of an accumulator are listed as those of the sums in a chunk, of the products, and of each outer level from
the inside out. A fixed format, an exact product and float32 have no bias; theirs counts as 0, and stays.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from fmaq.numerics import Accumulator, FloatFormat
from fmaq.numerics.formats import Float32Format, Format

AnyFormat = Format | Float32Format


def formats_of(acc: Accumulator) -> list[AnyFormat | None]:
    """Of sums, products and the outer levels."""
    return [acc.format, acc.product, *outer_formats(acc)]


def outer_formats(acc: Accumulator) -> list[AnyFormat]:
    """Of the levels that sums of chunks go to, the innermost first; none if these are merged in the sums' own."""
    outer = acc.outer
    if isinstance(outer, Accumulator):
        return [outer.format, *outer_formats(outer)]
    return [] if outer is None else [outer]


def has_biases_alone(acc: Accumulator) -> bool:
    """Every format has a bias, or (exact products, float32) needs none: larger biases are what an offset is."""
    return all(isinstance(format, FloatFormat | Float32Format | None) for format in formats_of(acc))


def bias_of(format: AnyFormat | None) -> int:
    """A float's bias, where it has one; else 0."""
    return format.bias or 0 if isinstance(format, FloatFormat) else 0


def biases_of(acc: Accumulator) -> list[int]:
    """Of sums, products and the outer levels."""
    return [bias_of(format) for format in formats_of(acc)]


def with_biases(acc: Accumulator, biases: Sequence[int]) -> Accumulator:
    """With these biases in the formats that have one, or the nearest that float32 can hold."""
    changed = [
        replace(format, bias=_held(format, bias)) if isinstance(format, FloatFormat) else format
        for format, bias in zip(formats_of(acc), biases, strict=True)
    ]
    return _with_formats(acc, changed)


def bare(acc: Accumulator) -> Accumulator:
    """Without any bias."""
    return mapped(acc, lambda format: replace(format, bias=None) if isinstance(format, FloatFormat) else format)


def moved(acc: Accumulator, by: int) -> Accumulator:
    """With larger biases, of all levels."""
    return with_biases(acc, [bias + by for bias in biases_of(acc)])


def stepped(acc: Accumulator, which: int, by: int) -> Accumulator:
    """With a larger bias of one of the formats."""
    biases = biases_of(acc)
    biases[which] += by
    return with_biases(acc, biases)


def top_of(acc: Accumulator) -> int:
    """The largest exponent of the sums' format; 0 of a fixed one, which is not to be chosen."""
    return acc.format.emax if isinstance(acc.format, FloatFormat) else 0


def distances_of(acc: Accumulator) -> list[int]:
    """By how much the biases of products and outer levels are above that of the sums."""
    own, *others = biases_of(acc)
    return [bias - own for bias in others]


def placed(acc: Accumulator, top: int, distances: Sequence[int] | None = None) -> Accumulator:
    """Whose sums' largest exponent is `top`, and whose other biases are so much larger than that of the sums.

    Args:
        distances: of products and each outer level; None: all levels end at `top`.
    """
    own = bias_for(acc.format, top)
    if distances is None:
        return with_biases(acc, [bias_for(format, top) for format in formats_of(acc)])
    return with_biases(acc, [own, *(own + distance for distance in distances)])


def bias_for(format: AnyFormat | None, top: int) -> int:
    """The bias by which a format's largest exponent is `top`; −top of one without a bias."""
    return (2**format.exponent - 1 if isinstance(format, FloatFormat) else 0) - top


def spans_of(acc: Accumulator, depth: int) -> list[int]:
    """How many products the longest sums of each format but the products' add up, out of `depth`.

    Without an outer level the sums' format holds those of chunks and the whole one.
    """
    spans: list[int] = []
    span, level = acc.chunk, acc
    while isinstance(level.outer, Accumulator):
        spans.append(_at_most(span, depth))
        level = level.outer
        span = None if span is None or level.chunk is None else span * level.chunk
    return spans + ([depth] if level.outer is None else [_at_most(span, depth), depth])


def _at_most(span: int | None, depth: int) -> int:
    return depth if span is None else min(span, depth)


def mapped(acc: Accumulator, change: Callable[[AnyFormat | None], AnyFormat | None]) -> Accumulator:
    """With each of its formats changed."""
    return _with_formats(acc, [change(format) for format in formats_of(acc)])


def _with_formats(acc: Accumulator, formats: Sequence[Any]) -> Accumulator:
    format, product, *outers = formats
    return replace(acc, format=format, product=product, outer=_with_outers(acc.outer, iter(outers)))


def _with_outers(outer: Any, formats: Iterator[Any]) -> Any:
    if isinstance(outer, Accumulator):
        format = next(formats)
        return replace(outer, format=format, outer=_with_outers(outer.outer, formats))
    return None if outer is None else next(formats)


def _held(format: FloatFormat, bias: int) -> int:
    return max(2**format.exponent - 128, min(126, bias))
