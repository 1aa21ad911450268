"""calibrate: the policy computes what was tried, better than the paper's rule and the maximum, and is saved whole."""

from __future__ import annotations

import itertools
import os
from pathlib import Path

import pytest
import torch
from torch import nn

import fmaq
from fmaq.analysis.fit import Trial
from fmaq.analysis.samples import MatrixSample
from fmaq.numerics import Accumulator

TEMPLATE = "M5E4 product=M5E4"
PAPER = "M5E4b10 product=M5E4b12"
DATA = Path(os.environ.get("FMAQ_DATA", Path(__file__).resolve().parents[2] / "shared" / "data"))


class Network(nn.Module):
    """A convolution, attention and a linear layer whose channels differ in size by orders of magnitude."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.q, self.k, self.v = (nn.Linear(8, 16) for _ in range(3))
        self.out = nn.Linear(16, 6)
        with torch.no_grad():
            self.out.weight.mul_(2.0 ** torch.arange(-9, 3, 2)[:, None])
            self.conv.weight.mul_(0.02)

    def forward(self, x):
        y = torch.relu(self.conv(x)).flatten(2).mT  # (N, positions, 8)
        q, k, v = (f(y).unflatten(2, (2, 8)).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = nn.functional.scaled_dot_product_attention(q, k, v * torch.tensor([1.0, 300.0])[:, None, None])
        return self.out(y.transpose(1, 2).flatten(2))


def images(seed: int) -> torch.Tensor:
    return torch.randn(8, 3, 6, 6, generator=torch.Generator().manual_seed(seed))


def relative_errors(model: nn.Module, policy, x: torch.Tensor) -> torch.Tensor:
    """Mean squared error of each output channel, as a share of its mean square."""
    with torch.no_grad():
        wanted = model(x)
        fmaq.attach(model, policy)
        found = model(x)
        fmaq.detach(model)
    return (wanted - found).square().mean((0, 1)) / wanted.square().mean((0, 1))


def relative_error(model: nn.Module, policy, x: torch.Tensor) -> float:
    """The mean over channels, which differ in size."""
    return float(relative_errors(model, policy, x).mean())


def test_better_than_the_papers_biases_and_the_finer_the_better():
    model, batches, other = Network().eval(), [images(1), images(2)], images(3)
    errors = {
        per: relative_errors(model, fmaq.calibrate(model, TEMPLATE, batches, per=per), other)
        for per in ("model", "layer", "channel")
    }
    paper = relative_errors(model, PAPER, other)
    largest = 5  # channel: one bias for all has to serve this one
    assert max(errors["layer"][largest], errors["model"][largest]) < 0.1 * paper[largest]
    assert errors["channel"].mean() < 0.5 * min(errors["layer"].mean(), errors["model"].mean())
    assert errors["channel"].mean() < 0.1 * paper.mean()


def test_by_token_serves_tokens_that_differ_in_size():
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(24, 12), nn.Linear(12, 5))
    sizes = 2.0 ** torch.arange(-12, 12, 3)[:, None]  # of 8 tokens
    batches, other = [torch.randn(40, 8, 24) * sizes, torch.randn(40, 8, 24) * sizes], torch.randn(40, 8, 24) * sizes
    errors = {}
    with torch.no_grad():
        for module in model:
            module.bias.zero_()
        wanted = model(other)
        for per in ("channel", "token"):
            policy = fmaq.calibrate(model, TEMPLATE, batches, per=per)
            found = fmaq.attach(model, policy)(other)
            fmaq.detach(model)
            errors[per] = ((found - wanted).square().sum((0, 2)) / wanted.square().sum((0, 2))).max()
    assert policy.for_layer("0").per_token and policy.for_layer("1").shift is None
    assert errors["token"] < 0.1 < errors["channel"]


def test_trial_and_gains_beat_the_maximum_rule():
    model, batches, other = Network().eval(), [images(1), images(2)], images(3)
    trial = relative_error(model, fmaq.calibrate(model, TEMPLATE, batches), other)
    maximum = relative_error(model, fmaq.calibrate(model, TEMPLATE, batches, rule="maximum", gain=False), other)
    assert trial < 0.7 * maximum


@pytest.mark.parametrize(("outlier", "times"), [(1, 1.15), (30, 2.5)])
def test_as_good_as_exhaustive_search(outlier, times):
    """Every pair of biases of the sum and the product, each channel's best: what is chosen is nearly as good.

    An outlier makes the best pairs of the channels differ in their distance, which is one for a layer.
    """
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(60, 40, generator=generator)
    b = torch.randn(40, 5, generator=generator) * 2.0 ** torch.tensor([-6, -2, 0, 3, 7])
    a[0] *= outlier
    sample = MatrixSample(a, b, 1.0)
    acc = Accumulator("M4E3 product=M4E3")
    fit = Trial.searched(acc, sample, by_channel=True, is_shared=False).fit()
    by_maximum = Trial.searched(acc, sample, by_channel=True, is_shared=False, by_maximum=True).fit(has_gain=False)
    y = sample.exact().double()

    def left(acc: str) -> torch.Tensor:
        found = fmaq.matmul(a, b, acc).double()
        gain = (y * found).sum(0) / found.square().sum(0).clamp(min=1e-300)
        return (y - gain * found).square().sum(0)

    every = [left(f"M4E3b{s} product=M4E3b{s + d}") for s, d in itertools.product(range(-14, 14), range(-2, 6))]
    best = torch.stack(every).amin(0).sum() / y.square().sum()
    assert float(best) <= fit.error * (1 + 1e-9)
    assert fit.error < times * float(best)
    assert fit.error < by_maximum.error


@pytest.mark.parametrize("channels", [24, 300], ids=["all", "some"])  # that the product's bias is chosen on
@pytest.mark.parametrize("spec", ["M4E3 product=M4E3", "M3E3h product=M3E3h chunk=8 outer=M6E4", "I10f6 product=I10f6"])
def test_a_louder_channel_changes_no_other(spec, channels):
    generator = torch.Generator().manual_seed(3)
    layer = nn.Linear(48, channels)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(channels, 48, generator=generator))
        layer.weight[::3].mul_(torch.randn(48, generator=generator).exp())  # tails that differ by channel
    louder = nn.Linear(48, channels)
    louder.load_state_dict(layer.state_dict())
    with torch.no_grad():
        louder.weight[7].mul_(32)
        louder.bias[7].mul_(32)
    shown, given = torch.randn(2, 40, 48, generator=generator).pow(3)
    for model in (layer, louder):
        fmaq.attach(model, fmaq.calibrate(model, spec, [shown], chunks=(8, 16)))
    before, after = layer(given).detach(), louder(given).detach()
    after[:, 7] /= 32
    assert torch.equal(before, after)


@pytest.mark.parametrize("position", [700, 708, 716, 724])  # in parts of the sum that are looked at, and that are not
def test_a_huge_product_has_room_wherever_it_stands(position):
    generator = torch.Generator().manual_seed(0)
    layer = nn.Linear(1536, 8, bias=False)
    with torch.no_grad():
        layer.weight.copy_(torch.randn(8, 1536, generator=generator))
    x = torch.randn(64, 1536, generator=generator)
    x[0, position] = 3000.0
    spec = "M5E4h product=M5E4h chunk=8 outer=M10E5"
    wanted = layer(x).detach()
    policy = fmaq.calibrate(layer, spec, [x])
    fmaq.attach(layer, policy)
    assert float(policy.for_layer("").gain.tensor.max()) < 1.5
    assert float(((layer(x).detach() - wanted)[0] / wanted[0]).abs().max()) < 0.1


def test_a_channel_has_room_for_what_only_others_were_shown():
    """A classifier calibrated on images of three of its twelve classes: the logits of the others fit all the same."""
    torch.manual_seed(2)
    model = nn.Linear(96, 12, bias=False)
    prototypes = torch.randn(12, 96) * 4
    with torch.no_grad():
        model.weight.copy_(prototypes / 96)
    batches = [prototypes[:3].repeat(8, 1) + torch.randn(24, 96)]
    policy = fmaq.calibrate(model, "M6E3 product=M6E3", batches, per="channel")
    rule = policy.for_layer("")
    offset = torch.zeros(12) if rule.offset is None else rule.offset.tensor
    largest = rule.accumulator.format.max * 2.0 ** -offset.float()
    assert (largest[3:] > 0.7 * (model.weight[3:] * prototypes[3:]).sum(1).detach()).all()


def test_an_input_that_was_never_met_has_room():
    """A depthwise convolution, one channel of which sees zeros in the batches."""
    torch.manual_seed(3)
    model = nn.Conv2d(6, 6, 3, groups=6, bias=False)
    x = torch.randn(4, 6, 9, 9)
    other = torch.randn(4, 6, 9, 9)
    x[:, 2] = 0
    with torch.no_grad():
        wanted = model(other)
        found = fmaq.attach(model, fmaq.calibrate(model, TEMPLATE, [x]))(other)
    errors = (found - wanted).square().sum((0, 2, 3)) / wanted.square().sum((0, 2, 3))
    assert errors.max() < 0.02


def test_a_gain_does_not_make_up_for_saturation():
    """One channel of sixteen is far beyond the others, which fit: they keep their gain."""
    torch.manual_seed(4)
    a, b = torch.randn(64, 64), torch.randn(64, 16)
    b[:, 5] *= 40
    fit = Trial.of_gains(Accumulator("M7E4b10 product=M7E4b10"), MatrixSample(a, b, 1.0), by_channel=True).fit()
    y = a @ b
    found = fmaq.matmul(a, b, fit.accumulator)
    least_squares = float((y * found).sum() / found.square().sum())
    assert least_squares > 2.5 and 1 < float(fit.gain) < 1.2


def test_one_bias_for_a_model_is_one_whatever_the_chunks():
    model, x = Network().eval(), images(1)
    policy = fmaq.calibrate(model, TEMPLATE, [x], per="model", chunks=(4, 8))
    accumulators = {policy.for_layer(name).accumulator for name in ("conv", "q", "k", "v", "out")}
    assert len(accumulators) == 1 and accumulators.pop().chunk in (4, 8)


class Experts(nn.Module):
    """A weight for each matrix of a batch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3, 16, 5) * 2.0 ** torch.tensor([-4.0, 0, 3, 5, 8]))

    def forward(self, x):
        return torch.bmm(x, self.weight)


