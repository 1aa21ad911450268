"""Which layers of a model use which accumulator and which formats: an immutable value, written in Python or in YAML.

A layer's rule comes from the policy's own fields, or from one entry of `layers` laid over them. An entry's key is a
module's full name or a glob over names (`*`, `?`, `[...]`; `*` crosses dots). It speaks for the modules that it matches
and for everything inside them, but for offsets, gains and shifts: these are of the matched modules' own products.
Where several entries speak for a layer, the most specific alone counts:

1. the layer's own exact name,
2. then the key with the most literal characters,
3. then the later one.
"""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, TypeVar

from fmaq.emulation import vector_files
from fmaq.emulation.in_short import in_short
from fmaq.emulation.noise import NOISE
from fmaq.emulation.rule import (
    CHOSEN_FIELDS,
    FP32,
    KINDS,
    OWN_FIELDS,
    PRODUCT_FIELDS,
    RANGE_FIELDS,
    RULE_FIELDS,
    OfProduct,
    Rule,
    handed_down,
)
from fmaq.emulation.vectors import Vector
from fmaq.numerics import Accumulator
from fmaq.numerics.formats import meant_by
from fmaq.numerics.reference import ESTIMATORS
from fmaq.ops import parse_tensor_format
from fmaq.ops.operands import AccumulatorLike
from fmaq.whole_files import write_bytes

T = TypeVar("T")

