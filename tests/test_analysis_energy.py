"""Energy of a model by layer: what is counted, what is drawn, and what is said."""

import warnings

import numpy as np
import pytest
import torch
from torch import nn

pytest.importorskip("amaranth", reason="needs the extra fmaq[hardware]")
pytest.importorskip("pyosys", reason="needs the extra fmaq[hardware]")

import fmaq
from fmaq import hardware, ops
from fmaq.analysis import energy, model_energy
from fmaq.emulation import listening
from fmaq.hardware import cost, streams, synthesis
from fmaq.hardware.layers import Layer, energy_by_layer
from fmaq.hardware.liberty import find_library
from fmaq.hardware.streams import of_layer
from fmaq.hardware.unit import Unit

SMALL = fmaq.Policy("M3E3b4 product=M3E3b6", weight="M1E2", activation="M1E2")


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 5))


def test_a_model_costs_operations_times_the_energy_of_one():
    x = torch.randn(3, 1, 8, 8)
    found = model_energy(network(), SMALL, x)
    conv, head = found.to_dicts()
    assert (conv["layer"], head["layer"]) == ("0", "4")
    assert conv["operations"] == 4 * 36 * 9 and head["operations"] == 144 * 5
    assert conv["merges"] == 4 * 36 and head["merges"] == 5 * 9  # of chunks of 16 in 9 and in 144 steps
    assert conv["operands"] == head["operands"] == "recorded"
    for row in (conv, head):
        assert row["energy"] == pytest.approx(row["operations"] * row["operation"] + row["merges"] * row["merge"])
        assert row["bits"] == 7 and row["product"] == "M3E3b6" and row["product_bits"] == 7
        assert 0 < row["to_32_bit"] < 1
    assert found.total == pytest.approx(conv["energy"] + head["energy"])
    assert found.examples == 3 and found.unit == "C_inv V^2" and found.library == "unit"
    assert found.ratio == pytest.approx(
        found.total / sum(row["energy"] / row["to_32_bit"] for row in (conv, head)), rel=1e-9
    )


def test_the_energy_is_that_of_the_layers_own_operands():
    layer, x = nn.Linear(16, 6, bias=False), torch.randn(10, 16)
    (row,) = model_energy(nn.Sequential(layer), SMALL, x).to_dicts()
    a, w = fmaq.quantize(x, "M1E2").double().numpy(), fmaq.quantize(layer.weight.detach(), "M1E2").double().numpy()
    streams = of_layer("0", a, w)
    layer_of_it = Layer("0", 960, str(SMALL.accumulator), "M1E2", "M1E2", streams, merges=60)
    (cost,) = energy_by_layer([layer_of_it], find_library())
    assert row["operation"] == cost.operation and row["merge"] == cost.merge and row["energy"] == cost.total / 10
    assert model_energy(nn.Sequential(layer), SMALL, torch.zeros(10, 16)).to_dicts()[0]["operation"] < cost.operation


def test_the_model_is_afterwards_as_it_was():
    model, x = network(), torch.randn(2, 1, 8, 8)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    model_energy(model, SMALL, x)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), random)
    with pytest.raises(ValueError, match="attached to no policy"):
        model_energy(model, None, x)
    fmaq.attach(model, SMALL)
    attached = model_energy(model, None, x)
    assert attached.to_dicts() == model_energy(model, SMALL, x).to_dicts()
    assert len(fmaq.coverage(model, x)) == 2  # still attached


@pytest.mark.parametrize(
    ("policy", "baseline"),
    [
        ({"accumulator": "I16f0", "weight": "int8", "activation": "int8"}, "I32f0"),
        ({"accumulator": "M7E4b2", "weight": "int8", "activation": "int8"}, "M23E8b127"),
        ({"accumulator": "paper12", "weight": "int8", "activation": "M4E3"}, "M23E8b127"),
    ],
)
def test_policies_of_integers_have_an_energy(policy, baseline):
    (row,) = model_energy(nn.Sequential(nn.Linear(16, 6)), policy, torch.randn(4, 16)).to_dicts()
    assert (row["weight"], row["activation"]) == (policy["weight"], policy["activation"])
    assert row["baseline"] == baseline
    assert 0 < row["to_32_bit"] < 1


