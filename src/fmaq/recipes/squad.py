"""Questions on passages: SQuAD's files and tables, cut into the windows of tokens that a model takes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fmaq.recipes.explain import RecipeError
from fmaq.training.spans import Spans


@dataclass(frozen=True)
class Question:
    """A question on a passage; `answers` are right texts with the character where each begins, none if it has none."""

    question: str
    passage: str
    answers: tuple[tuple[str, int], ...]


def read_squad(path: Path) -> list[Question]:
    """The questions of an official file, such as train-v1.1.json or dev-v2.0.json.

    Raises:
        RecipeError: the file is not such a file.
    """
    try:
        articles = json.loads(path.read_text(encoding="utf-8"))["data"]
        return [
            Question(item["question"], part["context"], _answers(item["answers"]))
            for article in articles
            for part in article["paragraphs"]
            for item in part["qas"]
        ]
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise RecipeError(f"cannot read {path}: {error}") from None
    except (KeyError, TypeError) as error:
        raise RecipeError(f"{path} is not a file of SQuAD, data/paragraphs/qas with answers: {error!r}") from None


def _answers(given: Iterable[Mapping[str, Any]]) -> tuple[tuple[str, int], ...]:
    return tuple((answer["text"], int(answer["answer_start"])) for answer in given)


def from_columns(questions: Iterable[str], passages: Iterable[str], answers: Iterable[Any]) -> list[Question]:
    """The questions of the hub's tables, whose answers are {"text": [...], "answer_start": [...]}."""
    try:
        return [
            Question(question, passage, tuple(zip(given["text"], map(int, given["answer_start"]), strict=True)))
            for question, passage, given in zip(questions, passages, answers, strict=True)
        ]
    except (KeyError, TypeError, ValueError) as error:
        raise RecipeError(
            f"data.columns.answers: answers must be like {{'text': ['in 1066'], 'answer_start': [17]}}: {error!r}"
        ) from None


def encode(questions: list[Question], tokenizer: Any, max_length: int, stride: int, longest: int = 30) -> Spans:
    """Windows of at most `max_length` tokens, the question and then part of the passage, which overlap by `stride`.

    Args:
        tokenizer: a fast one of transformers.
        longest: the most tokens that a found answer may have.

    Raises:
        RecipeError: there is no fast tokenizer, a question leaves no room for the passage, or an answer is not where
            the data say it is.
    """
    if not getattr(tokenizer, "is_fast", False):
        raise RecipeError("span extraction needs a model with a fast tokenizer, which knows where its tokens are")
    for number, item in enumerate(questions):
        for text, start in item.answers:
            if item.passage[start : start + len(text)] != text:
                raise RecipeError(
                    f"question {number}: its answer {text!r} is not at character {start} of the passage, "
                    f"{item.passage[start : start + len(text)]!r} is"
                )
    made = _tokenised(questions, tokenizer, max_length, stride)
    owners = torch.tensor(made.pop("overflow_to_sample_mapping"), dtype=torch.int64)
    offsets = torch.tensor(made.pop("offset_mapping"), dtype=torch.int32).view(len(owners), -1, 2)
    inside = torch.tensor([[part == 1 for part in made.sequence_ids(row)] for row in range(len(owners))])
    offsets[~inside.view(offsets.shape[:2])] = -1
    targets = torch.tensor(
        [_ends(questions[owner], offsets[row]) for row, owner in enumerate(owners.tolist())], dtype=torch.int64
    ).view(-1, 2)
    return Spans(
        {name: torch.tensor(values) for name, values in made.items()},
        targets,
        offsets,
        owners,
        [item.passage for item in questions],
        [[text for text, _ in item.answers] for item in questions],
        longest,
    )


def _tokenised(questions: list[Question], tokenizer: Any, max_length: int, stride: int) -> Any:
    try:
        return tokenizer(
            [item.question.strip() for item in questions],
            [item.passage for item in questions],
            truncation="only_second",
            max_length=max_length,
            stride=stride,
            padding=True,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
        )
    except BaseException as error:  # tokenizers panics, which is none of Exception, where nothing is left for a window
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        raise RecipeError(
            f"data.max_length {max_length} with data.stride {stride} leaves no room for a passage beside the longest "
            f"question: {error}"
        ) from None


def _ends(item: Question, offsets: torch.Tensor) -> tuple[int, int]:
    """The first and the last token of the first answer in a window; (0, 0) if it is not all in it."""
    if not item.answers:
        return 0, 0
    text, begin = item.answers[0]
    end = begin + len(text)
    first = ((offsets[:, 0] >= 0) & (offsets[:, 0] <= begin) & (begin < offsets[:, 1])).nonzero()
    last = ((offsets[:, 0] >= 0) & (offsets[:, 0] < end) & (end <= offsets[:, 1])).nonzero()
    return (int(first[0]), int(last[-1])) if len(first) and len(last) else (0, 0)
