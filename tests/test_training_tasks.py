"""What tasks measure, against the definitions."""

import math
from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import nn

from fmaq.emulation import Policy
from fmaq.training import Examples, Pairs, Schedule, Stage, Windows, evaluate, finetune
from fmaq.training.examples import IGNORED, as_examples
from fmaq.training.tasks import BatchError, forward, loss


class Table(nn.Module):
    """Logits of the next token by this one."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.randn(5, 5, generator=torch.Generator().manual_seed(0)))

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.table[input_ids]


def test_accuracy_and_loss() -> None:
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 0.0]])
    metrics = evaluate(nn.Identity(), (logits, torch.tensor([0, 1, 1])), batch_size=2, progress=False)
    assert metrics["accuracy"] == pytest.approx(2 / 3)
    expected = -(2 - math.log(math.exp(2) + 1)) - (1 - math.log(math.e + 1)) - (0 - math.log(math.exp(3) + 1))
    assert metrics["loss"] == pytest.approx(expected / 3, rel=1e-6)


def test_classes_of_tokens_count_but_for_the_ignored() -> None:
    model, tokens = Table(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    targets = torch.tensor([[1, IGNORED, 4], [IGNORED, 2, IGNORED]])
    logits = model.table.detach()[torch.tensor([0, 2, 4])]
    expected = nn.functional.cross_entropy(logits, torch.tensor([1, 4, 2]))
    right = (logits.argmax(1) == torch.tensor([1, 4, 2])).float().mean()
    for size in (1, 2):
        metrics = evaluate(model, Examples({"input_ids": tokens}, targets), batch_size=size, progress=False)
        assert metrics == {"accuracy": pytest.approx(float(right)), "loss": pytest.approx(float(expected), rel=1e-6)}
    data = Examples({"input_ids": tokens}, targets)
    assert loss(model, data, *data.batch(slice(0, 2))).item() == pytest.approx(float(expected), rel=1e-6)


def test_perplexity_is_of_every_token_but_the_first() -> None:
    model, tokens = Table(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    logs = model.table.detach().log_softmax(1)
    mean = -sum(float(logs[a, b]) for row in tokens.tolist() for a, b in pairwise(row)) / 4
    for size in (1, 2):
        metrics = evaluate(model, Windows(tokens), "perplexity", batch_size=size, progress=False)
        assert metrics["perplexity"] == pytest.approx(math.exp(mean), rel=1e-5)


def test_similarity_pools_what_the_mask_keeps() -> None:
    class Embed(nn.Module):
        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
            return torch.stack([input_ids, input_ids**2, torch.ones_like(input_ids)], 2).float()

    ids = torch.tensor([[1, 9], [1, 1], [4, 2], [0, 5]])
    mask = torch.tensor([[1, 0], [1, 1], [1, 1], [1, 1]])
    first, second = torch.tensor([0, 0, 0]), torch.tensor([1, 2, 3])
    pairs = Pairs({"input_ids": ids, "attention_mask": mask}, first, second, torch.tensor([3.0, 1.0, 2.0]))
    metrics = evaluate(Embed(), pairs, "similarity", batch_size=3, progress=False)
    pooled = torch.tensor([[1.0, 1, 1], [1, 1, 1], [3, 10, 1], [2.5, 12.5, 1]])
    cosines = nn.functional.cosine_similarity(pooled[first], pooled[second])
    expected = torch.corrcoef(torch.stack([cosines, pairs.scores]))[0, 1]
    assert metrics["pearson"] == pytest.approx(float(expected), abs=1e-6)
    order = cosines.argsort().argsort().double()
    expected = torch.corrcoef(torch.stack([order, torch.tensor([2.0, 0.0, 1.0]).double()]))[0, 1]
    assert metrics["spearman"] == pytest.approx(float(expected), abs=1e-9)


def test_modes_are_put_back() -> None:
    model = nn.Sequential(nn.Dropout(), nn.Linear(2, 2))
    model[0].eval()
    seen = []
    model.register_forward_hook(lambda *_: seen.append([m.training for m in model.modules()]))
    evaluate(model, (torch.zeros(1, 2), torch.zeros(1)), progress=False)
    assert seen == [[False, False, False]]
    assert [m.training for m in model.modules()] == [True, False, True]


def test_a_task_of_ones_own() -> None:
    metrics = evaluate(nn.Identity(), "anything", lambda model, data, device: {"length": len(data)}, progress=False)
    assert metrics == {"length": 8.0}


def test_a_torch_data_set() -> None:
    data = torch.utils.data.TensorDataset(torch.eye(3), torch.arange(3))
    assert isinstance(as_examples(data), Examples)
    assert evaluate(nn.Identity(), data, progress=False)["accuracy"] == 1


def test_the_wrong_form_of_data() -> None:
    with pytest.raises(TypeError, match="the task perplexity runs on Windows, but the data are Examples"):
        evaluate(nn.Identity(), (torch.eye(2), torch.arange(2)), "perplexity", progress=False)


def test_outputs_without_logits() -> None:
    class Strange(nn.Module):
        def forward(self, x: torch.Tensor) -> str:
            return "logits"

    with pytest.raises(TypeError, match="the model returned a str; expected a tensor, or an output with logits"):
        forward(Strange(), torch.zeros(1))


@pytest.mark.parametrize(
    ("data", "task"),
    [
        (Examples(torch.zeros(0, 3), torch.zeros(0)), "classification"),
        (Windows(torch.zeros(0, 4)), "perplexity"),
        (Pairs({}, torch.zeros(0).long(), torch.zeros(0).long(), torch.zeros(0)), "similarity"),
    ],
)
def test_empty_data_are_refused_by_every_task(data: Examples | Windows | Pairs, task: str) -> None:
    with pytest.raises(ValueError, match="there is nothing to measure on: the test data are empty"):
        evaluate(nn.Linear(3, 2), data, task, progress=False)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: Windows(torch.zeros(3)),
            ValueError,
            r"tokens must be \(windows, at least 2 tokens\), got the shape \(3,\)",
        ),
        (lambda: Windows(torch.zeros(3, 1)), ValueError, r"at least 2 tokens\), got the shape \(3, 1\)"),
        (lambda: Windows(torch.full((1, 3), 0.5)), ValueError, "tokens must be whole numbers, got 0.5"),
        (
            lambda: Examples(torch.zeros(2), torch.tensor([0.0, 1.5])),
            ValueError,
            "targets must be whole numbers, got 1.5",
        ),
        (lambda: Examples([1, 2], torch.zeros(2)), TypeError, "inputs must be tensors, got a list"),
        (lambda: Examples(torch.zeros(2), [0, 1]), TypeError, "targets must be tensors, got a list"),
        (lambda: pairs([], [], []), ValueError, "there are no pairs of the 3 texts"),
        (lambda: pairs([0], [1, 2], [0.5]), ValueError, "1 first texts, 2 second and 1 scores"),
        (
            lambda: pairs([0, 1], [1, 2], [0.5, 0.5]),
            ValueError,
            "the scores of 2 pairs are all 0.5: nothing correlates",
        ),
        (lambda: pairs([0, 1], [1, 3], [0.5, 1.0]), ValueError, "second names the text 3, but the texts are 0 to 2"),
        (lambda: pairs([0, -1], [1, 2], [0.5, 1.0]), ValueError, "first names the text -1"),
    ],
)
def test_data_in_no_form_of_theirs(make: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def pairs(first: list[int], second: list[int], scores: list[float]) -> Pairs:
    """Of three texts."""
    return Pairs({"ids": torch.zeros(3, 2)}, torch.tensor(first), torch.tensor(second), torch.tensor(scores))


def test_what_a_model_raises_is_told_with_the_batch() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(BatchError, match=r"Linear cannot take .*: float32 of shape \(1, 4\); RuntimeError: ") as caught:
        evaluate(model, (torch.zeros(5, 4), torch.zeros(5)), batch_size=1, progress=False)
    assert isinstance(caught.value.__cause__, RuntimeError)
    with pytest.raises(BatchError, match=r"data are float64 and the model's weights float32: .*x.to\(torch.float32\)"):
        evaluate(model, (torch.zeros(5, 3).double(), torch.zeros(5)), progress=False)
    with pytest.raises(BatchError, match=r"data are float16 and .* float32"):
        loss(model, Examples(torch.zeros(1, 3), torch.zeros(1)), torch.zeros(1, 3).half(), torch.zeros(1).long())
    with pytest.raises(BatchError, match=r"input_ids int64 of shape \(1, 3\) from 0 to 5; IndexError"):
        evaluate(Table(), Windows(torch.tensor([[0, 5, 1]])), "perplexity", progress=False)
    assert evaluate(model.double(), (torch.zeros(5, 3).double(), torch.zeros(5)), progress=False)["loss"] > 0


def test_a_diverged_sum_and_a_lack_of_memory_are_not_the_datas() -> None:
    class Raising(nn.Module):
        def __init__(self, error: Exception) -> None:
            super().__init__()
            self.error = error

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            raise self.error

    for error in (FloatingPointError("diverged"), torch.OutOfMemoryError("full")):
        with pytest.raises(type(error)) as caught:
            evaluate(Raising(error), (torch.zeros(1, 3), torch.zeros(1)), progress=False)
        assert caught.value is error


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.tensor([0, 2]), "the class 2 is not one of the model's 2, 0 to 1"),
        (torch.tensor([-3, 0]), "the class -3 is not one of"),
        (torch.eye(2), r"4 classes do not fit the model's outputs, \(2, 2\)"),
        (torch.tensor([IGNORED, IGNORED]), f"all targets are {IGNORED}"),
    ],
)
def test_classes_that_the_model_has_not(targets: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Linear(3, 2), (torch.zeros(2, 3), targets), progress=False)


def test_training_checks_classes_too() -> None:
    model, data = nn.Linear(3, 2), Examples(torch.zeros(2, 3), torch.tensor([0, 2]))
    with pytest.raises(ValueError, match="the class 2 is not one of the model's 2"):
        finetune(model, Policy(), data, None, Schedule((Stage(1, 0.1),)), progress=False)
    table = Table()
    with pytest.raises(BatchError, match="from 0 to 7"):
        finetune(table, Policy(), Windows(torch.tensor([[0, 7]])), None, Schedule((Stage(1, 0.1),)), progress=False)


def test_an_output_without_classes() -> None:
    with pytest.raises(ValueError, match=r"do not fit the model's outputs, \(3,\): classification needs an output"):
        evaluate(nn.Flatten(0), (torch.zeros(3, 1), torch.zeros(3)), progress=False)


@pytest.mark.parametrize(("found", "message"), [(None, "returned None"), ({}, "returned {}"), (0.5, "returned 0.5")])
def test_a_task_of_ones_own_that_returns_no_metrics(found: object, message: str) -> None:
    with pytest.raises(TypeError, match=f"the task <lambda> {message}; expected metrics by name"):
        evaluate(nn.Identity(), "anything", lambda model, data, device: found, progress=False)


def test_a_task_of_ones_own_that_raises_is_named() -> None:
    with pytest.raises(ValueError, match="the task <lambda> raised KeyError: 'none'"):
        evaluate(nn.Identity(), "anything", lambda model, data, device: {}["none"], progress=False)
