"""Recurrent layers and cells: torch's results in wide accumulators, the bits of a plain unrolling in narrow ones."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from attach_cases import ACC, POLICY, Called
from fmaq import ops
from fmaq.analysis import calibrate, observe
from fmaq.emulation import FmaqCoverageWarning, Policy, attach, coverage, detach, restart_calls
from fmaq.emulation.noise import keyed
from fmaq.numerics import Accumulator

WIDE = Policy(accumulator="M23E7b63 rounding=nearest_even")
FORMATS = {"weight": "M3E3b7", "activation": "M3E3b6"}
T, B, INPUTS, HIDDEN = 4, 3, 5, 6
LENGTHS = torch.tensor([2, 4, 1])
LAYERS = [
    (nn.LSTM, {}),
    (nn.LSTM, {"num_layers": 2, "bidirectional": True, "proj_size": 4, "bias": False, "batch_first": True}),
    (nn.LSTM, {"num_layers": 2, "dropout": 0.5, "batch_first": True}),
    (nn.GRU, {"num_layers": 2, "bidirectional": True, "dropout": 0.5}),
    (nn.GRU, {"batch_first": True, "bias": False}),
    (nn.RNN, {"nonlinearity": "relu", "num_layers": 2}),
    (nn.RNN, {"bidirectional": True}),
]
CELLS = [(nn.LSTMCell, {}), (nn.GRUCell, {}), (nn.RNNCell, {}), (nn.RNNCell, {"nonlinearity": "relu", "bias": False})]


def made(kind, options) -> nn.Module:
    torch.manual_seed(0)
    return kind(INPUTS, HIDDEN, **options)


def states(module: nn.Module, *batch: int):
    """Initial ones of a layer."""
    count = module.num_layers * (2 if module.bidirectional else 1)
    h, c = torch.randn(count, *batch, module.proj_size or HIDDEN), torch.randn(count, *batch, HIDDEN)
    return (h, c) if isinstance(module, nn.LSTM) else h


def inputs(module: nn.Module) -> list[tuple]:
    """With states and without, of a batch, of packed sequences and of a single one."""
    x = torch.randn(T, B, INPUTS)
    packed = pack_padded_sequence(x, LENGTHS, enforce_sorted=False)
    x = x.transpose(0, 1).contiguous() if module.batch_first else x
    return [(x,), (x, states(module, B)), (packed,), (packed, states(module, B)), (x[:, 0], states(module))]


def flat(found) -> list[torch.Tensor]:
    """The tensors of what a layer gives."""
    if isinstance(found, PackedSequence):
        return [found.data]
    return [found] if isinstance(found, torch.Tensor) else [x for part in found for x in flat(part)]


def results(module: nn.Module, *given) -> list[torch.Tensor]:
    """Outputs, states and gradients."""
    torch.manual_seed(1)
    module.zero_grad()
    found = flat(module(*given))
    sum((x * x).sum() for x in found).backward()
    return [*(x.detach() for x in found), *(p.grad.clone() for p in module.parameters())]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_in_wide_sums_layers_are_torchs_own(kind, options) -> None:
    module = made(kind, options)
    for given in inputs(module):
        expected = results(detach(module), *given)
        found = results(attach(module, WIDE), *given)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)
        assert all(torch.equal(*pair) for pair in zip(results(detach(module), *given), expected, strict=True))


@pytest.mark.parametrize(("kind", "options"), CELLS)
def test_in_wide_sums_cells_are_torchs_own(kind, options) -> None:
    module = made(kind, options)
    for shape in ((B,), ()):
        x, h, c = torch.randn(*shape, INPUTS), torch.randn(*shape, HIDDEN), torch.randn(*shape, HIDDEN)
        for given in ((x,), (x, (h, c) if kind is nn.LSTMCell else h)):
            expected = results(detach(module), *given)
            for one, other in zip(results(attach(module, WIDE), *given), expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


# --- the same, written down by hand ---


def product(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, acc=ACC, **how) -> torch.Tensor:
    y = ops.matmul(ops.quantize(x, FORMATS["activation"]), ops.quantize(weight, FORMATS["weight"]).t(), acc, **how)
    return y if bias is None else y + bias


def next_state(module: nn.Module, gates: torch.Tensor, hidden: torch.Tensor, state, project):
    """By the equations in torch's documentation."""
    h = state[0]
    if isinstance(module, (nn.LSTM, nn.LSTMCell)):
        i, f, g, o = (gates + hidden).chunk(4, -1)
        c = f.sigmoid() * state[1] + i.sigmoid() * g.tanh()
        return project(o.sigmoid() * c.tanh()), c
    if isinstance(module, (nn.GRU, nn.GRUCell)):
        (r, z, n), (hr, hz, hn) = gates.chunk(3, -1), hidden.chunk(3, -1)
        n = (n + (r + hr).sigmoid() * hn).tanh()
        z = (z + hz).sigmoid()
        return ((h - n) * z + n,)
    return ((gates + hidden).relu() if module.nonlinearity == "relu" else (gates + hidden).tanh(),)


