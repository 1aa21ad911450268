"""From what was chosen for each product to a policy: entries of the layers that were met, and of those that were not.

What a policy says of layers and products that were not met, and of products that are to stay in float32, it says
afterwards, too, as written; only formats that lack a bias are given one, that usual among the others.
"""

from __future__ import annotations

from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, nn

from fmaq.analysis.biases import (
    bare,
    bias_for,
    bias_of,
    distances_of,
    outer_formats,
    top_of,
    with_biases,
)
from fmaq.analysis.fit import Fit
from fmaq.emulation.layer_names import layer_names
from fmaq.emulation.policy import Policy
from fmaq.emulation.products import Place
from fmaq.emulation.rule import CHOSEN_FIELDS, FP32, PRODUCT_FIELDS, RULE_FIELDS, Rule
from fmaq.emulation.unmet import names_of
from fmaq.emulation.vectors import Vector
from fmaq.numerics import Accumulator, FloatFormat

FITTED = ("accumulator", *CHOSEN_FIELDS)
"""What every entry of a product that was met says."""


def fitted(
    model: nn.Module, given: Policy, run: Policy, fits: Mapping[Place, Fit], called: Container[nn.Module]
) -> Policy:
    """The policy with what was chosen for the products of a model.

    Args:
        given: what was to be calibrated.
        run: what the model was run with, which may differ in `per_token`.
        called: modules that were. One that has no products even so may inherit other biases.
    """
    names = names_of(model)
    by_layer: dict[str, list[Place]] = {}
    for place in fits:
        by_layer.setdefault(place.layer, []).append(place)
    writer = _Writer(run, fits)
    entries = {key: writer.completed(entry) for key, entry in given.layers.items()}
    for layer, places in by_layer.items():
        aliases = names[layer]
        entries = {key: entry for key, entry in entries.items() if key not in aliases}
        entries[layer] = writer.met(_rule(given, aliases), _rule(run, aliases), places)
    own = writer.completed({"accumulator": given.accumulator, "products": given.products})
    new = replace(given, **(own or {}), layers=entries)
    for module, aliases in layer_names(model).items():  # outer modules before inner ones, which inherit
        layer = aliases[0]
        if layer in by_layer:
            continue
        rule = given.for_layer(*aliases)
        wanted = None if rule is None else writer.unmet(rule)
        if not _is_alike(wanted, new.for_layer(*aliases), but_for_biases=module in called):
            new = replace(new, layers={**new.layers, layer: None if wanted is None else writer.entry(wanted)})
    return new


def _rule(policy: Policy, aliases: Sequence[str]) -> Rule:
    """Of a layer that was met."""
    rule = policy.for_layer(*aliases)
    assert rule is not None
    return rule


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
    return replace(bare(acc), chunk=None)


def is_template(accumulator: Accumulator | str) -> bool:
    """A bias is still to be chosen."""
    return isinstance(accumulator, Accumulator) and accumulator.is_template