POLICY_FILE = "fmaq-policy.yaml"
"""What a policy is called in a folder beside the weights of its model."""


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
@dataclass(frozen=True, repr=False)
class Policy(OfProduct):
    """Which products use which accumulator; see the module's text for how an entry of `layers` is chosen.

    Args:
        accumulator: an `Accumulator`, anything that `Accumulator.parse` takes, or `"fp32"` (or `"float32"`) for
            torch's own product.
        weight: format that weights are quantized to, such as `"M4E3"` or `"int8"`; None leaves them float32.
        activation: the same for activations. Where both are integers and the accumulator's formats are fixed-point
            without a fraction (`"I16f0"`), it sums their codes, as an integer engine does, and the scales multiply the
            finished sums.
        estimator: of the gradients, see `fmaq.matmul`.
        backward: an accumulator of the two gradient products of the estimator identity, or None: float32.
        per_token: each token (row of the first operand; image of a convolution) has an exponent of its own, which
            costs the hardware finding it at run time.
        weight_per_channel: every output channel of a weight has a bias or scale of its own.
        noise: of stochastic rounding: `"by_call"`, other random numbers in every layer, call and product (see
            `fmaq.emulation.noise`), or `"repeated"`, the same in all of one seed.
        offset: added to the accumulator's and the product's bias: an integer, or one for each output channel.
        gain, shift: multiply the finished sums, and are then added: a number, or one for each output channel.
            Of batched products (heads), all three may have further dimensions in front; see `fmaq.matmul`.
        a_max, b_max: static ranges: the largest magnitudes that the formats of a product's two operands (input and
            weight of a linear layer or convolution) are made for; of a weight by channel, one a channel. None: the
            tensors' own at run time, so that a sample's result depends on its batch. See `fmaq.quantize`.
        products: for layers with several products: index of a product in a call of the layer (0, 1 ...), or kind
            ("linear", "attention_scores" ..., as `fmaq.coverage` names them) → a mapping of any of the fields above,
            laid over them. An index may be text, as JSON has it.
        layers: module name or glob → a mapping of any of the fields above, laid over them, or None: torch's own
            product on operands as they are. A name such as "0" may be a whole number, as YAML has it.

    `fmaq.calibrate` chooses offsets, gains, shifts, ranges and the biases of templates ("M7E4").

    Raises:
        TypeError, ValueError: a key or value is wrong; the message names it and what it may be.
    """

    products: Mapping[int | str, Mapping[str, Any]] = field(default_factory=dict)
    layers: Mapping[str, Mapping[str, Any] | None] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in RULE_FIELDS:
            object.__setattr__(self, name, _checked(name, getattr(self, name)))
        if not isinstance(self.layers, Mapping):
            raise TypeError(f"layers must map module names to overrides or None, got {self.layers!r}")
        layers = _renamed("layers", self.layers, _layer_name)
        object.__setattr__(self, "layers", {name: _checked_entry(name, entry) for name, entry in layers.items()})

    def __hash__(self) -> int:
        return hash(tuple(_hashable(getattr(self, f.name)) for f in fields(self)))

    def __repr__(self) -> str:
        """What differs from the defaults, in a few lines; `to_mapping` says all of it."""
        return in_short(self)

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
        """Read a YAML file written by `save` or by hand, and the vectors beside it where it names them.

        Args:
            path: of the file, or of the folder to which an attached model was saved by `save_pretrained`.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: it is empty, not a policy, or gives a key twice; the message names the file and the key.
        """
        import yaml

        from fmaq.emulation.yaml_text import load_yaml

        path = Path(path) / POLICY_FILE if Path(path).is_dir() else Path(path)
        try:
            content, _ = load_yaml(path.read_text(encoding="utf-8"))
            if content is None:
                raise ValueError('the file says nothing; a policy that emulates nothing is written "accumulator: fp32"')
            return cls.parse(vector_files.filled_in(content, path))
        except (yaml.YAMLError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write a YAML file, whole or not at all; its folder is made where it is missing.

        Long vectors go into a safetensors file beside it, whose name ends with a hash of what is in it. The YAML file
        is what makes the switch: until it is in its place, the old one and its vectors stay as they were.
        """
        from fmaq.emulation.yaml_text import dump_yaml

        path = Path(path)
        if path.is_dir():
            raise IsADirectoryError(f"{path} is a folder; give the name of a file in it, such as policy.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        old = vector_files.no_longer_named(path)
        mapping, vectors = vector_files.taken_out(self.to_mapping())
        if vectors:
            mapping = {**mapping, vector_files.KEY: vector_files.write(path, vectors)}
        write_bytes(path, dump_yaml(mapping).encode())
        if old is not None and old.name != mapping.get(vector_files.KEY):
            old.unlink(missing_ok=True)

    def to_mapping(self) -> dict[str, Any]:
        """The fields that differ from their defaults, as plain values for YAML or JSON; `parse` reads it back."""
        values: dict[str, Any] = {}
        for f in fields(self):
            value = getattr(self, f.name)
            default = {} if f.default is MISSING else f.default
            if value != default:
                values[f.name] = _plain(value)
        return values

    def replace(self, *, underflow: bool | None = None, **changes: Any) -> Policy:
        """A copy with other fields.

        Args:
            underflow: switched in every accumulator, those of `layers` too.
            **changes: the constructor's arguments. A new `accumulator` takes the place of every accumulator, those of
                `layers` and `products` too, but an entry's `"fp32"` stays; offsets, gains and shifts, which were chosen
                for the old ones, go.

        Raises:
            TypeError, ValueError: as the constructor.
        """
        if message := _unknown(changes):
            raise ValueError(message)
        new = replace(self, **changes)
        if "accumulator" in changes:
            kept: dict[str, Any] = {name: changes.get(name) for name in CHOSEN_FIELDS}
            new = replace(new._with_entries(lambda entry: _reset(entry, new.accumulator), changes), **kept)
        if underflow is not None:

            def switched(entry: Mapping[str, Any]) -> Mapping[str, Any]:
                if entry.get("accumulator", FP32) == FP32:
                    return entry
                return {**entry, "accumulator": replace(Accumulator.parse(entry["accumulator"]), underflow=underflow)}

            own = switched({"accumulator": new.accumulator})
            new = replace(new._with_entries(switched), **own)
        return new

    def _with_entries(
        self, change: Callable[[Mapping[str, Any]], Mapping[str, Any]], but: Container[str] = ()
    ) -> Policy:
        """A copy with every entry of `layers` and `products` changed, unless the name of the field is in `but`."""

        def of_products(entries: Mapping[Any, Mapping[str, Any]]) -> dict[Any, Mapping[str, Any]]:
            return {key: change(entry) for key, entry in entries.items()}

        def of_layer(entry: Mapping[str, Any]) -> Mapping[str, Any]:
            entry = change(entry)
            return {**entry, "products": of_products(entry["products"])} if "products" in entry else entry

        layers = {key: entry and of_layer(entry) for key, entry in self.layers.items()}
        changed: dict[str, Any] = {"layers": layers, "products": of_products(self.products)}
        return replace(self, **{name: value for name, value in changed.items() if name not in but})

    def for_layer(self, *names: str) -> Rule | None:
        """The rule of a layer, or None where it is to be left alone.

        Args:
            names: the module's full name, and its others if it is registered under several; "" is the model itself.
        """
        best: tuple[tuple[bool, int, int], str] | None = None
        for position, key in enumerate(self.layers):
            if any(speaks_for(key, name) for name in names):
                rank = (key in names, _literal_characters(key), position)
                if best is None or rank > best[0]:
                    best = (rank, key)
        own = {name: getattr(self, name) for name in RULE_FIELDS}
        if best is None:
            return Rule(**own)
        key, entry = best[1], self.layers[best[1]]
        if entry is not None and not any(key == name or fnmatchcase(name, key) for name in names):
            entry = handed_down(entry)
        return None if entry is None else Rule(**{**own, **entry})

    def check_names(self, names: Iterable[str]) -> None:
        """Refuse an entry that matches none of a model's module names.

        Raises:
            ValueError: naming the entry and the nearest module.
        """
        known = list(names)
        for key in self.layers:
            if not any(key == name or fnmatchcase(name, key) for name in known):
                hint = _unwrapped(key, known) or _nearest(key, known)
                raise ValueError(f"layers: {key!r} matches no module of the model{hint}")


def speaks_for(key: str, name: str) -> bool:
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


def _unwrapped(key: str, names: Iterable[str]) -> str | None:
    """The name that an entry means if a wrapper's (`_orig_mod`, `base_model.model`) is missing in it, or too many."""
    for name in names:
        if fnmatchcase(name, f"*.{key}"):
            return f"; did you mean {name if _literal_characters(key) == len(key) else f'*.{key}'!r}?"
        if name and key.endswith(f".{name}"):
            return f"; did you mean {name!r}?"
    return None


def _unknown(keys: Iterable[Any]) -> str | None:
    """What to say of the first key that is no field of a policy; None where all are."""
    names = [f.name for f in fields(Policy)]
    for key in keys:
        if key not in names:
            return f"a policy has no {key!r}{_nearest(str(key), names)} It has: {', '.join(names)}"
    return None


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Vector):
        return value.to_plain()
    return str(value) if isinstance(value, Accumulator) else value


