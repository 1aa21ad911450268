"""The demo, shortened: its accumulators, its rule of choice, and a run from start to end."""

from pathlib import Path

import pytest

from fmaq.recipes import demo
from fmaq.recipes.data import digits
from fmaq.recipes.record import Record, Row
from fmaq.recipes.residual_cnn import residual_cnn
from fmaq.training import Schedule, Stage


def test_the_ladder_goes_from_16_bits_to_5_by_the_papers_rule() -> None:
    ladder = demo.ladder()
    kinds = list(demo.KINDS)
    assert [kind for kind, _ in ladder] == kinds * 10
    assert [acc.bits for _, acc in ladder[::3]] == [16, 14, 12, 11, 10, 9, 8, 7, 6, 5]
    for kind, acc in ladder:
        assert acc.product is not None and acc.chunk == 16
        assert acc.format.bias == acc.product.bias - 2
        assert acc.format.half_unit == acc.product.half_unit == (kind != "truncated")
        assert str(acc.outer) == ("M10E5b14" if kind == kinds[2] else "None")
        acc.check_float32()


def record(*accuracies: float) -> Record:
    """Of so many accumulators of each kind, all kinds alike."""

    def row(accumulator: str, accuracy: float, kind: str | None = None) -> Row:
        return Row("M4E3", accumulator, {"accuracy": accuracy}, 0.0, series=kind)

    each = [a for a in accuracies for _ in demo.KINDS]
    rows = [row("fp32", 0.3), *(row(str(acc), a, kind) for (kind, acc), a in zip(demo.ladder(), each, strict=False))]
    return Record("demo", "digits", "classification", 0, row("fp32", 0.99), rows)


@pytest.mark.parametrize(
    ("accuracies", "bits"),
    [
        ((0.99, 0.98, 0.97, 0.9, 0.5, 0.6, 0.19, 0.1, 0.1, 0.1), [10, 10, 10]),
        ((0.99, 0.98, 0.97, 0.3, 0.95, 0.21, 0.2, 0.1, 0.1, 0.1), [9, 9, 9]),
        ((0.1, 0.1), []),
    ],
)
def test_of_each_kind_the_one_that_suffers_but_is_above_chance(accuracies: tuple[float, ...], bits: list[int]) -> None:
    chosen = demo.choose(record(*accuracies))
    assert [row.bits for row in chosen] == bits
    assert [row.series for row in chosen] == list(demo.KINDS)[: len(bits)]


@pytest.mark.slow
def test_a_short_demo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    train, test = digits()
    monkeypatch.setattr(demo, "digits", lambda: (train.first(400), test.first(150)))
    monkeypatch.setattr(demo, "residual_cnn", lambda: residual_cnn(width=8))
    monkeypatch.setattr(demo, "FLOAT32", Schedule((Stage(12, 1e-2),)))
    monkeypatch.setattr(demo, "LADDER", ("M7E4", "M4E3"))
    lines: list[str] = []
    made = demo.run_demo(tmp_path, say=lines.append, schedule=Schedule.dual((1, 1), (2e-3, 5e-4)))
    assert made.baseline.metrics["accuracy"] > 0.8
    assert [row.bits for row in made.rows] == [32, 12, 12, 12, 8, 8, 8]
    assert made.series == list(demo.KINDS) and made.rows[0].series is None
    assert abs(made.rows[0].metrics["accuracy"] - made.baseline.metrics["accuracy"]) < 0.05
    tuned = [row for row in made.rows if row.tuned]
    assert made.rows[0] in tuned and made.stages == 2
    assert Record.load(tmp_path / "demo.json") == made
    assert (tmp_path / "float32.safetensors").exists()
    assert any("zero-shot" in line for line in lines)
    (bits,) = [row.bits for row in tuned if row.series == "half-unit"]  # which one lost most is for the training to say
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders >= {"control-float32-sums", f"half-unit-{bits}-bits"}
