"""Experiments: what they refuse, the quick form end to end, going on after a stop, and every file's two forms."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch
import yaml
from typer.testing import CliRunner

from fmaq.cli.app import app
from fmaq.numerics.reference import ESTIMATORS
from fmaq.recipes.explain import RecipeError
from fmaq.reproduce.experiment import Cell, TrainingExperiment, available, find, load
from fmaq.reproduce.run import run_experiment
from fmaq.reproduce.tables import markdown
from fmaq.reproduce.trainings import Trainings
from fmaq.training.progress import Bars


@pytest.fixture(autouse=True)
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def changed(tmp_path: Path, old: str, new: str) -> Path:
    """A copy of mlp-fashion, of which one piece of text is another, beside what it names."""
    source = find("mlp-fashion")
    text = source.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "changed.yaml"
    path.write_text(text.replace(old, new).replace("models.py:", f"{source.parent / 'models.py'}:"), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("schedules:\n", "shedules:\n", "schedules"),
        ("identity, immediate/of", "identity, imediate/of", "did you mean 'immediate/of'"),
        ("seeds: [0, 1]", "seeds: [0, 1]\n      only: [from scrach]", "did you mean 'from scratch'"),
        ("name: mlp-fashion\n", "name: mlp-fashion\nkind: trainin\n", "did you mean 'training'"),
    ],
)
def test_names_the_nearest_of_what_is_wrong(tmp_path: Path, old: str, new: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load(changed(tmp_path, old, new), quick=True)


def test_an_unknown_experiment_names_the_nearest() -> None:
    with pytest.raises(RecipeError, match="did you mean 'mlp-fashion'"):
        find("mlp-fasion")


def test_a_file_without_a_quick_form_says_so(tmp_path: Path) -> None:
    path = tmp_path / "whole.yaml"
    path.write_text("name: whole\n", encoding="utf-8")
    with pytest.raises(RecipeError, match="no quick form"):
        load(path, quick=True)


def test_the_list_has_every_experiment() -> None:
    done = CliRunner().invoke(app, ["reproduce"])
    assert done.exit_code == 0
    assert len(available()) >= 6
    assert all(name in done.output for name in available())


@pytest.mark.parametrize("quick", [False, True])
@pytest.mark.parametrize("name", sorted(available()))
def test_every_experiment_can_be_read(name: str, quick: bool) -> None:
    try:
        experiment = load(find(name), quick)
    except RecipeError as error:
        if "does not exist" in str(error) or "`make fetch` downloads it" in str(error):
            pytest.skip(f"data are missing: {error}")
        raise
    assert experiment.name == (f"{name}-quick" if quick else name)
    assert experiment.cells()


@pytest.mark.parametrize("name", sorted(available()))
def test_a_quick_form_names_no_data_that_it_does_not_run_on(name: str) -> None:
    values = yaml.safe_load(find(name).read_text(encoding="utf-8"))
    quick = values["quick"]
    said = " ".join([quick["title"], *quick["notes"]])
    assert said.startswith(f"Quick form of {name}: ") and "Not the experiment" in said
    ran = str(quick.get("data") or quick["networks"])
    for data, words in {
        "images.py:fashion": "Fashion-MNIST",
        "images.py:digits": "MNIST digits",
        "brown": "Brown",
    }.items():
        assert data in ran or words not in said
    assert ("kind': 'digits'" in ran) == ("scikit-learn's digits" in said or name == "cost")


@pytest.mark.parametrize("key", ["title", "notes"])
def test_a_quick_form_says_for_itself_what_it_ran(tmp_path: Path, key: str) -> None:
    path = changed(tmp_path, "quick:\n  title", "quick:\n  title")
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(line for line in lines if not line.startswith(f"  {key}:")), encoding="utf-8")
    with pytest.raises(RecipeError, match=rf"quick: give it its own {key}, which say what it runs"):
        load(path, quick=True)


def test_quick_end_to_end(tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["reproduce", "mlp-fashion", "--quick", "--seed", "0", "-o", str(tmp_path)])
    assert done.exit_code == 0, done.output
    for ending in ("json", "csv", "md", "png", "html"):
        assert (tmp_path / f"mlp-fashion-quick.{ending}").stat().st_size > 0
    assert (tmp_path / "mlp-fashion-quick.png").read_bytes().startswith(b"\x89PNG")
    with (tmp_path / "mlp-fashion-quick.csv").open(encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert {row["estimator"] for row in rows} == set(ESTIMATORS)
    assert all(0 <= float(row["accuracy"]) <= 1 for row in rows)
    table = (tmp_path / "mlp-fashion-quick.md").read_text(encoding="utf-8")
    assert all(name in table for name in (*ESTIMATORS, "M4E3b5", "M2E3b4", "float32"))
    page = (tmp_path / "mlp-fashion-quick.html").read_text(encoding="utf-8")
    shown = page[: page.index("<summary>The recipe</summary>")]
    for text in (done.output, table, shown):
        assert "Fashion-MNIST" not in text
    assert "mlp-fashion-quick: accuracy" in done.output
    assert all("Quick form of mlp-fashion: a small MLP on scikit-learn" in text for text in (table, shown))


def test_cells_are_calibrated_first_where_their_schedule_says_so(tmp_path: Path) -> None:
    def metrics(calibrate: str, folder: str) -> list[dict[str, float]]:
        schedule = "from scratch: {stages: [{epochs: 4, learning_rate: 1.0e-2}], batch_size: 32"
        experiment = load(changed(tmp_path, f"{schedule}}}", f"{schedule}{calibrate}}}"), quick=True)
        block = experiment.grid[0].model_copy(update={"accumulators": ["M3E3b9h product=M3E3b9h"], "seeds": [0]})
        block = block.model_copy(update={"estimators": ["identity"]})
        experiment = experiment.model_copy(update={"grid": [block]})
        said: list[str] = []
        run_experiment(experiment, tmp_path / folder, say=said.append)
        results = run_experiment(experiment, tmp_path / folder, say=said.append)
        assert [line.endswith("(from before)") for line in said] == [False, True]
        return [cell.metrics for cell in results.cells]

    (as_given,), (chosen,) = metrics("", "kept"), metrics(", calibrate: {per: layer, batches: 1}", "kept")
    assert chosen["accuracy"] > as_given["accuracy"]


def test_going_on_gives_the_same_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    experiment = load(find("mlp-fashion"), quick=True)
    experiment = experiment.model_copy(update={"grid": [experiment.grid[0].model_copy(update={"seeds": [0]})]})
    whole = run_experiment(experiment, tmp_path / "whole", say=lambda line: None)

    run, calls = Trainings.run, 0

    def interrupted(self: Trainings, *arguments: object) -> object:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return run(self, *arguments)

    monkeypatch.setattr(Trainings, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_experiment(experiment, tmp_path / "parts", say=lambda line: None)
    monkeypatch.setattr(Trainings, "run", run)
    said: list[str] = []
    parts = run_experiment(experiment, tmp_path / "parts", say=said.append)
    assert [line.endswith("(from before)") for line in said] == [True] * 3 + [False] * (len(said) - 3)
    assert markdown(parts) == markdown(whole)


def test_one_pretraining_on_data_of_its_own_serves_all_seeds(tmp_path: Path) -> None:
    old = "\nschedules:\n"
    new = "\npretrain: {seed: 5, data: {kind: digits, limit: 64}, stages: [{epochs: 1, learning_rate: 1.0e-3}]}" + old
    experiment = load(changed(tmp_path, old, new), quick=True)
    assert isinstance(experiment, TrainingExperiment)
    trainings = Trainings(experiment, tmp_path / "out", Bars(False), lambda line: None)
    cells = [Cell("fp32", "identity", "from scratch", seed) for seed in (0, 1)]
    results = [trainings.run(cell, None)[0] for cell in cells]
    (folder,) = (tmp_path / "out" / "pretrained").iterdir()
    kept = json.loads((folder / "result.json").read_text())
    assert kept["seed"] == 5
    assert kept["data"].startswith("64 training examples")
    assert results[0].metrics != results[1].metrics  # of another order of the examples
