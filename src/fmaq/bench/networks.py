"""Whole networks against themselves: inference of the examples' pretrained ones, and a training step of ResNet-20."""

from __future__ import annotations

import contextlib
import copy
import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from fmaq.bench.rows import Case, Operation, Row, Unavailable
from fmaq.bench.timing import compare
from fmaq.emulation import Policy, attach, frozen
from fmaq.numerics import Accumulator
from fmaq.recipes.data import load_data
from fmaq.recipes.models import build_model
from fmaq.recipes.recipe import Recipe
from fmaq.training.examples import Inputs, Pairs, Windows
from fmaq.training.tasks import forward

EXAMPLES = Path(__file__).resolve().parents[3] / "examples"
POLICY = Policy(accumulator=Accumulator.paper12)  # weights and activations stay in float32


@dataclass(frozen=True)
class Network:
    """A network of the examples, and a batch for it: of `batch` images, texts or windows, a window cut at `tokens`.

    `target`: the most that inference should take, of the plain network's time.
    """

    name: str
    recipe: str
    target: float
    batch: int
    tokens: int | None = None

    @property
    def work(self) -> str:
        """The batch in words."""
        return f"{self.name}, batch {self.batch}" + (f" × {self.tokens} tokens" if self.tokens else "")


RESNET20 = Network("ResNet-20", "resnet20/evaluate.yaml", 2.0, 64)
SMOLLM2 = Network("SmolLM2-135M", "smollm2/12bit.yaml", 2.8, 1, 128)
NETWORKS = (
    RESNET20,
    Network("EfficientNet-Lite0", "efficientnet_lite0/12bit.yaml", 1.8, 8),
    Network("MiniLM", "minilm/12bit.yaml", 2.8, 8),
    SMOLLM2,
)
PROMPT, NEW_TOKENS = 8, 16


def inference_cases(networks: Sequence[Network] = NETWORKS) -> list[Case]:
    """A forward pass of every network, attached with paper12, against the plain network."""
    return [
        Case(
            Row("networks", network.work, "inference", network.target, against="the plain network"), _inference(network)
        )
        for network in networks
    ]


def decoding_cases(network: Network = SMOLLM2) -> list[Case]:
    """Greedy decoding, attached with paper12, against the plain network: with its weights frozen, and as it is."""
    work = f"{network.name}, {NEW_TOKENS} tokens after {PROMPT}"
    frozen = Row("decoding", work, "greedy, weights frozen", 2.5, against="the plain network")
    usual = Row("decoding", work, "greedy", against="the plain network")
    return [Case(frozen, _decoding(network, True)), Case(usual, _decoding(network, False))]


def training_cases(network: Network = RESNET20) -> list[Case]:
    """A step of training (forward, backward, SGD) with the estimator identity, against the plain network."""
    row = Row("training", network.work, "step, identity", 1.4, against="the plain network")
    return [Case(row, _training(network))]


def load(network: Network) -> tuple[nn.Module, Inputs, Tensor | None]:
    """The module, in eval mode, a batch of inputs, and its targets where it classifies.

    Raises:
        Unavailable: the examples, the weights, the data or a package are missing.
    """
    path = EXAMPLES / network.recipe
    if not path.exists():
        raise Unavailable("the examples are in the source tree only; install fmaq from a checkout")
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # transformers' own progress bars
            recipe = Recipe.load(path)
            model, tokenizer = build_model(recipe.model, str(recipe.task))
            _, data = load_data(recipe.data, recipe.task, tokenizer)
    except (ValueError, OSError, ImportError) as error:
        raise Unavailable(f"{error} (`make fetch` downloads what the examples need)") from error
    return model, *_batch(network, data)


def _batch(network: Network, data: Any) -> tuple[Inputs, Tensor | None]:
    if isinstance(data, Pairs):
        return {name: tensor[: network.batch] for name, tensor in data.inputs.items()}, None
    if isinstance(data, Windows):
        return {"input_ids": data.tokens[: network.batch, : network.tokens]}, None
    inputs, targets = data.batch(slice(0, network.batch))
    return inputs, targets


def sharing_copy(model: nn.Module) -> nn.Module:
    """A copy whose parameters and buffers are the model's own, so that two can be timed in the memory of one."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, shared)


def macs(work: Operation) -> int:
    """Multiply-accumulates of torch's products, convolutions and attention, backward ones too."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    with FlopCounterMode(display=False, custom_mapping={attention: _attention_flops}) as counter:
        work()
    return int(counter.get_total_flops()) // 2


def _attention_flops(
    query: torch.Size, key: torch.Size, value: torch.Size, *rest: Any, out_shape: Any = None, **named: Any
) -> int:
    return int(sdpa_flop_count(query, key, value))


def _inference(network: Network) -> Callable[[Row, int], Row]:
    def measure(row: Row, rounds: int) -> Row:
        plain, inputs, _ = load(network)
        attached = attach(sharing_copy(plain), POLICY)
        with torch.no_grad():
            row = replace(row, macs=macs(lambda: forward(plain, inputs)))
            return row.timed(compare(lambda: forward(attached, inputs), lambda: forward(plain, inputs), rounds))

    return measure


def _decoding(network: Network, is_frozen: bool) -> Callable[[Row, int], Row]:
    def measure(row: Row, rounds: int) -> Row:
        plain, inputs, _ = load(network)
        assert isinstance(inputs, dict)  # of a language model
        attached = attach(sharing_copy(plain), POLICY)
        prompt = inputs["input_ids"][:1, :PROMPT]

        def decode(model: Any) -> Tensor:
            tokens: Tensor = model.generate(
                prompt, max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS, do_sample=False, pad_token_id=0
            )
            return tokens

        with torch.no_grad(), frozen(attached) if is_frozen else contextlib.nullcontext():
            return row.timed(compare(lambda: decode(attached), lambda: decode(plain), rounds))

    return measure


def _training(network: Network) -> Callable[[Row, int], Row]:
    def measure(row: Row, rounds: int) -> Row:
        plain, inputs, targets = load(network)
        assert targets is not None  # it classifies
        theirs = training_step(plain, inputs, targets)
        ours = training_step(attach(copy.deepcopy(plain), POLICY), inputs, targets)
        return replace(row, macs=macs(theirs)).timed(compare(ours, theirs, rounds))

    return measure


def training_step(model: nn.Module, inputs: Inputs, targets: Tensor) -> Operation:
    """One step of SGD, as an operation; the rate is so small that repeating it leaves the model what it is."""
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)

    def step() -> None:
        optimizer.zero_grad()
        nn.functional.cross_entropy(forward(model, inputs), targets).backward()
        optimizer.step()

    return step
