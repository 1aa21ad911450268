"""Attached models under torch.compile: one graph, with the bits of eager, forward and backward."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fmaq

FORMATS = {"weight": "M4E3", "activation": "M4E3"}
NARROW = fmaq.Policy(accumulator="M4E4b8h product=M4E4b9h chunk=4 outer=M7E5b14", **FORMATS)
IDS = torch.tensor([[3, 11, 2, 7, 30], [1, 1, 45, 8, 9]])
IMAGES = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))

ONE_PROCESS = {"OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "TORCHINDUCTOR_VEC_ISA_OK": "1"}
"""Environment in which inductor compiles by itself and does not try the processor out first."""


@pytest.fixture(autouse=True)
def fresh() -> None:
    torch.compiler.reset()
    torch.manual_seed(0)


def compiled(model: Any, backend: str = "aot_eager") -> Any:
    return torch.compile(model, backend=backend, fullgraph=True)


class Net(nn.Module):
    """Products of several kinds, one of them of what is made of weights alone."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = nn.Linear(6, 8), nn.Linear(8, 3), nn.LayerNorm(8)
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.register_buffer("table", torch.randn(3, 3))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(self.first(x).relu())
        mixed = torch.einsum("ij,kj->ik", hidden, hidden) @ hidden
        scale = torch.arange(3.0) + 1
        return self.second(mixed) @ (self.table.mT * scale) + self.conv(x[None, None]).mean()


class Small(nn.Module):
    """A layer and a product that is none's."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x).relu()
        return hidden @ hidden.mT


def hugging_face(name: str, attention: str) -> tuple[Callable[[], nn.Module], dict[str, Any]]:
    """What makes a tiny model, and what it takes."""
    import transformers as hf

    size = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    how = {"attn_implementation": attention}
    words = {"vocab_size": 50}
    ends = {"bos_token_id": 0, "eos_token_id": 0}
    if name == "bert":
        return lambda: hf.BertModel(hf.BertConfig(**size, **how, **words)), {"input_ids": IDS}
    if name == "llama":
        config = hf.LlamaConfig(**size | {"num_attention_heads": 4}, num_key_value_heads=2, **how, **words)
        return lambda: hf.LlamaForCausalLM(config), {"input_ids": IDS, "use_cache": False}
    if name == "gpt2":
        config = hf.GPT2Config(n_embd=16, n_layer=1, n_head=2, n_positions=8, **how, **words, **ends)
        return lambda: hf.GPT2LMHeadModel(config), {"input_ids": IDS, "use_cache": False}
    if name == "vit":
        return lambda: hf.ViTModel(hf.ViTConfig(**size, **how, image_size=16, patch_size=8)), {"pixel_values": IMAGES}
    if name == "t5":
        config = hf.T5Config(d_model=16, d_kv=8, d_ff=24, num_layers=1, num_heads=2, dropout_rate=0.0, **words)
        return lambda: hf.T5Model(config), {"input_ids": IDS, "decoder_input_ids": IDS, "use_cache": False}
    config = hf.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1])
    return lambda: hf.ResNetModel(config), {"pixel_values": IMAGES}


NAMES = [("resnet", "eager"), ("bert", "sdpa"), ("llama", "eager"), ("vit", "sdpa"), ("gpt2", "sdpa"), ("t5", "eager")]
"""Llama with eager attention: under torch.compile, transformers gives shared keys to SDPA in another way."""


@pytest.mark.slow
@pytest.mark.parametrize(("name", "attention"), NAMES)
def test_a_training_step_of_a_known_class(name, attention) -> None:
    """Gradients are summed in an accumulator, too: BLAS' last bits may depend on how operands lie in memory."""
    make, inputs = hugging_face(name, attention)
    model = fmaq.attach(make().eval(), replace(NARROW, backward="M10E5b20"))  # without dropout

    def step(call: Any) -> tuple[Tensor, list[Tensor]]:
        model.zero_grad()
        output = call(**inputs)[0]
        output.float().square().mean().backward()
        return output.detach(), [torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()]

    expected, gradients = step(model)
    found, found_gradients = step(compiled(model))
    assert torch.equal(found, expected)
    assert all(torch.equal(x, y) for x, y in zip(gradients, found_gradients, strict=True))
    fmaq.detach(model)
    assert not torch.equal(model(**inputs)[0], expected)


