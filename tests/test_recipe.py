"""Recipes: what they accept, and the errors that name the file, the line, the key and the fix."""

from pathlib import Path

import numpy as np
import pytest
import torch

from fmaq.training.data import load_data
from fmaq.training.examples import Examples, Windows
from fmaq.training.explain import RecipeError
from fmaq.training.models import build_model
from fmaq.training.policies import all_policies
from fmaq.training.recipe import Recipe, expand
from fmaq.training.run import prepare

MODEL = """
from torch import nn

def linear(features, classes=10):
    return nn.Sequential(nn.Flatten(), nn.Linear(features, classes))

def not_a_module():
    return 3

def windows(count, tokenizer=None):
    import torch
    return None, torch.arange(count)

def examples():
    import torch
    return None, (torch.zeros(4, 3), torch.zeros(4))

def metric(model, data, device):
    return {"half": 0.5}
"""

BASE = """\
name: test
model:
  callable: model.py:linear
  arguments: {features: 64}
data:
  kind: digits
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "model.py").write_text(MODEL)
    images = np.arange(2 * 4 * 4 * 3, dtype=np.uint8).reshape(2, 4, 4, 3)
    np.savez(tmp_path / "images.npz", x=images, y=np.array([0, 1], np.uint8))
    return tmp_path


def parse(folder: Path, text: str) -> Recipe:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return Recipe.load(path)


def complaint(folder: Path, text: str) -> str:
    with pytest.raises(RecipeError) as caught:
        parse(folder, text)
    return str(caught.value)


def test_defaults(folder: Path) -> None:
    recipe = parse(folder, BASE)
    assert (recipe.seed, recipe.task, recipe.finetune, recipe.accumulators) == (0, "classification", None, [])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (BASE + "acumulators: [fp32]\n", "line 7: acumulators: unknown key; did you mean 'accumulators'?"),
        (BASE + "  test_fractoin: 0.1\n", "line 7: data.test_fractoin: unknown key; did you mean 'test_fraction'?"),
        (BASE.replace("features:", "featuers:"), "got an unexpected keyword argument 'featuers'"),
        (BASE.replace("digits", "digit"), "line 6: data.kind: no kind 'digit'; did you mean 'digits'?"),
        (BASE.replace("kind: digits", "batch_size: 3"), "data.kind: this key is missing; it may be digits"),
        (BASE.replace("name: test\n", ""), "name: this key is missing"),
        (BASE + "seed: many\n", "seed: Input should be a valid integer"),
        (BASE + "task: clasification\n", "no task 'clasification'; did you mean 'classification'?"),
        (BASE + "policy: {acumulator: fp32}\n", "line 7: policy: a policy has no 'acumulator'"),
        (BASE + "policy: missing.yaml\n", "missing.yaml does not exist"),
        (BASE + "policy: 3\n", "policy: a policy is a mapping"),
        (BASE + "accumulators: [M7]\n", "'M7' is not a format"),
        (BASE + "accumulators: [M7E8b10]\n", "does not fit in float32"),
        (BASE + "operands: [M4]\n", "'M4'"),
        (BASE + "finetune: {batch_size: 3}\n", "give either stages"),
        (BASE + "finetune: {stages: [{epochs: 1, learnin_rate: 1}]}\n", "finetune.stages.0.learnin_rate: unknown key"),
        (BASE.replace("model.py:linear", "model.py:liner"), "has no function 'liner'; did you mean 'linear'?"),
        (BASE.replace("model.py:linear", "models.py:linear"), "models.py does not exist"),
        (BASE.replace("model.py:linear", "no_such_module:linear"), "cannot import no_such_module"),
        (BASE.replace("  callable: model.py:linear\n", ""), "give exactly one of callable"),
        (BASE.replace("{features: 64}", "{}"), "also needs arguments: features"),
        (BASE.replace("kind: digits", "kind: npz\n  test: none.npz"), "data.test: "),
        (BASE.replace("kind: digits", "kind: npz\n  test: ${NOWHERE_SET}/a.npz"), "NOWHERE_SET is not set"),
        (BASE + "name: again\n", "line 7, column 1: not valid YAML: the key 'name' is given twice"),
        ("name: [\n", "not valid YAML"),
        ("3\n", "a recipe is a mapping with the keys name"),
    ],
)
def test_errors_name_the_key_and_the_fix(folder: Path, text: str, expected: str) -> None:
    message = complaint(folder, text)
    assert expected in message
    assert str(folder / "recipe.yaml") in message


def test_missing_recipe(folder: Path) -> None:
    with pytest.raises(RecipeError, match=r"cannot read the recipe .*nowhere"):
        Recipe.load(folder / "nowhere.yaml")


def test_all_errors_are_told_at_once(folder: Path) -> None:
    message = complaint(folder, BASE + "seed: -1\naccumulators: [M7]\n")
    assert "seed" in message and "accumulators" in message


def test_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMAQ_TEST", "value")
    monkeypatch.delenv("FMAQ_UNSET", raising=False)
    assert expand("${FMAQ_TEST}/a") == "value/a"
    assert expand("${FMAQ_UNSET:-../b}/a") == "../b/a"
    assert not expand("~/a").startswith("~")


def test_stages_from_both_spellings(folder: Path) -> None:
    long, short = "{epochs: 5, learning_rate: 1e-3", "{epochs: 1, learning_rate: 1e-4}"
    dual = f"  without_underflow: {long}}}\n  with_underflow: {short}\n"
    stages = f"  stages:\n  - {long}, underflow: false}}\n  - {short}\n"
    schedules = [parse(folder, f"{BASE}finetune:\n{text}").finetune for text in (dual, stages)]
    assert schedules[0] is not None and schedules[1] is not None
    assert schedules[0].schedule() == schedules[1].schedule()
    assert [s.underflow for s in schedules[0].schedule().stages] == [False, True]


def test_changes_from_the_command_line(folder: Path) -> None:
    (folder / "recipe.yaml").write_text(BASE + "policy: {weight: M4E3}\n")
    recipe = Recipe.load(folder / "recipe.yaml", {"policy.accumulator": "paper12", "seed": 4})
    assert recipe.seed == 4
    assert recipe.load_policy().weight == "M4E3"
    assert recipe.load_policy().accumulator.bits == 12


def test_policy_file_is_relative_to_the_recipe(folder: Path) -> None:
    (folder / "policy.yaml").write_text("weight: M4E3\n")
    recipe = parse(folder, BASE + "policy: policy.yaml\n")
    assert recipe.load_policy().weight == "M4E3"


def test_every_pair_of_operands_and_accumulators(folder: Path) -> None:
    recipe = parse(folder, BASE + "operands: [float32, M4E3]\naccumulators: [fp32, paper12]\n")
    made = [(p.weight, str(p.accumulator).split()[0]) for p in all_policies(recipe)]
    assert made == [(None, "fp32"), (None, "M7E4b10"), ("M4E3", "fp32"), ("M4E3", "M7E4b10")]


def test_globs_must_match(folder: Path) -> None:
    with pytest.raises(
        RecipeError, match=r"policy.layers: 'convolution\*' matches no module of Sequential; it has 0, 1"
    ):
        prepare(parse(folder, BASE + "policy: {layers: {'convolution*': null}}\n"))


def test_model_must_be_a_module(folder: Path) -> None:
    text = BASE.replace("model.py:linear\n  arguments: {features: 64}", "model.py:not_a_module")
    with pytest.raises(RecipeError, match=r"returned a int, not a torch.nn.Module"):
        build_model(parse(folder, text).model)


def test_weights_of_another_model_are_refused(folder: Path) -> None:
    from safetensors.torch import save_file

    save_file({"1.weight": torch.zeros(3, 3), "other": torch.zeros(1)}, folder / "w.safetensors")
    text = BASE.replace("model.py:linear", "model.py:linear\n  weights: w.safetensors")
    with pytest.raises(RecipeError, match=r"lacks 1.bias; it has unknown other; it has other shapes for 1.weight"):
        build_model(parse(folder, text).model)


def test_npz(folder: Path) -> None:
    npz = (
        "kind: npz\n  test: images.npz\n  layout: NHWC\n  scale: 255\n  mean: [0.5, 0.5, 0.5]\n  std: [0.5, 0.25, 0.5]"
    )
    train, test = load_data(parse(folder, BASE.replace("kind: digits", npz)).data)
    assert train is None
    assert test.inputs.shape == (2, 3, 4, 4)
    raw = np.load(folder / "images.npz")["x"]
    assert test.inputs[1, 1, 2, 3].item() == pytest.approx((raw[1, 2, 3, 1] / 255 - 0.5) / 0.25)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ("x: images", "data.x: .* has no array 'images'; it has x, y"),
        ("layout: NC", r"data.layout is NC, but x in .* has shape \(2, 4, 4, 3\)"),
        ("layout: NHWC\n  mean: [1, 2]", "data.mean has 2 values, but the data have 3 channels"),
    ],
)
def test_npz_errors(folder: Path, options: str, expected: str) -> None:
    recipe = parse(folder, BASE.replace("kind: digits", f"kind: npz\n  test: images.npz\n  {options}"))
    with pytest.raises(RecipeError, match=expected):
        load_data(recipe.data)


def test_broken_npz(folder: Path) -> None:
    (folder / "broken.npz").write_bytes(b"not a zip file")
    recipe = parse(folder, BASE.replace("kind: digits", "kind: npz\n  test: broken.npz"))
    with pytest.raises(RecipeError, match=r"cannot read .*broken.npz"):
        load_data(recipe.data)


def test_image_folder(folder: Path) -> None:
    from PIL import Image

    for name, value in (("b", 255), ("a", 0)):
        (folder / "images" / name).mkdir(parents=True)
        Image.new("RGB", (6, 4), (value, 0, 0)).save(folder / "images" / name / "1.png")
    text = BASE.replace("kind: digits", "kind: image_folder\n  test: images\n  resize: 8\n  crop: 6")
    _, test = load_data(parse(folder, text).data)
    assert test.inputs.shape == (2, 3, 6, 6)
    assert test.inputs[:, 0, 0, 0].tolist() == [0.0, 1.0]
    assert test.targets.tolist() == [0, 1]


def test_empty_image_folder(folder: Path) -> None:
    (folder / "empty").mkdir()
    recipe = parse(folder, BASE.replace("kind: digits", "kind: image_folder\n  test: empty"))
    with pytest.raises(RecipeError, match="has no images; it should have a folder of images for each class"):
        load_data(recipe.data)


def test_digits_are_split_the_same_way_each_time(folder: Path) -> None:
    recipe = parse(folder, BASE)
    (train, test), (again, _) = load_data(recipe.data), load_data(recipe.data)
    assert (len(train), len(test)) == (1438, 359)
    assert torch.equal(train.inputs, again.inputs)
    assert (float(train.inputs.min()), float(train.inputs.max())) == (0, 1)


def test_limit(folder: Path) -> None:
    train, test = load_data(parse(folder, BASE + "  limit: 7\n").data)
    assert (len(train), len(test)) == (7, 7)


def test_callable_data_and_task(folder: Path) -> None:
    text = BASE.replace("kind: digits", "kind: callable\n  callable: model.py:examples") + "task: model.py:metric\n"
    ready = prepare(parse(folder, text.replace("features: 64", "features: 3")))
    assert isinstance(ready.test, Examples)
    assert ready.measure(None)[0] == {"half": 0.5}


def test_local_text_through_datasets(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("datasets")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(folder / "cache"))
    (folder / "text.csv").write_text("sentence,mark\nhello there,1\nbye,0\n")
    text = BASE.replace(
        "kind: digits",
        "kind: huggingface\n  id: csv\n  files: {test: text.csv}\n  columns: {text: sentence, label: mark}",
    )

    def tokenizer(texts, second=None, **options):
        if isinstance(texts, str):
            return {"input_ids": [len(word) for word in texts.split()]}
        return {"input_ids": torch.tensor([[len(t)] for t in texts])}

    recipe = parse(folder, text)
    _, test = load_data(recipe.data, "classification", tokenizer)
    assert test.inputs["input_ids"].flatten().tolist() == [11, 3]
    assert test.targets.tolist() == [1, 0]
    with pytest.raises(RecipeError, match="the model has no tokenizer"):
        load_data(recipe.data, "classification", None)
    with pytest.raises(RecipeError, match="this task needs second"):
        load_data(recipe.data, "similarity", tokenizer)
    windowed = parse(folder, text.replace(", label: mark", "") + "  window: 2\n")
    _, test = load_data(windowed.data, "perplexity", tokenizer)
    assert isinstance(test, Windows) and test.tokens.tolist() == [[5, 5]]
    wrong = parse(folder, text.replace("label: mark", "label: marks"))
    with pytest.raises(RecipeError, match=r"data.columns.label: csv has no column 'marks'; it has sentence, mark"):
        load_data(wrong.data, "classification", tokenizer)


@pytest.mark.parametrize(
    "path", sorted((Path(__file__).parent.parent / "examples" / "resnet20").glob("*.yaml")), ids=lambda p: p.stem
)
def test_shipped_recipes_are_valid(path: Path) -> None:
    if not (path.parent / "../../../shared/data/cifar10-resnet").exists():
        pytest.skip("the CIFAR-10 sample is not beside the repository")
    assert Recipe.load(path).name.startswith("resnet20")
