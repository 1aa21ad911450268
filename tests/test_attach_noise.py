"""Stochastic rounding in a model: other random numbers in every layer and call, the same when a call is repeated."""

import copy
import hashlib
import pickle
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attach_cases import Attention, Called
from fmaq import calibrate, coverage, observe, ops
from fmaq.emulation import Policy, attach, call_counts, detach, restart_calls
from fmaq.numerics import Accumulator

ACC = Accumulator("M3E5b16", product="M3E5b16", rounding="stochastic", random_bits=8, seed=5)
POLICY = Policy(accumulator=ACC)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def seeded(layer: str, call: int, product: int = 0, purpose: str = "") -> Accumulator:
    """The accumulator of a product: its seed is the BLAKE2b hash of these words, 8 bytes, the lowest first."""
    words = "\0".join(map(str, (5, layer, call, product, 0, purpose)))
    return replace(ACC, seed=int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest(), "little"))


class Equal(nn.Module):
    """Two equal layers of one input."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(40, 8, bias=False)
        self.second = copy.deepcopy(self.first)

    def forward(self, x):
        return self.first(x), self.second(x)


def test_layers_calls_and_products_have_noise_of_their_own() -> None:
    model, x = attach(Equal(), POLICY), torch.randn(4, 40)
    found = [*model(x), *model(x)]
    names = [("first", 0), ("second", 0), ("first", 1), ("second", 1)]
    expected = [ops.linear(x, model.first.weight, None, seeded(*name)) for name in names]
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert not any(torch.equal(found[0], y) for y in found[1:])
    twice = attach(Called(lambda m, x: (x @ m.w, x @ m.w), w=torch.randn(40, 8)), POLICY)
    one, other = twice(x)
    assert torch.equal(one, ops.matmul(x, twice.w, seeded("", 0)))
    assert torch.equal(other, ops.matmul(x, twice.w, seeded("", 0, 1)))


def test_averaging_over_calls_and_layers_approaches_the_exact_product() -> None:
    """The error of a mean of n falls by about the square root of n: it did not fall at all with one noise for all."""
    model, x = attach(Equal(), Policy(accumulator=replace(ACC, random_bits=16))), torch.rand(8, 40)
    exact = (x.double() @ model.first.weight.detach().double().T).float()
    with torch.no_grad():
        draws = torch.stack([y for _ in range(50) for y in model(x)])
    one = (draws - exact).square().mean().sqrt()
    mean = (draws.mean(0) - exact).square().mean().sqrt()
    assert 0.05 < float(mean / one) < 0.2
    attach(model, Policy(accumulator=ACC, noise="repeated"))
    with torch.no_grad():
        assert all(torch.equal(y, model(x)[0]) for _ in range(3) for y in model(x))
        assert torch.equal(model(x)[0], ops.linear(x, model.first.weight, None, ACC))


def test_noise_may_be_repeated_in_some_layers() -> None:
    model, x = Equal(), torch.randn(4, 40)
    attach(model, Policy(accumulator=ACC, layers={"first": {"noise": "repeated"}}))
    (a, b), (c, d) = model(x), model(x)
    assert torch.equal(a, c) and not torch.equal(b, d)
    with pytest.raises(ValueError, match="noise 'by_cal' is none of: by_call, repeated; did you mean 'by_call'"):
        Policy(noise="by_cal")
    assert Policy.parse(Policy(accumulator=ACC, noise="repeated").to_mapping()).noise == "repeated"


def test_the_same_sequence_of_calls_gives_the_same_bits() -> None:
    x = torch.randn(4, 40)
    model = attach(Equal(), POLICY)
    first = [model(x)[0] for _ in range(3)]
    attach(model, POLICY)  # counts anew
    assert all(torch.equal(model(x)[0], y) for y in first)
    restart_calls(model)
    assert torch.equal(model(x)[0], first[0])
    counts = call_counts(model)
    assert counts == {"first": 1, "second": 1} | {"": 1}
    assert torch.equal(model(x)[0], first[1])
    restart_calls(model, counts)
    assert torch.equal(model(x)[0], first[1])
    with pytest.raises(ValueError, match="'third', which is no module"):
        restart_calls(model, {"third": 1})
    assert call_counts(detach(model)) == {}
    assert set(vars(model)) == set(vars(Equal()))


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_goes_on_counting_by_itself(duplicate) -> None:
    model, x = attach(Equal(), POLICY), torch.randn(4, 40)
    model(x)
    other = duplicate(model)
    expected = model(x)[0]
    model(x)
    assert torch.equal(other(x)[0], expected)


def test_looking_does_not_disturb_the_count() -> None:
    x = torch.randn(4, 40)
    model = attach(Equal(), POLICY)
    expected = [model(x)[0] for _ in range(2)]
    attach(model, POLICY)
    assert torch.equal(model(x)[0], expected[0])
    coverage(model, x)
    calibrate(model, replace(POLICY, accumulator=ACC), [x])
    with observe(model) as seen:
        assert torch.equal(model(x)[0], expected[1])
    assert seen["first"].calls == 1
    assert str(seen["first"].accumulator) == str(ACC)


def test_ranks_have_noise_of_their_own(monkeypatch) -> None:
    model, x = attach(Equal(), POLICY), torch.randn(4, 40)
    first = model(x)[0]
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for rank, is_same in ((0, True), (1, False)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda rank=rank: rank)
        restart_calls(model)
        assert torch.equal(model(x)[0], first) is is_same


# --- gradients ---


class Deep(nn.Module):
    """Blocks that are checkpointed, alone or two in one, and one of them called twice."""

    def __init__(self, how: str, use_reentrant: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(3))
        self.pair = nn.Sequential(self.blocks[1], self.blocks[2])
        self.how, self.use_reentrant = how, use_reentrant

    def _run(self, module, x):
        return checkpoint(module, x, use_reentrant=self.use_reentrant) if self.how != "plain" else module(x)

    def forward(self, x):
        x = self._run(self.blocks[0], x)
        if self.how == "nested":
            return self._run(lambda y: self.pair(self._run(self.blocks[0], self.pair(y))), x)
        return self.pair(self._run(self.blocks[0], self._run(self.pair, x)))


def gradients(model: nn.Module, *inputs: torch.Tensor) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Of two forwards whose gradients are computed together: of the inputs, and of the parameters."""
    model.zero_grad()
    inputs = [x.detach().clone().requires_grad_() for x in inputs]
    sum(model(x).square().sum() for x in inputs).backward()
    return [x.grad for x in inputs], [p.grad.clone() for p in model.parameters()]