@pytest.mark.parametrize("per", ["model", "layer", "channel", "token"])
def test_batches_of_weights(per):
    torch.manual_seed(5)
    model, x, other = Experts(), torch.randn(3, 20, 16), torch.randn(3, 20, 16)
    with torch.no_grad():
        wanted = model(other)
        found = fmaq.attach(model, fmaq.calibrate(model, TEMPLATE, [x], per=per))(other)
    errors = (found - wanted).square().sum((0, 1)) / wanted.square().sum((0, 1))
    assert errors[-1] < 0.01 and (per in ("model", "layer") or errors.max() < 0.01)


def error_after(model: nn.Module, policy, x: torch.Tensor) -> float:
    """The squared error of the outputs, as a share of their squares."""
    with torch.no_grad():
        wanted = model(x)
        found = fmaq.attach(model, policy)(x)
        fmaq.detach(model)
    return float((found - wanted).double().square().sum() / wanted.double().square().sum())


PERS = ("model", "layer", "channel", "token")


@pytest.mark.parametrize("per", PERS)
def test_awkward_magnitudes_do_not_spoil_the_rest(per):
    """A channel far smaller or larger than the others, down to subnormal weights, and values that underflow."""
    for scale in (1e-38, 1e-24, 1e19):
        torch.manual_seed(0)
        model = nn.Linear(32, 24, bias=False)
        with torch.no_grad():
            model.weight[3] *= scale
        assert (
            error_after(model, fmaq.calibrate(model, TEMPLATE, [torch.randn(64, 32)], per=per), torch.randn(64, 32))
            < 0.01
        )
    model, x = nn.Linear(16, 8), torch.randn(32, 16)
    wide = fmaq.calibrate(model, "M7E7 product=M7E7", [x * 1e-3], per=per)
    assert error_after(model, wide, torch.randn(32, 16) * 1e-3) < 0.01


