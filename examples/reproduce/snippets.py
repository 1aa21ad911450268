"""Sentiment of sentences about films: 10,605 snippets of reviews that twenty people rated (Hutto & Gilbert 2014)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from fmaq.training.examples import Examples

FILE = Path(__file__).resolve().parents[2] / ".cache" / "examples" / "snippets" / "movieReviewSnippets_GroundTruth.txt"


def movie_snippets(
    tokenizer: Any, train: int = 9000, test: int = 1500, max_length: int = 48, seed: int = 0
) -> tuple[Examples, Examples]:
    """Snippets and their class, 1 if their mean rating, from −4 to 4, is above 0; there is no official split.

    Args:
        train, test: how many, of a seeded shuffle: the test snippets are its last.
        max_length: in tokens.

    Raises:
        FileNotFoundError: the snippets have not been fetched.
    """
    if not FILE.exists():
        raise FileNotFoundError(f"{FILE} is missing; run `make fetch`, which downloads what the examples need")
    rows = [row.split("\t", 2) for row in FILE.read_text(encoding="utf-8").splitlines()]
    inputs = tokenizer(
        [text for _, _, text in rows], padding=True, truncation=True, max_length=max_length, return_tensors="pt"
    )
    targets = torch.tensor([float(rating) > 0 for _, rating, _ in rows]).long()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(seed))
    parts = order[:train], order[len(rows) - test :]
    first, last = (Examples({name: tensor[part] for name, tensor in inputs.items()}, targets[part]) for part in parts)
    return first, last


def described_topics(tokenizer: Any, train: int = 64, test: int = 32) -> tuple[Examples, Examples]:
    """In place of them, lines of scikit-learn's descriptions of its data: do they tell of flowers, or of wine?"""
    from sklearn.datasets import load_iris, load_wine

    lines = [(line, topic) for topic, load in enumerate((load_iris, load_wine)) for line in load().DESCR.split("\n")]
    rows = [(line.strip(), topic) for line, topic in lines if len(line.split()) > 2]
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))[: train + test].tolist()
    inputs = tokenizer([rows[i][0] for i in order], padding=True, truncation=True, max_length=16, return_tensors="pt")
    data = Examples(dict(inputs), torch.tensor([rows[i][1] for i in order]))
    return Examples(*data.batch(slice(0, train))), Examples(*data.batch(slice(train, None)))
