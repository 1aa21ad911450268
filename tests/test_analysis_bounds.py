"""Bounds that prove absence of overflow: sound for any input, reached by the worst one, and A2Q's where it applies."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

from fmaq import Accumulator, FixedFormat, FloatFormat, Policy, attach
from fmaq.analysis import channel_bounds, overflow_bounds
from fmaq.analysis.biases import outer_formats
from fmaq.analysis.bounds import ChannelBounds, a2q_width, input_range
from fmaq.numerics import reference
from strategies import accumulators, examples

OVERFLOWS = ("product_overflow", "accumulator_overflow", "merge_accumulator_overflow")


def overflows(x: np.ndarray, w: np.ndarray, acc: Accumulator) -> bool:
    """x (K,) or (M, K) with the weights (K,) of one channel."""
    counts = reference.count_events(np.atleast_2d(x), w[:, None], acc)
    return any(counts[name] for name in OVERFLOWS)


def worst_inputs(w: np.ndarray, low: float, high: float) -> tuple[np.ndarray, np.ndarray]:
    """Those that make every product as large, and as small, as it can be."""
    return np.where(w >= 0, high, low), np.where(w >= 0, low, high)


def smallest_end(acc: Accumulator) -> float:
    """The least of the largest values of its formats."""
    return min(format.max for format in (acc.format, acc.product or acc.format, *outer_formats(acc)))


def without_draws(acc: Accumulator) -> Accumulator:
    """To the nearest even where rounding would be stochastic."""

    def other(rounding: str | None) -> str | None:
        return "nearest_even" if rounding == "stochastic" else rounding

    outer = without_draws(acc.outer) if isinstance(acc.outer, Accumulator) else acc.outer
    return replace(acc, rounding=other(acc.rounding), product_rounding=other(acc.product_rounding), outer=outer)


@st.composite
def problems(draw: st.DrawFn) -> tuple[Accumulator, np.ndarray, float, float, np.random.Generator]:
    """An accumulator, weights (channels, K) about as large as it can take, and a range of inputs."""
    acc = replace(draw(accumulators), outer=None)
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    depth = draw(st.integers(1, 40))
    low, high = draw(st.sampled_from([(-1.0, 1.0), (0.0, 1.5), (-0.3, 2.0), (-3.0, 0.0)]))
    spread = draw(st.sampled_from([0.0, 1.0, 6.0]))
    w = rng.standard_normal((3, depth)) * 2.0 ** rng.uniform(-spread, spread, (3, depth))
    top = smallest_end(acc)
    scale = top / np.abs(w).sum(1).max() / max(-low, high) * 2.0 ** draw(st.floats(-2, 4))
    w = (w * min(scale, 1e30)).astype(np.float32)
    return acc, w, float(np.float32(low)), float(np.float32(high)), rng


@given(problems())
@examples(150)
def test_no_input_in_range_overflows_a_proven_channel(problem) -> None:
    acc, w, low, high, rng = problem
    bounds = channel_bounds(torch.from_numpy(w), acc, (low, high))
    for weights, proven in zip(w, bounds.proven, strict=True):
        if proven:
            x = rng.uniform(low, high, (8, len(weights))).astype(np.float32).clip(np.float32(low), np.float32(high))
            x[:4] = rng.choice([low, 0, high], (4, len(weights)))
            assert not overflows(np.vstack([x, *worst_inputs(weights, low, high)]), weights, acc)


@given(problems())
@examples(150)
def test_the_worst_inputs_overflow_every_other_channel(problem) -> None:
    acc, w, low, high, _ = problem
    assume(smallest_end(acc) > 2.0**-80)  # nothing that matters is below 2^−126
    acc = replace(without_draws(acc), underflow=False)
    bounds = channel_bounds(torch.from_numpy(w), acc, (low, high))
    for weights, proven in zip(w, bounds.proven, strict=True):
        if not proven:
            assert any(overflows(x, weights, acc) for x in worst_inputs(weights, low, high))


@given(problems())
@examples(60)
def test_the_bias_or_width_it_asks_for_is_proven_and_one_less_is_not(problem) -> None:
    acc, w, low, high, _ = problem
    weight = torch.from_numpy(w)
    acc = replace(acc, product=None, product_rounding=None, outer=None)
    bounds = channel_bounds(weight, acc, (low, high))

    def proven(format, channel: int) -> bool:
        changed = channel_bounds(weight, replace(acc, format=format), (low, high))
        return bool(changed.proven[channel])

    for channel in range(len(w)):
        if isinstance(acc.format, FloatFormat):
            bias = int(bounds.biases[channel])
            if abs(bias) < 600:
                assert proven(replace(acc.format, bias=bias), channel)
                assert not proven(replace(acc.format, bias=bias + 1), channel)
        else:
            width = int(bounds.widths[channel])
            if width <= 32:
                assert proven(replace(acc.format, width=width), channel)
                assert width == 2 or not proven(replace(acc.format, width=width - 1), channel)


@given(st.integers(0, 2**32), st.integers(2, 8), st.integers(1, 8), st.booleans(), st.integers(1, 60))
@examples(80)
def test_integers_need_no_more_than_a2q_says_and_at_most_three_bits_less(
    seed: int, weight_bits: int, input_bits: int, is_signed: bool, depth: int
) -> None:
    rng = np.random.default_rng(seed)
    limit = 2 ** (weight_bits - 1) - 1
    w = rng.integers(-limit, limit, (4, depth), endpoint=True).astype(np.float32)
    high = 2 ** (input_bits - is_signed) - 1
    low = -(2 ** (input_bits - 1)) if is_signed else 0
    widths = channel_bounds(torch.from_numpy(w), Accumulator("I32f0", chunk=None), (low, high)).widths
    for weights, width in zip(w, widths, strict=True):
        a2q = a2q_width(float(np.abs(weights).sum()), input_bits, is_signed)
        assert width <= max(a2q, 2)
        assert width >= a2q - 3
        if 2 < width <= 32:
            narrow = Accumulator(FixedFormat(int(width) - 1, overflow="wrap"), chunk=None)
            assert any(overflows(x, weights, narrow) for x in worst_inputs(weights, low, high))


def test_growth_of_nearest_rounding_is_in_the_bound() -> None:
    """16 terms of 1.1875 make 19 exactly, and 21 … 22 when a 2-bit mantissa rounds each sum up, or ties to even."""
    weight, acc = torch.full((1, 16), 1.1875), Accumulator("M2E4b10", rounding="nearest_even")
    bounds = channel_bounds(weight, acc, 1.0)
    exact = channel_bounds(weight, Accumulator("M20E4b10"), 1.0)
    assert exact.sums.highest[0] == 19
    assert bounds.sums.highest[0] == reference.matmul(np.ones((1, 16)), weight.numpy().T, acc)[0, 0] != 19
    truncated = channel_bounds(weight, Accumulator("M2E4b10"), 1.0)
    assert truncated.sums.highest[0] < 19


def test_inputs_without_a_sign_bound_more_channels() -> None:
    weight = torch.tensor([[1.0, 1.0, -1.0, -1.0]]) * 20
    assert not channel_bounds(weight, "M7E4b10 chunk=4", 1.0).proven[0]
    assert channel_bounds(weight, "M7E4b10 chunk=4", (0, 1)).proven[0]


def test_twos_complement_holds_one_more_below_zero() -> None:
    acc = Accumulator("I4f0")
    assert channel_bounds(torch.tensor([[-1.0] * 8]), acc, (0, 1)).proven[0]
    assert not channel_bounds(torch.tensor([[1.0] * 8]), acc, (0, 1)).proven[0]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (3, (-3, 3)),
        ((1, 2.5), (0, 2.5)),
        ((-2, -1), (-2, 0)),
        ("int8", (-128, 127)),
        ("uint4", (0, 15)),
        ("M4E3b3", (-31, 31)),
    ],
)
def test_input_range(given, expected: tuple[float, float]) -> None:
    assert input_range(given) == expected


@pytest.mark.parametrize(
    ("weight", "accumulator", "given", "message"),
    [
        (
            torch.ones(2, 3),
            "M7E4b10",
            "M4E3",
            'not known before its data are: its bias fits them. Give a bias, like "M4',
        ),
        (torch.ones(2, 3), "M7E4b10", "M4", "the range of the inputs is a largest magnitude"),
        (torch.ones(2, 3), "M7E4b10", None, "the range of the inputs is a largest magnitude"),
        (torch.ones(2, 3), "M7E4b10", (2, 1), "must be finite, its low end first"),
        (torch.ones(2, 3), "M7E4b10", float("nan"), "must be finite"),
        (torch.ones(3), "M7E4b10", 1, r"weight must be \(channels, K\)"),
        (torch.full((2, 3), torch.inf), "M7E4b10", 1, "no sum of theirs has a bound"),
        (torch.ones(2, 3), "M7", 1, "'M7' is not a format"),
    ],
)
def test_bad_input(weight, accumulator, given, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        channel_bounds(weight, accumulator, given)


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1, groups=1, bias=False)
        self.up = nn.ConvTranspose2d(4, 6, 2, stride=2, groups=2, bias=False)
        self.fc = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.up(self.conv(x).relu()).flatten(2).mT
        return self.fc(y) @ y.mT.mean(0)[:5]


def test_table_of_a_model() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.rand(2, 3, 4, 4) - 0.5
    table = overflow_bounds(model, x, accumulator="M7E4 product=M7E4")
    rows = {row.layer: row for row in table}
    assert [r.product for r in table] == ["conv2d", "conv_transpose2d", "linear", "matmul"]
    assert rows["conv"].low == x.min() and rows["up"].low == 0 < rows["up"].high
    assert rows["up"].steps == 8 and rows["up"].channels == 6
    assert table.proven == 0  # without biases
    assert rows[""].bounds is None and rows[""].reason == "no operand is a weight"
    proving = f"M7E4b{rows['fc'].bias} product=M7E4b{rows['fc'].product_bias}"
    again = {r.layer: r for r in overflow_bounds(model, x, accumulator=proving)}
    assert again["fc"].proven == again["fc"].channels == 5
    beyond = f"M7E4b{rows['fc'].bias + 1} product=M7E4b{rows['fc'].product_bias}"
    assert {r.layer: r for r in overflow_bounds(model, x, accumulator=beyond)}["fc"].proven < 5
    assert "channels cannot overflow" in str(overflow_bounds(model, x, accumulator=proving))


def test_a_transposed_convolutions_channels_are_its_outputs() -> None:
    """The bound is reached by the input whose every zero-stuffed product is largest."""
    torch.manual_seed(0)
    up = nn.ConvTranspose2d(4, 6, 2, stride=1, groups=2, bias=False)
    table = overflow_bounds(up, torch.ones(1, 4, 3, 3), accumulator="M23E5b16 chunk=None", input_max=(0, 1))
    highest = table.rows[0].bounds.sums.highest
    weight = up.weight.detach()
    expected = [weight[2 * (o // 3) : 2 * (o // 3) + 2, o % 3].clamp(min=0).sum() for o in range(6)]
    assert highest == pytest.approx(np.array(expected), rel=1e-6)


def test_ranges_by_layer_and_the_attached_policys_weights() -> None:
    torch.manual_seed(0)
    model, x = Net(), torch.rand(2, 3, 4, 4)
    attach(model, {"accumulator": "paper12", "weight": "M4E3", "layers": {"up": None}})
    table = overflow_bounds(model, x, input_max={"conv": "M4E3b3", "*": 2.0})
    assert [(r.layer, r.high) for r in table] == [("conv", 31), ("fc", 2), ("", table.rows[2].high)]
    conv = model.conv.weight.detach().flatten(1)
    own = channel_bounds(conv, "paper12", "M4E3b3").sums.highest
    assert not np.array_equal(table.rows[0].bounds.sums.highest, own)
    assert table.to_dicts()[0]["channels"] == 4
    with pytest.raises(ValueError, match="'nowhere' matches no layer with products; there are conv"):
        overflow_bounds(model, x, input_max={"nowhere": 1.0})


@pytest.mark.parametrize(
    ("policy", "worst"),
    [
        (Policy("M7E4b8 product=M7E4b10", offset=[9, 0, -3, 0]), 1.0),
        (Policy("M7E4b14 product=M7E4b14", per_token=True), 0.249),
        (Policy("M7E4b13 product=M7E4b14", per_token=True, offset=[2, 0, -1, 0]), 0.249),
    ],
)
def test_the_policys_offsets_and_tokens_are_in_the_bound(policy: Policy, worst: float) -> None:
    torch.manual_seed(0)
    model = nn.Linear(32, 4, bias=False)
    model.weight.data.abs_()
    attach(model, policy)
    row = overflow_bounds(model, torch.rand(16, 32), input_max=(0.0, worst)).rows[0]
    assert 0 < row.proven < 4 or (policy.offset is None and row.proven == 0)
    with torch.no_grad():
        exact = worst * model.weight.sum(1)
        found = model(torch.full((1, 32), worst))[0]
    saturates = (found < 0.7 * exact).numpy()
    assert saturates.any() and not (saturates & row.bounds.proven).any()


def test_a_range_of_codes_is_that_of_integer_weights() -> None:
    torch.manual_seed(0)
    model, x = nn.Linear(64, 6, bias=False), torch.randn(8, 64)
    with pytest.raises(
        ValueError, match=r"range of integer codes, and the weight of the model itself.*weight=\"int8\""
    ):
        overflow_bounds(model, x, accumulator="I16f0 chunk=none", input_max="int8")
    attach(model, {"accumulator": "fp32", "weight": "int8", "activation": "int8"})
    row = overflow_bounds(model, x, accumulator="I16f0 chunk=none", input_max="int8").rows[0]
    weight = model.weight.detach()
    codes = (weight / weight.abs().max() * 127).round()
    assert np.array_equal(row.bounds.widths, channel_bounds(codes, "I16f0 chunk=none", "int8").widths)
    assert row.proven < 6


def test_an_input_that_is_not_finite_is_said() -> None:
    row = overflow_bounds(nn.Linear(3, 2), torch.full((1, 3), torch.nan), accumulator="paper12").rows[0]
    assert row.bounds is None and row.reason == "an input is not finite"


def test_zero_weights_are_proven_by_anything() -> None:
    bounds = channel_bounds(torch.zeros(2, 3), "M7E4b10 product=M7E4b12", 1e30)
    assert isinstance(bounds, ChannelBounds) and bounds.proven.all()


def test_a2q_refuses_what_is_no_norm() -> None:
    with pytest.raises(ValueError, match="l1_norm must be finite"):
        a2q_width(-1, 8, True)
    with pytest.raises(ValueError, match="input_bits must be at least 1"):
        a2q_width(1, 0, True)


def test_growth_by_a_half_unit_is_in_the_bound() -> None:
    """0.5 three times in M0E4h: every power of two is held as 1.5 of it: 0.75, 0.75 + 0.75 → 1.5, 2.25 → 3."""
    bounds = channel_bounds(torch.full((1, 3), 0.5), "M0E4b8h product=M0E4b8h", 1.0)
    assert (bounds.sums.highest[0], bounds.sums.lowest[0], bounds.products.highest[0]) == (3, -3, 0.75)
    assert bounds.biases[0] == 15 - 1 and channel_bounds(torch.full((1, 3), 0.5), "M0E4b14h", 1.0).proven[0]


def test_what_is_floored_grows_below_zero_alone() -> None:
    bounds = channel_bounds(torch.full((1, 4), 0.3), "I8f0 product=I8f0 rounding=floor", 1.0)
    assert (bounds.sums.lowest[0], bounds.sums.highest[0]) == (-4, 0)
    half_up = channel_bounds(torch.full((1, 4), 0.5), "I8f0 product=I8f0 rounding=half_up", 1.0)
    assert (half_up.sums.lowest[0], half_up.sums.highest[0]) == (0, 4)


def test_each_level_is_bounded_by_its_own_sums() -> None:
    weight = torch.ones(1, 64)
    bounds = channel_bounds(weight, "M7E4b12 product=M7E4b15 chunk=4 outer=(I8f0 chunk=4 outer=M10E4b9)", 1.0)
    assert [x.highest[0] for x in (bounds.products, bounds.sums, *bounds.outer)] == [1, 4, 16, 64]
    assert bounds.proven[0] and bounds.biases[0] == 13 and [b and b[0] for b in bounds.outer_biases] == [None, 9]
    for narrow in ("M7E4b14 chunk=4 outer=fp32", "M7E4b12 chunk=4 outer=I6f0", "M7E4b12 chunk=4 outer=M10E4b10"):
        assert not channel_bounds(weight, narrow, 1.0).proven[0]
    assert channel_bounds(weight, "M7E4b12 chunk=4 outer=fp32", 1.0).proven[0]
    table = overflow_bounds(
        nn.Linear(8, 3), torch.randn(5, 8), accumulator="M5E4h chunk=4 outer=(M6E5 chunk=1 outer=M9E5)"
    )
    assert "outer 1 bias" in str(table) and len(table.to_dicts()[0]["outer_biases"]) == 2
