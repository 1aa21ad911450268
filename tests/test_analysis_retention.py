"""Variance retention: the formula against the arithmetic itself, the least mantissa, and the table of a model."""

import math

import pytest
import torch
from torch import nn

from fmaq import attach, detach
from fmaq.analysis import least_mantissa, mantissa_needed, retention_ratio, simulate
from fmaq.analysis.retention import is_suitable
from fmaq.emulation import policy_of


def simulated_ratio(a: int, p: int, steps: int, chunk: int | None, rounding: str = "nearest_even") -> float:
    acc = f"M{a}E4 product=M{p}E4 chunk={chunk} rounding={rounding}"
    return simulate(acc, steps, sums=300).retained


CASES = [(64, None), (576, None), (576, 16), (1536, 16), (1536, 64)]


@pytest.mark.parametrize(("steps", "chunk"), CASES)
@pytest.mark.parametrize("p", [5, 10])
def test_least_mantissa_is_enough_by_simulation_and_at_most_two_bits_too_many(
    p: int, steps: int, chunk: int | None
) -> None:
    least = least_mantissa(p, steps, chunk)
    assert is_suitable(simulated_ratio(least, p, steps, chunk), steps)
    assert not is_suitable(simulated_ratio(least - 3, p, steps, chunk), steps)


@pytest.mark.parametrize(("steps", "chunk"), CASES)
def test_formula_is_close_where_it_says_suitable_and_pessimistic_in_the_shoulder(steps: int, chunk: int | None) -> None:
    for a in range(2, 11):
        formula, found = retention_ratio(a, 7, steps, chunk), simulated_ratio(a, 7, steps, chunk)
        if formula > 0.99:
            assert abs(formula - found) < 0.01
        elif found > 0.6:
            assert formula < found
        assert abs(formula - found) < 0.4


@pytest.mark.parametrize("scaled", [1, 4, 16])
def test_what_is_kept_depends_on_the_length_by_the_square_of_the_mantissas_range(scaled: int) -> None:
    expected = {1: 0.974, 4: 0.855, 16: 0.540}[scaled]
    for a in (3, 4, 5):
        assert simulated_ratio(a, 10, scaled * 4**a, None) == pytest.approx(expected, abs=0.025)


def test_truncation_shrinks_and_one_constant_undoes_most_of_it() -> None:
    nearest = simulate("M7E4 product=M7E4 rounding=nearest_even", 576)
    truncated = simulate("M7E4 product=M7E4", 576)
    assert nearest.retained == pytest.approx(1, abs=0.002) and nearest.gain == pytest.approx(1, abs=0.002)
    assert 0.85 < truncated.retained < 0.9 < 1.05 < truncated.gain
    before = 1 - 2 * truncated.retained * truncated.gain + truncated.retained  # E(y − e)² / E e²
    assert truncated.noise < before / 4
    assert truncated.noise > 2 * nearest.noise


def test_limits() -> None:
    assert retention_ratio(23, 10, 1) == pytest.approx(1)
    assert retention_ratio(0, 10, 100_000) < 0.5
    assert retention_ratio(5, 5, 64, chunk=64) == retention_ratio(5, 5, 64)
    ratios = [retention_ratio(a, 7, 1000) for a in range(2, 13)]
    assert ratios == sorted(ratios) and all(0 < r <= 1 for r in ratios)
    needed = [least_mantissa(7, n) for n in (16, 64, 256, 1024, 4096, 16384)]
    assert needed == sorted(needed) and needed[-1] > needed[0] + 5
    assert all(least_mantissa(7, n, 16) <= least_mantissa(7, n) for n in (64, 576, 4096))


def test_simulation_repeats_itself_and_ignores_biases() -> None:
    assert simulate("paper12", 100) == simulate("M7E4 product=M7E4", 100)
    assert simulate("paper12", 100) != simulate("paper12", 100, seed=1)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 8, 3)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.conv(x).flatten(2).mT
        return self.fc(y @ (y.mT @ y))


