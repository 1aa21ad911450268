"""Which layers of a model use which accumulator and which formats: an immutable value, written in Python or in YAML.

A layer's rule comes from the policy's own fields, or from one entry of `layers` laid over them. An entry's key is a
module's full name or a glob over names (`*`, `?`, `[...]`; `*` crosses dots). It speaks for the modules that it matches
and for everything inside them. Where several entries speak for a layer, the most specific alone counts:

1. the layer's own exact name,
2. then the key with the most literal characters,
3. then the later one.
"""

from __future__ import annotations

import difflib
import functools
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from fmaq.numerics import Accumulator
from fmaq.numerics.reference import ESTIMATORS
from fmaq.ops import parse_tensor_format
from fmaq.ops.operands import AccumulatorLike

if TYPE_CHECKING:
    import yaml

T = TypeVar("T")

FP32 = "fp32"
RULE_FIELDS = ("accumulator", "weight", "activation", "estimator", "backward")


@dataclass(frozen=True)
class Rule:
    """What happens to the products of one layer.

    Attributes:
        accumulator: of the products; `"fp32"` is torch's own product.
        weight: format that weights are quantized to, or None.
        activation: format that activations are quantized to, or None.
        estimator: of the gradients, see `fmaq.matmul`.
        backward: accumulator of the gradient products, see `fmaq.matmul`; None is float32.
    """

    accumulator: Accumulator | str = FP32
    weight: str | None = None
    activation: str | None = None
    estimator: str = "identity"
    backward: Accumulator | None = None

    @property
    def is_plain(self) -> bool:
        """Nothing is emulated and nothing quantized: torch's own product."""
        return self.accumulator == FP32 and self.weight is None and self.activation is None

    @property
    def how(self) -> dict[str, Any]:
        """What a product is told beside its accumulator: keywords of `fmaq.matmul`, `linear` and convolutions."""
        return {"estimator": self.estimator, "backward": self.backward}


def _naming_the_nearest(cls: type[T]) -> type[T]:
    """A dataclass whose constructor names the argument that was meant by an unknown one."""
    construct = cls.__dict__["__init__"]

    @functools.wraps(construct)
    def checked(self: T, *args: Any, **given: Any) -> None:
        if message := _unknown(given):
            raise TypeError(message)
        construct(self, *args, **given)

    type.__setattr__(cls, "__init__", checked)
    return cls