def by_hand(module: nn.Module, x: torch.Tensor, first) -> tuple[torch.Tensor, list]:
    """One sequence, (T, inputs), through all layers, one step and one product at a time."""
    lasts = []
    for number in range(module.num_layers):
        outputs = []
        for reverse in ("", "_reverse") if module.bidirectional else ("",):
            w = {
                name: getattr(module, f"{name}_l{number}{reverse}", None)
                for name in ("weight_ih", "weight_hh", "bias_ih", "bias_hh", "weight_hr")
            }

            def project(h, weight=w["weight_hr"]):
                return h if weight is None else product(h, weight, None)

            state = tuple(s[len(lasts)][None] for s in first)
            hs = []
            for t in reversed(range(len(x))) if reverse else range(len(x)):
                gates = product(x[t : t + 1], w["weight_ih"], w["bias_ih"])
                state = next_state(module, gates, product(state[0], w["weight_hh"], w["bias_hh"]), state, project)
                hs.append(state[0])
            outputs.append(torch.cat(hs[::-1] if reverse else hs))
            lasts.append(state)
        x = torch.cat(outputs, -1)
    return x, [torch.cat(parts) for parts in zip(*lasts, strict=True)]


@pytest.mark.parametrize(("kind", "options"), LAYERS)
def test_in_narrow_sums_they_have_the_bits_of_a_sequence_by_hand(kind, options) -> None:
    module = attach(made(kind, options).eval(), Policy(accumulator=ACC, **FORMATS))
    with torch.no_grad():
        _, (x, first), _, (packed, _), _ = inputs(module)
        output, last = module(x, first)
        padded, last_of_packed = module(packed, first)
        alone = module(x[0] if module.batch_first else x[:, 0])[0]
        padded = pad_packed_sequence(padded, batch_first=True)[0]
        by_sequence = x if module.batch_first else x.transpose(0, 1)
        output = output if module.batch_first else output.transpose(0, 1)
        for n, sequence in enumerate(by_sequence):
            own = [s[:, n] for s in ([first] if isinstance(first, torch.Tensor) else first)]
            expected, states = by_hand(module, sequence, own)
            assert torch.equal(output[n], expected)
            for found, state in zip([last] if isinstance(last, torch.Tensor) else last, states, strict=True):
                assert torch.equal(found[:, n], state)
            expected, states = by_hand(module, sequence[: LENGTHS[n]], own)
            assert torch.equal(padded[n, : LENGTHS[n]], expected)
            for found, state in zip(flat(last_of_packed), states, strict=True):
                assert torch.equal(found[:, n], state)
        expected, _ = by_hand(module, by_sequence[0], [torch.zeros_like(s) for s in own])
        assert torch.equal(alone, expected)


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("how", [{}, {"estimator": "recursive/diff"}, {"backward": ACC}])
def test_gradients_are_those_of_the_steps_by_hand(kind, how) -> None:
    module, x = made(kind, {}), torch.randn(T, B, INPUTS, requires_grad=True)
    twin = copy.deepcopy(module)
    first = states(module, B)
    attach(module, Policy(accumulator=ACC, **FORMATS, **how))
    found, _ = module(x, first)
    found.square().sum().backward()
    of_x, x.grad = x.grad, None

    gates = product(x, twin.weight_ih_l0, twin.bias_ih_l0, **how)  # of all steps at once
    weight = ops.quantize(twin.weight_hh_l0, FORMATS["weight"])
    state, hs = tuple(s[0] for s in ([first] if isinstance(first, torch.Tensor) else first)), []
    for gate in gates:
        h = ops.quantize(state[0], FORMATS["activation"])
        hidden = ops.matmul(h, weight.t(), ACC, **how) + twin.bias_hh_l0
        state = next_state(twin, gate, hidden, state, lambda h: h)
        hs.append(state[0])
    expected = torch.stack(hs)
    assert torch.equal(found, expected)
    expected.square().sum().backward()
    for (name, one), other in zip(module.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=1e-6, msg=name)
        if how.get("backward"):
            assert torch.equal(one.grad, other.grad), name
    torch.testing.assert_close(of_x, x.grad, rtol=1e-5, atol=1e-6)
    torch.optim.SGD(module.parameters(), 0.01).step()
    assert module(x, first)[0].square().sum().item() < found.square().sum().item()