def _hashable(value: Any) -> Any:
    return tuple((k, _hashable(v)) for k, v in value.items()) if isinstance(value, Mapping) else value


def _reset(entry: Mapping[str, Any], accumulator: Accumulator | str) -> dict[str, Any]:
    """An entry with another accumulator in place of its own, and without what was chosen for that."""
    kept = {name: value for name, value in entry.items() if name not in CHOSEN_FIELDS}
    return {**kept, "accumulator": accumulator} if kept.get("accumulator", FP32) != FP32 else kept


def _renamed(what: str, entries: Mapping[Any, Any], name_of: Callable[[Any], Any]) -> dict[Any, Any]:
    """Entries by the names that their keys stand for, each given once."""
    named: dict[Any, Any] = {}
    for key, entry in entries.items():
        name = name_of(key)
        if name in named:
            raise ValueError(f"{what}: {name!r} is given twice, as a number and as text")
        named[name] = entry
    return named


def _layer_name(key: Any) -> str:
    if isinstance(key, int) and not isinstance(key, bool):
        return str(key)
    if not isinstance(key, str):
        raise TypeError(f'layers: {key!r} is not a module name or a glob over module names; quote it, like "2.10"')
    return key


def _checked_entry(name: str, entry: Any) -> dict[str, Any] | None:
    return None if entry is None else _checked_fields(f"layers: {name!r}", entry, RULE_FIELDS)


def _checked_fields(where: str, entry: Any, known: tuple[str, ...]) -> dict[str, Any]:
    if not isinstance(entry, Mapping):
        raise TypeError(f"{where} must have a mapping like {{accumulator: fp32}}, or null; got {entry!r}")
    for name in entry:
        if name not in known:
            hint = _nearest(str(name), known)
            raise ValueError(f"{where} has no {name!r}{hint} It may have: {', '.join(known)}")
    try:
        return {name: _checked(name, value) for name, value in entry.items()}
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where}: {error}") from error


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
    if name in ("per_token", "weight_per_channel"):
        if not isinstance(value, bool):
            raise TypeError(f"{name} must be true or false, got {value!r}")
        return value
    if name == "noise":
        if value not in NOISE:
            raise ValueError(f"noise {value!r} is none of: {', '.join(NOISE)}{_nearest(str(value), NOISE)}")
        return value
    if name in OWN_FIELDS:
        return _vector(name, value)
    if name == "products":
        return _products(value)
    return _tensor_format(name, value)


def _vector(name: str, value: Any) -> Vector | None:
    if value is None or isinstance(value, Vector):
        return value
    if isinstance(value, str):
        if vector_files.IS_NUMBER.fullmatch(value):
            raise TypeError(f"{name} {value!r} is text; write the number without quotes")
        raise TypeError(f"{name} {value!r} names a vector in a file; read the policy with fmaq.Policy.load")
    try:
        vector = Vector(value, whole=name == "offset")
    except (TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error}") from error
    if name in RANGE_FIELDS and (vector.array.min() < 0 or vector.array.ndim > 1):
        raise ValueError(f"{name} must be a largest magnitude, or one an output channel; got {value!r}")
    return vector


def _products(value: Any) -> dict[int | str, dict[str, Any]]:
    if not isinstance(value, Mapping):
        raise TypeError(f"products must map a product's index or kind to what differs for it, got {value!r}")
    entries = _renamed("products", value, _product_name)
    return {key: _checked_fields(f"products: {key!r}", entry, PRODUCT_FIELDS) for key, entry in entries.items()}


def _product_name(key: Any) -> int | str:
    """An index, which JSON has as text, or a kind."""
    if isinstance(key, bool) or not isinstance(key, (int, str)):
        raise TypeError(f'products: {key!r} is neither an index, like 0, nor a kind, like "attention_scores"')
    if isinstance(key, str) and not re.fullmatch(r"-?\d+", key):
        if key not in KINDS:
            raise ValueError(f"products: there is no kind {key!r}{_nearest(key, KINDS)} There are: {', '.join(KINDS)}")
        return key
    if int(key) < 0:
        raise ValueError(f"products: {key!r} is no index: they count a layer's products from 0, in the order of a call")
    return int(key)


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
        raise ValueError(f"{name} must be {known}; got {value!r}{meant_by(value)}") from error
    return f"int{parsed}" if isinstance(parsed, int) else str(parsed)
