"""What `calibrate` says of a run: layers that no batch reached, and what may not be as it was meant."""

from __future__ import annotations

import warnings
from collections.abc import Container, Iterable, Mapping

from torch import nn

from fmaq.analysis.batches import CalibrationWarning
from fmaq.analysis.fit import MOST_OFFSET, Trial
from fmaq.analysis.fitted import is_template
from fmaq.analysis.met import Met, own_weights
from fmaq.emulation.layer_names import layer_names
from fmaq.emulation.policy import Policy, speaks_for
from fmaq.emulation.products import Place
from fmaq.emulation.rule import FP32
from fmaq.emulation.unmet import names_of, unmet_products

SHOWN = 12
WITHOUT_PRODUCTS = (nn.Embedding, nn.EmbeddingBag, nn.LayerNorm, nn.RMSNorm)
"""Modules whose weights, of two dimensions perhaps, are in no product that could be emulated."""
STAYS = "what the policy says of them stays as written, and a bias that is missing is the one usual among the others"


def warn(
    model: nn.Module,
    policy: Policy,
    trials: Mapping[Place, Trial],
    empty: Iterable[Place],
    various: Container[Place],
    met: Met,
) -> None:
    """Warn of what a run met, and what it did not.

    Args:
        policy: that was to be calibrated.
        trials: of the products that were met.
        empty: products that were met without any rows.
        various: products that have other weights from call to call.
        met: what else was.
    """
    names = names_of(model)
    layers = [own[0] for module, own in layer_names(model).items() if _is_unmet(module, own, policy, met)]
    entries = [repr(key) for key in _unmet_templates(policy, names, {place.layer for place in trials})]
    rows = [_product(place) for place in sorted(set(empty) - set(trials), key=lambda place: (place.layer, place.index))]
    slices = [
        f"{', '.join(map(str, unmet))} of the {len(weight)} matrices of {name}"
        for name, weight in model.named_parameters()
        if (unmet := met.unmet_slices(weight))
    ]
    beyond = [f"{trial.beyond} of the channels of {_name(place)}" for place, trial in trials.items() if trial.beyond]
    for problem in (
        layers and f"no batch reached {_listed(layers)}: {STAYS}",
        slices and f"no batch reached {_listed(slices)}; what was chosen for others will serve them",
        various
        and f"{_listed([_product(place) for place in trials if place in various])} has other weights from call to call "
        "(those of experts, say), and one choice for all of them",
        rows and f"no batch gave {_listed(rows)} any rows: {STAYS}",
        entries and f"no batch reached a product that layers: {_listed(entries)} speak for: {STAYS}",
        *(f"no batch reached {entry}" for entry in unmet_products(policy, names, met.products)),
        beyond
        and f"offsets beyond ±{MOST_OFFSET} would be needed by {_listed(beyond)}: they have that one, and their sums, "
        "which differ so much from the largest or from what the format holds, may underflow or saturate",
        met.by_mode
        and f"the model is in train mode: {_listed(sorted(met.by_mode))} took part in what was chosen; call "
        "model.eval() before, unless it will be used so",
    ):
        if problem:
            warnings.warn(f"calibrate: {problem}", CalibrationWarning, stacklevel=3)


def _is_unmet(module: nn.Module, aliases: Iterable[str], policy: Policy, met: Met) -> bool:
    """It has weights that the policy wants emulated, and neither it nor they took part."""
    if isinstance(module, WITHOUT_PRODUCTS) or not own_weights(module) or met.has_met(module):
        return False
    rule = policy.for_layer(*aliases)
    return rule is not None and any(one.accumulator != FP32 for one in (rule, *rule.of_products()))


def _unmet_templates(policy: Policy, names: Mapping[str, list[str]], layers: Iterable[str]) -> list[str]:
    """Keys of entries with a template that no layer of `layers` is spoken for by."""
    met = [alias for layer in layers for alias in names[layer]]
    return [
        key
        for key, entry in policy.layers.items()
        if entry is not None
        and is_template(entry.get("accumulator", FP32))
        and not any(speaks_for(key, name) for name in met)
    ]


def _product(place: Place) -> str:
    return f"{place.kind} {place.index} of {_name(place)}"


def _name(place: Place) -> str:
    return place.layer or "the model itself"


def _listed(names: list[str]) -> str:
    more = len(names) - SHOWN
    return ", ".join(name or "the model itself" for name in names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