@dataclass(frozen=True)
class _Writer:
    """Writes entries of a policy's `layers`.

    Attributes:
        policy: that the model was run with.
        fits: of the products that were met.
        usual: what stands in for each template that has been asked for.
    """

    policy: Policy
    fits: Mapping[Place, Fit]
    usual: dict[Accumulator, Accumulator] = field(default_factory=dict)

    def met(self, given: Rule, run: Rule, places: list[Place]) -> dict[str, Any]:
        """Of a layer with one product: what that has is the layer's. With several: each by its index."""
        if len(places) == 1 and places[0].index == 0 and not run.products:
            return self.entry(ruled(run, self.fits[places[0]]))
        unmet = self.unmet(given)
        if is_template(given.accumulator):  # of a product that comes later: rather what the layer's others have
            template = Accumulator.parse(given.accumulator)
            for acc in (self.fits[place].accumulator for place in reversed(places)):
                if isinstance(acc, Accumulator) and template_of(acc) == template_of(template):
                    unmet = replace(unmet, accumulator=replace(acc, chunk=template.chunk))
        products: dict[int | str, Any] = dict(unmet.products)
        for place in places:
            of_product = ruled(run.for_product(place.kind, place.index), self.fits[place])
            products[place.index] = _differing(of_product, unmet, FITTED)
        return self.entry(replace(unmet, products=products))

    def unmet(self, rule: Rule) -> Rule:
        """Of a layer that was not met: as it is, with biases where they are missing."""
        own = self._filled_rule(replace(rule, products={}))
        products = {
            key: _differing(self._filled_rule(replace(rule, **{"products": {}, **entry})), own, entry)
            for key, entry in rule.products.items()
        }
        return replace(own, products=products)

    def entry(self, rule: Rule) -> dict[str, Any]:
        """The fields in which a rule differs from the policy's own, and those that are chosen."""
        differing = [name for name in RULE_FIELDS if getattr(rule, name) != getattr(self.policy, name)]
        stated = ("per_token",) if self.policy.per_token else ()  # which the policy that was given may not say
        return {name: getattr(rule, name) for name in dict.fromkeys((*FITTED, *stated, *differing))}

    def completed(self, entry: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        """An entry without formats that still lack a bias."""
        if entry is None:
            return None
        completed = dict(entry)
        if is_template(entry.get("accumulator", FP32)):
            completed["accumulator"] = self._filled(entry["accumulator"])
            if self.policy.per_token:
                completed.setdefault("per_token", True)
        if "products" in entry:
            completed["products"] = {key: self.completed(one) for key, one in entry["products"].items()}
        return completed

    def _filled_rule(self, rule: Rule) -> Rule:
        if not is_template(rule.accumulator):
            return rule
        return replace(
            rule, accumulator=self._filled(rule.accumulator), per_token=rule.per_token or self.policy.per_token
        )

    def _filled(self, template: Accumulator | str) -> Accumulator:
        template = Accumulator.parse(template)
        if template not in self.usual:
            self.usual[template] = self._usual(template)
        return self.usual[template]

    def _usual(self, template: Accumulator) -> Accumulator:
        """A template with the biases usual among products of its format; if there is none, among the others."""
        chosen = (fit.accumulator for fit in self.fits.values())
        found = sorted((one for one in chosen if isinstance(one, Accumulator)), key=lambda one: bias_of(one.format))
        alike = [one for one in found if template_of(one) == template_of(template)]
        if alike:
            return replace(alike[len(alike) // 2], chunk=template.chunk)
        if not found:
            return template
        return _placed_like(template, found[len(found) // 2])


def _placed_like(template: Accumulator, usual: Accumulator) -> Accumulator:
    """A template for sums as large as those of an accumulator with other formats."""
    outers = [format.emax for format in outer_formats(usual) if isinstance(format, FloatFormat)]
    whole = outers[-1] if outers else top_of(usual)
    own = top_of(usual) if template.outer is not None else whole
    product_bias = bias_for(template.format, own) + distances_of(usual)[0]
    wholes = [bias_for(format, whole) for format in outer_formats(template)]
    return with_biases(template, [bias_for(template.format, own), product_bias, *wholes])


def _differing(rule: Rule, other: Rule, stated: Container[str]) -> dict[str, Any]:
    """The fields of a product's rule that differ from another's, and those that are to be stated anyway."""
    return {
        name: getattr(rule, name)
        for name in PRODUCT_FIELDS
        if name in stated or getattr(rule, name) != getattr(other, name)
    }


def _is_alike(wanted: Rule | None, found: Rule | None, but_for_biases: bool) -> bool:
    """Two rules say the same of every product."""
    if wanted is None or found is None:
        return wanted is found
    return _by_product(wanted, but_for_biases) == _by_product(found, but_for_biases)


def _by_product(rule: Rule, but_for_biases: bool) -> tuple[Rule, dict[int | str, Rule]]:
    """A rule without its products, and the rules of those that differ from it."""

    def compared(rule: Rule) -> Rule:
        acc = rule.accumulator
        if not (but_for_biases and isinstance(acc, Accumulator)):
            return rule
        return replace(rule, accumulator=template_of(acc), per_token=False)

    own = compared(replace(rule, products={}))
    products = {key: compared(replace(rule, **{"products": {}, **entry})) for key, entry in rule.products.items()}
    return own, {key: one for key, one in products.items() if one != own}
