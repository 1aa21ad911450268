"""An accumulator: the formats, chunk and rounding of a chunked fused multiply-add, as one immutable value."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar

from fmaq.numerics.formats import Format, _whole, parse_format
from fmaq.numerics.random import MAX_RANDOM_BITS

ROUNDINGS = ("toward_zero", "nearest_even", "stochastic")


@dataclass(frozen=True, repr=False)
class Accumulator:
    """FMAq(x, w, s) = Q_acc(Q_prod(x·w) + s), chunk by chunk (arXiv 2401.14110, section 2).

    Args:
        format: of the partial sums: a format or its name, such as `"M7E4b10"`. A whole description in one string
            (`"M7E4b10 product=M7E4b12 chunk=16"`) or a mapping of these arguments is taken as well, alone.
        product: format of the products; None keeps them exact.
        chunk: steps in a chunk, at least 1; None sums in one chunk.
        rounding: `"toward_zero"`, `"nearest_even"` or `"stochastic"`, of products and sums.
        underflow: False, the first stage of dual-stage fine-tuning, lets magnitudes fall to float32's own 2^−126.
        random_bits: r of stochastic rounding, 1 to 16.
        seed: of stochastic rounding.
        centred: stochastic rounding's random integers are odd: of r bits, r − 1 are random and the last is 1. Then it
            is right on average; else it goes toward zero by half of 2^−r of a unit in the last place, on average.

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
        if self.rounding not in ROUNDINGS:
            near = difflib.get_close_matches(str(self.rounding), ROUNDINGS, 1, 0.4)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ValueError(f"rounding must be one of {', '.join(ROUNDINGS)}, got {self.rounding!r}{hint}")
        for name in ("underflow", "centred"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name} must be True or False, got {getattr(self, name)!r}")
        set_field(self, "random_bits", _whole(self.random_bits, "random_bits", 1, MAX_RANDOM_BITS))
        set_field(self, "seed", _whole(self.seed, "seed", 0, 2**64 - 1))

    @classmethod
    def parse(cls, description: str | Mapping[str, Any] | Accumulator) -> Accumulator:
        """The accumulator that a string, a mapping or an accumulator describes.

        A string is a format's name, then any of `product=`, `chunk=`, `rounding=`, `underflow=`, `random_bits=`,
        `seed=` and `centred=`, set apart by spaces or commas; `"paper12"` may stand for the paper's format, product and
        chunk. A mapping has the constructor's arguments as keys.
        """
        return description if isinstance(description, cls) else cls(description)  # type: ignore[arg-type]

    def __str__(self) -> str:
        """One string that `parse` reads back."""
        words = [str(self.format)]
        for field in fields(self)[1:]:
            value = getattr(self, field.name)
            if value != field.default or field.name == "chunk":
                words.append(f"{field.name}={value}")
        return " ".join(words)

    def __repr__(self) -> str:
        return f'Accumulator("{self}")'

    def to_mapping(self) -> dict[str, Any]:
        """The arguments that differ from their defaults, as plain values for YAML or JSON; `parse` reads it back."""
        product = None if self.product is None else str(self.product)
        values = asdict(self) | {"format": str(self.format), "product": product}
        return {f.name: values[f.name] for f in fields(self) if f.name == "format" or values[f.name] != f.default}

    @property
    def bits(self) -> int:
        """Width of the accumulator's format."""
        return self.format.bits

    @property
    def is_template(self) -> bool:
        """True where a bias is still to be chosen."""
        return self.format.is_template or (self.product is not None and self.product.is_template)

    def check_float32(self) -> None:
        """Refuse formats that float32 tensors cannot hold (emax > 127 or emin < −126), and templates.

        Raises:
            ValueError: naming the format and what is wrong with it.
        """
        for role, format in (("accumulator", self.format), ("product", self.product)):
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


def _options(text: str) -> dict[str, Any]:
    words = text.replace(",", " ").split()
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