def test_formats_are_the_policys_then_the_callers_then_fp8():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    policy = fmaq.Policy("M3E3b4", weight="M1E2", layers={"1": {"weight": None}})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        rows = model_energy(model, policy, x).to_dicts()
    assert [(row["weight"], row["activation"]) for row in rows] == [("M1E2", "M4E3"), ("M4E3", "M4E3")]
    with pytest.warns(UserWarning, match=r"weight int4 is for operands .*: 1 of 2 layers \(0\) keep the policy's M1E2"):
        rows = model_energy(model, policy, x, weight="int4", activation="M1E2").to_dicts()
    assert [(row["weight"], row["activation"]) for row in rows] == [("M1E2", "M1E2"), ("int4", "M1E2")]


def test_layers_in_float32_cost_what_32_bits_do():
    model, x = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)), torch.randn(4, 8)
    found = model_energy(model, fmaq.Policy(SMALL.accumulator, layers={"1": None}), x, weight="M1E2", activation="M1E2")
    rows = found.to_dicts()
    assert rows[1]["accumulator"] == "fp32" and rows[1]["to_32_bit"] == 1 and rows[1]["bits"] == 32
    assert rows[0]["to_32_bit"] < found.ratio < 1
    with pytest.raises(ValueError, match="the policy emulates nothing here"):
        model_energy(model, "fp32", x)


LEVELS = "M3E3b4h product=M3E3b6h outer=M6E4b8"


def test_merges_are_counted_and_adders_chosen():
    model, x = nn.Sequential(nn.Linear(40, 6, bias=False)), torch.randn(4, 40)
    policy = {"accumulator": LEVELS, "weight": "M1E2", "activation": "M1E2"}
    (own,), (shared,) = (model_energy(model, policy, x, adder=adder).to_dicts() for adder in ("own", "shared"))
    assert own["merges"] == shared["merges"] == 3 * 6 and own["outer"] == "M6E4b8"
    assert own["operation"] == shared["operation"]
    # An adder of one's own takes a sum up and lets go of it; a shared one has the next lane's at once.
    assert own["merge"] > shared["merge"] > 0
    unit = hardware.synthesize(LEVELS, "M1E2", "M1E2").area
    share = hardware.synthesize_shared(LEVELS, "M1E2", "M1E2").merge_area / 16
    assert shared["area"] == pytest.approx(unit + share, rel=0.1) and own["area"] > unit + 8 * share
    assert "adder of chunks' sums shared" in str(model_energy(model, policy, x, adder="shared"))
    with pytest.raises(ValueError, match="adder must be own or shared, got 'both'"):
        model_energy(model, policy, x, adder="both")


def test_one_chunk_is_not_merged_and_neither_are_baselines():
    model, x = nn.Sequential(nn.Linear(40, 6, bias=False)), torch.randn(4, 40)
    for accumulator, merges in (("M3E3b4 chunk=none", 0), ("M3E3b4 chunk=none outer=M6E4b8", 6), ("fp32", 0)):
        layers = {"0": {"accumulator": accumulator}}
        other = nn.Sequential(*model, nn.Linear(6, 2))
        row = model_energy(other, fmaq.Policy(SMALL.accumulator, "M1E2", "M1E2", layers=layers), x).to_dicts()[0]
        assert row["merges"] == merges and (row["merge"] > 0) == (merges > 0)
        assert (row["to_32_bit"], row["area_to_32_bit"]) == (1, 1) if accumulator == "fp32" else row["to_32_bit"] < 1
    with pytest.raises(ValueError, match="there is nothing to share"):
        model_energy(model, "M3E3b4 chunk=none outer=M6E4b8", x, adder="shared")
    with pytest.raises(ValueError, match="has one level above its chunks"):
        model_energy(model, "M3E3b4 outer=(M6E4b8 chunk=2 outer=fp32)", x)