@pytest.mark.parametrize(("kind", "options"), CELLS)
def test_cells_have_the_bits_of_their_equations(kind, options) -> None:
    module = attach(made(kind, options), Policy(accumulator=ACC, **FORMATS))
    x, state = torch.randn(B, INPUTS), tuple(torch.randn(B, HIDDEN) for _ in range(1 + (kind is nn.LSTMCell)))
    gates = product(x, module.weight_ih, module.bias_ih)
    hidden = product(state[0], module.weight_hh, module.bias_hh)
    expected = next_state(module, gates, hidden, state, lambda h: h)
    found = flat(module(x, state if kind is nn.LSTMCell else state[0]))
    assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))


def test_functions_are_met_in_any_module() -> None:
    lstm, cell = made(nn.LSTM, {}), made(nn.GRUCell, {})
    x, h, (h0, c0) = torch.randn(T, B, INPUTS), torch.randn(B, HIDDEN), states(lstm, B)

    def function(m, x):
        options = {"num_layers": 1, "dropout": 0.0, "train": False, "bidirectional": False, "batch_first": False}
        y = torch.lstm(input=x, hx=(h0, c0), params=lstm._flat_weights, has_biases=True, **options)[0]
        return y, torch.gru_cell(x[0], h, cell.weight_ih, w_hh=cell.weight_hh)

    model = attach(Called(function), POLICY)
    y, z = model(x)
    assert torch.equal(y, attach(lstm, POLICY)(x, (h0, c0))[0])
    without_bias = attach(nn.GRUCell(INPUTS, HIDDEN, bias=False), POLICY)
    without_bias.load_state_dict({"weight_ih": cell.weight_ih, "weight_hh": cell.weight_hh})
    assert torch.equal(z, without_bias(x[0], h))
    assert [row.product for row in coverage(model, x)] == ["linear_input", "linear_hidden"] * 2


# --- what a policy says, and tables ---


def test_nothing_of_the_module_changes() -> None:
    module, x = made(nn.LSTM, {"num_layers": 2}), torch.randn(T, B, INPUTS)
    before, own = {name: value.clone() for name, value in module.state_dict().items()}, module(x)[0]
    weights = list(module.parameters())
    attach(module, Policy(accumulator=ACC, **FORMATS))
    assert not torch.equal(module(x)[0], own)
    assert type(module) is nn.LSTM and all(a is b for a, b in zip(module.parameters(), weights, strict=True))
    assert list(module.state_dict()) == list(before)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in before.items())
    assert torch.equal(copy.deepcopy(module)(x)[0], module(x)[0])
    assert torch.equal(detach(module)(x)[0], own)


@pytest.mark.parametrize("kinds", [("linear_input", "linear_hidden", "linear_projection"), (0, 1, 2)])
def test_products_are_named_by_kind_and_index(kinds) -> None:
    module, x = made(nn.LSTM, {"proj_size": 4}), torch.randn(T, B, INPUTS)
    own = module(x)[0]
    attach(module, Policy(accumulator=ACC, products={kinds[1]: {"accumulator": "fp32"}}))
    rows = {row.product: row for row in coverage(module, x)}
    assert [(row.calls, row.covered) for row in rows.values()] == [(1, True), (T, False), (T, True)]
    assert rows["linear_hidden"].shapes == ((B, 4), (4 * HIDDEN, 4))
    attach(module, Policy(accumulator=ACC, products={kind: {"accumulator": "fp32"} for kind in kinds}))
    torch.testing.assert_close(module(x)[0], own, rtol=1e-5, atol=1e-6)
    assert {row.reason for row in coverage(module, x)} == {"fp32 by the policy"}
    attach(module, Policy(accumulator=ACC, layers={"": None}))
    assert torch.equal(module(x)[0], own)


