"""save_pretrained of an attached model keeps the policy beside the weights; one call restores both."""

import copy
import gc
import io
import json
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

import fmaq
from apart import ACCUMULATOR
from fmaq import Policy, attach, calibrate, detach, from_pretrained
from fmaq.emulation import policy_of
from huggingface_cases import inputs, tiny, transformers

peft = pytest.importorskip("peft", reason="peft is not installed")

GPT2 = transformers.GPT2LMHeadModel
IDS = inputs("gpt2")["input_ids"]
FILE = "fmaq-policy.yaml"


@pytest.fixture(scope="module")
def calibrated() -> Policy:
    """With a number for every channel of every layer: more than a YAML file shows."""
    formats = {"accumulator": "M7E4 product=M7E4 chunk=16", "weight": "M4E3", "activation": "M4E3"}
    batches = [{"input_ids": IDS}]
    return calibrate(model(), formats, batches, per="channel", ranges="static")


def model() -> nn.Module:
    return tiny("gpt2", "sdpa", n_layer=1)


def logits(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(IDS).logits


def files(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


@pytest.mark.parametrize("shards", ["50GB", "10KB"])
def test_one_call_restores_weights_and_policy(tmp_path, calibrated, shards) -> None:
    saved = attach(model(), calibrated)
    saved.save_pretrained(tmp_path, max_shard_size=shards)
    assert ("model.safetensors.index.json" in files(tmp_path)) == (shards == "10KB")
    vectors = files(tmp_path) - {name for name in files(tmp_path) if not name.startswith("fmaq-policy.")} - {FILE}
    assert len(vectors) == 1 and FILE in files(tmp_path)
    restored = from_pretrained(transformers.AutoModelForCausalLM, tmp_path)
    assert type(restored) is GPT2 and policy_of(restored) == calibrated == Policy.load(tmp_path)
    assert torch.equal(logits(restored), logits(saved))
    assert torch.equal(logits(attach(GPT2.from_pretrained(tmp_path), Policy.load(tmp_path))), logits(saved))
    plain = GPT2.from_pretrained(tmp_path)
    assert policy_of(plain) is None and torch.equal(logits(plain), logits(detach(saved)))
    config = json.loads((tmp_path / "config.json").read_text())
    assert not any("fmaq" in key for key in config)


def test_a_model_in_bfloat16_is_restored_in_it(tmp_path) -> None:
    saved = attach(model().bfloat16(), ACCUMULATOR)
    saved.save_pretrained(tmp_path)
    restored = from_pretrained(GPT2, str(tmp_path), dtype="auto")
    assert restored.dtype == torch.bfloat16 and torch.equal(logits(restored), logits(saved))


def test_saving_again_leaves_no_vectors_behind(tmp_path, calibrated) -> None:
    saved = attach(model(), calibrated)
    saved.save_pretrained(tmp_path)
    first = files(tmp_path)
    attach(saved, calibrated.replace(estimator="immediate/diff")).save_pretrained(tmp_path)
    assert files(tmp_path) == first  # the same vectors
    attach(saved, ACCUMULATOR).save_pretrained(save_directory=tmp_path)
    assert {name for name in files(tmp_path) if "fmaq" in name} == {FILE}
    assert str(Policy.load(tmp_path).accumulator) == str(fmaq.Accumulator(ACCUMULATOR))


def test_the_model_stays_what_it_is(tmp_path) -> None:
    plain = model()
    before, config = set(vars(plain)), copy.deepcopy(plain.config)
    own = attach(plain, ACCUMULATOR).save_pretrained
    assert type(plain) is GPT2 and own.__doc__ == GPT2.save_pretrained.__doc__
    assert plain.config.to_dict() == config.to_dict()
    assert "save_pretrained" not in vars(plain.transformer) and "save_pretrained" not in vars(
        attach(nn.Linear(2, 2), {})
    )
    detach(plain)
    assert set(vars(plain)) == before
    plain.save_pretrained(tmp_path)
    assert FILE not in files(tmp_path)


def test_copies_and_pickles_save_themselves(tmp_path) -> None:
    original = attach(model(), ACCUMULATOR)
    file = io.BytesIO()
    torch.save(original, file)
    file.seek(0)
    for number, other in enumerate((copy.deepcopy(original), torch.load(file, weights_only=False))):
        with torch.no_grad():
            other.lm_head.weight.mul_(1 + number)
            other.transformer.ln_f.bias.add_(number + 1)
        other.save_pretrained(tmp_path / str(number))
        assert torch.equal(logits(from_pretrained(GPT2, tmp_path / str(number))), logits(other))
        assert not torch.equal(logits(original), logits(other))


def test_attaching_keeps_no_model_alive() -> None:
    gc.disable()
    try:
        kept = attach(model(), ACCUMULATOR)
        own, reference = kept.save_pretrained, weakref.ref(kept)
        del kept
        assert reference() is None
    finally:
        gc.enable()
    with pytest.raises(ReferenceError, match="does not exist any more"):
        own("folder")


def test_a_model_of_a_hub_mixin_saves_its_policy(tmp_path) -> None:
    hub = pytest.importorskip("huggingface_hub")

    class Net(nn.Module, hub.PyTorchModelHubMixin):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.fc = nn.Linear(width, 3)

        def forward(self, x):
            return self.fc(x)

    net, x = attach(Net(8), ACCUMULATOR), torch.randn(2, 8)
    net.save_pretrained(tmp_path)
    assert torch.equal(from_pretrained(Net, tmp_path)(x), net(x))


def test_a_trainers_checkpoints_have_the_policy(tmp_path) -> None:
    saved = attach(model(), ACCUMULATOR)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=2, save_steps=1, per_device_train_batch_size=1, report_to="none", use_cpu=True,
        disable_tqdm=True,
    )  # fmt: skip
    transformers.Trainer(saved, arguments, train_dataset=data).train()
    assert torch.equal(logits(from_pretrained(GPT2, tmp_path / "checkpoint-2")), logits(saved.eval()))
    assert FILE in files(tmp_path / "checkpoint-1")


def test_a_repository_of_the_hub_is_restored_from_its_cache(tmp_path, calibrated, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    saved = attach(model(), calibrated)
    repository = tmp_path / "models--someone--net"
    saved.save_pretrained(repository / "snapshots" / ("0" * 40))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0" * 40)
    where = {"cache_dir": tmp_path, "local_files_only": True}
    restored = from_pretrained(transformers.AutoModelForCausalLM, "someone/net", **where)
    assert torch.equal(logits(restored), logits(saved))
    with pytest.raises(FileNotFoundError):
        from_pretrained(GPT2, "someone/other", **where)


def test_uploading_while_saving_is_refused(tmp_path) -> None:
    saved = attach(model(), ACCUMULATOR)
    with pytest.raises(ValueError, match=r"call model\.push_to_hub\(name\)"):
        saved.save_pretrained(tmp_path, push_to_hub=True)
    assert not files(tmp_path)


def test_what_push_to_hub_uploads_has_the_policy(tmp_path, monkeypatch, calibrated) -> None:
    """It saves to a folder of its own, and uploads that."""
    saved, uploaded = attach(model(), calibrated), []
    monkeypatch.setattr("transformers.utils.hub.hf_api", lambda: Api())
    monkeypatch.setattr("transformers.utils.hub.create_and_tag_model_card", lambda *_, **__: Card())

    class Api:
        def create_repo(self, name, **_):
            return self

        repo_id = "someone/net"

    class Card:
        def save(self, path):
            Path(path).touch()

    monkeypatch.setattr(
        GPT2, "_upload_modified_files", lambda self, folder, *_, **__: uploaded.extend(files(Path(folder)))
    )
    saved.push_to_hub("net")
    assert FILE in uploaded and sum("fmaq-policy" in name for name in uploaded) == 2


def test_another_process_than_the_main_one_saves_nothing(tmp_path) -> None:
    saved = attach(model(), ACCUMULATOR)
    saved.save_pretrained(tmp_path, is_main_process=False)
    assert FILE not in files(tmp_path)


def test_a_folder_without_a_policy_says_so(tmp_path) -> None:
    model().save_pretrained(tmp_path)
    with pytest.raises(
        FileNotFoundError, match=rf"{tmp_path} has no fmaq-policy\.yaml, .* fmaq\.attach\(model, policy\)"
    ):
        from_pretrained(GPT2, tmp_path)
    with pytest.raises(FileNotFoundError, match=r"fmaq-policy\.yaml"):
        Policy.load(tmp_path)


def test_a_policy_of_another_model_is_refused_before_anything_runs(tmp_path, calibrated) -> None:
    saved = attach(model(), Policy(accumulator=ACCUMULATOR, layers={"lm_head": None}))
    saved.save_pretrained(tmp_path)
    Policy(accumulator=ACCUMULATOR, layers={"lm_haed": None}).save(tmp_path / FILE)
    message = rf"{FILE} does not fit GPT2LMHeadModel: layers: 'lm_haed' matches no module .* did you mean 'lm_head'\?"
    with pytest.raises(ValueError, match=message):
        from_pretrained(GPT2, tmp_path)
    calibrated.save(tmp_path / FILE)
    vectors = next(tmp_path.glob("fmaq-policy.*.safetensors"))
    vectors.write_bytes(vectors.read_bytes()[:-1] + b"!")
    with pytest.raises(ValueError, match="not what was saved with this policy"):
        from_pretrained(GPT2, tmp_path)
    vectors.unlink()
    with pytest.raises(ValueError, match="it belongs beside this file"):
        from_pretrained(GPT2, tmp_path)


def test_what_could_not_be_restored_is_not_saved_and_said(tmp_path, calibrated) -> None:
    saved = attach(model(), calibrated)
    saved.save_pretrained(tmp_path)
    attach(saved.transformer, "paper12")
    with pytest.warns(
        UserWarning, match="has the weights, but no policy: transformer was attached to a policy of its own"
    ):
        saved.save_pretrained(tmp_path)
    assert "model.safetensors" in files(tmp_path) and not any("fmaq" in name for name in files(tmp_path))
    attach(saved, Policy(accumulator=ACCUMULATOR, layers={"lm_head": None}))
    assert "save_pretrained" not in vars(saved.transformer)
    saved.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(GPT2, tmp_path)), logits(saved))


