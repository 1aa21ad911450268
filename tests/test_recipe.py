"""Recipes: what they accept, and the errors that name the file, the line, the key and the fix."""

import os
import re
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from pydantic import BaseModel

from fmaq.recipes.data import load_data
from fmaq.recipes.explain import DATA_KINDS, RecipeError
from fmaq.recipes.models import build_model
from fmaq.recipes.policies import all_policies
from fmaq.recipes.recipe import DataRecipe, DigitsData, Recipe
from fmaq.recipes.run import prepare
from fmaq.recipes.values import expand
from fmaq.training.examples import Examples, Windows

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
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

def broken_metric(model, data, device):
    return {"half": data["none"]}

def number(model, data, device):
    return 0.5

def raising():
    return {}["pretrained"]

def given(x, y):
    import torch
    return None, (torch.tensor(x), torch.tensor(y))

def array():
    import numpy as np, torch
    return None, (np.zeros((4, 64)), torch.zeros(4))
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
        (
            BASE + "finetune: {calibrate: {per: chanel}}\n",
            "line 7: finetune.calibrate.per: Input should be 'model', 'layer'",
        ),
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
    data = Path(os.environ.get("FMAQ_DATA") or path.parent / "../../../shared/data")
    if not (data / "cifar10-resnet").exists():
        pytest.skip("the CIFAR-10 sample is neither in FMAQ_DATA nor beside the repository")
    assert Recipe.load(path).name.startswith("resnet20")


def test_numbers_without_a_point_are_numbers(folder: Path) -> None:
    recipe = parse(folder, BASE.replace("{features: 64}", "{features: 64, classes: 1e1}") + "policy: {gain: 1e-3}\n")
    assert recipe.model.arguments == {"features": 64, "classes": 10.0} and recipe.load_policy().gain.array == 0.001


def with_data(folder: Path, x: list, y: list) -> Recipe:
    """A recipe whose test data are these, by a function of its own."""
    data = f"kind: callable\n  callable: model.py:given\n  arguments: {{x: {x}, y: {y}}}"
    return parse(folder, BASE.replace("kind: digits", data).replace("features: 64", "features: 3"))


def test_a_missing_file_names_the_variable_that_says_where_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("FMAQ_TEST_DATA", raising=False)
    text = BASE.replace("kind: digits", "kind: npz\n  test: ${FMAQ_TEST_DATA:-no/data}/sample/a.npz")
    expected = (
        "no/data/sample/a.npz does not exist; set the environment variable FMAQ_TEST_DATA, which is not set (its "
        "default here is no/data), to the folder that has sample/a.npz"
    )
    assert expected in complaint(folder, text)
    monkeypatch.setenv("FMAQ_TEST_DATA", "/elsewhere")
    assert "FMAQ_TEST_DATA, now /elsewhere, to the folder that has sample/a.npz" in complaint(folder, text)


@pytest.mark.parametrize("example", ["minilm", "smollm2"])
def test_an_example_that_is_not_fetched_says_how(example: str, tmp_path: Path) -> None:
    recipe = EXAMPLES / example / "12bit.yaml"
    text = recipe.read_text().replace("data.py:", f"{recipe.parent / 'data.py'}:")
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "copy.yaml").write_text(text)
    with pytest.raises(RecipeError, match="`make fetch` downloads it"):
        Recipe.load(tmp_path / "a" / "b" / "copy.yaml")


