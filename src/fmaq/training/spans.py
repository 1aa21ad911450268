"""Answers that are spans of a passage: what they are learnt from, and how they are marked (arXiv 1606.05250, SQuAD).

A network gives every token a score as the first of the answer and one as its last; the answer is the span with the
largest sum of both. It is compared with people's as texts, by the measures of SQuAD: exact match and F1.
"""

from __future__ import annotations

import hashlib
import re
import string
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fmaq.training.examples import Examples


@dataclass
class Spans(Examples):
    """Questions on passages, cut into windows that a model can take; the answer is a span of the passage.

    Args:
        inputs: tensors by name, (windows, tokens).
        targets: (windows, 2) the answer's first and last token; (0, 0) in a window that has no answer.
        offsets: (windows, tokens, 2) where each token begins and ends in its passage, in characters; −1 of a token
            that is none of the passage.
        questions: (windows,) whose window it is, in ascending order.
        passages: the text of each question's passage.
        answers: texts that are right, for each question; none where the passage does not answer it.
        longest: the most tokens that an answer may have.

    Raises:
        ValueError: the parts do not fit each other; says which.
    """

    offsets: Tensor
    questions: Tensor
    passages: Sequence[str]
    answers: Sequence[Sequence[str]]
    longest: int = 30

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.targets.shape != (len(self), 2):
            raise ValueError(f"targets must be (windows, 2), a first and a last token, got {tuple(self.targets.shape)}")
        if self.offsets.dim() != 3 or len(self.offsets) != len(self) or self.offsets.shape[2] != 2:
            raise ValueError(f"offsets must be ({len(self)} windows, tokens, 2), got {tuple(self.offsets.shape)}")
        if self.questions.shape != (len(self),) or bool((self.questions.diff() < 0).any()):
            raise ValueError("questions must name each window's question, in ascending order")
        if len(self.passages) != len(self.answers):
            raise ValueError(f"{len(self.passages)} passages but {len(self.answers)} lists of answers")
        if len(self) and not 0 <= int(self.questions[0]) <= int(self.questions[-1]) < len(self.passages):
            raise ValueError(f"there are questions 0 to {len(self.passages) - 1}; a window names another")
        if self.longest < 1:
            raise ValueError(f"longest must be at least 1 token, got {self.longest}")

    def first(self, count: int) -> Spans:
        """The windows of the first `count` questions."""
        end = int((self.questions < count).sum())
        inputs, targets = self.batch(slice(0, end))
        parts = (self.offsets[:end], self.questions[:end], self.passages[:count], self.answers[:count])
        return Spans(inputs, targets, *parts, self.longest)

    def digest(self) -> str:
        """A hash of the contents."""
        texts = repr((list(self.passages), [list(answers) for answers in self.answers], self.longest))
        return hashlib.sha256((super().digest() + texts).encode()).hexdigest()[:16]


class Finder:
    """Collects the best span of each question, batch by batch.

    Where some question has no answer, as in SQuAD 2, "no answer" is found if the first token's two scores, the least of
    any window, are above those of every span.
    """

    def __init__(self, data: Spans) -> None:
        self.data = data
        self.best: dict[int, tuple[float, str]] = {}
        self.none: dict[int, float] = {}

    def add(self, start: int, scores: Tensor) -> None:
        """The scores (windows, 2, tokens) of the windows from `start`."""
        scores = scores.cpu()
        first, last = scores[:, 0], scores[:, 1]
        offsets = self.data.offsets[start : start + len(scores)]
        inside = offsets[..., 0] >= 0
        tokens = scores.shape[2]
        short = torch.ones(tokens, tokens, dtype=torch.bool).triu().tril(self.data.longest - 1)
        allowed = short & inside[:, :, None] & inside[:, None, :]
        sums = (first[:, :, None] + last[:, None, :]).masked_fill(~allowed, -torch.inf)
        found, places = sums.flatten(1).max(1)
        for row, question in enumerate(self.data.questions[start : start + len(scores)].tolist()):
            self.none[question] = min(self.none.get(question, torch.inf), float(first[row, 0] + last[row, 0]))
            if found[row] > self.best.get(question, (-torch.inf, ""))[0]:
                begin, end = divmod(int(places[row]), tokens)
                text = self.data.passages[question][int(offsets[row, begin, 0]) : int(offsets[row, end, 1])]
                self.best[question] = (float(found[row]), text)

    def texts(self) -> dict[int, str]:
        """The text found for each question; empty for no answer."""
        optional = any(not answers for answers in self.data.answers)
        found = {}
        for question, none in self.none.items():
            score, text = self.best.get(question, (-torch.inf, ""))
            found[question] = "" if optional and none > score else text
        return found


def marks(found: dict[int, str], answers: Sequence[Sequence[str]]) -> tuple[float, float]:
    """The shares, from 0 to 1, of SQuAD's exact match and F1, each the best over a question's right answers."""
    exact = sum(_best(exact_match, text, answers[question]) for question, text in found.items())
    overlap = sum(_best(f1, text, answers[question]) for question, text in found.items())
    return exact / len(found), overlap / len(found)


def _best(measure: Callable[[str, str], float], text: str, answers: Sequence[str]) -> float:
    return max(measure(text, answer) for answer in answers or [""])


def words(text: str) -> list[str]:
    """The words that SQuAD compares: in lower case, without punctuation and articles."""
    text = text.lower().translate(str.maketrans("", "", string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def exact_match(text: str, answer: str) -> bool:
    """Whether the words are the same, in the same order."""
    return words(text) == words(answer)


def f1(text: str, answer: str) -> float:
    """Harmonic mean of precision and recall of the words; of no words, 1 if neither has any, else 0."""
    found, expected = words(text), words(answer)
    if not found or not expected:
        return float(found == expected)
    common = (Counter(found) & Counter(expected)).total()
    return 2 * common / (len(found) + len(expected))