TARGETS = peft.LoraConfig(target_modules=["q_proj", "v_proj"], r=2, init_lora_weights=False)


def test_adapters_and_their_policy_are_one_folder(tmp_path) -> None:
    rules = {"model.layers.0.self_attn.q_proj": {"gain": 1.5}, "*.lora_?.*": {"accumulator": "M10E5b16"}}
    tiny("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    adapted = attach(peft.get_peft_model(base, TARGETS), Policy(accumulator=ACCUMULATOR, layers=rules))
    adapted.save_pretrained(tmp_path / "adapter")
    assert {"adapter_model.safetensors", FILE} <= files(tmp_path / "adapter")
    restored = from_pretrained(peft.AutoPeftModelForCausalLM, tmp_path / "adapter")
    assert torch.equal(logits(restored), logits(adapted.eval()))
    again = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base"), tmp_path / "adapter"
    )
    assert torch.equal(logits(attach(again, Policy.load(tmp_path / "adapter"))), logits(adapted))


def test_a_model_into_which_adapters_were_merged_saves_its_policy(tmp_path) -> None:
    policy = Policy(accumulator=ACCUMULATOR, layers={"model.layers.0.self_attn.q_proj": {"gain": 1.5}})
    merged = attach(peft.get_peft_model(tiny("llama"), TARGETS), policy).merge_and_unload()
    merged.save_pretrained(tmp_path)
    assert torch.equal(logits(from_pretrained(transformers.LlamaForCausalLM, tmp_path)), logits(merged))
    of_adapters = Policy(accumulator=ACCUMULATOR, layers={"*.lora_?.*": None})
    merged = attach(peft.get_peft_model(tiny("llama"), TARGETS), of_adapters).merge_and_unload()
    with pytest.warns(UserWarning, match=r"but no policy: layers: '\*\.lora_\?\.\*' matches no module"):
        merged.save_pretrained(tmp_path)
    assert FILE not in files(tmp_path)
