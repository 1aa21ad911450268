"""From what was chosen for each product to a policy: entries of the layers that were met, and of those that were not.

What a policy says of layers that were not met, and of products that are to stay in float32, it says afterwards, too;
only formats that still lack a bias are given one.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn

from fmaq.analysis.fit import Fit, bias_of, placed
from fmaq.emulation.policy import CHOSEN_FIELDS, FP32, PRODUCT_FIELDS, RULE_FIELDS, Policy, Rule
from fmaq.emulation.products import Place
from fmaq.emulation.vectors import Vector
from fmaq.numerics import Accumulator, FloatFormat

FITTED = ("accumulator", *CHOSEN_FIELDS)
"""What every entry of a product that was met says."""


def fitted(model: nn.Module, policy: Policy, fits: Mapping[Place, Fit]) -> Policy:
    """The policy with what was chosen for the products of a model."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    by_layer: dict[str, list[Place]] = {}
    for place in fits:
        by_layer.setdefault(place.layer, []).append(place)
    writer = _Writer(policy, fits)
    entries = {key: writer.completed(entry) for key, entry in policy.layers.items()}
    for aliases in names.values():
        layer, rule = aliases[0], policy.for_layer(*aliases)
        if layer in by_layer and rule is not None:
            entries = {key: entry for key, entry in entries.items() if key not in aliases}
            entries[layer] = writer.met(rule, by_layer[layer])
    products = {key: writer.completed(entry) or {} for key, entry in policy.products.items()}
    new = replace(policy, accumulator=writer.filled(policy.accumulator), products=products, layers=entries)
    for aliases in names.values():
        wanted, found = policy.for_layer(*aliases), new.for_layer(*aliases)
        if aliases[0] not in by_layer and not _is_alike(wanted, found):
            entries = {**entries, aliases[0]: None if wanted is None else writer.unmet(wanted)}
    return replace(new, layers=entries)


def ruled(rule: Rule, fit: Fit) -> Rule:
    """The rule with what was chosen."""
    return replace(
        rule,
        accumulator=fit.accumulator,
        offset=None if fit.offset is None else Vector(fit.offset, whole=True),
        gain=as_vector(fit.gain),
        shift=as_vector(fit.shift),
        a_max=as_vector(fit.a_max),
        b_max=as_vector(fit.b_max),
    )


def as_vector(x: Tensor | None) -> Vector | None:
    """The numbers as a policy keeps them, in float32."""
    return None if x is None else Vector(x.float(), whole=False)


def template_of(acc: Accumulator) -> Accumulator:
    """The accumulator without biases, and without its chunk."""

    def bare(format: Any) -> Any:
        return replace(format, bias=None) if isinstance(format, FloatFormat) else format

    return replace(acc, format=bare(acc.format), product=bare(acc.product), chunk=None)


@dataclass(frozen=True)
class _Writer:
    """Writes entries of a policy's `layers`."""

    policy: Policy
    fits: Mapping[Place, Fit]

    def met(self, rule: Rule, places: list[Place]) -> dict[str, Any]:
        """Of a layer with one product: what that has is the layer's. With several: each by its index."""
        first = ruled(rule, self.fits[places[0]])
        if len(places) == 1 and places[0].index == 0 and not rule.products:
            return self._entry(first)
        products: dict[int | str, Any] = {key: self.completed(entry) for key, entry in rule.products.items()}
        for place in places:
            of_product = ruled(rule.for_product(place.kind, place.index), self.fits[place])
            products[place.index] = {
                name: getattr(of_product, name)
                for name in PRODUCT_FIELDS
                if name in FITTED or getattr(of_product, name) != getattr(rule, name)
            }
        own = rule.accumulator if rule.accumulator == FP32 else first.accumulator
        return self._entry(replace(rule, accumulator=own, products=products))

    def unmet(self, rule: Rule) -> dict[str, Any]:
        """Of a layer that was not met."""
        products = {key: self.completed(entry) or {} for key, entry in rule.products.items()}
        return self._entry(replace(rule, accumulator=self.filled(rule.accumulator), products=products))

    def _entry(self, rule: Rule) -> dict[str, Any]:
        """The fields in which a rule differs from the policy's own, and those that are chosen."""
        differing = [name for name in RULE_FIELDS if getattr(rule, name) != getattr(self.policy, name)]
        return {name: getattr(rule, name) for name in dict.fromkeys((*FITTED, *differing))}

    def completed(self, entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """An entry without formats that still lack a bias."""
        if entry is None:
            return None
        completed = dict(entry)
        if "accumulator" in entry:
            completed["accumulator"] = self.filled(entry["accumulator"])
        if "products" in entry:
            completed["products"] = {key: self.completed(one) for key, one in entry["products"].items()}
        return completed

    def filled(self, acc: Accumulator | str) -> Accumulator | str:
        """An accumulator with the biases usual among products of its format; if there is none, its own or others'."""
        if not isinstance(acc, Accumulator):
            return acc
        chosen = (fit.accumulator for fit in self.fits.values())
        found = sorted((one for one in chosen if isinstance(one, Accumulator)), key=lambda one: bias_of(one.format))
        alike = [one for one in found if template_of(one) == template_of(acc)]
        if alike:
            return alike[len(alike) // 2]
        if not (acc.is_template and found):
            return acc
        usual = found[len(found) // 2]
        top = usual.format.emax if isinstance(usual.format, FloatFormat) else 0
        return placed(acc, top, bias_of(usual.product) - bias_of(usual.format))


def _is_alike(wanted: Rule | None, found: Rule | None) -> bool:
    """A layer that was not met still has the rule that it had, but perhaps for biases and chunks."""
    if wanted is None or found is None:
        return wanted is found
    return _without_biases(wanted) == _without_biases(found)


def _without_biases(rule: Rule) -> tuple[dict[str, Any], dict[int | str, dict[str, Any]]]:
    """A rule's fields, and those of its products that differ, with templates of accumulators."""

    def bare(values: Mapping[str, Any]) -> dict[str, Any]:
        acc = values["accumulator"]
        return {**values, "accumulator": template_of(acc) if isinstance(acc, Accumulator) else acc}

    own = bare({name: getattr(rule, name) for name in PRODUCT_FIELDS})
    products = {key: bare({**own, **entry}) for key, entry in rule.products.items()}
    return own, {key: values for key, values in products.items() if values != own}
