"""`generate` of attached models: what NumPy generates, and with a key-value cache the bits of the forward without."""

import warnings

import pytest
import torch
from torch import nn

from apart import ACCUMULATOR, Apart
from fmaq import attach, calibrate, detach
from fmaq.emulation import FmaqCoverageWarning, listening
from huggingface_cases import inputs, tiny

KINDS = ("gpt2", "llama", "t5")
PROMPT = torch.tensor([[3, 7, 1, 9, 12], [5, 2, 8, 4, 6]])


def generated(model: nn.Module, prompt: torch.Tensor = PROMPT, **how) -> tuple[torch.Tensor, torch.Tensor]:
    """The tokens, and the logits that they were chosen by: (steps, sequences, words)."""
    torch.manual_seed(1)
    how = {"max_new_tokens": 8, "return_dict_in_generate": True, "output_logits": True, **how}
    out = model.generate(prompt, **how)
    return out.sequences, torch.stack(out.logits)


def same(a: tuple[torch.Tensor, ...], b: tuple[torch.Tensor, ...]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize(
    "how",
    [{"do_sample": False}, {"do_sample": True, "top_k": 20}, {"num_beams": 3, "do_sample": False}],
    ids=["greedy", "sampling", "beams"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_generated_is_what_numpy_generates(kind, how) -> None:
    model = tiny(kind)
    with Apart():
        expected = generated(model, **how)
    plain = generated(model, **how)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FmaqCoverageWarning)
        found = generated(attach(model, ACCUMULATOR), **how)
    assert same(found, expected)
    assert not torch.equal(found[1], plain[1]) and len(set(expected[0].flatten().tolist())) > 1
    fused = tiny(kind, "sdpa")
    assert same(generated(attach(fused, ACCUMULATOR), **how), expected)
    assert same(generated(detach(model), **how), plain)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("kind", ["gpt2", "llama"])
def test_generating_from_one_token_is_what_numpy_generates(kind, attention) -> None:
    """The first step of attention has one key: one product to each sum, which is rounded as every other."""
    with Apart():
        expected = generated(tiny(kind), PROMPT[:, :1], do_sample=False)
    model, seen = attach(tiny(kind, attention), ACCUMULATOR), []
    with listening(seen.append):
        assert same(generated(model, PROMPT[:, :1], do_sample=False), expected)
    assert {p.kind for p in seen if p.reason is not None} <= {"matmul"}  # Llama's angles
    assert all(p.operands[1].shape[1] == 1 for p in seen if p.reason is not None)


POLICIES = {
    "half units and levels": lambda _: {"accumulator": "M5E4b10h product=M5E4b12h outer=M10E5b16 chunk=16"},
    "by token": lambda _: {"accumulator": ACCUMULATOR, "per_token": True},
    "formats with a bias": lambda _: {"accumulator": ACCUMULATOR, "weight": "M4E3", "activation": "M4E3b9"},
    "calibrated": lambda fit: fit("M7E4 product=M7E4 chunk=16", per="channel"),
    "static ranges": lambda fit: fit(
        {"accumulator": "M7E4 product=M7E4", "weight": "M4E3", "activation": "M4E3"}, per="channel", ranges="static"
    ),
    "integer engine": lambda fit: fit(
        {"accumulator": "I20f0", "weight": "int8", "activation": "int8"}, ranges="static"
    ),
}


@pytest.mark.parametrize(
    ("kind", "policy"),
    [
        ("gpt2", "half units and levels"),
        ("gpt2", "integer engine"),
        ("llama", "by token"),
        ("llama", "calibrated"),
        ("llama", "static ranges"),
        ("t5", "half units and levels"),
        ("t5", "formats with a bias"),
    ],
)
def test_with_a_cache_each_row_has_the_bits_of_the_whole_forward(kind, policy) -> None:
    """Eight keys at most: of nine to fifteen and zeros behind them, torch's softmax may round otherwise."""
    model = tiny(kind, "sdpa", **({"num_hidden_layers": 1} if kind == "llama" else {}))
    batches = [{k: v for k, v in inputs(kind, 12).items() if kind == "t5" or k != "labels"}]
    attach(model, POLICIES[policy](lambda policy, **how: calibrate(model, policy, batches, **how)))
    prompt = PROMPT[:, :2]
    cached = generated(model, prompt, max_new_tokens=6, do_sample=False)
    assert same(generated(model, prompt, max_new_tokens=6, do_sample=False, use_cache=False), cached)
    assert same(generated(model, prompt, max_new_tokens=6, do_sample=False, cache_implementation="static"), cached)
