"""The syntax of Liberty: text to a tree of groups, and the tree to plain text again.

Real files bend the rules, and tools differ in what they forgive: a `;` left out, `//` comments, comment marks inside
quotes. What is written here has none of these, so that every reader of it sees the same cells.

Source: Synopsys, "Liberty User Guide", volume 1, chapter 1 (general syntax: groups, simple and complex attributes).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""(?P<skip> \s+ | /\*.*?\*/ | //[^\n]* | \\\r?\n )
      | (?P<string> "(?:\\.|[^"\\])*" )
      | (?P<mark> [{}();:,] )
      | (?P<word> (?: \[[^\]\s]*\] | (?!/[*/]|\\\r?\n)[^\s{}();:,"] )+ )""",
    re.DOTALL | re.VERBOSE,
)
NAME = re.compile(r"[A-Za-z_]\w*")
MARKS = frozenset("{}();:,")


class LibertySyntaxError(ValueError):
    """Text that is not Liberty; the message says at which line."""


@dataclass(frozen=True)
class Attribute:
    """`name : value ;` or, complex, `name (value, value) ;`. Values are as written, in quotes or not."""

    name: str
    values: tuple[str, ...]
    is_complex: bool = False

    @property
    def text(self) -> str:
        """The values without quotes, set apart by spaces."""
        return " ".join(map(unquoted, self.values))


@dataclass(frozen=True)
class Group:
    """`kind (arguments) { statements }`."""

    kind: str
    arguments: tuple[str, ...]
    statements: tuple[Attribute | Group, ...] = field(default=())

    def find(self, *kinds: str) -> list[Group]:
        """The groups of these kinds, in order."""
        return [s for s in self.statements if isinstance(s, Group) and s.kind in kinds]

    def get(self, name: str) -> str | None:
        """The text of an attribute, the last one of this name."""
        found = [s for s in self.statements if isinstance(s, Attribute) and s.name == name]
        return found[-1].text if found else None

    @property
    def names(self) -> list[str]:
        """The arguments without quotes; several in one pair of quotes are several."""
        return [name for argument in self.arguments for name in re.split(r"[\s,]+", unquoted(argument)) if name]


def unquoted(value: str) -> str:
    """A value without its quotes, line continuations and escapes."""
    if len(value) < 2 or value[0] != '"':
        return value
    return re.sub(r"\\(.)", r"\1", re.sub(r"\\\r?\n", " ", value[1:-1]))


# --- Reading ----------------------------------------------------------------------------------------------------------


def read(text: str) -> Group:
    """The group that a file consists of.

    Raises:
        LibertySyntaxError: it is not Liberty, or it ends in the middle of a group.
    """
    tokens = _Tokens(text)
    statement = _statement(tokens)
    if not isinstance(statement, Group):
        raise tokens.error("a library starts with a group")
    return statement


class _Tokens:
    """The words of a text, with a look at the next two."""

    def __init__(self, text: str) -> None:
        self.text, self.position = text, 0
        self.words, self.places = self._split()

    def _split(self) -> tuple[list[str], list[int]]:
        words, places, position = [], [], 0
        for match in TOKEN.finditer(self.text):
            if match.start() != position:
                break
            position = match.end()
            if match.lastgroup != "skip":
                words.append(match.group())
                places.append(match.start())
        if position < len(self.text):
            what = "a quote or comment that does not end" if self.text[position] in '"/' else "a character that"
            line = self.text.count("\n", 0, position) + 1
            raise LibertySyntaxError(f"line {line}: {what} is no Liberty, near {self.text[position:][:20]!r}")
        return words, places

    def peek(self, ahead: int = 0) -> str:
        """The next word but some; "" at the end."""
        index = self.position + ahead
        return self.words[index] if index < len(self.words) else ""

    def take(self, expected: str = "") -> str:
        word = self.peek()
        if not word or (expected and word != expected):
            raise self.error(f"{expected or 'more'!r} should come")
        self.position += 1
        return word

    def error(self, message: str) -> LibertySyntaxError:
        if self.position >= len(self.words):
            return LibertySyntaxError(f"{message}, but the file ends: a group is malformed or does not end")
        line = self.text.count("\n", 0, self.places[self.position]) + 1
        return LibertySyntaxError(f"line {line}: {message}, not {self.peek()[:30]!r}")


def _statement(tokens: _Tokens) -> Attribute | Group:
    name = tokens.take()
    if name in MARKS:
        tokens.position -= 1
        raise tokens.error("a name should come")
    if tokens.peek() == ":":
        tokens.take()
        return Attribute(name, tuple(_simple_value(tokens)))
    tokens.take("(")
    values = tuple(_arguments(tokens))
    if tokens.peek() != "{":
        return Attribute(name, values, is_complex=True)
    tokens.take("{")
    return Group(name, values, tuple(_statements(tokens)))


def _statements(tokens: _Tokens) -> Iterator[Attribute | Group]:
    """Up to the closing brace, which is taken. A `;` may stand anywhere between statements, or not at all."""
    while tokens.peek() != "}":
        if tokens.peek() == ";":
            tokens.take()
        else:
            yield _statement(tokens)
    tokens.take("}")


def _simple_value(tokens: _Tokens) -> Iterator[str]:
    """Up to the `;` or, where that is missing, to a brace, or a name and `:` or `(`, which start the next thing."""
    is_first = True
    while (word := tokens.peek()) not in (";", "}"):
        if not is_first and NAME.fullmatch(word) and tokens.peek(1) in (":", "("):
            return
        yield tokens.take()
        is_first = False


def _arguments(tokens: _Tokens) -> Iterator[str]:
    while (word := tokens.take()) != ")":
        if word in "{};":
            tokens.position -= 1
            raise tokens.error("')' should come")
        if word != ",":
            yield word


# --- Writing ----------------------------------------------------------------------------------------------------------


def write(statement: Attribute | Group) -> str:
    """A statement as text, every attribute with its `;` and no comments."""
    return "\n".join(_lines(statement, ""))


def _lines(statement: Attribute | Group, indent: str) -> Iterator[str]:
    if isinstance(statement, Attribute):
        yield indent + _attribute(statement)
        return
    yield f"{indent}{statement.kind} ({', '.join(statement.arguments)}) {{"
    for inner in statement.statements:
        yield from _lines(inner, indent + "  ")
    yield indent + "}"


def _attribute(attribute: Attribute) -> str:
    values = attribute.values if attribute.name == "function" else [_plain(value) for value in attribute.values]
    if attribute.is_complex:
        return f"{attribute.name} ({', '.join(values)});"
    return f"{attribute.name} : {' '.join(values)};"


def _plain(value: str) -> str:
    """A value that readers take right who see comments, braces or the end of the text inside quotes."""
    if value[:1] != '"' or not re.search(r'//|/\*|\*/|[{};]|\\"', value):
        return value
    return '"' + re.sub(r'[/*{};"]', " ", unquoted(value)) + '"'