@pytest.mark.parametrize("example", ["resnet20/evaluate.yaml", "resnet20/finetune-12bit.yaml"])
def test_an_example_without_its_data_names_fmaq_data(example: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FMAQ_DATA", "/nowhere")
    with pytest.raises(RecipeError) as caught:
        Recipe.load(EXAMPLES / example)
    named = "set the environment variable FMAQ_DATA, now /nowhere, to the folder that has cifar10-"
    assert str(caught.value).count(named) >= 2  # the weights, and the images


def test_a_function_of_a_recipe_that_raises_is_named_with_its_key(folder: Path) -> None:
    model = parse(folder, BASE.replace("model.py:linear\n  arguments: {features: 64}", "model.py:raising"))
    with pytest.raises(ValueError, match=r"model.callable: .*model.py:raising raised KeyError: 'pretrained'"):
        build_model(model.model)
    data = parse(folder, BASE.replace("kind: digits", "kind: callable\n  callable: model.py:raising"))
    with pytest.raises(ValueError, match=r"data.callable: .*model.py:raising raised KeyError: 'pretrained'"):
        load_data(data.data)
    for task, message in (("broken_metric", "the task broken_metric raised TypeError"), ("number", "returned 0.5")):
        with pytest.raises((TypeError, ValueError), match=message):
            prepare(parse(folder, BASE + f"task: model.py:{task}\n")).measure(None)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        (
            [[1.0, 2.0]],
            [0],
            r"Sequential cannot take this batch of the data: float32 of shape \(1, 2\); Runtime",
        ),
        ([[1.0, 2.0, 3.0]], [10], r"the class 10 is not one of the model's 10, 0 to 9"),
        ([[1.0, 2.0, 3.0]], [-1], r"the class -1 is not one of the model's 10, 0 to 9"),
        ([[1, 2, 3]], [0], r"int64 of shape \(1, 3\) from 1 to 3"),
        ([[1.0, 2.0, 3.0]], [[0, 1, 0]], r"3 classes do not fit the model's outputs, \(1, 10\).*y.argmax\(1\)"),
        ([[1.0, 2.0, 3.0]], [-100], "no example has a class"),
    ],
)
def test_data_that_do_not_fit_the_model_are_described(folder: Path, x: list, y: list, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        prepare(with_data(folder, x, y)).measure(None)


@pytest.mark.parametrize(
    ("x", "y", "message"),
    [
        ([], [], "data: there are no test examples; .*model.py:given returned none"),
        ([[1.0, 2.0, 3.0]], [0.5], "data.callable: .*model.py:given: targets must be whole numbers, got 0.5"),
        ([[1.0, 2.0, 3.0]], [0, 1], "1 inputs but 2 targets"),
    ],
)
def test_data_that_are_none_are_refused(folder: Path, x: list, y: list, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        load_data(with_data(folder, x, y).data)


def test_arrays_are_no_tensors(folder: Path) -> None:
    recipe = parse(folder, BASE.replace("kind: digits", "kind: callable\n  callable: model.py:array"))
    with pytest.raises(RecipeError, match=r"inputs must be tensors, got a ndarray; torch\.as_tensor"):
        load_data(recipe.data)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"x": np.zeros((0, 3)), "y": np.zeros(0)}, r"there are no test examples; .*images.npz is empty"),
        ({"x": np.zeros((2, 3)), "y": np.array(["cat", "dog"])}, r"y in .*images.npz is an array of <U3; numbers"),
        ({"x": np.zeros((2, 3)), "y": np.array([0, 0.5])}, r"images.npz: targets must be whole numbers, got 0.5"),
        ({"x": np.zeros((2, 3)), "y": np.zeros(3)}, r"images.npz: 2 inputs but 3 targets"),
        ({"x": np.zeros((2, 3), complex), "y": np.zeros(2)}, r"x in .*images.npz is an array of complex128; numbers"),
    ],
)
def test_arrays_that_cannot_be_examples(folder: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(folder / "images.npz", **arrays)
    recipe = parse(folder, BASE.replace("kind: digits", "kind: npz\n  test: images.npz\n  layout: NC"))
    with pytest.raises(RecipeError, match=message):
        load_data(recipe.data)


def test_float64_arrays_and_those_of_another_byte_order_are_read(folder: Path) -> None:
    np.savez(folder / "images.npz", x=np.arange(6.0).reshape(2, 3).astype(">f8"), y=np.array([0.0, 1.0]))
    recipe = parse(folder, BASE.replace("kind: digits", "kind: npz\n  test: images.npz\n  layout: NC"))
    _, test = load_data(recipe.data)
    assert test.inputs.dtype == torch.float32 and test.inputs.tolist() == [[0, 1, 2], [3, 4, 5]]
    assert test.targets.tolist() == [0, 1]


@pytest.mark.parametrize(("fraction", "split"), [(1e-6, "test"), (1 - 1e-6, "training")])
def test_a_split_of_the_digits_that_leaves_one_side_empty(folder: Path, fraction: float, split: str) -> None:
    with pytest.raises(RecipeError, match=f"there are no {split} examples; test_fraction .* of 1,797 leaves none"):
        load_data(parse(folder, BASE + f"  test_fraction: {fraction}\n").data)


def keys_shown(cls: type[BaseModel], value: Any, found: dict[type[BaseModel], set[str]]) -> None:
    """Note the keys of a mapping in YAML, and of those inside, by the class that checks them."""
    found.setdefault(cls, set()).update(value)
    assert not set(value) - set(cls.model_fields), cls
    for name, inner in value.items():
        part = class_of(cls.model_fields[name].annotation, inner)
        for one in inner if isinstance(inner, list) else [inner]:
            if part is not None:
                keys_shown(part, one, found)


def class_of(annotation: Any, value: Any) -> type[BaseModel] | None:
    """Which class of recipes an annotation has for a value; that of its kind for data."""
    if isinstance(annotation, type):
        return annotation if issubclass(annotation, BaseModel) else None
    parts = [part for part in (class_of(inner, value) for inner in get_args(annotation)) if part is not None]
    if len(parts) > 1:
        parts = [part for part in parts if value["kind"] in get_args(part.model_fields["kind"].annotation)]
    return parts[0] if parts else None


def classes_of(cls: type[BaseModel]) -> set[type[BaseModel]]:
    """A class of recipes, and all inside it."""

    def inside(annotation: Any) -> set[type[BaseModel]]:
        if isinstance(annotation, type):
            return classes_of(annotation) if issubclass(annotation, BaseModel) else set()
        return set().union(*(inside(part) for part in get_args(annotation)))

    return {cls}.union(*(inside(field.annotation) for field in cls.model_fields.values()))


def test_the_docs_show_every_key_of_a_recipe_and_no_other() -> None:
    text = (EXAMPLES.parent / "docs" / "training.md").read_text(encoding="utf-8")
    found: dict[type[BaseModel], set[str]] = {}
    for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL):
        values = yaml.safe_load(block)
        for one in [{"data": data} for data in values] if isinstance(values, list) else [values]:
            keys_shown(Recipe, one, found)
    assert found[DigitsData] == set(DigitsData.model_fields)  # where those of every kind are shown, too
    for cls, shown in found.items():
        shown |= {"batch_size", "limit"} if "kind" in cls.model_fields else set()
    assert {cls: set(cls.model_fields) for cls in classes_of(Recipe)} == found


def test_the_experiments_text_shows_every_key() -> None:
    from fmaq.reproduce import experiment

    text = str(experiment.__doc__)
    own = {experiment.TrainingExperiment, experiment.CostExperiment, experiment.Block, experiment.Network}
    for cls in own:
        for name in cls.model_fields:
            assert re.search(rf"\b{name}\b(:|,)", text), name


def test_every_kind_of_data_is_known_to_the_errors() -> None:
    union, _ = get_args(DataRecipe)
    assert sorted(DATA_KINDS) == sorted(get_args(kind.model_fields["kind"].annotation)[0] for kind in get_args(union))
