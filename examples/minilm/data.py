"""The Lee corpus: 50 news texts, and how alike people judged each pair of them (Lee, Pincombe & Welsh 2005).

Also a task of one's own: how far the embeddings are from those in float32. With 50 texts the correlation with people
moves either way when the embeddings change; the distance says how much they did.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import normalize

from fmaq.training.examples import Examples, Pairs
from fmaq.training.tasks import forward

CACHE = Path(__file__).resolve().parents[2] / ".cache" / "examples"


def lee_similarities(tokenizer: Any, texts: int = 50, max_length: int = 256) -> tuple[None, Pairs]:
    """No training data, and the pairs of the first `texts` texts, each cut after `max_length` tokens.

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    folder = CACHE / "lee"
    if not folder.exists():
        raise FileNotFoundError(f"{folder} is missing; run `make fetch`, which downloads what the examples need")
    documents = (folder / "lee.cor").read_text(encoding="latin-1").splitlines()[:texts]
    rows = (folder / "similarities0-1.txt").read_text().splitlines()
    scores = torch.tensor([[float(value) for value in row.split()] for row in rows], dtype=torch.float64)
    inputs = tokenizer(documents, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    first, second = torch.triu_indices(texts, texts, offset=1)
    return None, Pairs(dict(inputs), first, second, scores[first, second])


def background(tokenizer: Any, texts: int = 20, max_length: int = 256) -> Examples:
    """Other texts of the same source, with a class (0) that says nothing: to calibrate on."""
    documents = (CACHE / "lee" / "lee_background.cor").read_text(encoding="latin-1").splitlines()[:texts]
    inputs = tokenizer(documents, padding=True, truncation=True, max_length=max_length, return_tensors="pt")
    return Examples(dict(inputs), torch.zeros(texts))


def with_float32(tokenizer: Any, texts: int = 50) -> tuple[Examples, dict[str, Any]]:
    """`background`, and `pairs` beside `float32`, the texts' embeddings by this network in float32: (texts, 384).

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    from transformers import AutoModel

    _, pairs = lee_similarities(tokenizer, texts)
    model = AutoModel.from_pretrained(CACHE / "minilm", dtype="float32").eval()
    with torch.no_grad():
        return background(tokenizer), {"pairs": pairs, "float32": embeddings(model, pairs)}


def embeddings(model: nn.Module, pairs: Pairs, batch_size: int = 10) -> Tensor:
    """The mean of each text's states, scaled to length 1: (texts, hidden)."""
    pooled = []
    for start in range(0, len(pairs), batch_size):
        inputs = {name: tensor[start : start + batch_size] for name, tensor in pairs.inputs.items()}
        mask = inputs["attention_mask"][..., None]
        pooled.append((forward(model, inputs) * mask).sum(1) / mask.sum(1))
    return normalize(torch.cat(pooled))


def fidelity(model: nn.Module, data: dict[str, Any], device: str) -> dict[str, float]:
    """`cosine`, the mean of each embedding's cosine with its float32 one, and `pearson`, of the pairs' similarities."""
    pairs, expected = data["pairs"], data["float32"]
    found = embeddings(model.to(device), pairs).to(expected.device)
    similarities = [(e[pairs.first] * e[pairs.second]).sum(1).double() for e in (found, expected)]
    return {
        "cosine": float((found * expected).sum(1).mean()),
        "pearson": float(torch.corrcoef(torch.stack(similarities))[0, 1]),
    }