def test_table_of_a_model() -> None:
    model, x = Block(), torch.ones(2, 4, 6, 6)
    table = mantissa_needed(model, x, accumulator="M4E4 product=M4E4")
    assert [(r.layer, r.product, r.steps) for r in table] == [
        ("conv", "conv2d", 36),
        ("", "matmul", 16),
        ("", "matmul", 8),
        ("fc", "linear", 8),
    ]
    first = table.rows[0]
    assert first.needed == least_mantissa(4, 36, 16) and first.needed_in_one_chunk == least_mantissa(4, 36)
    assert first.ratio == retention_ratio(4, 4, 36, 16) and first.suitable == (first.needed <= 4)
    assert table.needed == max(r.needed for r in table)
    assert first.simulated == simulate("M4E4 product=M4E4", 36)
    text = str(table)
    assert text.splitlines()[0].split()[:3] == ["layer", "product", "K"] and "(model)" in text
    assert table.to_dicts()[0]["simulated"]["retained"] == first.simulated.retained
    assert policy_of(model) is None and not model._forward_hooks


def test_table_follows_the_attached_policy() -> None:
    model, x = Block(), torch.ones(2, 4, 6, 6)
    policy = {"accumulator": "paper12", "layers": {"fc": None, "conv": {"accumulator": "M3E4b5 chunk=None"}}}
    attach(model, policy)
    table = mantissa_needed(model, x, simulated=False)
    assert {r.layer: r.accumulator.split()[0] for r in table} == {"conv": "M3E4b5", "": "M7E4b10"}
    assert table.rows[0].needed == least_mantissa(23, 36) and table.rows[0].simulated is None
    assert policy_of(model) is not None
    detach(model)
    with pytest.raises(ValueError, match="attached to no policy: give an accumulator"):
        mantissa_needed(model, x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: retention_ratio(24, 7, 10), "accumulator must be from 0 to 23, got 24"),
        (lambda: retention_ratio(7, 7.5, 10), "product must be an integer, got 7.5"),
        (lambda: retention_ratio(7, 7, 0), "steps must be from 1 to"),
        (lambda: retention_ratio(7, 7, 100, chunk=0), "chunk must be from 1 to"),
        (lambda: simulate("I16f4", 10), "I16f4 .* is a fixed format"),
        (lambda: simulate("paper12", 0), "steps must be from 1 to"),
        (lambda: mantissa_needed(Block(), torch.ones(2, 4, 6, 6), accumulator="I16f4"), "has a fixed format"),
        (lambda: mantissa_needed("model"), "takes a torch.nn.Module, got str"),
    ],
)
def test_bad_input(call, message: str) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        call()


def test_suitability_is_the_papers() -> None:
    edge = 1 - math.log(50) / 100
    assert is_suitable(edge + 1e-9, 100) and not is_suitable(edge - 1e-9, 100)


def test_a_half_unit_format_is_as_good_as_rounding_to_the_nearest() -> None:
    nearest, half_unit, truncated = (
        simulate(spec, 576)
        for spec in ("M5E4 product=M5E4 rounding=nearest_even", "M5E4h product=M5E4h", "M5E4 product=M5E4")
    )
    assert half_unit.noise == pytest.approx(nearest.noise, rel=0.3) and truncated.noise > 5 * half_unit.noise
    assert half_unit.gain == pytest.approx(1, abs=0.01)


def test_an_outer_level_keeps_what_chunks_have_left() -> None:
    alone, outer = (simulate(f"M4E4h product=M4E4h chunk=8 {more}", 1536) for more in ("", "outer=M10E5"))
    assert outer.noise < 0.6 * alone.noise
    assert retention_ratio(3, 5, 4096, 16) < retention_ratio(3, 5, 4096, 16, ((10, None),)) < 1
    assert retention_ratio(4, 5, 4096, 16, ((4, None),)) == retention_ratio(4, 5, 4096, 16)
    assert retention_ratio(6, 5, 4096, 16, ((4, 16), (23, None))) > retention_ratio(6, 5, 4096, 16, ((4, None),))
    assert least_mantissa(5, 4096, 16, ((10, None),)) < least_mantissa(5, 4096, 16)
    with pytest.raises(ValueError, match="beside outer levels of 2 bits"):
        least_mantissa(5, 4096, 16, ((2, None),))


def test_the_table_of_a_model_knows_levels() -> None:
    model, x = nn.Linear(4096, 2), torch.zeros(1, 4096)
    alone, outer, short = (
        mantissa_needed(model, x, accumulator=f"M6E4h product=M5E4h chunk=16 {more}", simulated=False).rows[0]
        for more in ("", "outer=fp32", "outer=M2E5")
    )
    assert outer.needed < alone.needed and outer.suitable and not alone.suitable and short.needed is None
    with pytest.raises(ValueError, match="fixed format"):
        mantissa_needed(model, x, accumulator="M4E4h chunk=4 outer=I20f4")