@_naming_the_nearest
@dataclass(frozen=True)
class Policy:
    """Which products use which accumulator; see the module's text for how an entry of `layers` is chosen.

    Args:
        accumulator: an `Accumulator`, anything that `Accumulator.parse` takes, or `"fp32"` (or `"float32"`) for
            torch's own product.
        weight: format that weights are quantized to, such as `"M4E3"` or `"int8"`; None leaves them float32.
        activation: the same for activations.
        estimator: of the gradients, see `fmaq.matmul`.
        backward: an accumulator of the two gradient products of the estimator identity, or None: float32.
        layers: module name or glob → a mapping of any of the five fields above, laid over them, or None: torch's own
            product on operands as they are.

    Raises:
        TypeError, ValueError: a key or value is wrong; the message names it and what it may be.
    """

    accumulator: Accumulator | str = FP32
    weight: str | None = None
    activation: str | None = None
    estimator: str = "identity"
    backward: Accumulator | None = None
    layers: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in RULE_FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must map module names to overrides or None, got {self.layers!r}")
        object.__setattr__(self, "layers", {key: _checked_entry(key, entry) for key, entry in self.layers.items()})

    def __hash__(self) -> int:
        entries = tuple((key, entry and tuple(entry.items())) for key, entry in self.layers.items())
        return hash((*(getattr(self, name) for name in RULE_FIELDS), entries))

    @classmethod
    def parse(cls, description: Policy | AccumulatorLike) -> Policy:
        """The policy that a mapping of the constructor's arguments describes; a policy passes through.

        An `Accumulator`, or a string such as "paper12", is a policy of that accumulator alone.

        Raises:
            TypeError, ValueError: naming the wrong key, the nearest right one, or the wrong value.
        """
        if isinstance(description, cls):
            return description
        if isinstance(description, (Accumulator, str)):
            return cls(accumulator=description)
        if not isinstance(description, Mapping):
            raise TypeError(f"a policy is a mapping like {{accumulator: paper12, weight: M4E3}}, got {description!r}")
        if message := _unknown(description):
            raise ValueError(message)
        values = dict(description)
        if values.get("layers", ()) is None:
            del values["layers"]
        return cls(**values)

    @classmethod
    def load(cls, path: str | Path) -> Policy:
        """Read a YAML file written by `save` or by hand.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is not a policy, or gives a key twice; the message names the file and the key.
        """
        import yaml

        try:
            content, _ = load_yaml(Path(path).read_text(encoding="utf-8"))
            return cls.parse({} if content is None else content)
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a YAML file, whole or not at all; its folder is made where it is missing."""
        import yaml

        text = yaml.safe_dump(self.to_mapping(), sort_keys=False, allow_unicode=True)
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        descriptor, beside = tempfile.mkstemp(dir=Path(path).parent, prefix=f".{Path(path).name}.", suffix=".tmp")
        try:
            with open(descriptor, "w", encoding="utf-8") as file:
                file.write(text)
            os.replace(beside, path)
        except BaseException:
            os.unlink(beside)
            raise

    def to_mapping(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values for YAML or JSON; `parse` reads it back."""
        values: dict[str, Any] = {}
        for f in fields(self)[:-1]:
            value = getattr(self, f.name)
            if value != f.default:
                values[f.name] = _plain(value)
        if self.layers:
            values["layers"] = {
                key: entry if entry is None else {name: _plain(value) for name, value in entry.items()}
                for key, entry in self.layers.items()
            }
        return values

    def replace(self, *, underflow: bool | None = None, **changes: Any) -> Policy:
        """A copy with other fields.

        Args:
            underflow: switched in every accumulator, those of `layers` too.
            **changes: the constructor's arguments. A new `accumulator` takes the place of every accumulator, those of
                `layers` too, but an entry's `"fp32"` stays.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if message := _unknown(changes):
            raise ValueError(message)
        new = replace(self, **changes)
        if "accumulator" in changes and "layers" not in changes:
            new = new._with_accumulators(lambda _: new.accumulator, entries_only=True)
        if underflow is not None:
            new = new._with_accumulators(lambda acc: replace(Accumulator.parse(acc), underflow=underflow))
        return new

    def _with_accumulators(self, change: Callable[[Any], Accumulator | str], entries_only: bool = False) -> Policy:
        """A copy with `change(accumulator)` in place of every accumulator but "fp32"."""

        def changed(entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
            if entry is None or entry.get("accumulator", FP32) == FP32:
                return entry
            return {**entry, "accumulator": change(entry["accumulator"])}

        own = self.accumulator if entries_only or self.accumulator == FP32 else change(self.accumulator)
        return replace(self, accumulator=own, layers={key: changed(entry) for key, entry in self.layers.items()})

    def for_layer(self, *names: str) -> Rule | None:
        """The rule of a layer, or None where it is to be left alone.

        Args:
            names: the module's full name, and its others if it is registered under several; "" is the model itself.
        """
        best: tuple[tuple[bool, int, int], str] | None = None
        for position, key in enumerate(self.layers):
            if any(_speaks_for(key, name) for name in names):
                rank = (key in names, _literal_characters(key), position)
                if best is None or rank > best[0]:
                    best = (rank, key)
        own = {name: getattr(self, name) for name in RULE_FIELDS}
        if best is None:
            return Rule(**own)
        entry = self.layers[best[1]]
        return None if entry is None else Rule(**{**own, **entry})

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse an entry that matches none of a model's module names.

        Raises:
            ValueError: naming the entry and the nearest module.
        """
        known = list(names)
        for key in self.layers:
            if not any(key == name or fnmatchcase(name, key) for name in known):
                raise ValueError(f"layers: {key!r} matches no module of the model{_nearest(key, known)}")


