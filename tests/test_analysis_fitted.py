"""calibrate: what its policy says of layers and products that were not met, and of those that others had chosen."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fmaq
from fmaq.analysis import CalibrationWarning
from fmaq.numerics import Accumulator

TEMPLATE = "M7E4 product=M7E4"


class Attention(nn.Module):
    """Products of its own at indices 0 and 1, and a linear layer inside."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(8, 8)
        self.dropout = nn.Dropout(0.0)

    def forward(self, x):
        return self.dropout(self.out(nn.functional.scaled_dot_product_attention(x, x, x)))


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = nn.Linear(8, 8)
        self.attention = Attention()

    def forward(self, x):
        return self.attention(self.inner(x))


def inputs(seed: int = 1) -> torch.Tensor:
    return torch.randn(2, 3, 12, 8, generator=torch.Generator().manual_seed(seed))


def accumulators_of(model: nn.Module, policy, *x: torch.Tensor) -> dict[tuple[str, str], str]:
    """The accumulator of every product, "fp32" where torch computes it."""
    fmaq.attach(model, policy)
    rows = {(row.layer, row.product): row.accumulator for row in fmaq.coverage(model, *x)}
    fmaq.detach(model)
    return rows


@pytest.mark.parametrize(
    "rules",
    [
        {"products": {"attention_values": {"accumulator": "fp32"}}},
        {"products": {1: {"accumulator": "fp32"}}},
        {"layers": {"attention": {"products": {"attention_values": {"accumulator": "fp32"}}}}},
        {"layers": {"attention": {"products": {1: {"accumulator": "fp32"}}}}},
    ],
)
def test_products_in_float32_stay_there(rules):
    found = accumulators_of(Net(), fmaq.calibrate(Net(), {"accumulator": TEMPLATE, **rules}, [inputs()]), inputs())
    assert found.pop(("attention", "attention_values")) == "fp32"
    assert len(found) == 3 and "fp32" not in found.values()


def test_a_products_own_gradient_accumulator_stays():
    given = {"accumulator": TEMPLATE, "products": {"attention_scores": {"backward": "M7E5b18"}}}
    policy = fmaq.calibrate(Net(), given, [inputs()])
    rule = policy.for_layer("attention")
    assert rule.for_product("attention_scores", 0).backward == Accumulator("M7E5b18")
    assert rule.for_product("attention_values", 1).backward is None


@pytest.mark.parametrize("key", ["*.out", "attention.out", "attention.o*"])
def test_layers_left_alone_stay_so_inside_of_others(key):
    policy = fmaq.calibrate(Net(), {"accumulator": TEMPLATE, "layers": {key: None}}, [inputs()])
    assert policy.for_layer("attention.out") is None
    assert accumulators_of(Net(), policy, inputs())["attention.out", "linear"] == "fp32"


def test_what_is_by_channel_is_not_handed_down():
    """A module that is called in other batches only has products of other widths."""

    class Rare(nn.Module):
        def forward(self, x):
            return x @ x.mT

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.w = nn.Parameter(torch.randn(50, 8))
            self.rare = Rare()

        def forward(self, x, is_rare=False):
            y = nn.functional.linear(x, self.w)
            return self.rare(y) if is_rare else y

    model, x = Root(), torch.randn(16, 8)
    policy = fmaq.calibrate(model, TEMPLATE, [x])
    assert list(policy.layers) == [""] and policy.for_layer("rare").offset is None
    y = fmaq.attach(model, policy)(x)
    assert torch.equal(model(x, True), fmaq.matmul(y, y.mT, policy.for_layer("rare").accumulator))


def test_another_kind_at_the_same_place_is_refused():
    class Changing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = nn.Parameter(torch.randn(8, 4))

        def forward(self, x):
            return x @ self.w if len(x) > 1 else nn.functional.conv1d(x[:, None], self.w[:, None])

    with pytest.raises(ValueError, match=r"product 0 of the model itself is matmul in one call and conv1d in another"):
        fmaq.calibrate(Changing(), TEMPLATE, [torch.randn(4, 8), torch.randn(1, 8)])


