"""Tiny transformers with random weights, large enough that different tokens come out."""

import pytest
import torch
from torch import nn

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


def tiny(kind: str, attention: str = "eager", **changes) -> nn.Module:
    """One of gpt2, llama (two queries' heads to a key's), t5, bert and vit; in eval mode."""
    t = transformers
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 48}
    if kind == "gpt2":
        config = t.GPT2Config(
            vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=64, bos_token_id=0, eos_token_id=None
        )
        cls = t.GPT2LMHeadModel
    elif kind == "llama":
        config = t.LlamaConfig(vocab_size=64, num_key_value_heads=2, eos_token_id=None, **sizes)
        cls = t.LlamaForCausalLM
    elif kind == "t5":
        sizes = {"d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        config = t.T5Config(vocab_size=64, decoder_start_token_id=0, eos_token_id=None, **sizes)
        cls = t.T5ForConditionalGeneration
    elif kind == "bert":
        config, cls = t.BertConfig(vocab_size=64, **sizes), t.BertForSequenceClassification
    else:
        config, cls = t.ViTConfig(image_size=16, patch_size=8, **sizes), t.ViTForImageClassification
    for name, value in changes.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = cls._from_config(config, attn_implementation=attention).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):  # zero, and now a number that half precision holds
            parameter.data.copy_(torch.randint(-16, 16, parameter.shape) / 64)
        elif kind in ("gpt2", "llama") and parameter.dim() > 1:
            parameter.data.mul_(4)
    return model


def inputs(kind: str, length: int = 6) -> dict[str, torch.Tensor]:
    """Two examples for `model(**inputs)`, whose loss they give."""
    draw = torch.Generator().manual_seed(1)
    if kind == "vit":
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw), "labels": torch.tensor([0, 1])}
    ids = torch.randint(1, 64, (2, length), generator=draw)
    return {"input_ids": ids, "labels": torch.tensor([0, 1]) if kind == "bert" else ids}
