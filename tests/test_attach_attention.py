"""Attention, fused, opened and by hand, and whole transformers: every product in them is emulated."""

import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from attach_cases import ACC, POLICY, QUANTIZED, Called, fm
from fmaq import ops
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, detach, listening


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"scale": 0.3},
        {"attn_mask": torch.tensor([[True, False, True], [False, False, False], [True, True, True]])},
        {"attn_mask": torch.randn(3, 3)},
    ],
    ids=["plain", "causal", "scale", "bool mask", "float mask"],
)
def test_fused_attention_is_our_attention(options) -> None:
    q, k, v = torch.randn(3, 2, 2, 3, 4)
    model = attach(Called(lambda _: F.scaled_dot_product_attention(q, k, v, **options)), POLICY)
    assert torch.equal(model(), ops.scaled_dot_product_attention(q, k, v, ACC, **options))


def test_fused_attention_with_grouped_queries() -> None:
    q, k, v = torch.randn(2, 4, 3, 4), torch.randn(2, 2, 3, 4), torch.randn(2, 2, 3, 4)
    model = attach(Called(lambda _: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)), POLICY)
    assert torch.equal(model(), ops.scaled_dot_product_attention(q, k, v, ACC, enable_gqa=True))


def test_fused_attention_quantizes_the_probabilities_too() -> None:
    q, k, v = torch.randn(3, 2, 3, 4)
    model = attach(Called(lambda _: F.scaled_dot_product_attention(q, k, v)), QUANTIZED)
    quantize = ops.quantize
    scores = fm(quantize(q, "M2E3"), quantize(k, "M2E3").mT) * 0.5
    assert torch.equal(model(), fm(quantize(scores.softmax(-1), "M2E3"), quantize(v, "M2E3")))


def emulated_multi_head(layer: nn.MultiheadAttention, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Self-attention (N, L, E) without masks, and its weights by head."""
    n, length, width = x.shape
    q, k, v = (
        t.view(n, length, layer.num_heads, -1).transpose(1, 2)
        for t in ops.linear(x, layer.in_proj_weight, layer.in_proj_bias, ACC).chunk(3, -1)
    )
    weights = (fm(q, k.mT) / math.sqrt(q.shape[-1])).softmax(-1)
    mixed = fm(weights, v).transpose(1, 2).reshape(n, length, width)
    return ops.linear(mixed, layer.out_proj.weight, layer.out_proj.bias, ACC), weights


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_multi_head_attention_is_opened(training, grad) -> None:
    layer, x = nn.MultiheadAttention(8, 2, batch_first=True).train(training), torch.randn(2, 3, 8)
    expected, _ = emulated_multi_head(layer, x)
    attach(layer, POLICY)
    with torch.set_grad_enabled(grad):
        found, weights = layer(x, x, x, need_weights=False)
    assert torch.equal(found, expected)
    assert weights is None


def test_multi_head_attention_with_weights_masks_and_other_widths() -> None:
    layer = nn.MultiheadAttention(8, 2, kdim=5, vdim=6, add_bias_kv=True, add_zero_attn=True).eval()
    q, k, v = torch.randn(3, 2, 8), torch.randn(4, 2, 5), torch.randn(4, 2, 6)
    mask, padding = torch.zeros(3, 4, dtype=torch.bool), torch.tensor([[False] * 4, [True] + [False] * 3])
    mask[0, 2] = True
    plain, plain_weights = layer(q, k, v, attn_mask=mask, key_padding_mask=padding)
    attach(layer, Policy(accumulator="M20E6b31"))
    seen = []
    with listening(seen.append):
        found, weights = layer(q, k, v, attn_mask=mask, key_padding_mask=padding)
    assert torch.allclose(found, plain, atol=1e-4) and torch.allclose(weights, plain_weights, atol=1e-4)
    assert [p.kind for p in seen] == [*["linear"] * 3, "attention_scores", "attention_values", "linear"]
    assert all(p.reason is None for p in seen)


@pytest.mark.parametrize("norm_first", [True, False])
def test_encoder_layer_fast_path_is_emulated_as_the_slow_one(norm_first) -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True, norm_first=norm_first)
    encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)
    x, padding = torch.randn(2, 3, 8), torch.tensor([[False, False, True], [False] * 3])
    attach(encoder, POLICY)
    slow = encoder.train()(x)
    slow_padded = encoder(x, src_key_padding_mask=padding)
    encoder.eval()
    with torch.no_grad():
        assert torch.equal(encoder(x), slow)
        fast_padded = encoder(x, src_key_padding_mask=padding)
    assert torch.equal(fast_padded[~padding], slow_padded[~padding])
    assert torch.backends.mha.get_fastpath_enabled()


def tiny(kind: str, attention: str) -> nn.Module:
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    common = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "bert":
        config = transformers.BertConfig(**common, intermediate_size=24, max_position_embeddings=16)
        return transformers.BertModel._from_config(config, attn_implementation=attention)
    if kind == "llama":
        config = transformers.LlamaConfig(**common, num_key_value_heads=1, intermediate_size=24)
        return transformers.LlamaForCausalLM._from_config(config, attn_implementation=attention)
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=2, n_head=2, n_positions=16)
    return transformers.GPT2LMHeadModel._from_config(config, attn_implementation=attention)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize(("kind", "products"), [("bert", 17), ("llama", 19), ("gpt2", 13)])
def test_every_product_of_a_transformer_is_emulated(kind, products, attention) -> None:
    model = tiny(kind, attention).eval()
    ids = torch.tensor([[3, 7, 1, 9]])
    seen = []
    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("error", FmaqCoverageWarning)
        plain = model(ids)[0]
        attach(model, POLICY)
        with listening(seen.append):
            emulated = model(ids)[0]
    covered = [p for p in seen if p.reason is None]
    assert len(covered) == products
    assert {p.kind for p in seen if p.reason is not None} <= {"matmul"}  # Llama's angles: one step
    assert all(p.steps == 1 for p in seen if p.reason is not None)
    assert not torch.equal(emulated, plain)
    with torch.no_grad():
        assert torch.equal(detach(model)(ids)[0], plain)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_eager_and_fused_attention_of_a_transformer_are_one(kind) -> None:
    eager, fused = tiny(kind, "eager").eval(), tiny(kind, "sdpa").eval()
    fused.load_state_dict(eager.state_dict())
    ids, mask = torch.tensor([[3, 7, 1, 9]]), torch.tensor([[1, 1, 1, 1]])
    with torch.no_grad():
        found = [attach(model, QUANTIZED)(ids, attention_mask=mask)[0] for model in (eager, fused)]
    assert torch.equal(*found)


def test_gradient_checkpointing_of_a_transformer_is_emulated() -> None:
    model = attach(tiny("llama", "sdpa").train(), POLICY)
    ids = torch.tensor([[3, 7, 1, 9]])

    def gradients() -> list[torch.Tensor]:
        return list(torch.autograd.grad(model(ids, labels=ids).loss, list(model.parameters())))

    expected = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))
