"""What a policy says of products that a run of the model did not have: known only once it ran."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from fmaq.emulation.layer_names import layer_names
from fmaq.emulation.policy import Policy, speaks_for

SHOWN = 8

Product = tuple[str, str, int]
"""Full name of a module, kind and index of a product that it calls."""


def names_of(model: nn.Module) -> dict[str, list[str]]:
    """All names of each layer, by the first of them."""
    names: dict[str, list[str]] = {}
    for aliases in layer_names(model).values():
        names.setdefault(aliases[0], []).extend(aliases)
    return names


def unmet_products(policy: Policy, names: Mapping[str, Sequence[str]], met: Iterable[Product]) -> list[str]:
    """Entries of `products` of which no product met has the index or kind, and what those of the layer have.

    Entries of layers none of whose products were met are not among them, nor what an entry repeats of another that
    speaks for it, too, or of the policy's own.

    Args:
        names: of the model's modules, see `names_of`.
        met: products that the model called.
    """
    known = sorted(set(met), key=lambda product: (product[0], product[2]))
    entries = {"products": (list(policy.products), known)}
    of_entries = {key: (entry or {}).get("products", {}) for key, entry in policy.layers.items()}
    for key, products in of_entries.items():
        if not products:
            continue
        others = [of_entries[other] for other in of_entries if other != key and speaks_for(other, key)]
        own = [wanted for wanted in products if not any(wanted in one for one in (policy.products, *others))]
        spoken_for = [one for one in known if any(speaks_for(key, name) for name in names.get(one[0], (one[0],)))]
        entries[f"layers: {key!r}: products"] = (own, spoken_for)
    return [
        f"{where}: {wanted!r}; there are {_listed(products)}"
        for where, (of_products, products) in entries.items()
        for wanted in of_products
        if products and not any(wanted in (kind, index) for _, kind, index in products)
    ]


def _listed(products: Sequence[Product]) -> str:
    names = list(dict.fromkeys(f"{index} ({kind})" for _, kind, index in products))
    more = len(names) - SHOWN
    return ", ".join(names[:SHOWN]) + (f" and {more} more" if more > 0 else "")
