"""Policies: parsing, printing, choosing a layer's rule, and what a wrong one says."""

import copy
import json
import os
import pickle

import pytest
import torch

from fmaq.emulation import Policy, Rule
from fmaq.emulation.handlers import ATEN, NOT_COVERED
from fmaq.emulation.recurrent import STEPS
from fmaq.emulation.rule import KINDS, RECURRENT_KINDS
from fmaq.numerics import Accumulator

PAPER = Accumulator.paper12
OTHER = Accumulator("M5E4b9", product="M5E4b11", chunk=8)


def test_defaults_are_torchs_own_product() -> None:
    assert Policy() == Policy(accumulator="fp32", weight=None, activation=None, estimator="identity", layers={})
    rule = Policy().for_layer("anything")
    assert rule == Rule() and rule.is_plain


def test_accumulator_takes_all_that_parse_takes() -> None:
    for given in (PAPER, "paper12", str(PAPER), PAPER.to_mapping()):
        assert Policy(accumulator=given).accumulator == PAPER
    assert Policy(accumulator="FP32").accumulator == "fp32"


def test_mapping_round_trips() -> None:
    policy = Policy(
        accumulator=PAPER,
        weight="M4E3",
        activation="int8",
        estimator="recursive/diff",
        layers={
            "conv1": None,
            "classifier.*": {"accumulator": OTHER, "weight": None},
            "*.query": {"accumulator": "fp32"},
        },
    )
    mapping = policy.to_mapping()
    assert mapping == {
        "accumulator": str(PAPER),
        "weight": "M4E3",
        "activation": "int8",
        "estimator": "recursive/diff",
        "layers": {
            "conv1": None,
            "classifier.*": {"accumulator": str(OTHER), "weight": None},
            "*.query": {"accumulator": "fp32"},
        },
    }
    assert Policy.parse(mapping) == policy
    assert Policy.parse(policy) is policy
    assert pickle.loads(pickle.dumps(policy)) == policy
    assert hash(Policy.parse(mapping)) == hash(policy)
    assert Policy().to_mapping() == {}


def test_file_round_trips_and_nothing_is_left_beside(tmp_path) -> None:
    policy = Policy(accumulator=PAPER, weight="M4E3", layers={"conv1": None, "fc": {"activation": "M4E3b5"}})
    path = tmp_path / "policy.yaml"
    policy.save(path)
    assert Policy.load(path) == policy
    assert [p.name for p in tmp_path.iterdir()] == ["policy.yaml"]


def test_vectors_that_another_file_names_stay(tmp_path) -> None:
    first, second = (Policy("paper12", gain=[value] * 40) for value in (1.5, 2.5))
    first.save(tmp_path / "p.yaml")
    first.save(tmp_path / "p.yml")
    (tmp_path / "best.yaml").write_bytes((tmp_path / "p.yaml").read_bytes())
    second.save(tmp_path / "p.yaml")
    assert Policy.load(tmp_path / "p.yml") == Policy.load(tmp_path / "best.yaml") == first
    (tmp_path / "best.yaml").unlink()
    second.save(tmp_path / "p.yml")
    assert Policy.load(tmp_path / "p.yml") == Policy.load(tmp_path / "p.yaml") == second
    assert len(list(tmp_path.glob("*.safetensors"))) == 1


def test_files_have_the_usual_permissions(tmp_path) -> None:
    (tmp_path / "usual").touch()
    Policy("paper12", gain=[1.5] * 40).save(tmp_path / "p.yaml")
    assert {path.stat().st_mode for path in tmp_path.iterdir()} == {(tmp_path / "usual").stat().st_mode}


