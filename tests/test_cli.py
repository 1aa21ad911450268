"""The command line: its commands from start to end, and one red line with exit code 2 for bad input."""

import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fmaq import __version__
from fmaq.cli import main
from fmaq.emulation import Policy
from fmaq.recipes.record import Record

RECIPE = """\
name: small
model:
  callable: fmaq.recipes.residual_cnn:residual_cnn
  arguments: {width: 4}
data:
  kind: digits
  limit: 40
policy: {accumulator: paper12, weight: M4E3, activation: M4E3}
accumulators: [fp32, paper12]
finetune:
  stages: [{epochs: 1, learning_rate: 1e-3, underflow: false}, {epochs: 1, learning_rate: 1e-4}]
  batch_size: 20
"""


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "small.yaml"
    path.write_text(RECIPE)
    return path


def run(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["fmaq", *map(str, arguments)])
    with pytest.raises(SystemExit) as caught:
        main()
    return int(caught.value.code or 0)


def test_evaluate(recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "evaluate", recipe) == 0
    text = capsys.readouterr().out
    assert "M7E4b10" in text and "runs/small/evaluate.html" in text
    record = Record.load(Path("runs/small/evaluate.json"))
    assert [row.bits for row in record.rows] == [32, 12]
    assert record.provenance["fmaq"] == __version__ and record.recipe["name"] == "small"
    assert Path("runs/small/evaluate.csv").read_text().count("\n") == 4
    assert Path("runs/small/evaluate.png").exists()


