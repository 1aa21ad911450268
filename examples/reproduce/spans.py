"""Recurring span selection (Ram et al. 2021, arXiv 2101.00438): find the words that stand where a passage has a mask.

Of a few words that a passage has more than once, all occurrences but one are masked; the one that is left is the
answer. It is what extractive question answering asks for, without people's questions: any text will do.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS
from text import BROWN, brown_texts, described, tenth_apart

from fmaq.recipes.squad import Question, encode
from fmaq.training.spans import Spans

LEE = BROWN.parent / "lee" / "lee_background.cor"
LONGEST = 5
"""Words of a span."""


def recurring(
    tokenizer: Any, train: int = 6000, test: int = 1000, words: int = 64, max_length: int = 96, seed: int = 0
) -> tuple[Spans, Spans]:
    """Passages of the Brown and Lee corpora, of whose texts every tenth is held out.

    Args:
        train, test: the most passages to use, of a seeded shuffle.
        words: of a passage; a text is cut into passages one after the other.
        max_length: of a window, in tokens; longer passages become two.

    Raises:
        FileNotFoundError: the corpora have not been fetched.
    """
    if not LEE.exists():
        raise FileNotFoundError(f"{LEE} is missing; run `make fetch`, which downloads what the examples need")
    news = tenth_apart(LEE.read_text(encoding="latin-1").splitlines())
    texts = [[*map(tidy, brown), *lee] for brown, lee in zip(brown_texts(), news, strict=True)]
    return of_texts(texts, tokenizer, train, test, words, max_length, seed)


def described_recurring(tokenizer: Any, train: int = 16, test: int = 8) -> tuple[Spans, Spans]:
    """The same of the paragraphs of scikit-learn's descriptions of its data sets."""
    texts = [" ".join(part.split()) for text in described() for part in text.split("\n\n")]
    return of_texts(tenth_apart(texts), tokenizer, train, test, words=24, max_length=96, seed=0)


def of_texts(
    texts: Sequence[list[str]], tokenizer: Any, train: int, test: int, words: int, max_length: int, seed: int
) -> tuple[Spans, Spans]:
    """Passages of training and of test texts; see `recurring` for the other arguments."""
    generator = torch.Generator().manual_seed(seed)
    parts = []
    for part, count in zip(texts, (train, test), strict=True):
        passages = [passage for text in part for passage in cut(text, words)]
        order = torch.randperm(len(passages), generator=generator).tolist()
        found: list[Question] = []
        for index in order:
            if len(found) < count and (question := masked(passages[index], tokenizer.mask_token, generator)):
                found.append(question)
        parts.append(encode(found, tokenizer, max_length, stride=max_length // 4))
    return parts[0], parts[1]


def tidy(text: str) -> str:
    """Brown's text with its quotes and spaces as people write them."""
    return re.sub(r" ([.,;:?!)])", r"\1", text.replace("``", '"').replace("''", '"'))


def cut(text: str, words: int) -> list[str]:
    """Passages of so many words; what is left at the end is left out."""
    every = text.split()
    return [" ".join(every[i : i + words]) for i in range(0, len(every) - words + 1, words)]


def spans(passage: str) -> list[list[tuple[int, int]]]:
    """Recurring spans, each as the places of its occurrences in characters.

    A span has at most five words, of which the first and the last are no function words, and is not part of a longer
    one that recurs as often.
    """
    words = [(m.group().lower(), m.start(), m.end()) for m in re.finditer(r"[^\W_]+(?:['-][^\W_]+)*", passage)]
    places: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for size in range(1, LONGEST + 1):
        for i in range(len(words) - size + 1):
            places[tuple(word for word, _, _ in words[i : i + size])].append(i)
    often = {
        key: at
        for key, at in places.items()
        if len(at) > 1
        and all(b - a >= len(key) for a, b in pairwise(at))
        and _says_something(key[0])
        and _says_something(key[-1])
    }
    whole = {key: at for key, at in often.items() if not _is_part(key, at, often)}
    return [[(words[i][1], words[i + len(key) - 1][2]) for i in at] for key, at in whole.items()]


def _says_something(word: str) -> bool:
    return word not in ENGLISH_STOP_WORDS and "'" not in word


def _is_part(key: tuple[str, ...], at: list[int], often: dict[tuple[str, ...], list[int]]) -> bool:
    return any(
        len(other) > len(key)
        and len(places) == len(at)
        and any(other[i : i + len(key)] == key for i in range(len(other) - len(key) + 1))
        for other, places in often.items()
    )


def masked(passage: str, mask: str, generator: torch.Generator) -> Question | None:
    """The passage with one of its recurring spans masked but once; None if it has none."""
    candidates = spans(passage)
    if not candidates:
        return None
    places = candidates[_draw(len(candidates), generator)]
    kept = _draw(len(places), generator)
    text, end, start = "", 0, 0
    for number, (first, last) in enumerate(places):
        text += passage[end:first]
        if number == kept:
            start = len(text)
            text += passage[first:last]
        else:
            text += mask
        end = last
    answer = passage[slice(*places[kept])]
    return Question(mask, text + passage[end:], ((answer, start),))


def _draw(count: int, generator: torch.Generator) -> int:
    return int(torch.randint(count, (1,), generator=generator))
