"""PEFT's adapters in attached models: their products are met, and layers keep their names and rules."""

import copy
import warnings

import pytest
import torch
from torch import nn

from apart import ACCUMULATOR, Apart
from fmaq import Policy, attach, calibrate, coverage, detach, ops
from fmaq.emulation import FmaqCoverageWarning, listening, policy_of
from fmaq.emulation.layer_names import layer_names
from huggingface_cases import inputs, tiny

peft = pytest.importorskip("peft", reason="peft is not installed")

IDS = inputs("llama")["input_ids"]
TARGETS = ["q_proj", "v_proj", "down_proj"]
Q = "model.layers.0.self_attn.q_proj"


def adapted(model: nn.Module, kind: str = "Lora", **options) -> nn.Module:
    """The model with adapters that already do something."""
    torch.manual_seed(5)
    options = {"target_modules": TARGETS, "init_lora_weights": False, "r": 4, **options}
    if kind != "Lora":
        del options["init_lora_weights"]
    return peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**options)).eval()


def logits(model: nn.Module, **how) -> torch.Tensor:
    return model(input_ids=IDS, **how).logits.detach()


def small() -> nn.Module:
    return tiny("llama", num_hidden_layers=1)


@pytest.fixture(scope="module")
def calibrated() -> Policy:
    """Offsets and gains for the channels of every layer of the small Llama."""
    return calibrate(small(), "M7E4 product=M7E4 chunk=16", [{"input_ids": IDS}], per="channel")


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_lora_attached_before_or_after_is_what_numpy_computes(when, attention) -> None:
    with Apart():
        expected = logits(adapted(tiny("llama")))
    model = tiny("llama", attention)
    with warnings.catch_warnings():
        warnings.simplefilter("error", FmaqCoverageWarning)
        model = adapted(attach(model, ACCUMULATOR)) if when == "before" else attach(adapted(model), ACCUMULATOR)
        table = coverage(model, IDS)
        assert torch.equal(logits(model), expected)
    found = [row.layer for row in table if "lora" in row.layer]
    assert len(found) == 12 and found[:2] == [f"{Q}.lora_A.default", f"{Q}.lora_B.default"]
    assert all(row.covered for row in table if row.product == "linear")


ADAPTERS = {
    "LoRA": ("Lora", {}),
    "DoRA": ("Lora", {"use_dora": True}),
    "trained head": ("Lora", {"modules_to_save": ["lm_head"]}),
    "VeRA": ("Vera", {"target_modules": ["q_proj", "v_proj"], "init_weights": False}),
    "LoHa": ("LoHa", {"init_weights": False}),
    "IA3": ("IA3", {"feedforward_modules": ["down_proj"], "init_ia3_weights": False, "r": None}),
    "prefix": ("PrefixTuning", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 3, "r": None, "target_modules": None}),
}


@pytest.mark.parametrize("adapter", ADAPTERS)
def test_a_policy_of_the_plain_model_fits_the_adapted_one(adapter, calibrated) -> None:
    kind, options = ADAPTERS[adapter]
    dropped = [name for name, value in options.items() if value is None]
    model = attach(small(), calibrated)
    torch.manual_seed(5)
    config = {"target_modules": TARGETS, **({"init_lora_weights": False} if kind == "Lora" else {}), "r": 4, **options}
    config = {name: value for name, value in config.items() if name not in dropped}
    model = peft.get_peft_model(model, getattr(peft, f"{kind}Config")(**config)).eval()
    before, after = [], []
    with listening(before.append):
        expected = logits(model)
    attach(model, calibrated)
    with listening(after.append):
        assert torch.equal(logits(model), expected)
    assert [(p.layer, p.kind, p.index, p.rule) for p in before] == [(p.layer, p.kind, p.index, p.rule) for p in after]
    own = [p for p in after if p.layer in calibrated.layers and p.reason is None]
    assert {p.layer for p in own} == set(calibrated.layers)
    assert all(p.rule.offset is not None or p.rule.gain is not None for p in own)
    added = [p for p in after if p.layer not in calibrated.layers and p.reason is None]
    assert all(p.layer.startswith(f"{Q[:13]}") and p.rule.offset is p.rule.gain is None for p in added)
    assert bool(added) == (adapter not in ("IA3", "prefix"))