def load_yaml(text: str) -> tuple[Any, yaml.Node | None]:
    """The values of YAML text, and its nodes, which know their lines.

    Raises:
        yaml.YAMLError: it is not YAML, or a key is given twice, of which YAML itself would keep the last.
    """
    import yaml

    def refuse_duplicates(node: yaml.Node | None) -> None:
        if isinstance(node, yaml.MappingNode):
            seen = set()
            for key, value in node.value:
                name = str(key.value)
                if name in seen:
                    problem = f"the key {name!r} is given twice"
                    raise yaml.MarkedYAMLError(problem=problem, problem_mark=key.start_mark)
                seen.add(name)
                refuse_duplicates(value)
        elif isinstance(node, yaml.SequenceNode):
            for value in node.value:
                refuse_duplicates(value)

    node = yaml.compose(text, Loader=yaml.SafeLoader)
    refuse_duplicates(node)
    return yaml.safe_load(text), node


def _speaks_for(key: str, name: str) -> bool:
    """The key matches the module, or one that contains it."""
    parts = name.split(".") if name else []
    return any(
        key == whole or fnmatchcase(whole, key) for whole in (".".join(parts[:n]) for n in range(len(parts) + 1))
    )


def _literal_characters(key: str) -> int:
    return len(re.sub(r"\[[^\]]*\]|[*?]", "", key))


def _nearest(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), 1, 0.3)
    return f"; did you mean {near[0]!r}?" if near else "."


def _unknown(keys: Iterable[Any]) -> str | None:
    """What to say of the first key that is no field of a policy; None where all are."""
    names = [f.name for f in fields(Policy)]
    for key in keys:
        if key not in names:
            return f"a policy has no {key!r}{_nearest(str(key), names)} It has: {', '.join(names)}"
    return None


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Accumulator) else value


def _checked_entry(key: Any, entry: Any) -> dict[str, Any] | None:
    if not isinstance(key, str):
        raise TypeError(f"layers: {key!r} is not a module name or a glob over module names")
    if entry is None:
        return None
    if not isinstance(entry, Mapping):
        raise TypeError(f"layers: {key!r} must have a mapping like {{accumulator: fp32}}, or null; got {entry!r}")
    for name in entry:
        if name not in RULE_FIELDS:
            hint = _nearest(str(name), RULE_FIELDS)
            raise ValueError(f"layers: {key!r} has no {name!r}{hint} It may have: {', '.join(RULE_FIELDS)}")
    try:
        return {name: _checked(name, value) for name, value in entry.items()}
    except (TypeError, ValueError) as error:
        raise type(error)(f"layers: {key!r}: {error}") from error


def _checked(name: str, value: Any) -> Any:
    if name == "accumulator":
        return _accumulator(value)
    if name == "estimator":
        if value not in ESTIMATORS:
            hint = _nearest(str(value), ESTIMATORS)
            raise ValueError(f"estimator {value!r} is none of: {', '.join(ESTIMATORS)}{hint}")
        return value
    if name == "backward":
        return _backward(value)
    return _tensor_format(name, value)


def _accumulator(value: Any) -> Accumulator | str:
    if isinstance(value, str) and value.strip().lower() in (FP32, "float32"):
        return FP32
    if value is None:
        raise TypeError('accumulator must be an accumulator like "M7E4b10 product=M7E4b12", or "fp32"; got None')
    accumulator = Accumulator.parse(value)
    if not accumulator.is_template:
        accumulator.check_float32()
    return accumulator


def _backward(value: Any) -> Accumulator | None:
    accumulator = FP32 if value is None else _accumulator(value)
    if not isinstance(accumulator, Accumulator):
        return None
    accumulator.check_float32()
    return accumulator


def _tensor_format(name: str, value: Any) -> str | None:
    """The name of a format that `fmaq.quantize` takes."""
    if value is None:
        return None
    try:
        parsed = parse_tensor_format(value)
    except (TypeError, ValueError) as error:
        known = 'a float format like "M4E3" or "M4E3b5", an integer like "int8", or None to leave float32'
        raise ValueError(f"{name} must be {known}; got {value!r}") from error
    return f"int{parsed}" if isinstance(parsed, int) else str(parsed)
