"""calibrate for half-unit formats, every rounding and outer levels: the biases of all levels, and what they serve."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import nn

import fmaq
from fmaq.analysis.biases import bare, formats_of, moved, placed, spans_of
from fmaq.analysis.fit import Trial
from fmaq.analysis.samples import ConvSample, MatrixSample
from fmaq.emulation.policy import Policy
from fmaq.kernels import Geometry
from fmaq.numerics import Accumulator
from fmaq.numerics.accumulator import ROUNDINGS

PERS = ("model", "layer", "channel", "token")
LEVELS = "M4E4h product=M4E4h chunk=8 outer=(M6E4h chunk=4 outer=M10E5)"


class Network(nn.Module):
    """A convolution and two linear layers; channels of the last differ in size."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(6, 12, 3, padding=1, groups=2)
        self.hidden = nn.Linear(12 * 16, 48)
        self.out = nn.Linear(48, 6)
        with torch.no_grad():
            self.out.weight.mul_(2.0 ** torch.arange(-6, 6, 2)[:, None])

    def forward(self, x):
        return self.out(torch.relu(self.hidden(torch.relu(self.conv(x)).flatten(1))))


def images(seed: int) -> torch.Tensor:
    return torch.randn(40, 6, 4, 4, generator=torch.Generator().manual_seed(seed))


def relative_error(model: nn.Module, policy, x: torch.Tensor) -> float:
    """Of the outputs, on average over channels."""
    with torch.no_grad():
        wanted = model(x)
        found = fmaq.attach(model, policy)(x)
        fmaq.detach(model)
    return float(((wanted - found).square().sum(0) / wanted.square().sum(0)).mean())


def error_of(spec: str, per: str = "channel") -> float:
    model = Network().eval()
    return relative_error(model, fmaq.calibrate(model, spec, [images(1), images(2)], per=per), images(3))


@pytest.mark.parametrize("per", PERS)
def test_half_units_beat_truncation_and_an_outer_level_beats_none(per):
    truncated, half_unit, with_level = (
        error_of(f"M4E4{h} product=M4E4{h} {outer}", per) for h, outer in (("", ""), ("h", ""), ("h", "outer=M10E5"))
    )
    assert half_unit < 0.45 * truncated
    assert with_level < 0.8 * half_unit


@pytest.mark.parametrize("per", ["channel", "token"])
def test_where_exponents_are_short_a_chunk_needs_less_range_than_the_whole(per):
    assert error_of("M4E3h product=M4E3h outer=M10E5", per) < 0.6 * error_of("M4E3h product=M4E3h", per)


@pytest.mark.parametrize("per", PERS)
@pytest.mark.parametrize(
    "spec",
    [
        LEVELS,
        "M5E4 product=M5E4h outer=fp32",
        "M5E4b3 product=M5E4 outer=(M8E5 rounding=nearest_even chunk=3)",
        "I12f4 product=I12f4 rounding=half_up outer=M10E5",
        "I12f-6 product=M7E4h outer=fp32",
        "I12f9 product=I12f9 rounding=nearest_even outer=I20f9",
        "M5E4h product=I14f6 outer=I20f8",
    ],
)
def test_templates_at_any_level_are_completed(spec, per, tmp_path):
    model = Network().eval()
    policy = fmaq.calibrate(model, spec, [images(1)], per=per)
    policy.save(tmp_path / "policy.yaml")
    loaded = Policy.load(tmp_path / "policy.yaml")
    assert loaded == policy
    for name in ("conv", "hidden", "out"):
        acc = loaded.for_layer(name).accumulator
        assert not acc.is_template and bare(acc) == bare(Accumulator(spec))
    if per == "model" and "I" not in spec:
        assert len({loaded.for_layer(name).accumulator for name in ("conv", "hidden", "out")}) == 1
    assert not loaded.accumulator.is_template
    has_one_scale = "product=I" in spec and per == "model"  # of products in fixed point: small channels underflow
    assert relative_error(model, loaded, images(3)) < (0.1 if has_one_scale else 0.03)


@pytest.mark.parametrize(
    ("rounding", "outer"),
    [*((r, "outer=M10E5") for r in ROUNDINGS if r != "floor"), ("nearest_even", ""), ("stochastic", "")],
)
def test_every_rounding(rounding, outer):
    assert error_of(f"M5E4 product=M5E4 rounding={rounding} {outer}") < 0.02


def test_what_fixed_point_drops_is_biased_toward_minus_infinity_and_a_shift_undoes_it():
    model = Network().eval()
    spec = "I12f6 product=I12f6 rounding=floor"
    with_shift, without = (
        relative_error(model, fmaq.calibrate(model, spec, [images(1), images(2)], shift=shift), images(3))
        for shift in (True, False)
    )
    assert with_shift < 0.5 * without


