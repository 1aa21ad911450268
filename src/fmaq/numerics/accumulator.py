"""An accumulator: the formats, chunk and rounding of a chunked fused multiply-add, as one immutable value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from functools import cached_property
from typing import Any, ClassVar

from fmaq.numerics.formats import FLOAT32, Float32Format, Format, _whole, parse_format
from fmaq.numerics.random import MAX_RANDOM_BITS

ROUNDINGS = ("toward_zero", "nearest_even", "nearest_away", "floor", "half_up", "odd", "stochastic")


@dataclass(frozen=True)
class Level:
    """How sums of the level below are merged: t ← Q(t + s), from zero on.

    Attributes:
        format: of t.
        rounding, random_bits, centred: of t + s, which is exact before.
        chunk: how many sums make one of this level; None is all.
    """

    format: Format | Float32Format
    rounding: str
    random_bits: int
    chunk: int | None = None
    centred: bool = False


@dataclass(frozen=True, repr=False)
class Accumulator:
    """FMAq(x, w, s) = Q_acc(Q_prod(x·w) + s), chunk by chunk (arXiv 2401.14110, section 2).

    Args:
        format: of the partial sums: a format or its name, such as `"M7E4b10"`. A whole description in one string
            (`"M7E4b10 product=M7E4b12 chunk=16"`) or a mapping of these arguments is taken as well, alone.
        product: format of the products; None keeps them exact.
        chunk: steps in a chunk, at least 1; None sums in one chunk.
        rounding: of products and sums: `"toward_zero"`, `"nearest_even"`, `"nearest_away"` (ties away from zero),
            `"floor"` (toward −∞), `"half_up"` (⌊x/u + ½⌋·u), `"odd"` (truncate; the last bit becomes 1 where anything
            was dropped) or `"stochastic"`. Sums in a half-unit format take `"toward_zero"` alone.
        underflow: False, the first stage of dual-stage fine-tuning, lets magnitudes fall to float32's own 2^−126, on
            all levels.
        random_bits: r of stochastic rounding, 1 to 16.
        seed: of stochastic rounding.
        centred: stochastic rounding's random integers are odd: of r bits, r − 1 are random and the last is 1. Then it
            is right on average; else it goes toward zero by half of 2^−r of a unit in the last place, on average.
        product_rounding: of products, where it differs from that of sums. A half-unit product truncates anyway.
        outer: how sums of chunks are added. None: in `format`. A format or its name: in that, rounded as the sums are
            (a half-unit one truncates), in one chunk. An accumulator without product, in parentheses in a string: in
            its format, with its rounding and chunk, and its sums go to its own `outer`. `"fp32"`: IEEE float32
            addition, to the nearest even. The result is the outermost sum.

    Raises:
        TypeError, ValueError: an argument is wrong; the message names it and what it may be.
    """

    format: Format
    product: Format | None = None
    chunk: int | None = 16
    rounding: str = "toward_zero"
    underflow: bool = True
    random_bits: int = 10
    seed: int = 0
    centred: bool = False
    product_rounding: str | None = None
    outer: Format | Float32Format | Accumulator | None = None

    paper12: ClassVar[Accumulator]
    """The paper's 12-bit accumulator: M7E4, biases 10 and 12, chunks of 16, truncation (arXiv 2401.14110)."""

    def __init__(
        self,
        format: Format | str | Mapping[str, Any],
        product: Format | str | None = None,
        chunk: int | None = 16,
        rounding: str = "toward_zero",
        underflow: bool = True,
        random_bits: int = 10,
        seed: int = 0,
        centred: bool = False,
        product_rounding: str | None = None,
        outer: Format | Float32Format | Accumulator | str | Mapping[str, Any] | None = None,
    ) -> None:
        given = {
            "format": format,
            "product": product,
            "chunk": chunk,
            "rounding": rounding,
            "underflow": underflow,
            "random_bits": random_bits,
            "seed": seed,
            "centred": centred,
            "product_rounding": product_rounding,
            "outer": outer,
        }
        if isinstance(format, Mapping):
            given = _described(_known_keys(format), given)
        elif isinstance(format, str) and ("=" in format or format.split()[:1] == ["paper12"]):
            given = _described(_options(format), given)
        for name, value in given.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        set_field = object.__setattr__
        set_field(self, "format", parse_format(self.format))
        if isinstance(self.product, str) and self.product.strip().lower() in ("none", "exact"):
            set_field(self, "product", None)
        set_field(self, "product", None if self.product is None else parse_format(self.product))
        if self.chunk is not None:
            set_field(self, "chunk", _whole(self.chunk, "chunk", 1, 2**31 - 1))
        self._check_roundings()
        for name in ("underflow", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        set_field(self, "random_bits", _whole(self.random_bits, "random_bits", 1, MAX_RANDOM_BITS))
        set_field(self, "seed", _whole(self.seed, "seed", 0, 2**64 - 1))
        set_field(self, "outer", _outer(self.outer))

    def _check_roundings(self) -> None:
        _check_rounding(self.rounding, "rounding", "format", self.format)
        if isinstance(self.product_rounding, str) and self.product_rounding.strip().lower() == "none":
            object.__setattr__(self, "product_rounding", None)
        if self.product_rounding is not None:
            if self.product is None:
                raise ValueError(f"product_rounding={self.product_rounding} rounds nothing: give a product format, too")
            _check_rounding(self.product_rounding, "product_rounding", "product", self.product)

    @classmethod
    def parse(cls, description: str | Mapping[str, Any] | Accumulator) -> Accumulator:
        """The accumulator that a string, a mapping or an accumulator describes.

        A string is a format's name, then any of `product=`, `chunk=`, `rounding=`, `underflow=`, `random_bits=`,
        `seed=`, `centred=`, `product_rounding=` and `outer=`, set apart by spaces or commas; `"paper12"` may stand for
        the paper's format, product and chunk. An outer accumulator is in parentheses: `"M5E4b10 outer=(M10E5b16
        chunk=8)"`. A mapping has the constructor's arguments as keys.
        """
        return description if isinstance(description, cls) else cls(description)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """One string that `parse` reads back."""
        words = [str(self.format)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default or field.name == "chunk":
                words.append(f"{field.name}={f'({value})' if isinstance(value, Accumulator) else value}")
        return " ".join(words)

    def __repr__(self) -> str:
        return f'Accumulator("{self}")'

    def to_mapping(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, as plain values for YAML or JSON; `parse` reads it back."""
        values = {f.name: _plain(getattr(self, f.name)) for f in fields(self)}
        return {f.name: values[f.name] for f in fields(self) if f.name == "format" or values[f.name] != f.default}

    def with_seed(self, seed: int) -> Accumulator:
        """The same with another seed of 64 bits."""
        if seed == self.seed:
            return self
        found = object.__new__(type(self))
        found.__dict__.update(self.__getstate__(), seed=seed)
        return found

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def _hash(self) -> int:
        return hash(tuple(self.__getstate__().values()))

    def __getstate__(self) -> dict[str, Any]:
        """The fields: what is kept of them is not true in another process, or with another field."""
        return {field.name: self.__dict__[field.name] for field in fields(self)}

    @property
    def bits(self) -> int:
        """Width of the accumulator's format."""
        return self.format.bits

    @property
    def is_template(self) -> bool:
        """True where a bias, of any level, is still to be chosen."""
        return any(f.is_template for f in (self.format, self.product, self.outer) if f is not None)

    @property
    def rounding_of_products(self) -> str:
        """How x·w is rounded."""
        if self.product is not None and self.product.half_unit:
            return "toward_zero"
        return self.product_rounding or self.rounding

    @cached_property
    def levels(self) -> tuple[Level, ...]:
        """How sums of chunks are merged, the innermost level first; the last one's sum is the result."""
        if self.outer is None:
            return (Level(self.format, self.rounding, self.random_bits, centred=self.centred),)
        if isinstance(self.outer, Float32Format):
            return (Level(self.outer, "nearest_even", self.random_bits),)
        if not isinstance(self.outer, Accumulator):
            rounding = "toward_zero" if self.outer.half_unit else self.rounding
            return (Level(self.outer, rounding, self.random_bits, centred=self.centred),)
        own = Level(
            self.outer.format, self.outer.rounding, self.outer.random_bits, self.outer.chunk, self.outer.centred
        )
        return (own,) if self.outer.outer is None and own.chunk is None else (own, *self.outer.levels)

    def merges(self, depth: int) -> int:
        """How many merges, of all levels, a sum of `depth` products has."""
        found, sums, chunk = 0, depth, self.chunk
        for level in self.levels:
            sums = -(-sums // chunk) if chunk is not None else min(sums, 1)
            found, chunk = found + sums, level.chunk
        return found

    @cached_property
    def is_stochastic(self) -> bool:
        """Some rounding draws."""
        roundings = [self.rounding, *(level.rounding for level in self.levels)]
        return "stochastic" in roundings + [self.rounding_of_products] * (self.product is not None)

    def check_float32(self) -> None:
        """Refuse formats that float32 tensors cannot hold (emax > 127 or emin < −126), and templates.

        Raises:
            ValueError: naming the format and what is wrong with it.
        """
        formats: list[tuple[str, Format | Float32Format | None]]
        formats = [("accumulator", self.format), ("product", self.product)]
        if self.outer is not None:
            formats += [("outer", level.format) for level in self.levels]
        for role, format in formats:
            if format is not None and (format.emax > 127 or format.emin < -126):
                raise ValueError(
                    f"{role} format {format} does not fit in float32: its exponents are {format.emin} to "
                    f"{format.emax}, float32's -126 to 127; choose another bias or fewer exponent bits"
                )


def paper_bias(product_bias: int, chunk: int) -> int:
    """The accumulator's bias from the product's, b_acc = b_prod − ½·log2(chunk), rounded down (arXiv 2401.14110).

    A sum of c products of random sign is about √c times as large as one.

    Args:
        product_bias: b_prod.
        chunk: c, products in a chunk, at least 1.
    """
    chunk = _whole(chunk, "chunk", 1, 2**31 - 1)
    return product_bias - math.ceil(0.5 * math.log2(chunk))


def _described(description: dict[str, Any], arguments: dict[str, Any]) -> dict[str, Any]:
    """The fields of a whole description, which leaves nothing for other arguments to say."""
    for field in fields(Accumulator)[1:]:
        if arguments[field.name] != field.default:
            raise ValueError(f"{field.name} is given beside a whole description; write it inside: {description}")
    return arguments | description


def _known_keys(mapping: Mapping[str, Any]) -> dict[str, Any]:
    names = [f.name for f in fields(Accumulator)]
    for name in mapping:
        if name not in names:
            near = difflib.get_close_matches(str(name), names, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"an accumulator has no {name!r}{hint} It has: {', '.join(names)}")
    if "format" not in mapping:
        raise ValueError('an accumulator needs a "format", like "M7E4b10"')
    return dict(mapping)


def _outer(outer: Any) -> Format | Float32Format | Accumulator | None:
    """The level that a name, a description or one of these stands for.

    Raises:
        TypeError, ValueError: none of them, or an accumulator with what a level has not.
    """
    if isinstance(outer, str):
        text = outer.strip()
        if text.lower() in ("none", "fp32"):
            return FLOAT32 if text.lower() == "fp32" else None
        if text[:1] == "(" and text[-1:] == ")":
            outer = Accumulator(text[1:-1])
        elif "=" in text or text == "paper12":
            outer = Accumulator(text)
        else:
            try:
                return parse_format(text)
            except ValueError as error:
                near = difflib.get_close_matches(text.lower(), ["fp32"], 1, 0.6)
                hint = f"; did you mean {near[0]!r}?" if near else ":"
                raise ValueError(f'outer is a format, an accumulator in parentheses or "fp32"{hint} {error}') from None
    if outer is None or isinstance(outer, Float32Format):
        return outer
    if not isinstance(outer, (Mapping, Accumulator)):
        return parse_format(outer)
    found = Accumulator.parse(outer)
    for name in ("product", "product_rounding", "underflow", "seed"):
        if getattr(found, name) != getattr(Accumulator, name):
            whose = "a level adds sums, not products" if name.startswith("product") else "it is one for all levels"
            raise ValueError(f"{name} cannot be said of outer ({found}): {whose}; leave it out there")
    return found


def _check_rounding(rounding: Any, name: str, what: str, format: Format) -> None:
    if rounding not in ROUNDINGS:
        near = difflib.get_close_matches(str(rounding), ROUNDINGS, 1, 0.4)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ValueError(f"{name} must be one of {', '.join(ROUNDINGS)}, got {rounding!r}{hint}")
    if format.half_unit and rounding != "toward_zero":
        plain = str(format).removesuffix("h")
        raise ValueError(
            f'{name}={rounding} does not go with the half-unit {what} {format}, which only takes "toward_zero": '
            f"to drop bits already rounds it to the nearest. Leave {name} out, or write {plain}"
        )


def _plain(value: Any) -> Any:
    """A field as YAML and JSON know it."""
    if isinstance(value, Accumulator):
        return value.to_mapping()
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _words(text: str) -> list[str]:
    """What spaces and commas outside of parentheses set apart."""
    words, depth = [""], 0
    for letter in text:
        depth += (letter == "(") - (letter == ")")
        if depth < 0:
            break
        if depth == 0 and (letter == "," or letter.isspace()):
            words.append("")
        else:
            words[-1] += letter
    if depth:
        raise ValueError(f"parentheses do not match in accumulator {text!r}")
    return [word for word in words if word]


def _options(text: str) -> dict[str, Any]:
    words = _words(text)
    base: dict[str, Any] = {}
    if words[0] == "paper12":
        base = {f.name: getattr(Accumulator.paper12, f.name) for f in fields(Accumulator)}
    elif "=" not in words[0]:
        base = {"format": words[0]}
    options: dict[str, Any] = {}
    for word in words[1:] if base else words:
        name, _, value = word.partition("=")
        if not value:
            raise ValueError(f"{word!r} in accumulator {text!r} is not name=value, like product=M7E4b12")
        if name in options or (base == {"format": words[0]} and name == "format"):
            raise ValueError(f"{name} is given twice in accumulator {text!r}")
        options[name] = value
    options = _known_keys(base | options)
    for name in ("chunk", "random_bits", "seed"):
        if isinstance(options.get(name), str):
            options[name] = _number(name, options[name])
    for name in ("underflow", "centred"):
        if isinstance(options.get(name), str):
            if options[name].lower() not in ("true", "false"):
                raise ValueError(f"{name} must be True or False, got {options[name]!r}")
            options[name] = options[name].lower() == "true"
    return options


def _number(name: str, text: str) -> int | None:
    if name == "chunk" and text.lower() == "none":
        return None
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {text!r}") from None


Accumulator.paper12 = Accumulator("M7E4b10", product="M7E4b12", chunk=16)
