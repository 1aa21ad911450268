"""`fmaq analyze`: two tables of a recipe's model, as text and as JSON, and clear refusals."""

import json
import sys
from pathlib import Path

import pytest

from fmaq.cli import main

RECIPE = """\
name: small
model: {callable: fmaq.recipes.residual_cnn:residual_cnn, arguments: {width: 4}}
data: {kind: digits, limit: 10}
"""


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    Path("small.yaml").write_text(RECIPE)
    Path("attached.yaml").write_text(RECIPE + 'policy: {accumulator: "I16f8w chunk=None", weight: M4E3}\n')

    def call(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fmaq", "analyze", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        return int(caught.value.code or 0), *capsys.readouterr()

    return call


def test_two_tables(run) -> None:
    code, out, _ = run("small.yaml", "-a", "paper12")
    assert code == 0
    assert "Mantissa by length" in out and "Channels that cannot overflow" in out
    assert "bits of mantissa suit all" in out and "product bias" in out


def test_json(run) -> None:
    code, out, _ = run("small.yaml", "-a", "M7E4 product=M7E4", "--json")
    found = json.loads(out)
    assert code == 0 and found["recipe"] == "small.yaml"
    assert len(found["mantissa"]) == len(found["overflow"]) > 3
    proving = min(row["bias"] for row in found["overflow"]), min(row["product_bias"] for row in found["overflow"])
    code, out, _ = run("small.yaml", "-a", "M7E4b{} product=M7E4b{}".format(*proving), "--json")
    assert all(row["proven"] == row["channels"] > 0 for row in json.loads(out)["overflow"])


def test_a_fixed_accumulator_of_the_policy_has_bounds_alone(run) -> None:
    code, out, _ = run("attached.yaml", "--input-max", "0,16", "--json")
    found = json.loads(out)
    assert code == 0 and found["mantissa"] == []
    assert all(row["width"] >= 2 and (row["low"], row["high"]) == (0, 16) for row in found["overflow"])


def test_an_accumulator_of_the_list_is_analysed_like_that_of_the_policy(run) -> None:
    Path("listed.yaml").write_text(RECIPE + "accumulators: [fp32, paper12, I16f8]\n")
    Path("own.yaml").write_text(RECIPE + "policy: {accumulator: paper12}\n")
    found = []
    for arguments in (["listed.yaml"], ["own.yaml"], ["small.yaml", "-a", "paper12"]):
        code, out, _ = run(*arguments, "--json")
        found.append({**json.loads(out), "recipe": code})
    assert found[0] == found[1] == found[2] and found[0]["mantissa"]


def test_layers_that_a_policy_leaves_alone_are_not_analysed(run) -> None:
    Path("policy.yaml").write_text("accumulator: paper12\nlayers: {'blocks.*': null}\n")
    code, out, _ = run("small.yaml", "--policy", "policy.yaml", "--json")
    assert code == 0 and [row["layer"] for row in json.loads(out)["overflow"]] == ["stem", "classifier"]


def test_data_that_the_model_cannot_take(run) -> None:
    Path("data.py").write_text("import torch\ndef two(): return None, (torch.zeros(4, 2, 8, 8), torch.zeros(4))\n")
    Path("two.yaml").write_text(RECIPE.replace("kind: digits", "kind: callable, callable: data.py:two"))
    code, _, err = run("two.yaml", "-a", "paper12")
    assert code == 2 and "cannot take this batch of the data: float32 of shape (4, 2, 8, 8)" in " ".join(err.split())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small.yaml"], "the recipe small leaves every sum in float32; name an accumulator, like -a paper12"),
        (["small.yaml", "-a", "M7"], "'M7' is not a format"),
        (["small.yaml", "-a", "paper12", "--input-max", "M4E3"], "its bias fits them. Give a bias"),
        (["small.yaml", "-a", "paper12", "--input-max", "1,2,3"], "--input-max takes one number or LOW,HIGH"),
        (["nowhere.yaml", "-a", "paper12"], "cannot read the recipe nowhere.yaml"),
    ],
)
def test_bad_input(run, arguments: list[str], message: str) -> None:
    code, _, err = run(*arguments)
    assert code == 2 and message in " ".join(err.split()) and "Traceback" not in err


def test_help_has_examples(run) -> None:
    code, out, _ = run("--help")
    assert code == 0 and "Examples" in out and "--input-max" in out