class Softmaxes(nn.Module):
    def forward(self, x):
        return torch.softmax(x, -1) @ torch.softmax(8 * x, -1)


@pytest.mark.parametrize("per", PERS)
def test_the_first_batch_is_not_the_last_word(per):
    torch.manual_seed(0)
    model, usual = nn.Linear(32, 24, bias=False), [torch.randn(16, 32) for _ in range(3)]
    for first in (torch.zeros(16, 32), 0.01 * torch.randn(16, 32), torch.zeros(0, 32), torch.randn(1, 32)):
        assert error_after(model, fmaq.calibrate(model, TEMPLATE, [first, *usual], per=per), torch.randn(64, 32)) < 0.02
    heads = [3 * torch.randn(2, 4, 16, 16), 3 * torch.randn(1, 4, 16, 16)]
    for batches in (heads, heads[::-1]):
        assert error_after(Softmaxes(), fmaq.calibrate(Softmaxes(), TEMPLATE, batches, per=per), heads[0]) < 0.01


@pytest.mark.parametrize("per", PERS)
def test_rows_one_by_one_are_as_good_as_in_one_batch(per):
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(64, 48), nn.ReLU(), nn.Linear(48, 10))
    x, other = torch.randn(20, 64), torch.randn(256, 64)
    together, one_by_one = (fmaq.calibrate(model, "M7E4 product=M7E4", b, per=per) for b in ([x], list(x.split(1))))
    paper = error_after(model, fmaq.Policy("paper12"), other)
    assert error_after(model, one_by_one, other) < 1.5 * error_after(model, together, other) < 0.3 * paper
    image = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 6))
    pictures, others = torch.randn(16, 3, 6, 6), torch.randn(48, 3, 6, 6)
    policy = fmaq.calibrate(image, "M7E4 product=M7E4", list(pictures.split(1)), per=per)
    assert error_after(image, policy, others) < 0.01


