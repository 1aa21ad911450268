"""`fmaq calibrate` and `fmaq observe`: what they print and write, and how bad input is answered."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pandas as pd
import pytest
from typer.testing import CliRunner

from fmaq import Policy
from fmaq.cli import app as cli

RECIPE = """
name: small
model: {callable: fmaq.recipes.residual_cnn:residual_cnn, arguments: {width: 4}}
data: {kind: digits, limit: 32, batch_size: 16}
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
    assert "per channel" in output and "as given" in output
    for ending in ("json", "csv", "html", "png"):
        assert (out / f"calibrate.{ending}").stat().st_size > 100
    (path,) = out.glob("*-channel.yaml")
    policy = Policy.load(path)
    assert policy.weight == "M4E3" and any("offset" in (entry or {}) for entry in policy.layers.values())
    rows = json.loads((out / "calibrate.json").read_text())["rows"]
    assert [(row["operands"], row["chosen"]) for row in rows] == [
        ("M4E3", None),
        ("M4E3", "per layer"),
        ("M4E3", "per channel"),
    ]
    assert len({row["accumulator"] for row in rows}) == 1  # calibrated or not, it is one accumulator
    assert rows[2]["policy"] == path.name
    again = tmp_path / "again.yaml"
    again.write_text(RECIPE.split("accumulators")[0] + f"policy: {path}\n")
    for arguments in ([again], [recipe, "--policy", path]):
        code, output = run("evaluate", *arguments, "-o", tmp_path / "evaluated", "--json")
        assert code == 0, output
        (evaluated,) = json.loads(output[output.index("{") :])["rows"]
        assert evaluated["metrics"] == rows[2]["metrics"]


def test_what_calibrate_prints_to_go_on_with_works_from_where_it_says(recipe, tmp_path, monkeypatch):
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    code, output = run("calibrate", "../small.yaml", "-o", "out of place")
    assert code == 0, output
    command, line = output.splitlines()[-2:]
    words = shlex.split(command.removeprefix("next:"))
    assert words[:4] == ["fmaq", "evaluate", "../small.yaml", "--policy"] and len(words) == 5
    code, output = run(*words[1:], "-o", "by-option", "--json")
    assert code == 0, output
    value = line.partition("policy: ")[2]
    assert line.strip().startswith("or in ../small.yaml:") and (tmp_path / value).is_file()
    Path("../named.yaml").write_text(RECIPE.split("accumulators")[0] + f"policy: {value}\n")
    code, output = run("evaluate", "../named.yaml", "-o", "by-key", "--json")
    assert code == 0, output
    rows = [json.loads(Path(folder, "evaluate.json").read_text())["rows"] for folder in ("by-option", "by-key")]
    assert [row["metrics"] for row in rows[0]] == [row["metrics"] for row in rows[1]]


def test_importance_by_name(recipe, tmp_path):
    arguments = ["calibrate", recipe, "-a", "M4E3 product=M4E3", "-o", tmp_path / "out"]
    code, output = run(*arguments, "--importance", "likelihood")
    assert code == 0 and "per channel" in output, output
    code, output = run(*arguments, "--importance", "loss")
    assert code != 0 and 'importance must be "likelihood" or "projection", got \'loss\'' in output


def test_float32_among_the_accumulators_has_its_operands_calibrated(recipe, tmp_path):
    recipe.write_text(RECIPE.replace("accumulators: [", "accumulators: [fp32, M5E4 product=M5E4, "))
    code, output = run("calibrate", recipe, "-o", tmp_path / "out", "--json")
    assert code == 0, output
    rows = json.loads((tmp_path / "out" / "calibrate.json").read_text())["rows"]
    found = [(row["accumulator"].split()[0], row["chosen"]) for row in rows]
    assert found == [
        ("fp32", None),
        ("fp32", "per channel"),
        ("M5E4", "per channel"),
        ("M4E3b5", None),
        ("M4E3b5", "per channel"),
    ]


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
    assert code != 0 and "the recipe small leaves every sum in float32; name an accumulator" in output
    code, output = run("calibrate", plain, "-o", tmp_path)
    assert code != 0 and "the recipe small leaves every sum in float32; name an accumulator" in output


def test_observe_takes_the_policys_accumulator_before_the_lists(recipe, tmp_path):
    def first(*arguments: object) -> set[str]:
        code, output = run("observe", recipe, "-o", tmp_path / "out", *arguments)
        assert code == 0, output
        return set(pd.read_csv(tmp_path / "out" / "events.csv").accumulator)

    assert first() == {"M4E3b5 product=M4E3b7 chunk=16"}
    recipe.write_text(RECIPE + "policy: {accumulator: paper12}\n")
    assert first() == {"M7E4b10 product=M7E4b12 chunk=16"}
    assert first("-a", "M5E4b10") == {"M5E4b10 chunk=16"}
    (tmp_path / "policy.yaml").write_text("accumulator: I16f8\n")
    assert first("--policy", tmp_path / "policy.yaml") == {"I16f8 chunk=16"}


def test_observe_names_data_that_the_model_cannot_take(recipe, tmp_path):
    (tmp_path / "data.py").write_text(
        "import torch\ndef two(): return None, (torch.zeros(4, 1, 8, 8).double(), torch.zeros(4))\n"
    )
    recipe.write_text(RECIPE.replace("kind: digits,", "kind: callable, callable: data.py:two,"))
    code, output = run("observe", recipe, "-o", tmp_path / "out")
    assert code != 0 and "float64 of shape (4, 1, 8, 8)" in output and "x.to(torch.float32)" in output


@pytest.mark.parametrize(("ranges", "has_range"), [("static", True), ("dynamic", False)])
def test_calibrate_chooses_ranges_or_leaves_them_to_run_time(recipe, tmp_path, ranges, has_range):
    out = tmp_path / "out"
    code, output = run("calibrate", recipe, "-a", "I24f0", "-a", "M5E4", "--ranges", ranges, "-o", out)
    assert code == 0, output
    files = sorted(out.glob("*-channel.yaml"))
    assert len(files) == 2
    for path in files:
        entries = Policy.load(path).layers.values()
        assert all((entry.get("a_max") is not None) is has_range for entry in entries)
        code, output = run("evaluate", recipe, "--policy", path, "-o", tmp_path / "again")
        assert code == 0, output


def test_formats_alone_are_calibrated_too(recipe, tmp_path):
    code, output = run("calibrate", recipe, "-a", "fp32", "-o", tmp_path / "out")
    assert code == 0, output
    (path,) = (tmp_path / "out").glob("fp32-*-channel.yaml")
    policy = Policy.load(path)
    assert all(entry["accumulator"] == "fp32" and entry["a_max"].array > 0 for entry in policy.layers.values())


def test_unknown_ranges_are_named(recipe, tmp_path):
    code, output = run("calibrate", recipe, "--ranges", "frozen", "-o", tmp_path / "out")
    assert code != 0 and "ranges must be" in output and "frozen" in output