@pytest.mark.parametrize("chunk", [4, 16])
def test_two_levels_are_as_good_as_exhaustive_search(chunk):
    """Every bias of the sums, the products and the outer level, each channel's best sums: nearly as good."""
    generator = torch.Generator().manual_seed(4)
    a = torch.randn(60, 96, generator=generator) + 0.3
    b = torch.randn(96, 4, generator=generator) * 2.0 ** torch.tensor([-3, -1, 0, 3])
    sample = MatrixSample(a, b, 1.0)
    template = Accumulator(f"M3E3h product=M3E3h chunk={chunk} outer=M6E3")
    fit = Trial.searched(template, sample, by_channel=True, is_shared=False).fit()
    y = sample.exact().double()

    def left(acc: str) -> torch.Tensor:
        found = fmaq.matmul(a, b, acc).double()
        gain = (y * found).sum(0) / found.square().sum(0).clamp(min=1e-300)
        return (y - gain * found).square().sum(0)

    every = [
        left(f"M3E3b{s}h product=M3E3b{s + d}h chunk={chunk} outer=M6E3b{s - o}")
        for s, d, o in itertools.product(range(-8, 8), range(5), range(6))
    ]
    best = float(torch.stack(every).amin(0).sum() / y.square().sum())
    assert best <= fit.error * (1 + 1e-9)
    assert fit.error < 1.3 * best


def test_the_maximum_rule_gives_each_level_its_own_largest_sum():
    generator = torch.Generator().manual_seed(5)
    a, b = torch.rand(30, 64, generator=generator), torch.rand(64, 4, generator=generator)
    acc = Accumulator("M4E4 product=M4E4 chunk=4 outer=(M6E4 chunk=4 outer=M10E5)")
    trial = Trial.searched(acc, MatrixSample(a, b, 1.0), True, is_shared=True, by_maximum=True)
    fit = trial.fit(has_gain=False)

    def exponent(span: int) -> int:
        parts = torch.stack([a[:, i : i + span] @ b[i : i + span] for i in range(0, 64, span)])
        return int(torch.frexp(parts.amax())[1]) - 1

    assert fit.offset is None
    assert [f.emax for f in formats_of(fit.accumulator)[2:]] == [exponent(16), exponent(64)]
    assert fit.accumulator.format.emax == exponent(4)


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("span", [1, 4, 9, 16, 40])
def test_parts_of_a_convolution_add_up(span, groups):
    generator = torch.Generator().manual_seed(6)
    x = torch.randn(2, 6, 5, 4, generator=generator)
    weight = torch.randn(4, 6 // groups, 3, 2, generator=generator)
    sample = ConvSample(x, weight, Geometry((1, 1), (1, 0), (1, 1), groups), 1.0)
    parts = list(sample.parts(span, 1000))
    assert len(parts) == -(-sample.depth // span)
    torch.testing.assert_close(sum(parts), sample.exact())
    masked = torch.zeros_like(weight).flatten(1)
    masked[:, :span] = weight.flatten(1)[:, :span]
    only_first = ConvSample(x, masked.view_as(weight), sample.geometry, 1.0).exact()
    torch.testing.assert_close(parts[0], only_first)


def test_spans_of_levels():
    assert spans_of(Accumulator("M4E4 chunk=8"), 100) == [100]
    assert spans_of(Accumulator("M4E4 chunk=8 outer=fp32"), 100) == [8, 100]
    assert spans_of(Accumulator(LEVELS), 100) == [8, 32, 100]
    assert spans_of(Accumulator("M4E4 chunk=8 outer=(M6E4 chunk=4)"), 100) == [8, 100]
    assert spans_of(Accumulator("M4E4 chunk=None outer=(M6E4 chunk=4 outer=fp32)"), 100) == [100, 100, 100]


def test_larger_biases_of_all_levels_are_an_offset():
    acc = placed(Accumulator(LEVELS), 3)
    a, b = torch.randn(5, 40), torch.randn(40, 3)
    torch.testing.assert_close(fmaq.matmul(a, b, moved(acc, 2)) * 4, fmaq.matmul(a, b * 4, acc), rtol=0, atol=0)


def test_integer_engines_keep_their_scale_and_are_given_an_outer_range():
    model = nn.Linear(64, 8, bias=False)
    rules = {"accumulator": "I16f0 chunk=4 outer=M8E5", "weight": "int8", "activation": "int8"}
    policy = fmaq.calibrate(model, rules, [torch.randn(64, 64)])
    rule = policy.for_layer("")
    assert rule.offset is None and not rule.accumulator.is_template
    assert relative_error(model, policy, torch.randn(200, 64)) < 1e-3


def test_layers_that_were_not_met_are_given_all_biases():
    class Branch(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

        def forward(self, x, is_rare=False):
            return self.unused(x) if is_rare else self.used(x)

    model, x = Branch(), torch.randn(32, 64)
    for spec in (LEVELS, "M5E4h product=M5E4h"):
        with pytest.warns(UserWarning, match="unused"):
            policy = fmaq.calibrate(
                model, {"accumulator": "M5E4h product=M5E4h", "layers": {"unused": {"accumulator": spec}}}, [x]
            )
        fmaq.attach(model, policy)
        with torch.no_grad():
            found, wanted = model(x, True), nn.functional.linear(x, model.unused.weight, model.unused.bias)
        assert (found - wanted).square().sum() / wanted.square().sum() < 0.05
        fmaq.detach(model)
