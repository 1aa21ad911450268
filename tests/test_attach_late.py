"""Modules that are replaced or added after attach: rules by their names, not their callers' offsets and gains."""

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from attach_cases import ACC, Called, fm
from fmaq import calibrate, ops
from fmaq.emulation import Policy, attach, coverage, listening

OFFSET, GAIN = [0, 1, 2, 3, 4, 5], [1.5] * 6
POLICY = Policy(accumulator=ACC, layers={"": {"offset": OFFSET, "gain": GAIN}, "fc": {"offset": 2, "gain": 0.5}})


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Adapted(nn.Module):
    """A linear layer with a low-rank one beside it, as LoRA has it."""

    def __init__(self, base: nn.Linear, rank: int = 2) -> None:
        super().__init__()
        self.base = base
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


class Block(nn.Module):
    """A product of its own, with an offset and a gain by column, before a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(6, 6))
        self.fc = nn.Linear(6, 6)

    def forward(self, x):
        return self.fc(x @ self.w)


def own(model: Block, x: torch.Tensor) -> torch.Tensor:
    return ops.matmul(x, model.w, ACC, offset=torch.tensor(OFFSET), gain=torch.tensor(GAIN))


def test_a_module_in_anothers_place_has_the_rule_of_its_name() -> None:
    model, x, seen = attach(Block(), POLICY), torch.randn(3, 6), []
    model.fc = nn.Linear(6, 6)
    with listening(seen.append):
        found = model(x)
    expected = ops.linear(own(model, x), model.fc.weight, model.fc.bias, ACC, offset=2, gain=0.5)
    assert torch.equal(found, expected)
    assert [(p.layer, p.index) for p in seen] == [("", 0), ("fc", 0)]
    assert torch.equal(attach(model, POLICY)(x), expected)


def test_an_added_module_has_what_its_name_inherits() -> None:
    model, x, seen = attach(Block(), POLICY), torch.randn(3, 6), []
    base = model.fc
    model.fc = Adapted(base)
    h = own(model, x)
    expected = ops.linear(h, base.weight, base.bias, ACC, offset=2, gain=0.5)
    expected = expected + fm(fm(h, model.fc.down.weight.T), model.fc.up.weight.T)
    with listening(seen.append):
        assert torch.equal(model(x), expected)
    assert [p.layer for p in seen] == ["", "fc", "fc.down", "fc.up"]
    assert [row.layer for row in coverage(model, x)] == ["", "fc", "fc.down", "fc.up"]


def test_an_added_module_may_be_left_alone_by_its_name() -> None:
    model = Called(lambda m, x: m.extra(x))
    model.extra = nn.Linear(6, 6)
    attach(model, Policy(accumulator=ACC, layers={"ext*": None}))
    model.extra, x = nn.Linear(6, 6), torch.randn(3, 6)
    assert torch.equal(model(x), nn.functional.linear(x, model.extra.weight, model.extra.bias))


def test_a_module_of_no_model_has_what_its_caller_hands_down() -> None:
    loose, x = nn.Linear(6, 6), torch.randn(3, 6)
    model = Called(lambda m, x: loose(x))
    attach(model, Policy(accumulator="M3E5b16", products={0: {"accumulator": "M1E5b16"}, "linear": {"gain": 2.0}}))
    assert torch.equal(model(x), ops.linear(x, loose.weight, loose.bias, "M3E5b16"))
    attach(model, Policy(accumulator=ACC, offset=OFFSET, gain=GAIN, shift=0.5))
    assert torch.equal(model(x), ops.linear(x, loose.weight, loose.bias, ACC))


def test_a_part_that_is_attached_by_itself_keeps_its_policy() -> None:
    model, x = attach(Block(), POLICY), torch.randn(3, 6)
    model.fc = attach(nn.Linear(6, 6), Policy())
    assert torch.equal(model(x), nn.functional.linear(own(model, x), model.fc.weight, model.fc.bias))


def test_the_same_weights_in_a_calibrated_model_give_the_same_error() -> None:
    """The reported case: 0.007 became 0.45."""
    spread = torch.randn(64, 64) * 2.0 ** torch.arange(-16, 16).repeat_interleave(2)
    model = Called(lambda m, x: m.fc(x @ m.w / m.w.norm(dim=0)), w=spread)
    model.fc, x = nn.Linear(64, 64), torch.randn(32, 64)
    exact = model(x).detach()
    attach(model, calibrate(model, "M7E4 product=M7E4 chunk=16", [x]))

    def error() -> float:
        return float((model(x) - exact).detach().norm() / exact.norm())

    before = error()
    replaced = nn.Linear(64, 64)
    replaced.load_state_dict(model.fc.state_dict())
    model.fc = replaced
    assert before < 0.05 and error() == before


def test_a_replaced_module_inside_a_checkpoint_is_refused() -> None:
    model = Called(lambda m, x: checkpoint(m.fc, x, use_reentrant=False))
    model.fc = nn.Linear(6, 6)
    attach(model, Policy(accumulator=ACC))
    model.fc = nn.Linear(6, 6)
    with pytest.raises(RuntimeError, match=r"if it came after attach, call attach again"):
        model(torch.randn(2, 6))


def test_products_of_others_hooks_are_not_the_modules_own() -> None:
    model, x, seen = nn.Sequential(nn.Linear(6, 6)), torch.randn(3, 6), []
    attach(model, Policy(accumulator=ACC, layers={"0": {"gain": 3.0}}))
    model[0].register_forward_hook(lambda module, args, output: seen.append(args[0] @ args[0].T))
    model(x)
    assert torch.equal(seen[0], fm(x, x.T))


@pytest.mark.parametrize(
    ("key", "wrap", "hint"),
    [
        ("fc", lambda m: nn.ModuleDict({"_orig_mod": m}), "_orig_mod.fc"),
        ("fc", lambda m: nn.ModuleDict({"base_model": nn.ModuleDict({"model": m})}), "base_model.model.fc"),
        ("_orig_mod.fc", lambda m: m, "fc"),
        ("base_model.model.fc", lambda m: m, "fc"),
        ("module.fc", lambda m: m, "fc"),
    ],
)
def test_names_of_wrapped_models_are_hinted_at(key, wrap, hint) -> None:
    with pytest.raises(ValueError, match=rf"{key!r} matches no module of the model; did you mean '{hint}'"):
        attach(wrap(Block()), Policy(accumulator=ACC, layers={key: None}))


def test_lora_by_peft_changes_nothing_at_first() -> None:
    """Its second matrix is zero."""
    peft = pytest.importorskip("peft", reason="peft is not installed")
    model, x = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4)), torch.randn(8, 16)
    policy = calibrate(model, "M7E4 product=M7E4 chunk=16", [x])
    expected, seen = attach(model, policy)(x), []
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["0"], r=2))
    with listening(seen.append):
        assert torch.equal(adapted(x), expected)
    assert [p.layer for p in seen] == ["0", "0.lora_A.default", "0.lora_B.default", "2"]
    assert all(p.reason is None and p.rule.offset is None for p in seen[1:3])