@pytest.mark.filterwarnings("ignore::fmaq.analysis.CalibrationWarning")
def test_accumulators_of_what_was_not_met_keep_their_formats():
    x, wide, net = torch.randn(32, 8), "M10E5 product=M10E5 chunk=8", Branches("unmet", "big")
    policy = fmaq.calibrate(net, fmaq.Policy("I16f4", layers={"a": TEMPLATE_ENTRY, "x": TEMPLATE_ENTRY}), [x])
    assert str(policy.accumulator) == str(Accumulator("I16f4")) and policy.for_layer("unmet").accumulator.bits == 16
    policy = fmaq.calibrate(net, fmaq.Policy(TEMPLATE, layers={"b*": {"accumulator": wide}}), [x])
    assert str(policy.accumulator).startswith("M7E4b") and policy.accumulator.chunk == 16
    filled = policy.for_layer("big").accumulator
    assert str(filled.format).startswith("M10E5b") and filled.chunk == 8 and not filled.is_template


TEMPLATE_ENTRY = {"accumulator": TEMPLATE}


class Branches(nn.Module):
    """Layers a and x are called, b and its like are not."""

    def __init__(self, *unmet: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name in ("a", "x", *unmet):
            setattr(self, name, nn.Linear(8, 8))

    def forward(self, x):
        return self.x(self.a(x))


WRITTEN = {
    "as issued": {"accumulator": "M7E4b3 product=M7E4b5 chunk=64"},
    "fixed": {"accumulator": "I16f8 chunk=4", "weight": "int8"},
    "by product": {"products": {0: {"accumulator": "M7E4b2 product=M7E4b3 chunk=8"}, "matmul": {"gain": 1.5}}},
    "chosen": {"accumulator": "M7E4b1 product=M7E4b2", "offset": [1, -2] * 4, "gain": 1.25},
    "float32": {"accumulator": "fp32", "weight": "M4E3"},
}


@pytest.mark.filterwarnings("ignore::fmaq.analysis.CalibrationWarning")
@pytest.mark.parametrize("per", ["model", "layer", "channel", "token"])
@pytest.mark.parametrize("entry", WRITTEN.values(), ids=WRITTEN)
@pytest.mark.parametrize("key", ["b", "b*"])
def test_what_is_written_of_layers_that_no_batch_met_stays(per, entry, key):
    """As it was: the rule, and so the outputs of the layer once it is called."""
    model, x = Branches("b"), torch.randn(32, 8)
    given = fmaq.Policy("M7E4b10 product=M7E4b12", layers={key: entry})
    policy = fmaq.calibrate(model, given, [x], per=per)
    assert policy.for_layer("b") == given.for_layer("b")
    assert policy.for_layer("a").accumulator != given.for_layer("a").accumulator
    with torch.no_grad():
        wanted = fmaq.attach(model, given).b(x)
        assert torch.equal(fmaq.attach(model, policy).b(x), wanted)


@pytest.mark.filterwarnings("ignore::fmaq.analysis.CalibrationWarning")
@pytest.mark.parametrize("per", ["model", "layer", "channel", "token"])
def test_a_policys_own_accumulator_stays_for_layers_that_no_batch_met(per):
    """Also inside of a module with products of its own, whose entry would speak for it."""
    net, x = Net(), inputs()
    net.attention.later = nn.Linear(8, 8)
    given = fmaq.Policy("M7E4b3 product=M7E4b5 chunk=8", products={"einsum": {"accumulator": "M5E4b4"}})
    policy = fmaq.calibrate(net, given, [x], per=per, chunks=(4, 16))
    assert policy.accumulator == given.accumulator and policy.products == given.products
    assert policy.for_layer("attention.later") == given.for_layer("attention.later")
    assert "attention.dropout" not in policy.layers, "it was called, and has no products"


def test_templates_and_layers_that_no_batch_met_are_named():
    model, x = Branches("b", "c", "d"), torch.randn(32, 8)
    model.e = Attention()
    layers = {"b": {"accumulator": "M7E4b3"}, "c": {"accumulator": "M6E4"}, "d": None, "e": TEMPLATE_ENTRY}
    with pytest.warns(CalibrationWarning) as caught:
        policy = fmaq.calibrate(model, {"accumulator": TEMPLATE, "layers": layers}, [x], chunks=(8,))
    messages = [str(warning.message) for warning in caught]
    assert any("no batch reached b, c, e.out: what the policy says of them stays" in text for text in messages)
    assert any("no batch reached a product that layers: 'c', 'e' speak for" in text for text in messages)
    assert len(messages) == 2 and caught[0].filename == __file__
    filled = policy.for_layer("c").accumulator
    assert str(filled.format).startswith("M6E4b") and filled.chunk == 16 and policy.for_layer("d") is None


def test_an_expert_without_tokens_is_named():
    class Experts(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 8))

        def forward(self, x):
            ends = torch.tensor([16, 16, 32], dtype=torch.int32)
            return nn.functional.grouped_mm(x, self.weight, offs=ends)

    with pytest.warns(CalibrationWarning, match="no batch gave grouped_mm 1 of the model itself any rows"):
        fmaq.calibrate(Experts(), TEMPLATE, [torch.randn(32, 8)])