def are_equal(found: tuple[list[torch.Tensor], ...], expected: tuple[list[torch.Tensor], ...]) -> bool:
    """Inputs' gradients to the bit; parameters' but for the order in which torch adds up those of several uses."""
    same = all(torch.equal(a, b) for a, b in zip(found[0], expected[0], strict=True))
    return same and all(torch.allclose(a, b, rtol=0, atol=2e-6) for a, b in zip(found[1], expected[1], strict=True))


@pytest.mark.parametrize("estimator", ["identity", "recursive/diff"])
@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("how", ["single", "nested"])
def test_recomputation_repeats_the_noise(how, use_reentrant, estimator) -> None:
    plain = Deep("plain", use_reentrant)
    model = Deep(how, use_reentrant)
    model.load_state_dict(plain.state_dict())
    policy = Policy(accumulator=ACC, estimator=estimator)
    x = [torch.randn(5, 12) for _ in range(2)]
    assert are_equal(gradients(attach(model, policy), *x), gradients(attach(plain, policy), *x))
    assert call_counts(model)["blocks.0"] == call_counts(plain)["blocks.0"] == 4
    assert are_equal(gradients(model, *x), gradients(plain, *x))


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputing_twice_repeats_the_noise_twice(use_reentrant) -> None:
    model = attach(Deep("single", use_reentrant), POLICY)
    y = model(torch.randn(5, 12, requires_grad=True)).square().sum()
    y.backward(retain_graph=True)
    first = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    y.backward()
    assert all(torch.equal(a, p.grad) for a, p in zip(first, model.parameters(), strict=True))


