"""The networks of the experiments that have no example of their own."""

from __future__ import annotations

from typing import Any

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
