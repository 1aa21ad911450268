"""fmaq reproduce: experiments are checked before they start, run, go on where they were, and write tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from fmaq.cli.app import app
from fmaq.reproduce.experiment import available, find, load
from fmaq.reproduce.run import run_experiment
from fmaq.training.explain import RecipeError

TINY = """
name: tiny
title: A tiny experiment
question: Does it run?
model: {callable: fmaq.training.residual_cnn:residual_cnn, arguments: {width: 4}}
data: {kind: digits, limit: 96}
schedules:
  two stages:
    stages: [{epochs: 1, learning_rate: 1.0e-2, underflow: false}, {epochs: 1, learning_rate: 1.0e-2}]
    batch_size: 48
grid:
  - accumulators: [fp32, M5E4b10 product=M5E4b12]
    estimators: [identity, immediate/diff]
"""


def quiet(line: str) -> None:
    """Says nothing."""


def written(folder: Path, text: str = TINY) -> Path:
    path = folder / "tiny.yaml"
    path.write_text(text)
    return path


def test_the_experiments_are_listed_and_parse_in_both_forms():
    names = available()
    assert {"mlp-fashion", "resnet20-estimators", "dual-stage", "cost"} <= set(names)
    for name in names:
        try:
            assert load(find(name), quick=False).name == name
        except RecipeError as error:
            assert "does not exist" in str(error), "only data may be missing"
        assert load(find(name), quick=True).name == name
    listed = CliRunner().invoke(app, ["reproduce"])
    assert listed.exit_code == 0 and "mlp-fashion" in listed.output


def test_the_quick_form_runs_every_estimator_and_writes_its_tables(tmp_path):
    results = run_experiment(load(find("mlp-fashion"), quick=True), tmp_path, seed=0, say=quiet)
    assert {cell.cell.estimator for cell in results.cells} == {
        *("identity", "immediate/of", "immediate/diff", "recursive/of", "recursive/diff")
    }
    assert all(cell.failure is None and 0 <= cell.metrics["accuracy"] <= 1 for cell in results.cells)
    invoked = CliRunner().invoke(
        app, ["reproduce", "mlp-fashion", "--quick", "-o", str(tmp_path), "--seed", "0", "--json"]
    )
    assert invoked.exit_code == 0, invoked.output
    for ending in ("md", "csv", "json", "png", "html"):
        assert (tmp_path / f"mlp-fashion.{ending}").stat().st_size > 100
    table = (tmp_path / "mlp-fashion.md").read_text()
    assert "recursive/diff" in table and "M2E3b4" in table and "float32" in table


def test_finished_cells_are_kept_and_give_the_same_table(tmp_path):
    path = written(tmp_path)
    said: list[str] = []
    first = run_experiment(load(path, quick=False), tmp_path / "out", say=said.append)
    assert not any("from before" in line for line in said)
    said.clear()
    second = run_experiment(load(path, quick=False), tmp_path / "out", say=said.append)
    assert [cell.metrics for cell in second.cells] == [cell.metrics for cell in first.cells]
    assert sum("from before" in line for line in said) == len(first.cells) == 3
    said.clear()
    run_experiment(load(path, quick=False), tmp_path / "out", fresh=True, say=said.append)
    assert not any("from before" in line for line in said)


def test_a_cell_that_was_not_finished_is_run_again_to_the_same_end(tmp_path):
    path = written(tmp_path)
    first = run_experiment(load(path, quick=False), tmp_path / "out", say=quiet)
    kept = [p for p in (tmp_path / "out").rglob("*.json") if "metrics" in p.read_text() and p.stem != "tiny"]
    assert kept, "every finished cell is a file"
    kept[-1].unlink()
    again = run_experiment(load(path, quick=False), tmp_path / "out", say=quiet)
    assert [cell.metrics for cell in again.cells] == [cell.metrics for cell in first.cells]


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("estimators: [identity, immediate/diff]", "estimators: [immediate/dif]", "did you mean 'immediate/diff'"),
        ("title:", "tilte:", "did you mean 'title'"),
        ("M5E4b10 product", "M5E4q10 product", "M5E4q10"),
        ("grid:", "grid: []\nother:", "other"),
    ],
)
def test_bad_experiments_are_refused_by_name(tmp_path, old, new, message):
    with pytest.raises(RecipeError) as caught:
        load(written(tmp_path, TINY.replace(old, new)), quick=False)
    assert message in str(caught.value)


def test_an_unknown_name_is_answered_with_the_nearest():
    with pytest.raises((RecipeError, ValueError), match="mlp-fashion"):
        find("mlp-fasion")
    invoked = CliRunner().invoke(app, ["reproduce", "mlp-fasion"])
    assert invoked.exit_code != 0


def test_results_say_how_they_came_about(tmp_path):
    run_experiment(load(written(tmp_path), quick=False), tmp_path / "out", say=quiet)
    invoked = CliRunner().invoke(app, ["reproduce", str(tmp_path / "tiny.yaml"), "-o", str(tmp_path / "out"), "--json"])
    assert invoked.exit_code == 0, invoked.output
    found = json.loads(invoked.output[invoked.output.index("{") :])
    assert found["name"] == "tiny" and len(found["cells"]) == 3