def test_checkpointing_without_gradients_counts_as_a_call() -> None:
    model, x = attach(Deep("single", False), POLICY), torch.randn(5, 12)
    with torch.no_grad():
        first, second = model(x), model(x)
    plain = attach(Deep("plain", False), POLICY)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain(x), first) and torch.equal(plain(x), second)


def test_composable_checkpointing_repeats_the_noise() -> None:
    composable = pytest.importorskip("torch.distributed._composable.checkpoint_activation")
    plain, x = Deep("plain", False), torch.randn(5, 12, requires_grad=True)
    model = copy.deepcopy(plain)
    expected = gradients(attach(plain, POLICY), x, x)
    attach(model, POLICY)
    for block in model.blocks:
        composable.checkpoint(block)
    assert are_equal(gradients(model, x, x), expected)


def test_another_kind_of_recomputation_is_refused() -> None:
    class Recomputed(torch.autograd.Function):
        @staticmethod
        def forward(ctx, module, x, *parameters):
            ctx.module = module
            ctx.save_for_backward(x)
            return module(x)

        @staticmethod
        def backward(ctx, grad):
            with torch.enable_grad():
                x = ctx.saved_tensors[0].detach().requires_grad_()
                return None, torch.autograd.grad(ctx.module(x), x, grad)[0], None

    layer, x = attach(nn.Linear(6, 3, bias=False), POLICY), torch.randn(2, 6, requires_grad=True)
    y = Recomputed.apply(layer, x, layer.weight)
    with pytest.raises(RuntimeError, match=r'by other code than torch.utils.checkpoint.* noise="repeated"'):
        y.sum().backward()
    attach(layer, Policy(accumulator=ACC, noise="repeated"))
    Recomputed.apply(layer, x, layer.weight).sum().backward()
    assert torch.equal(x.grad, layer.weight.sum(0).expand(2, 6))


def test_estimators_look_at_the_forwards_own_steps() -> None:
    model, x = attach(Attention(), Policy(accumulator=ACC, estimator="recursive/diff")), torch.randn(2, 3, 6)
    model(x)  # call 0
    model.zero_grad()
    model.qkv(x).square().sum().backward()  # call 1 of qkv
    y = ops.linear(x, model.qkv.weight, model.qkv.bias, seeded("qkv", 1), "recursive/diff")
    expected = torch.autograd.grad(y.square().sum(), model.qkv.weight)[0]
    assert torch.equal(model.qkv.weight.grad, expected)


def test_gradient_products_have_noise_of_their_own() -> None:
    layer, x = nn.Linear(12, 6, bias=False), torch.randn(4, 12)
    attach(layer, Policy(accumulator="fp32", layers={"": {"accumulator": ACC, "backward": ACC}}))
    layer(x)
    layer(x).square().sum().backward()
    y = ops.linear(x, layer.weight, None, seeded("", 1), backward=seeded("", 1, 0, "backward"))
    assert torch.equal(layer.weight.grad, torch.autograd.grad(y.square().sum(), layer.weight)[0])


def test_convolutions_and_attention_are_keyed_too() -> None:
    x, w = torch.randn(1, 2, 6, 6), torch.randn(3, 2, 3, 3)
    model = attach(Called(lambda _: F.conv2d(x, w)), POLICY)
    model()
    assert torch.equal(model(), ops.conv2d(x, w, None, seeded("", 1)))
    q = torch.randn(1, 2, 3, 4)
    attended = attach(Called(lambda _: F.scaled_dot_product_attention(q, q, q)), POLICY)
    probabilities = (ops.matmul(q, q.mT, seeded("", 0)) * 0.5).softmax(-1)
    assert torch.equal(attended(), ops.matmul(probabilities, q, seeded("", 0, 1)))


def test_a_seed_needs_no_kernel_of_its_own() -> None:
    from fmaq.kernels.products import kernel

    layer, x = attach(nn.Linear(12, 6), POLICY), torch.randn(4, 12)
    layer(x)
    compiled = kernel.cache_info().misses
    for _ in range(5):
        layer(x)
    assert kernel.cache_info().misses == compiled