def test_what_lora_adds_inherits_all_but_what_is_the_layers_own() -> None:
    """The accumulator and the formats, but neither offsets nor static ranges."""
    own = {"accumulator": "M5E4b10 product=M5E4b12", "weight": "M4E3", "offset": 1, "gain": 1.5, "b_max": 2.0}
    policy = Policy(accumulator=ACCUMULATOR, layers={Q: own})
    for model in (adapted(attach(tiny("llama"), policy)), attach(adapted(tiny("llama")), policy)):
        seen: dict = {}
        with listening(lambda p, seen=seen: seen.setdefault(p.layer, p)):
            logits(model)
        layer, down, up = seen[Q], seen[f"{Q}.lora_A.default"], seen[f"{Q}.lora_B.default"]
        assert layer.rule.gain is not None and layer.rule.b_max is not None and layer.formats == (None, "M4E3")
        assert down.rule == Policy(accumulator=own["accumulator"], weight="M4E3").for_layer("") == up.rule
        assert down.formats == (None, "M4E3") and down.reason is None
        weight = model.get_submodule(f"base_model.model.{Q}").lora_A["default"].weight
        expected = ops.linear(down.operands[0], ops.quantize(weight, "M4E3"), None, own["accumulator"])
        assert torch.equal(up.operands[0], expected)


def test_what_lora_adds_may_have_rules_of_its_own() -> None:
    model = attach(adapted(tiny("llama")), Policy(accumulator=ACCUMULATOR, layers={"*.lora_?.*": None}))
    table = coverage(model, IDS)
    assert {row.layer for row in table if row.reason == "left alone by the policy"} == {
        f"model.layers.{i}.{layer}.lora_{matrix}.default"
        for i in range(2)
        for layer in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
        for matrix in "AB"
    }


@pytest.mark.parametrize("key", [Q, f"base_model.model.{Q}", f"base_model.model.{Q}.base_layer"])
def test_an_entry_may_have_the_layers_name_or_that_of_its_module(key) -> None:
    model = attach(adapted(tiny("llama")), Policy(accumulator=ACCUMULATOR, layers={key: {"gain": 2.0}}))
    seen: dict = {}
    with listening(lambda p: seen.setdefault(p.layer, p)):
        logits(model)
    assert seen[Q].rule.gain is not None and seen[f"{Q}.lora_A.default"].rule.gain is None
    with pytest.raises(ValueError, match=rf"did you mean '{Q}'"):
        attach(model, Policy(layers={Q.replace("q_proj", "q_prj"): None}))


def test_the_names_of_an_adapted_models_layers() -> None:
    model = adapted(tiny("llama"), modules_to_save=["lm_head"])
    names = {path: layer_names(model)[module] for path, module in model.named_modules()}
    root = "base_model.model."
    assert [names[path][0] for path in ("", "base_model", root[:-1])] == ["", "", ""]
    assert names[f"{root}{Q}"] == [f"{Q}.adapter", f"{root}{Q}.adapter"]
    assert names[f"{root}{Q}.base_layer"] == [Q, f"{root}{Q}", f"{root}{Q}.base_layer"]
    assert names[f"{root}lm_head.original_module"][0] == names[f"{root}lm_head.modules_to_save.default"][0] == "lm_head"
    wrapped = nn.ModuleDict({"inner": model})
    assert layer_names(wrapped)[model.get_submodule(f"{root}{Q}.base_layer")][0] == f"inner.{Q}"
    plain = tiny("llama")
    assert {m: [path] for path, m in plain.named_modules()} == layer_names(plain)


