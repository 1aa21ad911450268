"""Span extraction: windows and their targets, the span that is found, and its marks, against torchmetrics' SQuAD."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor, nn

from fmaq import Policy
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.squad import Question, encode, from_columns, read_squad
from fmaq.training import Schedule, Spans, Stage, evaluate, finetune
from fmaq.training.spans import exact_match, f1, words

PASSAGE = "The tower was begun in 1887. Its builder, Gustave Eiffel, finished it in 1889 for the World's Fair."


@pytest.fixture(scope="module")
def tokenizer() -> object:
    """A fast tokenizer of words, with BERT's special tokens."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    made = tokenizers.Tokenizer(tokenizers.models.WordLevel(unk_token="[UNK]"))
    made.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    made.train_from_iterator(
        [PASSAGE, "when who why was it finished by whom"], tokenizers.trainers.WordLevelTrainer(special_tokens=special)
    )
    made.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, made.token_to_id(name)) for name in ("[CLS]", "[SEP]")],
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made,
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


def asked(question: str, *answers: str) -> Question:
    return Question(question, PASSAGE, tuple((text, PASSAGE.index(text)) for text in answers))


class Scored(nn.Module):
    """Gives the scores it was made with, whatever it reads; as a model of transformers does."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores, self.at = nn.Parameter(scores), 0

    def forward(self, input_ids: Tensor, **others: Tensor) -> SimpleNamespace:
        part = self.scores[self.at : self.at + len(input_ids)]
        self.at = (self.at + len(input_ids)) % len(self.scores)
        return SimpleNamespace(start_logits=part[:, 0], end_logits=part[:, 1])


class Tokens(nn.Module):
    """One output a token, as no model for spans has."""

    def forward(self, input_ids: Tensor, **others: Tensor) -> Tensor:
        return input_ids.float()


def sure_of(data: Spans) -> Tensor:
    """Scores of a model that knows the targets."""
    tokens = data.offsets.shape[1]
    return nn.functional.one_hot(data.targets, tokens).float() * 10


@pytest.mark.parametrize(("max_length", "stride"), [(64, 0), (20, 6), (16, 4)])
def test_targets_are_where_the_answer_is(tokenizer: object, max_length: int, stride: int) -> None:
    questions = [
        asked("when was it finished", "1889"),
        asked("by whom", "Gustave Eiffel"),
        asked("why", "World's Fair"),
    ]
    data = encode(questions, tokenizer, max_length, stride)
    assert data.inputs["input_ids"].shape == data.offsets.shape[:2]
    assert data.inputs["input_ids"].shape[1] <= max_length
    for question, item in enumerate(questions):
        rows = (data.questions == question).nonzero().flatten().tolist()
        text, begin = item.answers[0]
        for row in rows:
            held = [tuple(pair) for pair in data.offsets[row].tolist()]
            whole = any(a == begin for a, _ in held) and any(b == begin + len(text) for _, b in held)
            first, last = data.targets[row].tolist()
            assert (first, last) != (0, 0) if whole else (first, last) == (0, 0)
            if whole:
                assert PASSAGE[held[first][0] : held[last][1]] == text
        assert any(data.targets[row].any() for row in rows)
    metrics = evaluate(Scored(sure_of(data)), data, "span_extraction", batch_size=2, progress=False)
    assert (metrics["exact_match"], metrics["f1"]) == (1.0, 1.0)


def test_the_best_allowed_span_is_found(tokenizer: object) -> None:
    data = encode([asked("when", "1889"), asked("who", "Gustave Eiffel")], tokenizer, 24, 8, longest=3)
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(len(data), 2, data.offsets.shape[1], generator=generator)
    expected = {}
    for question in range(2):
        spans = [
            (float(scores[row, 0, i] + scores[row, 1, j]), PASSAGE[data.offsets[row, i, 0] : data.offsets[row, j, 1]])
            for row in (data.questions == question).nonzero().flatten().tolist()
            for i, j in itertools.product(range(data.offsets.shape[1]), repeat=2)
            if 0 <= j - i < 3 and data.offsets[row, i, 0] >= 0 and data.offsets[row, j, 0] >= 0
        ]
        expected[question] = max(spans)[1]
    torchmetrics = pytest.importorskip("torchmetrics.functional.text")
    theirs = torchmetrics.squad(
        [{"id": str(q), "prediction_text": text} for q, text in expected.items()],
        [{"id": str(q), "answers": {"text": list(data.answers[q]), "answer_start": [0]}} for q in expected],
    )
    metrics = evaluate(Scored(scores), data, "span_extraction", batch_size=3, progress=False)
    assert 100 * metrics["exact_match"] == pytest.approx(float(theirs["exact_match"]))
    assert 100 * metrics["f1"] == pytest.approx(float(theirs["f1"]))
    losses = nn.functional.cross_entropy(scores.flatten(0, 1), data.targets.flatten())
    assert metrics["loss"] == pytest.approx(float(losses), rel=1e-6)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The World's Fair!", "world's fair"),
        ("in 1889", "1889"),
        ("1889", "in the year 1889"),
        ("an apple a day", "Apple day"),
        ("the the", "a"),
        ("Eiffel Eiffel", "Eiffel"),
        ("nothing", "else"),
    ],
)
def test_marks_are_those_of_squad(text: str, answer: str) -> None:
    torchmetrics = pytest.importorskip("torchmetrics.functional.text")
    theirs = torchmetrics.squad(
        {"id": "0", "prediction_text": text}, {"id": "0", "answers": {"text": [answer], "answer_start": [0]}}
    )
    assert 100 * exact_match(text, answer) == float(theirs["exact_match"])
    if words(text) and words(answer):
        assert 100 * f1(text, answer) == pytest.approx(float(theirs["f1"]))
    else:  # SQuAD 2's evaluation: what has no word overlaps with what has none
        assert f1(text, answer) == float(words(text) == words(answer))


def test_no_answer_is_found_where_its_scores_are_best(tokenizer: object) -> None:
    data = encode([asked("when", "1889"), asked("who", "Gustave Eiffel"), asked("whom")], tokenizer, 20, 6)
    known = evaluate(Scored(sure_of(data)), data, "span_extraction", progress=False)
    assert (known["exact_match"], known["f1"]) == (1.0, 1.0)
    none = torch.zeros(len(data), 2, data.offsets.shape[1])
    none[..., 0] = 1
    metrics = evaluate(Scored(none), data, "span_extraction", progress=False)
    assert (metrics["exact_match"], metrics["f1"]) == (pytest.approx(1 / 3), pytest.approx(1 / 3))


def test_training_learns_the_ends(tokenizer: object) -> None:
    transformers = pytest.importorskip("transformers")
    data = encode([asked("when was it finished", "1889"), asked("by whom", "Gustave Eiffel")], tokenizer, 40, 8)
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32
    )
    model = transformers.BertForQuestionAnswering(config)
    policy = Policy(accumulator="M7E4b10 product=M7E4b12")
    found = finetune(
        model,
        policy,
        data,
        data,
        Schedule((Stage(30, 1e-2, underflow_from=0.5),), batch_size=2),
        task="span_extraction",
        progress=False,
    )
    assert found.metrics["exact_match"] == 1.0
    assert found.metrics["loss"] < 0.5


def test_squad_files_and_tables_say_the_same(tokenizer: object, tmp_path: Path) -> None:
    answers = [{"text": "1889", "answer_start": PASSAGE.index("1889")}]
    items = [{"id": "a", "question": "when", "answers": answers}, {"id": "b", "question": "why", "answers": []}]
    file = tmp_path / "dev.json"
    file.write_text(json.dumps({"version": "2.0", "data": [{"paragraphs": [{"context": PASSAGE, "qas": items}]}]}))
    columns = [{"text": ["1889"], "answer_start": [PASSAGE.index("1889")]}, {"text": [], "answer_start": []}]
    found = read_squad(file)
    assert found == from_columns(["when", "why"], [PASSAGE] * 2, columns) == [asked("when", "1889"), asked("why")]
    assert encode(found, tokenizer, 20, 6).first(1).digest() == encode(found[:1], tokenizer, 20, 6).digest()


def test_errors(tokenizer: object, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="its answer '1889' is not at character 3 of the passage"):
        encode([Question("when", PASSAGE, (("1889", 3),))], tokenizer, 20, 6)
    with pytest.raises(RecipeError, match=r"max_length 8 with data.stride 6"):
        encode([asked("when was it finished by whom", "1889")], tokenizer, 8, 6)
    with pytest.raises(RecipeError, match="fast tokenizer"):
        encode([asked("when", "1889")], None, 20, 6)
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(RecipeError, match="not a file of SQuAD"):
        read_squad(tmp_path / "other.json")
    with pytest.raises(RecipeError, match="answers must be like"):
        from_columns(["when"], [PASSAGE], [["1889"]])
    data = encode([asked("when", "1889")], tokenizer, 40, 6)
    with pytest.raises(ValueError, match="start_logits and end_logits"):
        evaluate(Tokens(), data, "span_extraction", progress=False)
