"""Does the order of summation matter? Networks under short accumulators, their layers' input channels in five orders.

    python examples/order/compare.py resnet20
    python examples/order/compare.py minilm
    python examples/order/compare.py smollm2

- as trained; random, three draws, their lowest and highest;
- by the size of a channel's terms (the root mean square of the input times the norm of the weights), the smallest
  first (`fmaq.analysis.reorder`) and the largest first;
- balanced: each next channel is the one that keeps the sum of the terms' means nearest to zero over all outputs, so
  that positive and negative terms alternate.

Sizes and means are measured on other data than the network is judged on.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fmaq import attach, detach
from fmaq.analysis import apply_orders, channel_sizes, restore_order
from fmaq.recipes.data import load_data
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.run import prepare
from fmaq.training.tasks import evaluate

EXAMPLES = Path(__file__).resolve().parents[1]
Measure = Callable[[], float]


def resnet20() -> tuple[nn.Module, dict[str, Any], str, Measure, list[str]]:
    """Loss on the 761 test images; sizes from 256 training images."""
    ready = prepare(Recipe.load(EXAMPLES / "resnet20" / "evaluate.yaml"))
    train, _ = load_data(Recipe.load(EXAMPLES / "resnet20" / "finetune-12bit.yaml").data)
    formats = [f"M{m}E4b10 product=M{m}E4b12" for m in (7, 6, 5)]
    calibration = {"input": train.batch(slice(0, 256))[0]}
    model = _ByName(ready.model)
    return model, calibration, "loss", lambda: evaluate(ready.model, ready.test, progress=False)["loss"], formats


def minilm() -> tuple[nn.Module, dict[str, Any], str, Measure, list[str]]:
    """One less the mean cosine of 25 texts' embeddings with their own in float32; sizes from 8 other texts."""
    ready = prepare(Recipe.load(EXAMPLES / "minilm" / "fidelity.yaml"))
    texts = ready.test["pairs"].inputs
    judged, calibration = ({k: v[part] for k, v in texts.items()} for part in (slice(0, 25), slice(25, 33)))
    mask = judged["attention_mask"][..., None]

    def embeddings() -> Tensor:
        with torch.no_grad():
            states = ready.model(**judged).last_hidden_state
        return normalize((states * mask).sum(1) / mask.sum(1))

    expected = embeddings()
    formats = [f"M{m}E4b9 product=M{m}E4b11" for m in (7, 6, 5)]
    return ready.model, calibration, "1 − cosine", lambda: 1 - float((embeddings() * expected).sum(1).mean()), formats


def smollm2() -> tuple[nn.Module, dict[str, Any], str, Measure, list[str]]:
    """Loss on the first window of 512 tokens; sizes from half of the second. Five bits of exponent: four lack range."""
    ready = prepare(Recipe.load(EXAMPLES / "smollm2" / "biases.yaml"))
    window = ready.test.tokens[:1]

    def loss() -> float:
        with torch.no_grad():
            logits = ready.model(input_ids=window).logits[0, :-1]
        return float(nn.functional.cross_entropy(logits, window[0, 1:]))

    formats = [f"M{m}E5b16 product=M{m}E5b18" for m in (7, 6, 5)]
    return ready.model, {"input_ids": ready.test.tokens[1:2, :256]}, "loss", loss, formats


class _ByName(nn.Module):
    """A network whose input has a name."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, input: Tensor) -> Tensor:
        return self.network(input)


def mean_terms(model: nn.Module, calibration: dict[str, Any], names: list[str]) -> dict[str, Tensor]:
    """The mean of each channel's terms in each output, (outputs, channels)."""
    layers, means, handles = dict(model.named_modules()), {}, []
    for name in names:

        def note(layer: nn.Module, args: tuple[Tensor, ...], name: str = name) -> None:
            weight = layer.weight.detach().double().flatten(2) if layer.weight.dim() > 2 else layer.weight[..., None]
            x = args[0].flatten(0, -2) if isinstance(layer, nn.Linear) else args[0].movedim(1, -1).flatten(0, -2)
            means[name] = weight.sum(2).double() * x.double().mean(0)

        handles.append(layers[name].register_forward_pre_hook(note))
    with torch.no_grad():
        model(**calibration)
    for handle in handles:
        handle.remove()
    return means


def balanced(terms: Tensor) -> Tensor:
    """Greedy: the next channel is the one that leaves the smallest sum."""
    products = terms.mT @ terms
    squares, with_sum, order = products.diag().clone(), torch.zeros(len(products), dtype=products.dtype), []
    for _ in range(len(products)):
        k = int((squares + 2 * with_sum).argmin())
        order.append(k)
        squares[k] = torch.inf
        with_sum += products[:, k]
    return torch.tensor(order)


def main() -> None:
    networks = {"resnet20": resnet20, "minilm": minilm, "smollm2": smollm2}
    if len(sys.argv) != 2 or sys.argv[1] not in networks:
        sys.exit(f"name one network: {', '.join(networks)}")
    model, calibration, metric, measure, formats = networks[sys.argv[1]]()
    print(f"{sys.argv[1]}, {metric}: float32 {measure():.4f}")
    sizes = channel_sizes(model, **calibration)
    terms = mean_terms(model, calibration, list(sizes))
    draws = [torch.Generator().manual_seed(seed) for seed in range(3)]
    random = [{name: torch.randperm(len(size), generator=draw) for name, size in sizes.items()} for draw in draws]
    orders: dict[str, list[dict[str, Tensor]]] = {
        "as trained": [{}],
        "random": random,
        "small first": [{name: size.argsort(stable=True) for name, size in sizes.items()}],
        "large first": [{name: size.argsort(descending=True) for name, size in sizes.items()}],
        "balanced": [{name: balanced(terms[name]) for name in sizes}],
    }
    print("| accumulator | " + " | ".join(orders) + " |\n|" + "---|" * (len(orders) + 1))
    for accumulator in formats:
        cells = []
        for tried in orders.values():
            found = []
            for order in tried:
                apply_orders(model, order)
                attach(model, accumulator)
                found.append(measure())
                detach(model)
                restore_order(model)
            cells.append(" … ".join(f"{value:.4f}" for value in sorted({min(found), max(found)})))
        print(f"| {accumulator} | " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