@pytest.mark.parametrize(
    "policy",
    [
        fmaq.Policy(accumulator="paper12", estimator="recursive/diff"),
        fmaq.Policy(accumulator="paper12", backward="M5E4b9"),
        fmaq.Policy(accumulator="I16f0", weight="int8", activation="int8", weight_per_channel=True),
        fmaq.Policy(accumulator="fp32", layers={"second": {"accumulator": "M3E4b8"}, "conv": None}, **FORMATS),
        fmaq.Policy(accumulator="M3E5b14 rounding=stochastic seed=3", noise="repeated", per_token=True),
        fmaq.Policy(
            accumulator="M5E4b9",
            layers={"": {"products": {"einsum": {"accumulator": "M2E4b7"}, 1: {"gain": 1.5}}}},
        ),
    ],
    ids=str,
)
def test_every_kind_of_rule(policy) -> None:
    model = fmaq.attach(Net(), policy)
    x = torch.randn(3, 6)
    expected = torch.autograd.grad(model(x).square().sum(), list(model.parameters()))
    found = torch.autograd.grad(compiled(model)(x).square().sum(), list(model.parameters()))
    assert torch.equal(compiled(model)(x), model(x))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("needs_weights", [False, True])
def test_multi_head_attention(needs_weights) -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.MultiheadAttention(8, 2, batch_first=True)
            encoder = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
            self.layer = nn.Identity() if needs_weights else encoder  # which needs none

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.inner(x, x, x, need_weights=needs_weights)[0])

    scores = {"products": {"attention_scores": {"accumulator": "M2E4b8"}, "attention_values": {"gain": 1.25}}}
    model = fmaq.attach(Attention().eval(), fmaq.Policy(accumulator="M4E4b9", layers={"inner": scores}, **FORMATS))
    x = torch.randn(2, 5, 8)
    assert torch.equal(compiled(model)(x), model(x))


def test_a_calibrated_model() -> None:
    model, x = Net(), torch.randn(3, 6)
    template = fmaq.Policy(accumulator="M4E3 product=M4E3", **FORMATS)
    fmaq.attach(model, fmaq.calibrate(model, template, [x], per="channel"))
    assert torch.equal(compiled(model)(x), model(x))


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor compiles C++")
def test_inductor() -> None:
    """In a process of its own: what inductor compiles brings another OpenMP than torch's."""
    code = "import test_attach_compile as tests; tests.check_inductor(); tests.check_left_alone('inductor')"
    environment = os.environ | ONE_PROCESS
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=Path(__file__).parent, env=environment, check=True)


def check_inductor() -> None:
    model, x = fmaq.attach(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)), NARROW), torch.randn(3, 6)
    with torch.no_grad():
        assert torch.equal(compiled(model, "inductor")(x), model(x))


def test_the_whole_step_in_one_function() -> None:
    model, x = fmaq.attach(Net(), NARROW), torch.randn(3, 6)

    def loss(x: Tensor) -> Tensor:
        return F.mse_loss(model(x).tanh(), x[:, :3])

    assert torch.equal(compiled(loss)(x), loss(x))


def test_other_shapes_and_autocast() -> None:
    model = fmaq.attach(Small(), NARROW)
    call = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=True)
    for rows in (3, 7):
        x = torch.randn(rows, 6)
        assert torch.equal(call(x), model(x))
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(call(x), model(x))


def test_what_is_compiled_follows_attach_and_detach() -> None:
    model, x = Small(), torch.randn(3, 6)
    call = compiled(model)
    plain = call(x)
    results = [plain]
    for accumulator in ("M3E4b8", "M2E4b8"):
        fmaq.attach(model, accumulator)
        results.append(call(x))
        assert torch.equal(results[-1], model(x))
    fmaq.detach(model)
    assert torch.equal(call(x), plain)
    assert not torch.equal(results[1], plain)
    assert not torch.equal(results[1], results[2])