def test_other_dtypes() -> None:
    x = torch.randn(T, B, INPUTS)
    module = attach(made(nn.LSTM, {}).double(), POLICY)
    with pytest.warns(FmaqCoverageWarning, match="lstm in the model itself is not emulated: float64 operands"):
        found = module(x.double())[0]
    assert torch.equal(found, detach(module)(x.double())[0])
    for module in (made(nn.LSTM, {}), made(nn.GRU, {"bidirectional": True})):
        attach(module, POLICY)
        expected = module(x)[0].detach()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            under_autocast = module(x)[0]
        assert under_autocast.dtype == torch.bfloat16
        mixed = attach(module.bfloat16(), Policy(accumulator=ACC, products={"linear_hidden": {"accumulator": "fp32"}}))
        assert mixed(x.bfloat16())[0].dtype == torch.bfloat16
        output, last = attach(module, POLICY)(x.bfloat16())
        assert torch.equal(output[-1, :, :HIDDEN], flat(last)[0][0])
        assert all(y.dtype == torch.bfloat16 for y in flat(last))
        for found in (output, under_autocast):
            torch.testing.assert_close(found.float(), expected, rtol=0, atol=0.1)


def test_every_step_has_noise_of_its_own() -> None:
    acc = Accumulator("M3E4b8 rounding=stochastic")
    module, x = made(nn.RNN, {"nonlinearity": "relu"}), torch.randn(T, B, INPUTS)
    attach(module, Policy(accumulator=acc))
    found, again = module(x)[0], module(x)[0]
    h, hs = torch.zeros(B, HIDDEN), []
    gates = ops.linear(x, module.weight_ih_l0, module.bias_ih_l0, keyed(acc, "", 0, 0))
    for t, gate in enumerate(gates):
        own = keyed(acc, "", 0, 1, repeat=t)
        h = (ops.linear(h, module.weight_hh_l0, module.bias_hh_l0, own) + gate).relu()
        hs.append(h)
    assert torch.equal(found, torch.stack(hs)) and not torch.equal(found, again)
    restart_calls(module)
    assert torch.equal(torch.utils.checkpoint.checkpoint(module, x, use_reentrant=False)[0], found)


def test_calibration_gathers_over_steps() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rnn, self.cell, self.unmet = nn.GRU(INPUTS, HIDDEN), nn.LSTMCell(HIDDEN, HIDDEN), nn.RNN(3, 3)

        def forward(self, x):
            y = self.rnn(x)[0]
            return self.cell(y[-1], self.cell(y[0]))[0]

    torch.manual_seed(0)
    model, x = Model(), 4 * torch.randn(3, 24, INPUTS)
    own = model(x).detach()
    given = Policy(accumulator="M5E4 product=M5E4", weight="M4E3", activation="M4E3")
    with pytest.warns(match=r"no batch reached unmet"):
        policy = calibrate(model, given, [x], rule="maximum")
    for name in ("rnn", "cell"):
        products = policy.layers[name]["products"]
        assert set(products) == {0, 1}
        assert all(one["gain"] is not None and one["a_max"] is not None for one in products.values())
    largest = model.rnn(x)[0].abs().max().item()
    assert 0 < float(policy.layers["rnn"]["products"][1]["a_max"].tensor) < 1.3 * largest
    attach(model, policy)
    assert ((model(x) - own).square().mean() / own.square().mean()).item() < 0.02
    with observe(model) as events:
        model(x)
    assert list(events) == ["rnn:linear_input", "rnn:linear_hidden", "cell:linear_input", "cell:linear_hidden"]
    assert events["rnn:linear_hidden"].calls == 3 and events["rnn:linear_input"].calls == 1


# --- under torch's tracers ---


def test_cells_compile() -> None:
    module, x = attach(made(nn.GRUCell, {}), Policy(accumulator=ACC, **FORMATS)), torch.randn(B, INPUTS)
    torch.compiler.reset()
    assert torch.equal(torch.compile(module, backend="aot_eager", fullgraph=True)(x), module(x))


class Around(nn.Module):
    """A layer and what follows it."""

    def __init__(self) -> None:
        super().__init__()
        self.rnn, self.fc = nn.RNN(INPUTS, HIDDEN), nn.Linear(HIDDEN, 2)

    def forward(self, x):
        return self.fc(self.rnn(x)[0])


@pytest.mark.filterwarnings("ignore:The tensor attributes")
def test_layers_export_and_compile_in_parts() -> None:
    module, x = attach(Around().eval(), Policy(accumulator=ACC, **FORMATS)), torch.randn(2, B, INPUTS)
    expected = module(x)
    torch.compiler.reset()
    with pytest.raises(torch._dynamo.exc.Unsupported, match="allow_rnn"):
        torch.compile(module, backend="aot_eager", fullgraph=True)(x)
    assert torch.overrides._get_current_function_mode_stack() == []
    assert torch.equal(torch.compile(module, backend="aot_eager")(x), expected)
    program = torch.export.export(module, (x,))
    assert torch.equal(program.module()(x), expected)
    assert sum("fmaq.matmul" in str(node.target) for node in program.graph.nodes) == 4