def test_evaluate_as_json_at_other_accumulators(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ["-a", "M5E4b10 product=M5E4b12", "-o", "elsewhere", "--json", "--seed", 5]
    assert run(monkeypatch, "evaluate", recipe, *options) == 0
    out = capsys.readouterr()
    record = json.loads(out.out)
    assert record["rows"][0]["accumulator"].startswith("M5E4b10") and record["seed"] == 5
    assert "zero" not in out.out and "M5E4b10" in out.err
    assert Path("elsewhere/evaluate.json").exists() and not Path("runs").exists()


def test_finetune_twice_then_fresh(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "finetune", recipe) == 0
    assert "stage 2, epoch 1 of 1" in capsys.readouterr().out
    first = Record.load(Path("runs/small/finetune.json"))
    assert first.stages == 2
    assert run(monkeypatch, "finetune", recipe) == 0
    assert "holds the end of this run: nothing is left to train" in capsys.readouterr().out
    assert Record.load(Path("runs/small/finetune.json")).rows == first.rows
    assert run(monkeypatch, "finetune", recipe, "-a", "M5E4b10") == 2
    assert "another policy" in capsys.readouterr().err
    assert run(monkeypatch, "finetune", recipe, "-a", "M5E4b10", "--fresh") == 0
    assert Record.load(Path("runs/small/finetune.json")).rows[0].accumulator.startswith("M5E4b10")


def test_a_refused_run_leaves_the_record_of_the_finished_one(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "finetune", recipe) == 0
    before = Path("runs/small/finetune.json").read_bytes()
    assert run(monkeypatch, "finetune", recipe, "-a", "M5E4b10") == 2
    assert "another policy" in capsys.readouterr().err
    assert Path("runs/small/finetune.json").read_bytes() == before


def test_policy_and_weights_of_the_command_line(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("given.yaml").write_text("accumulator: M5E4b10 product=M5E4b12\nweight: int8\nlayers: {stem: null}\n")
    assert run(monkeypatch, "finetune", recipe, "--policy", "given.yaml") == 0
    tuned = Record.load(Path("runs/small/finetune.json"))
    assert [(row.operands, row.accumulator.split()[0]) for row in tuned.rows] == [("int8/float32", "M5E4b10")]
    command = shlex.split(capsys.readouterr().out.splitlines()[-1].removeprefix("next:"))
    assert command == [
        *("fmaq", "evaluate", str(recipe)),
        *("--policy", "runs/small/policy.yaml", "--weights", "runs/small/model.safetensors"),
    ]
    assert run(monkeypatch, *command[1:]) == 0
    (measured,) = Record.load(Path("runs/small/evaluate.json")).rows
    assert measured.metrics == {name: tuned.rows[0].after(1, name) for name in measured.metrics}
    assert measured.operands == "int8/float32"
    capsys.readouterr()
    assert run(monkeypatch, "evaluate", recipe, "--policy", "given.yaml", "-a", "paper12", "--json") == 0
    (replaced,) = json.loads(capsys.readouterr().out)["rows"]
    assert (replaced["operands"], replaced["accumulator"].split()[0]) == ("int8/float32", "M7E4b10")


def test_a_calibrated_policy_serves_every_command(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "calibrate", recipe, "-a", "M4E3 product=M4E3", "-o", "chosen") == 0
    (row,) = Record.load(Path("chosen/calibrate.json")).rows
    policy = Path("chosen") / str(row.policy)
    for command in ("evaluate", "finetune", "observe", "analyze"):
        assert run(monkeypatch, command, recipe, "--policy", policy) == 0, capsys.readouterr().err
    (evaluated,) = Record.load(Path("runs/small/evaluate.json")).rows
    (tuned,) = Record.load(Path("runs/small/finetune.json")).rows
    assert evaluated.metrics == tuned.metrics == row.metrics
    assert Policy.load("runs/small/policy.yaml") == Policy.load(policy)
    offsets = [entry for entry in Policy.load(policy).layers.values() if entry and "offset" in entry]
    assert offsets and "M4E3" in Path("runs/small/events.csv").read_text()


def test_finetune_calibrates_first_where_the_recipe_says_so(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fmaq.recipes import run as runs

    narrow = "M3E3h product=M3E3h outer=M10E5"
    assert run(monkeypatch, "finetune", recipe, "-a", narrow) == 2  # has no bias, and nothing chooses one
    recipe.write_text(RECIPE + "  calibrate: {per: channel, batches: 1}\n")
    assert run(monkeypatch, "finetune", recipe, "-a", narrow, "-o", "chosen") == 0
    (row,) = Record.load(Path("chosen/finetune.json")).rows
    assert row.accumulator.startswith("M3E3h product=M3E3h") and row.chosen == "per channel"
    policy = Policy.load("chosen/policy.yaml")
    assert any("offset" in entry for entry in policy.layers.values() if entry)
    assert "calibrated per channel" in capsys.readouterr().out

    monkeypatch.setattr(runs, "calibrate", None)  # is not called again
    assert run(monkeypatch, "finetune", recipe, "-a", narrow, "-o", "chosen") == 0
    assert "nothing is left to train" in capsys.readouterr().out
    assert run(monkeypatch, "finetune", recipe, "--policy", "chosen/policy.yaml", "-o", "given") == 0
    (given,) = Record.load(Path("given/finetune.json")).rows
    assert given.metrics == row.metrics and given.tuned["stages"] == row.tuned["stages"]

    monkeypatch.undo()
    monkeypatch.chdir(recipe.parent)
    assert run(monkeypatch, "finetune", recipe, "-a", "M3E3 product=M3E3", "-o", "chosen") == 2
    assert "another policy" in capsys.readouterr().err
    assert Policy.load("chosen/policy.yaml") == policy


def test_recorded_commands_can_be_pasted_into_a_shell(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["evaluate", "small.yaml", "-a", "M5E4b10 product=M5E4b12", "-o", "a folder"]
    assert run(monkeypatch, *arguments) == 0
    command = Record.load(Path("a folder/evaluate.json")).provenance["command"]
    assert shlex.split(command) == ["fmaq", *arguments]


def test_report_shows_a_record_again(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, "evaluate", recipe) == 0
    first = capsys.readouterr().out
    Path("runs/small/evaluate.html").unlink()
    assert run(monkeypatch, "report", "runs/small/evaluate.json") == 0
    again = capsys.readouterr().out
    table = again[: again.index("plot:")]
    assert "M7E4b10" in table and table in first
    assert Path("runs/small/evaluate.html").exists()
    assert run(monkeypatch, "report", "runs/small/evaluate.json", "-o", "elsewhere") == 0
    assert {path.name for path in Path("elsewhere").iterdir()} == {"small-evaluate.html", "small-evaluate.png"}


@pytest.mark.parametrize(
    ("old", "new", "what"),
    [
        ("arguments: {width: 4}", "weights: other.safetensors\n  arguments: {width: 4}", "weights"),
        ("kind: digits\n  limit: 40", "kind: callable\n  callable: other_data.py:halves", "test examples"),
    ],
)
def test_a_run_that_began_elsewhere_is_not_resumed(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], old: str, new: str, what: str
) -> None:
    from safetensors.torch import save_file

    from fmaq.recipes.residual_cnn import residual_cnn

    assert run(monkeypatch, "finetune", recipe) == 0
    before = Path("runs/small/finetune.json").read_bytes()
    torch.manual_seed(99)
    save_file(residual_cnn(width=4).state_dict(), "other.safetensors")
    Path("other_data.py").write_text(
        "from fmaq.recipes.data import load_data\nfrom fmaq.recipes.recipe import DigitsData\n\n"
        "def halves():\n    train, test = load_data(DigitsData(kind='digits', limit=40), 'classification', None)\n"
        "    return train, type(test)(*test.batch(slice(0, 20)))\n"
    )
    assert old in RECIPE
    recipe.write_text(RECIPE.replace(old, new))
    assert run(monkeypatch, "finetune", recipe) == 2
    assert f"a run that began with other {what}" in capsys.readouterr().err
    assert Path("runs/small/finetune.json").read_bytes() == before


def test_the_output_folder_is_tried_before_the_work(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for command in ("evaluate", "finetune", "calibrate", "observe"):
        assert run(monkeypatch, command, recipe, "-o", recipe / "runs") == 2
        out = capsys.readouterr()
        assert "cannot make the output folder" in out.err and "accuracy" not in out.out


def test_observing_nothing_says_so(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe.write_text(RECIPE.replace("policy: {", "policy: {layers: {'*': null, '': null}, "))
    assert run(monkeypatch, "observe", recipe) == 2
    assert "none of the products of" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["evaluate", "nowhere.yaml"], "cannot read the recipe nowhere.yaml"),
        (["report", "nowhere.json"], "No such file or directory: 'nowhere.json'"),
        (["report", "small.yaml"], "small.yaml is no record of a run"),
        (["evaluate", "small.yaml", "-a", "M7"], "'M7' is not a format"),
        (["finetune", "plain.yaml"], "give it the key finetune"),
        (
            ["evaluate", "small.yaml", "--policy", "smal.yaml"],
            "--policy: there is no file smal.yaml; did you mean small",
        ),
        (["evaluate", "small.yaml", "--policy", "small.yaml"], "small.yaml: a policy has no 'name'"),
        (["evaluate", "small.yaml", "--weights", "none.safetensors"], "--weights: there is no file none.safetensors"),
        (["finetune", "small.yaml", "--policy", "a/b.yaml"], "--policy: there is no file a/b.yaml"),
        (["observe", "small.yaml", "--weights", "small.yaml"], "weights must be a .safetensors file, got small.yaml"),
        (["evaluate", "small.yaml", "-a", "M5E4"], "the accumulator 'M5E4 chunk=16' lacks a bias"),
        (["hardware", "formats", "M7X"], "'M7X' is not a format"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(
    recipe: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    expected: str,
) -> None:
    Path("plain.yaml").write_text(RECIPE.partition("finetune:")[0])
    assert run(monkeypatch, *arguments) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ") and expected in message and "Traceback" not in message


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["fmaq", "evaluate", "nowhere.yaml", "--debug"])
    with pytest.raises(ValueError, match="cannot read the recipe"):
        main()


def test_interruption_is_exit_code_130(
    recipe: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from fmaq.recipes import run as runs
    from fmaq.training.interrupts import Interrupted

    def interrupted(*arguments: object, **named: object) -> None:
        raise Interrupted("interrupted in stage 1; run the same again")

    monkeypatch.setattr(runs, "finetune", interrupted)
    assert run(monkeypatch, "finetune", recipe) == 130
    assert "run the same again" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["evaluate", "finetune", "calibrate", "observe", "analyze", "hardware model"])
def test_commands_on_recipes_show_how_to_give_a_policy_and_weights(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert run(monkeypatch, *command.split(), "--help") == 0
    text = capsys.readouterr().out
    options, _, examples = text.partition("Examples")
    assert "--policy" in options and "--weights" in options
    assert "--policy" in examples and "--weights" in examples


@pytest.mark.parametrize("command", ["demo", "evaluate", "finetune", "hardware", "bench"])
def test_help_has_examples(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, command, "--help") == 0
    text = capsys.readouterr().out
    assert "Examples" in text and f"fmaq {command}" in text


def test_version(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "--version") == 0
    assert capsys.readouterr().out == f"fmaq {__version__}\n"


def test_hardware_prints_the_formats(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, "hardware", "formats", "paper12", "--json") == 0
    sums, products = json.loads(capsys.readouterr().out)
    assert (sums["bits"], sums["register"], sums["largest"]) == (12, 13, 63.75)
    assert (products["format"], products["smallest"]) == ("M7E4b12", 2**-12)
    text = "M5E4b10h outer=(M10E5b16 chunk=8 outer=fp32)"
    assert run(monkeypatch, "hardware", "formats", text, "--json") == 0
    sums, products, first, second = json.loads(capsys.readouterr().out)
    assert products["format"] == "exact"
    assert (sums["bits"], sums["largest"], first["role"], first["format"]) == (10, 63.5, "outer 1", "M10E5b16")
    assert (second["role"], second["format"], second["bits"], second["register"]) == ("outer 2", "fp32", 32, 32)


def test_help_does_not_import_torch() -> None:
    code = "import sys; from fmaq.cli import app; from fmaq.cli.app import app; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


def test_an_unknown_device_is_named_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], recipe: Path
) -> None:
    assert run(monkeypatch, "evaluate", recipe, "--device", "nonsense") == 2
    assert "torch cannot use the device 'nonsense' here" in capsys.readouterr().err
