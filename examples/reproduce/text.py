"""Texts with some word pieces or characters masked, for a network to fill in: masked language modelling.

Devlin et al. 2018 (arXiv 1810.04805).
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from fmaq.training import evaluate
from fmaq.training.examples import IGNORED, Examples, Windows

BROWN = Path(__file__).resolve().parents[2] / ".cache" / "examples" / "brown"
ALPHABET = " etaoinsrhldcumfpgwybvkxjqz0.,'`-;?!:()"
MASK, UNKNOWN = "[MASK]", "[UNK]"


def brown(
    vocabulary: int = 4096, length: int = 64, train: int = 16000, test: int = 1000, share: float = 0.15, copies: int = 1
) -> tuple[Examples, Examples]:
    """The Brown corpus (Kučera & Francis 1967), 500 texts of which every tenth is held out, as masked windows.

    Args:
        vocabulary: of word pieces, made from the training texts.
        length: of a window, in word pieces.
        train, test: the most windows to use, of a seeded shuffle; a window is counted once.
        share: of the pieces that are masked.
        copies: how many times a training window occurs, each time masked elsewhere.

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    return masked_windows(*brown_texts(), vocabulary, length, train, test, share, copies)


def brown_texts() -> tuple[list[str], list[str]]:
    """The corpus' texts, of which every tenth is in the second list.

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    files = sorted(BROWN.glob("c[a-r][0-9][0-9]"))
    if not files:
        raise FileNotFoundError(f"{BROWN} has no texts; run `make fetch`, which downloads what the examples need")
    texts = [untagged(path.read_text(encoding="latin-1")) for path in files]
    return tenth_apart(texts)


def tenth_apart(texts: list[str]) -> tuple[list[str], list[str]]:
    """Texts to train on, and every tenth to test on."""
    return [text for i, text in enumerate(texts) if i % 10 != 9], texts[9::10]


@dataclass
class Masked(Examples):
    """Examples, and the loss in nats of always guessing by how often each class is masked in the training examples."""

    unigram: float


def characters(length: int = 64, train: int = 6000, test: int = 500, share: float = 0.15) -> tuple[Examples, Masked]:
    """The Brown corpus as masked windows of characters: small letters, punctuation, and 0 for any number.

    Args:
        length: of a window, in characters.
        train, test: the most windows to use, of a seeded shuffle.
        share: of the characters that are masked.

    Raises:
        FileNotFoundError: the corpus has not been fetched.
    """
    return masked_characters(*brown_texts(), length, train, test, share)


def described_characters(length: int = 16, train: int = 64, test: int = 32) -> tuple[Examples, Masked]:
    """The same of scikit-learn's descriptions of its data sets."""
    *rest, held_out = described()
    return masked_characters(rest, [held_out], length, train, test, 0.15)


def described_windows(length: int = 16, train: int = 8, test: int = 4) -> tuple[Windows, Windows]:
    """Characters of the first of them, none masked, for a causal model."""
    rows = coded(described()[0], length)
    return Windows(rows[:train]), Windows(rows[train : train + test])


def coded(text: str, length: int) -> Tensor:
    """Windows (N, length) of a text's characters as numbers from 1; 0 is any character that has none."""
    text = re.sub(r"[0-9]+", "0", text.lower())
    codes = torch.tensor([ALPHABET.find(character) + 1 for character in text])
    return codes[: len(codes) // length * length].view(-1, length)


def masked_characters(
    rest: list[str], held_out: list[str], length: int, train: int, test: int, share: float
) -> tuple[Examples, Masked]:
    """Masked windows of both kinds of texts; see `characters` for the arguments."""
    generator = torch.Generator().manual_seed(0)
    windows = []
    for texts, count in ((rest, train), (held_out, test)):
        rows = coded(" ".join(texts), length)
        windows.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    mask = len(ALPHABET) + 1
    first, last = masked(windows[0], mask, share, generator), masked(windows[1], mask, share, generator)
    known, asked = (part.targets[part.targets != IGNORED] for part in (first, last))
    often = torch.bincount(known, minlength=mask).double() + 1
    return first, Masked(last.inputs, last.targets, float(-(often / often.sum()).log()[asked].mean()))


def filling_in(model: nn.Module, data: Masked, device: str) -> dict[str, float]:
    """A task of one's own: `loss` in nats and `accuracy` of masked characters, and `unigram`, the loss to be below."""
    found = evaluate(model, Examples(data.inputs, data.targets), device=device, progress=False)
    return {"loss": found["loss"], "accuracy": found["accuracy"], "unigram": data.unigram}


def descriptions(vocabulary: int = 512, length: int = 16, train: int = 64, test: int = 32) -> tuple[Examples, Examples]:
    """scikit-learn's descriptions of its data sets, some 3,000 words, in place of a corpus where there is none."""
    *rest, held_out = described()
    return masked_windows(rest, [held_out], vocabulary, length, train, test)


def described() -> list[str]:
    """Five descriptions of data sets inside scikit-learn."""
    from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine

    return [load().DESCR for load in (load_breast_cancer, load_diabetes, load_digits, load_iris, load_wine)]


def untagged(text: str) -> str:
    """A text of the corpus without its parts of speech: `The/at jury/nn` is `The jury`."""
    return " ".join(re.sub(r"/[^/\s]+$", "", word) for word in text.split())


def masked_windows(
    texts: Iterable[str],
    held_out: Iterable[str],
    vocabulary: int,
    length: int,
    train: int,
    test: int,
    share: float = 0.15,
    copies: int = 1,
) -> tuple[Examples, Examples]:
    """Windows of both kinds of texts with masked pieces; see `brown` for the arguments."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers

    texts = list(texts)
    tokenizer = Tokenizer(models.WordPiece(unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = [MASK, UNKNOWN]
    tokenizer.train_from_iterator(
        texts, trainers.WordPieceTrainer(vocab_size=vocabulary, special_tokens=special, show_progress=False)
    )
    generator = torch.Generator().manual_seed(0)
    windows = []
    for part, count in ((texts, train), (list(held_out), test)):
        pieces = torch.tensor([token for encoding in tokenizer.encode_batch(part) for token in encoding.ids])
        rows = pieces[: len(pieces) // length * length].view(-1, length)
        windows.append(rows[torch.randperm(len(rows), generator=generator)[:count]])
    mask = tokenizer.token_to_id(MASK)
    return masked(windows[0].repeat(copies, 1), mask, share, generator), masked(windows[1], mask, share, generator)


def masked(windows: Tensor, mask: int, share: float, generator: torch.Generator) -> Examples:
    """Windows (N, length) in which a random `share` of the pieces is masked; these alone are to be predicted."""
    hidden = torch.rand(windows.shape, generator=generator) < share
    inputs = windows.masked_fill(hidden, mask)
    return Examples({"input_ids": inputs}, windows.masked_fill(~hidden, IGNORED))