def test_a_folder_in_place_of_a_file_is_refused(tmp_path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; give the name of a file in it"):
        Policy("paper12", gain=[1.5] * 40).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("offset", [2**40 + 3, 500, [0, -127]])
def test_offsets_that_no_product_could_have_are_refused(offset) -> None:
    with pytest.raises(ValueError, match="offset: every integer must be from -126 to 126"):
        Policy("paper12", offset=offset)


def test_gains_in_half_precision() -> None:
    assert Policy("paper12", gain=torch.tensor([1.5, 0.25]).bfloat16()) == Policy("paper12", gain=[1.5, 0.25])


def test_offsets_gains_and_shifts_are_those_of_the_matched_module_alone() -> None:
    entry = {"offset": [1, 2], "gain": 1.5, "products": {0: {"shift": [0.5, 1.0]}}}
    policy = Policy("paper12", layers={"block": entry, "x.*": {"offset": [1, 2]}})
    own, inside = policy.for_layer("block"), policy.for_layer("block.fc")
    assert own.offset is not None and own.products[0]["shift"] is not None
    assert inside.offset is None and inside.gain is None and inside.products == {0: {}}
    assert policy.for_layer("x.fc").offset == own.offset


@pytest.mark.parametrize("text", ["", "# to be written\n", "---\n", "null\n"])
def test_a_file_that_says_nothing_is_refused(tmp_path, text) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=r'policy.yaml: the file says nothing; .* is written "accumulator: fp32"'):
        Policy.load(path)


def test_a_policy_that_emulates_nothing_can_be_written(tmp_path) -> None:
    path = tmp_path / "policy.yaml"
    for text in ("layers:\n", "accumulator: fp32\n", "{}\n"):
        path.write_text(text)
        assert Policy.load(path) == Policy()
    Policy().save(path)
    assert Policy.load(path) == Policy()


def test_files_mean_what_is_written_in_them(tmp_path) -> None:
    """Numbers without a point, and layers with names that YAML 1.1 takes for numbers and truth values."""
    names = ("0", "2.10", "on", "yes", "no", "null", "true", "1e3", "010")
    path = tmp_path / "policy.yaml"
    entries = "".join(f"  {name}: {{weight: M{i + 1}E3}}\n" for i, name in enumerate(names))
    path.write_text(f"accumulator: paper12\ngain: 1e-3\nshift: [1E2, -2.5e+1]\nlayers:\n{entries}")
    layers = {name: {"weight": f"M{i + 1}E3"} for i, name in enumerate(names)}
    expected = Policy("paper12", gain=0.001, shift=[100.0, -25.0], layers=layers)
    assert Policy.load(path) == expected
    expected.save(path)
    assert Policy.load(path) == expected
    path.write_text("accumulator: paper12\nlayers: {fc: null,\n  'fc': null}\n")
    with pytest.raises(ValueError, match=r"the key 'fc' is given twice(.|\n)*line 3"):
        Policy.load(path)


def test_json_round_trips() -> None:
    """JSON has only text as keys: a product's index comes back as such."""
    given = {"products": {1: {"accumulator": OTHER}, "linear": {"gain": 1.5}}, "layers": {"0": {"products": {0: {}}}}}
    policy = Policy(accumulator=PAPER, **given)
    read = Policy.parse(json.loads(json.dumps(policy.to_mapping())))
    assert read == policy and read.to_mapping() == policy.to_mapping()
    assert read.for_layer("a").for_product("matmul", 1).accumulator == OTHER
    assert Policy.parse(CALIBRATED) == Policy.parse(json.loads(json.dumps(Policy.parse(CALIBRATED).to_mapping())))


def test_kinds_are_those_that_are_emulated() -> None:
    """Every function with a handler gives a product of a known kind, but for those that stay torch's own."""
    by_another_name = {
        *("mm", "bmm", "mv", "dot", "vdot", "linalg_vecdot", "_grouped_mm", "scaled_dot_product_attention"),
        *(f"{name}{ending}" for name in ("addmm", "addmv", "baddbmm", "addbmm") for ending in ("", "_")),
        *("multi_head_attention_forward", "convolution", "embedding_bag", "cosine_similarity"),
        *(recurrent for name in STEPS for recurrent in (name, f"{name}_cell", f"quantized_{name}_cell")),
    }
    uncovered = {name for names in NOT_COVERED.values() for name in names}
    kinds = set(ATEN) - uncovered - by_another_name | {"attention_scores", "attention_values", *RECURRENT_KINDS}
    assert kinds == set(KINDS)


