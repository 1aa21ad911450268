"""What tasks measure, against the definitions."""

import math
from itertools import pairwise

import pytest
import torch
from torch import nn

from fmaq.training import Examples, Pairs, Windows, evaluate
from fmaq.training.examples import IGNORED, as_examples
from fmaq.training.tasks import forward, loss


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
