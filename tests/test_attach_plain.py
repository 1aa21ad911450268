"""Where nothing is emulated the bits are torch's own, on its fast paths too; emulated encoders zero what is padded."""

import copy
import warnings

import pytest
import torch
from torch import nn

from attach_cases import ACC, POLICY, Called, no_mode_is_left
from fmaq import ops
from fmaq.emulation import Policy, attach, coverage, detach, listening, policy_of

PLAIN = [{}, {"layers": {"*": None}}, {"accumulator": ACC, "layers": {"": None}}]
PADDING = torch.tensor([[False, False, False, True], [False, False, True, True], [False] * 4])


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def encoder(norm: bool = False, layers: int = 2, **options) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(8, 2, 12, batch_first=True, **options)
    model = nn.TransformerEncoder(layer, layers, nn.LayerNorm(8) if norm else None)
    for p in model.parameters():
        nn.init.normal_(p, std=0.5)
    return model.eval()


X = torch.randn(3, 4, 8)


@pytest.mark.parametrize("policy", PLAIN)
@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_an_encoder_that_is_left_alone_is_torchs_own(policy, norm, grad) -> None:
    """The reported case: a difference of 2.3."""
    model, x = encoder(norm), X
    attached = attach(copy.deepcopy(model), policy)
    for given in ({}, {"src_key_padding_mask": PADDING}, {"mask": torch.ones(4, 4).triu(1).bool()}):
        with torch.set_grad_enabled(grad), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert torch.equal(attached(x, **given), model(x, **given))
    assert not attached._forward_hooks and policy_of(attached) == Policy.parse(policy)


def test_the_fast_path_is_another_result_than_the_slow_one() -> None:
    """So the tests here can fail."""
    model = encoder()
    with torch.no_grad():
        fast = model(X, src_key_padding_mask=PADDING)
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            slow = model(X, src_key_padding_mask=PADDING)
        finally:
            torch.backends.mha.set_fastpath_enabled(True)
    assert float((fast - slow).abs().max()) > 0.5
    assert not torch.equal(fast[~PADDING], slow[~PADDING])
    assert torch.count_nonzero(fast[PADDING]) == 0


