"""Gradient checkpointing, bfloat16 and offloading of attached transformers: the same bits, or NumPy's."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from apart import ACCUMULATOR, Apart, product
from fmaq import attach, detach, from_pretrained
from fmaq.emulation import listening
from huggingface_cases import inputs, tiny

LOOKING_INSIDE = {
    "accumulator": ACCUMULATOR, "estimator": "recursive/diff", "weight": "M4E3", "activation": "M4E3"
}  # fmt: skip
NOISY = "M5E4b10 rounding=stochastic random_bits=8"
POLICIES = {
    "as it is": {"accumulator": ACCUMULATOR},
    "looking inside": LOOKING_INSIDE,
    "noisy": {"accumulator": NOISY, "backward": NOISY},
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert", "vit"])
def test_gradients_with_checkpointing_are_those_without(kind, policy) -> None:
    """With dropout. T5's with reentrant checkpointing differ in torch itself: what is shared is summed otherwise."""
    model = tiny(kind, "sdpa").train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1

    def gradients() -> list[torch.Tensor]:
        attach(model, POLICIES[policy])
        model.zero_grad()
        torch.manual_seed(3)
        loss = model(**inputs(kind)).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    expected = gradients()
    for reentrant in (False,) if kind == "t5" else (False, True):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant and kind != "vit":
            model.enable_input_require_grads()
        assert all(torch.equal(a, b) for a, b in zip(gradients(), expected, strict=True))


def attention_apart(q, k, v, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
    """Fused attention by two products that `Apart` meets; scores, softmax and probabilities are float32."""
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else q.dtype
    with torch.autocast("cpu", enabled=False):
        q, k, v = (x.to(dtype).float() for x in (q, k, v))
        if enable_gqa:
            k, v = (x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v))
        scores = (q @ k.mT) * (q.shape[-1] ** -0.5 if scale is None else scale)
        if is_causal:
            attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
        if attn_mask is not None and attn_mask.dtype == torch.bool:
            scores = scores.masked_fill(~attn_mask, -torch.inf)
        elif attn_mask is not None:
            scores = scores + attn_mask.float()
        return (scores.softmax(-1) @ v).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "model"])
@pytest.mark.parametrize(
    ("kind", "attention"), list(itertools.product(["gpt2", "llama", "t5", "bert"], ["eager", "sdpa"]))
)
def test_narrow_models_and_autocast_are_what_numpy_computes(kind, attention, autocast, dtype, monkeypatch) -> None:
    """Operands are rounded to the dtype, sums are the accumulator's, and results are rounded to the dtype."""
    model, given = tiny(kind, attention), inputs(kind)
    if not autocast:
        model.to(dtype)
    with torch.no_grad(), torch.autocast("cpu", dtype, enabled=autocast):
        with Apart(), monkeypatch.context() as patch:
            patch.setattr(F, "scaled_dot_product_attention", attention_apart)
            expected = model(**given).logits
        found = attach(model, ACCUMULATOR)(**given).logits
        plain = detach(model)(**given).logits
    assert found.dtype == expected.dtype == plain.dtype == dtype
    assert torch.equal(found, expected) and not torch.equal(found, plain)


@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "model"])
def test_gradients_of_narrow_layers_are_float32_products_rounded_once(autocast) -> None:
    """A bias is added in float32, and autocast leaves it as it is."""
    torch.manual_seed(0)
    layer, x = nn.Linear(24, 8), torch.randn(6, 24)
    if not autocast:
        layer, x = layer.bfloat16(), x.bfloat16()
    x.requires_grad_()
    upstream = torch.randn(6, 8).bfloat16()
    attach(layer, ACCUMULATOR)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        y = layer(x)
    y.backward(upstream)
    narrow = [t.detach().bfloat16().float() for t in (x, layer.weight)]
    g = upstream.float()
    expected = {"x": g @ narrow[1], "weight": g.T @ narrow[0], "bias": g.sum(0)}
    assert torch.equal(y, (product(narrow[0], narrow[1].T) + layer.bias.float()).bfloat16())
    for name, tensor in {"x": x, "weight": layer.weight, "bias": layer.bias}.items():
        assert tensor.grad.dtype == tensor.dtype
        is_rounded = name != "bias" or not autocast
        assert torch.equal(tensor.grad.float(), expected[name].bfloat16().float() if is_rounded else expected[name]), (
            name
        )


