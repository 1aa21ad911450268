"""The texts of the experiments: recurring spans, sentiment of snippets and masked characters."""

import math
from pathlib import Path

import pytest
import torch

from fmaq.recipes.callables import load_callable
from fmaq.training import Examples, evaluate
from fmaq.training.examples import IGNORED

REPRODUCE = Path(__file__).resolve().parents[1] / "examples" / "reproduce"
CACHE = REPRODUCE.parents[1] / ".cache" / "examples"


def function(name: str) -> object:
    return load_callable(f"{REPRODUCE}/{name}")


@pytest.mark.parametrize(
    ("passage", "expected"),
    [
        ("The red fox saw a red fox.", [["red fox", "red fox"]]),
        ("Rome fell; when Rome burned, Rome's poets fled.", [["Rome", "Rome"]]),
        ("A dog and a cat.", []),
        ("Of the king of the hill: the king!", [["king", "king"]]),
        ("Fox, fox.", [["Fox", "fox"]]),
        ("It didn't, and he didn't.", []),
    ],
)
def test_spans_that_recur(passage: str, expected: list[list[str]]) -> None:
    found = function("spans.py:spans")(passage)
    assert [[passage[a:b] for a, b in places] for places in found] == expected


@pytest.mark.parametrize("seed", range(5))
def test_one_occurrence_is_left_and_is_the_answer(seed: int) -> None:
    passage = "Rome was sacked. After Rome, the poets of Rome left; no poets returned."
    question = function("spans.py:masked")(passage, "[MASK]", torch.Generator().manual_seed(seed))
    ((text, start),) = question.answers
    assert question.passage[start : start + len(text)] == text
    assert text in ("Rome", "poets")
    assert question.passage.count(text) == 1
    assert question.passage.replace("[MASK]", text) == passage
    assert function("spans.py:masked")("Nothing here.", "[MASK]", torch.Generator()) is None


def test_a_tokenizer_and_passages_without_anything_fetched() -> None:
    pytest.importorskip("transformers")
    torch.manual_seed(0)
    model, tokenizer = function("models.py:tiny_bert")()
    train, test = function("spans.py:described_recurring")(tokenizer)
    assert len(set(train.questions.tolist())) == 16
    assert len(set(test.questions.tolist())) > 4
    assert tokenizer.mask_token_id in test.inputs["input_ids"]
    assert evaluate(model, test, "span_extraction", progress=False)["loss"] == pytest.approx(
        math.log(test.offsets.shape[1]), rel=0.2
    )


def test_the_unigram_loss_is_that_of_the_best_constant_guess() -> None:
    train, test = function("text.py:described_characters")(train=200, test=100)
    known = train.targets[train.targets != IGNORED].tolist()
    asked = test.targets[test.targets != IGNORED].tolist()
    symbols = 40  # 39 characters, and any other one
    shares = [(known.count(symbol) + 1) / (len(known) + symbols) for symbol in range(symbols)]
    assert test.unigram == pytest.approx(-sum(math.log(shares[symbol]) for symbol in asked) / len(asked), rel=1e-9)

    class Constant(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return torch.tensor(shares).log().expand(*input_ids.shape, symbols)

    found = function("text.py:filling_in")(Constant(), test, "cpu")
    assert found["loss"] == pytest.approx(found["unigram"], rel=1e-5)


def test_characters_are_masked_where_a_target_is() -> None:
    train, _ = function("text.py:described_characters")()
    inputs, hidden = train.inputs["input_ids"], train.targets != IGNORED
    assert 0.08 < hidden.float().mean() < 0.25
    assert bool((inputs[hidden] == 40).all())
    assert bool((inputs[~hidden] < 40).all())
    assert isinstance(train, Examples)


@pytest.mark.skipif(not (CACHE / "snippets").exists(), reason="`make fetch` downloads the snippets")
def test_snippets_have_both_classes() -> None:
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(CACHE / "minilm")
    train, test = function("snippets.py:movie_snippets")(tokenizer, train=9000, test=1500)
    assert (len(train), len(test)) == (9000, 1500)
    assert 0.4 < test.targets.float().mean() < 0.6
    rows = {tuple(row) for row in train.inputs["input_ids"].tolist()}
    assert sum(tuple(row) in rows for row in test.inputs["input_ids"].tolist()) < 10  # a few snippets occur twice
