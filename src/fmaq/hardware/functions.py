"""The Boolean functions of cells as Liberty writes them, as functions of Python over ints and NumPy arrays.

NOT is !A or A', AND a space, * or &, OR + or |, XOR ^. NOT binds tightest, then XOR, AND, OR (Synopsys, "Liberty User
Guide", volume 1, "Boolean expressions"). A pin is a name, perhaps with an index, A[0].
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

PIN = r"[A-Za-z_]\w*(?:\[\d+\]|<\d+>)?"
OPERAND = re.compile(r"pins(?:\.get\(|\[)'([^']+)'(?:, -?\d\)|\])")
"""A pin or a constant in what `_python` makes."""
TOKEN = re.compile(rf"{PIN}|[01](?!\w)|\S")


class FunctionError(ValueError):
    """Text that is no Boolean function; the message says where."""


def compile_function(text: str) -> Callable[[Mapping[str, Any]], Any]:
    """A Liberty function as a Python function from {pin: words} to words.

    Constants are ints, all zeros or all ones, unless the words hold a "0" and a "1".

    Raises:
        FunctionError: it is not a Boolean expression.
    """
    return eval(f"lambda pins: {_python(text)}")  # our own rendering of checked words


def statement(text: str, output: str, names: Mapping[str, str]) -> str:
    """A Python statement that gives a function's value to a variable, with variables' names for its pins.

    Args:
        names: of every pin of the function, and of the constants, "0" and "1".
    Raises:
        FunctionError: it is not a Boolean expression.
    """
    return f"{output} = {OPERAND.sub(lambda match: names[match[1]], _python(text))}"


def pins_of(text: str) -> set[str]:
    """The pins that a function depends on; errors as of `compile_function`."""
    _python(text)
    return {token for token in TOKEN.findall(text) if _is_pin(token)}


def _python(text: str) -> str:
    """The function as a Python expression over `pins`."""
    expression, rest = _alternatives(TOKEN.findall(text))
    if rest:
        raise FunctionError(f"function {text!r} is not a Boolean expression near {rest[0]!r}")
    return expression


def _is_pin(token: str) -> bool:
    return re.fullmatch(PIN, token) is not None


def _alternatives(tokens: list[str]) -> tuple[str, list[str]]:
    left, tokens = _conjunction(tokens)
    while tokens and tokens[0] in "+|":
        right, tokens = _conjunction(tokens[1:])
        left = f"({left} | {right})"
    return left, tokens


def _conjunction(tokens: list[str]) -> tuple[str, list[str]]:
    left, tokens = _exclusive(tokens)
    while tokens and tokens[0] not in "+|)":
        right, tokens = _exclusive(tokens[1:] if tokens[0] in "*&" else tokens)
        left = f"({left} & {right})"
    return left, tokens


def _exclusive(tokens: list[str]) -> tuple[str, list[str]]:
    left, tokens = _factor(tokens)
    while tokens and tokens[0] == "^":
        right, tokens = _factor(tokens[1:])
        left = f"({left} ^ {right})"
    return left, tokens


def _factor(tokens: list[str]) -> tuple[str, list[str]]:
    if not tokens:
        raise FunctionError("a function ends where a pin is missing")
    head, tokens = tokens[0], tokens[1:]
    if head == "!":
        inner, tokens = _factor(tokens)
        return f"(~{inner})", tokens
    if head == "(":
        inner, tokens = _alternatives(tokens)
        if not tokens or tokens[0] != ")":
            raise FunctionError("a function has an unmatched parenthesis")
        tokens = tokens[1:]
    elif head in ("0", "1"):
        inner = f"pins.get({head!r}, {-int(head)})"
    elif _is_pin(head):
        inner = f"pins[{head!r}]"
    else:
        raise FunctionError(f"a function has {head!r} where a pin should be")
    while tokens and tokens[0] == "'":
        inner, tokens = f"(~{inner})", tokens[1:]
    return inner, tokens