def test_products_that_a_layer_does_not_have_are_named():
    """An index out of range, and a kind that no call has; known only when the model runs."""
    products = {7: {"gain": 1.5}, "matmul": {"accumulator": "fp32"}, 1: {"accumulator": "fp32"}}
    given = {"accumulator": TEMPLATE, "layers": {"attention": {"products": products}}, "products": {"linear": {}}}
    with pytest.warns(CalibrationWarning) as caught:
        fmaq.calibrate(Net(), given, [inputs()])
    assert sorted(str(warning.message) for warning in caught) == [
        f"calibrate: no batch reached layers: 'attention': products: {key!r}; there are 0 (attention_scores), "
        "1 (attention_values), 0 (linear)"
        for key in ("matmul", 7)
    ]


def test_used_by_another_module_is_met():
    """nn.MultiheadAttention never calls its out_proj; an embedding has no products; nothing is warned of."""

    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.attention = nn.Embedding(5, 8), nn.MultiheadAttention(8, 2, batch_first=True)

        def forward(self, x):
            x = self.words(x)
            return self.attention(x, x, x)[0]

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmaq.calibrate(Words().eval(), TEMPLATE, [torch.arange(10).reshape(2, 5) % 5])


@pytest.mark.parametrize(
    ("module", "what"),
    [
        (nn.Dropout(0.25), r"dropout \(p = 0.25\)"),
        (nn.BatchNorm1d(8), "batch norm by each batch's own mean"),
        (nn.TransformerEncoderLayer(8, 2, 8, dropout=0.1, batch_first=True), r"dropout \(p = 0.1\)"),
    ],
)
def test_train_mode_is_named_where_it_matters(module, what):
    model, x = nn.Sequential(nn.Linear(8, 8), module), torch.randn(16, 8)
    with pytest.warns(CalibrationWarning, match=f"the model is in train mode: {what} took part.*model.eval"):
        fmaq.calibrate(model.train(), TEMPLATE, [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmaq.calibrate(model.eval(), TEMPLATE, [x])
        fmaq.calibrate(nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.0)).train(), TEMPLATE, [x])


