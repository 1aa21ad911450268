"""Which operands are weights, whenever they come into their place: buffers, offloaded tensors, functional calls."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call

from attach_cases import QUANTIZED, Called
from fmaq import calibrate
from fmaq.emulation import attach, emulating, listening


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def formats(run) -> list[tuple]:
    """What the operands of the products in a function are quantized to: M4E3 weights, M2E3 activations."""
    found = []
    with listening(lambda product: found.append(product.formats)):
        run()
    return found


class Buffered(nn.Module):
    """A frozen weight, multiplied by name."""

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.register_buffer("frozen", torch.randn(width, width))

    def forward(self, x):
        return x @ self.frozen


X = torch.randn(3, 4)
WEIGHT = [("M2E3", "M4E3")]


def test_a_buffer_that_is_assigned_or_registered_in_forward_is_a_weight() -> None:
    def assigned(m, x):
        m.inner.frozen = torch.randn(4, 4)
        return x @ m.inner.frozen

    def registered(m, x):
        m.register_buffer("made", torch.eye(4))
        return x @ m.made

    def computed(m, x):
        m.register_buffer("scaled", 2 * m.inner.frozen)
        return x @ m.scaled

    def of_activations(m, x):
        m.register_buffer("seen", x.mT @ x)
        return x @ m.seen

    for function in (assigned, registered, computed):
        model = Called(function)
        model.inner = Buffered()
        attach(model, QUANTIZED)
        assert formats(lambda model=model: model(X)) == WEIGHT
        assert formats(lambda model=model: model(X)) == WEIGHT
    model = attach(Called(of_activations), QUANTIZED)
    assert formats(lambda: model(X)) == [("M2E3", "M2E3")] * 2


def test_buffers_that_are_put_there_by_a_hook_or_an_offloader_are_weights() -> None:
    model = nn.Sequential(Buffered(), Buffered())
    kept = [layer.frozen for layer in model]

    def load(layer, args):
        layer._buffers["frozen"] = kept[layer.number].clone()

    def unload(layer, args, output):
        layer._buffers["frozen"] = torch.empty(4, 4, device="meta")

    attach(model, QUANTIZED)
    expected = model(X)
    for number, layer in enumerate(model):
        layer.number = number
        layer.register_forward_pre_hook(load)
        layer.register_forward_hook(unload)
        layer._buffers["frozen"] = torch.empty(4, 4, device="meta")
    assert formats(lambda: model(X)) == WEIGHT * 2
    assert torch.equal(model(X), expected)


@pytest.mark.parametrize("to_disk", [False, True])
def test_offloading_by_accelerate_changes_nothing(to_disk, tmp_path) -> None:
    accelerate = pytest.importorskip("accelerate", reason="accelerate is not installed")
    model = nn.Sequential(Buffered(16), nn.Linear(16, 16), Buffered(16))
    batches = [torch.randn(24, 16)]
    policy = {"accumulator": "M7E4 product=M7E4", "weight": "M4E3", "activation": "M2E3"}
    calibrated = calibrate(model, policy, batches)
    expected = attach(model, calibrated)(batches[0])
    if to_disk:
        accelerate.disk_offload(model, str(tmp_path), execution_device="cpu", offload_buffers=True)
    else:
        accelerate.cpu_offload(model, execution_device="cpu", offload_buffers=True)
    assert formats(lambda: model(batches[0])) == WEIGHT * 3
    assert torch.equal(model(batches[0]), expected)
    assert calibrate(model, policy, batches) == calibrated


def test_tensors_of_a_functional_call_are_weights() -> None:
    model = attach(Called(lambda m, x: x @ m.w, w=torch.randn(4, 4)), QUANTIZED)
    expected = model(X)
    for given in (model.w.detach(), model.w.detach().clone(), model.w.data):
        assert formats(lambda given=given: functional_call(model, {"w": given}, (X,))) == WEIGHT
        assert torch.equal(functional_call(model, {"w": given}, (X,)), expected)
    grad = torch.func.grad(lambda w: functional_call(model, {"w": w}, (X,)).square().sum())(model.w.detach())
    assert torch.equal(grad, torch.autograd.grad(expected.square().sum(), model.w)[0])


def test_a_functional_call_of_a_part_is_of_weights() -> None:
    model = Called(lambda m, x: functional_call(m.inner, {"frozen": m.inner.frozen.clone()}, (x,)))
    model.inner = Buffered()
    attach(model, QUANTIZED)
    assert formats(lambda: model(X)) == WEIGHT


def test_what_a_forward_writes_stays_an_activation() -> None:
    def cached(m, x):
        m.cache[: len(x)] = x
        return x @ m.cache.mT

    model = Called(cached)
    model.register_buffer("cache", torch.zeros(5, 4))
    attach(model, QUANTIZED)
    assert formats(lambda: model(X)) == [("M2E3", "M2E3")]
    assert formats(lambda: model(X)) == [("M2E3", "M2E3")]


def test_what_is_left_of_the_forward_before_is_an_activation_unless_it_became_a_buffer() -> None:
    kept = []

    def caching(m, x):
        kept.append(F.relu(x))
        return x @ (m.table if hasattr(m, "table") else kept[0]).mT

    model = attach(Called(caching), QUANTIZED)
    for _ in range(2):
        assert formats(lambda: model(X)) == [("M2E3", "M2E3")]
    model.register_buffer("table", kept[1])
    assert formats(lambda: model(X)) == WEIGHT


def test_a_running_mean_of_inputs_is_an_activation() -> None:
    def mean(m, x):
        m.mean = 0.9 * m.mean + 0.1 * x.mean(0)
        return F.relu(x) @ m.mean

    model = Called(mean)
    model.register_buffer("mean", torch.zeros(4))
    attach(model, QUANTIZED)
    assert formats(lambda: model(X)) == [("M2E3", "M2E3")]


def test_a_block_sees_the_models_buffers() -> None:
    model = attach(Buffered(), QUANTIZED)

    def run() -> None:
        with emulating(model):
            model.register_buffer("other", torch.randn(4, 4))
            X @ model.other

    assert formats(run) == WEIGHT
