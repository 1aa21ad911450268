"""Structured loops and conditions over llvmlite's basic blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

from llvmlite import ir

I1, I8, I32, I64 = ir.IntType(1), ir.IntType(8), ir.IntType(32), ir.IntType(64)
F32, F64 = ir.FloatType(), ir.DoubleType()
POINTER = ir.PointerType()

Value: TypeAlias = Any  # an ir.Value; llvmlite has no types


def i64(value: int) -> ir.Constant:
    """A 64-bit integer constant."""
    return ir.Constant(I64, value)


def i32(value: int) -> ir.Constant:
    """A 32-bit integer constant."""
    return ir.Constant(I32, value)


def for_range(
    b: ir.IRBuilder,
    start: Value,
    stop: Value,
    initial: Sequence[Value],
    body: Callable[[Value, list[Value]], Sequence[Value]],
    step: int = 1,
) -> list[Value]:
    """`for i in range(start, stop, step): values = body(i, values)`; returns the values after the loop."""
    before = b.block
    head, inside, after = (b.append_basic_block(name) for name in ("head", "body", "after"))
    b.branch(head)
    b.position_at_end(head)
    i = b.phi(I64)
    i.add_incoming(start, before)
    carried = []
    for value in initial:
        phi = b.phi(value.type)
        phi.add_incoming(value, before)
        carried.append(phi)
    b.cbranch(b.icmp_signed("<", i, stop), inside, after)
    b.position_at_end(inside)
    results = body(i, list(carried))
    i.add_incoming(b.add(i, i64(step)), b.block)
    for phi, value in zip(carried, results, strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return carried


def repeat(b: ir.IRBuilder, stop: Value, body: Callable[[Value], None], start: Value | None = None) -> None:
    """`for i in range(start, stop): body(i)`, from 0 unless a start is given."""

    def one(i: Value, values: list[Value]) -> list[Value]:
        body(i)
        return []

    for_range(b, i64(0) if start is None else start, stop, [], one)


def for_chunks(
    b: ir.IRBuilder,
    depth: Value,
    chunk: int | None,
    initial: Sequence[Value],
    body: Callable[[Value, Value, Value, list[Value]], Sequence[Value]],
    first: Value | None = None,
) -> list[Value]:
    """`values = body(index, start, end, values)` for every chunk of first … depth − 1; None is one chunk for all of it.

    `first`, 0 unless given, is where a chunk starts; indices count from 0 there.
    """

    def one(start: Value, carried: list[Value]) -> list[Value]:
        index, *values = carried
        end = depth
        if chunk is not None:
            whole = b.add(start, i64(chunk))
            end = b.select(b.icmp_signed("<", whole, depth), whole, depth)
        return [b.add(index, i64(1)), *body(index, start, end, values)]

    start, index = (i64(0), i64(0)) if first is None else (first, b.sdiv(first, i64(chunk or 2**62)))
    return for_range(b, start, depth, [index, *initial], one, step=chunk or 2**62)[1:]


def element(b: ir.IRBuilder, pointer: Value, index: Value, of: ir.Type) -> Value:
    """The address of an element of an array."""
    return b.gep(pointer, [index], source_etype=of)


def load(b: ir.IRBuilder, pointer: Value, index: Value, of: ir.Type, align: int | None = None) -> Value:
    """An element of an array (or a vector that starts at one, where `of` is the element's type and `align` given)."""
    return b.load(element(b, pointer, index, of), typ=of, align=align)


def either(
    b: ir.IRBuilder, condition: Value, then: Callable[[], Sequence[Value]], otherwise: Callable[[], Sequence[Value]]
) -> list[Value]:
    """The values of one of two branches."""
    with b.if_else(condition) as (first, second):
        with first:
            left, left_end = then(), b.block
        with second:
            right, right_end = otherwise(), b.block
    merged = []
    for x, y in zip(left, right, strict=True):
        phi = b.phi(x.type)
        phi.add_incoming(x, left_end)
        phi.add_incoming(y, right_end)
        merged.append(phi)
    return merged
