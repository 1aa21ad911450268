"""The recipes for the hub's ResNets and BERT: the real networks with random weights, on a few images and questions."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fmaq
from fmaq.recipes.data import load_data
from fmaq.recipes.explain import RecipeError
from fmaq.recipes.images import Images
from fmaq.recipes.models import build_model
from fmaq.recipes.recipe import Recipe
from fmaq.recipes.run import run_evaluate, run_finetune
from fmaq.training.spans import Spans, f1

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
Image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
RESNETS = {
    "resnet18": {"hidden_sizes": [64, 128, 256, 512], "depths": [2, 2, 2, 2], "layer_type": "basic"},
    "resnet50": {},  # the defaults
}
SHORT = {
    "finetune.without_underflow": {"epochs": 1, "learning_rate": 1e-4},
    "finetune.with_underflow": {"epochs": 1, "learning_rate": 1e-4},
    "finetune.accumulation": 1,
}
MEAN, STD = np.array([0.485, 0.456, 0.406]), np.array([0.229, 0.224, 0.225])


@pytest.fixture
def imagenet(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An image of each of three classes for training, and as many to test on, of several sizes and kinds."""
    draw = np.random.default_rng(0)
    for split in ("train", "val"):
        for number, synset in enumerate(("n03", "n01", "n02")):
            (tmp_path / split / synset).mkdir(parents=True)
            pixels = draw.integers(0, 256, (70 + 9 * number, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(tmp_path / split / synset / ("a.JPEG", "b.png", "c.jpg")[number])
    monkeypatch.setenv("IMAGENET", str(tmp_path))
    return tmp_path


def images_apart(folder: Path, resize: int, crop: int) -> list[tuple[torch.Tensor, int]]:
    """Each image as the network takes it, and its class, without fmaq."""
    found = []
    for label, synset in enumerate(sorted(path.name for path in folder.iterdir())):
        for path in sorted((folder / synset).iterdir()):
            image = Image.open(path).convert("RGB")
            width, height = (round(side * resize / min(image.size)) for side in image.size)
            pixels = np.asarray(image.resize((width, height), Image.Resampling.BILINEAR))
            top, left = (height - crop) // 2, (width - crop) // 2
            pixels = (pixels[top : top + crop, left : left + crop] / 255 - MEAN) / STD
            found.append((torch.from_numpy(pixels).float().permute(2, 0, 1), label))
    return found


def accuracy_and_loss(model: nn.Module, images: list[tuple[torch.Tensor, int]]) -> tuple[float, float]:
    model.eval()
    with torch.no_grad():
        logits = model(torch.stack([image for image, _ in images])).logits
    labels = torch.tensor([label for _, label in images])
    return float((logits.argmax(1) == labels).float().mean()), float(nn.functional.cross_entropy(logits, labels))


@pytest.mark.parametrize("name", RESNETS)
def test_a_resnet_is_measured_and_tuned_as_plain_torch_does_it(name: str, imagenet: Path) -> None:
    torch.manual_seed(0)
    config = transformers.ResNetConfig(num_labels=3, **RESNETS[name])
    transformers.ResNetForImageClassification(config).save_pretrained(imagenet / "network")
    changes: dict[str, Any] = {"model.transformers": str(imagenet / "network"), "data.resize": 40, "data.crop": 32}
    stages = {} if name == "resnet18" else {"finetune.without_underflow": None}  # for time
    recipe = Recipe.load(EXAMPLES / "imagenet" / f"{name}.yaml", changes | SHORT | stages)
    policy, apart = recipe.load_policy(), images_apart(imagenet / "val", 40, 32)
    model = transformers.AutoModelForImageClassification.from_pretrained(imagenet / "network").eval()
    size = {"resnet18": 11, "resnet50": 23}[name]  # millions of weights, all but the 1,000 classes' of the hub's
    assert sum(p.numel() for p in model.parameters()) // 10**6 == size

    measured = run_evaluate(recipe, imagenet / "measured", say=lambda _: None)
    found = [measured.baseline, *measured.rows]
    for row, under in zip(found, (None, policy, policy.replace(accumulator="fp32")), strict=True):
        if under is not None:
            fmaq.attach(model, under)
        assert (row.metrics["accuracy"], row.metrics["loss"]) == pytest.approx(accuracy_and_loss(model, apart), 1e-5)
        fmaq.detach(model)
    assert len({row.metrics["loss"] for row in found}) == 3

    tuned = run_finetune(recipe, imagenet / "tuned", say=lambda _: None).rows[0]
    assert tuned.metrics == measured.rows[0].metrics
    assert tuned.tuned is not None
    assert [stage["stage"]["underflow"] for stage in tuned.tuned["stages"]] == [False, True][len(stages) :]
    model.load_state_dict(load_file(imagenet / "tuned" / "model.safetensors"))
    fmaq.attach(model, policy)
    last = tuned.tuned["stages"][-1]["metrics"]
    assert (last["accuracy"], last["loss"]) == pytest.approx(accuracy_and_loss(model, apart), 1e-5)
    assert last["loss"] != tuned.metrics["loss"]


TEXT = "the river rises in the hills and it meets the sea at the old town"
QUESTIONS = (
    ("where does the river rise ?", "the hills"),
    ("what does it meet ?", "the sea"),
    ("where ?", "the old town"),
)


@pytest.fixture
def bert(tmp_path: Path) -> Path:
    """BERT-base but for its depth and its vocabulary, with random weights."""
    folder = tmp_path / "bert"
    folder.mkdir()
    words = sorted({word for text in (TEXT, *(q for q, _ in QUESTIONS)) for word in text.split()})
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n")
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(tokenizer), num_hidden_layers=2)
    transformers.BertForQuestionAnswering(config).save_pretrained(folder)
    return folder


def official(path: Path) -> Path:
    """SQuAD's form of the questions."""
    asked = [
        {"id": str(n), "question": question, "answers": [{"text": answer, "answer_start": TEXT.index(answer)}]}
        for n, (question, answer) in enumerate(QUESTIONS)
    ]
    path.write_text(json.dumps({"version": "1.1", "data": [{"paragraphs": [{"context": TEXT, "qas": asked}]}]}))
    return path


def tables(path: Path) -> Path:
    """The hub's form of the same questions."""
    rows = [
        {"question": q, "context": TEXT, "answers": {"text": [a], "answer_start": [TEXT.index(a)]}}
        for q, a in QUESTIONS
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def spans_apart(model: nn.Module, tokenizer: Any) -> tuple[float, float]:
    """The mean F1 of the best spans of at most 30 tokens, and the mean loss of their ends."""
    asked, overlap, losses = [question for question, _ in QUESTIONS], 0.0, []
    made = tokenizer(asked, [TEXT] * 3, padding=True, return_offsets_mapping=True, return_tensors="pt")
    places = made.pop("offset_mapping").tolist()
    with torch.no_grad():
        output = model(**made)
    for row, (_, answer) in enumerate(QUESTIONS):
        offsets, inside = places[row], [n for n, part in enumerate(made.sequence_ids(row)) if part == 1]
        starts, ends = output.start_logits[row], output.end_logits[row]
        pairs = [(i, j) for i in inside for j in inside if i <= j < i + 30]
        first, last = max(pairs, key=lambda pair: float(starts[pair[0]] + ends[pair[1]]))
        overlap += f1(TEXT[offsets[first][0] : offsets[last][1]], answer)
        begin = TEXT.index(answer)
        for scores, side, place in ((starts, 0, begin), (ends, 1, begin + len(answer))):
            token = next(n for n in inside if offsets[n][side] == place)
            losses.append(float(nn.functional.cross_entropy(scores[None], torch.tensor([token]))))
    return overlap / len(QUESTIONS), sum(losses) / len(losses)


def test_bert_is_measured_and_tuned_on_questions_as_plain_torch_does_it(bert: Path, tmp_path: Path) -> None:
    file = str(official(tmp_path / "train-v1.1.json"))
    data = {"kind": "squad", "train": file, "test": file, "max_length": 384, "stride": 128, "batch_size": 32}
    changes: dict[str, Any] = {"model.transformers": str(bert), "data": data, "finetune.without_underflow": None}
    recipe = Recipe.load(EXAMPLES / "squad" / "bert-base.yaml", SHORT | changes)
    model, tokenizer = build_model(recipe.model, recipe.task)
    assert type(model).__name__ == "BertForQuestionAnswering" and model.config.hidden_size == 768

    record = run_finetune(recipe, tmp_path / "tuned", say=lambda _: None)
    row = record.rows[0]
    assert row.tuned is not None
    last = row.tuned["stages"][-1]["metrics"]
    for metrics, under in ((record.baseline.metrics, None), (row.metrics, recipe.load_policy()), (last, "tuned")):
        if under == "tuned":
            model.load_state_dict(load_file(tmp_path / "tuned" / "model.safetensors"))
        elif under is not None:
            fmaq.attach(model, under)
        assert (metrics["f1"], metrics["loss"]) == pytest.approx(spans_apart(model, tokenizer), 1e-4)
    assert len({record.baseline.metrics["loss"], row.metrics["loss"], last["loss"]}) == 3


def test_the_hubs_tables_of_questions_are_the_official_files(
    bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    file, table = official(tmp_path / "dev-v1.1.json"), str(tables(tmp_path / "dev.jsonl"))
    path, asked, load = EXAMPLES / "squad" / "bert-base.yaml", [], datasets.load_dataset

    def local(name: str, config: str | None, data_files: Any, split: str) -> Any:
        asked.append((name, split))
        return load("json", data_files={split: table}, split=split, cache_dir=str(tmp_path / "cache"))

    monkeypatch.setattr(datasets, "load_dataset", local)
    recipe = Recipe.load(path, {"model.transformers": str(bert)})
    _, tokenizer = build_model(recipe.model, recipe.task)
    train, test = load_data(recipe.data, recipe.task, tokenizer)
    assert asked == [("rajpurkar/squad", "train"), ("rajpurkar/squad", "validation")]
    official_form = {"data": {"kind": "squad", "test": str(file)}, "model.transformers": str(bert)}
    _, expected = load_data(Recipe.load(path, official_form).data, recipe.task, tokenizer)
    assert isinstance(test, Spans) and len(test) == 3
    assert train.digest() == test.digest() == expected.digest()


@pytest.mark.parametrize(
    ("path", "head", "name"),
    [
        ("imagenet/resnet18.yaml", "AutoModelForImageClassification", "microsoft/resnet-18"),
        ("imagenet/resnet50.yaml", "AutoModelForImageClassification", "microsoft/resnet-50"),
        ("squad/bert-base.yaml", "AutoModelForQuestionAnswering", "google-bert/bert-base-uncased"),
    ],
)
def test_the_hubs_names_are_left_to_transformers(
    path: str, head: str, name: str, imagenet: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def loaded(source: str, **options: Any) -> nn.Module:
        asked.append(source)
        return nn.Linear(1, 1)

    monkeypatch.setattr(getattr(transformers, head), "from_pretrained", loaded)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", loaded)
    recipe = Recipe.load(EXAMPLES / path)
    build_model(recipe.model, recipe.task)
    assert asked == [name, name]


def test_imagenet_has_to_be_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("IMAGENET", raising=False)
    with pytest.raises(RecipeError, match="IMAGENET is not set"):
        Recipe.load(EXAMPLES / "imagenet" / "resnet18.yaml")


def test_there_are_images_of_the_test(imagenet: Path) -> None:
    _, test = load_data(Recipe.load(EXAMPLES / "imagenet" / "resnet50.yaml").data)
    assert isinstance(test, Images) and test.batch(torch.tensor([2, 0]))[0].shape == (2, 3, 224, 224)
