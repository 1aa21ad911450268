"""Frozen weights: the same bits as without, no more work than once, ordinary writes noticed, the promise as told."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fmaq
from attach_cases import ACC, SmallCNN
from fmaq import kernels
from fmaq.emulation import Policy
from fmaq.numerics import Accumulator

OFFSETS = list(range(-4, 4)) * 25
FORMATS = {
    "plain": Policy(accumulator=ACC),
    "floats": Policy(accumulator=ACC, weight="M4E3", activation="M4E3"),
    "by channel": Policy(accumulator=ACC, weight="M4E3", activation="M4E3", weight_per_channel=True),
    "offsets": Policy(accumulator=ACC, weight="M4E3", layers={"": {"offset": OFFSETS}}),
    "codes": Policy(accumulator=Accumulator("I16f0 product=I16f0"), weight="int8", activation="int8"),
    "codes by channel": Policy(
        accumulator=Accumulator("I16f0 product=I16f0"), weight="int8", activation="int8", weight_per_channel=True
    ),
}


def linear(policy: Policy) -> nn.Linear:
    """Large enough for its panels to be kept."""
    torch.manual_seed(0)
    return fmaq.attach(nn.Linear(150, 200), policy)  # type: ignore[return-value]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("inference", [False, True])
def test_same_bits(name: str, inference: bool) -> None:
    model = linear(FORMATS[name])
    inputs = [torch.randn(rows, 150) for rows in (1, 3, 1, 70)]
    wanted = [model(x).detach() for x in inputs]
    with torch.inference_mode() if inference else torch.no_grad(), fmaq.frozen(model):
        for _ in range(3):
            for x, y in zip(inputs, wanted, strict=True):
                assert torch.equal(model(x), y)


def test_convolutions_and_all_that_is_between() -> None:
    torch.manual_seed(0)
    model, x = SmallCNN().eval(), torch.randn(2, 2, 9, 9)
    fmaq.attach(model, FORMATS["floats"])
    with torch.no_grad():
        wanted = model(x)
        with fmaq.frozen(model):
            assert all(torch.equal(model(x), wanted) for _ in range(3))


def test_a_weight_is_quantized_and_measured_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = linear(FORMATS["offsets"]), torch.randn(1, 150)
    sizes: list[int] = []
    for name in ("_measured", "in_memory_order"):
        original = getattr(kernels.ranges, name)
        monkeypatch.setattr(
            kernels.ranges, name, lambda x, *rest, original=original: sizes.append(x.numel()) or original(x, *rest)
        )
    with torch.no_grad(), fmaq.frozen(model):
        model(x)
        assert sizes.count(model.weight.numel()) > 0
        sizes.clear()
        model(x)
    assert sizes and model.weight.numel() not in sizes


@pytest.mark.parametrize("change", ["in place", "copied", "replaced", "data", "loaded"])
def test_ordinary_writes_are_noticed(change: str) -> None:
    model, x = linear(FORMATS["floats"]), torch.randn(2, 150)
    other = copy.deepcopy(model.state_dict())
    other["weight"] = other["weight"].flip(1) * 3
    with torch.no_grad(), fmaq.frozen(model):
        before = model(x)
        if change == "in place":
            model.weight.copy_(other["weight"])
        elif change == "copied":
            torch.nn.init.constant_(model.weight, 0.25)
        elif change == "replaced":
            model.weight = nn.Parameter(other["weight"].clone())
        elif change == "data":
            model.weight.data = other["weight"].clone()  # another storage
        else:
            model.load_state_dict(other)
        after = model(x)
    with torch.no_grad():
        assert torch.equal(after, model(x)) and not torch.equal(after, before)


def test_an_uncounted_write_is_what_the_promise_excludes() -> None:
    model, x = linear(FORMATS["floats"]), torch.randn(2, 150)
    with torch.no_grad(), fmaq.frozen(model):
        before = model(x)
        model.weight.data.mul_(3)
        assert torch.equal(model(x), before)
    with torch.no_grad():
        assert not torch.equal(model(x), before)


def test_weights_whose_writes_are_not_counted_are_not_frozen() -> None:
    with torch.inference_mode():
        model, x = linear(FORMATS["floats"]), torch.randn(2, 150)
        assert model.weight.is_inference()
        with fmaq.frozen(model):
            before = model(x)
            model.weight.mul_(-1.5)
            after = model(x)
        assert torch.equal(after, model(x)) and not torch.equal(after, before)


def test_gradients_are_those_of_a_model_that_is_not_frozen() -> None:
    """A step inside the block, too: what is recorded is made anew each time."""
    found = []
    for is_frozen in (False, True):
        model = linear(FORMATS["floats"])
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        x = torch.linspace(-1, 1, 300).reshape(2, 150)

        def train(model: nn.Module = model, x: torch.Tensor = x, optimizer: torch.optim.SGD = optimizer) -> None:
            for _ in range(2):
                with torch.no_grad():
                    model(x)
                optimizer.zero_grad()
                model(x).square().sum().backward()
                optimizer.step()

        if is_frozen:
            with fmaq.frozen(model):
                train()
        else:
            train()
        found.append(model.weight.detach().clone())
    assert torch.equal(*found)


def test_nothing_is_kept_afterwards_and_blocks_nest() -> None:
    first, second, x = linear(FORMATS["floats"]), linear(FORMATS["plain"]), torch.randn(1, 150)
    with torch.no_grad():
        with fmaq.frozen(first):
            with fmaq.frozen(second):
                first(x), second(x)
                assert kernels.store_of(first.weight) is not kernels.store_of(second.weight) is not None
            assert kernels.store_of(second.weight) is None and kernels.store_of(first.weight) is not None
            with pytest.raises(ZeroDivisionError), fmaq.frozen(second):
                1 / 0  # noqa: B018
            assert kernels.store_of(second.weight) is None
        assert kernels.store_of(first.weight) is None


def test_compiled_code_is_left_alone() -> None:
    model, x = linear(FORMATS["floats"]), torch.randn(2, 150)
    with torch.no_grad():
        wanted = model(x)
        with fmaq.frozen(model):
            compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
            assert torch.equal(compiled(x), wanted) and torch.equal(compiled(x), wanted)
    torch._dynamo.reset()


def test_what_is_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match=r"frozen takes a torch.nn.Module, got dict"), fmaq.frozen({}):  # type: ignore[arg-type]
        pass