@pytest.mark.parametrize(
    "spec", ["I16f0 product=I16f0", "I16f20 product=I16f20", "I16f-8 product=I16f-8", "I16f8 product=M7E4"]
)
def test_fixed_point_is_given_the_offset_that_fits(spec):
    torch.manual_seed(0)
    model = nn.Linear(32, 24)
    for per in PERS:
        assert (
            error_after(model, fmaq.calibrate(model, spec, [torch.randn(64, 32)], per=per), torch.randn(64, 32)) < 1e-3
        )


@pytest.mark.parametrize("per", ["layer", "channel"])
def test_wrapping_sums_keep_room_for_what_was_not_seen(per):
    for seed in range(4):
        torch.manual_seed(seed)
        model, x, other = nn.Linear(64, 32), torch.randn(32, 64), torch.randn(512, 64)
        assert error_after(model, fmaq.calibrate(model, "I12f4w product=I12f4w", [x], per=per), other) < 1e-3


def test_templates_of_single_products_are_completed():
    model, x = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval(), torch.randn(3, 7, 16)
    for part in (
        {"products": {"attention_scores": {"accumulator": "M6E4"}}},
        {"layers": {"self_attn": {"products": {1: {"accumulator": "M6E4"}}}}},
    ):
        policy = fmaq.calibrate(model, {"accumulator": "M7E4 product=M7E4", **part}, [x])
        assert error_after(model, policy, torch.randn(3, 7, 16)) < 0.01


def test_other_heads_from_call_to_call_are_named():
    with pytest.raises(
        ValueError, match=r"matmul of the model itself has \(2, 1\) channels or heads in one call and \(4, 1\)"
    ):
        fmaq.calibrate(Softmaxes(), TEMPLATE, [torch.randn(1, 4, 8, 8), torch.randn(1, 2, 8, 8)])


def test_the_policy_computes_what_was_tried():
    """By hand: the layer's accumulator, offsets, gains and shifts, and its own bias."""
    model, x = Network().eval(), images(1)
    policy = fmaq.calibrate(model, TEMPLATE, [x])
    rule = policy.for_layer("out")
    inputs = torch.randn(5, 16)
    how = {name: getattr(rule, name).tensor for name in ("offset", "gain", "shift") if getattr(rule, name) is not None}
    expected = fmaq.linear(inputs, model.out.weight, model.out.bias, rule.accumulator, **how)
    fmaq.attach(model, policy)
    assert torch.equal(model.out(inputs), expected)
    assert rule.offset.shape == (6,) and rule.offset.array.max() - rule.offset.array.min() >= 6
    scores = policy.layers[""]["products"]
    assert {entry["gain"].shape for entry in scores.values()} == {(2, 1)}, "attention's by head"


@pytest.mark.parametrize("per", ["model", "layer", "channel", "token"])
def test_saved_and_loaded_whole(per, tmp_path):
    model, x = Network().eval(), images(1)
    policy = fmaq.calibrate(model, {"accumulator": TEMPLATE, "weight": "M4E3", "activation": "M4E3"}, [x], per=per)
    policy.save(tmp_path / "policy.yaml")
    loaded = fmaq.Policy.load(tmp_path / "policy.yaml")
    assert loaded == policy and hash(loaded) == hash(policy)
    with torch.no_grad():
        first = fmaq.attach(model, policy)(x)
        assert torch.equal(fmaq.attach(model, loaded)(x), first)
    assert not policy.accumulator.is_template


def test_the_same_every_time_and_the_model_as_it_was():
    model, x = Network(), images(1)
    model.train()
    before = model(x)
    assert fmaq.calibrate(model, TEMPLATE, [x]) == fmaq.calibrate(model, TEMPLATE, [x])
    assert model.training and torch.equal(model(x), before)
    fmaq.attach(model, "paper12")
    attached = model(x)
    fmaq.calibrate(model, TEMPLATE, [x])
    assert torch.equal(model(x), attached)