class Mixed(nn.Module):
    """An encoder, an attention and a layer of it beside an emulated product."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = encoder(norm=True)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
        self.layer = encoder().layers[0]
        self.fc = nn.Linear(8, 8)

    def forward(self, x):
        y = self.encoder(x, src_key_padding_mask=PADDING)
        z, weights = self.attention(x, x, x, key_padding_mask=PADDING)
        return y, z, weights, self.layer(x), self.fc(x)


def test_parts_that_are_left_alone_take_their_fast_paths() -> None:
    model = Mixed().eval()
    attached, seen = copy.deepcopy(model), []
    rest = {name: None for name in ("encoder", "attention", "layer")}
    attach(attached, Policy(accumulator=ACC, layers=rest))
    with torch.no_grad():
        expected = model(X)
        with listening(seen.append):
            found = attached(X)
    assert all(torch.equal(a, b) for a, b in zip(found[:-1], expected[:-1], strict=True))
    assert torch.equal(found[-1], ops.linear(X, model.fc.weight, model.fc.bias, ACC))
    assert [p.layer for p in seen if p.reason is None] == ["fc"]
    assert {p.reason for p in seen} == {None, "left alone by the policy"}
    assert no_mode_is_left()
    attached.train(), model.train()
    attached.encoder.eval(), model.encoder.eval()
    assert torch.equal(
        attached.encoder(X, src_key_padding_mask=PADDING), model.encoder(X, src_key_padding_mask=PADDING)
    )


def test_others_hooks_in_a_part_left_alone_run_once() -> None:
    model, calls = attach(Mixed().eval(), Policy(accumulator=ACC, layers={"encoder": None})), []
    model.encoder.layers[0].register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(X)
    assert calls == [1]


def test_random_numbers_of_a_part_left_alone_are_drawn_once() -> None:
    model = nn.Sequential(encoder().train(), nn.Linear(8, 8))
    attached = attach(copy.deepcopy(model), Policy(accumulator=ACC, layers={"0": None}))
    torch.manual_seed(3)
    expected = model[0](X)
    torch.manual_seed(3)
    assert torch.equal(attached[0](X), expected)


def unpadded(model: nn.Module, x: torch.Tensor, **given) -> torch.Tensor:
    """By the slow path, as in training: gradients are wanted."""
    with torch.enable_grad():
        return model(x, **given).detach()


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("layers", [{}, {"layers.0": None}])
def test_an_emulated_encoder_zeroes_padded_positions_as_the_fast_path_does(norm, layers) -> None:
    model = attach(encoder(norm), Policy(accumulator=ACC, layers=layers))
    slow = unpadded(model, X, src_key_padding_mask=PADDING)
    with torch.no_grad():
        for given in ({"src_key_padding_mask": PADDING}, {"src_key_padding_mask": PADDING, "mask": None}):
            found = model(X, **given)
            assert torch.allclose(found[~PADDING], slow[~PADDING], atol=0.05 if layers else 0, rtol=0)
            filling = model.norm(torch.zeros(8)) if norm else torch.zeros(8)
            assert torch.equal(found[PADDING], filling.expand(int(PADDING.sum()), 8))
        assert torch.equal(model(X, None, PADDING), found)
        exact = attach(encoder(norm), Policy(accumulator="M20E6b31"))
        plain = encoder(norm)
        plain.load_state_dict(exact.state_dict())
        close = exact(X, src_key_padding_mask=PADDING), plain(X, src_key_padding_mask=PADDING)
        assert torch.allclose(*close, atol=1e-3)


def test_an_emulated_encoder_zeroes_nothing_where_the_fast_path_is_not_taken() -> None:
    model = attach(encoder(), POLICY)
    holes = torch.tensor([[True, False, False, False]] * 3)  # not left aligned: torch does not pack it
    square = torch.zeros(4, 4)
    options = [{"src_key_padding_mask": holes}, {"src_key_padding_mask": PADDING.float() * -1e4, "mask": square}]
    for given in options:
        slow = unpadded(model, X, **given)
        with torch.no_grad():
            assert torch.equal(model(X, **given), slow)
    model.enable_nested_tensor = model.use_nested_tensor = False
    slow = unpadded(model, X, src_key_padding_mask=PADDING)
    with torch.no_grad():
        assert torch.equal(model(X, src_key_padding_mask=PADDING), slow)
        assert torch.count_nonzero(slow[PADDING]) > 0


def test_a_plain_policy_is_still_listed_and_may_be_replaced() -> None:
    model, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), torch.randn(3, 4)
    before = set(vars(model[0]))
    attach(model, {})
    assert [(row.layer, row.reason) for row in coverage(model, x)] == [(n, "fp32 by the policy") for n in "01"]
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    attach(model, POLICY)
    hidden = ops.linear(x, model[0].weight, model[0].bias, ACC)
    assert torch.equal(model(x), ops.linear(hidden, model[1].weight, model[1].bias, ACC))
    assert coverage(model, x).share == 1.0
    attach(model, {})
    assert torch.equal(model(x), detach(copy.deepcopy(model))(x))
    detach(model)
    assert set(vars(model[0])) == before


def test_a_plain_model_inside_an_emulated_one_is_torchs_own() -> None:
    inner = attach(nn.Linear(6, 6), {})
    outer, x = attach(Called(lambda m, x: inner(x)), POLICY), torch.randn(2, 6)
    assert torch.equal(outer(x), nn.functional.linear(x, inner.weight, inner.bias))


def test_a_plain_model_compiles_and_is_traced() -> None:
    model, x = attach(nn.Linear(4, 2), {}), torch.randn(3, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert torch.equal(torch.jit.trace(model, x)(x), model(x))