def test_adapters_of_a_narrow_model_are_float32_as_peft_has_them() -> None:
    peft = pytest.importorskip("peft", reason="peft is not installed")
    torch.manual_seed(5)
    config = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=4, init_lora_weights=False)
    model, seen = peft.get_peft_model(tiny("llama").bfloat16(), config).eval(), []
    ids = inputs("llama")["input_ids"]
    with torch.no_grad():
        with Apart():
            expected = model(input_ids=ids).logits
        attach(model, ACCUMULATOR)
        with listening(seen.append):
            assert torch.equal(model(input_ids=ids).logits, expected)
    assert {x.dtype for p in seen if "lora" in p.layer for x in p.operands} == {torch.float32}


OFFLOADED = {"accumulator": ACCUMULATOR, "weight": "M4E3", "activation": "M4E3"}


def run(model: nn.Module, kind: str) -> tuple[torch.Tensor, list]:
    """The logits, and what each product's operands were quantized to: what is a weight is told by the module."""
    seen: list = []
    with torch.no_grad(), listening(lambda p: seen.append((p.layer, p.kind, p.formats, p.reason))):
        return model(**inputs(kind)).logits, seen


@pytest.mark.parametrize("policy", [OFFLOADED, {"accumulator": NOISY}], ids=["quantized", "noisy"])
@pytest.mark.parametrize("to", ["cpu", "disk"])
@pytest.mark.parametrize("kind", ["gpt2", "llama", "t5", "bert", "vit"])
def test_offloaded_weights_give_the_same_bits(kind, to, policy, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    expected, formats = run(attach(tiny(kind, "sdpa"), policy), kind)
    for first in ("attached", "offloaded"):
        model = tiny(kind, "sdpa")
        if first == "attached":
            attach(model, policy)
        if to == "disk":
            accelerate.disk_offload(model, str(tmp_path / first), execution_device="cpu")
        else:
            accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
        if first == "offloaded":
            attach(model, policy)
        assert all(p.device.type == "meta" for p in model.parameters())
        found = run(model, kind)
        assert torch.equal(found[0], expected) and found[1] == formats


MAP = {
    "model.embed_tokens": "cpu", "model.layers.0": "disk", "model.layers.1": "cpu",
    "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "disk",
}  # fmt: skip


def test_a_device_map_and_a_policy_are_restored_together(tmp_path) -> None:
    pytest.importorskip("accelerate", reason="accelerate is not installed")
    saved, ids = attach(tiny("llama", "sdpa"), OFFLOADED), inputs("llama")["input_ids"]
    saved.save_pretrained(tmp_path / "saved")
    restored = from_pretrained(type(saved), tmp_path / "saved", device_map=MAP, offload_folder=tmp_path / "disk")
    assert restored.hf_device_map == MAP and any(p.device.type == "meta" for p in restored.parameters())
    expected = run(saved, "llama")
    assert torch.equal(run(restored, "llama")[0], expected[0])
    generated = [model.generate(ids, max_new_tokens=6, do_sample=False) for model in (saved, restored)]
    assert torch.equal(*generated)
    restored.save_pretrained(tmp_path / "again")
    assert torch.equal(run(from_pretrained(type(saved), tmp_path / "again"), "llama")[0], expected[0])


def test_a_dispatched_model_gives_the_same_bits(tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = attach(tiny("llama", "sdpa"), OFFLOADED)
    expected = run(model, "llama")
    options = {"main_device": "cpu", "offload_dir": str(tmp_path), "force_hooks": True}
    model = accelerate.dispatch_model(model, MAP, **options)
    found = run(model, "llama")
    assert torch.equal(found[0], expected[0]) and found[1] == expected[1]