@pytest.mark.parametrize("per_layer", [40, 271])
def test_a_long_policy_prints_in_short(per_layer) -> None:
    entries = {
        f"model.layers.{i}.mlp": {
            "accumulator": f"M7E4b{5 + i % 2} product=M7E4b12",
            "offset": list(range(50)),
            "gain": [1.25] * 50,
        }
        for i in range(per_layer)
    }
    policy = Policy(PAPER, weight="M4E3", layers={**entries, "lm_head": None})
    text = repr(policy)
    assert len(text) < 1200 and len(repr(policy.for_layer("model.layers.0.mlp"))) < 250
    for part in (
        "accumulator='M7E4b10 product=M7E4b12 chunk=16'",
        "weight='M4E3'",
        "'model.layers.0.mlp': {'accumulator': 'M7E4b5 product=M7E4b12 chunk=16', 'offset': <50 numbers, 0 … 49>",
        f"and {per_layer - 3} more; of all {per_layer + 1}: {-(-per_layer // 2)} M7E4b5, {per_layer // 2} M7E4b6, "
        "1 left alone",
    ):
        assert part in text


def test_a_short_policy_prints_as_it_is_written() -> None:
    policy = Policy(PAPER, gain=[1.5, 2.0], layers={"conv1": None, "fc": {"accumulator": "fp32"}})
    assert eval(repr(policy), {"Policy": Policy}) == policy
    assert repr(Policy()) == "Policy()" and repr(Rule()) == "Rule()"


def test_failed_save_keeps_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "policy.yaml"
    Policy(weight="int8").save(path)

    def fail(*_) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        Policy(weight="int4").save(path)
    assert Policy.load(path).weight == "int8"
    assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize(
    ("layers", "name", "winner"),
    [
        ({"encoder": "a"}, "decoder", None),
        ({"encoder": "a"}, "encoder", "a"),
        ({"encoder": "a"}, "encoder.layer.0", "a"),
        ({"encoder": "a"}, "encoder2", None),
        ({"encoder.*": "a"}, "encoder", None),
        ({"encoder.*": "a"}, "encoder.layer.0.query", "a"),
        ({"fc": "a", "*": "b"}, "fc", "a"),
        ({"*": "b", "fc*": "a"}, "fc1", "a"),
        ({"fc?": "a", "fc*": "b"}, "fc1", "b"),
        ({"fc*": "a", "fc?": "b"}, "fc1", "b"),
        ({"layer.[01]": "a", "layer.*": "b"}, "layer.0", "b"),
        ({"encoder.layer.0": "a", "*": "b"}, "encoder.layer.0.query", "a"),
        ({"encoder.layer.0": "a", "*.query": "b"}, "encoder.layer.0.query", "a"),
        ({"encoder.layer.0": "a", "encoder.layer.*.query": "b"}, "encoder.layer.0.query", "b"),
        ({"encoder.layer.0": "a", "encoder.layer.0.query": "b"}, "encoder.layer.0.query", "b"),
        ({"*block*": "a", "fc": "b"}, "fc", "b"),
        ({"": "a", "fc": "b"}, "fc", "b"),
        ({"": "a", "fc": "b"}, "", "a"),
        ({"": "a"}, "fc.0", "a"),
        ({"*": "a"}, "", "a"),
    ],
)
def test_most_specific_entry_wins(layers, name, winner) -> None:
    formats = {"a": "M1E3", "b": "M2E3", None: "M3E3"}
    policy = Policy(weight=formats[None], layers={key: {"weight": formats[entry]} for key, entry in layers.items()})
    assert policy.for_layer(name).weight == formats[winner]


def test_entry_is_laid_over_the_policy_and_none_leaves_alone() -> None:
    policy = Policy(accumulator=PAPER, weight="M4E3", activation="M4E3", layers={"a": None, "b": {"weight": None}})
    assert policy.for_layer("a") is None
    assert policy.for_layer("b") == Rule(PAPER, None, "M4E3", "identity")
    assert policy.for_layer("c") == Rule(PAPER, "M4E3", "M4E3", "identity")


