"""`fmaq analyze`: two tables of a recipe's model, as text and as JSON, and clear refusals."""

import json
import sys
from pathlib import Path

import pytest

from fmaq.cli import main

RECIPE = """\
name: small
model: {callable: fmaq.training.residual_cnn:residual_cnn, arguments: {width: 4}}
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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["small.yaml"], "the policy of small.yaml leaves every sum in float32; name an accumulator, like -a paper12"),
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