def test_calibrating_an_adapted_model_names_its_layers_so() -> None:
    model = adapted(small(), target_modules=["q_proj"], init_lora_weights=True)
    policy = calibrate(model, "M7E4 product=M7E4 chunk=16", [{"input_ids": IDS}], per="channel")
    assert {Q, f"{Q}.lora_A.default", f"{Q}.lora_B.default", "lm_head"} <= set(policy.layers)
    assert not any(key.startswith("base_model") for key in policy.layers)
    expected = logits(attach(model, policy))
    without = Policy.parse(
        {**policy.to_mapping(), "layers": {k: v for k, v in policy.layers.items() if "lora" not in k}}
    )
    assert torch.equal(logits(attach(model.merge_and_unload(), without)), expected)  # the second matrix is zero yet


@pytest.mark.parametrize("when", ["before", "after"])
def test_merging_and_unmerging_are_torchs_own_also_in_a_forward(when) -> None:
    """PEFT unmerges in the forward that finds adapters disabled."""

    def run(model: nn.Module) -> list[dict[str, torch.Tensor]]:
        model.merge_adapter()
        merged = copy.deepcopy(model.state_dict())
        with model.disable_adapter():
            logits(model)
        return [merged, model.state_dict()]

    expected = run(adapted(tiny("llama")))
    model = tiny("llama")
    found = run(adapted(attach(model, ACCUMULATOR)) if when == "before" else attach(adapted(model), ACCUMULATOR))
    assert all(torch.equal(a[name], b[name]) for a, b in zip(expected, found, strict=True) for name in a)


def test_merged_adapters_are_weights_of_the_layer(calibrated) -> None:
    model = attach(adapted(small()), calibrated)
    merged = copy.deepcopy(model).merge_and_unload()
    assert type(merged) is type(small()) and policy_of(merged) == calibrated
    plain = small()
    plain.load_state_dict(merged.state_dict())
    expected = logits(attach(plain, calibrated))
    assert torch.equal(logits(merged), expected)
    assert torch.equal(logits(attach(merged, calibrated)), expected)
    assert torch.equal(logits(detach(merged)), logits(detach(plain)))


def test_several_adapters_and_adapters_by_example() -> None:
    model = adapted(attach(tiny("llama"), ACCUMULATOR))
    first = logits(model)
    model.add_adapter("other", peft.LoraConfig(target_modules=TARGETS, r=2, init_lora_weights=False))
    model.set_adapter("other")
    second = logits(model)
    assert not torch.equal(first, second)
    mixed = logits(model, adapter_names=["default", "other"])
    assert torch.equal(mixed, torch.stack([first[0], second[1]]))
    attach(model, ACCUMULATOR)
    assert torch.equal(logits(model), second)


def test_adapters_of_transformers_own_integration(calibrated) -> None:
    model = attach(small(), calibrated)
    torch.manual_seed(5)
    model.add_adapter(peft.LoraConfig(target_modules=TARGETS, r=4, init_lora_weights=False))
    expected = logits(adapted(attach(small(), calibrated)))
    assert torch.equal(logits(model), expected)
    assert torch.equal(logits(attach(model, calibrated)), expected)


@pytest.mark.parametrize("when", ["before", "after"])
def test_gradients_reach_lora_alone_and_are_the_same_with_checkpointing(when) -> None:
    model = tiny("llama").train()
    model = adapted(attach(model, ACCUMULATOR)) if when == "before" else attach(adapted(model), ACCUMULATOR)
    model.train().enable_input_require_grads()

    def gradients() -> dict[str, torch.Tensor]:
        model.zero_grad()
        model(**inputs("llama")).loss.backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    expected = gradients()
    assert len(expected) == 12 and all("lora" in name for name in expected)
    for reentrant in (True, False):
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = gradients()
        assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


def test_noise_is_of_the_layer_with_adapters_or_without() -> None:
    """A seed is made of the layer's name."""
    policy = Policy(accumulator="M5E4b10 rounding=stochastic random_bits=8")
    model = adapted(attach(tiny("llama"), policy))
    expected = logits(model)
    assert torch.equal(logits(attach(model, policy)), expected)