def test_layers_left_alone_stay_alone_and_one_bias_is_one_bias():
    model, x = Network().eval(), images(1)
    policy = fmaq.calibrate(model, {"accumulator": TEMPLATE, "layers": {"conv": None}}, [(x,), {"x": x}], per="model")
    assert policy.layers["conv"] is None
    rules = [policy.for_layer(name) for name in ("q", "k", "v", "out")]
    assert len({rule.accumulator for rule in rules}) == 1 and all(rule.offset is None for rule in rules)


def test_chunks_are_chosen_by_trial():
    model, x = Network().eval(), images(1)
    policy = fmaq.calibrate(model, TEMPLATE, [x], chunks=(1, 4, 16))
    other = images(3)
    single = [relative_error(model, fmaq.calibrate(model, TEMPLATE, [x], chunks=(c,)), other) for c in (1, 4, 16)]
    assert {policy.for_layer(name).accumulator.chunk for name in ("conv", "q", "out")} <= {1, 4, 16}
    assert relative_error(model, policy, other) < max(single)


@pytest.mark.parametrize("spec", ["I10f4 product=I10f4", "M6E4 product=I12f6", "M4E4 rounding=nearest_even"])
def test_other_accumulators(spec):
    model, x, other = Network().eval(), images(1), images(3)
    if "M6" in spec:
        spec = "M6E4 rounding=stochastic"
    given = spec if spec.startswith("I") else f"{spec.split()[0]}b7 {spec.split()[-1]}"
    calibrated = relative_error(model, fmaq.calibrate(model, spec, [x]), other)
    assert calibrated < relative_error(model, given, other)


def test_bad_input_is_named():
    model, x = Network().eval(), images(1)
    with pytest.raises(ValueError, match="at least one batch"):
        fmaq.calibrate(model, TEMPLATE, [])
    with pytest.raises(ValueError, match="per must be"):
        fmaq.calibrate(model, TEMPLATE, [x], per="tensor")
    with pytest.raises(ValueError, match="rule must be"):
        fmaq.calibrate(model, TEMPLATE, [x], rule="best")
    with pytest.raises(TypeError, match="got str"):
        fmaq.calibrate("model", TEMPLATE, [x])
    with pytest.raises(ValueError, match="does its accumulator say fp32"):
        fmaq.calibrate(model, "fp32", [x])
    with pytest.raises(ValueError, match="conv2d of conv has operands that are not finite"):
        fmaq.calibrate(model, TEMPLATE, [torch.full_like(x, torch.nan)])
    with pytest.raises(ValueError, match=r"is a template.*fmaq.calibrate"):
        fmaq.attach(model, TEMPLATE)


@pytest.mark.data
@pytest.mark.skipif(not DATA.exists(), reason=f"{DATA} is missing")
def test_resnet20_lives_with_10_bits():
    from fmaq.recipes.calibrated import run_calibrate
    from fmaq.recipes.recipe import Recipe

    recipe = Path(__file__).resolve().parents[1] / "examples" / "resnet20" / "calibrate.yaml"
    changes = {"accumulators": [PAPER], "operands": ["M4E3"], "data.limit": 128}
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        record = run_calibrate(Recipe.load(recipe, changes), Path(folder), say=lambda _: None)
        assert list(Path(folder).glob("*-channel.yaml"))
    as_given, calibrated = (row.metrics["accuracy"] for row in record.rows)
    assert as_given < 0.8 < 0.88 < calibrated


def test_the_maximum_rule_makes_the_largest_sum_and_product_just_representable():
    generator = torch.Generator().manual_seed(5)
    a, b = (
        torch.randn(30, 20, generator=generator),
        torch.randn(20, 4, generator=generator) * torch.tensor([1, 9, 80, 600]),
    )
    trial = Trial.searched(Accumulator(TEMPLATE), MatrixSample(a, b, 1.0), True, is_shared=False, by_maximum=True)
    fit = trial.fit(has_gain=False)
    offsets = torch.zeros(4, dtype=torch.int32) if fit.offset is None else fit.offset
    sums = torch.frexp((a @ b).abs().amax(0))[1] - 1
    assert torch.equal(fit.accumulator.format.emax - offsets, sums)
    products = torch.frexp((a[:, :, None] * b).abs().amax((0, 1)))[1] - 1
    assert int((products + offsets).max()) == fit.accumulator.product.emax