def test_offsets_beyond_the_largest_are_named():
    model, x = nn.Sequential(nn.Linear(8, 4, bias=False)), torch.randn(64, 8)
    with torch.no_grad():
        model[0].weight[1:3] *= 2.0**-70
    with pytest.warns(CalibrationWarning, match="offsets beyond ±60 would be needed by 2 of the channels of 0:"):
        fmaq.calibrate(model, TEMPLATE, [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fmaq.calibrate(model, TEMPLATE, [x], per="layer")  # which has no offsets


def test_a_module_with_two_names_has_its_fit_under_any():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Linear(8, 8)
            self.longname = self.a

        def forward(self, x):
            return self.longname(self.a(x))

    given = fmaq.Policy(TEMPLATE, layers={"longname": {"weight": "M4E3"}})
    policy = fmaq.calibrate(Shared(), given, [torch.randn(32, 8)])
    rule = policy.for_layer("a", "longname")
    assert rule.weight == "M4E3" and rule.gain is not None and not rule.accumulator.is_template


def test_made_in_inference_mode_it_trains():
    model, x = nn.Sequential(nn.Linear(8, 4)), torch.randn(32, 8)
    with torch.inference_mode():
        policy = fmaq.calibrate(model, TEMPLATE, [x])
    fmaq.attach(model, policy)(x).sum().backward()
    assert model[0].weight.grad is not None


@pytest.mark.filterwarnings("ignore::fmaq.analysis.CalibrationWarning")
def test_calibrating_leaves_statistics_and_randomness_alone():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5)).train()
    before, state = model[1].running_mean.clone(), torch.get_rng_state()
    fmaq.calibrate(model, TEMPLATE, [torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)) + 3])
    assert torch.equal(model[1].running_mean, before) and torch.equal(torch.get_rng_state(), state)


def test_an_interrupt_leaves_nothing_behind():
    class Interrupted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 4)

        def forward(self, x):
            self.fc(x)
            raise KeyboardInterrupt

    model = nn.Sequential(Interrupted())
    with pytest.raises(KeyboardInterrupt):
        fmaq.calibrate(model, TEMPLATE, [torch.randn(8, 4)])
    assert torch.overrides._get_current_function_mode_stack() == []
    assert all(not module._forward_hooks and not module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize(
    ("batches", "options", "error", "message"),
    [
        (None, {}, TypeError, "batches must be an iterable of batches, such as .x., got NoneType"),
        ({"input": torch.randn(4, 8)}, {}, TypeError, "got dict"),
        (torch.randn(4, 8), {}, TypeError, "got Tensor"),
        ([torch.randn(4, 8)], {"chunks": 16}, TypeError, r"chunks must be a sequence of chunks, such as \(16, 32\)"),
        ([torch.full((4, 8), 3e38)], {}, ValueError, "linear of 0 has sums beyond float32's range"),
    ],
)
def test_bad_input_is_named(batches, options, error, message):
    with pytest.raises(error, match=message):
        fmaq.calibrate(nn.Sequential(nn.Linear(8, 4)), TEMPLATE, batches, **options)


def test_integers_at_a_scale_and_an_accumulator_with_a_fraction():
    """Their values are summed, not their codes; offsets make them fit."""
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4)), torch.randn(64, 64)
    wanted, given = model(x), fmaq.Policy("I16f1", weight="int8", activation="int8")
    with pytest.warns(UserWarning, match="I16f1 sums operands in int8 at their scale, not their codes"):
        fmaq.attach(model, given)
    fmaq.detach(model)
    policy = fmaq.calibrate(model, given, [x])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        error = fmaq.attach(model, policy)(x) - wanted
    assert float((error.square().sum() / wanted.square().sum()).detach()) < 1e-3


def test_a_policy_of_other_widths_names_the_layer():
    policy = fmaq.calibrate(nn.Sequential(nn.Linear(8, 4)), TEMPLATE, [torch.randn(32, 8)])
    model = fmaq.attach(nn.Sequential(nn.Linear(8, 7)), policy)
    with pytest.raises(ValueError, match=r"linear in 0: gain must be a number or \(7,\), one a column, got \(4,\)"):
        model(torch.randn(2, 8))
