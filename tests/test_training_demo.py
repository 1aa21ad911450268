"""The demo, shortened: its accumulators, its rule of choice, and a run from start to end."""

from pathlib import Path

import pytest

from fmaq.training import Schedule, Stage, demo
from fmaq.training.record import Record, Row


def test_the_ladder_goes_from_16_bits_to_6_by_the_papers_rule() -> None:
    ladder = demo.ladder()
    assert [acc.bits for acc in ladder] == [16, 14, 12, 11, 10, 9, 8, 7, 6]
    for acc in ladder:
        assert acc.product is not None and acc.chunk == 16
        assert acc.format.bias == acc.product.bias - 2
        acc.check_float32()


def record(*accuracies: float) -> Record:
    def row(accumulator: str, accuracy: float) -> Row:
        return Row("M4E3", accumulator, {"accuracy": accuracy}, 0.0)

    rows = [row("fp32", 0.3), *(row(str(acc), a) for acc, a in zip(demo.ladder(), accuracies, strict=False))]
    return Record("demo", "digits", "classification", 0, row("fp32", 0.99), rows)


@pytest.mark.parametrize(
    ("accuracies", "bits"),
    [
        ((0.99, 0.98, 0.97, 0.9, 0.5, 0.6, 0.19, 0.1, 0.1), [10, 9]),
        ((0.99, 0.98, 0.97, 0.3, 0.95, 0.21, 0.2, 0.1, 0.1), [11, 9]),
        ((0.1, 0.1, 0.5), [12]),
    ],
)
def test_the_two_that_suffer_but_are_above_chance(accuracies: tuple[float, ...], bits: list[int]) -> None:
    assert [row.bits for row in demo.choose(record(*accuracies))] == bits


@pytest.mark.slow
def test_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(demo, "FLOAT32", Schedule((Stage(3, 3e-3),)))
    monkeypatch.setattr(demo, "LADDER", ("M7E4", "M4E3"))
    lines: list[str] = []
    made = demo.run_demo(tmp_path, say=lines.append, schedule=Schedule.dual((1, 1), (2e-3, 5e-4)))
    assert made.baseline.metrics["accuracy"] > 0.9
    assert [row.bits for row in made.rows] == [32, 12, 8]
    assert abs(made.rows[0].metrics["accuracy"] - made.baseline.metrics["accuracy"]) < 0.05
    tuned = [row for row in made.rows if row.tuned]
    assert made.rows[0] in tuned and made.stages == 2
    assert Record.load(tmp_path / "demo.json") == made
    assert (tmp_path / "float32.safetensors").exists()
    assert any("zero-shot" in line for line in lines)