def test_a_merge_takes_what_the_adders_netlist_does():
    unit, drawn = Unit.of("M4E3b4 chunk=5 outer=M6E4b8", "M1E2", "M1E2"), streams.gaussian(steps=12, lanes=8)
    trace = streams.merge_trace(unit, drawn)
    assert trace["s"].shape == (1 + 2 * 3, 8)  # the last chunk has two steps
    zero = unit.format.encode(0.0)
    assert (trace["s"][::2] == zero).all() and (trace["s"][1::2] != zero).any()
    sums = synthesis.lower(cost.merge_design(unit)).simulate(trace)["y"]
    values = unit.total.decode(trace["t"])
    assert np.array_equal(unit.total.decode(sums)[1:-1:2], values[2::2])  # a merge's sum is the total behind it
    assert np.array_equal(values[1::2], values[:-1:2])


def test_offsets_move_a_layers_products():
    layer, x = nn.Linear(32, 6, bias=False), torch.randn(10, 32)
    rows = [
        model_energy(nn.Sequential(layer), fmaq.Policy("I8f6", "M1E2", "M1E2", offset=offset), x).to_dicts()[0]
        for offset in (None, [-1, 0, 0, 0, 0, 3], [-6] * 6)
    ]
    assert rows[0]["operation"] == rows[1]["operation"]  # the middle one is 0
    assert rows[2]["operation"] < rows[0]["operation"]  # most products are below the last place


def test_attention_and_repeated_layers_are_counted():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            y = self.fc(self.fc(x))
            return torch.nn.functional.scaled_dot_product_attention(y, y, y)

    rows = model_energy(Twice(), SMALL, torch.randn(2, 5, 8)).to_dicts()
    assert rows[0]["layer"] == "fc" and rows[0]["operations"] == 2 * 5 * 64
    assert sum(row["operations"] for row in rows[1:]) == 2 * 5 * 5 * 8
    assert rows[0]["merges"] == 2 * 2 * 5 * 8 / 2  # a chunk in each sum: two calls of two examples


def test_it_prints_itself():
    pd = pytest.importorskip("pandas")
    found = model_energy(nn.Sequential(nn.Linear(8, 8)), SMALL, torch.randn(4, 8))
    title, heads, rule, row, total = str(found).splitlines()
    assert title.startswith("Energy of one example in C_inv V^2, library unit")
    assert heads.split()[:4] == ["layer", "accumulator", "bits", "product"] and set(rule) <= {"-", " "}
    assert row.split()[:8] == ["0", "M3E3b4", "7", "M3E3b6", "7", "M3E3b4", "M1E2", "M1E2"]
    assert total.split()[0] == "all" and len(total.split()) == 3
    assert isinstance(found.to_dataframe(), pd.DataFrame) and len(found) == 1


def test_the_operands_of_an_integer_engine_are_its_codes() -> None:
    """Under static ranges the largest code may be any: what is recorded is not brought to the top of the range."""
    torch.manual_seed(0)
    model, x = torch.nn.Linear(12, 3, bias=False), torch.randn(4, 12)
    policy = fmaq.Policy("I24f0", weight="int8", activation="int8", weight_per_channel=True, a_max=20.0)
    recorder = energy._Recorder(None, None)
    fmaq.attach(model, policy)
    with listening(recorder):
        model(x)
    (layer,) = recorder.layers()
    codes = ops.integer_codes(x, "int8", amax=20.0)[0]
    assert codes.abs().max() < 40 and layer.streams.are_codes
    unit = Unit.of("I24f0", "int8", "int8")
    found = unit.activation.decode(streams.trace(unit, layer.streams)["x"])
    assert set(map(tuple, found.T.tolist())) == set(map(tuple, codes.tolist()))
