"""`fmaq calibrate` and `fmaq observe`: what they print and write, and how bad input is answered."""

from __future__ import annotations

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from fmaq import Policy
from fmaq.cli import app as cli

RECIPE = """
name: small
model: {callable: fmaq.training.residual_cnn:residual_cnn, arguments: {width: 4}}
data: {kind: digits, limit: 64, batch_size: 32}
accumulators: [M4E3b5 product=M4E3b7]
operands: [M4E3]
"""


@pytest.fixture
def recipe(tmp_path):
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def run(*arguments) -> tuple[int, str]:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    return result.exit_code, result.output + (str(result.exception) if result.exception else "")


def test_calibrate_writes_policies_that_recipes_can_name(recipe, tmp_path):
    out = tmp_path / "out"
    code, output = run("calibrate", recipe, "--per", "layer", "--per", "channel", "-o", out)
    assert code == 0, output
    assert "M4E3, per channel" in output and "M4E3, as given" in output
    for ending in ("json", "csv", "html", "png"):
        assert (out / f"calibrate.{ending}").stat().st_size > 100
    (path,) = out.glob("*-channel.yaml")
    policy = Policy.load(path)
    assert policy.weight == "M4E3" and any("offset" in (entry or {}) for entry in policy.layers.values())
    rows = json.loads((out / "calibrate.json").read_text())["rows"]
    calibrated = next(row for row in rows if row["operands"] == "M4E3, per channel")
    again = tmp_path / "again.yaml"
    again.write_text(RECIPE.split("accumulators")[0] + f"policy: {path}\n")
    code, output = run("evaluate", again, "-o", tmp_path / "evaluated", "--json")
    assert code == 0, output
    evaluated = json.loads(output[output.index("{") :])["rows"][0]
    assert evaluated["metrics"] == calibrated["metrics"]


def test_observe_prints_a_table_and_writes_frames(recipe, tmp_path):
    out = tmp_path / "out"
    code, output = run("observe", recipe, "-o", out, "--every-step")
    assert code == 0, output
    events = pd.read_csv(out / "events.csv")
    assert set(events.event) >= {"product_underflow", "full_swamping", "merge_accumulator_overflow"}
    assert (events["count"] <= events["of"]).all() and (events.sampled == 1).all()
    assert {"product", "sum", "output"} <= set(pd.read_csv(out / "exponents.csv").part)
    assert (out / "events.png").stat().st_size > 1000
    code, output = run("observe", recipe, "-o", out, "-a", "paper12", "--json")
    assert code == 0, output
    layers = json.loads(output[output.index("{") :])["layers"]
    assert layers and all(layer["steps"] > 0 for layer in layers.values())


def test_bad_input_is_answered_by_name(recipe, tmp_path):
    code, output = run("calibrate", recipe, "--per", "tensor", "-o", tmp_path)
    assert code != 0 and 'per must be "model", "layer", "channel" or "token"' in output and "accuracy" not in output
    plain = tmp_path / "plain.yaml"
    plain.write_text(RECIPE.split("accumulators")[0])
    code, output = run("observe", plain)
    assert code != 0 and "this recipe emulates nothing" in output
    code, output = run("calibrate", plain, "-o", tmp_path)
    assert code != 0 and "does its accumulator say fp32" in output