def test_a_module_of_several_names_has_the_most_specific_rule_of_any() -> None:
    policy = Policy(layers={"decoder": {"weight": "int8"}, "*": {"weight": "int4"}})
    assert policy.for_layer("embedding", "decoder").weight == "int8"


def test_replace_changes_every_accumulator_but_fp32() -> None:
    policy = Policy(
        accumulator=PAPER, weight="M4E3", layers={"a": {"accumulator": OTHER}, "b": {"accumulator": "fp32"}}
    )
    without = policy.replace(underflow=False)
    assert without.accumulator.underflow is False
    assert without.for_layer("a").accumulator == Accumulator.parse({**OTHER.to_mapping(), "underflow": False})
    assert without.for_layer("b").accumulator == "fp32"
    assert without.weight == "M4E3"
    assert without.replace(underflow=True) == policy
    new = policy.replace(accumulator="M10E5b16")
    assert str(new.for_layer("a").accumulator) == str(new.accumulator) == "M10E5b16 chunk=16"
    assert new.for_layer("b").accumulator == "fp32"
    assert policy.replace(accumulator="fp32").for_layer("a").accumulator == "fp32"
    assert policy.replace(weight=None, layers={}) == Policy(accumulator=PAPER)
    assert Policy().replace(underflow=False) == Policy()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"acumulator": "fp32"}, r"no 'acumulator'; did you mean 'accumulator'\?"),
        ({"layers": {"fc": {"wieght": "M4E3"}}}, r"layers: 'fc' has no 'wieght'; did you mean 'weight'\?"),
        ({"layers": {"fc": "fp32"}}, r"'fc' must have a mapping like \{accumulator: fp32\}, or null; got 'fp32'"),
        ({"layers": {2.10: None}}, '2.1 is not a module name.*quote it, like "2.10"'),
        ({"layers": {True: None}}, "True is not a module name"),
        ({"layers": {3: None, "3": None}}, "layers: '3' is given twice, as a number and as text"),
        ({"weight": "E4M3"}, "got 'E4M3'; did you mean \"M3E4\""),
        ({"activation": "INT8"}, "got 'INT8'; did you mean \"int8\""),
        ({"accumulator": "E4M7b10 product=E4M7b12"}, "'E4M7b10' is not a format.*did you mean \"M7E4b10\""),
        ({"layers": ["fc"]}, r"layers must map module names.*\['fc'\]"),
        ({"weight": "M4"}, r'weight must be a float format like "M4E3".*got \'M4\''),
        ({"activation": "int1"}, "activation must be .*int8.*got 'int1'"),
        ({"layers": {"fc": {"weight": 8}}}, "layers: 'fc': weight must be .*got 8"),
        ({"accumulator": "M7E4b300"}, "does not fit in float32"),
        ({"accumulator": "M7"}, "'M7' is not a format"),
        ({"accumulator": None}, "accumulator must be.*got None"),
        ({"layers": {"fc": {"accumulator": "M7"}}}, "layers: 'fc': 'M7' is not a format"),
        ({"estimator": "imediate/of"}, r"did you mean 'immediate/of'\?"),
        ({"per_token": 1}, "per_token must be true or false, got 1"),
        (12, "a policy is a mapping"),
        ("papr12", "is not a format"),
    ],
)
def test_what_is_wrong_is_named(given, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Policy.parse(given)


def test_load_names_the_file(tmp_path) -> None:
    path = tmp_path / "policy.yaml"
    path.write_text("accumulator: fp32\nwieght: M4E3\n")
    with pytest.raises(ValueError, match=r"policy.yaml: a policy has no 'wieght'; did you mean 'weight'"):
        Policy.load(path)
    path.write_text("accumulator: [")
    with pytest.raises(ValueError, match=r"policy.yaml: "):
        Policy.load(path)
    with pytest.raises(FileNotFoundError, match=r"missing.yaml"):
        Policy.load(tmp_path / "missing.yaml")


def test_replace_refuses_an_unknown_field() -> None:
    with pytest.raises(ValueError, match=r"no 'accum'; did you mean 'accumulator'"):
        Policy().replace(accum="fp32")


def test_entry_that_matches_no_module_is_refused() -> None:
    policy = Policy(layers={"clasifier": None})
    with pytest.raises(
        ValueError, match=r"layers: 'clasifier' matches no module of the model; did you mean 'classifier'\?"
    ):
        policy.check_names(["", "features", "classifier"])
    Policy(layers={"classifier": None, "feat*": None, "": None}).check_names(["", "features", "classifier"])


def test_an_accumulator_alone_is_a_policy(tmp_path) -> None:
    assert Policy.parse("paper12") == Policy.parse(PAPER) == Policy(accumulator=PAPER)
    assert Policy(accumulator="float32") == Policy(accumulator="fp32")


def test_an_unknown_argument_is_named_with_the_nearest() -> None:
    with pytest.raises(TypeError, match="a policy has no 'weights'; did you mean 'weight'"):
        Policy(weights="M4E3")


def test_files_are_saved_into_new_folders_and_refuse_keys_given_twice(tmp_path) -> None:
    path = tmp_path / "new" / "policy.yaml"
    Policy(accumulator=PAPER).save(path)
    assert Policy.load(path) == Policy(accumulator=PAPER)
    path.write_text("accumulator: paper12\naccumulator: fp32\n")
    with pytest.raises(ValueError, match="the key 'accumulator' is given twice"):
        Policy.load(path)


CALIBRATED = {
    "accumulator": "M7E4b10 product=M7E4b12 chunk=16",
    "gain": 1.04,
    "layers": {
        "fc": {"offset": [0, 1, -2], "gain": [1.0, 1.25, 0.1], "shift": [0.0, -0.5, 0.3]},
        "head": {"offset": list(range(-20, 20)), "gain": [1 + i / 7 for i in range(40)]},
        "attention": {
            "accumulator": "M7E4b3 product=M7E4b5 chunk=16",
            "products": {"attention_scores": {"offset": [[1], [2]], "gain": 1.5}, 1: {"accumulator": "fp32"}},
        },
    },
}


def test_offsets_gains_and_shifts_round_trip_by_mapping_and_file(tmp_path) -> None:
    policy = Policy.parse(CALIBRATED)
    path = tmp_path / "policy.yaml"
    policy.save(path)
    for copied in (Policy.parse(policy.to_mapping()), Policy.load(path), pickle.loads(pickle.dumps(policy))):
        assert copied == policy and hash(copied) == hash(policy)
    assert copy.deepcopy(policy) == policy
    text = path.read_text()
    assert "offset: head.offset" in text and "- 1.25" in text
    assert len(list(tmp_path.iterdir())) == 2
    assert policy != Policy.parse({**CALIBRATED, "gain": 1.05})
    with pytest.raises(ValueError, match="read-only"):
        policy.gain.array[...] = 2


def test_saving_again_leaves_no_old_vectors_and_a_failure_keeps_them(tmp_path, monkeypatch) -> None:
    path = tmp_path / "policy.yaml"
    old = Policy.parse(CALIBRATED)
    old.save(path)
    head = {**CALIBRATED["layers"]["head"], "offset": list(range(40))}
    new = Policy.parse({**CALIBRATED, "layers": {"head": head}})
    replace = os.replace

    def fail(source, target) -> None:
        if str(target).endswith(".yaml"):
            raise OSError("disk full")
        replace(source, target)

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk full"):
        new.save(path)
    monkeypatch.undo()
    assert Policy.load(path) == old
    new.save(path)
    assert Policy.load(path) == new
    old.replace(layers={}).save(path)
    assert len(list(tmp_path.glob("policy.yaml"))) == 1


def test_vectors_that_are_missing_or_others_are_named(tmp_path) -> None:
    path = tmp_path / "policy.yaml"
    Policy.parse(CALIBRATED).save(path)
    (vectors,) = tmp_path.glob("*.safetensors")
    content = vectors.read_bytes()
    vectors.write_bytes(content[:-1] + b"x")
    with pytest.raises(ValueError, match=r"policy.yaml: vectors: .* its content has another hash"):
        Policy.load(path)
    vectors.unlink()
    with pytest.raises(ValueError, match=r"policy.yaml: vectors: cannot read .*beside this file"):
        Policy.load(path)
    path.write_text("layers: {fc: {offset: fc.offset}}\n")
    with pytest.raises(ValueError, match=r"offset: 'fc.offset' names a vector, and no key vectors says in which file"):
        Policy.load(path)
    with pytest.raises(TypeError, match=r"layers: 'fc': offset 'fc.offset' names a vector in a file.*Policy.load"):
        Policy.parse({"layers": {"fc": {"offset": "fc.offset"}}})


def test_a_product_has_its_own_rule_by_index_before_kind() -> None:
    policy = Policy(
        accumulator=PAPER,
        gain=1.5,
        products={"matmul": {"accumulator": OTHER}, 1: {"gain": None}},
        layers={"fc": {"products": {"linear": {"offset": 3}}}},
    )
    rule = policy.for_layer("attention")
    assert rule.for_product("matmul", 0).accumulator == OTHER
    second = rule.for_product("matmul", 1)
    assert second.accumulator == PAPER and second.gain is None and second.products == {}
    assert rule.for_product("linear", 2) == Rule(PAPER, gain=policy.gain)
    assert policy.for_layer("fc").for_product("linear", 0).how["offset"] == 3
    assert not Policy(products={"matmul": {"accumulator": PAPER}}).for_layer("a").is_plain


def test_replacing_the_accumulator_drops_what_was_chosen_for_the_old_one() -> None:
    policy = Policy.parse(CALIBRATED)
    new = policy.replace(accumulator=OTHER)
    assert new.gain is None and new.layers["fc"] == {} and new.for_layer("head") == Rule(OTHER)
    products = new.layers["attention"]["products"]
    assert products == {"attention_scores": {}, 1: {"accumulator": "fp32"}}
    without = policy.replace(underflow=False)
    assert without.layers["fc"] == policy.layers["fc"] and without.gain == policy.gain
    assert without.for_layer("attention").accumulator.underflow is False


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"offset": 1.5}, "offset: expected integers, got 1.5"),
        ({"gain": "big"}, "gain 'big' names a vector in a file"),
        ({"gain": "1e-3"}, "gain '1e-3' is text; write the number without quotes"),
        ({"gain": [1.0, float("nan")]}, "gain: every number must be finite"),
        ({"layers": {"fc": {"shift": []}}}, r"layers: 'fc': shift: expected numbers, got \[\]"),
        ({"products": {"matmul": {"products": {}}}}, r"products: 'matmul' has no 'products'"),
        ({"products": {1.5: {}}}, "products: 1.5 is neither an index, like 0, nor a kind"),
        ({"products": {-1: {}}}, "products: -1 is no index: they count a layer's products from 0"),
        ({"layers": {"fc": {"products": {"-2": {}}}}}, "layers: 'fc': products: '-2' is no index"),
        ({"products": {"atention_scores": {}}}, "no kind 'atention_scores'; did you mean 'attention_scores'"),
        ({"products": {True: {}}}, "products: True is neither an index"),
        ({"products": {"1": {}, 1: {}}}, "products: 1 is given twice, as a number and as text"),
        ({"products": ["matmul"]}, "products must map a product's index or kind"),
        ({"layers": {"fc": {"products": {"linear": {"ofset": 1}}}}}, r"products: 'linear' has no 'ofset'; did you"),
    ],
)
def test_wrong_vectors_and_products_are_named(given, message) -> None:
    with pytest.raises((TypeError, ValueError), match=message):
        Policy.parse(given)


def test_vectors_of_layers_with_awkward_names_are_told_apart(tmp_path) -> None:
    layers = {name: {"offset": list(range(i, i + 40))} for i, name in enumerate(("layers", "products", "a.0"))}
    policy = Policy.parse({"layers": {**layers, "a": {"products": {0: {"offset": list(range(9, 49))}}}}})
    policy.save(tmp_path / "policy.yaml")
    assert Policy.load(tmp_path / "policy.yaml") == policy
