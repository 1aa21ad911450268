"""What happens to the products of one layer: an immutable value, which a policy gives to each module."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch

from fmaq.emulation.in_short import in_short
from fmaq.emulation.noise import BY_CALL
from fmaq.emulation.vectors import Vector
from fmaq.numerics import Accumulator

FP32 = "fp32"
CHOSEN_FIELDS = ("offset", "gain", "shift")
"""What is chosen for one accumulator, by `calibrate` say."""

RANGE_FIELDS = ("a_max", "b_max")
"""How large the operands' formats reach, where that is no matter of the data at run time."""

OWN_FIELDS = (*CHOSEN_FIELDS, *RANGE_FIELDS)
"""What a module's own products have, and the modules inside it do not."""


@dataclass(frozen=True, repr=False)
class OfProduct:
    """What may be said of one product, of a layer's, and of a model's: see `Rule`."""

    accumulator: Accumulator | str = FP32
    weight: str | None = None
    activation: str | None = None
    estimator: str = "identity"
    backward: Accumulator | None = None
    per_token: bool = False
    weight_per_channel: bool = False
    noise: str = BY_CALL
    offset: Vector | None = None
    gain: Vector | None = None
    shift: Vector | None = None
    a_max: Vector | None = None
    b_max: Vector | None = None


PRODUCT_FIELDS = tuple(each.name for each in fields(OfProduct))
RULE_FIELDS = (*PRODUCT_FIELDS, "products")

RECURRENT_KINDS = ("linear_input", "linear_hidden", "linear_projection")
"""Products of a recurrent layer or cell: weight_ih, weight_hh and weight_hr are their weights."""

KINDS = (
    *("linear", "matmul", "attention_scores", "attention_values", "einsum", "tensordot", "inner", "vecdot", "bilinear"),
    *(f"conv{transposed}{d}d" for transposed in ("", "_transpose") for d in (1, 2, 3)),
    *RECURRENT_KINDS,
    "grouped_mm",
)
"""Kinds of products that can be emulated, as `fmaq.coverage` names them."""


@dataclass(frozen=True, repr=False)
class Rule(OfProduct):
    """What happens to the products of one layer.

    Attributes:
        accumulator: of the products; `"fp32"` is torch's own product.
        weight: format that weights are quantized to, or None.
        activation: format that activations are quantized to, or None.
        estimator: of the gradients, see `fmaq.matmul`.
        backward: accumulator of the gradient products, see `fmaq.matmul`; None is float32.
        per_token: each token has an exponent of its own, found at run time; see `fmaq.matmul`.
        weight_per_channel: every output channel of a weight has a bias or scale of its own.
        noise: of stochastic rounding, `"by_call"` or `"repeated"`; see `fmaq.emulation.noise`.
        offset, gain, shift: of the output channels (or heads), see `fmaq.matmul`; None where there is none.
        a_max, b_max: the largest magnitudes that the formats of a product's two operands are made for, see
            `fmaq.quantize`; None: those of the tensors, found at run time.
        products: what differs for single products, by their index in a call or by kind.
    """

    products: Mapping[int | str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        """Note what is asked for in every product; `_derived` are rules that were made of this one."""
        chosen = {name: getattr(self, name) for name in CHOSEN_FIELDS}
        how = {"estimator": self.estimator, "backward": self.backward, "per_token": self.per_token}
        how |= {k: v.tensor for k, v in chosen.items() if v is not None}
        is_plain = self.accumulator == FP32 and self.weight is None and self.activation is None
        is_plain = is_plain and all(rule.is_plain for rule in self.of_products())
        for name, value in (("_how", how), ("_is_plain", is_plain), ("_derived", {})):
            object.__setattr__(self, name, value)

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def __setstate__(self, state: Mapping[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def is_plain(self) -> bool:
        """Nothing is emulated and nothing quantized in any product: torch's own products."""
        return self._is_plain  # type: ignore[attr-defined]

    @property
    def how(self) -> dict[str, Any]:
        """What a product is told beside its accumulator: keywords of `fmaq.matmul`, `linear` and convolutions."""
        return dict(self._how)  # type: ignore[attr-defined]

    def for_product(self, kind: str, index: int) -> Rule:
        """The rule of one product of the layer: what `products` says of its index, else of its kind, laid over this."""
        if not self.products:
            return self
        key = index if index in self.products else kind if kind in self.products else None
        entry = {} if key is None else self.products[key]
        return self._once(("product", key), lambda: replace(self, **{"products": {}, **entry}))

    def for_heads(self, heads: int) -> Rule:
        """The rule of one product for so many heads: numbers by head are repeated for the heads of a group."""
        return self._once(("heads", heads), lambda: self._for_heads(heads))

    def _for_heads(self, heads: int) -> Rule:
        repeated: dict[str, Any] = {}
        for name in CHOSEN_FIELDS:
            vector = getattr(self, name)
            times = 1 if vector is None else heads // (heads_of(vector) or heads)
            if times > 1 and times * heads_of(vector) == heads:
                repeated[name] = vector.repeated(times)
        return replace(self, **repeated) if repeated else self

    def _once(self, key: tuple[str, int | str | None], make: Callable[[], Rule]) -> Rule:
        if torch.compiler.is_compiling():
            return make()
        known: dict[tuple[str, int | str | None], Rule] = self._derived  # type: ignore[attr-defined]
        if key not in known:
            known[key] = make()
        return known[key]

    def handed_down(self) -> Rule:
        """What is inherited by modules inside: all but what was chosen for the layer's own sums."""
        products: dict[int | str, Mapping[str, Any]] = {
            kind: handed_down(entry) for kind, entry in self.products.items() if isinstance(kind, str)
        }
        none: dict[str, Any] = dict.fromkeys(OWN_FIELDS)
        return replace(self, products=products, **none)

    @property
    def is_noisy(self) -> bool:
        """Something is rounded stochastically, by random numbers of its call."""
        rules = [rule for rule in (self, *self.of_products()) if rule.noise == BY_CALL]
        parts = [part for rule in rules for part in (rule.accumulator, rule.backward)]
        return any(isinstance(part, Accumulator) and part.is_stochastic for part in parts)

    def of_products(self) -> list[Rule]:
        """The rules of the products that differ."""
        return [replace(self, **{"products": {}, **entry}) for entry in self.products.values()]

    def __repr__(self) -> str:
        return in_short(self)


def heads_of(vector: Vector | None) -> int:
    """How many heads have a number of their own; 0 where none has."""
    return vector.shape[-2] if vector is not None and len(vector.shape) > 1 and vector.shape[-2] > 1 else 0


def handed_down(entry: Mapping[str, Any]) -> dict[str, Any]:
    """An entry without what was chosen for the matched module's own sums."""
    kept = {name: value for name, value in entry.items() if name not in OWN_FIELDS}
    if "products" in kept:
        kept["products"] = {key: handed_down(one) for key, one in kept["products"].items()}
    return kept
