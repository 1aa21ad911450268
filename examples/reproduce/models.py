"""The networks of the experiments that have no example of their own."""

from __future__ import annotations

from typing import Any

from text import described
from torch import nn


def mlp(inputs: int = 784, width: int = 1024, classes: int = 10) -> nn.Sequential:
    """Two hidden layers of `width` with ReLU; 1.9 M multiply-accumulates an input as it is."""
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(inputs, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )


def bert(vocabulary: int = 4096, layers: int = 4, hidden: int = 256, heads: int = 4, length: int = 64) -> Any:
    """BERT with a head that predicts masked tokens, from random weights, without dropout; the MLPs are 4 × as wide."""
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(
            vocab_size=vocabulary,
            hidden_size=hidden,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            intermediate_size=4 * hidden,
            max_position_embeddings=length,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def modern_bert(symbols: int = 41, layers: int = 2, hidden: int = 128, length: int = 64) -> Any:
    """ModernBERT (arXiv 2412.13663) from random weights: normalised before each layer, positions by rotation.

    Where BERT's positions are learnt apart from one another, a small network stays at the unigram loss for long.
    """
    from transformers import ModernBertConfig, ModernBertForMaskedLM

    return ModernBertForMaskedLM(
        ModernBertConfig(
            vocab_size=symbols,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=max(1, hidden // 32),
            max_position_embeddings=length,
            local_attention=16,
            global_attn_every_n_layers=1,
            **dict.fromkeys(("pad_token_id", "bos_token_id", "eos_token_id", "cls_token_id", "sep_token_id"), 0),
        )
    )


def tiny_bert(head: str = "BertForQuestionAnswering") -> tuple[Any, Any]:
    """BERT with one layer of width 32 from random weights, and a tokenizer of scikit-learn's descriptions of its data.

    Args:
        head: a class of transformers.
    """
    import transformers
    from tokenizers import BertWordPieceTokenizer

    trained = BertWordPieceTokenizer()
    trained.train_from_iterator(described(), vocab_size=512, show_progress=False)
    tokenizer = transformers.BertTokenizerFast(tokenizer_object=trained._tokenizer)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=128,
    )
    return getattr(transformers, head)(config), tokenizer


def tiny_llama_with_adapters() -> Any:
    """Llama with two layers of width 32 from random weights, of which LoRA adapters alone are trained."""
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2
    )
    return get_peft_model(LlamaForCausalLM(config), LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM"))
