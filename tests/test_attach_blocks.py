"""Products outside of a module's call: `with emulating(model)`, and what is said of those beside it."""

import contextlib
import warnings
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fmaq
from attach_cases import ACC, POLICY, QUANTIZED, Called, fm, no_mode_is_left
from fmaq import ops
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, coverage, emulating


class Trained(nn.Module):
    """A model with a second way in, by a functional product and a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(4, 6))
        self.register_buffer("frozen", torch.randn(6, 4))
        self.fc = nn.Linear(4, 3)

    def forward(self, x):
        return self.fc(F.linear(x, self.w))

    def training_step(self, x):
        return self.fc(F.linear(x, self.w)) + (x @ self.frozen)[:, :3]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def emulated_step(model: Trained, x: torch.Tensor) -> torch.Tensor:
    hidden = ops.linear(x, model.w, None, ACC)
    return ops.linear(hidden, model.fc.weight, model.fc.bias, ACC) + fm(x, model.frozen)[:, :3]


def test_a_method_is_emulated_inside_a_block() -> None:
    model, x = attach(Trained(), POLICY), torch.randn(2, 6)
    with fmaq.emulating(model):
        found = model.training_step(x)
        again = x @ x.T
    assert torch.equal(found, emulated_step(model, x))
    assert torch.equal(again, fm(x, x.T))
    assert no_mode_is_left() and torch.equal(x @ x.T, torch.mm(x, x.T))
    expected = torch.autograd.grad(emulated_step(model, x).square().sum(), model.w)[0]
    with emulating(model):
        loss = model.training_step(x).square().sum()
    loss.backward()
    assert torch.equal(model.w.grad, expected)


def test_a_block_knows_weights_and_rules() -> None:
    model, x = attach(Trained(), Policy.parse(QUANTIZED).replace(layers={"fc": None})), torch.randn(2, 6)
    q = ops.quantize
    with emulating(model):
        found = model.training_step(x)
    hidden = ops.linear(q(x, "M2E3"), q(model.w, "M4E3"), None, ACC)
    assert torch.equal(found, model.fc(hidden) + fm(q(x, "M2E3"), q(model.frozen, "M4E3"))[:, :3])


def test_blocks_of_a_context_manager_or_a_stack_hold_their_bodies() -> None:
    model, x = attach(Trained(), POLICY), torch.randn(2, 6)

    @contextlib.contextmanager
    def wrapped():
        with emulating(model):
            yield

    def asked():
        with emulating(model):
            yield x @ x.T

    with wrapped():
        assert torch.equal(x @ x.T, fm(x, x.T))
    with contextlib.ExitStack() as stack:
        stack.enter_context(emulating(model))
        assert torch.equal(model.training_step(x), emulated_step(model, x))
    assert [torch.equal(y, fm(x, x.T)) for y in asked()] == [True]
    assert no_mode_is_left()


def test_blocks_nest_and_end_with_an_error() -> None:
    model, other, x = attach(Trained(), POLICY), attach(Trained(), "M3E5b16"), torch.randn(2, 6)
    with emulating(model):
        with emulating(other):
            assert torch.equal(x @ x.T, ops.matmul(x, x.T, "M3E5b16"))
        assert torch.equal(x @ x.T, fm(x, x.T))
        with pytest.raises(ValueError, match="5"):
            model(torch.randn(2, 5))
        assert torch.equal(x @ x.T, fm(x, x.T))
        with pytest.raises(KeyError), emulating(other):
            raise KeyError("on purpose")
        assert torch.equal(x @ x.T, fm(x, x.T))
    assert no_mode_is_left()


def test_a_block_inside_a_forward_and_other_threads() -> None:
    model, x = attach(Trained(), POLICY), torch.randn(2, 6)

    def forward(module, x):
        with emulating(model):
            inside = x @ x.T
        return inside, x @ x.T

    outer = attach(Called(forward), "M3E5b16")
    inside, after = outer(x)
    assert torch.equal(inside, fm(x, x.T)) and torch.equal(after, ops.matmul(x, x.T, "M3E5b16"))
    with emulating(model), ThreadPoolExecutor(1) as pool:
        assert torch.equal(pool.submit(torch.mm, x, x.T).result(), _plain(x))
    assert no_mode_is_left()


def _plain(x: torch.Tensor) -> torch.Tensor:
    with torch._C.DisableTorchFunction():
        return x @ x.T


def test_gradients_inside_a_block_are_ordinary() -> None:
    model, x = attach(Trained(), POLICY), torch.randn(2, 6)
    with emulating(model):
        loss = model.training_step(x).square().sum()
        found = torch.autograd.grad(loss, model.w)[0]
    assert torch.equal(found, torch.autograd.grad(emulated_step(model, x).square().sum(), model.w)[0])


def test_only_attached_models_have_blocks() -> None:
    with pytest.raises(ValueError, match=r"call fmaq.attach\(model, policy\) before fmaq.emulating"):
        emulating(Trained())
    with pytest.raises(TypeError, match=r"takes a torch.nn.Module, got int"):
        emulating(3)


def test_a_block_counts_as_a_call() -> None:
    model, x = attach(Trained(), "M3E5b16 rounding=stochastic random_bits=4"), torch.randn(2, 6)
    found = []
    for _ in range(2):
        with emulating(model):
            found.append(x @ x.T)
    assert fmaq.emulation.call_counts(model) == {"": 2}
    assert not torch.equal(*found)


# --- what is said of products outside ---


def test_coverage_of_a_method_names_what_is_outside() -> None:
    model, x = attach(Trained(), POLICY), torch.randn(2, 6)
    table = coverage(model.training_step, x)
    assert [(row.layer, row.product, row.covered, row.macs) for row in table] == [
        ("", "mm", False, 2 * (2 * 6 * 4)),
        ("fc", "linear", True, 2 * 4 * 3),
    ]
    assert {row.reason for row in table if not row.covered} == {"outside of every attached module"}
    assert table.share == 24 / (24 + 2 * 48)

    def step(self, x):
        with emulating(self):
            return type(self).training_step(self, x)

    table = coverage(step.__get__(model), x)
    assert table.share == 1.0 and {row.product for row in table} == {"linear", "matmul"}
    with pytest.raises(TypeError, match=r"coverage takes a torch.nn.Module or one's method, got function"):
        coverage(lambda x: x, x)


def test_observe_names_what_is_outside() -> None:
    model, x = attach(Trained(), POLICY), torch.randn(2, 6)
    warned = pytest.warns(FmaqCoverageWarning, match=r"2 products \(mm\) were computed by torch, outside")
    with warned, fmaq.observe(model) as seen:
        model.training_step(x).square().sum().backward()
    assert [row.product for row in seen.outside] == ["mm", "mm"]
    assert list(seen) == ["fc"]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with fmaq.observe(model) as seen, emulating(model):
            model.training_step(x).square().sum().backward()
    assert not seen.outside and len(seen) == 3
