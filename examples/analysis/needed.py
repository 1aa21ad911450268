"""Predicted against measured: what the sums of a recipe's model need, by length alone, and on its own operands.

    python examples/analysis/needed.py examples/resnet20/evaluate.yaml 4

Every product of one forward pass on the first inputs of the recipe's data (how many is the second argument) is formed
again with short mantissas, exponents unbounded and chunks of 16. To the nearest, its products exact: the mantissa from
which the variance is kept (e^(K·|1 − ratio|) < 50, the ratio that of mean squares). With M7 truncated, products too:
the noise after the best gain.
Products of one kind and length share a line: the lowest, the median and the highest.
"""

import statistics
import sys
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from fmaq import attach, ops
from fmaq.analysis import is_suitable, least_mantissa, simulate
from fmaq.emulation import Product, coverage, listening
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.run import prepare
from fmaq.training.examples import first_inputs

WIDE, ROWS, LARGEST = "M23E7b63 chunk=16", 64, 14
Form = Callable[..., Tensor]


def forms(product: Product) -> tuple[Form, Form, Tensor, Tensor]:
    """The product in short and in float64, and its operands, at most `ROWS` rows of the first."""
    x, w = product.operands
    if product.kind == "linear":
        return ops.linear, F.linear, _some(x.flatten(0, -2)), w
    if product.kind.startswith("conv"):
        short, exact = getattr(ops, product.kind), getattr(F, product.kind)
        return (
            lambda x, w, _, acc: short(x, w, None, acc, **product.options),
            lambda x, w: exact(x, w, None, **product.options),
            x[:2],
            w,
        )
    x, w = (y.flatten(0, -3) if y.dim() > 3 else y for y in (x, w.expand(*x.shape[:-2], *w.shape[-2:])))
    return lambda x, w, _, acc: ops.matmul(x, w, acc), torch.matmul, x[:4], w[:4]


def _some(x: Tensor) -> Tensor:
    return x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:ROWS]]


def measured(product: Product) -> tuple[int, float]:
    """The mantissa from which the variance is kept, to the nearest; the noise of M7 truncated, after the best gain."""
    short, exact_form, x, w = forms(product)
    exact = exact_form(x.double(), w.double())
    scale = 2.0 ** -torch.frexp(exact.abs().max())[1].item()  # into the middle of the wide range
    x, exact = x * scale, exact * scale
    square = float((exact**2).mean())
    least = LARGEST
    for a in reversed(range(LARGEST)):
        acc = f"M{a}E7b63 chunk=16 rounding=nearest_even"
        found = short(x, w, None, acc).double()
        lost = float(((exact - found) * (exact + found)).mean()) / square
        if not is_suitable(1 - abs(lost), product.steps or 0):
            break
        least = a
    cut = short(x, w, None, "M7E7b63 product=M7E7b63 chunk=16").double()
    noise = 1 - float((cut * exact).mean()) ** 2 / (float((cut**2).mean()) * square)
    return least, noise


def main(path: str, count: int) -> None:
    torch.set_num_threads(1)
    ready = prepare(Recipe.load(path))
    inputs = first_inputs(ready.test, count)
    args, named = ((), inputs) if isinstance(inputs, dict) else ((inputs,), {})
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}

    def note(product: Product) -> None:
        if product.steps and product.steps > 1 and product.reason is None:
            found.setdefault((product.kind, product.steps), []).append(measured(product))

    attach(ready.model, WIDE)
    with listening(note):
        coverage(ready.model, *args, **named)
    print(
        "| product | K | how many | predicted mantissa | measured | noise of M7 truncated, simulated | measured |\n"
        "|---|---|---|---|---|---|---|"
    )
    for (kind, steps), values in found.items():
        needs, noises = zip(*values, strict=True)
        simulated = simulate("M7E4 product=M7E4 chunk=16", steps).noise
        highest = f"over {LARGEST - 1}" if max(needs) == LARGEST else str(max(needs))
        needed = f"{min(needs)} … {statistics.median(needs):g} … {highest}"
        noise = f"{min(noises):.1e} … {statistics.median(noises):.1e} … {max(noises):.1e}"
        cells = (kind, steps, len(values), least_mantissa(7, steps, 16), needed, f"{simulated:.1e}", noise)
        print("|", " | ".join(map(str, cells)), "|")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/analysis/needed.py RECIPE EXAMPLES")
    main(sys.argv[1], int(sys.argv[2]))