def test_a_part_is_attached_after_the_whole_was_compiled() -> None:
    model, x = nn.Sequential(nn.Sequential(nn.Linear(6, 8)), nn.Linear(8, 2)), torch.randn(3, 6)
    call = compiled(model)
    plain = call(x)
    fmaq.attach(model[0], "M2E4b8")
    assert torch.equal(call(x), model(x))
    assert not torch.equal(call(x), plain)
    fmaq.detach(model[0])
    assert torch.equal(call(x), plain)


def test_a_compiled_model_is_attached_by_its_own_names() -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)), torch.randn(3, 6)
    call = torch.compile(model, backend="aot_eager")
    policy = fmaq.Policy(accumulator="M2E4b8", layers={"2": None})
    fmaq.attach(call, policy)
    found = call(x)
    fmaq.detach(call)
    assert torch.equal(found, fmaq.attach(model, policy)(x))
    assert not torch.equal(found, fmaq.detach(model)(x))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_is_left_alone_is_torchs_own_in_compiled_code_too(backend) -> None:
    check_left_alone(backend)


def check_left_alone(backend: str) -> None:
    model, x = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))), torch.randn(3, 6)
    fmaq.attach(model, fmaq.Policy(accumulator="M2E4b8", layers={"1.0": None, "0": {"accumulator": "fp32"}}))
    with torch.no_grad():
        expected = model(x)
        assert torch.equal(torch.compile(model, backend=backend)(x), expected)
        torch.compiler.reset()
        model[1].compile(backend=backend)
        assert torch.equal(model(x), expected)


def test_a_compiled_part_of_an_attached_model() -> None:
    model = nn.Sequential(nn.Linear(6, 8), nn.Sequential(nn.Linear(8, 8), nn.ReLU()), nn.Linear(8, 2))
    fmaq.attach(model, NARROW)
    x = torch.randn(3, 6)
    expected = model(x)
    model[1].compile(backend="aot_eager", fullgraph=True)
    assert torch.equal(model(x), expected)
    assert torch.equal(model(x), expected)


def test_a_break_in_the_graph() -> None:
    class Breaks(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(6, 8), nn.ReLU())
            self.outer = nn.Linear(8, 2)

        def forward(self, x: Tensor) -> Tensor:
            y = self.inner(x)
            torch._dynamo.graph_break()
            return self.outer(y) @ y[:2, :2]

    model, x = fmaq.attach(nn.Sequential(Breaks()), NARROW), torch.randn(3, 6)
    call = torch.compile(model, backend="aot_eager")
    assert torch.equal(call(x), model(x))
    assert torch.equal(x @ x.mT, fmaq.detach(nn.Identity())(x) @ x.mT)


def test_a_failure_leaves_nothing_behind() -> None:
    class Fails(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if x.isfinite().all():
                raise ValueError("no")
            return x

    model, x = fmaq.attach(nn.Sequential(nn.Linear(6, 6), Fails()), NARROW), torch.ones(2, 6)
    for full in (True, False):
        with pytest.raises(Exception, match=r"no|Unsupported|dynamic"):
            torch.compile(model, backend="eager", fullgraph=full)(x)
        assert not torch.overrides._get_current_function_mode_stack()
    other = fmaq.attach(Small(), NARROW)
    assert torch.equal(compiled(other)(x), other(x))


def test_noise_by_call_is_refused_and_repeated_noise_is_not() -> None:
    model = fmaq.attach(nn.Linear(6, 3), "M3E5b14 rounding=stochastic")
    with pytest.raises(RuntimeError, match='noise: "repeated"'):
        compiled(model)(torch.ones(2, 6))


def test_a_module_that_came_late_is_named() -> None:
    model = fmaq.attach(nn.Sequential(nn.Linear(6, 6)), NARROW)
    model.append(nn.Linear(6, 3))
    with pytest.raises(RuntimeError, match="1 in the model itself came after attach"):
        compiled(model)(torch.ones(2, 6))


def test_observing_what_is_compiled_is_refused() -> None:
    model = fmaq.attach(nn.Linear(6, 3), NARROW)
    with fmaq.observe(model), pytest.raises(RuntimeError, match=r"the model that torch\.compile was given"):
        compiled(model)(torch.ones(2, 6))
