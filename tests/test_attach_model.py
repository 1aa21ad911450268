"""An attached model stays what it was: its state, copies, hooks, errors, threads, recomputation."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from attach_cases import ACC, POLICY, QUANTIZED, Attention, Called, SmallCNN, emulated_attention, fm, no_mode_is_left
from fmaq import ops
from fmaq.emulation import Policy, attach, detach, policy_of


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


# --- the model ---


def test_nothing_but_hooks_is_added_and_detach_takes_them_away() -> None:
    model, x = SmallCNN().eval(), torch.randn(2, 2, 6, 6)
    before, keys, modules = model(x), list(model.state_dict()), list(model.named_modules())
    parameters = [id(p) for p in model.parameters()]
    printed, attributes = repr(model), {name: set(module.__dict__) for name, module in modules}
    attach(model, POLICY)
    assert type(model) is SmallCNN and repr(model) == printed
    assert list(model.state_dict()) == keys and list(model.named_modules()) == modules
    assert [id(p) for p in model.parameters()] == parameters
    assert policy_of(model) == POLICY
    assert not torch.equal(model(x), before)
    assert detach(model) is model
    assert torch.equal(model(x), before)
    assert {name: set(module.__dict__) for name, module in model.named_modules()} == attributes
    assert not any(m._forward_hooks or m._forward_pre_hooks or m._forward_hooks_always_called for m in model.modules())
    assert policy_of(model) is None
    assert torch.equal(detach(model)(x), before)


def test_attaching_again_replaces_the_policy() -> None:
    layer, x = nn.Linear(5, 4), torch.randn(3, 5)
    attach(attach(layer, QUANTIZED), POLICY)
    assert torch.equal(layer(x), ops.linear(x, layer.weight, layer.bias, ACC))
    assert len(layer._forward_hooks) == len(layer._forward_pre_hooks) == 1
    assert torch.equal(detach(layer)(x), F.linear(x, layer.weight, layer.bias))


def test_attaching_a_part_again_counts_for_the_part() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(2, 4)
    attach(model, POLICY)
    attach(model[1], Policy())
    assert torch.equal(model(x), model[1](ops.linear(x, model[0].weight, model[0].bias, ACC)))
    assert policy_of(model) == POLICY and policy_of(model[1]) == Policy()


def test_a_submodule_on_its_own_is_emulated() -> None:
    model = attach(SmallCNN(), POLICY)
    x = torch.randn(3, 4)
    assert torch.equal(model.fc(x), ops.linear(x, model.fc.weight, model.fc.bias, ACC))
    assert no_mode_is_left()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_is_emulated(use_reentrant) -> None:
    class Checkpointed(Attention):
        def __init__(self) -> None:
            super().__init__()
            self.inside = Attention()

        def forward(self, x):
            return super().forward(checkpoint(self.inside, x, use_reentrant=use_reentrant))

    model, x = attach(Checkpointed(), POLICY), torch.randn(2, 3, 6, requires_grad=True)
    found = torch.autograd.grad(model(x).square().sum(), x) if not use_reentrant else None
    if use_reentrant:
        model(x).square().sum().backward()
        found = (x.grad,)
    y = emulated_attention(model, emulated_attention(model.inside, x))
    assert torch.equal(found[0], torch.autograd.grad(y.square().sum(), x)[0])
    assert no_mode_is_left()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_recomputation_that_cannot_be_emulated_is_refused(use_reentrant) -> None:
    def function(_, x):
        return checkpoint(lambda t: t @ t, x, use_reentrant=use_reentrant)

    x = torch.randn(3, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"Give checkpoint a module .*, or leave the layer alone"):
        attach(Called(function), POLICY)(x)
    assert no_mode_is_left()
    left_alone = attach(Called(function), Policy(accumulator=ACC, layers={"": None}))
    assert torch.equal(left_alone(x), x @ x)


def test_gradients_inside_a_forward_are_not_emulated() -> None:
    """A force, say: the gradient of an emulated energy is an ordinary one."""

    def force(module, x):
        with torch.enable_grad():
            return torch.autograd.grad((x @ module.w).square().sum(), x)[0]

    x = torch.randn(3, 4, requires_grad=True)
    model = Called(force, w=torch.randn(4, 2))
    expected = torch.autograd.grad(fm(x, model.w).square().sum(), x)[0]
    assert torch.equal(attach(model, POLICY)(x), expected)


def test_products_in_an_autograd_function_are_emulated_forward_alone() -> None:
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, a, b):
            ctx.save_for_backward(a, b)
            return a @ b

        @staticmethod
        def backward(ctx, grad):
            a, b = ctx.saved_tensors
            return grad @ b.mT, a.mT @ grad

    def both(module, x):
        y = Product.apply(x, module.w)
        return y, torch.autograd.grad(y.sum(), x)[0]

    model, x = attach(Called(both, w=torch.randn(4, 3)), POLICY), torch.randn(2, 4, requires_grad=True)
    y, grad = model(x)
    assert torch.equal(y, fm(x, model.w))
    assert torch.equal(grad, torch.ones(2, 3) @ model.w.mT)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["copy", "pickle"])
def test_a_copy_is_attached_by_itself(duplicate) -> None:
    model, x = attach(Attention(), POLICY), torch.randn(2, 3, 6)
    other = duplicate(model)
    expected = emulated_attention(model, x)
    assert torch.equal(other(x), expected)
    detach(model)
    assert torch.equal(other(x), expected)
    plain = model(x)
    assert torch.equal(detach(other)(x), plain)
    calls = []
    other.register_forward_hook(lambda *_: calls.append(1))
    other(x)
    assert calls == [1]


def test_torch_save_keeps_the_attachment() -> None:
    file = io.BytesIO()
    torch.save(attach(nn.Linear(5, 4), POLICY), file)
    file.seek(0)
    layer, x = torch.load(file, weights_only=False), torch.randn(3, 5)
    assert torch.equal(layer(x), ops.linear(x, layer.weight, layer.bias, ACC))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_model_of_halves_stays_one(dtype) -> None:
    model, x = attach(Attention(), POLICY).to(dtype), torch.randn(2, 3, 6, dtype=dtype)
    found = model.qkv(x)
    assert found.dtype == dtype == model(x).dtype
    assert torch.equal(found, ops.linear(x, model.qkv.weight, model.qkv.bias, ACC).to(dtype))


def test_autocast_gives_what_torchs_would() -> None:
    layer, x = attach(nn.Linear(5, 4), POLICY), torch.randn(3, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x)
        attended = attach(Called(lambda _, x: F.scaled_dot_product_attention(x, x, x)), POLICY)(x[None])
    half = torch.bfloat16
    assert torch.equal(found, ops.linear(x.to(half), layer.weight.to(half), layer.bias, ACC).to(half))
    assert attended.dtype == half


def test_data_parallel_training_in_one_process(tmp_path) -> None:
    if not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model, x = attach(Attention(), POLICY), torch.randn(2, 3, 6)
        parallel = nn.parallel.DistributedDataParallel(model)
        expected = torch.autograd.grad(emulated_attention(model, x).square().sum(), list(model.parameters()))
        parallel(x).square().sum().backward()
        assert all(torch.equal(p.grad, e) for p, e in zip(model.parameters(), expected, strict=True))
    finally:
        torch.distributed.destroy_process_group()


# --- hooks, errors, interruptions ---


def test_hooks_of_others_run_as_before() -> None:
    layer, x, seen = nn.Linear(5, 4), torch.randn(3, 5), []
    layer.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    first = layer.register_forward_hook(lambda module, args, output: seen.append("before"))
    attach(layer, POLICY)
    layer.register_forward_hook(lambda module, args, output: output + 1)
    assert torch.equal(layer(x), ops.linear(2 * x, layer.weight, layer.bias, ACC) + 1)
    assert seen == ["before"]
    detach(layer)
    assert torch.equal(layer(x), F.linear(2 * x, layer.weight, layer.bias) + 1)
    first.remove()
    assert len(layer._forward_hooks) == 1


class Stop(BaseException):
    """Like KeyboardInterrupt: not an Exception."""


@pytest.mark.parametrize("error", [ValueError, Stop])
@pytest.mark.parametrize("where", ["forward", "pre-hook before", "pre-hook after", "hook"])
def test_an_error_leaves_nothing_behind(error, where) -> None:
    def fail(*_):
        raise error("on purpose")

    outer = nn.Sequential(nn.Linear(4, 4), Called(fail if where == "forward" else lambda m, x: x))
    x = torch.randn(2, 4)
    attach(outer, POLICY)
    handle = None
    if where == "hook":
        handle = outer[1].register_forward_hook(fail)
    elif where != "forward":
        handle = outer[1].register_forward_pre_hook(fail, prepend=where == "pre-hook before")
    with pytest.raises(error, match="on purpose"):
        outer(x)
    if error is ValueError:
        assert no_mode_is_left()
    a, b = torch.randn(3, 5), torch.randn(5, 2)
    plain = torch.empty(3, 2)
    with torch._C.DisableTorchFunction():
        plain = a @ b
    assert torch.equal(a @ b, plain)
    assert torch.equal(outer[0](x), ops.linear(x, outer[0].weight, outer[0].bias, ACC))
    assert no_mode_is_left()
    if handle is not None:
        handle.remove()
        assert torch.equal(outer(x), outer[0](x))


def test_a_mode_of_others_works_inside_and_outside() -> None:
    names = []

    class Names(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            names.append(func)
            return func(*args, **(kwargs or {}))

    def inside(module, x):
        with Names():
            return x.relu() @ x

    x = torch.randn(4, 4)
    expected = fm(x.relu(), x)
    model = attach(Called(inside), POLICY)
    with Names():
        found = model(x)
    assert torch.equal(found, expected)
    assert torch.Tensor.relu in names and no_mode_is_left()


def test_threads_do_not_meet() -> None:
    from concurrent.futures import ThreadPoolExecutor

    model, x = attach(Attention(), POLICY), torch.randn(2, 3, 6)
    expected, plain = emulated_attention(model, x), x @ x.mT
    with ThreadPoolExecutor(3) as pool:
        found = list(pool.map(lambda i: model(x) if i % 2 else x @ x.mT, range(6)))
    assert all(torch.equal(y, expected if i % 2 else plain) for i, y in enumerate(found))


def test_tracing_is_refused() -> None:
    with pytest.raises(RuntimeError, match=r"cannot be traced by torch.jit: use torch.export"):
        torch.jit.trace(attach(nn.Linear(3, 2), POLICY), torch.randn(1, 3))


@pytest.mark.filterwarnings("ignore")
def test_a_compiled_function_that_is_no_module_is_refused() -> None:
    x = torch.randn(1, 3)
    inside = torch.compile(lambda a: (a @ a).relu(), backend="eager", fullgraph=True)
    with pytest.raises(RuntimeError, match=r"compile the module that calls it"):
        attach(Called(lambda _: inside(x.mT @ x)), POLICY)()
    assert no_mode_is_left()
