"""Reordered layers: the same network in float32, less error in short accumulators, and everything undone exactly."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fmaq import attach, detach
from fmaq.analysis import apply_orders, channel_sizes, reorder, restore_order


class Net(nn.Module):
    """Layers that can be reordered, and some that cannot: depthwise, tied, shared with a functional call, uncalled."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 3, groups=8)
        self.conv1 = nn.Conv1d(8, 6, 2)
        self.fc = nn.Linear(6, 5)
        self.embed = nn.Embedding(4, 5)
        self.head = nn.Linear(5, 4, bias=False)
        self.head.weight = self.embed.weight
        self.attention = nn.MultiheadAttention(5, 1, batch_first=True)
        self.uncalled = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x = self.depthwise(self.conv(x).relu()).flatten(2)
        y = self.fc(self.conv1(x).mT)
        return {"logits": self.head(self.attention(y, y, y)[0])}


def made() -> tuple[Net, torch.Tensor]:
    torch.manual_seed(0)
    return Net().eval(), torch.randn(2, 3, 5, 5) * torch.tensor([3.0, 0.1, 1.0])[:, None, None]


def test_the_network_computes_the_same_in_float32() -> None:
    model, x = made()
    before = model(x)["logits"]
    assert reorder(model, x) == ["conv", "conv1", "fc"]
    assert model.conv.reduction_order.tolist()[0] == 1  # the faint channel first
    torch.testing.assert_close(model(x)["logits"], before, rtol=1e-5, atol=1e-6)
    single = model.conv(x[0])
    torch.testing.assert_close(single, F.conv2d(x, made()[0].conv.weight, model.conv.bias, padding=1)[0])


def test_layers_called_by_keyword_are_reordered() -> None:
    class Keyword(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(6, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(input=x)

    model, x = Keyword(), torch.randn(5, 6)
    before = model(x)
    assert reorder(model, x) == ["fc"]
    torch.testing.assert_close(model(x), before)


def test_an_interrupt_puts_the_model_back() -> None:
    class Interrupted(nn.Sequential):
        calls = 0

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            if self.calls == 3:
                raise KeyboardInterrupt
            return super().forward(x)

    model = Interrupted(nn.Linear(6, 3))
    before = model[0].weight.clone()
    with pytest.raises(KeyboardInterrupt):
        reorder(model, torch.randn(5, 6))
    assert torch.equal(model[0].weight, before) and not model[0]._forward_pre_hooks


def test_restoring_is_exact() -> None:
    model, x = made()
    state = copy.deepcopy(model.state_dict())
    reorder(model, x)
    assert not torch.equal(model.conv.weight, state["conv.weight"])
    restore_order(model)
    restored = model.state_dict()
    assert restored.keys() == state.keys() and all(torch.equal(restored[k], state[k]) for k in state)
    assert torch.equal(model(x)["logits"], made()[0](x)["logits"])


def test_sums_run_in_the_new_order() -> None:
    """Two significant bits lose every 1 behind a 4, and none before it."""
    layer = nn.Linear(5, 1, bias=False)
    layer.weight.data = torch.ones(1, 5)
    x = torch.tensor([[4.0, 1.0, 1.0, 1.0, 1.0]])
    acc = "M1E4b8 chunk=None"
    assert attach(layer, acc)(x).item() == 4
    reorder(detach(layer), x)
    assert attach(layer, acc)(x).item() == 8


def test_small_first_has_the_smallest_error() -> None:
    rng = np.random.default_rng(0)
    sizes = np.exp(rng.normal(0, 1.5, 128))
    x = torch.from_numpy(rng.standard_normal((256, 128)) * sizes).float()
    torch.manual_seed(0)
    layer = nn.Linear(128, 32, bias=False)
    exact = layer(x).detach()
    size = channel_sizes(layer, x)[""]
    assert torch.equal(size.argsort(), reference_sizes(layer, x).argsort())

    def error(order: torch.Tensor) -> float:
        apply_orders(layer, {"": order})
        found = attach(layer, "M5E6b40 product=M5E6b40")(x).detach()
        restore_order(detach(layer))
        return float(((found - exact) ** 2).mean() / (exact**2).mean())

    small_first, natural = error(size.argsort()), error(torch.arange(128))
    assert small_first < 0.8 * natural < natural < error(size.argsort(descending=True))


def reference_sizes(layer: nn.Linear, x: torch.Tensor) -> torch.Tensor:
    return (x.double() ** 2).mean(0).sqrt() * layer.weight.detach().double().norm(dim=0)


def test_copies_and_checkpoints_keep_the_order() -> None:
    model, x = made()
    reorder(model, x)
    expected = model(x)["logits"]
    assert torch.equal(copy.deepcopy(model)(x)["logits"], expected)
    fresh, _ = made()
    with pytest.raises(RuntimeError, match=r"Unexpected key.*reduction_order"):
        fresh.load_state_dict(model.state_dict())
    reorder(fresh, torch.ones(2, 3, 5, 5))
    fresh.load_state_dict(model.state_dict())
    assert torch.equal(fresh(x)["logits"], expected)


class UsesAWeightApart(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.linear(self.fc(x), self.fc.weight)


def test_a_layer_whose_weight_is_used_apart_is_found_out_and_put_back() -> None:
    torch.manual_seed(0)
    model, x = UsesAWeightApart(), torch.randn(3, 4) * torch.tensor([3.0, 1.0, 2.0, 0.1])
    weight, before = model.fc.weight.detach().clone(), model(x)
    with pytest.raises(RuntimeError, match="UsesAWeightApart uses the weight of one of its layers apart"):
        reorder(model, x)
    assert torch.equal(model.fc.weight, weight) and torch.equal(model(x), before)


def test_modes_buffers_and_gradients_are_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4)).train()
    mean = model[1].running_mean.clone()
    x = torch.randn(2, 2, 3, 3, requires_grad=True)
    reorder(model, x)
    assert model.training and model[1].training and torch.equal(model[1].running_mean, mean)
    model(x).sum().backward()
    assert model[0].weight.grad is not None and x.grad is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, x: reorder(attach(m, "paper12"), x), "reorder it first, then call fmaq.attach"),
        (lambda m, x: reorder(m, x) and reorder(m, x), "reordered already"),
        (
            lambda m, x: apply_orders(m, {"nope": torch.arange(3)}),
            "'nope' is no layer that can be reordered; there are",
        ),
        (lambda m, x: apply_orders(m, {"depthwise": torch.arange(1)}), "'depthwise' is no layer that can be reordered"),
        (lambda m, x: apply_orders(m, {"conv": torch.tensor([0, 0, 1])}), "a permutation of its 3 input channels"),
        (lambda m, x: channel_sizes("model", x), "a torch.nn.Module's layers, got str"),
    ],
)
def test_bad_input(call, message: str) -> None:
    model, x = made()
    with pytest.raises((TypeError, ValueError), match=message):
        call(model, x)
